"""Many problems in one call equal the same problems one by one."""

import dataclasses
import functools as ft
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp

from . import helpers


def batch(size=5):
    problem, x0, us = helpers.spring()
    x0s = x0[None] + 0.3 * jnp.asarray(np.random.default_rng(0).normal(size=(size, 2)))
    return problem, x0s, jnp.stack([us] * size)


close = ft.partial(helpers.close, rtol=1e-9)


@pytest.fixture(scope="module")
def one_by_one():
    problem, x0s, uss = batch()
    each = [dp.solve(problem, dp.ILQR(), *pair) for pair in zip(x0s, uss)]
    return jtu.tree_map(lambda *leaves: jnp.stack(leaves), *each)


@pytest.mark.costly
@pytest.mark.parametrize("fast_loops", [None, False])
def test_a_batch_equals_its_problems(fast_loops, one_by_one):
    problem, x0s, uss = batch()
    solution = dp.solve_batch(problem, dp.ILQR(), x0s, uss, fast_loops=fast_loops)
    assert solution.history == {}
    close(solution.us, one_by_one.us)
    close(solution.policy, one_by_one.policy)
    close(solution.stats["num_steps"], one_by_one.stats["num_steps"])
    assert jnp.all(solution.result == dp.RESULTS.successful)


@pytest.mark.slow
def test_batches_of_a_size_that_does_not_divide(one_by_one, capsys):
    problem, x0s, uss = batch()
    solution = dp.solve_batch(
        problem, dp.ILQR(), x0s, uss, batch_size=2, history=True, verbose=True
    )
    close(solution, one_by_one)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("batch 1 of 3: 2 problems, 2 successful, ")
    assert lines[2].startswith("batch 3 of 3: 1 problem, 1 successful, ")


def test_the_average_cost_is_that_of_finite_ones(capsys):
    problem, x0s, uss = batch()
    x0s = x0s.at[2].set(1e200)
    solution = dp.solve_batch(problem, dp.ILQR(), x0s, uss, verbose=True)
    mean = np.mean(solution.cost[np.isfinite(solution.cost)])
    line = f"4 successful, .*, cost {mean:.6g} on average of the 4 finite ones, "
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.slow
def test_a_function_receives_the_figures_and_jit_works():
    problem, x0s, uss = batch()
    figures = []
    receive = lambda **row: figures.append(row)

    def solve(x0s):
        return dp.solve_batch(
            problem, dp.ILQR(), x0s, uss, batch_size=3, max_steps=1, verbose=receive
        ).us

    plain = solve(x0s)
    assert [f["problems"] for f in figures] == [3, 2]
    assert figures[0]["iterations"] == 1 and figures[0]["seconds"] > 0
    close(jax.jit(solve)(x0s), plain)
    assert len(figures) == 2


def test_a_batch_starts_from_the_state_of_another():
    problem, x0s, uss = batch()
    first = dp.solve_batch(problem, dp.ILQR(), x0s, uss)
    solve = lambda uss, state: dp.solve_batch(
        problem, dp.ILQR(), x0s, uss, state=state, history=True
    )
    again = solve(first.us, first.state)
    np.testing.assert_array_equal(again.stats["num_steps"], 0)
    # Each problem takes its own row.
    dampings = jnp.arange(1.0, 6.0)
    state = eqx.tree_at(lambda state: state.search.damping, first.state, dampings)
    damped = solve(uss, state)
    np.testing.assert_array_equal(damped.history["damping"][:, 0], dampings)
    close(damped.cost, first.cost)


@pytest.mark.costly
@pytest.mark.parametrize("fast_loops", [None, False])
def test_problems_that_fail_leave_the_others_alone(fast_loops, one_by_one):
    problem, x0s, uss = batch()
    x0s = x0s.at[2].set(1e200)
    solution = dp.solve_batch(problem, dp.ILQR(), x0s, uss, fast_loops=fast_loops)
    good = np.asarray(solution.result == dp.RESULTS.successful)
    np.testing.assert_array_equal(good, [True, True, False, True, True])
    close(solution.us[good], one_by_one.us[good])
    code = jtu.tree_map(lambda leaf: leaf[2], solution.result)
    assert code == dp.RESULTS.nonfinite_rollout
    np.testing.assert_array_equal(solution.us[2], uss[2])


MASSES = jnp.linspace(0.5, 1.5, 5)


