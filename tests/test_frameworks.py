"""Models of Flax and haiku: what is trained, what is handed on, what is refused."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import Squared
from diffprog.oracles import GaussNewton


INPUTS, TARGETS = jr.normal(jr.key(0), (6, 3)), jr.normal(jr.key(1), (6, 2))
ORACLE = GaussNewton(1.0)


pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def batch_norm(rngs):
    norm = nnx.BatchNorm(4, param_dtype=float, rngs=rngs)
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))
    return norm


class Net(nnx.Module):
    def __init__(self, statistics=False, dropout=False):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, param_dtype=float, rngs=rngs)
        self.norm = batch_norm(rngs) if statistics else None
        self.dropped = nnx.Dropout(0.5, rngs=rngs) if dropout else None
        self.last = nnx.Linear(4, 2, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = x if self.norm is None else self.norm(x)
        x = jnp.tanh(x)
        return self.last(x if self.dropped is None else self.dropped(x))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4, param_dtype=float)(x)
        x = jnp.tanh(linen.BatchNorm(False, param_dtype=float)(x))
        x = linen.Dropout(0.5, deterministic=False)(x)
        return linen.Dense(2, param_dtype=float)(x)


def haiku_net(x):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=True)
    return hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.5, jnp.tanh(x)))


class Case(NamedTuple):
    """`predict` and what it is given, and the statistics in a state."""

    predict: Callable
    params: Any
    state: Any
    statistics: Callable
    options: dict = {}


def of_nnx(**options) -> Case:
    graphdef, params, rest = nnx.split(Net(**options), nnx.Param, ...)

    def predict(params, inputs, *, state):
        model = nnx.merge(graphdef, params, state)
        return model(inputs), nnx.state(model, nnx.Not(nnx.Param))

    return Case(predict, params, rest, lambda state: state["norm"]["mean"][...])


def of_linen() -> Case:
    module = Linen()
    variables = module.init(dict(params=jr.key(2), dropout=jr.key(3)), INPUTS)

    def predict(params, inputs, *, state, key):
        variables = {"params": params, "batch_stats": state}
        rngs = {"dropout": key}
        outputs, new = module.apply(variables, inputs, mutable="batch_stats", rngs=rngs)
        return outputs, new["batch_stats"]

    mean = lambda state: state["BatchNorm_0"]["mean"]
    start = variables["params"], variables["batch_stats"]
    return Case(predict, *start, mean, dict(key=jr.key(4)))


def of_haiku() -> Case:
    net = hk.transform_with_state(haiku_net)
    params, start = net.init(jr.key(2), INPUTS)

    def predict(params, inputs, *, state, key):
        return net.apply(params, state, key, inputs)

    mean = lambda state: state["batch_norm/~/mean_ema"]["hidden"][0]
    return Case(predict, params, start, mean, dict(key=jr.key(4)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_nnx, of_linen, of_haiku])
def test_statistics_are_handed_on_and_the_rest_is_trained(make):
    case = make(statistics=True, dropout=True) if make is of_nnx else make()
    run = lambda params: case.predict(
        params, INPUTS, state=jax.tree.map(jnp.asarray, case.state), **case.options
    )
    flat, unravel = ravel_pytree(case.params)

    @jax.jit
    def by_hand():
        error = lambda flat: (run(unravel(flat))[0] - TARGETS).ravel()
        J = jax.jacobian(error)(flat)
        matrix = J.T @ J / 6 + jnp.eye(flat.size)
        return jnp.linalg.solve(matrix, J.T @ error(flat) / 6)

    vd = dp.value_and_direction(Squared(), ORACLE, case.predict)
    start = vd.init(case.params, case.state)
    args = INPUTS, TARGETS
    _, direction, state = vd.step(case.params, start, *args, **case.options)
    assert jax.tree.structure(direction) == jax.tree.structure(case.params)
    found, _ = ravel_pytree(direction)
    np.testing.assert_allclose(found, by_hand(), rtol=0, atol=1e-12)
    before, after = (case.statistics(s.model_state) for s in (start, state))
    assert not jnp.any(before) and jnp.all(after != 0)


def test_statistics_of_nnx_are_those_of_a_network_written_by_hand():
    case = of_nnx(statistics=True)

    def predict(params, x):
        params = jax.tree.map(jnp.atleast_2d, params)
        dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
        x = dense("first", x)
        x = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        return dense("last", jnp.tanh(x))

    by_hand = dp.value_and_direction(Squared(), ORACLE, predict)
    params = nnx.to_pure_dict(case.params)
    desired, _ = ravel_pytree(by_hand(params, INPUTS, TARGETS)[1])
    vd = dp.value_and_direction(Squared(), ORACLE, case.predict)
    state = vd.init(case.params, case.state)
    _, direction, _ = vd.step(case.params, state, INPUTS, TARGETS)
    found, _ = ravel_pytree(direction)
    np.testing.assert_allclose(found, desired, rtol=0, atol=1e-12)


def test_a_mask_of_nnx_is_new_at_every_step():
    case = of_nnx(dropout=True)
    vd = dp.value_and_direction(Squared(), ORACLE, case.predict)
    start, found = vd.init(case.params, case.state), []
    state = start
    for _ in range(2):
        (_, aux), _, state = vd.step(case.params, state, INPUTS, TARGETS)
        found.append(aux.outputs)
    assert jnp.any(found[0] != found[1])
    (_, aux), _, _ = vd.step(case.params, start, INPUTS, TARGETS)
    np.testing.assert_array_equal(aux.outputs, found[0])


def test_a_module_of_nnx_that_is_all_parameters_is_trained_as_it_is():
    model = Net()
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    vd = dp.value_and_direction(Squared(), ORACLE)

    @nnx.jit
    def train_step(model, optimizer):
        value, direction = vd(model, INPUTS, TARGETS)
        optimizer.update(model, direction)
        return value

    assert train_step(model, optimizer) > train_step(model, optimizer)


class Scaled(nnx.Module):
    def __init__(self):
        self.linear, self.scale = Net(), jnp.ones(2)

    def __call__(self, x):
        return self.scale * self.linear(x)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Net(statistics=True), "`norm.mean` .* type `BatchStat`"),
        (lambda: [Net(dropout=True)], "dropped.rngs.count` .* type `RngCount`"),
        (lambda: nnx.state(Net(statistics=True)), "'mean'.` .* type `BatchStat`"),
        (Scaled, "`scale` .* type `array`"),
        (lambda: 2 * [Net()], "0..first.bias` and `.1..first.bias` .* as two"),
    ],
)
def test_what_is_no_parameter_of_nnx_is_refused(make, message):
    vd = dp.value_and_direction(Squared(), ORACLE, lambda model, x: model(x))
    for call in (lambda model: vd(model, INPUTS, TARGETS), vd.init):
        with pytest.raises(TypeError, match=f"(?s){message}.*nnx.split.model, nnx.P"):
            call(make())


def test_layers_of_nnx_without_statistics_make_a_network():
    model = Net()
    net = dp.Network([model.first, jnp.tanh, model.last])
    assert net(INPUTS[0]).shape == (2,)
    with pytest.raises(TypeError, match="Layer 1, a BatchNorm, keeps a state"):
        dp.Network([model.first, batch_norm(nnx.Rngs(0))])


def test_parameters_of_nnx_need_a_predict():
    vd = dp.value_and_direction(Squared(), ORACLE)
    with pytest.raises(TypeError, match="(?s)is a State, which cannot .*nnx.split"):
        vd(nnx.state(Net(), nnx.Param), INPUTS, TARGETS)


def test_changes_of_nnx_that_would_be_lost_are_explained():
    graphdef, params, rest = nnx.split(Net(statistics=True), nnx.Param, ...)
    predict = lambda params, x: nnx.merge(graphdef, params, rest)(x)
    vd = dp.value_and_direction(Squared(), ORACLE, predict)
    with pytest.raises(Exception, match="BatchStat") as info:
        vd(params, INPUTS, TARGETS)
    notes = "".join(info.value.__notes__)
    assert "changes is its state" in notes and "vd.init(params, rest)" in notes


def test_a_module_of_linen_is_no_predict():
    message = "`predict` is Linen.*, whose .* `predict=module.apply`"
    with pytest.raises(TypeError, match=message):
        dp.value_and_direction(Squared(), ORACLE, Linen())
    with pytest.raises(TypeError, match=message):
        dp.optim.ggn(Squared(), Linen())


def test_statistics_beside_the_parameters_of_linen_are_refused():
    vd = dp.value_and_direction(Squared(), ORACLE, Linen().apply)
    variables = dict(params=jnp.ones(2), batch_stats=jnp.ones(2))
    with pytest.raises(TypeError, match='(?s)`batch_stats` beside.*mutable="batch_s'):
        vd(variables, INPUTS, TARGETS)


class Dropped(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dropout(0.5, deterministic=False)(x)
        return linen.Dense(2, param_dtype=float)(x)


DROPPED = Dropped()
VARIABLES = DROPPED.init({"params": jr.key(0), "dropout": jr.key(1)}, INPUTS)
PARAMS = VARIABLES["params"]
TRAIN_STATE = TrainState.create(
    apply_fn=DROPPED.apply, params=PARAMS, tx=optax.sgd(1.0)
)


def told(call):
    """The message of the error, and the notes that it carries."""
    with pytest.raises(Exception) as info:
        call()
    return "\n".join([str(info.value), *getattr(info.value, "__notes__", ())])


@pytest.mark.parametrize(
    "model, message",
    [
        (PARAMS, 'The model has the keys ..Dense_0..; .* `{"params": params}`'),
        (INPUTS, "The model has the type ArrayImpl; `module.apply`"),
        (TRAIN_STATE, "is a `TrainState`, .* `vd.state.params, inputs, targets.`"),
    ],
)
def test_what_linen_does_not_apply_is_refused(model, message):
    vd = dp.value_and_direction(Squared(), ORACLE, DROPPED.apply)
    for call in (lambda: vd(model, INPUTS, TARGETS), lambda: vd.init(model)):
        assert re.search(f"(?s){message}", told(call))


@pytest.mark.parametrize(
    "predict, options, message",
    [
        (DROPPED.apply, {}, 'PRNG for "dropout".*rngs={"dropout": key}'),
        (DROPPED.apply, {"key": jr.key(0)}, "'key'.*key=key.*rngs={\"dropout\": key}"),
        (lambda params, x, *, key: x, {}, "A key is given to the call: `vd.model"),
    ],
    ids=["no key", "key for the module", "no key for predict"],
)
def test_a_key_that_linen_misses_is_explained(predict, options, message):
    vd = dp.value_and_direction(Squared(), ORACLE, predict)
    found = told(lambda: vd(VARIABLES, INPUTS, TARGETS, **options))
    assert re.search(f"(?s){message}", found)


@pytest.mark.parametrize(
    "predict",
    [
        lambda params, x, *, state: Linen().apply(
            {"params": params, "batch_stats": state}, x, rngs={"dropout": jr.key(0)}
        ),
        lambda params, x, **options: Linen().apply({"params": params}, x, **options),
    ],
    ids=["mutable forgotten", "state for the module"],
)
def test_statistics_that_linen_misses_are_explained(predict):
    rngs = {"params": jr.key(0), "dropout": jr.key(1)}
    variables = Linen().init(rngs, INPUTS)
    vd = dp.value_and_direction(Squared(), ORACLE, predict)
    state = vd.init(variables["params"], variables["batch_stats"])
    found = told(lambda: vd.step(variables["params"], state, INPUTS, TARGETS))
    assert 'mutable="batch_stats"' in found


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dp.optim.ggn(Squared(), lambda x: x), "`predict` takes `.x.`; `pre"),
        (
            lambda: dp.value_and_direction(Squared(), ORACLE, lambda p, x, rng: x),
            "`predict` takes `.p, x, rng.`; `predict.model, inputs, .*key.` is",
        ),
        (
            lambda: dp.value_and_direction(lambda p, x, y: 0.0, ORACLE),
            "`loss` takes `.p, x, y.`; `loss.outputs, targets.` is expected",
        ),
    ],
)
def test_functions_of_other_arguments_are_refused_when_they_are_given(call, message):
    assert re.search(message, told(call))


def test_labels_in_a_list_are_refused():
    vd = dp.value_and_direction(dp.losses.SoftmaxCrossEntropy(), ORACLE, DROPPED.apply)
    labels = list(np.zeros(6, int))
    assert "is a list of numbers" in told(lambda: vd(VARIABLES, INPUTS, labels))


def test_outputs_that_are_integers_are_told_by_their_dtype():
    vd = dp.value_and_direction(Squared(), ORACLE, lambda w, x: jnp.argmax(x * w, 1))
    assert "and dtype int" in told(lambda: vd(jnp.ones((1, 3)), INPUTS, TARGETS))


class Equinox(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __call__(self, x, state):
        return self.norm(x, state)


MODEL = Equinox(eqx.nn.BatchNorm(3, "batch", mode="batch"))


@pytest.mark.parametrize(
    "predict, message",
    [
        (None, "positional argument: 'state'.* It keeps a state: give"),
        (lambda model, x, *, state: model(x, state), "'state'.* A state is given to"),
        (lambda model, x: (x, x), "returned .* A new state may stand beside it"),
    ],
    ids=["default", "not given", "not asked for"],
)
def test_a_call_that_forgets_the_state_says_where_it_belongs(predict, message):
    vd = dp.value_and_direction(Squared(), ORACLE, predict)
    with pytest.raises(TypeError) as info:
        vd(MODEL, INPUTS, TARGETS)
    told = "".join([str(info.value), *getattr(info.value, "__notes__", ())])
    assert re.search(f"(?s){message}", told)
