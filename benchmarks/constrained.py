"""Problems with constraints, each written once for every library."""

import dataclasses
import math

from .problems import Problem, PROBLEMS


def nothing(np, x):
    return 0.0 * x[0]


# A mass that stops at 0, exact steps.


def mass_dynamics(np, x, u):
    return np.array([x[0] + 0.1 * x[1] + 0.005 * u[0], x[1] + 0.1 * u[0]])


def mass_cost(np, x, u):
    return 0.05 * u[0] ** 2


def effort(np, x, u):
    return 0.025 * u[0] ** 2


def upright(np, x):
    return x - np.array([math.pi, 0.0])


# A car between two round obstacles, with a limit of its speed, explicit Euler. The
# state is position, heading and speed; the controls are the angle of the wheels and the
# acceleration.


def car_dynamics(np, x, u):
    heading, speed = x[2], x[3]
    turn = speed / 0.5 * np.tan(u[0])
    step = [speed * np.cos(heading), speed * np.sin(heading), turn, u[1]]
    return x + 0.1 * np.array(step)


def away(x):
    return (x[0] - 4.0) ** 2 + (x[1] - 3.0) ** 2


def car_cost(np, x, u):
    return 0.05 * (0.1 * away(x) + 2.0 * u[0] ** 2 + 0.5 * u[1] ** 2)


def car_terminal_cost(np, x):
    return 0.5 * (50.0 * away(x) + 10.0 * x[2] ** 2 + 10.0 * x[3] ** 2)


def obstacles(np, x):
    first = 0.36 - (x[0] - 1.5) ** 2 - (x[1] - 0.8) ** 2
    second = 0.25 - (x[0] - 3.0) ** 2 - (x[1] - 2.6) ** 2
    return np.array([first, second])


def obstacles_and_speed(np, x):
    return np.concatenate([obstacles(np, x), np.array([x[3] - 1.5])])


CAR_GOAL = (4.0, 3.0, 0.0, 0.0)


def arrival(np, x):
    return x - np.array(CAR_GOAL)


# A pole on a cart whose rail is short, from hanging to upright, explicit Euler. The
# state is position and angle, and their rates.


def rail_dynamics(np, x, u):
    angle, speed, rate = x[1], x[2], x[3]
    s, c = np.sin(angle), np.cos(angle)
    d = 1.0 + 0.3 * s**2
    push = (u[0] + 0.3 * s * (0.5 * rate**2 + 9.81 * c)) / d
    turn = -u[0] * c - 0.15 * rate**2 * c * s - 1.3 * 9.81 * s
    return x + 0.05 * np.array([speed, rate, push, turn / (0.5 * d)])


def weighted(np, weights, x):
    error = x - np.array([0.0, math.pi, 0.0, 0.0])
    return 0.5 * np.dot(np.array(weights), error**2)


def rail_cost(np, x, u):
    return weighted(np, (0.1, 0.1, 0.01, 0.01), x) + 0.005 * u[0] ** 2


def rail_terminal_cost(np, x):
    return weighted(np, (100.0, 200.0, 10.0, 20.0), x)


def rail(np, x):
    return np.array([x[0] - 0.4, -x[0] - 0.4])


CAR = Problem(
    "obstacles",
    car_dynamics,
    car_cost,
    car_terminal_cost,
    x0=(0.0, 0.0, 0.0, 0.0),
    controls=2,
    horizon=60,
    limits=lambda t: ((-0.5, -1.5), (0.5, 1.5)),
    guess=lambda t: (0.0 * t, 0.0 * t + 0.1),
    rows=obstacles_and_speed,
    last_rows=obstacles,
    line=CAR_GOAL,
)
CONSTRAINED = (
    Problem(
        "mass",
        mass_dynamics,
        mass_cost,
        nothing,
        x0=(1.0, 0.0),
        controls=1,
        horizon=20,
        limits=lambda t: (-1.2, 1.2),
        goal=lambda np, x: x,
    ),
    dataclasses.replace(
        PROBLEMS[0],
        name="swing up",
        cost=effort,
        terminal_cost=nothing,
        limits=lambda t: (-2.0, 2.0),
        goal=upright,
    ),
    CAR,
    dataclasses.replace(
        CAR, name="obstacles, arrival", terminal_cost=nothing, goal=arrival
    ),
    Problem(
        "short rail",
        rail_dynamics,
        rail_cost,
        rail_terminal_cost,
        x0=(0.0, 0.0, 0.0, 0.0),
        controls=1,
        horizon=100,
        limits=lambda t: (-8.0, 8.0),
        rows=rail,
        last_rows=rail,
    ),
)
