"""The problems of the benchmarks, each written once for every library.

The functions take the array module first: `jax.numpy`, or the few functions of the same
names in `peers/casadi.py`. The parameters of a problem are numbers in its text, so that
what is compiled knows them, in every library alike.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimize the sum of `cost(np, x, u)` and `terminal_cost(np, x)` from `x0`.

    - `dynamics(np, x, u)`: the next state.
    - `controls`: how many there are.
    - `spread`: standard deviations of the starts of a batch.
    - `limits(t)`: the lower and the upper limits of the controls at all stages.
    - `guess(t)`: the first guess of the controls, else zero.
    - `hold(x0)`: the controls that hold a start, as the first guess of every stage.
    - `rows(np, x)`, `last_rows(np, x)`: at most 0 at the stages, and at the end.
    - `goal(np, x)`: 0 at the end.
    - `line`: where a line of states leads from `x0`, for a first guess of the states.
    """

    name: str
    dynamics: Callable
    cost: Callable
    terminal_cost: Callable
    x0: tuple[float, ...]
    controls: int
    horizon: int
    spread: tuple[float, ...] = ()
    limits: Callable | None = None
    guess: Callable | None = None
    hold: Callable | None = None
    rows: Callable | None = None
    last_rows: Callable | None = None
    goal: Callable | None = None
    line: tuple[float, ...] | None = None

    @property
    def us(self) -> numpy.ndarray:
        return self.us_from(self.x0)

    def us_from(self, x0) -> numpy.ndarray:
        """The first guess of the controls."""
        shape, t = (self.horizon, self.controls), numpy.arange(self.horizon)
        if self.hold:
            return numpy.tile(self.hold(x0), (self.horizon, 1))
        return numpy.stack(self.guess(t), 1) if self.guess else numpy.zeros(shape)

    @property
    def xs(self) -> numpy.ndarray:
        """The states on the line, as many as there are."""
        return numpy.linspace(self.x0, self.line, self.horizon + 1)

    @property
    def bounds(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Both limits, shape `(horizon, controls)`, infinite where there is none."""
        none, t = (-math.inf, math.inf), numpy.arange(self.horizon)
        sides = self.limits(t) if self.limits else none
        shape = self.horizon, self.controls
        return tuple(numpy.broadcast_to(side, shape) for side in sides)

    def starts(self, count: int) -> numpy.ndarray:
        noise = numpy.random.default_rng(0).normal(size=(count, len(self.x0)))
        return numpy.array(self.x0) + noise * numpy.array(self.spread)


def squares(np, weights, x):
    return np.dot(np.array(weights), x**2)


# A pendulum from hanging to upright, explicit Euler.


def pendulum_dynamics(np, x, u):
    angle, velocity = x[0], x[1]
    acceleration = u[0] - 0.1 * velocity - 9.81 * np.sin(angle)
    return np.array([angle + 0.05 * velocity, velocity + 0.05 * acceleration])


def pendulum_cost(np, x, u):
    angle, velocity = x[0] - math.pi, x[1]
    return 0.5 * (0.1 * angle**2 + 0.01 * velocity**2 + 0.05 * u[0] ** 2)


def pendulum_terminal_cost(np, x):
    return 0.5 * (100 * (x[0] - math.pi) ** 2 + 10 * x[1] ** 2)


# A pole on a cart from hanging to upright, explicit Euler; the pole is a point mass of
# 0.3 kg at 0.5 m, the cart weighs 1 kg.


def cart_pole_dynamics(np, x, u):
    velocity, angle, rate = x[1], x[2], x[3]
    sin, cos = np.sin(angle), np.cos(angle)
    push = u[0] + 0.3 * sin * (0.5 * rate**2 + 9.81 * cos)
    acceleration = push / (1.0 + 0.3 * sin**2)
    spin = -(acceleration * cos + 9.81 * sin) / 0.5
    return x + 0.025 * np.array([velocity, acceleration, rate, spin])


def cart_pole_error(np, x):
    return np.array([x[0], x[1], x[2] - math.pi, x[3]])


def cart_pole_cost(np, x, u):
    error = cart_pole_error(np, x)
    return 0.5 * (squares(np, (1.0, 0.1, 1.0, 0.1), error) + 0.01 * u[0] ** 2)


def cart_pole_terminal_cost(np, x):
    return 0.5 * squares(np, (100.0, 10.0, 100.0, 10.0), cart_pole_error(np, x))


# The parking of Tassa, Mansard, Todorov, "Control-limited differential dynamic
# programming", 2014, without limits. The state is position, heading and speed of the
# front wheels, the controls are their angle and the acceleration.


def smooth_abs(np, x, scale):
    return np.sqrt(x**2 + np.array(scale) ** 2) - np.array(scale)


def parking_dynamics(np, x, u):
    heading, speed = x[2], x[3]
    front = 0.03 * speed
    side = front * np.sin(u[0])
    back = front * np.cos(u[0]) + 2.0 - np.sqrt(4.0 - side**2)
    turn = np.arcsin(side / 2.0)
    step = [back * np.cos(heading), back * np.sin(heading), turn, 0.03 * u[1]]
    return x + np.array(step)


def parking_cost(np, x, u):
    near = np.dot(np.array([1e-3, 1e-3]), smooth_abs(np, x[:2], (0.1, 0.1)))
    return near + squares(np, (1e-2, 1e-4), u)


def parking_terminal_cost(np, x):
    return np.dot(
        np.array([0.1, 0.1, 1.0, 0.3]), smooth_abs(np, x, (0.01, 0.01, 0.01, 1.0))
    )


# A quadrotor that flies from a tilted start to a point, explicit Euler. The state is
# position, roll, pitch, yaw, velocity and body rates; the controls are the forces of
# the rotors less those of hovering.


def quadrotor_dynamics(np, x, u):
    roll, pitch, yaw = x[3], x[4], x[5]
    velocity, wx, wy, wz = x[6:9], x[9], x[10], x[11]
    f = u + 0.5 * 9.81 / 4
    lift = (f[0] + f[1] + f[2] + f[3]) / 0.5
    sr, cr, sp, cp = np.sin(roll), np.cos(roll), np.sin(pitch), np.cos(pitch)
    sy, cy = np.sin(yaw), np.cos(yaw)
    turn = sr * wy + cr * wz
    angles = np.array([wx + turn * sp / cp, cr * wy - sr * wz, turn / cp])
    acceleration = np.array(
        [
            lift * (cy * sp * cr + sy * sr),
            lift * (sy * sp * cr - cy * sr),
            lift * cp * cr - 9.81,
        ]
    )
    spin = np.array(
        [
            (0.175 * (f[1] - f[3]) - (0.004 - 0.0023) * wy * wz) / 0.0023,
            (0.175 * (f[2] - f[0]) - (0.0023 - 0.004) * wz * wx) / 0.0023,
            0.0168 * (f[0] - f[1] + f[2] - f[3]) / 0.004,
        ]
    )
    return x + 0.03 * np.concatenate([velocity, angles, acceleration, spin])


QUADROTOR_GOAL = (1.0,) * 3 + (0.0,) * 9


def quadrotor_cost(np, x, u):
    error = x - np.array(QUADROTOR_GOAL)
    weights = (0.1,) * 6 + (0.01,) * 6
    return 0.5 * (squares(np, weights, error) + squares(np, (0.1,) * 4, u))


def quadrotor_terminal_cost(np, x):
    error = x - np.array(QUADROTOR_GOAL)
    return 0.5 * squares(np, (100.0,) * 6 + (10.0,) * 6, error)


# An acrobot, two links of 1 kg and 1 m with a motor between them, from hanging to
# upright, explicit Euler. The state is the angles of both links and their rates.


def acrobot_dynamics(np, x, u):
    cos, sin = np.cos(x[1]), np.sin(x[1])
    a, b, c = 5.0 / 3.0 + cos, 1.0 / 3.0 + 0.5 * cos, 1.0 / 3.0
    fall = 4.905 * np.sin(x[0] + x[1])
    first = 0.5 * sin * x[3] * (2.0 * x[2] + x[3]) - 14.715 * np.sin(x[0]) - fall
    first, second = first - 0.1 * x[2], u[0] - 0.5 * sin * x[2] ** 2 - fall - 0.1 * x[3]
    determinant = a * c - b**2
    rates = [
        (c * first - b * second) / determinant,
        (a * second - b * first) / determinant,
    ]
    return x + 0.03 * np.array([x[2], x[3], *rates])


def acrobot_error(np, x):
    return np.array([x[0] - math.pi, x[1], x[2], x[3]])


def acrobot_cost(np, x, u):
    error = acrobot_error(np, x)
    return 0.5 * (squares(np, (1.0, 1.0, 0.1, 0.1), error) + 0.01 * u[0] ** 2)


def acrobot_terminal_cost(np, x):
    return 0.5 * squares(np, (100.0, 100.0, 10.0, 10.0), acrobot_error(np, x))


# A rocket in a plane that comes down beside its pad, explicit Euler. The state is
# position, tilt and their rates; the controls are the thrust less the weight, in
# weights, and the angle of the engine.


def rocket_dynamics(np, x, u):
    thrust = 9.81 * (1.0 + u[0])
    side, up = np.sin(x[2] + u[1]), np.cos(x[2] + u[1])
    turn = -0.5 * thrust * np.sin(u[1])
    rates = [-thrust * side, thrust * up - 9.81, turn]
    return x + 0.05 * np.concatenate([x[3:], np.array(rates)])


def rocket_cost(np, x, u):
    weights = (0.01, 0.01, 0.1, 0.01, 0.01, 0.1)
    return 0.5 * (squares(np, weights, x) + squares(np, (1.0, 1.0), u))


def rocket_terminal_cost(np, x):
    return 0.5 * squares(np, (100.0, 100.0, 100.0, 10.0, 10.0, 10.0), x)


PROBLEMS = (
    Problem(
        "pendulum",
        pendulum_dynamics,
        pendulum_cost,
        pendulum_terminal_cost,
        x0=(0.0, 0.0),
        controls=1,
        horizon=100,
        spread=(0.3, 0.3),
    ),
    Problem(
        "cart-pole",
        cart_pole_dynamics,
        cart_pole_cost,
        cart_pole_terminal_cost,
        x0=(0.0, 0.0, 0.0, 0.0),
        controls=1,
        horizon=200,
        spread=(0.2, 0.2, 0.1, 0.1),
        line=(0.0, 0.0, math.pi, 0.0),
    ),
    Problem(
        "car parking",
        parking_dynamics,
        parking_cost,
        parking_terminal_cost,
        x0=(1.0, 1.0, 1.5 * math.pi, 0.0),
        controls=2,
        horizon=500,
    ),
    Problem(
        "quadrotor",
        quadrotor_dynamics,
        quadrotor_cost,
        quadrotor_terminal_cost,
        x0=(0.0,) * 3 + (0.6, -0.4, 0.5) + (0.0,) * 6,
        controls=4,
        horizon=100,
        spread=(0.3,) * 3 + (0.1,) * 9,
        line=QUADROTOR_GOAL,
    ),
)


def changing(t):
    """Limits that move with the stage; some stages have none."""
    lower = numpy.where(t >= 70, -math.inf, -3 - 2 * numpy.sin(t / 8))
    upper = numpy.where(t < 10, math.inf, 3 + 2 * numpy.cos(t / 11))
    return lower[:, None], upper[:, None]


LIMITED = (
    dataclasses.replace(
        PROBLEMS[0], name="pendulum with limits", limits=lambda t: (-3.0, 3.0)
    ),
    dataclasses.replace(
        PROBLEMS[0], name="pendulum, limits that change", limits=changing
    ),
    dataclasses.replace(
        PROBLEMS[2],
        name="car parking with limits",
        limits=lambda t: ((-0.5, -2.0), (0.5, 2.0)),
        guess=lambda t: (0.1 * numpy.sin(0.7 * t), 0.1 * numpy.cos(1.3 * t)),
    ),
)

# For these nothing was ever tuned: neither the library nor their numbers.
UNSEEN = (
    Problem(
        "acrobot",
        acrobot_dynamics,
        acrobot_cost,
        acrobot_terminal_cost,
        x0=(0.0, 0.0, 0.0, 0.0),
        controls=1,
        horizon=150,
    ),
    Problem(
        "rocket landing",
        rocket_dynamics,
        rocket_cost,
        rocket_terminal_cost,
        x0=(10.0, 30.0, 0.2, -2.0, -8.0, 0.0),
        controls=2,
        horizon=120,
    ),
)
