"""What a result says: the sentence, the place, and the advice of what was called."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import diffprog as dp
from diffprog._common.result import NAMES

from . import helpers
from .helpers import MONOTONE, name, one_stage, SECOND_ORDER


ZERO = jnp.zeros(1), jnp.zeros((1, 1))


def test_a_sentence_names_no_part_of_one_problem():
    words = "us horizon control parameter batch max_steps damping_factor dynamics"
    sentences = [dp.RESULTS[getattr(dp.RESULTS, name)] for name in NAMES]
    assert len(set(sentences)) == len(NAMES) == len(dp.RESULTS)
    for sentence in sentences:
        assert sentence.endswith(".") and sentence.count(".") == 1
        assert not set(words.split()) & set(sentence.replace("`", " ").split())


GROWING = dp.ControlProblem(
    lambda x, u, t: x + x**3 + u,
    lambda x, u, t: jnp.sum(jnp.sqrt(4.0 - u)),
    lambda x: jnp.sum(x**2),
    8,
)


@pytest.mark.parametrize(
    "x0, bad, stage, message",
    [
        (0.0, None, None, None),
        (jnp.nan, None, 0, "There is a NaN or an infinity in `x0`. Give finite"),
        (0.0, (3, jnp.inf), 3, "infinity in `us`, first at stage 3. Give finite"),
        (0.0, (5, 5.0), 5, "the cost of stage 5; its state is finite. Start where"),
        (2.0, None, 5, "The state is not finite from stage 5 on. Start from"),
    ],
    ids=["finite", "x0", "us", "cost", "state"],
)
def test_the_message_says_what_is_not_finite_and_where(x0, bad, stage, message):
    us = jnp.zeros((8, 1), jnp.float32)
    us = us if bad is None else us.at[bad[0]].set(bad[1])
    start = jnp.full(1, x0, jnp.float32)
    solution = dp.solve(GROWING, dp.ILQR(), start, us, max_steps=1, throw=False)
    if message is None:
        assert solution.stats["first_nonfinite"] == 9
        return
    assert solution.result == dp.RESULTS.nonfinite_rollout
    assert solution.stats["first_nonfinite"] == stage
    with pytest.raises(dp.SolveError) as error:
        dp.solve(GROWING, dp.ILQR(), start, us, max_steps=1)
    assert message in str(error.value) and message in repr(solution)


def test_a_state_that_is_not_finite_at_once_has_another_reason():
    steep = lambda x, u, t: x + jnp.sqrt(x - 2.0)
    problem = dp.ControlProblem(steep, lambda x, u, t: 0.0, jnp.sum, 4)
    with pytest.raises(dp.SolveError, match="from stage 1 on. So early that is hardly"):
        dp.solve(problem, dp.ILQR(), jnp.ones(1), jnp.zeros((4, 1)))


@pytest.mark.slow
def test_a_state_that_is_lost_late_may_be_a_step_that_fails():
    """Unless it has grown before: then it overflowed."""
    cost = lambda x, u, t: 0.0
    late = lambda x, u, t: x + 1.0 + 0.0 * jnp.sqrt(3.5 - x)
    call = lambda f: dp.solve(
        dp.ControlProblem(f, cost, jnp.sum, 8), dp.ILQR(), jnp.ones(1), us
    )
    us = jnp.zeros((8, 1))
    with pytest.raises(dp.SolveError, match="from stage 4 on. Start .* root finder"):
        call(late)
    with pytest.raises(
        dp.SolveError, match="from stage 4 on. Start .* an implicit solver.$"
    ):
        call(lambda x, u, t: x * 1e80)


def test_a_state_that_runs_away_is_to_blame_and_not_its_cost():
    grow = lambda x, u, t: 1e8 * x
    square = lambda x, u, t: jnp.sum(x**2)
    problem = dp.ControlProblem(grow, square, jnp.sum, 4)
    us = jnp.zeros((4, 1), jnp.float32)
    with pytest.raises(dp.SolveError, match="At stage 3 the state has run away, to 1"):
        dp.solve(problem, dp.ILQR(), jnp.ones(1, jnp.float32), us)


SHORTEN = "shorten .*, or give `discretize` an implicit solver"
LATE = f"shortens steps. Where an explicit rule .* stiff vector field, {SHORTEN}"


@pytest.mark.costly
@pytest.mark.parametrize(
    "method, rate, horizon, message",
    [
        ("euler", 1e3, 60, f"not finite from stage 23 on. .*{LATE}.$"),
        ("rk4", 1e3, 5, f"stage 5 the state has run away, .*{LATE}.$"),
        ("midpoint", 1e3, 5, f"at stage 3. The states reach .*: no model .*{LATE}.$"),
        (diffrax.Tsit5(), 1e5, 5, rf"So early .* explicit rule .*\({SHORTEN}\)"),
    ],
    ids=["late", "cost", "derivative", "early"],
)
def test_an_explicit_rule_on_a_stiff_vector_field_is_told(
    method, rate, horizon, message
):
    field = lambda x, u, t: jnp.stack([x[1], -rate * (x[1] - jnp.cos(x[0]) * u[0])])
    problem = dp.ControlProblem(
        dp.discretize(field, 0.05, method),
        lambda x, u, t: 0.01 * jnp.sum(u**2),
        lambda x: jnp.sum((x - jnp.array([0.5, 0.0], jnp.float32)) ** 2),
        horizon,
    )
    x0, us = jnp.array([0.0, 1.0], jnp.float32), jnp.zeros((horizon, 1), jnp.float32)
    with pytest.raises(dp.SolveError, match=message):
        dp.solve(problem, dp.ILQR(), x0, us, max_steps=20)


class Root(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return jnp.sqrt(self.w) * x


@pytest.mark.parametrize(
    "w, message",
    [
        (1e160, "state is not finite from stage 4 on. Look for NaN in .* parameters.$"),
        (-1.0, "state is not finite from stage 1 on. Look for NaN in .* parameters.$"),
        (1.0, r"trials were not finite from stage 1 on. Without .* below\? Raise"),
    ],
    ids=["late", "early", "trials"],
)
def test_the_training_of_a_network_hears_nothing_of_time_steps(w, message):
    net = dp.Network((Root(jnp.array(w)),) * 5)
    problem = dp.NetworkProblem(net, dp.losses.Squared(), -10.0 * jnp.ones((1, 1)))
    with pytest.raises(dp.SolveError, match=message):
        dp.solve(problem, dp.GaussNewton(), jnp.ones((1, 1)), net.params, max_steps=1)


def test_a_wild_guess_is_to_blame_and_not_the_model():
    grow = lambda x, u, t: x + x**3 + u
    effort = lambda x, u, t: jnp.sum(u**2)
    problem = dp.ControlProblem(grow, effort, lambda x: jnp.sum(x**2), 20)
    place = r"any damping|acceptable step). The states reach .*: no model holds there. "
    with pytest.raises(dp.SolveError, match=f"({place}Start from `us` that keep"):
        dp.solve(problem, dp.ILQR(), jnp.array([-0.2]), jnp.zeros((20, 1)))


def test_trials_that_are_not_finite_are_told_at_the_step_limit():
    """A step of an implicit solver that fails is such a trial."""
    edge = one_stage(lambda x: jnp.sum((x - 1.0) ** 2 + 0.0 * jnp.sqrt(0.1 - x)))
    with pytest.raises(dp.SolveError, match="The step limit was") as error:
        dp.solve(edge, dp.ILQR(), *ZERO, max_steps=1)
    message = "In iteration 0 trials were not finite from stage 1 on."
    assert message in str(error.value) and "root finder" in str(error.value)
    bowl = one_stage(lambda x: jnp.sum((x - 1.0) ** 4))
    solution = dp.solve(bowl, dp.ILQR(), *ZERO, max_steps=1, throw=False)
    assert solution.stats["first_nonfinite"] == 2
    assert solution.stats["nonfinite_step"] == 2
    assert "not finite" not in repr(solution)


# The whole first step leads to -8, where this is NaN; later ones are short, up to a
# place that the model does not see, and where every step raises the cost.
PIT = lambda x: jnp.sum(
    jnp.sqrt(1.0 + x**2)
    + 0.0 * jnp.sqrt(25.0 - x**2)
    + lax.stop_gradient(10.0 * jnp.abs(x + 0.5))
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "search, max_steps, code",
    [
        (dp.AdaptiveDamping(), 3, "max_steps_reached"),
        (dp.AdaptiveDamping(max_damping=1e3), 256, "damping_limit"),
        (dp.Backtracking(max_damping=1e3), 256, "no_descent"),
    ],
    ids=["limit", "damping", "descent"],
)
def test_trials_of_an_early_iteration_that_are_not_finite_are_told_at_the_end(
    search, max_steps, code
):
    problem, (x0, _) = one_stage(PIT), ZERO
    us, options = jnp.full((1, 1), 2.0), dict(max_steps=max_steps)
    solutions = [
        dp.solve(problem, dp.ILQR(), x0, us, search, **options, throw=False),
        dp.solve(
            problem, dp.ILQR(), x0, us, search, **options, throw=False, fast_loops=False
        ),
        dp.solve_batch(problem, dp.ILQR(), x0[None], us[None], search, **options)[0],
        by_hand(problem, x0, us, search, max_steps),
    ]
    for solution in solutions:
        assert solution.result == getattr(dp.RESULTS, code)
        assert solution.stats["first_nonfinite"] == 1
        step, message = int(solution.stats["nonfinite_step"]), repr(solution)
        assert step == (name(search) == "AdaptiveDamping")
        assert step + 1 < solution.stats["num_steps"] or code == "no_descent"
        assert f"In iteration {step} trials were not finite from stage 1" in message
        assert "`root_find_max_steps=100`" in message and "Otherwise, " in message


def by_hand(problem, x0, us, search, max_steps):
    state = dp.init(problem, dp.ILQR(), x0, us, search, max_steps=max_steps)
    while not state.done:
        state = dp.step(problem, state)
    return dp.finish(problem, state, throw=False)


def test_a_success_tells_of_no_trials():
    bowl = lambda x: PIT(x) - jnp.sum(lax.stop_gradient(10.0 * jnp.abs(x + 0.5)))
    us = jnp.full((1, 1), 2.0)
    solution = dp.solve(one_stage(bowl), dp.ILQR(), ZERO[0], us, max_steps=9)
    assert solution.history["trials"][0] > 1
    assert solution.stats["first_nonfinite"] == 2
    assert solution.stats["nonfinite_step"] == 10


@pytest.mark.slow
def test_the_place_is_found_in_a_chain_of_phases():
    phase = dp.Phase(lambda x, u, t: x + u, lambda x, u, t: jnp.sum(u**2), 2)
    chain = dp.Chain((phase, phase), lambda x: jnp.sum(x**2))
    us = jnp.zeros((2, 1)), jnp.zeros((2, 1)).at[1].set(jnp.nan)
    with pytest.raises(dp.SolveError, match="in `us`, first at stage 3"):
        dp.solve(chain, dp.ILQR(), jnp.ones(1), us)
    last = dp.Chain((phase, phase), lambda x: jnp.sum(jnp.sqrt(x - 2)))
    with pytest.raises(dp.SolveError, match="the cost of stage 4; its state"):
        dp.solve(last, dp.ILQR(), jnp.ones(1), (us[0], us[0]))


@pytest.mark.costly
@pytest.mark.parametrize("search", MONOTONE, ids=name)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_cost_without_bound_is_called_so(search, dtype):
    problem = one_stage(lambda x: -jnp.sum(x**4))
    x0, us = jnp.zeros(1, dtype), jnp.ones((1, 1), dtype)
    solution = dp.solve(problem, dp.DDP(), x0, us, search, throw=False)
    assert solution.result == dp.RESULTS.cost_unbounded
    assert np.isfinite(solution.cost) and solution.cost < -1e15
    assert solution.cost == problem.terminal_cost(solution.us[0])
    assert solution.stats["num_steps"] < 100
    assert "look for a term of the cost with the wrong sign" in repr(solution)


@pytest.mark.costly
@pytest.mark.parametrize("method", SECOND_ORDER, ids=name)
def test_a_solution_says_whether_it_is_a_minimum(method):
    solve = lambda J: dp.solve(one_stage(J), method, *ZERO)
    flat, bowl = solve(lambda x: x[0] * 0.0), solve(lambda x: 1.0 - jnp.cos(x[0]))
    for solution, minimum in ((flat, False), (bowl, True)):
        assert solution.success and solution.stats["num_steps"] == 0
        assert solution.stats["minimum"] == minimum
        assert ("It may be no minimum" in repr(solution)) == (not minimum)


HILL = lambda u: jnp.cos(u[0]) + 0.5 * u[1] ** 2
SADDLE = lambda u: u[0] ** 2 + u[1] ** 2 - 3.0 * u[0] * u[1] + jnp.sum(u**4)


@pytest.mark.costly
@pytest.mark.parametrize("search", MONOTONE, ids=name)
@pytest.mark.parametrize("method", SECOND_ORDER, ids=name)
@pytest.mark.parametrize("J, least", [(HILL, -1.0), (SADDLE, -1 / 8)], ids=["1", "2"])
def test_a_maximum_and_a_saddle_are_left(J, least, method, search):
    us = jnp.zeros((1, 2))
    solution = dp.solve(one_stage(J), method, jnp.zeros(2), us, search)
    assert solution.success and solution.stats["minimum"]
    assert abs(solution.cost - least) < 1e-8
    costs = np.asarray(solution.history["cost"])
    assert np.all(np.diff(costs[np.isfinite(costs)]) < 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("fast_loops", [None, False])
def test_a_pendulum_leaves_the_worst_position(fast_loops, dtype):
    def dynamics(x, u, t):
        return x + 0.05 * jnp.stack([x[1], u[0] - 9.81 * jnp.sin(x[0])])

    final = lambda x: 100.0 * (1.0 + jnp.cos(x[0]))
    effort = lambda x, u, t: 0.01 * u[0] ** 2
    problem = dp.ControlProblem(dynamics, effort, final, 40)
    x0, us = jnp.zeros(2, dtype), jnp.zeros((40, 1), dtype)
    solution = dp.solve(problem, dp.DDP(), x0, us, fast_loops=fast_loops)
    assert solution.stats["minimum"] and solution.cost < 7.0
    assert abs(abs(solution.xs[-1, 0]) - jnp.pi) < 0.1


@pytest.mark.slow
def test_a_batch_can_be_taken_apart():
    problem, x0, us = helpers.spring()
    x0s = jnp.stack([x0, jnp.full(2, jnp.nan), 2 * x0])
    batch = dp.solve_batch(problem, dp.ILQR(), x0s, jnp.stack([us] * 3))
    np.testing.assert_array_equal(batch.success, [True, False, True])
    alone = dp.solve(problem, dp.ILQR(), 2 * x0, us)
    assert bool(alone.success) and repr(batch[2]) == repr(batch[-1])
    np.testing.assert_allclose(batch[2].us, alone.us, rtol=1e-12)
    np.testing.assert_allclose(batch[2].policy.K, alone.policy.K, rtol=1e-9)
    assert "NaN or an infinity in `x0`" in repr(batch[1])
    assert [bool(one.success) for one in batch] == [True, False, True]
    np.testing.assert_array_equal(batch[1:].success, [False, True])
    with pytest.raises(IndexError, match=r"`solution\[3\]` of a batch of 3 problems"):
        batch[3]
    with pytest.raises(TypeError, match="the solution of one problem"):
        alone[0]


def test_the_advice_is_that_of_what_was_called():
    eye, zero = jnp.eye(1)[None].repeat(4, 0), jnp.zeros((4, 1))
    R = eye.at[2].set(-9.0)
    lqr = dp.LQR(eye, eye, zero, eye, R, Q_final=eye[0])
    with pytest.raises(dp.SolveError, match="At stage 2 it is R.*Raise `R`") as error:
        dp.solve_lqr(lqr, jnp.ones(1))
    assert "damping" not in str(error.value)
    saddle, us = one_stage(lambda x: -jnp.sum(x**2)), jnp.ones((1, 1))
    search = dp.Backtracking(max_damping=1e-3)
    with pytest.raises(dp.SolveError, match=r"with `dp.Newton\(\)` or `dp.DDP\(\)`"):
        dp.solve(saddle, dp.ILQR(), ZERO[0], us, search)
    vd = dp.value_and_direction(dp.losses.Squared(), dp.oracles.GaussNewton(0.1))
    with pytest.raises(dp.SolveError, match="NaN in `inputs`, `targets`") as error:
        vd(helpers.Scaled(jnp.ones(1)), jnp.full((3, 1), jnp.nan), jnp.zeros((3, 1)))
    assert "horizon" not in str(error.value)


TRANSFORMS = dict(
    reverse=jax.grad,
    forward=jax.jacfwd,
    vectorized=lambda fn: lambda a: jax.vmap(jax.grad(fn))(a[None])[0],
)


@pytest.mark.costly
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_without_jit_a_failure_is_no_error_under_a_transformation(transform):
    """Its derivative is NaN, and it prints what it consists of."""

    def control(a):
        cost = one_stage(lambda x: jnp.sum((x - a) ** 4))
        solution = dp.solve(cost, dp.ILQR(), *ZERO, max_steps=1)
        assert repr(solution).startswith("Solution(\n")
        return solution.us[0, 0]

    with pytest.raises(dp.SolveError, match="step limit"):
        control(1.0)
    assert jnp.isnan(TRANSFORMS[transform](control)(jnp.array(1.0)))


def test_nor_is_one_of_a_linear_quadratic_problem():
    eye, zero = jnp.eye(1)[None].repeat(4, 0), jnp.zeros((4, 1))

    def control(r):
        lqr = dp.LQR(eye, eye, zero, eye, r * eye, Q_final=eye[0])
        return dp.solve_lqr(lqr, jnp.ones(1)).us[0, 0]

    with pytest.raises(dp.SolveError, match="it is R"):
        control(-9.0)
    assert jnp.isnan(jax.grad(control)(-9.0))
