"""The door of the oracles: any model, any optimizer, state, failures."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax import linen
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import SoftmaxCrossEntropy, Squared
from diffprog.oracles import (
    CG,
    Cholesky,
    DualGaussNewton,
    GaussNewton,
    Gradient,
    GradientNorm,
    InverseRule,
    MadsenNielsen,
    MoreauBackprop,
    OUTCOMES,
    ProxLinear,
    TargetPropagation,
    Threshold,
)

from . import helpers


KEYS = jr.split(jr.key(4), 12)
INPUTS, TARGETS = jr.normal(KEYS[0], (6, 3)), jr.normal(KEYS[1], (6, 2))
MODEL = eqx.nn.MLP(3, 2, 6, 1, jnp.tanh, key=KEYS[2])
ORACLES = {
    "gradient": Gradient(),
    "Gauss-Newton": GaussNewton(0.1),
    "dual": DualGaussNewton(0.1),
    "CG": GaussNewton(0.1, CG(max_steps=3)),
    "prox-linear": ProxLinear(0.1),
}
every_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)


close = ft.partial(helpers.close, scale=1.0)


def arrays(tree):
    return eqx.filter(tree, eqx.is_inexact_array)


# In place of value_and_grad -------------------------------------------------------


def test_the_value_is_differentiated_as_the_loss():
    scale = jnp.array(2.0)
    predict = lambda W, x: x @ W.T * float(scale)  # asks for what it captures
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1), predict)
    value = lambda W, x: vd(W, x, TARGETS)[0]
    loss = lambda W, x: jnp.mean(jnp.sum((2 * x @ W.T - TARGETS) ** 2, 1)) / 2
    at = jnp.ones((2, 3)), INPUTS
    for mine, plain in zip(
        *(jax.grad(f, (0, 1))(*at) for f in (value, loss)), strict=True
    ):
        close(mine, plain)


def test_the_gradient_is_that_of_equinox():
    loss = lambda model: Squared()(jax.vmap(model)(INPUTS), TARGETS).mean()
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(MODEL)
    vd = dp.value_and_direction(Squared(), Gradient())
    found, direction = vd(MODEL, INPUTS, TARGETS)
    assert jax.tree.structure(direction) == jax.tree.structure(gradient)
    close((found, direction), (value, gradient))


@pytest.mark.costly
@every_oracle
def test_jit_vmap_and_the_stateful_call_agree(oracle):
    vd = dp.value_and_direction(Squared(), oracle)
    desired = vd(MODEL, INPUTS, TARGETS)
    close(eqx.filter_jit(vd)(MODEL, INPUTS, TARGETS), desired)
    (value, aux), direction, _ = vd.step(MODEL, vd.init(MODEL), INPUTS, TARGETS)
    close((value, direction), desired)
    assert aux.slope < 0 < aux.decrease and aux.result == dp.RESULTS.successful
    params, rest = eqx.partition(MODEL, eqx.is_inexact_array)
    twice = jax.tree.map(lambda a: np.stack([a, 2 * a]), params)
    batched = jax.vmap(lambda p: vd(eqx.combine(p, rest), INPUTS, TARGETS))(twice)
    close(jax.tree.map(lambda a: np.asarray(a)[0], batched), desired, 1e-9)


@pytest.mark.costly
@every_oracle
def test_any_optimizer_takes_the_direction(oracle):
    vd = dp.value_and_direction(Squared(), oracle)
    for optimizer in (optax.sgd(0.1), optax.adam(1e-2)):
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
            model, state = MODEL, optimizer.init(arrays(MODEL))
            update = jax.jit(optimizer.update)
            first, _ = vd(model, INPUTS, TARGETS)
            for _ in range(10):
                _, direction = vd(model, INPUTS, TARGETS)
                updates, state = update(direction, state, arrays(model))
                model = eqx.apply_updates(model, updates)
            assert vd(model, INPUTS, TARGETS)[0] < first


def test_new_numbers_do_not_compile_again():
    traces = 0

    def predict(model, inputs):
        nonlocal traces
        traces += 1
        return jax.vmap(model)(inputs)

    for damping in (0.1, 0.2):
        oracle = GaussNewton(damping, CG(max_steps=2, rtol=damping))
        vd = dp.value_and_direction(Squared(), oracle, predict)
        for inputs in (INPUTS, 2 * INPUTS):
            vd(MODEL, inputs, TARGETS)
    assert traces == 1


class Attention(eqx.Module):
    """Convolution, attention, normalization and a residual, with no registration."""

    conv: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.conv = eqx.nn.Conv1d(1, 4, 3, padding=1, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        self.norm = eqx.nn.LayerNorm(4)
        self.head = eqx.nn.Linear(4, 2, key=keys[2])

    def __call__(self, x):
        h = self.conv(x[None]).T
        h = h + self.attention(*3 * (jax.vmap(self.norm)(h),))
        return self.head(jnp.mean(h, 0))


@pytest.mark.slow
def test_an_unmodified_model_of_many_kinds_of_layers():
    model = Attention(KEYS[3])
    loss, labels = SoftmaxCrossEntropy(), jnp.arange(6) % 2
    exact = dp.value_and_direction(loss, GaussNewton(0.1, Cholesky()))
    by_cg = dp.value_and_direction(loss, GaussNewton(0.1, CG(max_steps=40, rtol=1e-14)))
    _, desired = exact(model, INPUTS, labels)
    value, direction = by_cg(model, INPUTS, labels)
    close(direction, desired, 1e-10)
    # A tenth of the step: the loss falls by as much of the slope.
    new = eqx.apply_updates(model, jax.tree.map(lambda d: -0.1 * d, direction))
    assert by_cg(new, INPUTS, labels)[0] < value


def test_a_flax_module():
    dense = lambda size: linen.Dense(size, param_dtype=float)
    module = linen.Sequential([dense(4), jnp.tanh, dense(2)])
    params = module.init(KEYS[4], INPUTS)
    vd = dp.value_and_direction(
        Squared(), GaussNewton(0.1), lambda params, x: module.apply(params, x)
    )
    value, direction = vd(params, INPUTS, TARGETS)
    assert jax.tree.structure(direction) == jax.tree.structure(params)
    new = jax.tree.map(jnp.subtract, params, direction)
    assert vd(new, INPUTS, TARGETS)[0] < value


def test_scales():
    step = dp.value_and_direction(Squared(), GaussNewton(0.25))
    gradient = dp.value_and_direction(Squared(), GaussNewton(0.25), scale="gradient")
    a, b = (vd(MODEL, INPUTS, TARGETS)[1] for vd in (step, gradient))
    close(jax.tree.map(lambda a: 0.25 * a, a), b)
    assert all(jnp.any(a != 0) for a in jax.tree.leaves(b))


def test_integer_arrays_of_modules_are_no_parameters():
    class Permuted(eqx.Module):
        order: jax.Array
        linear: eqx.nn.Linear

        def __call__(self, x):
            return self.linear(x[self.order])

    model = Permuted(jnp.array([2, 0, 1]), eqx.nn.Linear(3, 2, key=KEYS[5]))
    _, direction = dp.value_and_direction(Squared(), GaussNewton(1.0))(
        model, INPUTS, TARGETS
    )
    assert direction.order is None and direction.linear.weight.shape == (2, 3)
    assert jnp.all(direction.linear.weight != 0)


# State ----------------------------------------------------------------------------


def test_keys_and_model_states_are_handed_on():
    def predict(model, inputs, *, key, state):
        outputs = jax.vmap(model)(inputs) + jr.normal(key, (1, 2))
        return outputs, state + jnp.mean(inputs)

    vd = dp.value_and_direction(Squared(), GaussNewton(0.1), predict)
    state = vd.init(MODEL, jnp.zeros(()))
    values = []
    for seed in (0, 1):
        (value, _), _, state = vd.step(MODEL, state, INPUTS, TARGETS, key=jr.key(seed))
        values.append(value)
    close(state.model_state, 2 * jnp.mean(INPUTS))
    assert values[0] != values[1]


class Normalized(eqx.Module):
    """A model whose examples are coupled, and which keeps running means."""

    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(3, 5, key=key)
        self.norm = eqx.nn.BatchNorm(5, "batch", mode="batch")
        self.last = eqx.nn.Linear(5, 2, key=key)

    def __call__(self, x, state):
        h, state = self.norm(self.first(x), state)
        return self.last(jnp.tanh(h)), state


def test_batch_normalization():
    def predict(model, inputs, *, state):
        run = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        return run(inputs, state)

    model, means = eqx.nn.make_with_state(Normalized)(KEYS[6])
    # Enough damping for the loss to fall in full steps.
    vd = dp.value_and_direction(Squared(), GaussNewton(10.0), predict)
    state, values, directions = vd.init(model, means), [], []
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    for _ in range(3):
        (value, _), direction, state = vd.step(model, state, INPUTS, TARGETS)
        model = eqx.apply_updates(model, jax.tree.map(jnp.negative, direction))
        values.append(value)
        directions.append(direction)
    assert values[0] > values[1] > values[2]
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def dense():
        def errors(flat):
            outputs, _ = predict(eqx.combine(unravel(flat), rest), INPUTS, state=means)
            return (outputs - TARGETS).ravel()

        J = jax.jacobian(errors)(flat)
        matrix = J.T @ J / 6 + 10.0 * jnp.eye(flat.size)
        return unravel(jnp.linalg.solve(matrix, J.T @ errors(flat) / 6))

    close(directions[0], dense())
    before, after = (jax.tree.leaves(s) for s in (means, state.model_state))
    assert any(jnp.any(a != b) for a, b in zip(before, after, strict=True))


def test_keys_are_split_among_examples():
    model = eqx.nn.Sequential([MODEL, eqx.nn.Dropout(0.5)])
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1), has_aux=True)
    (_, aux), _ = vd(model, jnp.ones((6, 3)), TARGETS, key=jr.key(0))
    dropped = aux.outputs == 0
    assert jnp.any(dropped != dropped[:1])


def train(damping, steps=25, targets=TARGETS):
    vd = dp.value_and_direction(Squared(), GaussNewton(damping))
    model, state, found = MODEL, vd.init(MODEL), []
    for _ in range(steps):
        (value, aux), direction, state = vd.step(model, state, INPUTS, targets)
        model = eqx.apply_updates(model, jax.tree.map(jnp.negative, direction))
        found.append((value, aux.damping, aux.ratio))
    return np.asarray(found, float)


@pytest.mark.costly
@pytest.mark.parametrize(
    "rule",
    [MadsenNielsen(1.0), Threshold(1.0), GradientNorm(0.1)],
    ids=lambda rule: type(rule).__name__,
)
def test_dampings_adapt(rule):
    values, dampings, ratios = train(rule).T
    assert values[-1] < 1e-3 * values[0]
    assert dampings[-1] < 0.5 * dampings[0]
    assert np.isnan(ratios).all() == (not rule.follows_ratio)


@pytest.mark.parametrize("targets", [TARGETS, 0 * TARGETS], ids=["real", "zero"])
@pytest.mark.parametrize("rule", [MadsenNielsen(1.0), Threshold(1.0)], ids=str)
def test_dampings_rest_where_a_decrease_is_lost_in_rounding(rule, targets):
    values, dampings, ratios = train(rule, 60, targets).T
    assert values[-20:].max() < 1e-25 * values[0]
    assert np.isnan(ratios[-20:]).all() and np.isfinite(ratios[:5]).all()
    np.testing.assert_array_equal(dampings[-20:], dampings[-1])
    assert dampings[-1] == dampings.min()


def test_a_bad_step_is_rejected():
    # Newton's method for arctan(w) = 0 goes from 2 to -3.5, farther from the root.
    predict = lambda w, x: jnp.arctan(w * x)
    oracle = GaussNewton(MadsenNielsen(1e-8))
    vd = dp.value_and_direction(Squared(), oracle, predict)
    w, x, y = jnp.full((1, 1), 2.0), jnp.ones((1, 1)), jnp.zeros((1, 1))
    state = vd.init(w)
    (_, aux), direction, after = vd.step(w, state, x, y)
    newton = 2 - 5 * np.arctan(2)
    close(aux.ratio, 1 - (np.arctan(newton) / np.arctan(2)) ** 2, 1e-6)
    assert aux.ratio < 0 and aux.result == dp.RESULTS.successful
    assert jnp.all(direction == 0)
    assert state.damping is not None and after.damping is not None
    assert after.damping.damping == 2 * state.damping.damping
    assert after.damping.growth == 4
    # Without a state there is nothing to adapt.
    _, direction = vd(w, x, y)
    close(w - direction, jnp.full((1, 1), newton), 1e-5)


@pytest.mark.costly
@pytest.mark.parametrize("fallback", [False, True])
def test_no_step_is_made_to_a_loss_that_is_not_finite(fallback):
    # sqrt(w) at 4 and the target -1: the step of Gauss-Newton ends at -8.
    predict = lambda w, x: jnp.sqrt(w * x)
    vd = dp.value_and_direction(
        Squared(), GaussNewton(Threshold(1e-8)), predict, fallback=fallback
    )
    w, x, y = jnp.full((1, 1), 4.0), jnp.ones((1, 1)), jnp.full((1, 1), -1.0)
    state = vd.init(w)
    (value, aux), direction, after = vd.step(w, state, x, y)
    close((value, aux.slope), (4.5, -9.0), 1e-5)
    assert aux.result == dp.RESULTS.nonfinite_rollout and np.isnan(aux.ratio)
    close(direction, jnp.full((1, 1), 0.75 if fallback else 0.0))
    assert after.damping is not None
    close(after.damping.damping, 1.5e-8, 1e-20)


def test_rules_of_damping():
    state = MadsenNielsen(1.0).init()
    accepted, rejected, unclear = OUTCOMES.accepted, OUTCOMES.rejected, OUTCOMES.unclear
    better = MadsenNielsen(1.0).update(state, jnp.asarray(1.0), accepted)
    close(better.damping, 1 / 3)
    for rule, ratio, outcome, factor in (
        (MadsenNielsen(1.0), jnp.nan, rejected, 2.0),
        (MadsenNielsen(1.0), jnp.nan, unclear, 1.0),
        (Threshold(1.0), 0.1, accepted, 1.5),
        (Threshold(1.0), 0.5, accepted, 1.0),
        (Threshold(1.0), 0.9, accepted, 0.5),
        (Threshold(1.0), jnp.nan, rejected, 1.5),
        (Threshold(1.0), jnp.nan, unclear, 1.0),
    ):
        new = rule.update(rule.init(), jnp.asarray(ratio), outcome)
        close(new.damping, factor)
        assert rule.keep(outcome) == (outcome != rejected or not rule.reject)
    rule = GradientNorm(2.0, 0.5)
    close(rule.damping(rule.init(), jnp.asarray(9.0)), 6.0)


class Decaying(dp.oracles.AbstractDamping):
    follows_ratio: ClassVar[bool] = False

    def init(self):
        return dp.oracles.DampingState(jnp.asarray(1.0), jnp.asarray(1.0))

    def damping(self, state, gradient):
        return state.damping

    def update(self, state, ratio, outcome):
        return dp.oracles.DampingState(0.5 * state.damping, state.growth)

    def keep(self, outcome):
        return outcome == OUTCOMES.accepted


def test_a_rule_of_ones_own():
    values, dampings, ratios = train(Decaying(), 4).T
    close(dampings, 0.5 ** np.arange(4))
    assert values[-1] < values[0] and np.isnan(ratios).all()


# Failures -------------------------------------------------------------------------


def nan_model(model):
    return eqx.tree_at(lambda m: m.layers[0].weight, model, jnp.full((6, 3), jnp.nan))


@pytest.mark.costly
@every_oracle
def test_numbers_that_go_wrong(oracle):
    bad = nan_model(MODEL)
    vd = dp.value_and_direction(Squared(), oracle)
    with pytest.raises(dp.SolveError, match="not finite"):
        vd(bad, INPUTS, TARGETS)
    _, direction = eqx.filter_jit(vd)(bad, INPUTS, TARGETS)
    assert all(jnp.all(jnp.isnan(d)) for d in jax.tree.leaves(direction))
    (_, aux), direction, state = vd.step(bad, vd.init(bad), INPUTS, TARGETS)
    assert aux.result == dp.RESULTS.nonfinite_rollout
    assert all(jnp.all(d == 0) for d in jax.tree.leaves(direction))
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(arrays(state)))


def test_the_gradient_instead():
    concave = lambda u, y: -jnp.sum((u - y) ** 2, 1)
    vd = dp.value_and_direction(concave, GaussNewton(0.1), fallback=True, has_aux=True)
    (_, aux), direction = vd(MODEL, INPUTS, TARGETS)
    assert aux.result == dp.RESULTS.factorization_failed
    _, gradient = dp.value_and_direction(concave, Gradient())(MODEL, INPUTS, TARGETS)
    close(direction, gradient)
    with pytest.raises(dp.SolveError, match="not finite"):  # no gradient either
        vd(nan_model(MODEL), INPUTS, TARGETS)


def test_examples_that_depend_on_each_other():
    apart = dp.value_and_direction(Squared(), GaussNewton(0.1), check=True)
    apart(MODEL, INPUTS, TARGETS)

    def predict(model, inputs):
        outputs = jax.vmap(model)(inputs)
        return outputs - jnp.mean(outputs, 0, keepdims=True)

    vd = dp.value_and_direction(Squared(), GaussNewton(0.1), predict, check=True)
    with pytest.raises(ValueError, match="examples are not independent"):
        vd(MODEL, INPUTS, TARGETS)
    with pytest.raises(ValueError, match="call outside `jit`"):
        eqx.filter_jit(vd)(MODEL, INPUTS, TARGETS)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda vd: vd({"w": jnp.ones(3)}, INPUTS, TARGETS),
            TypeError,
            "The model is a dict, which cannot be called: give",
        ),
        (
            lambda vd: vd(eqx.nn.Identity(), INPUTS, TARGETS),
            TypeError,
            "no floating array",
        ),
        (
            lambda vd: vd(MODEL, INPUTS, TARGETS[:, 0]),
            ValueError,
            "`targets` has shape",
        ),
        (
            lambda vd: vd.step(MODEL, None, INPUTS, TARGETS),
            TypeError,
            r"start with `init\(model\)`",
        ),
        (
            lambda vd: vd.step(MODEL, vd.init(MODEL, 0.0), INPUTS, TARGETS),
            ValueError,
            "The model has a state: give",
        ),
    ],
)
def test_wrong_calls(call, error, message, unchecked):
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1))
    with pytest.raises(error, match=message):
        call(vd)


def test_a_state_belongs_to_a_model():
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1, CG(3, warm_start=0.9)))
    other = eqx.nn.MLP(3, 2, 7, 1, jnp.tanh, key=KEYS[2])
    with pytest.raises(ValueError, match="remembers a step of another model"):
        vd.step(MODEL, vd.init(other), INPUTS, TARGETS)


def transposed(model, inputs):
    return jax.vmap(model)(inputs).T


@pytest.mark.parametrize("loss", [Squared(), lambda u, y: jnp.sum((u - y) ** 2, -1)])
def test_who_did_not_give_a_row_per_example(loss, unchecked):
    call = lambda predict, targets=TARGETS, inputs=INPUTS: dp.value_and_direction(
        loss, GaussNewton(0.1), predict
    )(MODEL, inputs, targets)
    blamed = lambda match: pytest.raises(ValueError, match=match)
    mean = lambda model, inputs: jnp.mean(jax.vmap(model)(inputs), 0)
    for predict in (transposed, mean, lambda model, inputs: model(inputs[0])):
        with blamed(r"`predict` returned outputs of shape .* for 6 examples"):
            call(predict)
    for predict in (None, lambda model, inputs: jax.vmap(model)(inputs)):
        with blamed(r"`targets` has shape \(4, 2\) for 6 examples"):
            call(predict, TARGETS[:4])
    # Sequences whose first axis is time say nothing of the examples.
    with blamed(r"outputs of shape \(2, 6\) for inputs of .*, and `targets` has shape"):
        call(transposed, TARGETS[:4])
    with pytest.raises(Exception, match=r"outputs of shape \(6, 2\).*returns them"):
        call(None, jnp.ones((6, 3)))


def test_labels_of_a_transposed_output(unchecked):
    vd = dp.value_and_direction(SoftmaxCrossEntropy(), Gradient(), transposed)
    with pytest.raises(ValueError, match="`predict` returned outputs of shape"):
        vd(MODEL, INPUTS, jnp.arange(6) % 2)


def test_outputs_that_do_not_depend_on_the_parameters_are_refused():
    captured = lambda model, inputs: jax.vmap(MODEL)(inputs)
    vd = dp.value_and_direction(Squared(), Gradient(), captured)
    with pytest.raises(ValueError, match="outputs do not depend on the parameters"):
        vd(MODEL, INPUTS, TARGETS)


def test_check_looks_at_the_targets():
    vd = dp.value_and_direction(SoftmaxCrossEntropy(), Gradient(), check=True)
    vd(MODEL, INPUTS, jnp.arange(6) % 2)
    with pytest.raises(ValueError, match="label 2; the 2 classes are 0 to 1"):
        vd(MODEL, INPUTS, jnp.arange(6) % 3)


anything: Any = dp  # what follows is wrong on purpose


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: anything.oracles.GaussNewton(0.1, CG), "`solver` is the class CG; "),
        (
            lambda: anything.oracles.GaussNewton(0.1, 10),
            r"`solver` is 10; .*CG\(max_steps=10\)`",
        ),
        (
            lambda: anything.oracles.DualGaussNewton(0.1, CG),
            "`solver` is the class CG; ",
        ),
        (
            lambda: anything.oracles.GaussNewton("big"),
            "`damping` is 'big'; a number > 0 .* a rule",
        ),
        (
            lambda: anything.oracles.GaussNewton(CG()),
            r"`damping` is CG\(\); a number > 0",
        ),
        (
            lambda: anything.oracles.Gradient(Threshold),
            "`damping` is the class Threshold; a number",
        ),
        (lambda: anything.oracles.GaussNewton(None), "`damping` is None; a number > 0"),
        (
            lambda: anything.oracles.ProxLinear(0.1, CG()),
            r"`solver` is CG\(\); .*NewtonSteps",
        ),
        (
            lambda: anything.oracles.ProxLinear(0.1, gap="small"),
            "`gap` is 'small'; a number > 0",
        ),
        (lambda: anything.oracles.Threshold(low="a"), "`low` is 'a'; a number"),
        (
            lambda: anything.oracles.MadsenNielsen([1.0]),
            r"`initial` is \[1.0\]; a number > 0",
        ),
        (lambda: anything.oracles.GradientNorm(power="2"), "`power` is '2'; a number"),
        (lambda: anything.oracles.CG(rtol="small"), "`rtol` is 'small'; a number"),
        (
            lambda: anything.oracles.NewtonSteps(solver=CG),
            "`solver` is the class CG; `Auto`",
        ),
        (
            lambda: anything.oracles.MoreauRule(CG()),
            r"`solver` is CG\(\); .*InnerNewton",
        ),
        (
            lambda: anything.oracles.prox_prop(solver=anything.oracles.InnerNewton),
            "`solver` is the class InnerNewton",
        ),
        (
            lambda: anything.oracles.TargetPropagation("x"),
            "`stepsize` is 'x'; a number > 0",
        ),
        (
            lambda: anything.oracles.TargetPropagation(eps=None),
            "`eps` is None; a number in",
        ),
        (
            lambda: anything.ILQR(anything.ParallelRiccati),
            "`riccati` is the class ParallelRicc",
        ),
        (
            lambda: anything.Newton("parallel"),
            r"`riccati` is 'parallel'; .*Riccati\(\)`",
        ),
        (lambda: anything.GaussNewton(0.1), "`riccati` is 0.1; something like"),
        (
            lambda: anything.GaussNewton(lambda p: p),
            "`riccati` is <func.* residuals are the last state of a `dp.ControlPro",
        ),
        (lambda: anything.MoreauGradient(1.0, CG()), r"`solver` is CG\(\)"),
        (lambda: anything.rule_boundary(eqx.nn.Linear), "`layer` is the class Linear"),
        (lambda: anything.Network([eqx.nn.Linear]), "Layer 0 is the class Linear"),
        (
            lambda: anything.Recurrent(anything.RNNCell, 3),
            "`cell` is the class RNNCell",
        ),
        (
            lambda: anything.NetworkProblem(
                anything.Network([MODEL]), Squared, TARGETS
            ),
            "`loss` is the class Squared",
        ),
    ],
)
def test_parts_are_checked_when_they_are_put_together(make, message, unchecked):
    with pytest.raises(TypeError, match=message):
        make()


def test_wrong_models_and_batches(unchecked):
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1))
    raises = lambda kind, match: pytest.raises(kind, match=match)
    with raises(TypeError, r"The model is an array of shape \(6, 3\), which cannot"):
        vd(INPUTS, MODEL, TARGETS)
    with raises(TypeError, "The model is the class MLP"):
        vd(eqx.nn.MLP, INPUTS, TARGETS)
    with raises(TypeError, r"`inputs` is a list of numbers.*`jnp.asarray\(inputs\)`"):
        vd(MODEL, INPUTS.tolist(), TARGETS)
    with raises(TypeError, r"`key` is 0; a key such as `jax.random.key\(0\)`"):
        vd(MODEL, INPUTS, TARGETS, key=0)  # pyright: ignore
    with raises(ValueError, r"has shape \(0, 3\): .* Skip an empty batch"):
        vd(MODEL, INPUTS[:0], TARGETS[:0])
    with raises(Exception, r"one example of shape \(\), a row of inputs of shape \(3"):
        vd(MODEL, INPUTS[0], TARGETS[0])
    net = dp.Network([MODEL])
    with raises(Exception, r"as one example: .*`jax.vmap\(network\)\(x\)`"):
        net(INPUTS)
    with raises(ValueError, "`params` is not arranged like those of the network"):
        net.with_params(())
    with raises(TypeError, r"`activation` is 'tanh'; a function `a\(z\)`"):
        anything.RNNCell(3, 4, "tanh", key=jr.key(0))
    with raises(Exception, r"Raised in `predict\(model, inputs, key=key\)`"):
        predict = lambda model, inputs: jax.vmap(model)(inputs)
        bare = dp.value_and_direction(Squared(), GaussNewton(0.1), predict)
        bare(MODEL, INPUTS, TARGETS, key=jr.key(0))
    with raises(TypeError, "`predict` returned .* it returns two things"):
        predict = lambda model, inputs, state: jax.vmap(model)(inputs)
        bare = dp.value_and_direction(Squared(), GaussNewton(0.1), predict)
        bare.step(MODEL, bare.init(MODEL, jnp.zeros(())), INPUTS, TARGETS)
    with raises(ValueError, r"`metric` is an array of shape \(3,\); a pytree like"):
        oracle = GaussNewton(0.1, metric=jnp.ones(3))
        dp.value_and_direction(Squared(), oracle)(MODEL, INPUTS, TARGETS)
    for oracle in (*ORACLES.values(), TargetPropagation()):
        empty = dp.value_and_direction(Squared(), oracle)
        with raises(ValueError, r"`inputs` has shape \(0, 3\): at least one example"):
            empty(MODEL, INPUTS[:0], TARGETS[:0])
    with raises(ValueError, "`inputs` has shape None; arrays with one row for every"):
        vd(MODEL, None, TARGETS)
    turned = jax.tree.map(lambda a: a.astype(complex), arrays(MODEL))
    with raises(TypeError, r"parameter \.layers\[0\].* has dtype complex128"):
        vd(eqx.combine(turned, MODEL), INPUTS, TARGETS)
    predict = lambda model, inputs: jax.vmap(model)(inputs).astype(complex)
    with raises(TypeError, "The outputs of the model have dtype complex128"):
        dp.value_and_direction(Squared(), Gradient(), predict)(MODEL, INPUTS, TARGETS)


def test_wrong_definitions(unchecked):
    make = dp.value_and_direction
    predict = lambda params, x: x @ params["w"]
    params = {"w": jnp.ones((3, 2)), "n": jnp.arange(2)}
    with pytest.raises(TypeError, match=r"The parameter \['n'\] has dtype int64"):
        make(Squared(), Gradient(), predict)(params, INPUTS, TARGETS)
    with pytest.raises(TypeError, match="`oracle` is the class GaussNewton"):
        make(Squared(), GaussNewton)  # pyright: ignore
    with pytest.raises(TypeError, match="`predict` is 3"):
        make(Squared(), Gradient(), 3)  # pyright: ignore
    with pytest.raises(ValueError, match="`scale` is 'unit'"):
        make(Squared(), Gradient(), scale="unit")  # pyright: ignore
    with pytest.raises(ValueError, match="`reduction` is 'average'"):
        make(Squared(), Gradient(), reduction="average")  # pyright: ignore
    total = lambda u, y: jnp.mean((u - y) ** 2)
    with pytest.raises(ValueError, match="one loss per example"):
        make(total, Gradient())(MODEL, INPUTS, TARGETS)
    with pytest.raises(TypeError, match="one floating array whose first axis"):
        outputs = lambda model, x: (jax.vmap(model)(x), x)
        make(Squared(), Gradient(), outputs)(MODEL, INPUTS, TARGETS)


class Careless(dp.oracles.AbstractOracle):
    """An oracle whose answer is given."""

    answer: Any
    damping: ClassVar[None] = None

    def init(self, params):
        return None

    def propose(self, at, damping, memory, key):
        return self.answer(at.gradient)


def test_wrong_answers_of_an_oracle_of_ones_own(unchecked):
    call = lambda answer: dp.value_and_direction(Squared(), Careless(answer))
    with pytest.raises(TypeError, match="`Careless.propose` returned"):
        call(lambda g: g)(MODEL, INPUTS, TARGETS)
    first = lambda g: dp.oracles.Proposal(g.layers[0], jnp.asarray(1.0))
    with pytest.raises(ValueError, match="`Careless.propose` returned a step of shape"):
        call(first)(MODEL, INPUTS, TARGETS)


# Layers that know their derivative backward only -------------------------------------


@jax.custom_vjp
def by_vjp(x):
    return jnp.tanh(x)


by_vjp.defvjp(
    lambda x: (by_vjp(x), x), lambda x, g: (g * (1 - jnp.square(jnp.tanh(x))),)
)


@pytest.mark.costly
@pytest.mark.parametrize(
    "oracle",
    [
        Gradient(Threshold(1.0)),
        GaussNewton(0.1, Cholesky()),
        GaussNewton(0.1, CG()),
        ProxLinear(0.1),
        MoreauBackprop(0.1, InverseRule(), InverseRule()),
    ],
    ids=lambda oracle: type(oracle).__name__,
)
def test_a_custom_vjp_gives_the_same_direction(oracle):
    vd = dp.value_and_direction(Squared(), oracle)
    found = []
    for activation in (by_vjp, jnp.tanh):
        loops = 3 * [eqx.nn.Linear(4, 4, key=KEYS[5]), activation]
        ends = [eqx.nn.Linear(n, m, key=KEYS[6]) for n, m in ((3, 4), (4, 2))]
        net = dp.Network([ends[0], activation, *loops, ends[1]])
        (value, aux), direction, _ = vd.step(net, vd.init(net), INPUTS, TARGETS)
        assert aux.result == dp.RESULTS.successful
        found.append((value, aux.slope, aux.ratio, jax.tree.leaves(direction)))
    close(found[0], found[1], 1e-10)


def test_a_custom_vjp_under_an_oracle_that_needs_it_forward(monkeypatch):
    monkeypatch.setattr("diffprog._common.jacobian.LARGEST", 100)
    model = eqx.nn.MLP(3, 2, 5, 1, by_vjp, key=KEYS[2])
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1, CG()))
    with pytest.raises(TypeError, match="`jax.custom_vjp`.*here it has 12 by 32"):
        vd(model, INPUTS, TARGETS)
    vd = dp.value_and_direction(Squared(), Gradient())
    desired = vd(eqx.tree_at(lambda m: m.activation, model, jnp.tanh), INPUTS, TARGETS)
    (value, direction), (wanted, gradient) = vd(model, INPUTS, TARGETS), desired
    close((value, jax.tree.leaves(direction)), (wanted, jax.tree.leaves(gradient)))
