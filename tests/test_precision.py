"""Everything in float32, with the x64 flag on and off; oracles in 16 bits too.

Dtypes are kept.
"""

import os
import subprocess
import sys

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp
from diffprog.losses import Hinge, SoftmaxCrossEntropy, Squared
from diffprog.oracles import (
    CG,
    ChainRule,
    Cholesky,
    CoordinateAscent,
    DualCG,
    DualGaussNewton,
    GaussNewton,
    Gradient,
    InnerNewton,
    InteriorPoint,
    InverseRule,
    MoreauBackprop,
    MoreauRule,
    NewtonSteps,
    prox_prop,
    ProximalGradient,
    ProxLinear,
    RandomSubspace,
    TargetPropagation,
)

from . import helpers
from .helpers import DIRECTIONS, MONOTONE, name


def dtypes_of(tree):
    leaves = jtu.tree_leaves(tree)
    return {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}


PAIRS = [(method, MONOTONE[i % 2]) for i, method in enumerate(DIRECTIONS)]


@pytest.mark.costly
@pytest.mark.parametrize("method, search", PAIRS, ids=name)
def test_float32_solves_and_stays_float32(method, search):
    problem, x0, us = helpers.spring(dtype=jnp.float32)
    solution = dp.solve(problem, method, x0, us, search, max_steps=500)
    assert dtypes_of(solution) == {jnp.dtype(jnp.float32)}
    double, x0, us = helpers.spring()
    exact = dp.solve(double, dp.DDP(), x0, us)
    np.testing.assert_allclose(solution.cost, exact.cost, rtol=1e-4)


@pytest.mark.parametrize("method", [dp.ILQR(), dp.DDP()], ids=name)
def test_float32_stops_successfully_at_its_own_round_off(method):
    problem, x0, us = helpers.pendulum(dtype=jnp.float32)
    solution = dp.solve(problem, method, x0, us, rtol=0.0, atol=0.0, max_steps=1000)
    np.testing.assert_allclose(solution.cost, 39.31168, rtol=1e-5)


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS[1:], ids=name)
def test_float64_stops_successfully_at_its_own_round_off(method):
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, method, x0, us, rtol=0.0, atol=0.0)
    assert solution.stats["gradient"] < 1e-6


def test_numpy_arrays_and_python_floats_are_data():
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.ILQR(), np.asarray(x0), np.asarray(us))
    assert solution.us.dtype == jnp.float64
    single = dp.solve(problem, dp.ILQR(), np.float32(x0), np.float32(us))
    assert single.us.dtype == jnp.float32
    np.testing.assert_allclose(single.cost, solution.cost, rtol=1e-5)
    mixed = dp.rollout(
        dp.ControlProblem(
            lambda x, u, t: (x[0] + u, x[1]), lambda x, u, t: u**2, lambda x: x[0], 3
        ),
        (0.0, 1.0),
        np.ones(3, np.float32),
    )
    assert mixed.cost.dtype == jnp.float32 and mixed.cost == 6.0


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, diffprog as dp
assert not jax.config.jax_enable_x64
from tests import helpers
problem, x0, us = helpers.spring(dtype=jnp.float32)
for search in helpers.MONOTONE:
    solution = dp.solve(problem, dp.DDP(), np.asarray(x0, np.float64), us, search)
    assert solution.us.dtype == jnp.float32
    print(float(solution.cost))
