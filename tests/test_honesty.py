"""What is wrong is never called successful, and what was found is never lost."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

from . import helpers
from .helpers import DIRECTIONS, MONOTONE, name, one_stage, SECOND_ORDER


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_a_control_that_is_not_finite_is_found_even_if_nothing_depends_on_it(method):
    problem = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * u[:1],
        lambda x, u, t: jnp.sum(x**2) + u[0] ** 2,
        lambda x: jnp.sum(x**2),
        4,
    )
    us = jnp.zeros((4, 2)).at[:, 1].set(jnp.nan)
    solution = dp.solve(problem, method, jnp.ones(1), us, throw=False)
    assert solution.result == dp.RESULTS.nonfinite_rollout


HESSIAN = jnp.array([1e6, 1e-6])
TARGET = jnp.array([2e-8, 20.0])
SKEWED = lambda x: jnp.sum(HESSIAN * (x - TARGET) ** 2) / 2


@pytest.mark.costly
@pytest.mark.parametrize("method", SECOND_ORDER, ids=name)
def test_damping_cannot_pass_off_a_short_step_as_convergence(method):
    problem, x0, us = one_stage(SKEWED), jnp.zeros(2), jnp.zeros((1, 2))
    fixed = dp.FixedStep(damping=1.0)
    solution = dp.solve(problem, method, x0, us, fixed, max_steps=3, throw=False)
    assert solution.result == dp.RESULTS.max_steps_reached
    warm = dp.WarmStart(dp.FixedStep(damping=1.0).init(jnp.float64))
    solution = dp.solve(problem, method, x0, us, state=warm)
    tolerance = 1e-9 * (1 + abs(solution.cost))
    assert solution.cost <= tolerance and solution.stats["decrement"] <= tolerance


@pytest.mark.costly
@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_overflow_of_norms_in_float32_is_no_convergence(search):
    J = lambda x: 1e20 * jnp.sum((x - 3.0) ** 2)
    x0, us = jnp.zeros(1, jnp.float32), jnp.zeros((1, 1), jnp.float32)
    solution = dp.solve(one_stage(J), dp.ILQR(), x0, us, search, throw=False)
    assert solution.result != dp.RESULTS.successful or solution.cost < 1e10


WRONG = [
    (
        dp.Backtracking,
        dict(damping_factor=1.0),
        "`damping_factor` is 1.0; a number > 1",
    ),
    (
        dp.Backtracking,
        dict(decrease=1.5),
        "`decrease` is 1.5; a number between 0 and 1",
    ),
    (dp.Backtracking, dict(max_trials=0), "`max_trials` is 0; a number of at least 1"),
    (dp.Backtracking, dict(slope_fraction=1.0), "`slope_fraction` is 1.0"),
    (dp.AdaptiveDamping, dict(scale=np.nan), "`scale` is nan; a finite number >= 0"),
    (dp.AdaptiveDamping, dict(decrease=1.0), "`decrease` is 1.0"),
    (dp.AdaptiveDamping, dict(max_damping=np.inf), "`max_damping` is inf; a finite"),
    (dp.FixedStep, dict(damping=np.nan), "`damping` is nan; a finite number >= 0"),
    (dp.FixedStep, dict(stepsize=0.0), "`stepsize` is 0.0; a finite number > 0"),
]


@pytest.mark.parametrize("cls, numbers, message", WRONG, ids=lambda x: str(x)[:20])
def test_wrong_numbers_of_a_search_raise_at_construction(cls, numbers, message):
    with pytest.raises(ValueError, match=message):
        cls(**numbers)


@pytest.mark.costly
@pytest.mark.parametrize(
    "search",
    [
        dp.Backtracking(damping_factor=jnp.asarray(1.0)),  # pyright: ignore
        dp.AdaptiveDamping(decrease=jnp.asarray(1.0)),  # pyright: ignore
        dp.AdaptiveDamping(scale=jnp.asarray(jnp.nan)),  # pyright: ignore
        dp.FixedStep(damping=jnp.asarray(jnp.nan)),  # pyright: ignore
    ],
    ids=lambda s: repr(s)[:30],
)
@pytest.mark.usefixtures("unchecked")
def test_a_search_with_traced_wrong_numbers_still_ends(search):
    saddle = one_stage(lambda x: -jnp.sum(x**2))
    x0, us = jnp.ones(1), jnp.ones((1, 1))
    solution = dp.solve(saddle, dp.ILQR(), x0, us, search, throw=False)
    assert solution.result != dp.RESULTS.successful


def test_fixed_step_returns_its_best_iterate_when_it_converges_elsewhere():
    # A full step from the left parabola lands in the minimum of the right one.
    J = lambda x: jnp.where(x[0] < 1.0, (x[0] - 2.0) ** 2, 5.0 + (x[0] - 2.0) ** 2)
    x0, us = jnp.zeros(1), jnp.zeros((1, 1))
    problem = one_stage(J)
    solution = dp.solve(problem, dp.ILQR(), x0, us, dp.FixedStep(), throw=False)
    np.testing.assert_allclose(solution.history["cost"][:2], [4.0, 5.0])
    assert solution.cost == 4.0 and solution.result == dp.RESULTS.no_descent
    np.testing.assert_array_equal(solution.us, us)


def test_no_policy_of_an_earlier_iterate_is_returned():
    # The optimum u = 1 is reached in one step, and there the derivative is NaN.
    J = lambda x: jnp.where(
        x[0] == 1.0, jnp.sqrt(jnp.abs(x[0] - 1)), 2 * (x[0] - 1) ** 2
    )
    problem = one_stage(J)
    solution = dp.solve(
        problem, dp.ILQR(), jnp.zeros(1), jnp.zeros((1, 1)), throw=False
    )
    assert solution.result == dp.RESULTS.nonfinite_derivative
    assert solution.stats["num_steps"] == 1 and solution.cost == 0
    np.testing.assert_array_equal(solution.policy.k, 0)
    np.testing.assert_array_equal(solution.policy(0, jnp.zeros(1)), 1.0)


@pytest.mark.costly
@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_a_failed_solve_leaves_a_state_that_is_fit_to_start_from(search):
    rough = one_stage(lambda x: jnp.where(x[0] == 0, 1.0, 2.0) - x[0])
    x0, us = jnp.zeros(1), jnp.zeros((1, 1))
    failed = dp.solve(rough, dp.Gradient(), x0, us, search, throw=False)
    assert failed.result != dp.RESULTS.successful
    assert failed.state.search.damping <= search.max_damping / 1e6
    problem, x0, us = helpers.spring()
    warm = dp.solve(problem, dp.ILQR(), x0, us, search, state=failed.state)
    cold = dp.solve(problem, dp.ILQR(), x0, us, search)
    assert warm.stats["num_steps"] <= cold.stats["num_steps"] + 2


def test_history_keeps_the_row_of_a_search_that_failed():
    # Derivatives promise descent where there is none.
    rough = one_stage(lambda x: jnp.where(x[0] == 0, 1.0, 2.0) - x[0] + x[0] ** 2)
    x0, us = jnp.zeros(1), jnp.zeros((1, 1))
    rows = []
    solution = dp.solve(
        rough, dp.ILQR(), x0, us, throw=False, verbose=lambda **row: rows.append(row)
    )
    jax.effects_barrier()
    assert solution.result == dp.RESULTS.no_descent
    assert solution.history["damping"][0] > 1e9
    assert solution.history["trials"][0] + 1 == float(solution.stats["num_rollouts"])


@pytest.mark.slow
def test_numpy_scalars_are_numbers_like_any_other():
    problem, x0, us = helpers.spring(dtype=jnp.float32)
    search = dp.Backtracking(decrease=np.float64(0.5), min_damping=np.float64(1e-6))
    first = dp.solve(problem, dp.ILQR(), x0, us, search, rtol=np.float64(1e-6))
    arrays = jax.tree.map(jnp.asarray, dp.AdaptiveDamping())
    second = dp.solve(problem, dp.ILQR(), x0, us, arrays)
    for solution in (first, second):
        assert solution.us.dtype == jnp.float32
        assert solution.cost < solution.history["cost"][0]
    # Two searches, one optimum, and a tolerance of 1e-6.
    np.testing.assert_allclose(first.cost, second.cost, rtol=1e-5)


class Parabola(helpers.eqx.Module):
    curvature: float
    lowest: float

    def dynamics(self, x, u, t):
        return u

    def cost(self, x, u, t):
        return 0.0

    def terminal_cost(self, x):
        return self.curvature * x[0] ** 2 + self.lowest


def test_zero_gradients_zero_costs_and_negative_costs():
    x0, us = jnp.zeros(1), jnp.full((1, 1), 0.5)
    problem = lambda a, b: dp.ControlProblem.from_system(Parabola(a, b), 1)
    for search in MONOTONE:
        for curvature, best in ((0.0, 0.0), (1.0, 0.0), (1.0, -7.0)):
            solution = dp.solve(problem(curvature, best), dp.DDP(), x0, us, search)
            np.testing.assert_allclose(solution.cost, best, atol=1e-8)


# Wrong calls that would otherwise be computed with.

CALLS = {
    "a vector field of another shape": (
        lambda: dp.discretize(lambda x, u, t: x[:1], 0.1)(jnp.ones(2), jnp.ones(1), 0),
        r"`vector_field` returned the shapes \(1,\); those of the state, \(2,\)",
    ),
    "another state after one stage": (
        lambda: dp.rollout(
            dp.ControlProblem(
                lambda x, u, t: jnp.ones(3),
                lambda x, u, t: 0.0,
                lambda x: 0.0,
                1,
            ),
            jnp.ones(2),
            jnp.ones((1, 1)),
        ),
        "`dynamics` returned a state with the shapes .*3.* and both must agree",
    ),
    "a state of another shape for a policy": (
        lambda: helpers_policy()(0, jnp.ones(1)),
        r"`x` has the shapes \(1,\); a state of the problem has \(2,\)",
    ),
    "a stage that a policy does not have": (
        lambda: helpers_policy()(12, jnp.ones(2)),
        "`t` is 12; this policy has the stages 0 to 11",
    ),
    "the state of a batch": (
        lambda: dp.solve(
            *_spring_arguments(), state=jax.vmap(lambda _: _state())(jnp.ones(3))
        ),
        "`state` holds a batch",
    ),
}


def _spring_arguments():
    problem, x0, us = helpers.spring()
    return problem, dp.ILQR(), x0, us


def helpers_policy():
    return dp.solve(*_spring_arguments()).policy


def _state():
    return dp.WarmStart(dp.Backtracking().init(jnp.float64))


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.usefixtures("unchecked")
def test_wrong_calls(case):
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("unchecked")
def test_a_list_of_numbers_is_a_first_state_for_lqr():
    lqr = helpers.random_lqr(jax.random.key(0))
    listed = dp.solve_lqr(lqr, [1.0, -1.0, 0.5])  # pyright: ignore
    array = dp.solve_lqr(lqr, jnp.asarray([1.0, -1.0, 0.5]))
    np.testing.assert_array_equal(listed.us, array.us)


def test_reprs_never_fail():
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.ILQR(), x0, us)
    shapes = jax.eval_shape(lambda: dp.solve(problem, dp.ILQR(), x0, us))
    for thing in (solution.policy, shapes, jax.tree.map(lambda _: None, solution)):
        assert repr(thing)
    assert repr(solution.policy).startswith("Policy(K=")


TABLE = jnp.arange(10.0)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["dynamics", "cost", "terminal_cost"])
def test_a_table_that_is_too_short_is_found(where):
    read = lambda here, t: TABLE[t] if here == where else 0.0
    problem = lambda horizon: dp.ControlProblem(
        lambda x, u, t: x + u + read("dynamics", t),
        lambda x, u, t: jnp.sum(u**2) + read("cost", t),
        lambda x: jnp.sum(x**2) + read("terminal_cost", jnp.int32(horizon - 1)),
        horizon,
    )
    x0, us = jnp.ones(1), jnp.zeros((13, 1))
    plain = dp.rollout(problem(10), x0, us[:10])
    checked = dp.rollout(problem(10), x0, us[:10], check=True)
    np.testing.assert_array_equal(checked.xs, plain.xs)
    place = "" if where == "terminal_cost" else " at stage 10"
    with pytest.raises(IndexError, match=f"`{where}`{place} reads beyond the end"):
        dp.rollout(problem(13), x0, us, check=True)
    with pytest.raises(ValueError, match="`check=True` looks at numbers"):
        jax.jit(lambda us: dp.rollout(problem(13), x0, us, check=True))(us)


@pytest.mark.usefixtures("unchecked")
def test_what_is_beyond_an_array_is_told_as_it_is():
    """Modes are not seen: the message does not say which entry is taken."""
    window = lambda t: jnp.sum(jax.lax.dynamic_slice(TABLE, (t,), (2,)))
    filled = lambda t: TABLE.at[t].get(mode="fill", fill_value=0.0)
    for read, message in (
        (
            window,
            "at stage 9 .*: a slice from 9 on ends beyond 10, the size of axis 0.",
        ),
        (filled, "at stage 10 .* or a fill value .*index 10 is out .* a `mode` of ind"),
    ):
        cost = lambda x, u, t, read=read: jnp.sum(u**2) + read(t)
        problem = dp.ControlProblem(lambda x, u, t: x + u, cost, jnp.sum, 11)
        with pytest.raises(IndexError, match=message):
            dp.rollout(problem, jnp.ones(1), jnp.zeros((11, 1)), check=True)


@pytest.mark.parametrize("table", [[1.0, 2.0], np.arange(2)], ids=["list", "NumPy"])
def test_a_table_that_takes_no_traced_index(table):
    cost = lambda x, u, t: jnp.sum(u**2) * table[t]
    problem = dp.ControlProblem(lambda x, u, t: x + u, cost, jnp.sum, 2)
    with pytest.raises(TypeError, match="traced array") as error:
        dp.rollout(problem, jnp.ones(1), jnp.zeros((2, 1)))
    assert "`cost` was given" in error.value.__notes__[0]
    assert "`jnp.asarray(table)`" in error.value.__notes__[0]


def test_a_table_that_is_wider_than_the_controls():
    table, us = jnp.arange(2.0), jnp.zeros((2, 1), jnp.float32)
    cost = lambda x, u, t: jnp.sum(u**2) + table[t].astype(table.dtype)
    problem = dp.ControlProblem(lambda x, u, t: x + u, cost, jnp.sum, 2)
    message = (
        r"`cost` returned float64 .* weakly typed .* holds a float64 of shape \(2,"
    )
    with jax.numpy_dtype_promotion("standard"), pytest.raises(TypeError, match=message):
        dp.rollout(problem, jnp.full(1, 0.1), us)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("t", [0.0, "0", None, jnp.zeros(()), jnp.arange(2)], ids=str)
def test_a_stage_of_a_policy_that_is_no_integer(t):
    with pytest.raises(TypeError, match="`t` is .*; the index of a stage, one integer"):
        helpers_policy()(t, jnp.ones(2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, option, said",
    [
        (dp.ControlProblem, "state_bounds", "limits of states are `constraints=dp.St"),
        (dp.ControlProblem, "top", "its arguments are `dynamics`, `cost`, "),
        (dp.ControlProblem.from_system, "bounds", "`control_bounds` are the limits"),
        (dp.ControlProblem.from_system, "top", "its arguments are `system`, "),
        (dp.Phase, "top", "its arguments are `dynamics`, "),
        (dp.MPC, "max_steps", "`iterations` is the number of those of a tick"),
        (dp.init, "tol", "`rtol` and `atol` are the tolerances"),
        (dp.simulate, "horizon", "`steps` is the number of ticks"),
        (dp.constrained.minimize, "maxiter", "`max_outer` and `max_inner` are the"),
    ],
)
def test_options_that_are_others_here(call: Any, option, said):
    name = re.escape(call.__qualname__)
    with pytest.raises(TypeError, match=f"^`{name}` takes no `{option}`: {said}"):
        call(**{option: 1.0})


def test_methods_of_other_libraries_are_found():
    with pytest.raises(AttributeError, match="no attribute `LevenbergMarquardt`; it i"):
        dp.LevenbergMarquardt  # pyright: ignore
    with pytest.raises(AttributeError, match="no attribute `Levenberg`$"):
        dp.Levenberg  # pyright: ignore


def test_a_solution_in_the_place_of_controls():
    problem, method, x0, us = _spring_arguments()
    solution = dp.solve(problem, method, x0, us)
    with pytest.raises(TypeError, match="`us` is an object of type Solution; .*`us` "):
        dp.solve(problem, method, x0, solution)


@pytest.mark.usefixtures("unchecked")
def test_options_of_other_functions():
    call: Any = dp.solve
    with pytest.raises(TypeError, match="takes no `check`: `dp.rollout.*, check=True"):
        call(*_spring_arguments(), check=True)
    with pytest.raises(TypeError, match="takes no `top`: its arguments are `problem`,"):
        call(*_spring_arguments(), top=1.0)
    both: Any = call, dp.solve_batch
    for solve in both:
        with pytest.raises(
            TypeError, match="takes no `tol`: `rtol` and `atol` are the"
        ):
            solve(*_spring_arguments(), tol=1.0)
        with pytest.raises(TypeError, match="takes no `maxiter`: `max_steps` is the"):
            solve(*_spring_arguments(), maxiter=9)
    with pytest.raises(TypeError, match="`rtol` is '1'; one number >= 0 is expected"):
        call(*_spring_arguments(), rtol="1")
    with pytest.raises(TypeError, match=r"`damping` is an array of shape \(2,\); one"):
        dp.direction(*_spring_arguments(), damping=jnp.ones(2))


def test_a_table_of_numpy_is_checked_too():
    table = np.arange(3.0)
    cost = lambda x, u, t: jnp.sum(u**2) + table[t]
    problem = dp.ControlProblem(lambda x, u, t: x + u, cost, jnp.sum, 4)
    with pytest.raises(IndexError, match="`cost` at stage 3 reads beyond"):
        dp.rollout(problem, jnp.ones(1), jnp.zeros((4, 1)), check=True)


def test_the_stage_of_a_short_table_counts_through_phases():
    late = lambda x, u, t: jnp.sum(u**2) + TABLE[t + 6]
    phase = lambda cost: dp.Phase(lambda x, u, t: x + u, cost, 3)
    chain = dp.Chain((phase(lambda x, u, t: 0.0), phase(late)), jnp.sum)
    us = jnp.zeros((3, 1)), jnp.zeros((3, 1))
    with pytest.raises(IndexError, match="`cost` at stage 4 reads beyond"):
        dp.rollout(chain, jnp.ones(1), us, check=True)
