import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._common.result import NAMES

from . import helpers
from .helpers import DIRECTIONS, MONOTONE, name, SEARCHES


HESSIANS = [dp.Newton(), dp.DDP()]
CODES = [getattr(dp.RESULTS, code) for code in NAMES]


@pytest.fixture(scope="module")
def optimum():
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.DDP(), x0, us, rtol=0.0, atol=0.0)
    assert solution.cost < 0.95 * dp.rollout(problem, x0, us).cost
    assert np.linalg.norm(helpers.gradient("spring")(solution.us)) < 1e-6
    return solution


@pytest.mark.costly
@pytest.mark.parametrize("search", MONOTONE, ids=name)
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_all_directions_reach_the_same_optimum(method, search, optimum):
    problem, x0, us = helpers.spring()
    steps = 1000 if isinstance(method, dp.Gradient) else 256  # the default
    solution = dp.solve(problem, method, x0, us, search, max_steps=steps)
    assert solution.result == dp.RESULTS.successful
    np.testing.assert_allclose(solution.cost, optimum.cost, rtol=1e-6)
    cost = solution.history["cost"]
    n = int(solution.stats["num_steps"])
    assert np.all(np.diff(cost[: n + 1]) <= 1e-15) and np.all(np.isnan(cost[n + 1 :]))


@pytest.mark.parametrize("method", HESSIANS, ids=name)
def test_quadratic_convergence(method, optimum):
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, method, x0, us, rtol=0.0, atol=0.0)
    gradients = np.asarray(solution.history["gradient"])
    gradients = gradients[~np.isnan(gradients)]
    # Below, the rounding of the cost decides on the length of a step.
    last = gradients[:-1][gradients[:-1] > 1e-6]
    assert len(last) >= 2
    # Each error is at most a multiple of the square of the one before.
    assert np.all(gradients[1 : len(last) + 1] <= 0.1 * last**2)


@pytest.mark.slow
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_solution_is_stationary_and_consistent(method):
    # Random problems are too ill conditioned for gradient descent.
    exact = method in helpers.SECOND_ORDER
    chain = "linear" if exact else "spring"
    problem, x0, us = helpers.PROBLEMS[chain]()
    solution = dp.solve(problem, method, x0, us)
    again = dp.rollout(problem, x0, solution.us)
    np.testing.assert_allclose(solution.cost, again.cost, rtol=1e-14)
    np.testing.assert_allclose(solution.xs, again.xs, rtol=1e-12, atol=1e-12)
    first, last = (
        np.linalg.norm(helpers.gradient(chain)(us)) for us in (us, solution.us)
    )
    np.testing.assert_allclose(solution.history["gradient"][0], first, rtol=1e-12)
    # One step of second order solves this: what is left is rounding.
    np.testing.assert_allclose(
        solution.stats["gradient"], last, atol=2e-14 * float(first)
    )
    assert last <= (1e-13 if exact else 1e-3) * first
    assert solution.stats["decrement"] <= 1e-9 * (1 + abs(solution.cost))


def test_policy_stabilizes_and_works_on_pytrees():
    problem, x0, us = helpers.spring()
    flat = dp.solve(problem, dp.ILQR(), x0, us)
    tree = dp.ControlProblem(
        lambda x, u, t: dict(
            zip(("position", "speed"), problem.dynamics(_stack(x), u["force"], t))
        ),
        lambda x, u, t: problem.cost(_stack(x), u["force"], t),
        lambda x: problem.terminal_cost(_stack(x)),
        12,
    )
    start = dict(position=x0[0], speed=x0[1])
    solution = dp.solve(tree, dp.ILQR(), start, dict(force=us))
    np.testing.assert_allclose(solution.us["force"], flat.us, atol=1e-14)
    np.testing.assert_allclose(solution.xs["speed"], flat.xs[:, 1], atol=1e-14)
    np.testing.assert_allclose(solution.policy.K, flat.policy.K, atol=1e-13)
    x = dict(position=flat.xs[3, 0] + 0.1, speed=flat.xs[3, 1])
    expected = flat.us[3] + flat.policy.k[3] + 0.1 * flat.policy.K[3, :, 0]
    np.testing.assert_allclose(solution.policy(3, x)["force"], expected, atol=1e-13)
    # From a disturbed start, feedback beats the same controls without it.
    costs, ends = [], []
    for policy in (flat.policy, lambda t, x: flat.us[t]):
        x, cost = x0 + 0.3, 0.0
        for t in range(12):
            u = policy(t, x)
            cost, x = cost + problem.cost(x, u, t), problem.dynamics(x, u, t)
        costs.append(cost + problem.terminal_cost(x))
        ends.append(np.linalg.norm(x - flat.xs[-1]))
    assert costs[0] < 0.98 * costs[1] and ends[0] < 0.75 * ends[1]


