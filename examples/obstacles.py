"""A car drives between two obstacles, below a speed limit, and stops at the goal.

Then an obstacle moves a little at a time, and each solve starts from the one before.
"""

# %%
import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import diffprog as dp
from diffprog import plot


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default="out", help="for the pictures")
parser.add_argument("--fast", action="store_true", help="few moves, as a test")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_enable_x64", True)

# %%
# The car. Its state is the position of the middle of the rear axle [m], the heading
# [rad] and the speed [m/s]; its controls are the angle of the front wheels [rad] and
# the acceleration [m/s^2]. The radii of the obstacles include half of its width.
# Squares of distances are smooth everywhere, distances are not.
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

    def missed(self, x):
        return x - goal


def problem(centers):
    parcours = Parcours(centers)
    fastest = jnp.array([jnp.inf, jnp.inf, jnp.inf, top_speed])
    return dp.ControlProblem.from_system(
        parcours,
        horizon,
        control_bounds=(-limit, limit),
        constraints=(
            dp.Inequality(parcours.inside, name="obstacles"),
            dp.StateBounds(None, fastest, name="speed"),
        ),
        terminal_constraints=dp.Equality(parcours.missed, name="arrive"),
    )


# %%
# It starts at rest. The first guess drives straight ahead, away from the goal.
guess = jnp.zeros((horizon, 2)).at[:, 1].set(0.1)
solution = dp.solve(problem(centers), dp.DDP(), x0, guess)
print(solution)
for name, pushes in solution.multipliers.constraints.items():
    num = int((pushes > 1e-6).any(1).sum())
    print(f"{name:9} active at {num:2d} of {horizon} stages")

# %%
# The first obstacle moves. Its center is data: a new one compiles nothing. A cold solve
# starts from the first guess, the others from the controls of the solve before them;
# the last one also from its multipliers and penalties, which are in `state`.
labels = "cold", "with controls", "with controls and state"
before, moved, iterations = solution, [], []
print("\nobstacle moved     {}   {}   {}".format(*labels))
for i in range(1, 3 if args.fast else 11):
    there = problem(centers.at[0].add(i * jnp.array([0.0, -0.04])))
    cold = dp.solve(there, dp.DDP(), x0, guess)
    half = dp.solve(there, dp.DDP(), x0, before.us)
    before = dp.solve(there, dp.DDP(), x0, before.us, state=before.state)
    moved.append((there.system.centers, np.asarray(before.xs)))
    iterations.append([int(s.stats["num_steps"]) for s in (cold, half, before)])
    print("{:11d} cm {:8d} {:15d} {:25d}".format(4 * i, *iterations[-1]))
iterations = np.array(iterations)
print("mean      {:12.1f} {:15.1f} {:25.1f}".format(*iterations.mean(0)))


# %%
# Pictures: the way, speed and controls with their limits.
def draw(ax, x, angle):
    """The body, and the wheels, of which those in front are turned."""
    wheels = [(at, left, 0.17, 0.06) for at in (0, wheelbase) for left in (-0.12, 0.12)]
    patches = []
    for ahead, left, length, wide in [(0.25, 0.0, 0.7, width), *wheels]:
        box = np.array([length, 1j * wide]) / 2 @ [[1, 1, -1, -1], [1, -1, -1, 1]]
        box = ahead + 1j * left + np.exp(1j * angle * (ahead == wheelbase)) * box
        box = x[0] + 1j * x[1] + np.exp(1j * x[2]) * box
        patches += ax.fill(box.real, box.imag, color="0.15", zorder=2)
    patches[0].set(facecolor="#a8c8e4", edgecolor="0.3")
    return patches


def draw_obstacles(ax, centers, **options):
    for center, radius in zip(np.asarray(centers), np.asarray(radii)):
        ax.add_patch(Circle(center, radius - width / 2, **options))


xs, us = np.asarray(solution.xs), np.asarray(solution.us)
angles = np.append(us[:, 0], us[-1, 0])
figure = Figure((11.0, 4.9), layout="constrained")
axes = figure.subplot_mosaic("ws;wt;wa", width_ratios=[1.35, 1])
way, curves = axes.pop("w"), list(axes.values())
plot.race(xs, xs[:, 3], ax=way)
draw_obstacles(way, centers, color="0.4")
for i in (0, 11, 20, 29, 38, 60):
    draw(way, xs[i], angles[i])
names = ["steering [rad]", "acceleration [m/s$^2$]"]
plot.inputs(us, xs[:, 3], dt=dt, names=names, limits=(-limit, limit), ax=curves)
curves[0].axhline(top_speed, color="0.35", linewidth=1.0, linestyle="--")
curves[0].sharex(curves[2])
curves[1].sharex(curves[2])
figure.savefig(args.out / "obstacles.png", dpi=110)

# %%
# How the iterations go, and what a warm start saves.
figure = Figure((11.0, 3.6), layout="constrained")
axes = figure.subplot_mosaic("cpn;vpn", width_ratios=[1, 1.1, 1])
axes["c"].plot(solution.history["cost"])
axes["v"].semilogy(solution.history["violation"], color="C3")
for ax in axes.values():
    ax.spines[["top", "right"]].set_visible(False)
for i, (places, path) in enumerate(moved):
    shade = 0.25 + 0.75 * i / len(moved)
    draw_obstacles(axes["p"], places, edgecolor="0.3", fill=False, alpha=shade)
    axes["p"].plot(*path[:, :2].T, color="C0", alpha=shade)
for k, (label, color) in enumerate(zip(labels, ["0.7", "C1", "C0"])):
    steps = 4 * np.arange(1, 1 + len(moved)) + k - 1
    axes["n"].bar(steps, iterations[:, k], label=label, color=color)
axes["n"].legend(frameon=False, loc="upper left")
top = 1.35 * iterations.max()
axes["n"].set(xlabel="moved by [cm]", ylabel="iterations", ylim=(0, top))
axes["c"].set(ylabel="cost")
axes["v"].set(xlabel="iteration", ylabel="violation")
axes["p"].set(aspect="equal", xlabel="x [m]", ylabel="y [m]")
figure.savefig(args.out / "obstacles_moved.png", dpi=110)

# %%
# The drive as an animation.
ax = Figure((5.6, 4.4), layout="constrained").subplots()
ax.set(aspect="equal", xlim=(-0.4, 5.0), ylim=(-0.5, 3.5), xlabel="x [m]")
draw_obstacles(ax, centers, color="0.4")
(trace,) = ax.plot([], [], color="C3", zorder=3)
writer = PillowWriter(fps=10)
with writer.saving(ax.figure, str(args.out / "obstacles.gif"), dpi=75):
    for i in [*range(horizon + 1), *[horizon] * 10]:
        trace.set_data(*xs[: i + 1, :2].T)
        patches = draw(ax, xs[i], angles[i])
        ax.set_title(f"{i * dt:.1f} s, {xs[i, 3]:+.1f} m/s")
        writer.grab_frame()
        for patch in patches:
            patch.remove()

# %%
# What must hold.
away = np.linalg.norm(xs[:, None, :2] - centers, axis=2)
assert np.all(away > radii - 1e-6), "the car is inside of an obstacle"
assert np.allclose(xs[-1], goal, atol=1e-6), "the car does not arrive"
assert xs[:, 3].max() < top_speed + 1e-6 and np.all(abs(us) <= limit)
assert iterations[:, 2].mean() < iterations[:, 0].mean()
