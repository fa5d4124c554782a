"""Problems of 14 to 40 states, each written once for every library."""

import functools

import jax
import jax.numpy as jnp
import numpy

from diffprog.systems import Arm

from .peers import load
from .problems import Problem, squares


# Masses of 1 kg in a row, between walls and springs that get stiffer, explicit Euler of
# 0.05 s; forces push at masses spread over the row. The state is displacements, then
# velocities.


def pushed(masses: int, controls: int) -> list[int]:
    """The masses that the controls push."""
    places = numpy.linspace(0, masses - 1, controls + 2)[1:-1]
    return [round(place) for place in places]


def pull(stretch):
    return stretch + 0.5 * stretch**3


def pushing(masses: int, controls: int) -> numpy.ndarray:
    """What the controls push, as a matrix of zeros and ones."""
    gains = numpy.zeros((masses, controls))
    gains[pushed(masses, controls), range(controls)] = 1.0
    return gains


def chain_with_arrays(states: int, controls: int):
    half, gains = states // 2, pushing(states // 2, controls)

    def dynamics(np, x, u):
        q, v = x[:half], x[half:]
        wall = np.array([0.0])
        forces = pull(np.concatenate([q, wall]) - np.concatenate([wall, q]))
        push = gains @ u
        a = forces[1:] - forces[:-1] - 0.1 * v + push
        return x + 0.05 * np.concatenate([v, a])

    return dynamics


def chain_with_scalars(states: int, controls: int):
    half, places = states // 2, pushed(states // 2, controls)

    def dynamics(np, x, u):
        q, v = [x[i] for i in range(half)], [x[half + i] for i in range(half)]
        row = [0.0, *q, 0.0]
        forces = [pull(row[i + 1] - row[i]) for i in range(half + 1)]
        a = [forces[i + 1] - forces[i] - 0.1 * v[i] for i in range(half)]
        for i, place in enumerate(places):
            a[place] = a[place] + u[i]
        following = [q[i] + 0.05 * v[i] for i in range(half)]
        return np.array(following + [v[i] + 0.05 * a[i] for i in range(half)])

    return dynamics


def chain(states: int, controls: int, how: str = "arrays") -> Problem:
    """Brings displaced masses to rest in 120 stages."""
    half = states // 2
    written = {"arrays": chain_with_arrays, "scalars": chain_with_scalars}[how]
    weights = half * (1.0,) + half * (0.1,)

    def cost(np, x, u):
        return 0.5 * (squares(np, weights, x) + squares(np, controls * (0.1,), u))

    def terminal_cost(np, x):
        return 0.5 * squares(np, tuple(10 * weight for weight in weights), x)

    return Problem(
        f"chain of {states}" + (", scalars" if how == "scalars" else ""),
        written(states, controls),
        cost,
        terminal_cost,
        x0=tuple(numpy.sin(1.0 + numpy.arange(half)).round(3)) + half * (0.0,),
        controls=controls,
        horizon=120,
        spread=half * (0.1,) + half * (0.1,),
    )


# A body of 12 kg on four feet that stay where they are, explicit Euler of 0.02 s. The
# state is position, roll, pitch, yaw, velocity and body rates of the body, then the
# places of the feet; controls are the forces at the feet less those of standing.

FEET = (0.2, 0.15, 0.0), (0.2, -0.15, 0.0), (-0.2, 0.15, 0.0), (-0.2, -0.15, 0.0)
STANDING = (0.0, 0.0, 0.3) + 9 * (0.0,) + sum(FEET, ())
GOAL = (0.05, 0.03, 0.32, 0.1, -0.1, 0.2) + 6 * (0.0,) + sum(FEET, ())
BODY_WEIGHTS = 3 * (10.0,) + 3 * (5.0,) + 3 * (0.1,) + 3 * (0.1,) + 12 * (1e-3,)
FORCE_WEIGHTS = 4 * (1e-3, 1e-3, 1e-4)