"""


def test_float32_without_the_x64_flag():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
    )
    assert run.returncode == 0, run.stderr
    problem, x0, us = helpers.spring()
    exact = dp.solve(problem, dp.DDP(), x0, us).cost
    costs = [float(cost) for cost in run.stdout.split()]
    np.testing.assert_allclose(costs, len(MONOTONE) * [exact], rtol=1e-4)


# Training in 16 bits --------------------------------------------------------------


# Damped so that a rounding of the products is about one of the direction.
ORACLES = {
    "gradient": Gradient(),
    "auto": GaussNewton(10.0),
    "Cholesky": GaussNewton(10.0, Cholesky()),
    "CG": GaussNewton(10.0, CG(5, warm_start=0.5)),
    "CG of outputs": GaussNewton(10.0, CG(5, in_outputs=True)),
    "dual": DualGaussNewton(10.0, DualCG(5)),
    "subspace": GaussNewton(10.0, RandomSubspace(8)),
    "Newton steps": ProxLinear(10.0, NewtonSteps(4, Cholesky())),
    "Newton steps by CG": ProxLinear(10.0, NewtonSteps(4, CG(20))),
    "interior": ProxLinear(10.0, InteriorPoint(), 1e-3),
    "ascent": ProxLinear(10.0, CoordinateAscent(20), 1e-3),
    "proximal": ProxLinear(10.0, ProximalGradient(40), 1e-3),
    "targets": TargetPropagation(0.1),
    "differences": TargetPropagation(0.1, inverse="difference", local=False),
    "Moreau": MoreauBackprop(0.1),
    "Moreau by Newton": MoreauBackprop(0.1, state=MoreauRule(InnerNewton(1))),
    "inverses": MoreauBackprop(0.1, ChainRule(), InverseRule()),
    "proximal back-propagation": prox_prop(0.1),
}


DTYPES = {"mixed": ["bfloat16", "float32", "bfloat16"]}


def network(width: int, dtypes, key=jr.key(7)):
    """Three layers, with numbers that every dtype has."""
    keys = jr.split(key, 3)
    sizes = [(3, width), (width, width), (width, 2)]
    low = lambda a: a.astype(jnp.float16).astype(jnp.bfloat16)
    layers = []
    for k, size, dtype in zip(keys, sizes, dtypes, strict=True):
        linear = eqx.nn.Linear(*size, key=k)
        convert = lambda a, dtype=dtype: low(a).astype(dtype)
        to = lambda x, dtype=dtype: x.astype(dtype)
        arrays, rest = eqx.partition(linear, eqx.is_array)
        layers += [to, eqx.combine(jtu.tree_map(convert, arrays), rest), jnp.tanh]
    return dp.Network(layers[:-1])


CASES = [("bfloat16", 4), ("float16", 40), ("mixed", 4), ("mixed", 40)]


@pytest.mark.costly
@pytest.mark.parametrize("dtype, width", CASES)
@pytest.mark.parametrize("oracle", ORACLES)
def test_every_oracle_takes_16_bits(oracle, dtype, width):
    x = jr.normal(jr.key(8), (6, 3)).astype("bfloat16").astype("float32")
    loss = Hinge() if oracle == "interior" else SoftmaxCrossEntropy()
    labels = jnp.arange(6) % 2
    vd = dp.value_and_direction(loss, ORACLES[oracle])
    key = jr.key(9) if oracle == "subspace" else None
    found = []
    for dtypes in (DTYPES.get(dtype, 3 * [dtype]), 3 * ["float32"]):
        net = network(width, dtypes)
        (_, aux), _, state = vd.step(net, vd.init(net), x, labels, key=key)
        assert aux.result == dp.RESULTS.successful
        (value, aux), direction, _ = vd.step(net, state, x, labels, key=key)
        own = eqx.filter(net, eqx.is_array)
        assert jtu.tree_map(of, direction) == jtu.tree_map(of, own)
        numbers = (value, aux, state.damping, state.memory)
        assert dtypes_of(numbers) == {np.dtype("float32")}
        leaves = jtu.tree_leaves(direction)
        found.append(np.concatenate([np.float64(a).ravel() for a in leaves]))
    low, desired = found
    eps = float(jnp.finfo("float16" if dtype == "float16" else "bfloat16").eps)
    assert 0 < np.linalg.norm(low - desired) <= 4 * eps * np.linalg.norm(desired)


def of(array):
    return array.dtype


def test_gradients_outside_of_float16_give_the_right_step():
    # Of 1e-6, where float16 has few digits left, and of 9e4, which is infinite there.
    vd = dp.value_and_direction(
        Squared(), GaussNewton(1e-3, CG()), lambda params, x: x @ params["w"]
    )
    params = {"w": jnp.ones((1, 1), "float16")}
    for size in (1e-3, 300.0):
        x = jnp.full((4, 1), size, "float16")
        value, direction = vd(params, x, jnp.zeros((4, 1), "float16"))
        square = float(x[0, 0]) ** 2
        np.testing.assert_allclose(value, square / 2, rtol=1e-3)
        desired = [[square / (square + 1e-3)]]
        np.testing.assert_allclose(direction["w"], desired, rtol=2e-3)
