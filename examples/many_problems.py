"""A thousand problems at once.

Pendulums of different masses, from different starts: one call solves them all, each
with numbers of its own, and says how each of them went.
"""

# %%
import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog.systems import Pendulum


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="few pendulums, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% The numbers
# A grid of masses and of angles at the start, at rest. The motor has the limit of 6 N
# m, which holds 1 kg at 37 degrees and no higher: it has to swing.
shape = (6, 5) if args.fast else (40, 25)
angles, masses = np.meshgrid(
    np.linspace(-2.0, 2.0, shape[0]), np.linspace(0.5, 2.0, shape[1])
)
count, horizon, limit = angles.size, 60, 6.0
x0s = jnp.stack([angles.ravel(), np.zeros(count)], axis=1)
uss = jnp.full((count, horizon, 1), 0.1)

# %% A problem for each mass
# A problem is written as for one pendulum. Where a number differs from pendulum to
# pendulum it is an array with a row for each, and `in_axes` says where: a tree like the
# problem, or like its upper part, of axes and `None`.


def pendulums(mass):
    system = Pendulum(mass=mass, dt=0.04, control_weight=1e-3, method="midpoint")
    return dp.ControlProblem.from_system(system, horizon, (-limit, limit))


problems = pendulums(jnp.asarray(masses.ravel()))
axes = jax.tree.map(lambda leaf: 0 if np.ndim(leaf) else None, problems)

# %% One call
# All problems run in one program: one after another on a CPU, all at once on a GPU.


def solve(problems, x0s, uss):
    options = dict(in_axes=axes, max_steps=500)
    found = dp.solve_batch(problems, dp.DDP(), x0s, uss, **options)
    return jax.block_until_ready(found)


solve(problems, x0s, uss)  # compiles
start = time.perf_counter()
solutions = solve(problems, x0s, uss)
each = 1e3 * (time.perf_counter() - start) / count
print(solutions)
print(f"one call: {each:.3f} ms for each of {count} problems")

# Nothing is raised for a problem that fails: `solutions.result` has a code for each.
# All arrays have the problem as their first axis, and `solutions[7]` is one of them.

# %% Against a loop
# A loop of Python solves twenty of them by [`dp.solve`][diffprog.solve]. New masses
# compile nothing, so that what differs is the way through Python, which each problem
# pays. The solutions are the same.
some = np.arange(0, count, max(count // 20, 1))


def alone(i):
    problem = pendulums(float(masses.ravel()[i]))
    options = dict(max_steps=500, history=False, throw=False)
    return jax.block_until_ready(dp.solve(problem, dp.DDP(), x0s[i], uss[i], **options))


alone(0)  # compiles
start = time.perf_counter()
looped = [alone(i) for i in some]
each = 1e3 * (time.perf_counter() - start) / len(some)
print(f"a loop:   {each:.3f} ms for each of {len(some)} problems")

# This run shared its core with other programs; alone on one the times were 0.08 and 1.3
# ms.

# %% Three guesses for each
# A solve finds a minimum that is near its guess. Swings to the left and to the right
# are two more guesses, and the best of three is taken: each a row of a batch again.
swing = limit * np.sin(np.linspace(0.0, 8.0, horizon))[:, None]
guesses = jnp.concatenate([uss, 0 * uss + swing, 0 * uss - swing])
tripled = pendulums(jnp.tile(problems.system.mass, 3))
tries = solve(tripled, jnp.tile(x0s, (3, 1)), guesses)
best = np.asarray(tries.cost).reshape(3, count).argmin(0) * count + np.arange(count)
ends = {"one guess": solutions.xs[:, -1, 0], "the best of three": tries.xs[best, -1, 0]}
for name, angle in ends.items():
    up = np.mean(np.abs(np.asarray(angle) - np.pi) < 0.2)
    print(f"{name:17} {100 * up:.0f} % end within 0.2 rad of upright")

# %% What it looks like
figure = Figure((11.0, 4.2), layout="constrained")
plots = figure.subplots(1, 2, sharey=True)
for ax, (name, angle) in zip(plots, ends.items(), strict=True):
    away = np.abs(np.asarray(angle) - np.pi).reshape(angles.shape)
    colors = ax.pcolormesh(angles, masses, away, cmap="viridis", vmin=0, vmax=np.pi)
    ax.set(xlabel="angle at the start [rad]", title=name)
plots[0].set_ylabel("mass [kg]")
figure.colorbar(colors, ax=plots, label="from upright at the end [rad]")
figure.savefig(args.out / "many_problems.png", dpi=110)

# Where it is dark the pendulum stands, nearly. Sharp edges are where a guess leads to
# another minimum, and islands on the right show that three guesses are not enough
# everywhere; more rows are cheap.
#
# ![How far from upright pendulums end, over angle and mass, for one guess and for
# three](many_problems.png)

# %% What must hold, and what to change next
# - Starts, guesses and any number of the problem may differ: limits too, with
#   `in_axes`, as in [several devices](many_devices.md).
# - `batch_size=100` bounds the memory, `history=True` records each iteration of each.
# - Derivatives go through the batch, as [here](learn_from_demonstrations.md).
assert np.all(solutions.success) and np.all(tries.success)
assert np.all(tries.cost[best] <= solutions.cost + 1e-9)
assert np.all(np.abs(tries.us) <= limit)
for i, one in zip(some, looped, strict=True):
    assert np.allclose(solutions.us[i], one.us, atol=1e-6), "the batch differs"
