"""Constraints: reference values, the conditions of optimality, and what is refused."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog._common import multipliers
from diffprog._common.multipliers import merit, multiplier

from . import helpers
from .constrained import car, check_optimal, mass, slow, swing_up, too_fast, touching
from .helpers import close, name


# Cost, the most iterations, and multipliers of the last state.
REFERENCES = {
    "mass": (mass, 0.7628659340715, 12, [1.705495, -1.705495]),
    "slow": (slow, 0.2318618881183, 12, [0.664336, -0.773601]),
    "swing_up": (swing_up, 5.724055101156, 40, [-5.666517, 1.666222]),
    "car": (car, 3.649650563075, 60, None),
    "touching": (touching, 0.7518796992481203, 20, [1.503762] * 2),
}


@ft.cache
def solved(which):
    make, *_ = REFERENCES[which]
    problem, x0, us = make()
    return problem, x0, solve(problem, x0, us)


def solve(problem, x0, us, **options: Any):
    return dp.solve(problem, dp.DDP(), x0, us, max_steps=500, **options)


@pytest.mark.parametrize("which", REFERENCES)
def test_reference_problems(which):
    _, cost, most, terminal = REFERENCES[which]
    problem, x0, solution = solved(which)
    check_optimal(problem, x0, solution)
    assert solution.stats["num_steps"] <= most
    np.testing.assert_allclose(solution.cost, cost, rtol=1e-7)
    if terminal is not None:
        found = np.abs(next(iter(solution.multipliers.terminal.values())))
        np.testing.assert_allclose(found, np.abs(terminal), rtol=1e-4)


def test_history_tells_of_costs_not_of_merits():
    problem, x0, solution = solved("car")
    steps = solution.stats["num_steps"]
    history = solution.history
    np.testing.assert_allclose(history["cost"][steps], solution.cost, rtol=1e-12)
    violation = history["violation"][: steps + 1]
    assert violation[0] == 0 and np.max(violation) > 0.01 and violation[-1] <= 1e-7
    assert np.all(np.diff(history["penalty"][: steps + 1]) >= 0)


@pytest.mark.costly
@pytest.mark.parametrize("method", [*helpers.DIRECTIONS[1:]], ids=name)
def test_every_direction_of_second_order(method):
    problem, x0, us = slow()
    solution = dp.solve(problem, method, x0, us, max_steps=500)
    assert solution.success
    np.testing.assert_allclose(solution.cost, REFERENCES["slow"][1], rtol=1e-7)


def test_functions_are_traced_once_and_new_numbers_never_compile(caplog):
    CALLS.clear()

    def problem(most, force, goal):
        rows = dp.Inequality(ft.partial(speed, most=most), "speed")
        stop = dp.Equality(Stop(goal), "stop")
        return dp.ControlProblem(*functions, 12, (-force, force), rows, stop)

    functions = step, effort, lambda x: 0.0 * x[0]
    x0, us = jnp.array([0.3, 0.0]), jnp.zeros((12, 1))
    method, outer = dp.DDP(), dp.AugmentedLagrangian()
    solve = ft.partial(dp.solve, throw=False, max_steps=100)
    first = solve(problem(0.4, 1.5, 0.0), method, x0, us, outer=outer)
    assert len(CALLS) == 1
    warm = solve(problem(0.4, 1.5, 0.0), method, x0, us, state=first.state)
    with jax.log_compiles(True):
        again = solve(
            problem(0.3, 1.4, 0.1),
            method,
            np.array([0.2, 0.0]),
            us,
            outer=dp.AugmentedLagrangian(penalty=20.0, second_penalty=2e3),
        )
        solve(problem(0.5, 1.6, 0.2), method, x0, us, state=warm.state)
    messages = [record.getMessage() for record in caplog.records]
    assert not [m for m in messages if "Compiling" in m and "jitted" in m]
    assert first.success and warm.success and again.success and len(CALLS) == 2


CALLS = []


def speed(x, u, t, most):
    CALLS.append(most)
    return x[1] - most


class Stop(eqx.Module):
    goal: float

    def __call__(self, x):
        return x - jnp.stack([jnp.asarray(self.goal, x.dtype), jnp.zeros_like(x[1])])


def step(x, u, t):
    return x + 0.1 * jnp.stack([x[1] + 0.05 * u[0], u[0]])


def effort(x, u, t):
    return 0.05 * u[0] ** 2


def test_what_cannot_be_satisfied_is_infeasible():
    problem, x0, us = mass(10, 0.5)
    outer = dp.AugmentedLagrangian()
    solution = dp.solve(problem, dp.DDP(), x0, us, outer=outer, throw=False)
    assert solution.result == dp.RESULTS.infeasible
    assert solution.stats["num_attempts"] == 2
    np.testing.assert_allclose(solution.stats["violation"], 0.795, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(solution.us), 0.5)
    message = "The largest violation, 8.0e-01, is that of `stop` at stage 10. Start"
    assert message in repr(solution)
    with pytest.raises(dp.SolveError, match="that satisfies the constraints was found"):
        dp.solve(problem, dp.DDP(), x0, us, outer=outer)


def test_a_second_attempt_begins_at_the_first_guess():
    problem, x0, us = mass(10, 0.5)
    once = dp.AugmentedLagrangian(penalty=1e3)
    solution = dp.solve(problem, dp.DDP(), x0, us, outer=once, throw=False)
    assert solution.stats["num_attempts"] == 1
    assert solution.result == dp.RESULTS.infeasible


def test_constraints_that_are_not_reached_change_only_the_tolerance():
    problem, x0, us = helpers.spring()
    far = dp.ControlProblem.from_system(
        problem.system, 12, constraints=dp.StateBounds(-100.0, 100.0)
    )
    free = dp.solve(problem, dp.DDP(), x0, us, rtol=1e-15, atol=1e-15)
    bound = dp.solve(far, dp.DDP(), x0, us)
    close(bound.us, free.us, 1e-7)
    assert not np.any(np.asarray(bound.multipliers.constraints["constraints[0]"]))


@pytest.mark.costly
@pytest.mark.parametrize("which", ["mass", "car"])
def test_a_warm_start_at_a_solution_takes_no_step(which):
    problem, x0, cold = solved(which)
    again = solve(problem, x0, cold.us, state=cold.state)
    assert again.success
    assert again.stats["num_steps"] == again.stats["num_outer"] == 0
    np.testing.assert_allclose(again.cost, cold.cost, rtol=1e-12)
    close(again.multipliers, cold.multipliers, 1e-7)
    close(again.state.penalty, cold.state.penalty, 0)
    assert np.max(cold.state.penalty) < cold.stats["penalty"]


def test_a_warm_start_elsewhere_saves_iterations():
    problem, _, cold = solved("car")
    noise = 0.03 * np.random.default_rng(0).normal(size=(4, 4))
    counts = []
    for x in jnp.asarray(noise):
        warm = solve(problem, x, cold.us, state=cold.state)
        fresh = solve(problem, x, car()[2])
        np.testing.assert_allclose(warm.cost, fresh.cost, rtol=1e-7)
        counts.append([s.stats["num_steps"] for s in (warm, fresh)])
    warm, fresh = np.mean(counts, 0)
    assert warm <= fresh / 2


def test_a_warm_start_goes_by_names_in_any_order():
    problem, x0, us = mass(
        30,
        constraints=(dp.Inequality(weak, "work"), dp.Inequality(too_fast, "speed")),
    )
    cold = solve(problem, x0, us)
    assert np.max(cold.multipliers.constraints["speed"]) > 0.01
    assert not np.any(np.asarray(cold.multipliers.constraints["work"]))
    again = solve(problem, x0, cold.us, state=cold.state)
    assert again.success and again.stats["num_steps"] == 0


def test_a_warm_start_is_of_the_same_constraints():
    _, x0, cold = solved("mass")
    problem, x0, us = slow()
    with pytest.raises(ValueError, match="`state` has multipliers of the shapes"):
        dp.solve(problem, dp.DDP(), x0, us, state=cold.state)
    search = dp.WarmStart(cold.state.search)
    assert dp.solve(problem, dp.DDP(), x0, us, state=search).success


def weak(x, u, t):
    return u[0] - 9


class Speed(eqx.Module):
    """A limit that is NaN at one stage."""

    free: bool = False
    bad: float = -1.0

    def __call__(self, x, u, t):
        wrong = jnp.asarray(t, x.dtype) == self.bad
        speed = x[1] - jnp.where(wrong, jnp.nan, 0.2)
        return speed + 0 * u[0] if self.free else speed


def slow_mass(**options):
    speed = dp.Inequality(Speed(**options), "speed")
    return mass(constraints=(dp.Inequality(weak, name="work"), speed))


@pytest.mark.parametrize("free", [False, True])
def test_a_first_state_that_violates_what_no_control_changes(free):
    problem, x0, us = slow_mass(free=free)
    x0 = x0.at[1].set(0.3)
    solution = dp.solve(problem, dp.DDP(), x0, us, throw=False)
    assert solution.result == dp.RESULTS.infeasible
    assert (solution.stats["num_backwards"] == 0) != free
    if not free:
        np.testing.assert_allclose(solution.stats["violation"], 0.1)
        message = "1.0e-01, is that of `speed` at stage 0. No control changes it there"
        assert message in repr(solution) and "allows `fn <= 0`" in repr(solution)
        assert dp.solve(problem, dp.DDP(), x0 - 0.2, us).success


def test_stepping_by_hand_batches_and_vmap_equal_a_solve():
    problem, x0, us = mass()
    solution = solved("mass")[2]
    state = dp.init(problem, dp.DDP(), x0, us, max_steps=500)
    while not state.done:
        cost = dp.rollout(problem, x0, state.us).cost  # not that of the constraints
        np.testing.assert_allclose(state.cost, cost, rtol=1e-12)
        state = dp.step(problem, state)
    by_hand = dp.finish(problem, state)
    close(by_hand.us, solution.us, 1e-12)
    assert by_hand.stats["num_outer"] == solution.stats["num_outer"]
    x0s = x0[None] * jnp.array([[1.0], [0.5], [3.0]])
    uss = jnp.broadcast_to(us, (3, *us.shape))
    batch = dp.solve_batch(problem, dp.DDP(), x0s, uss, max_steps=500)
    mapped = jax.vmap(lambda x0: dp.solve(problem, dp.DDP(), x0, us, max_steps=500))
    mapped = jax.jit(mapped)(x0s)
    np.testing.assert_array_equal(batch.success, [True, True, False])
    np.testing.assert_array_equal(mapped.result._value, batch.result._value)
    for part in ("num_steps", "num_outer", "num_attempts"):
        np.testing.assert_array_equal(mapped.stats[part], batch.stats[part])
    close(batch.us[0], solution.us, 1e-10)
    close(mapped.us[:2], batch.us[:2], 1e-9)


def test_a_gradient_that_rounding_hides_counts_as_none():
    problem, x0, us = mass()
    solve = ft.partial(dp.solve, problem, dp.DDP(), x0, us, max_steps=500)
    solution = solve(outer=dp.AugmentedLagrangian(tol=1e-15))
    assert solution.stats["stationarity"] > 1e-15 >= solution.stats["violation"]
    assert solution.stats["decrement"] <= 1e-14 and solution.stats["num_steps"] < 50
    np.testing.assert_allclose(solution.cost, REFERENCES["mass"][1], rtol=1e-10)


def test_phases_have_constraints_of_their_own():
    chain, x0, us = helpers.two_phase()
    most = 0.65  # half of what a free solution takes
    first = dp.Phase(
        chain.phases[0].dynamics,
        chain.phases[0].cost,
        5,
        constraints=dp.Inequality(lambda x, u, t: u - most, name="thrust"),
    )
    phases = (first, *chain.phases[1:])
    rows = dp.Chain(phases, chain.terminal_cost, dp.Equality(lambda x: x[0] - 0.3))
    solution = dp.solve(rows, dp.DDP(), x0, us, max_steps=500)
    np.testing.assert_allclose(jnp.max(solution.us[0]), most, atol=1e-7)
    np.testing.assert_allclose(solution.xs[-1][0], 0.3, atol=1e-7)
    found = solution.multipliers
    assert [list(phase) for phase in found.constraints] == [["thrust"], [], []]
    assert list(found.terminal) == ["terminal_constraints[0]"]


# Entry by entry.


def test_the_merit_is_smooth_and_its_slope_the_multiplier():
    rng = np.random.default_rng(0)
    value, dual = jnp.asarray(rng.normal(size=(2, 200)))
    dual = jnp.abs(dual)
    penalty = jnp.asarray(rng.uniform(0.1, 10, 200)).at[::3].set(0.0)

    @ft.partial(jax.jit, static_argnums=3)
    def slopes(v, y, c, equal):
        known = multiplier(v, y, c, equal), multipliers.curvature(v, y, c, equal)
        slope, bend = (
            jax.vmap(jax.grad(lambda v, y, c, fn=fn: fn(v, y, c, equal)))(v, y, c)
            for fn in (merit, multiplier)
        )
        return (slope, bend), known

    for equal in (True, False):
        found, known = slopes(value, dual, penalty, equal)
        close(found, known, 1e-13)
    value, dual, penalty = (np.asarray(a) for a in (value, dual, penalty))
    square = penalty > 0
    c, y, g = penalty[square], dual[square], value[square]
    textbook = (np.maximum(y + c * g, 0) ** 2 - y**2) / (2 * c)
    merits = jax.jit(lambda v, y, c: merit(v, y, c, False))
    close(merits(value, dual, penalty)[square], textbook, 1e-12)
    at_zero = merits(value, dual, 0 * penalty)
    np.testing.assert_allclose(at_zero[dual > 0], (dual * value)[dual > 0])


def test_residuals_vanish_at_the_conditions_of_optimality():
    value = jnp.array([-1.0, 0.0, 0.0, -1.0, 0.5])
    dual, penalty = jnp.array([0.0, 2.0, 0.0, 1.0, 0.0]), jnp.full(5, 10.0)
    found = multipliers.residual(value, dual, penalty, False)
    np.testing.assert_allclose(found, [0, 0, 0, 0.1, 0.5])
    np.testing.assert_allclose(multipliers.violation(value, True), np.abs(value))
    slack = multipliers.complementarity(value, dual, False)
    np.testing.assert_allclose(slack, [0, 0, 0, 1, 0.5])


# What is refused.


def anything(make) -> Any:
    """The same, to be called wrongly."""
    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: anything(dp.Equality)(3.0),
            "`fn` is 3.0; a function `(x, u, t) -> array`",
        ),
        (
            lambda: anything(dp.Equality)(abs, name=3),
            "`name` is 3; a string is expected",
        ),
        (lambda: dp.StateBounds("a", 1.0), "`lo` is 'a'; a number, an array, or a"),
        (
            lambda: mass(constraints=[abs]),
            "`constraints` has <built-in function abs>; a tuple of `dp.Equality(fn)`",
        ),
        (lambda: dp.AugmentedLagrangian(penalty=0.0), "`penalty` is 0.0; a number > 0"),
        (lambda: dp.AugmentedLagrangian(tol=-1.0), "`tol` is -1.0; a number > 0"),
    ],
)
def test_wrong_constraints_are_refused(make, message, unchecked):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert message in str(caught.value)


def solve_with(constraints, **options: Any):
    problem, x0, us = mass(constraints=constraints)
    return dp.solve(problem, dp.DDP(), x0, us, **options)


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (dp.Equality(lambda x, u, t: ()), "`constraints[0]` returned no numbers"),
        (
            dp.Equality(lambda x, u, t: jnp.ones(2)),
            "`constraints[0]` does not depend on x or u, so that no solve can change",
        ),
        (
            dp.Inequality(lambda x, u, t: x > 1.0),
            "`constraints[0]` returned booleans; the number that is kept <= 0 is",
        ),
        (
            dp.Equality(lambda x, u, t: x.astype(jnp.float32)),
            "`constraints[0]` returned float32",
        ),
        (
            [dp.Equality(lambda x, u, t: x, "a"), dp.Equality(lambda x, u, t: x, "a")],
            "`constraints` have the names ['a', 'a']; different ones are expected",
        ),
    ],
)
def test_what_a_constraint_returns_is_checked(constraints, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        solve_with(constraints)
    assert message in str(caught.value)


def test_a_constraint_of_other_arguments_is_told_its_own():
    message = r"`constraints\[0\]` was given .* It is called with `\(x, u, t\)`"
    with pytest.raises(TypeError, match=message):
        solve_with(dp.Equality(lambda x: x))


def test_a_constraint_that_is_not_finite_is_found():
    problem, x0, us = slow_mass(bad=3.0)
    solution = dp.solve(problem, dp.DDP(), x0, us, throw=False)
    assert solution.result == dp.RESULTS.nonfinite_rollout
    assert solution.stats["first_nonfinite"] == 3


def test_moreau_takes_no_constraints():
    problem, x0, us = mass(most=jnp.inf)
    with pytest.raises(ValueError, match="`MoreauGradient` takes no constraints"):
        dp.solve(problem, dp.MoreauGradient(), x0, us)


def test_a_direction_alone_takes_no_constraints():
    problem, x0, us = mass()
    with pytest.raises(ValueError, match="`dp.direction` takes no constraints"):
        dp.direction(problem, dp.DDP(), x0, us)


def test_an_outer_method_is_checked(unchecked):
    with pytest.raises(TypeError, match="`outer` is 10.0; something like"):
        solve_with((), outer=10.0)


def test_a_solve_and_a_warm_one_are_one_function():
    problem, x0, us = slow()
    solve = ft.partial(dp.solve, problem, dp.DDP(), x0, throw=False, fast_loops=True)
    first = jax.eval_shape(solve, us)  # raises where it is not possible
    jax.eval_shape(lambda us, state: solve(us, state=state), us, first.state)