_stack = lambda x: jnp.stack([x["position"], x["speed"]])


@pytest.mark.costly
@pytest.mark.parametrize(
    "chain, method", [("ragged", dp.ILQR()), ("two_phase", dp.Newton())]
)
def test_chains_of_several_segments(chain, method):
    problem, x0, us = helpers.PROBLEMS[chain]()
    solution = dp.solve(problem, method, x0, us)
    gradient = helpers.gradient(chain)(solution.us)
    norm = np.linalg.norm(ravel_pytree(gradient)[0])
    assert solution.result == dp.RESULTS.successful and norm < 1e-3
    assert jtu.tree_structure(solution.us) == jtu.tree_structure(us)
    assert len(solution.xs) == len(us) + 1 and len(solution.policy) == len(us)
    start = sum(phase.horizon for phase in problem.phases[:-1])
    first = jtu.tree_map(lambda a: a[0], solution.xs[-2])
    control = solution.policy[-1](start, first)
    expected = jtu.tree_map(lambda a: a[0], solution.us[-1])
    helpers.close(control, expected, 1e-3, scale=1.0)


@pytest.mark.slow
def test_repeated_stages_as_one_segment_or_many_agree():
    problem, x0, us = helpers.spring(T=6)
    chain = dp.Chain(
        (
            dp.Phase(problem.dynamics, problem.cost, 2),
            dp.Phase(problem.dynamics, problem.cost, 1),
            dp.Phase(problem.dynamics, problem.cost, 3),
        ),
        problem.terminal_cost,
    )
    one = dp.solve(problem, dp.DDP(), x0, us)
    many = dp.solve(chain, dp.DDP(), x0, (us[:2], us[2:3], us[3:]))
    assert np.linalg.norm(one.us - us) > 0.1
    np.testing.assert_allclose(jnp.concatenate(many.us), one.us, atol=1e-12)
    np.testing.assert_allclose(
        jnp.concatenate([p.K for p in many.policy]), one.policy.K, atol=1e-12
    )