@pytest.mark.costly
@pytest.mark.parametrize("axes", ["all", "tree", "last"])
def test_problems_with_numbers_of_their_own(axes):
    _, x0s, uss = batch()
    table = jnp.stack([MASSES, 2 * MASSES])  # the problem is the last axis

    class Heavy(helpers.Spring):
        masses: Any = None

        def cost(self, x, u, t):
            return super().cost(x, u, t) + jnp.sum(self.masses) * u[0] ** 2

    masses = dict(all=MASSES, tree=MASSES[:, None], last=table)[axes]
    problem = lambda mass: dp.ControlProblem.from_system(Heavy(masses=mass), 12)
    in_axes = 0
    if axes != "all":
        none = lambda leaf: leaf is None
        shared = jtu.tree_map(lambda _: None, problem(masses))
        axis = dict(tree=0, last=-1)[axes]
        in_axes = eqx.tree_at(lambda p: p.system.masses, shared, axis, is_leaf=none)
    solution = dp.solve_batch(
        problem(masses), dp.ILQR(), x0s, uss, in_axes=in_axes, batch_size=3
    )
    rows = jnp.moveaxis(masses, 1, 0) if axes == "last" else masses
    for i in (0, 4):
        alone = dp.solve(problem(rows[i]), dp.ILQR(), x0s[i], uss[i])
        close(solution[i].us, alone.us)
    assert np.ptp(solution.cost) > 0.1


class Weighted(helpers.Spring):
    """Weights of two entries, like the state; a table that has no second reading."""

    weights: Any = None
    rotation: Any = dataclasses.field(default_factory=lambda: jnp.eye(2))

    def dynamics(self, x, u, t):
        return self.rotation @ super().dynamics(x, u, t)

    def terminal_cost(self, x):
        return jnp.sum(self.weights * x**2)


def test_numbers_that_can_be_read_both_ways_are_asked_about():
    weights, (_, x0s, uss) = jnp.array([2.0, 5.0]), batch(2)
    problem = lambda **fields: dp.ControlProblem.from_system(Weighted(**fields), 12)
    call = lambda problem, **axes: dp.solve_batch(problem, dp.ILQR(), x0s, uss, **axes)
    both = r"`problem.system.weights` has 2 rows.*`in_axes=0` if .* `in_axes=None` if"
    with pytest.raises(ValueError, match=both):
        call(problem(weights=weights))
    shared = call(problem(weights=weights), in_axes=None)
    each = dp.solve(problem(weights=weights), dp.ILQR(), x0s[1], uss[1])
    close(shared[1].us, each.us)
    rotations = jnp.stack([jnp.eye(2)] * 2)
    with pytest.raises(ValueError, match="returned a state") as caught:
        call(problem(weights=weights), in_axes=0)  # the one rotation has two rows
    rows = "one row of `problem.system.weights`, `problem.system.rotation`"
    assert rows in caught.value.__notes__[-1]
    own = call(problem(weights=weights, rotation=rotations), in_axes=0)
    fives = problem(weights=jnp.array([5.0, 5.0]))
    close(own[1].us, dp.solve(fives, dp.ILQR(), x0s[1], uss[1]).us)
    assert jnp.all(call(problem(weights=3.0)).success)  # the table alone: not asked


class Plain:
    """Not a pytree: what it holds is data all the same."""

    dynamics, cost = helpers.Spring.dynamics, helpers.Spring.cost
    stiffness, weight, dt = 0.3, 0.1, 0.1

    def __init__(self, weights):
        self.weights = weights

    def terminal_cost(self, x):
        return jnp.sum(self.weights * x**2)


def closure(weights):
    spring = helpers.Spring()
    cost = lambda x: jnp.sum(weights * x**2)
    return dp.ControlProblem(spring.dynamics, spring.cost, cost, 12)


HOLDERS = {
    "object": lambda a: dp.ControlProblem.from_system(Plain(a), 12),
    "methods": lambda a: dp.ControlProblem(
        Plain(a).dynamics, Plain(a).cost, Plain(a).terminal_cost, 12
    ),
    "closure": closure,
    "closure over NumPy": lambda a: closure(np.asarray(a)),
}


@pytest.mark.costly
@pytest.mark.parametrize("holder", HOLDERS)
def test_arrays_that_functions_hold_are_asked_about(holder):
    weights, (_, x0s, uss) = jnp.array([2.0, 5.0]), batch(2)
    problem = HOLDERS[holder](weights)
    held = "functions hold an array of 2 rows.*make it a field of an `equinox.Module`"
    with pytest.raises(ValueError, match=held):
        dp.solve_batch(problem, dp.ILQR(), x0s, uss)
    shared = dp.solve_batch(problem, dp.ILQR(), x0s, uss, in_axes=None)
    close(shared[1].us, dp.solve(problem, dp.ILQR(), x0s[1], uss[1]).us)


