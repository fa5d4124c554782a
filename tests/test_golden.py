"""Published numbers and exact identities of control problems.

The tables of iterates come from independent implementations of Roulet, Srinivasa,
Fazel, Harchaoui, "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
arXiv 2207.06362. There "dir" is a line search along one direction and "reg" searches
over the damping; see `environments` for both.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._chain.vector import run
from diffprog._chain.vectorize import vectorize

from . import environments as env, helpers


METHODS = {
    "gd": dp.Gradient(),
    "gn": dp.GaussNewton(),
    "ne": dp.Newton(),
    "ddp_lq": dp.ILQR(),
    "ddp_q": dp.DDP(),
}


def searches(mode: str) -> env.Either:
    """Line search ("dir") or search over the damping ("reg")."""
    published = env.PublishedDirectional()
    return env.Either(published, dp.AdaptiveDamping(), jnp.asarray(mode == "dir"))


def run_long(problem, method, x0, us, search):
    """To machine precision, or 120 iterations."""
    return dp.solve(
        problem,
        method,
        x0,
        us,
        search,
        max_steps=120,
        rtol=0.0,
        atol=0.0,
        throw=False,
    )


@ft.cache
def pendulum_solution(method: str, mode: str, T: int = 50) -> dp.Solution:
    search = env.PublishedGradient() if method == "gd" else searches(mode)
    problem, x0, us = env.pendulum(T)
    return run_long(problem, METHODS[method], x0, us, search)


@ft.cache
def cart_pole_solution(method, mode, as_run: bool, weight: float) -> dp.Solution:
    problem, x0, us = env.cart_pole(control_weight=weight, as_run=as_run)
    return run_long(problem, METHODS[method], x0, us, searches(mode))


@ft.cache
def bicycle_solution() -> dp.Solution:
    problem, x0, us = env.bicycle_car(50)
    search = dp.AdaptiveDamping()
    return dp.solve(
        problem, dp.ILQR(), x0, us, search, max_steps=3, rtol=0.0, atol=0.0, throw=False
    )


def costs(solution: dp.Solution) -> np.ndarray:
    assert solution.history is not None
    return np.asarray(solution.history["cost"])


def first(solution: dp.Solution, name: str) -> float:
    assert solution.history is not None
    return float(solution.history[name][0])


def matches(actual, desired, rtol):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=0)


@eqx.filter_jit
def objective_and_gradient(problem, x0, us):
    return jax.value_and_grad(lambda us: dp.rollout(problem, x0, us).cost)(us)


# Directions against dense linear algebra.

SMALL = {  # T = 25 for all
    "pendulum": lambda: env.pendulum(25),
    "cart_pole": lambda: env.cart_pole(25, control_weight=1e-2),
    "bicycle": lambda: env.bicycle_car(25, euler=True),
}


@eqx.filter_jit
def dense(problem, x0, us):
    """Gradient of the objective, Hessian of its Gauss-Newton model, and its Hessian."""

    def trajectory(u):
        controls = u.reshape(us.shape)
        return ravel_pytree((dp.rollout(problem, x0, controls).xs, controls))[0]

    _, unravel = ravel_pytree((jnp.zeros((len(us) + 1, *x0.shape)), us))

    def total(rows):
        xs, us = unravel(rows)
        ts = jnp.arange(len(us), dtype=jnp.int32)
        stages = jax.vmap(problem.cost)(xs[:-1], us, ts)
        return jnp.sum(stages) + problem.terminal_cost(xs[-1])

    d = helpers.dense(trajectory, total, us.ravel())
    hessian = jax.hessian(lambda u: total(trajectory(u)))(us.ravel())
    return d.gradient, d.gauss_newton, hessian


@eqx.filter_jit
def one_step(problem, method, x0, us, stepsize, damping):
    """v of one step, and the slope of the objective along v."""
    vectorized = vectorize(problem, x0, us)
    chain = vectorized.chain
    trajectory = run(chain, *vectorized.ravel(x0, us))
    model = method.expand(chain, trajectory).model
    sweep = method.backward(chain, trajectory, model, damping)
    _, (v,) = method.forward(chain, trajectory, model, sweep, stepsize)
    return v, sweep.slope


@pytest.mark.costly
@pytest.mark.parametrize("method", ["gn", "ne"])
@pytest.mark.parametrize("name", SMALL)
def test_direction_is_the_dense_solve(name, method):
    problem, x0, us = SMALL[name]()
    us = us + 0.3 * np.random.default_rng(0).standard_normal(us.shape)
    gradient, gauss_newton, hessian = map(np.asarray, dense(problem, x0, us))
    hessian = gauss_newton if method == "gn" else hessian
    damping = max(1.0, 1.0 - 2 * float(np.linalg.eigvalsh(hessian)[0]))
    expected = np.asarray(helpers.damped_step(hessian, gradient, damping))
    numbers = jnp.asarray(1.0), jnp.asarray(damping)
    v, slope = one_step(problem, METHODS[method], x0, us, *numbers)
    error = np.linalg.norm(v.ravel() - expected)
    assert error <= 1e-10 * np.linalg.norm(expected)
    # The least value of the model, s_0, is half the slope.
    matches(float(slope), gradient @ expected, 1e-10)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["gn", "ne"])
def test_a_direction_alone_is_that_of_a_step(method):
    problem, x0, us = SMALL["pendulum"]()
    us = us + 0.3
    v, _ = dp.direction(problem, METHODS[method], x0, us, damping=0.5)
    numbers = jnp.asarray(1.0), jnp.asarray(0.5)
    same, _ = one_step(problem, METHODS[method], x0, us, *numbers)
    np.testing.assert_allclose(v, same, rtol=1e-12, atol=0)


def test_ilqr_has_the_slope_of_gauss_newton():
    problem, x0, us = env.pendulum(25)
    gradient, hessian, _ = map(np.asarray, dense(problem, x0, us))
    solution = pendulum_solution("ddp_lq", "reg", 25)
    damped = hessian + first(solution, "damping") * np.eye(us.size)
    expected = -gradient @ np.linalg.solve(damped, gradient)
    matches(first(solution, "slope"), expected, 1e-10)


# Linear-quadratic problems.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gn", "ne", "ddp_lq", "ddp_q"])
def test_one_step_solves_a_linear_quadratic_problem(method):
    lqr, x0 = env.golden_lqr(1.0)
    problem = dp.ControlProblem.from_system(env.LinearQuadratic(lqr), 32)
    us = jr.normal(jr.key(1), (32, 2))
    exact = dp.solve_lqr(lqr, x0)
    solution = dp.solve(problem, METHODS[method], x0, us)
    assert int(solution.stats["num_steps"]) == 1
    assert first(solution, "stepsize") == 1
    assert first(solution, "trials") == 1
    np.testing.assert_allclose(solution.us, exact.us, rtol=0, atol=1e-12)
    np.testing.assert_allclose(solution.xs, exact.xs, rtol=0, atol=1e-12)
    # Not relative: some entries are close to 0.
    np.testing.assert_allclose(solution.policy.K, exact.policy.K, rtol=0, atol=1e-13)
    before, gradient_before = objective_and_gradient(problem, x0, us)
    after, gradient = objective_and_gradient(problem, x0, solution.us)
    assert abs(float(after - exact.cost)) <= 1e-12 * float(before)
    assert float(after) == pytest.approx(float(solution.cost), rel=0, abs=1e-12)
    # The whole decrease is predicted: the slope is twice as steep.
    matches(float(after - before), first(solution, "slope") / 2, 1e-12)
    scale = float(jnp.linalg.norm(gradient_before))
    assert float(jnp.linalg.norm(gradient)) <= 1e-12 * scale


# Limits.


@pytest.mark.costly
@pytest.mark.parametrize("name", ["pendulum", "cart_pole"])
def test_feedback_rollout_leaves_the_linear_one_at_second_order(name):
    problem, x0, us = SMALL[name]()
    us = us + 0.3
    ratios = []
    for stepsize in (1e-2, 1e-3, 1e-4):
        numbers = jnp.asarray(stepsize), jnp.asarray(1.0)
        v, slope = one_step(problem, dp.ILQR(), x0, us, *numbers)
        linear, same = one_step(problem, dp.GaussNewton(), x0, us, *numbers)
        ratios.append(np.linalg.norm(v - linear) / stepsize**2)
        matches(slope, same, 1e-14)
    assert ratios[0] > 0
    matches(ratios, ratios[1], 1e-2)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["gn", "ne", "ddp_lq", "ddp_q"])
def test_large_damping_gives_the_gradient(method):
    problem, x0, us = SMALL["pendulum"]()
    us = us + 0.3
    gradient, *_ = dense(problem, x0, us)
    v, _ = dp.direction(problem, METHODS[method], x0, us, damping=1e10)
    error = jnp.linalg.norm(1e10 * v[:, 0] + gradient)
    assert float(error) <= 1e-10 * float(jnp.linalg.norm(gradient))


class OneStage(eqx.Module):
    """Stationary points of this problem need not minimize the Hamiltonian."""

    def dynamics(self, x, u, t):
        return jnp.cos(jnp.exp(u))

    def cost(self, x, u, t):
        return jnp.sum(u**2) / 2

    def terminal_cost(self, x):
        return jnp.sum(x**2) / 2


@pytest.mark.parametrize("method", ["gn", "ne", "ddp_lq", "ddp_q"])
def test_one_stage_of_scalars_by_hand(method):
    problem = dp.ControlProblem.from_system(OneStage(), 1)
    u, x0 = 0.2, jnp.zeros(1)
    v, _ = dp.direction(problem, METHODS[method], x0, jnp.full((1, 1), u), damping=2.0)
    f, df = np.cos(np.exp(u)), -np.exp(u) * np.sin(np.exp(u))
    ddf = df - np.exp(2 * u) * np.cos(np.exp(u))
    curvature = f * ddf if method in ("ne", "ddp_q") else 0.0
    assert v.shape == (1, 1)
    matches(float(v[0, 0]), -(u + f * df) / (1 + df**2 + curvature + 2.0), 1e-14)


# Pendulum.

PENDULUM = {
    ("gd", "gd"): (8.059562, 2.8182505, 1.1832967, 0.7874241, 0.68305459, 0.24387041),
    ("gn", "dir"): (
        1.7184752, 0.70107519, 0.42161431, 0.24322243, 0.11902118, 0.0013697186,
    ),
    ("gn", "reg"): (
        1.7038438, 0.7820382, 0.23618706, 0.066389676, 0.009865176, 0.0014459519,
    ),
    ("ddp_lq", "dir"): (
        0.16797313, 0.0045867959, 0.0014910289, 0.0013788638, 0.0013694084,
        0.00136810475,
    ),
    ("ddp_lq", "reg"): (
        1.5616683, 0.4742767, 0.0021121704, 0.0014343936, 0.0013753507, 0.00136810683,
    ),
    ("ne", "dir"): (
        1.7184752, 0.050606711, 0.034958766, 0.030525378, 0.019778884, 0.0056945914,
    ),
    ("ne", "reg"): (
        1.7038438, 0.75493893, 0.10769513, 0.0039583959, 0.0030469532, 0.0022779264,
    ),
    ("ddp_q", "dir"): (
        0.16797313, 0.0056573684, 0.0018228827, 0.0014726848, 0.0013804028,
        0.0013681042028,
    ),
    ("ddp_q", "reg"): (
        1.5616683, 0.55844229, 0.020763102, 0.0016555095, 0.0014101329,
        0.0013681042028,
    ),
}  # fmt: skip


def pendulum_row(method: str, mode: str):
    solution = pendulum_solution(method, mode)
    matches(costs(solution)[[1, 2, 3, 4, 5, 10]], PENDULUM[method, mode], 1e-6)
    if method != "gd":
        matches(float(solution.cost), 0.0013681042028019, 1e-9)
    return solution


def test_pendulum_gradient_descent():
    solution = pendulum_row("gd", "gd")
    matches(float(solution.cost), 0.0042062733, 1e-6)
    assert int(solution.stats["num_steps"]) == 120


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["dir", "reg"])
@pytest.mark.parametrize("method", ["gn", "ddp_lq", "ne", "ddp_q"])
def test_pendulum_iterates(method, mode):
    pendulum_row(method, mode)


def test_first_step_of_the_pendulum():
    solution = pendulum_solution("ddp_lq", "reg")
    matches(costs(solution)[0], np.pi**2, 1e-14)
    matches(first(solution, "gradient"), 0.4868142624368118, 1e-12)
    # The damping of the first trial is the norm of the costs' gradient over 800.
    assert first(solution, "trials") == 1
    matches(first(solution, "damping"), 2 * np.pi / 800, 1e-12)


def test_pendulum_of_25_stages():
    solution = pendulum_solution("ddp_lq", "reg", 25)
    matches(first(solution, "gradient"), 0.8694175390947745, 1e-12)
    matches(costs(solution)[1:4], (1.1713031, 0.056867666, 0.00087588187), 1e-6)
    matches(float(solution.cost), 0.000553434330240649, 1e-9)


def test_pendulum_of_100_stages():
    solution = pendulum_solution("ddp_lq", "reg", 100)
    matches(first(solution, "gradient"), 0.30873751931863846, 1e-12)
    matches(costs(solution)[1:4], (3.5932609, 0.89400699, 0.011817902), 1e-6)
    matches(float(solution.cost), 0.003021283935143879, 1e-9)


def test_pendulum_that_must_stay_put():
    problem, x0, us = env.pendulum(40, dt=0.05, stay_put=1.0)
    matches(float(dp.rollout(problem, x0, us).cost), 207.26169242287656, 1e-14)


# Cart-pole.

CART_POLE_AS_RUN = {
    ("ddp_lq", "dir"): (
        17.374034, 2.465376, 0.48028313, 0.093976653, 0.018182586, 7.7006444e-5,
    ),
    ("ddp_lq", "reg"): (
        11.045069, 3.3417733, 0.61109131, 0.10769208, 0.020413741, 7.7087492e-5,
    ),
    ("ddp_q", "dir"): (17.374034, 2.4700708, 0.48032237, 0.09419113, 0.018407467),
    ("ddp_q", "reg"): (11.045069, 3.3948129, 0.62914436, 0.10714013, 0.020459172),
}  # fmt: skip


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["dir", "reg"])
@pytest.mark.parametrize("method", ["ddp_lq", "ddp_q"])
def test_cart_pole_as_run(method, mode):
    solution = cart_pole_solution(method, mode, True, 1e-6)
    matches(costs(solution)[0], 118.43525281307232, 1e-14)
    matches(first(solution, "gradient"), 27093.82153519146, 1e-12)
    row = CART_POLE_AS_RUN[method, mode]
    matches(costs(solution)[[1, 2, 3, 4, 5, 10][: len(row)]], row, 1e-6)
    matches(float(solution.cost), 7.641703903695675e-05, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dir", "reg"])
@pytest.mark.parametrize("method", ["ddp_lq", "ddp_q"])
def test_cart_pole_with_the_intended_physics(method, mode):
    solution = cart_pole_solution(method, mode, False, 1e-2)
    matches(costs(solution)[0], 118.43525281307232, 1e-14)
    matches(first(solution, "gradient"), 25.496256398778822, 1e-12)
    matches(float(solution.cost), 0.825426504794, 1e-9)
    # Iterations that converge linearly end where rounding hides the decrease, at half
    # the digits; one step of second order finds the others.
    problem, x0, _ = env.cart_pole(control_weight=1e-2)
    du, _ = dp.direction(problem, dp.DDP(), x0, solution.us)
    last = dp.rollout(problem, x0, solution.us + du).xs[-1, 1]
    matches(float(last), -3.12179044220, 1e-9)
    matches(float(solution.xs[-1, 1]), float(last), 1e-8)


@pytest.mark.slow
def test_cart_pole_with_the_intended_physics_first_iterates():
    row = (65.595119, 62.661847, 59.372941)
    matches(costs(cart_pole_solution("ddp_lq", "reg", False, 1e-2))[1:4], row, 1e-6)
    row = (65.595119, 60.116161, 50.695906, 37.716722, 25.966832)
    iterates = costs(cart_pole_solution("ddp_q", "reg", False, 1e-2))
    matches(iterates[1:6], row, 1e-6)
    matches(iterates[10], 1.8362111, 1e-6)


@pytest.mark.parametrize("T, penalized", [(25, 6), (50, 12), (100, 24)])
def test_cart_pole_penalized_states(T, penalized):
    problem, x0, us = env.cart_pole(T)
    matches(float(dp.rollout(problem, x0, us).cost), penalized * np.pi**2, 1e-14)


# Cars. The published tracks were sampled in single precision; those
# built from formulas change the values by up to 5e-6.


def test_simple_car_iterates():
    problem, x0, us = env.simple_car()
    solution = run_long(problem, dp.ILQR(), x0, us, dp.AdaptiveDamping())
    matches(costs(solution)[0], 135.637731754472, 1e-7)
    matches(costs(solution)[0], 135.637730684638, 1e-12)  # with the tracks built here
    matches(first(solution, "gradient"), 36.78250335986215, 5e-6)
    row = (37.220803, 33.711135, 31.357338, 27.20506, 24.451183)
    matches(costs(solution)[1:6], row, 1e-5)
    matches(float(solution.cost), 0.0139423114388, 1e-9)


def test_simple_car_with_a_shorter_step():
    cost = float(dp.rollout(*env.simple_car(50, dt=0.02)).cost)
    matches(cost, 42.43323585788858, 1e-7)


@pytest.mark.slow
def test_bicycle_car_iterates():
    solution = bicycle_solution()
    matches(costs(solution)[0], 70.76124484050904, 1e-7)
    matches(costs(solution)[0], 70.76124513574868, 1e-12)  # with the tracks built here
    matches(first(solution, "gradient"), 209.51137713269233, 1e-5)
    matches(costs(solution)[1:4], (15.622765, 0.52927913, 0.019116174), 1e-5)


@pytest.mark.slow
def test_bicycle_car_of_100_stages():
    problem, x0, us = env.bicycle_car(100)
    search = dp.AdaptiveDamping()
    solution = dp.solve(problem, dp.ILQR(), x0, us, search, max_steps=3, throw=False)
    matches(first(solution, "gradient"), 284.610872432183, 1e-5)
    matches(costs(solution)[1:4], (24.162663, 0.94817669, 0.093643948), 1e-5)


def test_bicycle_car_of_25_stages():
    cost = float(dp.rollout(*env.bicycle_car(25)).cost)
    matches(cost, 39.33518769152664, 1e-7)
    matches(cost, 39.33518788490791, 1e-12)  # with the tracks built here


def test_bicycle_car_with_the_exponent_of_the_stored_runs():
    cost = float(dp.rollout(*env.bicycle_car(25, exponent=2)).cost)
    matches(cost, 85.8882262591, 1e-7)


def test_one_step_of_the_simple_car():
    system = env.simple_car()[0].system
    x = jnp.array([0.1, -0.02, 0.3, 1.2, 0.05, 1.1])
    u = jnp.array([0.5, 0.4, 0.2])
    new = eqx.filter_jit(system.dynamics)(x, u, 0)
    expected = (
        0.1458561514780291, -0.005815030080255704, 0.43826979604459304, 1.22, 0.094,
        1.108,
    )  # fmt: skip
    matches(new, expected, 1e-11)


def test_one_step_of_the_bicycle_car_and_its_costs():
    system = env.bicycle_car(50)[0].system
    x = jnp.array([0.1, -0.02, 0.3, 1.2, 0.1, 0.5, 0.05, 1.1])
    u = jnp.array([0.5, 0.4, 0.2])
    new = eqx.filter_jit(system.dynamics)(x, u, 0)
    expected = (
        0.12280260042304102, -0.010619798299939942, 0.3335945121526912,
        1.259155270582321, 0.08291342802454757, 2.6030832956349412, 0.07204, 1.104,
    )  # fmt: skip
    matches(new, expected, 1e-11)
    matches(float(system.control_cost(u)), 4.5e-7, 1e-11)
    cost = eqx.filter_jit(system.terminal_cost)(x)
    matches(float(cost), 0.025184305791417304, 1e-6)


def test_spline_spot_values():
    track = env.track()
    at_1, slope_1 = track(jnp.asarray(1.0))
    at_2, slope_2 = track(jnp.asarray(2.5))
    expected = (
        0.869588854585, 0.253467047313, 0.686183603637, 0.27495069319, 1.052994105547,
        0.231983401435,
    )  # fmt: skip
    close = ft.partial(helpers.close, rtol=1e-6, scale=1.0)
    close(at_1, expected)
    close(at_2[:2], (0.160607475254, 1.132054237812))
    close(slope_1[:2], (0.12694478, 0.99354138))
    close(slope_2[:2], (-0.89561471, -0.44766442))
    close(track.knots[-1], 5.64252, rtol=5e-6)


@pytest.mark.parametrize(
    "name, length",
    [("line", 0.69767), ("bend", 1.03800), ("circle", 1.82620), ("simple", 5.64252)],
)
def test_lengths_of_tracks(name, length):
    track = env.track(name)
    assert abs(float(track.knots[-1]) - length) <= 5e-6
    # Closed tracks begin again, open ones stay at their end.
    same = 0.1 * length if track.closed else track.knots[-1]
    beyond, _ = track(1.1 * track.knots[-1])
    np.testing.assert_allclose(beyond, track(jnp.asarray(same))[0], rtol=0, atol=1e-5)


def test_gradient_of_the_border_reaches_the_position():
    system = env.bicycle_car(50)[0].system
    grad = jax.jit(jax.value_and_grad(lambda x: system.barrier(x)))
    x = jnp.array([0.1, 0.2, 0.0, 1.0, 0.0, 0.0, 0.1, 1.0])  # left of the inner border
    penalty, gradient = grad(x)
    over = 0.2 - 0.185 + 0.0225
    matches(float(penalty), 100 * over**3, 1e-5)
    matches(float(gradient[1]), 300 * over**2, 1e-5)
    for i in (0, 1):
        step = jnp.zeros(8).at[i].set(1e-6)
        difference = (grad(x + step)[0] - grad(x - step)[0]) / 2e-6
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-6, atol=1e-8)


# Batches.


@pytest.mark.slow
def test_batch_of_64_equals_the_loop():
    pendulum, x0, us = env.pendulum(20)
    traces = []

    def dynamics(x, u, t):
        traces.append(None)
        return pendulum.dynamics(x, u, t)

    problem = dp.ControlProblem(dynamics, pendulum.cost, pendulum.terminal_cost, 20)
    x0s = x0[None] + 0.3 * jr.normal(jr.key(2), (64, 2))
    solve = lambda x0: dp.solve(problem, dp.ILQR(), x0, us, throw=False)
    singles = [solve(x0) for x0 in x0s]
    assert len(traces) == 1
    batch = jax.vmap(solve)(x0s)
    assert len(traces) == 1
    code = lambda solution: np.asarray(solution.result._value)
    np.testing.assert_array_equal(code(batch), [code(s) for s in singles])
    assert (batch.result == dp.RESULTS.successful).sum() > 32
    for name in ("num_steps", "num_rollouts", "num_backwards"):
        loop = [int(s.stats[name]) for s in singles]
        np.testing.assert_array_equal(batch.stats[name], loop)
        assert len(set(loop)) > 1
    matches(batch.cost, [s.cost for s in singles], 1e-12)
    scale = float(jnp.max(jnp.abs(batch.us)))
    error = jnp.abs(batch.us - jnp.stack([s.us for s in singles]))
    assert float(jnp.max(error)) <= 1e-12 * scale


# Two more problems with known optima.


def test_damped_pendulum_ilqr():
    problem, x0, us = helpers.pendulum()
    solution = dp.solve(problem, dp.ILQR(), x0, us, dp.Backtracking())
    assert abs(float(solution.cost) - 39.31168) <= 1e-5
    assert int(solution.stats["num_steps"]) <= 120


def test_quadrotor_ilqr():
    problem, x0, us = env.quadrotor()
    solution = dp.solve(problem, dp.ILQR(), x0, us, dp.Backtracking())
    assert abs(float(solution.cost) - 7.0807632) <= 1e-6
    assert int(solution.stats["num_steps"]) <= 15