def quadruped_dynamics(np, x, u):
    roll, pitch, yaw = x[3], x[4], x[5]
    wx, wy, wz = x[9], x[10], x[11]
    sr, cr, sp, cp = np.sin(roll), np.cos(roll), np.sin(pitch), np.cos(pitch)
    sy, cy = np.sin(yaw), np.cos(yaw)
    forces = [
        (u[3 * i], u[3 * i + 1], u[3 * i + 2] + 12.0 * 9.81 / 4) for i in range(4)
    ]
    # Arms of the forces about the center of mass, in the world frame.
    arms = [[x[12 + 3 * i + k] - x[k] for k in range(3)] for i in range(4)]
    moment = [
        sum(
            r[(k + 1) % 3] * f[(k + 2) % 3] - r[(k + 2) % 3] * f[(k + 1) % 3]
            for r, f in zip(arms, forces)
        )
        for k in range(3)
    ]
    total = [sum(f[k] for f in forces) for k in range(3)]
    # Columns of the rotation are the axes of the body in the world frame.
    axes = (
        (cy * cp, sy * cp, -sp),
        (cy * sp * sr - sy * cr, sy * sp * sr + cy * cr, cp * sr),
        (cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr),
    )
    torque = [sum(a * b for a, b in zip(axis, moment)) for axis in axes]
    turn = sr * wy + cr * wz
    slopes = [
        *(x[6 + k] for k in range(3)),
        wx + turn * sp / cp,
        cr * wy - sr * wz,
        turn / cp,
        total[0] / 12.0,
        total[1] / 12.0,
        total[2] / 12.0 - 9.81,
        (torque[0] - (0.3 - 0.25) * wy * wz) / 0.1,
        (torque[1] - (0.1 - 0.3) * wz * wx) / 0.25,
        (torque[2] - (0.25 - 0.1) * wx * wy) / 0.3,
    ]
    return x + 0.02 * np.array([*slopes, *(12 * [0.0])])


def quadruped_cost(np, x, u):
    error = x - np.array(GOAL)
    return 0.5 * (squares(np, BODY_WEIGHTS, error) + squares(np, FORCE_WEIGHTS, u))


def quadruped_terminal_cost(np, x):
    weights = tuple(100 * weight for weight in BODY_WEIGHTS)
    return 0.5 * squares(np, weights, x - np.array(GOAL))


QUADRUPED = Problem(
    "quadruped",
    quadruped_dynamics,
    quadruped_cost,
    quadruped_terminal_cost,
    x0=STANDING,
    controls=12,
    horizon=100,
)


# `dp.systems.Arm` for us, and its equations as symbols for the peer, from the torques
# that hold it where it begins.


@functools.cache
def arm() -> Problem:
    arm = Arm()
    hold = jax.jit(lambda x0: arm.torques(x0, jnp.zeros(7)))

    def dynamics(np, x, u):
        same = np is jnp
        return arm.dynamics(x, u, 0) if same else load("arm").dynamics(arm, x, u)

    def cost(np, x, u):
        same, weights = np is jnp, arm.weights
        return arm.cost(x, u, 0) if same else load("arm").cost(arm, weights, x, u)

    def terminal_cost(np, x):
        same, weights = np is jnp, arm.terminal_weights
        return arm.terminal_cost(x) if same else load("arm").cost(arm, weights, x)

    return Problem(
        "arm",
        dynamics,
        cost,
        terminal_cost,
        x0=tuple(numpy.array(arm.x0)),
        controls=7,
        horizon=100,
        spread=7 * (0.1,) + 7 * (0.0,),
        hold=lambda x0: hold(jnp.asarray(x0)),
    )


CHAINS = (
    *(chain(14, 3, how) for how in ("arrays", "scalars")),
    *(chain(20, 3, how) for how in ("arrays", "scalars")),
    chain(28, 4),
    chain(40, 5),
)


# For these nothing was ever tuned: neither the library nor their numbers.


# Ten pendulums in a row with twisting springs between them, to rest from any angles.