@pytest.mark.costly
@pytest.mark.parametrize(
    "method, search",
    [(dp.GaussNewton(), MONOTONE[0]), (dp.DDP(), MONOTONE[1])],
    ids=name,
)
def test_vmap_equals_loop(method, search):
    problem, _, us = helpers.spring()
    x0s = jnp.linspace(-2.0, 2.0, 10).reshape(5, 2)
    solve = lambda x0: dp.solve(problem, method, x0, us, search)
    batch = jax.vmap(solve)(x0s)
    assert "5 problems: 5 successful" in repr(batch)
    for i, x0 in enumerate(x0s):
        single = solve(x0)
        assert batch.result._value[i] == single.result._value
        for count in ("num_steps", "num_rollouts", "num_backwards"):
            assert batch.stats[count][i] == single.stats[count]
        np.testing.assert_allclose(batch.us[i], single.us, atol=1e-12)
        np.testing.assert_allclose(batch.policy.K[i], single.policy.K, atol=1e-12)
        for key in batch.history:
            a, b = batch.history[key][i], single.history[key]
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.costly
@pytest.mark.parametrize("search", SEARCHES, ids=name)
def test_stepping_by_hand_equals_solve(search):
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.ILQR(), x0, us, search)
    state = dp.init(problem, dp.ILQR(), x0, us, search)
    costs = []
    while not state.done:
        costs.append(float(state.cost))
        state = dp.step(problem, state)
    assert state.result == dp.RESULTS.successful and len(costs) > 2
    by_hand = dp.finish(problem, state)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    jtu.tree_map(near, by_hand, solution)
    np.testing.assert_allclose(costs, solution.history["cost"][: len(costs)])
    again = dp.step(problem, state)
    jtu.tree_map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_finishing_early_gives_the_policy_of_the_iterate():
    problem, x0, us = helpers.spring()
    state = dp.init(problem, dp.ILQR(), x0, us)
    state = dp.step(problem, state)
    with pytest.raises(dp.SolveError, match="max_steps"):
        dp.finish(problem, state)
    early = dp.finish(problem, state, throw=False)
    np.testing.assert_array_equal(early.us, state.us)
    assert np.linalg.norm(early.us - us) > 0.1
    one = dp.solve(problem, dp.ILQR(), x0, us, max_steps=1, throw=False)
    np.testing.assert_allclose(early.policy.K, one.policy.K, atol=1e-13)
    assert np.linalg.norm(early.policy.K) > 0


@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_warm_start_at_a_solution_takes_no_step(search):
    problem, x0, us = helpers.spring()
    first = dp.solve(problem, dp.ILQR(), x0, us, search)
    second = dp.solve(problem, dp.ILQR(), x0, first.us, search, state=first.state)
    assert first.stats["num_steps"] > 0 and second.stats["num_steps"] == 0
    np.testing.assert_array_equal(second.us, first.us)
    # A roll-out and a trial add the costs up in another order.
    np.testing.assert_allclose(second.cost, first.cost, rtol=1e-14)


@pytest.mark.slow
def test_counts_are_true():
    calls = dict(rollouts=0, total=0)

    def terminal_cost(x):
        jax.debug.callback(lambda: calls.update(total=calls["total"] + 1))
        return 50.0 * (x[0] - jnp.pi) ** 2 + 5.0 * x[1] ** 2

    problem, x0, us = helpers.pendulum(T=12)
    system = problem.system
    counted = dp.ControlProblem(system.dynamics, system.cost, terminal_cost, 12)
    counts = []
    for max_steps in (0, 20):
        calls["total"] = 0
        solution = dp.solve(
            counted, dp.ILQR(), x0, us, max_steps=max_steps, throw=False
        )
        jax.effects_barrier()
        counts.append((calls["total"], solution.stats))
    # Without a step: one roll-out and the derivatives of one expansion.
    (expansion, _), (total, stats) = counts
    expansions = stats["num_steps"] + 1
    assert stats["num_steps"] > 2
    assert total == stats["num_rollouts"] + expansions * (expansion - 1)
    assert stats["num_backwards"] >= expansions


def test_history_can_be_left_out():
    problem, x0, us = helpers.spring()
    with_history = dp.solve(problem, dp.ILQR(), x0, us)
    without = dp.solve(problem, dp.ILQR(), x0, us, history=False)
    assert without.history == {} and len(with_history.history["cost"]) == 257
    for key in ("num_steps", "num_rollouts", "num_backwards"):
        assert without.stats[key] == with_history.stats[key] > 0
    assert np.linalg.norm(without.us - us) > 0.1
    # Another program: the rounding may differ.
    np.testing.assert_allclose(without.us, with_history.us, rtol=0, atol=1e-13)


def test_history_describes_each_iteration():
    problem, x0, us = helpers.pendulum()
    solution = dp.solve(problem, dp.ILQR(), x0, us)
    h, n = solution.history, int(solution.stats["num_steps"])
    assert 1 < n < 256 and solution.cost < h["cost"][0] / 2
    assert all(len(column) == 257 for column in h.values())
    # Fused loops add the costs up in another order.
    np.testing.assert_allclose(h["cost"][0], dp.rollout(problem, x0, us).cost, 1e-14)
    assert h["cost"][n] == solution.cost
    assert np.sum(h["trials"][:n]) + 1 == float(solution.stats["num_rollouts"])
    assert np.all(h["slope"][:n] < 0) and np.isnan(h["stepsize"][n])
    gradient = helpers.gradient("pendulum")(us)
    np.testing.assert_allclose(h["gradient"][0], np.linalg.norm(gradient), rtol=1e-12)