LISTS = {
    "list": ([2.0, 5.0], r"`problem.system.weights` has 2 numbers.*`in_axes=0` if"),
    "tuple": ((2.0, 5.0), "2 numbers, as many .*one number would .*`jnp.asarray`"),
    "list of integers": ([2, 5], "`problem.system.weights` has 2 numbers"),
    "list of NumPy": (list(np.array([2.0, 5.0])), "weights` has 2 numbers"),
    "scalars": ([jnp.array(2.0), jnp.array(5.0)], "weights` has 2 numbers"),
    "rows": ([[2.0], [5.0]], "weights` has 2 rows, .*one row would .*`jnp.asarray`"),
    "rows of arrays": ((jnp.ones(1), jnp.ones(1)), "weights` has 2 rows"),
    "rows of NumPy": ([np.ones(2), np.ones(2)], "weights` has 2 rows"),
    "pairs": ([(2.0, 1), (5.0, 1)], "weights` has 2 rows"),
}
SHIFTED = {
    "one axis": (jnp.array([[2.0, 5.0]]), "has 2 rows along axis 1.*`in_axes=1` if"),
    "two axes": (np.array([[[2.0, 5.0]]]), r"along axis 2.*`eqx.tree_at.*, 2, is_leaf"),
    "and one behind": (jnp.ones((1, 2, 2)), "along axis 1.*`in_axes=1` if"),
}


class Asking(Weighted):
    """Weights that may as well be a list, or one number."""

    def terminal_cost(self, x):
        weights = jnp.asarray(self.weights, float)
        shape = jnp.broadcast_shapes(weights.shape, x.shape)
        return jnp.sum(weights * jnp.broadcast_to(x, shape) ** 2)


@pytest.mark.parametrize("kind", LISTS | SHIFTED)
def test_numbers_that_are_no_rows_of_an_array_are_asked_about(kind):
    weights, message = (LISTS | SHIFTED)[kind]
    _, x0s, uss = batch(2)
    problem = dp.ControlProblem.from_system(Asking(weights=weights), 12)
    with pytest.raises(ValueError, match=message):
        dp.solve_batch(problem, dp.ILQR(), x0s, uss)


@pytest.mark.slow
def test_the_axis_that_is_advised_gives_each_problem_its_own():
    _, x0s, uss = batch(2)
    problem = lambda weights: dp.ControlProblem.from_system(Asking(weights=weights), 12)
    weights = jnp.array([[2.0, 5.0]])
    axes = eqx.tree_at(
        lambda p: p.system.weights, jax.tree.map(lambda _: None, problem(weights)), 1,
        is_leaf=lambda a: a is None,
    )  # fmt: skip
    own = dp.solve_batch(problem(weights), dp.ILQR(), x0s, uss, in_axes=axes)
    close(own[1].us, dp.solve(problem(5.0), dp.ILQR(), x0s[1], uss[1]).us)


def test_a_list_that_functions_hold_is_asked_about():
    _, x0s, uss = batch(2)
    spring = helpers.Spring()
    for weights, rows in (([2.0, 5.0], "numbers"), ([[2.0], [5.0]], "rows")):
        cost = lambda x, w=weights: jnp.sum(jnp.asarray(w) * x**2)
        problem = dp.ControlProblem(spring.dynamics, spring.cost, cost, 12)
        held = f"functions hold a list of 2 {rows}.*make it an array in a field of an"
        with pytest.raises(ValueError, match=held):
            dp.solve_batch(problem, dp.ILQR(), x0s, uss)


@pytest.mark.slow
def test_numbers_that_have_one_reading_are_not_asked_about():
    class Indexed(helpers.Spring):
        pair: Any = (2.0, 5.0)
        table: Any = dataclasses.field(default_factory=lambda: jnp.ones((3, 2)))
        row: Any = dataclasses.field(default_factory=lambda: jnp.ones((1, 3, 2)))
        shape: tuple = (2, 1)

        def terminal_cost(self, x):
            x = jnp.reshape(x, self.shape)[:, 0]
            rest = jnp.sum((jnp.sum(self.table, 0) + jnp.sum(self.row, (0, 1))) * x**2)
            return self.pair[0] * x[0] ** 2 + self.pair[1] * x[1] ** 2 + rest

    _, x0s, uss = batch(2)
    problem = dp.ControlProblem.from_system(Indexed(), 12)
    found = dp.solve_batch(problem, dp.ILQR(), x0s, uss)
    close(found[1].us, dp.solve(problem, dp.ILQR(), x0s[1], uss[1]).us)


def test_tables_of_numpy_do_not_hide_what_is_asked_about():
    class Tracking(Weighted):
        reference: Any = dataclasses.field(default_factory=lambda: np.ones(12))

        def cost(self, x, u, t):
            return super().cost(x, u, t) + (x[0] - self.reference[t]) ** 2

    weights, (_, x0s, uss) = jnp.array([2.0, 5.0]), batch(2)
    problem = dp.ControlProblem.from_system(Tracking(weights=weights), 12)
    with pytest.raises(ValueError, match="`problem.system.weights` has 2 rows.*tree: "):
        dp.solve_batch(problem, dp.ILQR(), x0s, uss)


