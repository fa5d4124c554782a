"""Everything in float32, with the x64 flag on and off; oracles in 16 bits too.

Dtypes are kept.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp
from diffprog.losses import Hinge, SoftmaxCrossEntropy, Squared
from diffprog.oracles import (
    AugmentedLagrangian,
    CG,
    ChainRule,
    Cholesky,
    CoordinateAscent,
    DualCG,
    DualGaussNewton,
    GaussNewton,
    Gradient,
    GradientNorm,
    InnerGaussNewton,
    InnerNewton,
    InteriorPoint,
    InverseRule,
    MadsenNielsen,
    MoreauBackprop,
    MoreauRule,
    NewtonSteps,
    prox_prop,
    ProximalGradient,
    ProxLinear,
    RandomSubspace,
    TargetPropagation,
    Threshold,
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


@pytest.mark.costly
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


@pytest.mark.costly
@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_a_solve_that_stands_at_rounding_ends_and_says_so(search):
    # Positions are rounded to 6e-5, which moves the cost more than a step does.
    reach = lambda x: 5e3 * (x - 1000.3) ** 2
    go, effort = lambda x, u, t: x + u, lambda x, u, t: u**2 / 2
    problem = dp.ControlProblem(go, effort, reach, 1)

    def solve(dtype, rtol=None):
        start = jnp.array(1000, dtype), jnp.zeros(1, dtype)
        options: Any = dict(rtol=rtol, max_steps=256, throw=False)
        return dp.solve(problem, dp.ILQR(), *start, search, **options)

    stands = solve(jnp.float32)
    assert stands.result == dp.RESULTS.no_descent
    assert stands.stats["num_steps"] < 10
    assert "use float64, loosen `rtol`" in str(stands)
    assert solve(jnp.float32, rtol=1e-4).success
    assert solve(jnp.float64).success


def test_a_search_that_recovers_from_a_large_damping_is_not_ended():
    problem, x0, us = helpers.pendulum(20, dtype=jnp.float32)
    one, zero, large = map(jnp.float32, (1, 0, 1e9))
    careful = dp.SearchState(one, zero, large, jnp.int32(0))
    start = problem, dp.ILQR(), x0, us, dp.AdaptiveDamping()
    solution = dp.solve(*start, state=dp.WarmStart(careful), history=True)
    cost = np.asarray(solution.history["cost"])
    assert cost[0] == cost[1] == cost[2] > cost[10]
    assert solution.success


def test_numpy_arrays_and_python_floats_are_data():
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.ILQR(), np.asarray(x0), np.asarray(us))
    assert solution.us.dtype == jnp.float64
    single = dp.solve(problem, dp.ILQR(), np.float32(x0), np.float32(us))
    assert single.us.dtype == jnp.float32
    np.testing.assert_allclose(single.cost, solution.cost, rtol=1e-5)
    assert solution.cost < dp.rollout(problem, x0, us).cost
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
    "norm": GaussNewton(GradientNorm(10.0), Cholesky()),
    "Newton steps": ProxLinear(10.0, NewtonSteps(4, Cholesky())),
    "Newton steps by CG": ProxLinear(10.0, NewtonSteps(4, CG(20))),
    "interior": ProxLinear(10.0, InteriorPoint(), 1e-3),
    "Lagrangian": ProxLinear(10.0, AugmentedLagrangian(), 1e-3),
    "ascent": ProxLinear(10.0, CoordinateAscent(20), 1e-3),
    "proximal": ProxLinear(10.0, ProximalGradient(40), 1e-3),
    "targets": TargetPropagation(0.1),
    "differences": TargetPropagation(0.1, inverse="difference", local=False),
    "Moreau": MoreauBackprop(0.1),
    "Moreau by Newton": MoreauBackprop(0.1, state=MoreauRule(InnerNewton(1))),
    "Moreau by Gauss-Newton": MoreauBackprop(
        0.1, state=MoreauRule(InnerGaussNewton(1))
    ),
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


@pytest.mark.slow
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


class Marked(eqx.Module):
    inner: Callable

    def __init__(self):
        layers = [eqx.nn.Linear(6, 4, key=jr.key(1)), eqx.nn.Lambda(jnp.sin)]
        layer = eqx.nn.Sequential([*layers, eqx.nn.Linear(4, 2, key=jr.key(2))])
        self.inner = dp.rule_boundary(layer)

    def __call__(self, x):
        return self.inner(jnp.ravel(x))


def gated(size: int):
    gru = dp.Recurrent(eqx.nn.GRUCell(3, size, key=jr.key(1)), size)
    return dp.Network([gru, eqx.nn.Linear(size, 2, key=jr.key(2))])


def plain():
    cell = dp.RNNCell(3, 4, key=jr.key(1))
    return dp.Network([dp.Recurrent(cell, 4), eqx.nn.Linear(4, 2, key=jr.key(2))])


INSIDE = {  # rules that meet factorizations, conjugate gradients and loops
    "loop": (plain, TargetPropagation(0.1, inverse="difference", local=False)),
    "any cell": (lambda: gated(4), TargetPropagation(0.1)),
    "any large cell": (lambda: gated(40), TargetPropagation(0.1)),
    "inverses": (plain, MoreauBackprop(0.1, InverseRule(), InverseRule())),
    "marked": (Marked, MoreauBackprop(0.1, InverseRule(), MoreauRule())),
}


@pytest.mark.slow
@pytest.mark.parametrize("make, oracle", INSIDE.values(), ids=INSIDE)
def test_rules_of_layers_take_16_bits(make, oracle):
    x, labels = jr.normal(jr.key(3), (5, 2, 3)).astype("bfloat16"), jnp.arange(5) % 2
    vd = dp.value_and_direction(SoftmaxCrossEntropy(), oracle)
    found = []
    for dtype in ("bfloat16", "float32"):
        convert = lambda a, dtype=dtype: a.astype("bfloat16").astype(dtype)
        arrays, rest = eqx.partition(make(), eqx.is_inexact_array)
        model = eqx.combine(jtu.tree_map(convert, arrays), rest)
        leaves = jtu.tree_leaves(vd(model, convert(x), labels)[1])
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
        found.append(np.concatenate([np.float64(a).ravel() for a in leaves]))
    low, desired = found
    eps = float(jnp.finfo("bfloat16").eps)
    assert 0 < np.linalg.norm(low - desired) <= 4 * eps * np.linalg.norm(desired)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [MadsenNielsen(1.0), Threshold(1.0)], ids=name)
def test_dampings_rest_at_the_rounding_of_bfloat16(rule):
    keys = jr.split(jr.key(0), 3)
    x = jr.normal(keys[0], (16, 4)).astype("bfloat16")
    labels = jnp.argmax(x[:, :2], 1)
    arrays, rest = eqx.partition(
        eqx.nn.MLP(4, 2, 8, 1, jnp.tanh, key=keys[1]), eqx.is_array
    )
    arrays = jtu.tree_map(lambda a: a.astype("bfloat16"), arrays)
    vd = dp.value_and_direction(SoftmaxCrossEntropy(), GaussNewton(rule, Cholesky()))
    model, values, dampings, unclear = eqx.combine(arrays, rest), [], [], []
    state = vd.init(model)
    for _ in range(40):
        (value, aux), direction, state = vd.step(model, state, x, labels)
        model = eqx.apply_updates(model, jtu.tree_map(jnp.negative, direction))
        values.append(value)
        dampings.append(aux.damping)
        unclear.append(jnp.isnan(aux.ratio))
    assert values[-1] < 0.02 * values[0]
    assert all(unclear[-20:]) and not any(unclear[:2])
    assert dampings[-1] == min(dampings) < 0.5


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