def test_verbose_prints_one_aligned_row_per_iteration(capfd):
    problem, x0, us = helpers.spring()
    solution = jax.jit(lambda x0: dp.solve(problem, dp.ILQR(), x0, us, verbose=True))(
        x0
    )
    jax.effects_barrier()
    header, *rows = capfd.readouterr().out.splitlines()
    assert header.split() == "step cost stepsize damping slope trials gradient".split()
    assert len(rows) == solution.stats["num_steps"] + 1
    assert {len(row) for row in rows} == {len(header)}
    assert float(rows[-1].split()[1]) == pytest.approx(float(solution.cost))


def test_verbose_hands_named_arrays_to_a_function():
    problem, x0, us = helpers.spring()
    rows = []
    solution = dp.solve(
        problem, dp.ILQR(), x0, us, verbose=lambda **row: rows.append(row)
    )
    jax.effects_barrier()
    assert len(rows) == solution.stats["num_steps"] + 1 > 2
    costs = [float(row["cost"]) for row in rows]
    np.testing.assert_array_equal(costs, solution.history["cost"][: len(rows)])


def test_repr_tells_what_happened():
    problem, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.ILQR(), x0, us)
    lines = repr(solution).splitlines()
    assert lines[0] == "Solution: successful"
    assert lines[1].split() == ["cost", f"{float(solution.cost):.10g}"]
    assert "iterations" in lines[2] and "stationarity" in lines[3]
    jax.eval_shape(lambda: (repr(dp.solve(problem, dp.ILQR(), x0, us)), us)[1])
    to = lambda a: a.astype(np.float32) if eqx.is_inexact_array(a) else a
    single = jax.tree.map(to, solution)
    assert repr(single).splitlines()[0] == "Solution in float32: successful"
    three = jax.tree.map(lambda a: jnp.stack([a, a, a]), single)
    assert repr(three).startswith("Solution of 3 problems in float32: 3 successful\n")


def test_a_constant_in_the_cost_changes_only_the_cost():
    problem, x0, us = helpers.spring()
    system = problem.system
    shifted = dp.ControlProblem(
        system.dynamics, system.cost, lambda x: system.terminal_cost(x) + 100.0, 12
    )
    a = dp.solve(problem, dp.DDP(), x0, us, rtol=0.0)
    b = dp.solve(shifted, dp.DDP(), x0, us, rtol=0.0)
    assert np.linalg.norm(a.us - us) > 0.1
    np.testing.assert_allclose(b.cost - 100.0, a.cost, rtol=1e-12)
    np.testing.assert_allclose(b.us, a.us, atol=1e-9)


def test_scaling_the_cost_by_four_leaves_undamped_gains_bit_for_bit():
    problem, x0, us = helpers.linear()

    @jax.jit
    def solve(scale):
        # The factor is data: both run the same program, and so round alike.
        scaled = dp.ControlProblem(
            problem.dynamics,
            lambda x, u, t: scale * problem.cost(x, u, t),
            lambda x: scale * problem.terminal_cost(x),
            12,
        )
        return dp.solve(scaled, dp.ILQR(), x0, us, dp.FixedStep(), max_steps=1)

    one, four = (solve(jnp.asarray(scale)) for scale in (1.0, 4.0))
    assert np.linalg.norm(one.policy.K) > 0.1 < np.linalg.norm(one.us - us)
    np.testing.assert_array_equal(four.policy.K, one.policy.K)
    np.testing.assert_array_equal(four.us, one.us)
    np.testing.assert_array_equal(four.cost, 4.0 * one.cost)


