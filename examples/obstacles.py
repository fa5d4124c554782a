"""Drive between obstacles.

A car between two obstacles, below a speed limit, to a goal where it stops: all of that
are constraints. Then an obstacle moves, and each solve starts from the one before.
"""

# %%
import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot


try:
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Rectangle
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="few moves, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% The car
# Its state is the position of the rear axle [m], the heading [rad] and the speed [m/s];
# its controls are the angle of the front wheels [rad] and the acceleration [m/s^2]. The
# radii of the obstacles include half of its width. Squares of distances are smooth
# everywhere, distances are not.
#
# What is a cost: to be away from the goal, and to steer or push hard. What is a
# constraint, in [three forms](../constraints.md): the speed has a bound, the car is
# outside of the obstacles, a function that must not be positive, and at the end it
# stands at the goal. Controls have `control_bounds`, which cost next to nothing and are
# never exceeded.
horizon, dt, wheelbase, width, top_speed = 60, 0.1, 0.5, 0.3, 1.5
x0, goal = jnp.zeros(4), jnp.array([4.0, 3.0, 0.0, 0.0])
centers, radii = jnp.array([[1.5, 0.8], [3.0, 2.6]]), jnp.array([0.6, 0.5])
limit = jnp.array([0.5, 1.5])


class Parcours(eqx.Module):
    centers: jax.Array

    def dynamics(self, x, u, t):
        (heading, speed), (angle, acceleration) = x[2:], u
        turn = speed / wheelbase * jnp.tan(angle)
        forward = speed * jnp.cos(heading), speed * jnp.sin(heading)
        return x + dt * jnp.stack([*forward, turn, acceleration])

    def cost(self, x, u, t):
        away = jnp.sum((x[:2] - goal[:2]) ** 2)
        return dt / 2 * (0.1 * away + 2 * u[0] ** 2 + 0.5 * u[1] ** 2)

    def terminal_cost(self, x):
        return jnp.zeros_like(x[0])  # where it ends is a constraint

    def inside(self, x, *_):  # at most 0 outside of the obstacles
        return radii**2 - jnp.sum((x[:2] - self.centers) ** 2, axis=1)


speed = dp.StateBounds(None, jnp.array([jnp.inf] * 3 + [top_speed]), name="speed")
arrive = dp.Equality(lambda x: x - goal, name="arrive")


def problem(centers):
    parcours = Parcours(centers)
    return dp.ControlProblem.from_system(
        parcours,
        horizon,
        control_bounds=(-limit, limit),
        constraints=(dp.Inequality(parcours.inside, name="obstacles"), speed),
        terminal_constraints=arrive,
    )


# %% The solve
# It starts at rest. The first guess drives straight ahead, away from the goal, and past
# the first obstacle to one side. A guess straight at the middle of an obstacle has no
# side to go to, and such a solve may end `infeasible`. The rows of constraints are met
# by multipliers, which a solve with constraints updates a few times; each is what its
# constraint costs, and 0 where it does not matter.
guess = jnp.zeros((horizon, 2)).at[:, 1].set(0.1)
solution = dp.solve(problem(centers), dp.DDP(), x0, guess)
print(solution)
for name, pushes in solution.multipliers.constraints.items():
    num = int((pushes > 1e-6).any(1).sum())
    print(f"{name:9} active at {num:2d} of {horizon} stages")

# The line on constraints says how far they are violated at most, less than 1e-9 here.
# The car drives past the goal and backs up to it, because nothing forbids that.

# %% An obstacle that moves
# The first obstacle moves. Its center is data: a new one compiles nothing. A cold solve
# starts from the first guess, the others from the controls of the solve before them;
# the last one also from its multipliers and penalties, which are in `state`.
before, iterations = solution, []
print("\nobstacle moved     cold   with controls   with controls and state")
for i in range(1, 3 if args.fast else 11):
    there = problem(centers.at[0].add(i * jnp.array([0.0, -0.04])))
    cold = dp.solve(there, dp.DDP(), x0, guess)
    half = dp.solve(there, dp.DDP(), x0, before.us)
    before = dp.solve(there, dp.DDP(), x0, before.us, state=before.state)
    iterations.append([int(s.stats["num_steps"]) for s in (cold, half, before)])
    print("{:11d} cm {:8d} {:15d} {:25d}".format(4 * i, *iterations[-1]))
mean = np.mean(iterations, axis=0)
print("mean      {:12.1f} {:15.1f} {:25.1f}".format(*mean))

# Controls of before save half of the iterations, and multipliers some more.


# %% What it looks like
# The way, and speed and controls with their limits.
def body(x):
    box = dict(facecolor="#a8c8e4", edgecolor="0.3", alpha=0.9, zorder=2)
    turn = dict(angle=np.degrees(x[2]), rotation_point=(x[0], x[1]))
    return Rectangle((x[0] - 0.1, x[1] - width / 2), 0.7, width, **turn, **box)


def draw_obstacles(ax):
    for center, radius in zip(centers, radii):
        ax.add_patch(Circle(center, radius - width / 2, color="0.4"))


xs, us = np.asarray(solution.xs), np.asarray(solution.us)
figure = Figure((11.0, 4.9), layout="constrained")
way, *curves = figure.subplot_mosaic("ws;wt;wa", width_ratios=[1.35, 1]).values()
plot.race(xs, xs[:, 3], ax=way)
draw_obstacles(way)
for i in (0, 11, 20, 29, 38, 60):
    way.add_patch(body(xs[i]))
way.autoscale_view()
names = ["steering [rad]", "acceleration [m/s$^2$]"]
plot.inputs(us, xs[:, 3], dt=dt, names=names, limits=(-limit, limit), ax=curves)
curves[0].axhline(top_speed, color="0.35", linewidth=1.0, linestyle="--")
for ax in curves[:2]:
    ax.sharex(curves[2])
figure.savefig(args.out / "obstacles.png", dpi=110)

# Radii include half of the car's width, so that its body touches the obstacles as they
# are drawn.
#
# ![The way of the car, its speed and its controls](obstacles.png)

# %%
# The drive as an animation.
ax = Figure((5.6, 4.4), layout="constrained").subplots()
ax.set(aspect="equal", xlim=(-0.4, 5.0), ylim=(-0.5, 3.5), xlabel="x [m]")
draw_obstacles(ax)
(trace,) = ax.plot([], [], color="C3", zorder=3)
writer = PillowWriter(fps=10)
with writer.saving(ax.figure, str(args.out / "obstacles.gif"), dpi=75):
    for i in [*range(horizon + 1), *[horizon] * 10]:
        trace.set_data(*xs[: i + 1, :2].T)
        car = ax.add_patch(body(xs[i]))
        ax.set_title(f"{i * dt:.1f} s, {xs[i, 3]:+.1f} m/s")
        writer.grab_frame()
        car.remove()

# ![The car drives between the obstacles](obstacles.gif)

# %% What must hold, and what to change next
# - Another goal or other centers are numbers: they compile nothing.
# - A speed limit of 0.5 m/s leaves no time to arrive: what does the result say, and
#   about which constraint?
# - [A controller](mpc_car.md) does this at every tick.
away = np.linalg.norm(xs[:, None, :2] - centers, axis=2)
assert np.all(away > radii - 1e-6), "the car is inside of an obstacle"
assert np.allclose(xs[-1], goal, atol=1e-6), "the car does not arrive"
assert xs[:, 3].max() < top_speed + 1e-6 and np.all(abs(us) <= limit)
assert mean[2] < mean[0]
