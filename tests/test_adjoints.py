"""Derivatives of solutions: against closed forms, differences and each other."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp

from . import constrained, helpers


TIGHT: Any = dict(rtol=1e-15, atol=1e-15)
PRECISE: Any = dict(outer=dp.AugmentedLagrangian(tol=1e-11), max_steps=500, **TIGHT)
MODES = dict(reverse=jax.jacrev, forward=jax.jacfwd)


def arrays(theta: dict):
    """Of one dtype for good: a weak one would be another program."""
    return {name: jnp.asarray(value, float) for name, value in theta.items()}


def differences(fn, theta: dict, step=1e-4):
    """Central ones, extrapolated: the error is of fourth order in the step."""

    def central(name, i, h):
        value = np.array(theta[name], float)
        sides = []
        for sign in (1, -1):
            new = value.copy()
            new.reshape(-1)[i] += sign * h
            sides.append(fn(theta | {name: jnp.asarray(new)}))
        return (sides[0] - sides[1]) / (2 * h)

    def of(name):
        size = np.size(theta[name])
        slope = lambda i: (4 * central(name, i, step) - central(name, i, 2 * step)) / 3
        slopes = np.stack([slope(i) for i in range(size)], -1)
        return slopes.reshape((*slopes.shape[:-1], *np.shape(theta[name])))

    return {name: of(name) for name in theta}


def assert_close(found: dict, expected: dict, rtol):
    scale = max(np.max(np.abs(value)) for value in expected.values())
    for name, value in expected.items():
        error = np.max(np.abs(np.asarray(found[name]) - np.asarray(value)))
        assert error <= rtol * (np.max(np.abs(value)) + 1e-3 * scale), name


def with_jacobian(fn):
    """One program for the values of `fn` and their derivatives."""
    return jax.jit(jax.jacrev(lambda theta: (fn(theta),) * 2, has_aux=True))


def weighted(solution: dp.Solution):
    """A number that depends on all states and controls."""
    return weighted_sum(jtu.tree_leaves((solution.xs, solution.us)))


@jax.jit
def weighted_sum(leaves):
    return sum(
        jnp.sum(jnp.cos(jnp.arange(a.size)).reshape(a.shape) * a) for a in leaves
    )


@jax.jit
def sum_of_squares(us):
    return jnp.sum(us**2)


# A published table: a pendulum that goes from pi to 0 in 25 stages.
GOLDEN = dict(
    g=2.98611321320624,
    friction=11.5709008883985,
    speed=-24.58147905651603,
    control=5733.517689072841,
    x0=np.array([-32.88307002484965, -3.385293802710698]),
)
# The same with the curvature of Gauss-Newton, which is wrong.
WITHOUT_CURVATURE = dict(g=4.2441, friction=13.7406, speed=-19.1111, control=3570.45)


class Golden(eqx.Module):
    g: jax.Array
    friction: jax.Array
    speed: jax.Array
    control: jax.Array

    def dynamics(self, x, u, t):
        change = self.g * jnp.sin(x[0]) - self.friction * x[1] + u[0]
        return x + 0.08 * jnp.stack([x[1], change])

    def cost(self, x, u, t):
        return self.control * u[0] ** 2 + 0.001 * jnp.sum(jnp.cos(x))

    def terminal_cost(self, x):
        return x[0] ** 2 + self.speed * x[1] ** 2


def golden(theta: dict):
    numbers = {name: theta[name] for name in list(GOLDEN)[:4]}
    return dp.ControlProblem.from_system(Golden(**numbers), 25)


def golden_solution(theta: dict, method=dp.Newton(), **options):
    options = TIGHT | options
    return dp.solve(golden(theta), method, theta["x0"], jnp.zeros((25, 1)), **options)


def golden_loss(theta: dict, method: Any = dp.Newton(), **options):
    solution = golden_solution(theta, method, **options)
    return golden_distance(solution.xs, solution.us)


@jax.jit
def golden_distance(xs, us):
    line = jnp.linspace(jnp.pi, 0, 26)
    return jnp.sum((xs[:, 0] - line) ** 2) + 0.01 * jnp.sum(us**2)


@jax.jit
def golden_distances(xs, us):
    return jnp.sum(jax.vmap(golden_distance)(xs, us))


def golden_theta():
    numbers = dict(g=10.0, friction=0.01, speed=0.1, control=1e-3)
    return arrays(numbers | dict(x0=jnp.array([jnp.pi, 0.0])))


@pytest.mark.costly
@pytest.mark.parametrize("method", helpers.SECOND_ORDER[1:], ids=helpers.name)
def test_published_derivatives(method):
    """The same from every method, and not those without second derivatives of f."""
    # ILQR ends where its steps gain no more than roundings.
    rtol = 1e-6 if isinstance(method, dp.ILQR) else 1e-8
    found = jax.jit(jax.grad(lambda theta: golden_loss(theta, method)))(golden_theta())
    assert_close(found, GOLDEN, rtol)
    for name, wrong in WITHOUT_CURVATURE.items():
        assert abs(found[name] / wrong - 1) > 0.1


def test_forward_equals_reverse():
    forward = jax.jit(jax.jacfwd(golden_loss))(golden_theta())
    assert_close(forward, jax.grad(golden_loss)(golden_theta()), 1e-10)


@pytest.mark.costly
@pytest.mark.parametrize("checkpoints", [None, 5])
def test_unrolled_derivatives_of_a_converged_solve_are_the_implicit_ones(checkpoints):
    adjoint = dp.UnrolledAdjoint(checkpoints)
    options: Any = dict(max_steps=30, adjoint=adjoint)
    found = jax.grad(lambda theta: golden_loss(theta, **options))(golden_theta())
    assert_close(found, GOLDEN, 1e-7)


def test_the_derivative_of_the_cost_is_that_of_the_lagrangian():
    theta = golden_theta()
    found = jax.grad(lambda theta: golden_solution(theta).cost)(theta)
    solution = golden_solution(theta)

    def along(theta):  # the costates weigh what a state differs from its dynamics
        problem, (xs, us) = golden(theta), (solution.xs, solution.us)
        lams = dp.costates(golden(golden_theta()), solution.xs[0], us)
        ts = jnp.arange(25)
        new = jax.vmap(problem.dynamics)(xs[:-1], us, ts)
        gaps = jnp.concatenate([theta["x0"][None], new]) - xs
        costs = jnp.sum(jax.vmap(problem.cost)(xs[:-1], us, ts))
        return costs + problem.terminal_cost(xs[-1]) + jnp.sum(lams * gaps)

    assert_close(found, jax.jit(jax.grad(along))(theta), 1e-10)


@pytest.mark.slow
def test_second_derivatives_of_the_cost():
    theta = golden_theta()
    cost = lambda x0: golden_solution(theta | dict(x0=x0)).cost
    hessian, x0 = jax.hessian(cost)(theta["x0"]), theta["x0"]
    slope, h = jax.jit(jax.grad(cost)), 1e-4
    rows = [(slope(x0 + h * e) - slope(x0 - h * e)) / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(hessian, np.stack(rows), atol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


class Pendulum(eqx.Module):
    weight: jax.Array
    last: jax.Array

    def dynamics(self, x, u, t):
        return x + 0.05 * jnp.stack([x[1], 5 * jnp.sin(x[0]) + u[0]])

    def cost(self, x, u, t):
        return 0.025 * (self.weight * u[0] ** 2 + jnp.sum(x**2))

    def terminal_cost(self, x):
        return self.last * jnp.sum(x**2)


def pendulum_problem(theta: dict):
    """Some of its 20 controls are at their limits."""
    system, most = Pendulum(theta["weight"], theta["last"]), theta["most"]
    return dp.ControlProblem.from_system(system, 20, (-most, 100 * most))


def pendulum(theta: dict):
    given = pendulum_problem(theta), dp.DDP(), theta["x0"], jnp.zeros((20, 1))
    return dp.solve(*given, **TIGHT, max_steps=500)


@with_jacobian
def pendulum_controls(theta: dict):
    return pendulum(theta).us


def pendulum_theta():
    numbers = dict(weight=0.1, last=1.0, most=6.0, x0=jnp.array([0.8, 0.3]))
    return arrays(numbers)


def test_limits_of_controls():
    theta = pendulum_theta()
    jacobians, us = pendulum_controls(theta)
    active = np.asarray(us == -6)
    assert 3 <= active.sum() <= 15
    expected = differences(lambda theta: pendulum_controls(theta)[1], theta)
    assert_close(jacobians, expected, 1e-6)
    # An active limit takes the control along, and nothing else moves it.
    np.testing.assert_array_equal(jacobians["most"][active], -1)
    for name in ("weight", "last"):
        np.testing.assert_array_equal(jacobians[name][active], 0)


@pytest.mark.slow
def test_a_limit_that_is_inactive_has_no_derivative():
    theta = pendulum_theta() | dict(most=jnp.asarray(60.0))
    found = jax.grad(lambda theta: weighted(pendulum(theta)))(theta)
    assert found["most"] == 0 and found["weight"] != 0


def mass(theta: dict, most=1.2):
    """Stops at a goal."""
    problem = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * jnp.stack([x[1] + 0.05 * u[0], u[0]]) * theta["gain"],
        lambda x, u, t: 0.05 * u[0] ** 2 + 0.01 * x[0] ** 4,
        lambda x: 0 * x[0],
        20,
        (-most, most),
        terminal_constraints=dp.Equality(lambda x: x - theta["goal"], name="stop"),
    )
    return dp.solve(problem, dp.DDP(), theta["x0"], jnp.zeros((20, 1)), **PRECISE)


def mass_theta():
    numbers = dict(gain=1.0, goal=jnp.array([0.1, 0.0]), x0=jnp.array([1.0, 0.0]))
    return arrays(numbers)


def test_constraints_at_the_end():
    @with_jacobian
    def fn(theta):
        solution = mass(theta)
        return jnp.stack([weighted(solution), solution.cost])

    theta = mass_theta()
    found, _ = fn(theta)
    assert_close(found, differences(lambda theta: fn(theta)[1], theta), 1e-5)


@pytest.mark.slow
def test_derivatives_of_multipliers():
    """Of the terminal constraint: minus the derivative of the cost in the goal."""
    theta = mass_theta()
    name = "stop"
    slope = jax.grad(lambda goal: mass(theta | dict(goal=goal)).cost)(theta["goal"])
    multiplier = lambda goal: mass(theta | dict(goal=goal)).multipliers.terminal[name]
    np.testing.assert_allclose(slope, -multiplier(theta["goal"]), atol=1e-7)
    second = jax.hessian(lambda goal: mass(theta | dict(goal=goal)).cost)(theta["goal"])
    np.testing.assert_allclose(
        jax.jacfwd(multiplier)(theta["goal"]), -second, atol=1e-5
    )


def driven(theta: dict, **kind):
    problem, x0, us = constrained.car(**kind, **theta)
    return dp.solve(problem, dp.DDP(), x0, us, **PRECISE)


@pytest.mark.slow
@pytest.mark.parametrize("kind, rtol", [({}, 1e-5), (dict(arrives=True), 1e-5)])
def test_a_car_between_obstacles(kind, rtol):
    """Radius, length, weight, steering limit, speed limit."""
    theta = arrays(constrained.CAR)
    fn = lambda theta: weighted(driven(theta, **kind))
    expected = differences(jax.jit(fn), theta, 1e-5)
    assert_close(jax.grad(fn)(theta), expected, rtol)


@pytest.mark.slow
def test_dependent_rows():
    theta = arrays(constrained.CAR)
    fn = lambda theta: weighted(driven(theta, arrives=True, twice=True))
    expected = differences(jax.jit(fn), theta, 1e-5)
    assert_close(jax.grad(fn)(theta), expected, 1e-4)


def quartic(theta, adjoint, max_steps=2):
    problem = dp.ControlProblem(
        lambda x, u, t: x, lambda x, u, t: (u[0] - theta) ** 4, lambda x: 0 * x[0], 1
    )
    options: Any = dict(max_steps=max_steps, adjoint=adjoint, throw=False)
    given = jnp.zeros(1), jnp.zeros((1, 1)), dp.FixedStep(0.01)
    return dp.solve(problem, dp.Gradient(), *given, **options).us[0, 0]


@pytest.mark.costly
@pytest.mark.parametrize("mode", MODES)
def test_an_unfinished_solve_has_no_implicit_derivative(mode):
    """Two steps of gradient descent, whose derivative is known."""
    derivative = MODES[mode](quartic)
    assert np.isnan(derivative(1.0, dp.ImplicitAdjoint()))
    np.testing.assert_allclose(derivative(1.0, dp.UnrolledAdjoint()), 0.217320960)


@pytest.mark.slow
def test_values_are_the_same_with_and_without_derivatives():
    theta = golden_theta()
    loss = lambda theta: golden_loss(theta, rtol=1e-5)
    value, _ = jax.value_and_grad(loss)(theta)
    assert value == loss(theta)


@pytest.mark.slow
def test_what_has_no_derivative_is_nan_and_spoils_nothing():
    theta = golden_theta()

    def answers(theta, which):
        solution = golden_solution(theta)
        known = dict(gains=solution.policy.K, steps=solution.history["cost"])
        return weighted(solution), jnp.sum(known[which][:2])

    for which in ("gains", "steps"):
        both = lambda theta, which=which: answers(theta, which)
        good = jax.grad(lambda theta: both(theta)[0])(theta)
        bad = jax.grad(lambda theta: both(theta)[1])(theta)
        assert all(np.all(np.isfinite(a)) for a in good.values())
        assert all(np.all(np.isnan(a)) for a in bad.values())


@pytest.mark.slow
def test_guesses_have_no_derivative():
    theta = golden_theta()

    def loss(us, damping):
        search = dp.Backtracking(damping_factor=damping)
        given = golden(theta), dp.Newton(), theta["x0"], us, search
        return weighted(dp.solve(*given, **TIGHT))

    for found in jax.grad(loss, (0, 1))(jnp.zeros((25, 1)), 2.0):
        np.testing.assert_array_equal(found, 0)


@pytest.mark.slow
def test_one_by_one_and_vectorized():
    theta = golden_theta()
    x0s = theta["x0"][None] + jnp.array([[0.0, 0.0], [0.05, 0.1], [-0.1, 0.0]])
    slope = jax.grad(lambda x0: golden_loss(theta | dict(x0=x0)))
    one = jnp.stack([slope(x0) for x0 in x0s])
    np.testing.assert_allclose(jax.vmap(slope)(x0s), one, rtol=1e-8)
    np.testing.assert_allclose(jax.lax.map(slope, x0s), one, rtol=1e-8)


def test_unrolled_derivatives_of_vectorized_solves():
    problem, x0, us = helpers.spring(6)
    options: Any = dict(max_steps=10, adjoint=dp.UnrolledAdjoint())
    one = lambda x0: jnp.sum(dp.solve(problem, dp.ILQR(), x0, us, **options).us ** 2)
    x0s = jnp.stack([x0, 0.5 * x0])
    together = jax.jit(jax.grad(lambda x0s: jnp.sum(jax.vmap(one)(x0s))))(x0s)
    slope = jax.jit(jax.grad(one))
    expected = jnp.stack([slope(x0) for x0 in x0s])
    np.testing.assert_allclose(together, expected, rtol=1e-9)


@pytest.mark.costly
@pytest.mark.parametrize("fast_loops", [False, None])
def test_batches_with_limits(fast_loops):
    theta = pendulum_theta()
    x0s = theta["x0"][None] + jnp.array([[0.0, 0.0], [0.05, 0.1], [0, 0.2]])

    def loss(most):
        problem, us = pendulum_problem(theta | dict(most=most)), jnp.zeros((3, 20, 1))
        options: Any = dict(fast_loops=fast_loops, max_steps=500, **TIGHT)
        solutions = dp.solve_batch(problem, dp.DDP(), x0s, us, **options)
        return sum_of_squares(solutions.us)

    each = [pendulum_controls(theta | dict(x0=x0)) for x0 in x0s]
    expected = sum(np.sum(2 * us * jacobians["most"]) for jacobians, us in each)
    found = jax.jit(jax.grad(loss))(theta["most"])
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.costly
@pytest.mark.parametrize("fast_loops", [None, False])
def test_batches(fast_loops):
    theta = golden_theta()
    x0s = theta["x0"][None] + jnp.array([[0.0, 0.0], [0.05, 0.1]])

    def loss(control):
        problem, uss = golden(theta | dict(control=control)), jnp.zeros((2, 25, 1))
        options = dict(fast_loops=fast_loops, **TIGHT)
        solutions = dp.solve_batch(problem, dp.Newton(), x0s, uss, **options)
        return golden_distances(solutions.xs, solutions.us)

    each = [jax.grad(golden_loss)(theta | dict(x0=x0)) for x0 in x0s]
    expected = sum(slopes["control"] for slopes in each)
    np.testing.assert_allclose(jax.grad(loss)(theta["control"]), expected, rtol=1e-8)


def spring_loss(weight):
    _, x0, us = helpers.spring()
    given = dp.ControlProblem.from_system(helpers.Spring(weight=weight), len(us))
    return weighted(dp.solve(given, dp.DDP(), x0, us, **TIGHT))


def test_training_steps_compile_once(caplog):
    weight = jnp.asarray(0.1)
    weight -= 0.01 * jax.grad(spring_loss)(weight)
    with jax.log_compiles():
        for _ in range(2):
            weight -= 0.01 * jax.grad(spring_loss)(weight)
    assert not [r for r in caplog.records if "compil" in r.getMessage().lower()]


def test_numbers_of_modules_and_of_functions():
    problem, x0, us = helpers.spring()
    T = len(us)

    def captured(weight):
        cost = lambda x, u, t: problem.cost(x, u, t) + weight * u[0] ** 2
        given = dp.ControlProblem(problem.dynamics, cost, problem.terminal_cost, T)
        return weighted(dp.solve(given, dp.DDP(), x0, us, **TIGHT))

    field = jax.grad(spring_loss)(jnp.asarray(0.1))
    np.testing.assert_allclose(jax.grad(captured)(0.0), field, rtol=1e-9)


@pytest.mark.slow
def test_local_coordinates():
    """Angles do what numbers do as long as they do not wrap."""

    def slope(manifold):
        def loss(weight, x0):
            spring = helpers.Spring(weight=weight)
            given = dp.ControlProblem.from_system(spring, 12, manifold=manifold)
            us = jnp.zeros((12, 1))
            solution = dp.solve(given, dp.DDP(), x0, us, **TIGHT)
            return weighted(solution) + solution.cost

        return jax.grad(loss, (0, 1))(jnp.asarray(0.1), jnp.array([1.0, -0.5]))

    pairs = zip(slope(dp.manifolds.Angle()), slope(None), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.slow
def test_phases_of_different_shapes():
    def solve(theta):
        first = dp.Phase(
            lambda x, u, t: x + 0.1 * jnp.stack([x[1], u[0] - x[0] ** 3]),
            lambda x, u, t: jnp.sum(x**2) + theta["weight"] * u[0] ** 2,
            6,
        )
        join = dp.Phase(lambda x, u, t: x[:1] * x[1:] + u, lambda x, u, t: u[0] ** 2, 1)
        last = dp.Phase(
            lambda x, u, t: jnp.sin(x) + u, lambda x, u, t: jnp.sum(x**2 + u**2), 3
        )
        chain = dp.Chain((first, join, last), lambda x: x[0] ** 2)
        us = tuple(jnp.zeros((n, 1)) for n in (6, 1, 3))
        return dp.solve(chain, dp.DDP(), theta["x0"], us, **TIGHT)

    theta = dict(weight=jnp.asarray(0.5), x0=jnp.array([1.0, -0.4]))
    fn = lambda theta: weighted(solve(theta))
    assert_close(jax.grad(fn)(theta), differences(jax.jit(fn), theta), 1e-7)


@pytest.mark.slow
def test_float32():
    theta = jtu.tree_map(lambda a: a.astype(jnp.float32), golden_theta())

    def loss(theta):
        us = jnp.zeros((25, 1), jnp.float32)
        solution = dp.solve(golden(theta), dp.Newton(), theta["x0"], us)
        return jnp.sum(solution.us**2)

    found = jax.grad(loss)(theta)
    assert all(a.dtype == jnp.float32 for a in found.values())
    double = jax.grad(lambda theta: jnp.sum(golden_solution(theta).us ** 2))
    assert_close(found, double(golden_theta()), 1e-2)


@pytest.mark.slow
def test_a_kink_is_told_and_has_no_derivative():
    """Limits that the solution touches without pushing against them."""
    problem, x0, us = constrained.touching()
    solution = dp.solve(problem, dp.DDP(), x0, us)
    found = dp.check_gradient(problem, solution)
    assert not found.success and found.weakly_active == 2
    assert found.result == dp.RESULTS.gradient_unreliable
    slopes = {
        adjoint: jax.grad(
            lambda x0: weighted(dp.solve(problem, dp.DDP(), x0, us, adjoint=adjoint))
        )(x0)
        for adjoint in (dp.ImplicitAdjoint(), dp.ImplicitAdjoint("accept"))
    }
    bad, accepted = slopes.values()
    assert np.all(np.isnan(bad)) and np.all(np.isfinite(accepted))


def test_a_good_solution_is_told():
    theta = golden_theta()
    found = dp.check_gradient(golden(theta), golden_solution(theta))
    assert found.success and found.converged and found.positive
    assert found.residual < 1e-14 and found.weakly_active == 0
    early = golden_solution(theta, max_steps=2, throw=False)
    found = dp.check_gradient(golden(theta), early)
    assert not found.success and not found.converged


def test_no_adjoint_refuses():
    adjoint = dp.NoAdjoint()
    assert np.isfinite(quartic(1.0, adjoint))
    with pytest.raises(NotImplementedError, match="leave it out for those"):
        jax.eval_shape(lambda theta: jax.grad(quartic)(theta, adjoint), 1.0)


def test_a_solve_by_hand_has_no_derivatives():
    problem, x0, us = helpers.spring()

    def cost(x0):
        state = dp.init(problem, dp.ILQR(), x0, us, max_steps=1)
        return dp.finish(problem, dp.step(problem, state), throw=False).cost

    with pytest.raises(NotImplementedError, match="that of `dp.solve` has"):
        jax.eval_shape(jax.grad(cost), x0)


def test_wrong_calls():
    with pytest.raises(ValueError, match="`on_unconverged` is 'raise'; 'nan' or"):
        dp.ImplicitAdjoint("raise")  # pyright: ignore
    with pytest.raises(ValueError, match="`refine` is -1; 0 or more"):
        dp.ImplicitAdjoint(refine=-1)
    with pytest.raises(TypeError, match="`refine` is 1.0; a Python int"):
        dp.ImplicitAdjoint(refine=1.0)  # pyright: ignore
    with pytest.raises(ValueError, match="`checkpoints` is 0; a Python int >= 1"):
        dp.UnrolledAdjoint(0)
    problem, x0, us = helpers.spring()
    limited, x0, us = constrained.mass()
    with pytest.raises(ValueError, match="takes neither limits of controls nor"):
        dp.solve(limited, dp.ILQR(), x0, us, adjoint=dp.UnrolledAdjoint())
    xs = jnp.zeros((13, 2))
    _, x0, us = helpers.spring()
    with pytest.raises(ValueError, match="takes no first guess of the states"):
        dp.solve(problem, dp.ILQR(), x0, us, xs=xs, adjoint=dp.UnrolledAdjoint())
    theta = golden_theta()
    batch = jtu.tree_map(lambda a: a[None], golden_solution(theta))
    with pytest.raises(ValueError, match=r"holds a batch; give `solution\[i\]`"):
        dp.check_gradient(golden(theta), batch)
