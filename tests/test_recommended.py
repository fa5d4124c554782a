"""Which form `recommended` takes, and that it needs no learning rate."""

# States of optax have any type, and wrong calls are made on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

import diffprog as dp
from diffprog.optim import ggn, kfac, KFACState, model_step, recommended

from .helpers import close


KEYS = jr.split(jr.key(0), 4)
INPUTS = jr.normal(KEYS[0], (32, 4))
LABELS = jnp.where(jnp.sum(INPUTS, 1) > 0, 1, 0)
LOSS = dp.losses.SoftmaxCrossEntropy()
NET = dp.Network(
    [eqx.nn.Linear(4, 8, key=KEYS[1]), jnp.tanh, eqx.nn.Linear(8, 2, key=KEYS[2])]
)
MLP = eqx.nn.MLP(4, 2, 8, 1, jnp.tanh, key=KEYS[3])
MIXED = dp.Network([eqx.nn.Linear(4, 8, key=KEYS[1]), eqx.nn.LayerNorm(8)])


pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def parameters(model):
    return eqx.filter(model, eqx.is_inexact_array)


def train(optimizer, model, steps):
    """The losses of so many steps, and the last state."""
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def step(carry, _):
        params, state = carry
        at = ggn(LOSS)(eqx.combine(params, rest), INPUTS, LABELS)
        here = at.linearize()
        update = optimizer.update(here.gradient, state, params, curvature=at)
        return (optax.apply_updates(params, update[0]), update[1]), here.value

    start = params, optimizer.init(params)
    run = jax.jit(lambda start: jax.lax.scan(step, start, length=steps))
    (params, state), values = run(start)
    return values, state


def has_factors(optimizer, model):
    state = optimizer.init(parameters(model))
    is_state = lambda node: isinstance(node, KFACState)
    return any(map(is_state, jax.tree.leaves(state, is_leaf=is_state)))


@pytest.mark.costly
@pytest.mark.parametrize("model", [NET, MLP], ids=["network", "other"])
def test_training_needs_no_learning_rate(model):
    values, state = train(recommended(), model, 40)
    assert values[0] > 0.4 and values[-1] < 0.02
    assert state.result == dp.RESULTS.successful


def test_the_parameters_decide_which_form_is_taken():
    other = optax.sgd(1.0)
    own = kfac(damping=0.1)
    for options, network, others in [
        ({}, True, False),
        ({"kfac": False}, False, False),
        ({"base": other}, False, False),
        ({"base": other, "kfac": False}, False, False),
    ]:
        assert has_factors(recommended(**options), NET) == network
        assert has_factors(recommended(**options), MLP) == others
        assert not has_factors(recommended(**options), MIXED)
    assert has_factors(recommended(kfac=True), NET)
    assert has_factors(recommended(kfac=own), NET)


def test_it_is_what_its_description_says():
    direction = optax.chain(kfac(factors="sampled"), optax.scale(-1.0))
    written = model_step(direction, previous=True, scale=1.0, ema=0.0)
    close(train(recommended(), NET, 3), train(written, NET, 3))
    muon = optax.contrib.muon(1.0, adam_learning_rate=0.3)
    written = model_step(muon, scale=0.5, ema=0.9)
    close(train(recommended(), MLP, 3), train(written, MLP, 3))


WRONG = {
    r"`kfac` is 3; True, False, or a transformation": lambda: recommended(kfac=3),
    r"give one of `base` and `kfac`": lambda: recommended(optax.sgd(1.0), True),
    r"`base` is 0.001; an optimizer such as .* No learning rate is needed": (
        lambda: recommended(1e-3)
    ),
    r"`params` is a MLP; those of a `dp.Network`": lambda: recommended(kfac=True).init(
        parameters(MLP)
    ),
    r"Stage 1 of the network is a LayerNorm": lambda: recommended(kfac=True).init(
        parameters(MIXED)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_say_what_to_do(message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
