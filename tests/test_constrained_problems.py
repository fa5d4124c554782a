"""Harder problems with constraints: reference minima, many starts, float32, others.

The others stand in no collection, and nothing was ever tuned for them.
"""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

import diffprog as dp

from . import constrained
from .constrained import check_optimal, flat


# Where several minima are known, each of them, or anything below the first, will do.
# The most iterations stand behind them.
REFERENCES = {
    "car_that_arrives": ([3.704515261193], 80),
    "car_with_dependent_rows": ([3.704515261194], 200),
    "gap": ([7.083195758940, 7.885716013946], 60),
    "unicycle": ([15.11030700612, 15.1581901862], 120),
    "cart": ([20.2788893, 20.32195808205], 250),
}
# Controls and costates of the unicycle from below, and of the car that arrives.
UNICYCLE = 8.249760, -40.166062, 7.874433
ARRIVAL = 0.760009, -0.634006, 0.844218, -0.526172


@ft.cache
def problem_of(which):
    return getattr(constrained, which)()


def solve(which, us=None, **options: Any):
    problem, x0, guess = problem_of(which)
    options = dict(max_steps=500, throw=False) | options
    return dp.solve(problem, dp.DDP(), x0, guess if us is None else us, **options)


@pytest.mark.slow
@pytest.mark.parametrize("which", REFERENCES)
def test_reference_problems(which):
    minima, most = REFERENCES[which]
    problem, x0, _ = problem_of(which)
    solution = solve(which)
    check_optimal(problem, x0, solution)
    assert solution.stats["num_steps"] <= most
    apart = np.abs(np.array(minima) / solution.cost - 1)
    assert np.min(apart) <= 1e-7 or solution.cost < min(minima)
    assert solution.stats["num_attempts"] == 1 + (which == "cart")


@pytest.mark.slow
def test_multipliers_of_dependent_rows_act_as_one():
    last = solve("car_with_dependent_rows").multipliers.terminal["arrive"]
    action = last[:4] + last[4] * jnp.array([1.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(np.abs(action), np.abs(ARRIVAL), rtol=1e-4)


def test_unicycle_from_below():
    problem, x0, _ = problem_of("unicycle")
    # From controls of 0, and from noise, roundings decide on which side it goes.
    turn = -0.5 * np.cos(2 * np.pi * (np.arange(25) + 0.5) / 25)
    us = jnp.asarray(np.stack([np.full(25, 0.4), turn], axis=1))
    outer = dp.AugmentedLagrangian(penalty=1e3)
    solution = solve("unicycle", us, outer=outer)
    check_optimal(problem, x0, solution)
    assert solution.stats["violation"] < 1e-8
    np.testing.assert_allclose(solution.cost, REFERENCES["unicycle"][0][0], rtol=1e-7)
    found = solution.multipliers.terminal["arrive"]
    np.testing.assert_allclose(found, UNICYCLE, rtol=1e-4)


# Standard deviations of the controls around the guess, and the fewest successes.
STARTS = {
    "cart": ([2.0], 19),
    "unicycle": ([0.5, 0.5], 19),
    "car_that_arrives": ([0.1, 0.3], 16),
    "car": ([0.1, 0.3], 20),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", STARTS)
def test_20_starts(which):
    spread, fewest = STARTS[which]
    us = problem_of(which)[2]
    noise = np.random.default_rng(0).normal(size=(19, *us.shape)) * np.array(spread)
    starts = [us, *(us[None] + jnp.asarray(noise))]
    good = [s for s in (solve(which, us) for us in starts) if s.success]
    assert len(good) >= fewest
    for solution in good:
        for part in ("stationarity", "violation", "complementarity"):
            assert solution.stats[part] <= 1e-7


# The exact gradient at the rounded controls of the minimum is 0.09 and 9e6 for these:
# roundings grow along the way.
COARSE = "gap", "cart"


@pytest.mark.parametrize(
    "which",
    [
        "mass",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("slow", "swing_up", "touching", "car", *REFERENCES)
        ),
    ],
)
def test_float32(which):
    problem, x0, us = problem_of(which)
    x0, us = x0.astype(jnp.float32), us.astype(jnp.float32)
    solution = dp.solve(problem, dp.DDP(), x0, us, max_steps=500, throw=False)
    assert solution.success and solution.us.dtype == jnp.float32
    stats = solution.stats
    assert stats["violation"] <= 1e-4 and stats["complementarity"] <= 1e-4
    assert stats["decrement"] <= 1e-6 * solution.cost
    if which not in COARSE:
        assert stats["stationarity"] <= 1e-4


def rows(problem, x0, equal):
    """The rows of one kind that controls change, as a function of a vector of them."""
    horizon = problem.horizon

    def values(us):
        trajectory = dp.rollout(problem, x0, jnp.reshape(us, (horizon, -1)))
        stages, found = jnp.arange(horizon), []
        for c in problem.constraints:
            g = jax.vmap(lambda x, u, t, c=c: flat(c(x, u, t)))
            values = g(trajectory.xs[:-1], trajectory.us, stages)
            found += [flat(values)] * (c.equal == equal)
        for c in problem.terminal_constraints:
            found += [flat(c(trajectory.xs[-1]))] * (c.equal == equal)
        return jnp.concatenate(found)

    return jax.jit(values), jax.jit(jax.jacrev(values))


def by_another_method(problem, x0, us):
    """The cost by sequential quadratic programming over all controls."""
    start, constraints = np.ravel(us), []
    for kind, sign in (("eq", 1), ("ineq", -1)):
        values, jacobian = rows(problem, x0, kind == "eq")
        moved = np.any(np.asarray(jacobian(start)) != 0, axis=1)
        constraints.append(
            dict(
                type=kind,
                fun=lambda us, f=values, s=sign, on=moved: s * np.asarray(f(us))[on],
                jac=lambda us, f=jacobian, s=sign, on=moved: s * np.asarray(f(us))[on],
            )
        )
    cost = lambda us: dp.rollout(problem, x0, jnp.reshape(us, (len(us) // 2, 2))).cost
    cost = jax.jit(jax.value_and_grad(cost))
    lower, upper = problem.control_bounds
    shape = problem.horizon, 2
    sides = (np.broadcast_to(side, shape).ravel() for side in (lower, upper))
    found = minimize(
        lambda us: tuple(map(np.asarray, cost(us))),
        start,
        jac=True,
        method="SLSQP",
        bounds=list(zip(*sides)),
        constraints=constraints,
        options=dict(maxiter=1000, ftol=1e-13),
    )
    assert found.status in (0, 8), found.message  # 8: no way down from the start
    for c in constraints:
        worst = np.abs(c["fun"](found.x)) if c["type"] == "eq" else -c["fun"](found.x)
        assert np.max(worst) <= 1e-9
    return found.fun


@pytest.mark.slow
@pytest.mark.parametrize("which", ["ferry", "lander", "courier", "arm"])
def test_others(which):
    problem, x0, us = problem_of(which)
    solution = solve(which)
    check_optimal(problem, x0, solution)
    noise = 0.1 * np.random.default_rng(0).normal(size=us.shape)
    for start in (solution.us, solution.us + jnp.asarray(noise)):
        again = by_another_method(problem, x0, start)
        np.testing.assert_allclose(again, solution.cost, rtol=1e-6)
