"""Starts from states: gaps, how they close, and what is refused."""

import functools as ft
import os
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp

from . import helpers
from .constrained import car, mass
from .helpers import close, name


with mock.patch.dict(os.environ):  # which they set
    from benchmarks import ours
    from benchmarks.states import WITH_LINES


def between(x0, goal, T):
    """States on the line from one to the other."""
    return jnp.linspace(x0, goal, T + 1)


def noisy(tree, size=0.3):
    """A tree with noise on every leaf."""
    rng = np.random.default_rng(0)
    add = lambda a: a + size * jnp.asarray(rng.normal(size=a.shape), a.dtype)
    return jtu.tree_map(add, tree)


ILQR: dp.AbstractDirection = dp.ILQR()
solve = ft.partial(dp.solve, throw=False)


@pytest.mark.costly
@pytest.mark.parametrize("method", helpers.DIRECTIONS, ids=name)
@pytest.mark.parametrize("which", ["spring", "two_phase"])
def test_states_of_a_rollout_change_nothing(which, method):
    problem, x0, us = helpers.PROBLEMS[which]()
    xs = dp.rollout(problem, x0, us).xs
    plain = solve(problem, method, x0, us, max_steps=20)
    given = solve(problem, method, x0, us, max_steps=20, xs=xs)
    for key in ("num_steps", "num_rollouts", "num_backwards"):
        assert plain.stats[key] == given.stats[key]
    close(given.xs, plain.xs, 1e-12)
    close(given.us, plain.us, 1e-12)
    close(given.history["cost"], plain.history["cost"], 1e-12)
    np.testing.assert_array_equal(given.stats["gap"], 0)
    assert "gap" not in plain.stats and "gap" not in plain.history


@pytest.mark.costly
@pytest.mark.parametrize("search", helpers.SEARCHES, ids=name)
@pytest.mark.parametrize("method", helpers.SECOND_ORDER, ids=name)
def test_one_full_step_solves_a_linear_quadratic_problem(method, search):
    problem, x0, us = helpers.linear()
    xs = noisy(dp.rollout(problem, x0, us).xs, 1.0)
    if isinstance(search, dp.AdaptiveDamping):
        search = dp.AdaptiveDamping(scale=0.0)
    found = dp.solve(problem, method, x0, us, search, xs=xs)
    assert found.stats["num_steps"] == 1 and found.stats["gap"] == 0
    gradient = helpers.gradient("linear")
    first, last = (jnp.max(jnp.abs(gradient(u))) for u in (us, found.us))
    assert last < 1e-11 * first


@pytest.mark.costly
@pytest.mark.parametrize("method", helpers.DIRECTIONS, ids=name)
def test_gaps_shrink_by_the_step(method):
    problem, x0, us = helpers.spring()
    xs = noisy(dp.rollout(problem, x0, us).xs, 0.1)
    s = 0.25
    search = dp.FixedStep(s, damping=10.0)
    found = solve(problem, method, x0, us, search, xs=xs, max_steps=5)
    gap = found.history["gap"]
    np.testing.assert_allclose(gap[1:] / gap[:-1], 1 - s, rtol=1e-12)
    # What is left is the difference of the dynamics from the states.
    states = found.xs
    new = jax.vmap(problem.dynamics)(states[:-1], found.us, jnp.arange(12))
    np.testing.assert_allclose(
        jnp.max(jnp.abs(new - states[1:])), found.stats["gap"], rtol=1e-12
    )
    np.testing.assert_array_equal(states[0], x0)
    assert not found.success


def test_backtracking_closes_gaps_by_its_steps():
    problem, x0, us = helpers.pendulum()
    xs = between(x0, jnp.array([jnp.pi, 0.0]), 100)
    found = dp.solve(problem, ILQR, x0, us, xs=xs)
    steps = found.stats["num_steps"]
    gap, s = found.history["gap"], found.history["stepsize"]
    assert gap[0] > 0.04 and found.stats["gap"] == 0
    np.testing.assert_allclose(
        gap[1 : steps + 1], (1 - s[:steps]) * gap[:steps], rtol=1e-12
    )
    assert found.cost <= 39.311680434  # that from zero controls