def pendulums_dynamics(np, x, u):
    q, v = x[:10], x[10:]
    end = np.array([0.0])
    twists = 3.0 * (np.concatenate([q, end]) - np.concatenate([end, q]))
    push = pushing(10, 3) @ u
    a = twists[1:] - twists[:-1] - 9.81 * np.sin(q) - 0.1 * v + push
    return x + 0.03 * np.concatenate([v, a])


def pendulums_cost(np, x, u):
    weights = 10 * (1.0,) + 10 * (0.1,)
    return 0.5 * (squares(np, weights, x) + squares(np, 3 * (0.05,), u))


def pendulums_terminal_cost(np, x):
    return 0.5 * squares(np, 10 * (10.0,) + 10 * (1.0,), x)


# Three drones of 0.5 kg in a plane, neighbors tied by springs of 1 m, to a place beside
# and above. The state is positions, heights, angles and their rates; the controls are
# thrusts less those of hovering, and torques.

DRONES = (-1.0, 0.0, 1.0) + 15 * (0.0,)
DRONES_GOAL = (0.5, 1.5, 2.5) + 3 * (1.0,) + 12 * (0.0,)
DRONES_WEIGHTS = 9 * (1.0,) + 9 * (0.1,)


def drones_dynamics(np, x, u):
    place, height, angle, v = x[:3], x[3:6], x[6:9], x[9:]
    end = np.array([0.0])
    dx, dz = place[1:] - place[:-1], height[1:] - height[:-1]
    length = np.sqrt(dx**2 + dz**2)
    tension = 4.0 * (length - 1.0) / length
    pull_x = np.concatenate([tension * dx, end]) - np.concatenate([end, tension * dx])
    pull_z = np.concatenate([tension * dz, end]) - np.concatenate([end, tension * dz])
    thrust = 0.5 * 9.81 + u[:3]
    ax = (pull_x - thrust * np.sin(angle)) / 0.5
    az = (pull_z + thrust * np.cos(angle)) / 0.5 - 9.81
    return x + 0.03 * np.concatenate([v, ax, az, u[3:] / 0.01])


def drones_cost(np, x, u):
    error = x - np.array(DRONES_GOAL)
    weights = 3 * (0.1,) + 3 * (10.0,)
    return 0.5 * (squares(np, DRONES_WEIGHTS, error) + squares(np, weights, u))


def drones_terminal_cost(np, x):
    weights = tuple(50 * weight for weight in DRONES_WEIGHTS)
    return 0.5 * squares(np, weights, x - np.array(DRONES_GOAL))


# A rod of sixteen cells which react and diffuse, with three heaters, from one of its
# steady states to the other.


def rod_dynamics(np, x, u):
    before, after = np.concatenate([x[:1], x[:-1]]), np.concatenate([x[1:], x[-1:]])
    heat = pushing(16, 3) @ u
    return x + 0.05 * (4.0 * (before - 2.0 * x + after) + x - x**3 + heat)


def rod_cost(np, x, u):
    return 0.5 * (squares(np, 16 * (1.0,), x - 1.0) + squares(np, 3 * (0.1,), u))


def rod_terminal_cost(np, x):
    return 5.0 * squares(np, 16 * (1.0,), x - 1.0)


LARGE_UNSEEN = (
    Problem(
        "pendulums in a row",
        pendulums_dynamics,
        pendulums_cost,
        pendulums_terminal_cost,
        x0=tuple((2 * numpy.sin(1.0 + numpy.arange(10))).round(3)) + 10 * (0.0,),
        controls=3,
        horizon=120,
    ),
    Problem(
        "tied drones",
        drones_dynamics,
        drones_cost,
        drones_terminal_cost,
        x0=DRONES,
        controls=6,
        horizon=100,
    ),
    Problem(
        "reacting rod",
        rod_dynamics,
        rod_cost,
        rod_terminal_cost,
        x0=16 * (-1.0,),
        controls=3,
        horizon=100,
    ),
)


def large() -> tuple[Problem, ...]:
    return *CHAINS, QUADRUPED, arm(), *LARGE_UNSEEN