# Failures: each has its code, keeps the best finite iterate, and raises when concrete.


def failing(kind):
    grow = lambda x, u, t: x + x**3 + u
    root = lambda x, u, t: x + jnp.sqrt(1.0 - x) * u
    plain = lambda x, u, t: x + u
    effort = lambda x, u, t: jnp.sum(u**2) + jnp.sum(x**2)
    final = lambda x: jnp.sum(x**2)
    x0, us = jnp.full((1,), 0.5), jnp.zeros((8, 1))
    problem = lambda f, h, last: dp.ControlProblem(f, h, last, 8)
    return {
        "overflow": (problem(grow, effort, final), jnp.full((1,), 2.0), us),
        "nan start": (problem(plain, effort, final), jnp.full((1,), jnp.nan), us),
        "root": (problem(root, effort, lambda x: -10.0 * jnp.sum(x)), x0, us),
        "saddle": (problem(plain, lambda x, u, t: -jnp.sum(u**2), final), x0, us),
        "kink": (problem(plain, lambda x, u, t: jnp.sum(jnp.sqrt(u)), final), x0, us),
        "wrong": (problem(plain, lambda x, u, t: _wrong(jnp.sum(u)), final), x0, us),
    }[kind]


@jax.custom_jvp
def _wrong(x):
    return x + 0.0


@_wrong.defjvp
def _(primals, tangents):
    """A derivative of the wrong sign."""
    return primals[0], -50.0 * tangents[0]


@pytest.mark.costly
@pytest.mark.parametrize("method", [dp.Gradient(), dp.DDP()], ids=name)
@pytest.mark.parametrize("kind", ["overflow", "nan start"])
def test_an_initial_rollout_that_overflows(kind, method):
    problem, x0, us = failing(kind)
    solution = dp.solve(problem, method, x0, us + 0.25, throw=False)
    assert solution.result == dp.RESULTS.nonfinite_rollout
    xs = dp.rollout(problem, x0, us + 0.25).xs[:, 0]
    costs = jnp.append(xs[:-1] ** 2 + 0.25**2, xs[-1] ** 2)
    bad = ~np.isfinite(xs) | ~np.isfinite(costs)
    assert int(solution.stats["first_nonfinite"]) == np.argmax(bad)
    np.testing.assert_array_equal(solution.us, us + 0.25)
    assert np.isinf(solution.cost) and solution.stats["num_steps"] == 0
    message = "not finite from stage|in `x0`|the state has run away"
    with pytest.raises(dp.SolveError, match=message) as error:
        dp.solve(problem, method, x0, us + 0.25)
    np.testing.assert_array_equal(error.value.solution.us, us + 0.25)


@pytest.mark.costly
@pytest.mark.parametrize("search", SEARCHES, ids=name)
@pytest.mark.parametrize("method", [dp.Gradient(), dp.DDP()], ids=name)
def test_a_trial_outside_the_domain_never_poisons_the_iterate(method, search):
    problem, x0, us = failing("root")
    solution = dp.solve(problem, method, x0, us, search, max_steps=50, throw=False)
    assert np.all(np.isfinite(solution.xs)) and np.all(np.isfinite(solution.us))
    assert np.isfinite(solution.cost)
    start = dp.rollout(problem, x0, us).cost
    assert solution.cost < start if search.monotone else solution.cost <= start
    assert np.all(np.isfinite(solution.policy.K))


def test_fixed_step_keeps_the_best_iterate_when_it_diverges():
    # One control is right after a step, the other grows by a factor of -999.
    problem = dp.ControlProblem(
        lambda x, u, t: x,
        lambda x, u, t: (u[0] ** 2 + 1e3 * u[1] ** 2) / 2,
        lambda x: jnp.zeros_like(x[0]),
        1,
    )
    x0, us = jnp.zeros(1), jnp.asarray([[100.0, 1e-6]])
    solve = lambda throw: dp.solve(
        problem, dp.Gradient(), x0, us, dp.FixedStep(), throw=throw
    )
    solution = solve(throw=False)
    assert solution.result == dp.RESULTS.nonfinite_rollout
    assert solution.stats["first_nonfinite"] == 0
    costs = np.asarray(solution.history["cost"])
    assert np.nanargmin(costs) == 1 and np.nanmax(costs) > 1e100
    assert solution.cost == costs[1]
    np.testing.assert_allclose(solution.us, [[0.0, -999e-6]], rtol=1e-9)
    with pytest.raises(
        dp.SolveError, match="not finite. In the trials that is so from stage 0"
    ):
        solve(throw=True)