@pytest.mark.costly
@pytest.mark.parametrize("method", [dp.ILQR(), dp.DDP()], ids=name)
def test_an_unstable_system_is_solved_from_states(method):
    """x' = x + dt (x^3 + u) blows up in finite time without control."""

    def dynamics(x, u, t):
        return x + 0.1 * (10 * x**3 + u)

    cost = lambda x, u, t: jnp.sum(x**2) + 1e-3 * jnp.sum(u**2)
    problem = dp.ControlProblem(dynamics, cost, lambda x: 10 * jnp.sum(x**2), 60)
    x0, us = jnp.ones(1), jnp.zeros((60, 1))
    assert not jnp.isfinite(dp.rollout(problem, x0, us).cost)
    found = dp.solve(problem, method, x0, us, xs=between(x0, jnp.zeros(1), 60))
    assert found.stats["gap"] == 0
    close(dp.rollout(problem, x0, found.us).xs, found.xs, 1e-10, scale="largest")
    gradient = jax.jit(jax.grad(helpers.objective(problem, x0)))
    assert jnp.max(jnp.abs(gradient(found.us))) < 1e-3


LIMITED = {  # with the least cost
    "mass": (mass, jnp.zeros(2), 0.7628659340715),
    "car": (car, jnp.array([4.0, 3.0, 0.0, 0.0]), 3.649650563075),
}


@pytest.mark.parametrize("which", ["mass", pytest.param("car", marks=pytest.mark.slow)])
def test_with_limits_and_constraints(which):
    make, goal, cost = LIMITED[which]
    problem, x0, us = make()
    found = dp.solve(problem, dp.DDP(), x0, us, xs=between(x0, goal, len(us)))
    np.testing.assert_allclose(found.cost, cost, rtol=1e-7)
    stats = found.stats
    assert stats["gap"] == 0 and stats["violation"] < 1e-8
    assert found.history["gap"][0] > 0 and "violation" in found.history


def test_a_stop_with_gaps_is_no_success():
    problem = dp.ControlProblem(
        lambda x, u, t: x + u,
        lambda x, u, t: 0 * x[0] + jnp.sum(u**2),
        lambda x: jnp.sum(x**2),
        3,
    )
    x0, us, xs = jnp.ones(1), jnp.zeros((3, 1)), jnp.zeros((4, 1))
    found = solve(problem, ILQR, x0, us, xs=xs, max_steps=0)
    assert found.result == dp.RESULTS.max_steps_reached
    assert found.stats["gap"] == 1
    np.testing.assert_array_equal(found.xs, xs.at[0].set(x0))
    with pytest.raises(dp.SolveError, match="gaps of up to 1"):
        dp.solve(problem, ILQR, x0, us, xs=xs, max_steps=0)
    # They are a minimum of the cost alone, which no controls reach.
    found = solve(problem, ILQR, x0, us, xs=xs)
    assert found.success and found.stats["num_steps"] == 1 and found.cost > 0.2


def test_shorter_steps_leave_the_best_iterate():
    problem, x0, us = helpers.spring()
    xs = jnp.zeros((13, 2))
    found = solve(problem, ILQR, x0, us, dp.FixedStep(0.5), xs=xs)
    costs, gap = found.history["cost"], found.history["gap"]
    assert jnp.nanmin(costs) < found.cost  # earlier, with gaps
    assert found.stats["gap"] == jnp.nanmin(gap) > 0


@ft.cache
def batch():
    problem, x0, us = helpers.pendulum(20)
    starts = x0[None] + 0.1 * jnp.arange(3.0)[:, None]
    goal = jnp.array([jnp.pi, 0.0])
    lines = jax.vmap(lambda x0: between(x0, goal, 20))(starts)
    return problem, starts, jnp.broadcast_to(us, (3, *us.shape)), lines


