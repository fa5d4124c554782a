"""Everything in float32, with the x64 flag on and off; dtypes are kept."""

import os
import subprocess
import sys

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp

from . import helpers
from .helpers import DIRECTIONS, MONOTONE, name


def dtypes(tree):
    leaves = jtu.tree_leaves(tree)
    return {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}


PAIRS = [(method, MONOTONE[i % 2]) for i, method in enumerate(DIRECTIONS)]


@pytest.mark.costly
@pytest.mark.parametrize("method, search", PAIRS, ids=name)
def test_float32_solves_and_stays_float32(method, search):
    problem, x0, us = helpers.spring(dtype=jnp.float32)
    solution = dp.solve(problem, method, x0, us, search, max_steps=500)
    assert dtypes(solution) == {jnp.dtype(jnp.float32)}
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