@pytest.mark.costly
@pytest.mark.parametrize(
    "kind, search, code",
    [
        ("saddle", dp.FixedStep(), "factorization_failed"),
        ("saddle", dp.Backtracking(max_damping=1e-3), "damping_limit"),
        ("saddle", dp.AdaptiveDamping(max_damping=1e-3), "damping_limit"),
        ("kink", dp.Backtracking(), "nonfinite_derivative"),
        ("wrong", dp.Backtracking(), "no_descent"),
        ("wrong", dp.AdaptiveDamping(), "damping_limit"),
    ],
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_each_failure_has_its_code_and_advice(kind, search, code):
    problem, x0, us = failing(kind)
    solution = dp.solve(problem, dp.ILQR(), x0, us, search, throw=False)
    assert solution.result == getattr(dp.RESULTS, code)
    assert repr(solution).startswith(f"Solution: {code}")
    assert np.all(np.isfinite(solution.us)) and np.all(np.isfinite(solution.policy.K))
    sentence = dp.RESULTS[getattr(dp.RESULTS, code)]
    with pytest.raises(dp.SolveError) as error:
        dp.solve(problem, dp.ILQR(), x0, us, search)
    message = str(error.value)
    assert message.startswith(sentence) and len(message) > len(sentence) + 40
    assert message in repr(solution)
    if code == "nonfinite_derivative":
        assert solution.stats["first_nonfinite"] == 0


def test_the_step_limit_has_its_code_and_a_policy():
    problem, x0, us = helpers.pendulum()
    solution = dp.solve(problem, dp.ILQR(), x0, us, max_steps=3, throw=False)
    assert solution.result == dp.RESULTS.max_steps_reached
    assert solution.stats["num_steps"] == 3
    assert np.linalg.norm(solution.policy.K) > 0
    trials = np.nansum(solution.history["trials"])
    assert trials + 1 == float(solution.stats["num_rollouts"])
    none = dp.solve(problem, dp.ILQR(), x0, us, max_steps=0, throw=False)
    assert none.result == dp.RESULTS.max_steps_reached
    np.testing.assert_array_equal(none.us, us)


@pytest.mark.slow
def test_a_singular_but_optimal_problem_is_successful():
    """No control cost and a control without effect: every Hessian is singular."""
    problem = dp.ControlProblem(
        lambda x, u, t: x + u[:1], lambda x, u, t: jnp.sum(x**2), lambda x: x[0] ** 2, 4
    )
    x0, us = jnp.ones(1), jnp.zeros((4, 2))
    for search in MONOTONE:
        solution = dp.solve(problem, dp.ILQR(), x0, us, search)
        np.testing.assert_allclose(solution.cost, 1.0, atol=1e-6)
        assert np.all(np.isfinite(solution.policy.K))


def test_nothing_is_thrown_under_transformations():
    problem, x0, us = failing("overflow")
    code = jax.jit(lambda x0: dp.solve(problem, dp.ILQR(), x0, us).result)(x0)
    assert code == dp.RESULTS.nonfinite_rollout
    batch = jax.vmap(lambda x0: dp.solve(problem, dp.ILQR(), x0, us))(
        jnp.asarray([[2.0], [0.1]])
    )
    assert [NAMES[i] for i in batch.result._value] == [
        "nonfinite_rollout",
        "successful",
    ]
    assert np.all(np.isfinite(batch.us))


def test_codes_and_names_agree():
    assert [int(code._value) for code in CODES] == list(range(len(NAMES)))