def alone(x0, us, xs):
    return solve(batch()[0], ILQR, x0, us, xs=xs)


def in_a_batch(*given):
    solutions = dp.solve_batch(batch()[0], ILQR, *given[:2], xss=given[2])
    return [solutions[i] for i in range(3)]


def mapped(*given):
    many = jax.vmap(alone)(*given)
    return [jtu.tree_map(lambda a, i=i: a[i], many) for i in range(3)]


@pytest.mark.costly
@pytest.mark.parametrize("many", [in_a_batch, mapped])
def test_many_starts_are_solved_as_one_by_one(many):
    given = batch()[1:]
    for found, one in zip(many(*given), zip(*given)):
        best = alone(*one)
        assert found.stats["num_steps"] == best.stats["num_steps"]
        close(found.us, best.us, 1e-10, scale="largest")


@pytest.mark.slow
def test_steps_by_hand_are_those_of_a_solve():
    problem, *given = batch()
    x0, us, xs = (a[0] for a in given)
    state = dp.init(problem, ILQR, x0, us, xs=xs)
    np.testing.assert_array_equal(state.xs, xs)
    while not state.done:
        state = dp.step(problem, state)
    solution = dp.finish(problem, state)
    close(solution.us, alone(x0, us, xs).us, 1e-10, scale="largest")
    assert solution.stats["gap"] == 0


@pytest.mark.slow
def test_float32_closes_gaps():
    given = [a[0] for a in batch()[1:]]
    single = alone(*map(jnp.float32, given))
    assert single.success and single.stats["gap"] == 0
    np.testing.assert_allclose(single.cost, alone(*given).cost, rtol=1e-4)


@pytest.mark.slow
def test_phases_take_states():
    chain, x0, us = helpers.two_phase()
    states = dp.rollout(chain, x0, us).xs
    found = dp.solve(chain, dp.DDP(), x0, us, xs=noisy(states, 0.1))
    assert found.history["gap"][0] > 0.1
    best = dp.solve(chain, dp.DDP(), x0, us, xs=states)
    np.testing.assert_allclose(found.cost, best.cost, rtol=1e-8)


LINES = [
    pytest.param(problem, method, id=f"{problem.name}-{name(method)}")
    for problem in WITH_LINES
    for method in (ours.METHODS if problem.rows is None else [ILQR])
]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "method"), LINES)
def test_a_line_of_states_saves_iterations(problem, method):
    solve, given = ours.solver(problem, method), ours.start(problem)
    plain, found = solve(*given), solve(*given, jnp.asarray(problem.xs))
    assert plain.success and found.success
    assert found.history["gap"][0] > 0
    assert found.stats["num_steps"] <= plain.stats["num_steps"]
    assert found.cost <= plain.cost * (1 + 1e-7)


def test_wrong_calls():
    problem, x0, us = helpers.spring()
    xs: Any = jnp.zeros((13, 2))
    half = dp.FixedStep(0.5)
    call = lambda method=ILQR, xs=xs: dp.solve(problem, method, x0, us, half, xs=xs)
    with pytest.raises(ValueError, match=r"`xs` has the shapes .*\(12, 2\).*\(13, 2\)"):
        call(xs=xs[:-1])
    with pytest.raises(ValueError, match="`xs` has the shapes .* is expected"):
        call(xs=dict(x=xs))
    with pytest.raises(TypeError, match="`xs` has dtype int"):
        call(xs=xs.astype(int))
    with pytest.raises(ValueError, match="`ParallelRiccati` takes no `xs`"):
        call(dp.ILQR(riccati=dp.ParallelRiccati()))
    with pytest.raises(ValueError, match="`MoreauGradient` takes no `xs`"):
        call(dp.MoreauGradient())
    with pytest.raises(dp.SolveError, match="NaN or an infinity in `xs`"):
        call(xs=xs.at[3, 0].set(jnp.nan))