def test_a_system_without_numbers():
    class Still(eqx.Module):
        def dynamics(self, x, u, t):
            return x + u

        def cost(self, x, u, t):
            return jnp.sum(u**2)

        def terminal_cost(self, x):
            return jnp.sum(x**2)

    problem = dp.ControlProblem.from_system(Still(), 3)
    solution = dp.solve_batch(
        problem, dp.ILQR(), jnp.ones((2, 1)), jnp.zeros((2, 3, 1))
    )
    close(solution.cost, jnp.full(2, 0.25))  # the sum is -3 / 4: 3 / 16 + 1 / 16


def test_wrong_axes():
    _, x0s, uss = batch()

    def call(in_axes, stiffness: Any = MASSES):
        system = helpers.Spring(stiffness=stiffness)
        problem = dp.ControlProblem.from_system(system, 12)
        dp.solve_batch(problem, dp.ILQR(), x0s, uss, in_axes=in_axes)

    with pytest.raises(TypeError, match="`in_axes` has '0'; an axis is an int"):
        call("0")
    with pytest.raises(ValueError, match="no tree like the problem: give `None`"):
        call({"mass": 0})
    with pytest.raises(ValueError, match=r"has 1 for a number of shape \(5,\) in"):
        call(1)
    for stiffness in (0.3, [0.3] * 5):
        message = (
            "`in_axes` is 0, but no array in the problem.*arrays of lists .`jnp.asa"
        )
        with pytest.raises(ValueError, match=message):
            call(0, stiffness=stiffness)
    system = helpers.Spring(stiffness=MASSES, weight=MASSES)
    problem = dp.ControlProblem.from_system(system, 12)
    names = "`problem.system.stiffness`, `problem.system.weight` have 5 rows"
    with pytest.raises(ValueError, match=names):
        dp.solve_batch(problem, dp.ILQR(), x0s, uss)
    with pytest.raises(ValueError, match=r"`jnp.stack\(x0s\)` makes an array"):
        dp.solve_batch(problem, dp.ILQR(), list(x0s), uss)
    message = r"`problem.system.stiffness` has 3 problems.*share: `None` in a tree, or"
    with pytest.raises(ValueError, match=message):
        call(0, stiffness=MASSES[:3])


def test_wrong_calls(unchecked):
    problem, x0s, uss = batch()
    call = lambda *args, **options: dp.solve_batch(problem, dp.ILQR(), *args, **options)
    with pytest.raises(ValueError, match=r"`x0s` has 5 problems, `uss` has 4 problems"):
        call(x0s, uss[:4])
    with pytest.raises(ValueError, match=r"`uss` has 12 problems.*broadcast_to"):
        call(x0s, uss[0])
    with pytest.raises(ValueError, match=r"`x0s\[1\]` has no axis"):
        call((x0s, 0.0), uss)
    with pytest.raises(ValueError, match=r"`us` has shape \(5,\)") as error:
        call(x0s, uss[:, :, 0].T[:5])
    given = "us of shape (5,) from `uss` of shape (5, 5)."
    assert given in error.value.__notes__[-1]
    with pytest.raises(ValueError, match="`x0s` has 0 problems; at least 1 is"):
        call(x0s[:0], uss[:0])
    with pytest.raises(TypeError, match=r"`rtol` is an array of shape \(2,\); one num"):
        call(x0s, uss, rtol=jnp.ones(2))
    with pytest.raises(TypeError, match="takes no `throw`: nothing is raised for a pr"):
        call(x0s, uss, throw=True)
    with pytest.raises(ValueError, match="`batch_size` is 0; a Python int >= 1"):
        call(x0s, uss, batch_size=0)
    with pytest.raises(ValueError, match="`batch_size` is 2.5; a Python int"):
        call(x0s, uss, batch_size=2.5)
    with pytest.raises(ValueError, match="`fast_loops=True` is not possible"):
        sort = lambda x, u, t: jnp.sort(x) + u
        sorting = dp.ControlProblem(sort, problem.cost, problem.terminal_cost, 12)
        dp.solve_batch(sorting, dp.ILQR(), x0s, uss, fast_loops=True)


def test_an_error_names_arrays_that_in_axes_would_split():
    class Cart(eqx.Module):
        mass: jax.Array

        def dynamics(self, x, u, t):
            return x + 0.1 * jnp.stack([x[1], u[0] / self.mass])

        def cost(self, x, u, t):
            return u @ u

        def terminal_cost(self, x):
            return x @ x

    problem = dp.ControlProblem.from_system(Cart(jnp.ones((6, 1))), 4)
    with pytest.raises(ValueError) as error:
        dp.solve_batch(problem, dp.ILQR(), jnp.ones((6, 2)), jnp.zeros((6, 4, 1)))
    note = "all of `problem.system.mass`, of which `in_axes=0` would give one row"
    assert note in error.value.__notes__[-1]
