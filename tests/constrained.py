"""Problems with constraints whose minima are known, and the conditions of optimality.

Each function returns a problem, the first state and the first guess of the controls.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp

from . import environments, helpers


def like(x, *numbers):
    """The numbers as an array of the dtype of x."""
    return jnp.asarray(numbers, x.dtype)


def nothing(x):
    """The terminal cost where there is none."""
    return 0 * x[0]


def whole(x):
    return x


def too_fast(x, u, t):
    return -x[1] - 0.45


class Mass(eqx.Module):
    """The problems with it share a program."""

    dt: float

    def dynamics(self, x, u, t):
        return x + self.dt * jnp.stack([x[1] + self.dt / 2 * u[0], u[0]])

    def cost(self, x, u, t):
        return self.dt * u[0] ** 2 / 2

    def terminal_cost(self, x):
        return nothing(x)


def mass(horizon=20, most=1.2, constraints=(), dt=0.1):
    """A mass that has to stop at 0, with limits of its force."""
    problem = dp.ControlProblem.from_system(
        Mass(dt),
        horizon,
        (-most, most),
        constraints,
        dp.Equality(whole, name="stop"),
    )
    return problem, jnp.array([1.0, 0.0]), jnp.zeros((horizon, 1))


def slow():
    return mass(30, 1.2, dp.Inequality(too_fast, name="speed"))


def touching():
    """Limits that the solution touches without pushing against them."""
    return mass(20, 1 / 0.7)


def swing_up():
    upright = dp.Equality(lambda x: x - like(x, jnp.pi, 0), name="upright")
    problem = dp.ControlProblem(
        helpers.Pendulum().dynamics,
        lambda x, u, t: 0.025 * u[0] ** 2,
        nothing,
        100,
        (-2.0, 2.0),
        terminal_constraints=upright,
    )
    return problem, jnp.zeros(2), jnp.zeros((100, 1))


CAR = dict(radius=0.6, length=0.5, weight=2.0, steering=0.5, speed=1.5)


def car(arrives=False, twice=False, **numbers):
    """A car between two round obstacles, with a limit of its speed.

    It `arrives` at rest, or pays for not doing so. `twice` says the same again: the
    first obstacle, and a sum of positions at the end. `CAR` has the numbers.
    """
    radius, length, weight, steering, speed = (CAR | numbers).values()

    def dynamics(x, u, t):
        heading, pace = x[2], x[3]
        turn = pace / length * jnp.tan(u[0])
        forward = pace * jnp.cos(heading), pace * jnp.sin(heading)
        return x + 0.1 * jnp.stack([*forward, turn, u[1]])

    def away(x):
        return (x[0] - 4) ** 2 + (x[1] - 3) ** 2

    def cost(x, u, t):
        return 0.05 * (0.1 * away(x) + weight * u[0] ** 2 + 0.5 * u[1] ** 2)

    def terminal_cost(x):
        return 0.5 * (50 * away(x) + 10 * x[2] ** 2 + 10 * x[3] ** 2)

    def inside(x, *_):
        first = radius**2 - (x[0] - 1.5) ** 2 - (x[1] - 0.8) ** 2
        second = 0.5**2 - (x[0] - 3) ** 2 - (x[1] - 2.6) ** 2
        return jnp.stack([first, second] + [first] * twice)

    def goal(x):
        rest = x - like(x, 4, 3, 0, 0)
        return jnp.append(rest, rest[0] + rest[1]) if twice else rest

    limit = jnp.stack([jnp.asarray(steering), jnp.asarray(1.5)])
    most = jnp.array([jnp.inf, jnp.inf, jnp.inf, 1.5]).at[3].set(speed)
    slow = dp.StateBounds(None, most, "speed")
    obstacles = dp.Inequality(inside, name="obstacles")
    arrive = dp.Equality(goal, name="arrive")
    problem = dp.ControlProblem(
        dynamics,
        cost,
        nothing if arrives else terminal_cost,
        60,
        (-limit, limit),
        (obstacles, slow),
        (obstacles, arrive) if arrives else obstacles,
    )
    us = jnp.broadcast_to(jnp.array([0.0, 0.1]), (60, 2))
    return problem, jnp.zeros(4), us


def car_that_arrives():
    return car(arrives=True)


def car_with_dependent_rows():
    return car(arrives=True, twice=True)


def gap():
    """A quadrotor that flies past two pillars, with a limit of its tilt."""

    def inside(x, *_):
        left = 0.25**2 - (x[0] - 0.35) ** 2 - (x[1] - 0.65) ** 2
        return jnp.stack([left, 0.25**2 - (x[0] - 0.75) ** 2 - (x[1] - 0.15) ** 2])

    def tilt(x, u, t):
        return jnp.concatenate([x[3:5] - 1, -x[3:5] - 1])

    free, x0, us = environments.quadrotor()
    pillars = dp.Inequality(inside, name="pillars")
    most = 0.5 * 9.81 / 4
    problem = dp.ControlProblem.from_system(
        free.system,
        free.horizon,
        control_bounds=(-most, most),
        constraints=(pillars, dp.Inequality(tilt, name="tilt")),
        terminal_constraints=pillars,
    )
    return problem, x0, us


def unicycle():
    """Around an obstacle whose center is nearly on the line to the goal."""
    goal = 1.0, 0.0, 0.0

    def field(x, u, t):
        return jnp.stack([u[0] * jnp.cos(x[2]), u[0] * jnp.sin(x[2]), u[1]])

    def cost(x, u, t):
        return 0.05 * jnp.sum((x - like(x, *goal)) ** 2) + 0.5 * jnp.sum(u**2)

    def inside(x, *_):
        return 0.25 - jnp.sqrt((x[0] - 0.5) ** 2 + (x[1] - 0.01) ** 2)

    arrive = dp.Equality(lambda x: x - like(x, *goal), name="arrive")
    obstacle = dp.Inequality(inside, name="obstacle")
    problem = dp.ControlProblem(
        dp.discretize(field, 0.1, "rk4"),
        cost,
        nothing,
        25,
        (-1.0, 1.0),
        obstacle,
        (arrive, obstacle),
    )
    return problem, jnp.zeros(3), jnp.zeros((25, 2))


def cart():
    """A pole on a cart whose rail is short, from hanging to upright."""

    def dynamics(x, u, t):
        _, angle, speed, rate = x
        s, c = jnp.sin(angle), jnp.cos(angle)
        d = 1 + 0.3 * s**2
        push = (u[0] + 0.3 * s * (0.5 * rate**2 + 9.81 * c)) / d
        turn = -u[0] * c - 0.15 * rate**2 * c * s - 1.3 * 9.81 * s
        return x + 0.05 * jnp.stack([speed, rate, push, turn / (0.5 * d)])

    def weighted(x, *weights):
        error = x - like(x, 0, jnp.pi, 0, 0)
        return 0.5 * jnp.sum(like(x, *weights) * error**2)

    inf = jnp.inf
    most = jnp.array([0.4, inf, inf, inf])
    rail = dp.StateBounds(-most, most, name="rail")
    problem = dp.ControlProblem(
        dynamics,
        lambda x, u, t: weighted(x, 0.1, 0.1, 0.01, 0.01) + 0.005 * u[0] ** 2,
        lambda x: weighted(x, 100, 200, 10, 20),
        100,
        (-8.0, 8.0),
        rail,
        rail,
    )
    return problem, jnp.zeros(4), jnp.zeros((100, 1))


# Of no collection; all from controls of 0.


def ferry():
    """A point that is pushed, past an obstacle that moves across its way."""

    def inside(x, u, t):
        across = x[1] - 0.9 + 0.04 * jnp.asarray(t, x.dtype)
        return 0.3**2 - (x[0] - 1) ** 2 - across**2

    problem = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * jnp.concatenate([x[2:], u]),
        lambda x, u, t: 0.05 * jnp.sum(u**2),
        nothing,
        40,
        (-1.5, 1.5),
        dp.Inequality(inside, name="obstacle"),
        dp.Equality(lambda x: x - like(x, 2, 0, 0, 0), name="arrive"),
    )
    return problem, jnp.zeros(4), jnp.zeros((40, 2))


def lander():
    """Least effort in air, above slopes that end at the pad, down softly."""

    def dynamics(x, u, t):
        drag = 0.1 * x[2:] * jnp.sqrt(0.01 + jnp.sum(x[2:] ** 2))
        return x + 0.15 * jnp.concatenate([x[2:], u - like(x, 0, 1) - drag])

    def slopes(x, u, t):
        return jnp.stack([x[0] - x[1], -x[0] - x[1]])

    problem = dp.ControlProblem(
        dynamics,
        lambda x, u, t: 0.075 * jnp.sum(u**2),
        nothing,
        40,
        (jnp.array([-1.0, 0.0]), jnp.array([1.0, 3.0])),
        dp.Inequality(slopes, name="slopes"),
        (
            dp.Equality(lambda x: x[:3], name="pad"),
            dp.Inequality(lambda x: -x[3] - 0.1, name="softly"),
        ),
    )
    return problem, jnp.array([3.0, 4.0, 0.5, -1.0]), jnp.zeros((40, 2))


def courier():
    """A unicycle by a place at one stage, and with a heading kept for a while."""

    def field(x, u, t):
        return jnp.stack([u[0] * jnp.cos(x[2]), u[0] * jnp.sin(x[2]), u[1]])

    def way(x, u, t):
        return jnp.where(t == 12, x[:2] - like(x, 0.6, 0.5), 0)

    def heading(x, u, t):
        sides = jnp.stack([x[2] + 0.2, -x[2] - 1])
        return jnp.where((t >= 20) & (t <= 25), sides, -1)

    problem = dp.ControlProblem(
        dp.discretize(field, 0.1, "rk4"),
        lambda x, u, t: 0.05 * jnp.sum(u**2),
        nothing,
        35,
        (-2.0, 2.0),
        (dp.Equality(way, name="way"), dp.Inequality(heading, name="heading")),
        dp.Equality(lambda x: x - like(x, 1.5, 0, 0), name="arrive"),
    )
    return problem, jnp.zeros(3), jnp.zeros((35, 2))


def arm():
    """Two links that hang, with bounds of the elbow and of speeds; the hand to a point.

    Both weigh 1 kg and measure 1 m.
    """

    def dynamics(x, u, t):
        c, s = jnp.cos(x[1]), jnp.sin(x[1])
        a, b, d = 5 / 3 + c, 1 / 3 + c / 2, 1 / 3
        fall = 4.905 * jnp.sin(x[0] + x[1])
        first = u[0] + 0.5 * s * x[3] * (2 * x[2] + x[3]) - 14.715 * jnp.sin(x[0])
        first, second = first - fall, u[1] - 0.5 * s * x[2] ** 2 - fall
        turn = jnp.stack([d * first - b * second, a * second - b * first])
        return x + 0.05 * jnp.concatenate([x[2:], turn / (a * d - b**2)])

    def hand(x):
        side = jnp.sin(x[0]) + jnp.sin(x[0] + x[1])
        up = -jnp.cos(x[0]) - jnp.cos(x[0] + x[1])
        return jnp.stack([side - 1.5, up - 0.5, *x[2:]])

    inf = jnp.inf
    lower, upper = jnp.array([-inf, -0.1, -inf, -inf]), jnp.array([inf, 1.5, 3.0, 3.0])
    problem = dp.ControlProblem(
        dynamics,
        lambda x, u, t: 5e-4 * jnp.sum(u**2),
        nothing,
        40,
        (-25.0, 25.0),
        dp.StateBounds(lower, upper, name="joints"),
        dp.Equality(hand, name="hand"),
    )
    return problem, jnp.zeros(4), jnp.zeros((40, 2))


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def conditions(problem, x0, solution):
    """What is left of the gradient of the Lagrangian, written without the library."""
    found = solution.multipliers

    def lagrangian(us):
        trajectory = dp.rollout(problem, x0, us)
        total = trajectory.cost
        for c in problem.constraints:
            g = jax.vmap(lambda x, u, t, c=c: flat(c(x, u, t)))
            values = g(trajectory.xs[:-1], us, jnp.arange(len(us)))
            total += jnp.sum(values * found.constraints[c.name])
        for c in problem.terminal_constraints:
            total += jnp.sum(flat(c(trajectory.xs[-1])) * found.terminal[c.name])
        return total

    return jax.jit(jax.grad(lagrangian))(solution.us) + found.upper - found.lower


def check_optimal(problem, x0, solution, tol=1e-7):
    """Successful, and optimal to first order by plain derivatives as well."""
    assert solution.success, solution
    for part in ("stationarity", "violation", "complementarity", "dual_sign"):
        assert solution.stats[part] <= tol
    np.testing.assert_allclose(conditions(problem, x0, solution), 0, atol=tol)
    for c in problem.constraints:
        if not c.equal:
            assert np.all(np.asarray(solution.multipliers.constraints[c.name]) >= 0)
    expected = dp.rollout(problem, x0, solution.us).cost
    np.testing.assert_allclose(solution.cost, expected, rtol=1e-12)
