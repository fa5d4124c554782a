"""Receding horizon: ticks, their loop with a plant, and what may go wrong in it."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp
from diffprog import systems

from . import constrained, helpers


T, MOST, STEPS = 15, 2.4, 8


def pendulum(dtype=jnp.float64, friction=0.1, most=MOST, **options):
    """To be held upright, from where the torque can just do so."""
    limit = jnp.full(1, most, dtype)
    system = helpers.Pendulum(friction=friction)
    return dp.ControlProblem.from_system(system, T, (-limit, limit), **options)


X = jnp.array([3.0, 0.0])
US = jnp.zeros((T, 1))


@ft.cache
def controller(search="Backtracking", method="ILQR"):
    return dp.MPC(pendulum(), getattr(dp, method)(), 2, getattr(dp, search)())


def plant(x, u, t):
    return helpers.Pendulum(friction=0.3).dynamics(x, u, t)


moved = jax.jit(plant)


@ft.cache
def simulated(x=tuple(X.tolist())):
    return dp.simulate(controller(), plant, jnp.array(x), STEPS)


@ft.cache
def best():
    return dp.solve(controller().problem, dp.ILQR(), X, US, rtol=1e-15)


def ticks(mpc, state, x, number):
    """The loop of a user."""
    states, controls = [x], []
    for t in range(number):
        u, state = mpc(x, state)
        x = moved(x, u, t)
        states.append(x)
        controls.append(u)
    return jnp.stack(states), jnp.stack(controls), state


def same(a, b, rtol=1e-12, atol=1e-12):
    for one, other in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol, atol)


# What a tick is -------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("method", ["ILQR", "DDP", "GaussNewton"])
def test_the_first_tick_is_a_solve_of_so_many_iterations(method):
    mpc = controller(method=method)
    u, state = mpc(X, mpc.init(X, US))
    solution = dp.solve(mpc.problem, mpc.method, X, US, max_steps=2, throw=False)
    same((state.us, state.xs, state.cost), (solution.us, solution.xs, solution.cost))
    same(u, solution.us[0])
    assert state.result == dp.RESULTS.max_steps_reached


def test_one_tick_controls_a_linear_quadratic_problem_optimally():
    problem, x0, us = helpers.linear()
    mpc = dp.MPC(problem, dp.ILQR())
    state = mpc.init(x0, us)
    move = jax.jit(lambda x, u: problem.dynamics(x, u, jnp.int32(0)) + 0.1)
    x = x0
    for _ in range(3):
        u, state = mpc(x, state)
        best = dp.solve(problem, dp.ILQR(), x, us)
        same((u, state.K), (best.us[0], best.policy.K), 1e-9, 1e-9)
        x = move(x, u)


def test_the_policy_is_around_the_new_plan():
    mpc = controller()
    _, state = mpc(X, mpc.init(X, US))
    policy = state.policy
    for t in (0, T - 1):
        same(policy(t, state.xs[t]), state.us[t])
    other = policy(0, X + jnp.array([0.01, 0.0]))
    expected = state.us[0] + state.K[0, :, 0] * 0.01
    same(other, jnp.clip(expected, -MOST, MOST))
    assert jnp.any(state.K != 0)


def test_a_tick_moves_the_plan_by_one_stage_unless_it_was_moved():
    mpc = controller()
    _, state = mpc(X, mpc.init(X, US))
    later = mpc.shift(state)
    same(later.us, jnp.concatenate([state.us[1:], state.us[-1:]]))
    same(later.xs, jnp.concatenate([state.xs[1:], state.xs[-1:]]))
    same(later.K, jnp.concatenate([state.K[1:], state.K[-1:]]))
    x = state.xs[1]
    same(mpc(x, later), mpc(x, state))
    same(mpc.shift(state, T).us, jnp.broadcast_to(state.us[-1], (T, 1)))
    same(mpc.shift(later, 0).us, later.us)


def test_repeated_ticks_at_one_stage_reach_the_solution():
    mpc = controller()
    state = mpc.init(X, US)
    for _ in range(30):
        u, state = mpc(X, mpc.shift(state, 0))
    same(state.us, best().us, 1e-5, 1e-5)
    assert state.result == dp.RESULTS.successful
    again = mpc(X, mpc.shift(state, 0))[1]
    same(again.us, state.us, 1e-9, 1e-9)


def test_a_reference_that_moves_is_numbers_of_another_problem(caplog):
    class Follow(helpers.Pendulum):
        goal: float | jax.Array = 0.0

        def cost(self, x, u, t):
            return (x[0] - self.goal) ** 2 + 0.01 * u[0] ** 2

        def terminal_cost(self, x):
            return 10 * (x[0] - self.goal) ** 2 + x[1] ** 2

    make = lambda goal: dp.ControlProblem.from_system(
        Follow(goal=jnp.asarray(goal)), T, (jnp.full(1, -9.0), jnp.full(1, 9.0))
    )
    mpc = dp.MPC(make(0.0), dp.ILQR())
    x = jnp.zeros(2)
    state = mpc.init(x, US)
    problems = [make(0.01 * k) for k in range(100)]
    u, state = mpc(x, state, problems[0])
    with jax.log_compiles():
        for problem in problems:
            u, state = mpc(x, state, problem)
            x = state.xs[1]
    messages = [record.getMessage() for record in caplog.records]
    assert not [m for m in messages if "Compiling" in m and "jitted" in m]
    assert 0.7 < state.xs[-1, 0] < 0.99


# Loops ----------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("search", ["Backtracking", "FixedStep"])
def test_simulate_scan_and_the_loop_of_python_agree(search):
    mpc = controller(search)
    state = mpc.init(X, US)
    states, controls, last = ticks(mpc, state, X, STEPS)
    found = dp.simulate(mpc, plant, X, STEPS)
    same((found.xs, found.us), (states, controls), 1e-9, 1e-9)
    same(found.state, last, 1e-9, 1e-9)

    @jax.jit
    def scanned(x, state):
        def tick(carry, t):
            x, state = carry
            u, state = mpc(x, state)
            return (plant(x, u, t), state), u

        return jax.lax.scan(tick, (x, state), jnp.arange(STEPS))

    (_, last), us = scanned(X, state)
    same(us, controls, 1e-9, 1e-9)
    same(found.state, last, 1e-9, 1e-9)
    assert np.all(np.abs(controls) <= MOST) and np.any(np.abs(controls) == MOST)


def test_a_run_goes_on_from_a_file_bit_for_bit(tmp_path):
    mpc = controller()
    states, _, state = ticks(mpc, mpc.init(X, US), X, 2)
    dp.save(tmp_path / "run", state)
    loaded = dp.load(tmp_path / "run", mpc.init(X, US))
    same(loaded, state, 0, 0)
    for a, b in zip(
        ticks(mpc, state, states[-1], 2), ticks(mpc, loaded, states[-1], 2)
    ):
        same(a, b, 0, 0)


def test_many_robots_are_each_alone():
    starts = jnp.array([[2.9, 0.0], [2.9, -1.0], [3.0, 0.5]])
    limits = jnp.array([3.0, 4.0, 2.0])
    mpc = controller()

    def run(x0, most):
        robot = dp.MPC(pendulum(most=most), dp.ILQR(), 2)
        return dp.simulate(robot, plant, x0, STEPS)

    many = jax.vmap(run)(starts, limits)
    for i in range(3):
        one = run(starts[i], limits[i])
        same((many.xs[i], many.us[i]), (one.xs, one.us), 1e-9, 1e-9)
        assert np.all(np.abs(many.us[i]) <= limits[i])
    states = jax.vmap(lambda x: mpc.init(x, US))(starts)
    us, states = jax.vmap(mpc)(starts, states)
    same(us[1], mpc(starts[1], mpc.init(starts[1], US))[0], 1e-9, 1e-9)
    with pytest.raises(ValueError, match=r"batch of shape \(3,\)"):
        mpc(starts[0], states)


def test_robots_may_be_split_over_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("robots",))
    run = jax.vmap(lambda x0: dp.simulate(controller(), plant, x0, STEPS).xs)
    spec = jax.sharding.PartitionSpec("robots")
    split = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    starts = jnp.stack([X, X - 0.1])
    alone = [simulated(tuple(x)).xs for x in starts.tolist()]
    same(split(starts), jnp.stack(alone), 1e-9, 1e-9)


def test_float32():
    problem = pendulum(jnp.float32)
    mpc = dp.MPC(problem, dp.ILQR(), 2)
    x = X.astype(jnp.float32)
    found = dp.simulate(mpc, plant, x, STEPS)
    assert {a.dtype.name for a in jtu.tree_leaves((found.xs, found.us))} == {"float32"}
    assert np.all(np.abs(found.us) <= np.float32(MOST))
    same(found.xs, simulated().xs, 1e-3, 1e-3)
    with pytest.raises(TypeError, match="`x` is float64 and `state"):
        mpc(X, found.state)


def test_noise_is_measured_and_not_that_of_the_plant():
    mpc = controller()
    key = jr.key(3)
    run = lambda noise, key=key: dp.simulate(mpc, plant, X, STEPS, noise, key)
    quiet, noisy = run(jnp.zeros(2)), run(jnp.array([0.1, 0.2]))
    same(quiet.xs, simulated().xs)
    assert np.any(noisy.us != quiet.us)
    same(noisy.xs, run(jnp.array([0.1, 0.2])).xs)
    assert np.any(noisy.us != run(jnp.array([0.1, 0.2]), jr.key(4)).us)
    x = X
    for t in range(STEPS):
        same(noisy.xs[t], x)
        x = moved(x, noisy.us[t], t)


def test_states_on_a_manifold():
    wheel = dp.Manifold(
        lambda x, y: jnp.stack([jnp.sin(x[0] - y[0]), x[1] - y[1]]),
        lambda y, v: jnp.stack([y[0] + jnp.arcsin(v[0]), y[1] + v[1]]),
    )
    mpc = dp.MPC(pendulum(manifold=wheel), dp.ILQR())
    found = dp.simulate(mpc, plant, X, 5, 0.01, jr.key(0))
    states, controls, state = ticks(mpc, mpc.init(X, US), X, 5)
    assert state.policy._manifold is wheel
    turned = states[-1] + jnp.array([2 * jnp.pi, 0.0])
    same(state.policy(1, turned), state.policy(1, states[-1]))
    same(found.xs, states, 0.05, 0.05)


def test_ticks_from_states_close_their_gaps():
    mpc = controller()
    line = jnp.linspace(X, jnp.array([jnp.pi, 0.0]), T + 1)
    state = mpc.init(X, US, line)
    np.testing.assert_array_equal(state.xs, line)
    for _ in range(30):
        u, state = mpc(X, mpc.shift(state, 0))
    same(state.us, best().us, 1e-5, 1e-5)
    same(state.xs, dp.rollout(mpc.problem, X, state.us).xs)


# What goes wrong ------------------------------------------------------------------


def test_numbers_that_are_not_finite_leave_the_plan_of_before():
    mpc = controller()
    _, state = mpc(X, mpc.init(X, US))
    expected = mpc.shift(state)
    nan = jnp.array([jnp.nan, 0.0])
    spoiled = pendulum(friction=jnp.nan)
    crossed = eqx.tree_at(lambda p: p.bounds[0], mpc.problem, jnp.full(1, 3.0, float))
    wrong = dp.RESULTS.nonfinite_rollout
    for x, problem, result in (
        (nan, None, wrong),
        (X, spoiled, wrong),
        (jnp.full(2, jnp.inf, float), None, wrong),
        (X, crossed, dp.RESULTS.infeasible),
    ):
        u, after = mpc(x, state, problem)
        assert after.result == result and np.isnan(after.cost)
        same((u, after.us), (expected.us[0], expected.us))
        same(after.xs, expected.xs)
        u, again = mpc(state.xs[2], after)
        assert again.result == dp.RESULTS.max_steps_reached
        assert np.isfinite(again.cost) and np.all(np.isfinite(u))


def test_a_plan_that_leaves_the_domain_begins_anew():
    def dynamics(x, u, t):
        return x + 0.1 * u

    def cost(x, u, t):
        return (x[0] - 3) ** 2 - 1e-3 * jnp.log(x[0]) + 1e-6 * u[0] ** 2

    limit = jnp.full(1, 5.0)
    problem = dp.ControlProblem(
        dynamics, cost, lambda x: (x[0] - 0.1) ** 2 - 1e-3 * jnp.log(x[0]), 6,
        (-limit, limit),
    )  # fmt: skip
    mpc = dp.MPC(problem, dp.ILQR(), 3)
    found = dp.simulate(mpc, lambda x, u, t: dynamics(x, u, t), jnp.ones(1), 20)
    assert np.all(np.isfinite(found.costs))
    start = mpc.init(jnp.ones(1), jnp.full((6, 1), -5.0))  # leaves the domain
    assert start.result == dp.RESULTS.nonfinite_rollout
    _, state = mpc(jnp.ones(1), start)
    assert np.isfinite(state.cost)


def test_new_limits_hold_at_once():
    mpc = controller()
    _, state = mpc(X, mpc.init(X, US))
    tighter = pendulum(most=0.5)
    u, state = mpc(X, state, tighter)
    assert np.all(np.abs(state.us) <= 0.5) and np.any(np.abs(state.us) == 0.5)
    assert abs(float(state.policy(0, X + 5.0)[0])) <= 0.5


# Constraints ----------------------------------------------------------------------


def test_a_moved_start_nearly_keeps_constraints_in_one_tick():
    problem, _, us = constrained.car()
    x0, limit = jnp.array([0.0, 0.0, 0.1, 0.2]), np.array([0.5, 1.5])
    cold = dp.solve(problem, dp.ILQR(), x0, us)
    mpc = dp.MPC(problem, dp.ILQR(), 5)
    start = mpc.init(x0, cold.us, state=cold.state)
    rng, xs = np.random.default_rng(0), []
    for _ in range(10):
        x = x0 * jnp.asarray(1 + 0.03 * rng.normal(size=4))
        u, state = mpc(x, start)
        assert state.violation <= 2e-2
        assert np.all(np.abs(state.us) <= limit)
        xs.append((x, state))
    x, state = xs[0]
    for _ in range(15):
        _, state = mpc(x, mpc.shift(state, 0))
    best = dp.solve(problem, dp.ILQR(), x, us)
    assert state.violation <= 1e-6
    same(state.us, best.us, 1e-4, 1e-4)
    later = mpc.shift(state, 2)
    for name, rows in state.multipliers.constraints.items():
        kept = later.multipliers.constraints[name]
        same(kept, jnp.concatenate([rows[2:], rows[-1:], rows[-1:]]))
    same(later.multipliers.terminal, state.multipliers.terminal)
    same(later.penalty, state.penalty)


def test_constraints_of_now_are_not_held_against_a_controller():
    def wall(x, u, t):
        return x[0] - 1.0

    limit = jnp.full(1, 2.0)
    problem = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * u,
        lambda x, u, t: (x[0] - 2) ** 2 + 0.01 * u[0] ** 2,
        lambda x: (x[0] - 2) ** 2,
        10,
        (-limit, limit),
        dp.Inequality(wall, name="wall"),
        dp.Inequality(lambda x: x - 1.0, name="end"),
    )
    mpc = dp.MPC(problem, dp.ILQR(), 4)
    step = lambda x, u, t: problem.dynamics(x, u, t)
    found = dp.simulate(mpc, step, jnp.full(1, 1.15), 30)
    same(found.xs[-1], 1.0, 1e-3, 1e-3)
    assert found.state.violation < 1e-3
    assert np.all(found.state.penalty <= 1e3)


# The race -------------------------------------------------------------------------


def race():
    """As control.md 5.8 has it, with limits in place of squashing."""
    return systems.Race.miniature(systems.Track.simple(), squashed=False)


@pytest.mark.parametrize("iterations", [pytest.param(10, marks=pytest.mark.slow), 1])
def test_a_race_car_stays_near_the_middle_of_the_track(iterations, caplog):
    car = race()
    problem = dp.ControlProblem.from_system(car, 40)
    mpc = dp.MPC(problem, dp.ILQR(), iterations)
    move = lambda x, u, t: car.dynamics(x, u, t)
    drive = lambda x0: dp.simulate(mpc, move, x0, 200)
    found = drive(car.x0)
    lower, upper = map(np.asarray, car.control_bounds or ())
    us = np.asarray(found.us)
    assert np.all((lower <= us) & (us <= upper))
    errors = jax.jit(jax.vmap(car.lateral_error))(found.xs)
    assert np.max(np.abs(errors)) < 0.05
    assert np.all(np.isfinite(found.costs))
    assert found.xs[-1, -2] > (1 if iterations == 10 else 0.9) * car.track.length
    with jax.log_compiles():
        drive(car.x0 + 1e-3)
    messages = [record.getMessage() for record in caplog.records]
    assert not [m for m in messages if "Compiling" in m and "jitted" in m]


# Wrong calls ----------------------------------------------------------------------


def test_wrong_calls_of_a_controller_say_so(unchecked):
    problem, mpc = pendulum(), controller()
    state = mpc.init(X, US)
    longer = dp.ControlProblem.from_system(helpers.Pendulum(), 9)
    bare = dp.ControlProblem.from_system(helpers.Pendulum(), T)
    number = dp.ControlProblem.from_system(helpers.Pendulum(), T, (-1.0, 1.0))
    with pytest.raises(ValueError, match="`iterations` is 0; a Python int >= 1"):
        dp.MPC(problem, dp.ILQR(), iterations=0)
    with pytest.raises(TypeError, match=r"`method` is .*; something like `dp.ILQR"):
        dp.MPC(problem, "ilqr")  # pyright: ignore
    with pytest.raises(TypeError, match="`problem` is .*ControlProblem"):
        dp.MPC(helpers.two_phase()[0], dp.ILQR())  # pyright: ignore
    with pytest.raises(ValueError, match=r"`x` has the shapes \(3,\); .*\(2,\)"):
        mpc(jnp.zeros(3), state)
    with pytest.raises(ValueError, match="a plan of 15 stages, and the problem has 9"):
        mpc(X, state, longer)
    for limited in (bare, number):
        with pytest.raises(ValueError, match="`us` is not given, and `control_bounds`"):
            dp.MPC(limited, dp.ILQR()).init(X)
    for by in (-1, T + 1, 1.0, True):
        with pytest.raises(ValueError, match="`by` is .* a Python int from 0 to 15"):
            mpc.shift(state, by)  # pyright: ignore
    with pytest.raises(TypeError, match="`state` is None; .* `controller.init"):
        mpc(X, None)  # pyright: ignore
    other, x0, us = constrained.unicycle()
    rows = dp.MPC(other, dp.ILQR())
    begun = rows.init(x0, us)
    free = eqx.tree_at(lambda p: p.constraints, other, ())
    with pytest.raises(ValueError, match="`state` is that of other constraints"):
        rows(x0, begun, free)
    with pytest.raises(NotImplementedError, match="[Dd]erivatives"):
        jax.eval_shape(jax.grad(lambda x: jnp.sum(mpc(x, state)[0])), X)
    with pytest.raises(TypeError, match="holds arrays, .*`jax.jit` cannot take it for"):
        jax.jit(mpc)(X, state)
    with pytest.raises(
        TypeError, match="^`MPC` takes no `t`: the plan begins with t ="
    ):
        mpc(X, state, t=3)  # pyright: ignore


def test_a_controller_without_arrays_is_a_function_for_jit():
    bare = dp.MPC(dp.ControlProblem.from_system(helpers.Pendulum(), T), dp.ILQR())
    state = bare.init(X, jnp.zeros((T, 1)))
    u, _ = jax.jit(bare)(X, state)
    np.testing.assert_allclose(u, bare(X, state)[0], rtol=1e-9)


def test_wrong_calls_of_simulate_say_so(unchecked):
    mpc = controller()
    with pytest.raises(ValueError, match=r"`plant` returned .*\(3,\).*`x0`, \(2,\)"):
        dp.simulate(mpc, lambda x, u, t: jnp.zeros(3), X, 2)
    with pytest.raises(ValueError, match="`noise` needs a `key`"):
        dp.simulate(mpc, plant, X, 2, 0.1)
    with pytest.raises(ValueError, match="`noise` is arranged as"):
        dp.simulate(mpc, plant, X, 2, dict(a=0.1), jr.key(0))
    with pytest.raises(ValueError, match="`steps` is 0"):
        dp.simulate(mpc, plant, X, 0)
    with pytest.raises(TypeError, match="`plant` is 3"):
        dp.simulate(mpc, 3, X, 2)  # pyright: ignore
    with pytest.raises(TypeError, match="`controller` is .*dp.MPC"):
        dp.simulate(mpc.problem, plant, X, 2)  # pyright: ignore


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((jnp.array([-1.0, 0.5]), jnp.array([3.0, jnp.inf])), [1.0, 0.5]),
        ((-2.0, jnp.array([-1.0, 1.0])), [-1.5, -0.5]),
        ((None, jnp.array([-1.0, 1.0])), [-1.0, 0.0]),
        ((jnp.zeros((4, 2)), jnp.ones(2)), [0.5, 0.5]),
    ],
)
def test_controls_that_are_left_out_lie_between_their_limits(bounds, expected):
    problem = dp.ControlProblem(
        lambda x, u, t: x + u, lambda x, u, t: u @ u + x @ x, lambda x: x @ x, 4, bounds
    )
    state = dp.MPC(problem, dp.ILQR()).init(jnp.zeros(2))
    np.testing.assert_array_equal(state.us, np.broadcast_to(expected, (4, 2)))
