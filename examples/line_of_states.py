"""Show a robot the way around a trap.

The straight way to the goal leads into a horseshoe of hills. One point beside them,
joined to start and goal by straight lines, is a first guess of the states, along which
no controls lead.
"""

# %%
import argparse

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a coarse picture, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% The trap
# The robot has two wheels, and can turn on the spot. Its state is the position [m], the
# heading [rad] and the speed [m/s]; its controls are the rate of turn [rad/s] and the
# acceleration [m/s^2]. Time on a hill is expensive, and so is a stop off the goal.
horizon, dt, width = 50, 0.16, 0.45
x0, goal = jnp.zeros(4), jnp.array([5.0, 0.0, 0.0, 0.0])
angles = jnp.deg2rad(jnp.array([-100, -66, -33, 0, 33, 66, 100]))
tops = jnp.stack([1.6 + 1.2 * jnp.cos(angles), 1.2 * jnp.sin(angles)], axis=1)


def hills(place):
    return jnp.sum(jnp.exp(-2 * jnp.sum((place - tops) ** 2, axis=1) / width**2))


def dynamics(x, u, t):
    heading, speed = x[2:]
    forward = jnp.stack([speed * jnp.cos(heading), speed * jnp.sin(heading)])
    return x + dt * jnp.concatenate([forward, u])


def cost(x, u, t):
    return dt * (jnp.sum(u**2) / 4 + 20 * hills(x[:2]))


def terminal_cost(x):
    return 50 * jnp.sum((x - goal) ** 2)


problem = dp.ControlProblem(dynamics, cost, terminal_cost, horizon)

# %% The guess
# Places at equal distances along the way, with the speed that this takes and
# without a thought of headings: these are zero, and so are the controls. What the
# dynamics make of a state is not the next one, and the difference is a gap.
points = np.array([[0.0, 0.0], [1.2, 2.6], [5.0, 0.0]])
ends = np.append(0.0, np.cumsum(np.hypot(*np.diff(points, axis=0).T)))
s = np.linspace(0.0, ends[-1], horizon + 1)
places = [np.interp(s, ends, side) for side in points.T]
guess = np.stack([*places, 0 * s, 0 * s + ends[-1] / (horizon * dt)], axis=1)
us = jnp.zeros((horizon, 2))

# %% Both solves
# From zero controls, and [from states](../starting-from-states.md), `xs=guess`. A step
# of size s leaves 1 - s of each gap.
solutions = {
    "zero controls": dp.solve(problem, dp.DDP(), x0, us),
    "states": dp.solve(problem, dp.DDP(), x0, us, xs=jnp.asarray(guess)),
}
for start, solution in solutions.items():
    steps = int(solution.stats["num_steps"])
    print(f"from {start:14} {steps:3d} iterations to the cost {solution.cost:.4f}")
alone, solution = solutions.values()
gap = solution.history["gap"]
with_gaps = int(np.sum(gap > 0))
print("largest gap:", *(f"{size:.3f}" for size in gap[: with_gaps + 1]))

# %%
# Steps by hand show what lies between guess and solution.
iterates = []
state = dp.init(problem, dp.DDP(), x0, us, xs=jnp.asarray(guess))
while not state.done:
    iterates.append(np.asarray(state.xs))
    state = dp.step(problem, state)

# %% The ways, the cost and the gap
figure = Figure((11.5, 4.8), layout="constrained")
way, *curves = figure.subplot_mosaic("wc;wg", width_ratios=[1.5, 1]).values()
count = 60 if args.fast else 240
grid = np.meshgrid(np.linspace(-0.6, 5.6, count), np.linspace(-1.8, 2.8, count))
height = jax.vmap(jax.vmap(hills))(jnp.stack(grid, axis=-1))
way.contourf(*grid, height, levels=12, cmap="Greys", alpha=0.6)
way.plot(*guess.T[:2], ":", color="0.3", label="guess")
way.plot(*points.T, "o", color="0.3", markersize=5)
for i in range(1, with_gaps):
    shade = dict(color="C1", alpha=0.3 + 0.2 * i)
    way.plot(*iterates[i].T[:2], ".-", markersize=3, linewidth=0.8, **shade)
way.plot([], [], ".-", color="C1", label="iterates with gaps")
way.plot(*np.asarray(solution.xs).T[:2], "C0", linewidth=2.2, label="from states")
way.plot(*np.asarray(alone.xs).T[:2], "C3", label="from zero controls")
way.set(aspect="equal", xlabel="x [m]", ylabel="y [m]")
way.legend(loc="lower right", fontsize="small")
for (start, one), color in zip(solutions.items(), ("C3", "C0")):
    curves[0].semilogy(one.history["cost"], color=color, label=f"from {start}")
curves[0].set(ylabel="cost")
curves[0].legend(frameon=False, fontsize="small")
curves[1].plot(gap, "C0.-")
curves[1].set(xlabel="iteration", ylabel="largest gap")
curves[1].sharex(curves[0])
figure.savefig(args.out / "line_of_states.png", dpi=110)

# ![The guess, iterates with gaps and both solutions; costs and the largest
# gap](line_of_states.png)
#
# From zero controls the way leads over the crest, which is a local minimum. While gaps
# close the cost may rise, as it does here in the third iteration: the cost before was
# that of states which no controls reach.

# %% What must hold, and what to change next
# Put the point below the hills, at `[1.2, -2.6]`, and the robot passes below them.
# [Starting from states](../starting-from-states.md) says what else such a guess may be.
assert alone.success and solution.success and solution.stats["gap"] == 0
assert solution.stats["num_steps"] < alone.stats["num_steps"]
assert solution.cost < 0.25 * alone.cost, "it drives over a hill"
assert max(hills(x[:2]) for x in solution.xs) < 0.1 < max(map(hills, alone.xs[:, :2]))
