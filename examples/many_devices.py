"""Several devices.

A thousand pendulums of different masses and motors, split over eight devices. These
stand for GPUs: here they are threads on the cores of one CPU.
"""

# %%
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np


# JAX learns how many devices there are before anything else.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import diffprog as dp  # noqa: E402
from diffprog.systems import Pendulum  # noqa: E402


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="few pendulums, as a test")
args = parser.parse_args()

# %% The problems
# As in [a thousand problems at once](many_problems.md), one row of numbers for each:
# its mass [kg] and the limit of its torque [N m]. Weights and the length of the rod are
# shared.
shape = (8, 5) if args.fast else (40, 25)
grid = jnp.meshgrid(jnp.linspace(0.5, 2.0, shape[0]), jnp.linspace(3.0, 12.0, shape[1]))
masses, limits = (numbers.ravel() for numbers in grid)
horizon, dt = 60, 0.04


def pendulums(mass, limit):
    pendulum = Pendulum(mass=mass, dt=dt, control_weight=1e-4, method="midpoint")
    return dp.ControlProblem.from_system(pendulum, horizon, (-limit, limit))


problems = pendulums(masses, limits[:, None])
count = len(masses)
x0s, guesses = jnp.zeros((count, 2)), jnp.full((count, horizon, 1), 0.1)

# %% The mesh
# It is all that is new. Neighbors differ little, so that the pendulums are dealt out
# like cards: each device gets light ones and heavy ones.
mesh = jax.make_mesh((jax.device_count(),), ("pendulums",))
dealt = jnp.argsort(jnp.arange(count) % mesh.size, stable=True)
rows = lambda tree: jax.tree.map(lambda leaf: leaf[dealt], tree)
numbers = lambda p: (p.system.mass, p.control_bounds)
dealt_problems = eqx.tree_at(numbers, problems, rows(numbers(problems)))
axes = eqx.tree_at(
    numbers, jax.tree.map(lambda _: None, problems), (0, (0, 0)),
    is_leaf=lambda axis: axis is None,
)  # fmt: skip
options = dict(in_axes=axes, search=dp.Backtracking(), max_steps=500)


def solve(mesh):
    given = dealt_problems, dp.DDP(), rows(x0s), rows(guesses)
    return jax.block_until_ready(dp.solve_batch(*given, mesh=mesh, **options))


for where, chosen in {"one device": None, "eight devices": mesh}.items():
    solve(chosen)  # compiles
    start = time.perf_counter()
    solutions = solve(chosen)
    print(f"{where:14} {time.perf_counter() - start:5.2f} s for {count} problems")
print(solutions)
places = {
    shard.device.id: shard.data.shape for shard in solutions.us.addressable_shards
}
print("rows of us on each device:", set(places.values()))

# Eight threads that share a core gain nothing, eight GPUs much: no device waits for
# another, since nothing is exchanged. What a device has solved stays there.

# %% What it looks like
# Back in the order of the grid. A strong motor brings its pendulum to the top in time,
# and a weak one as high as it can.
order = np.argsort(dealt)
angles = np.asarray(solutions.xs[..., 0])[order]
us = np.asarray(solutions.us[..., 0])[order]
ends = np.rad2deg(angles[:, -1])
owner = np.empty(count, int)
owner[dealt] = np.repeat(np.arange(mesh.size), count // mesh.size)

figure = Figure((11.0, 4.2), layout="constrained")
left, right = figure.subplots(1, 2)
square = lambda numbers: numbers.reshape(shape[::-1])
colors = left.pcolormesh(square(masses), square(limits), square(ends), cmap="viridis")
lines = left.contour(
    square(masses), square(limits), square(ends), (60, 90, 120, 150), colors="w"
)
left.clabel(lines, fmt="%d°")
figure.colorbar(colors, ax=left, label="angle at the end [degrees]; 180 is upright")
left.set(xlabel="mass [kg]", ylabel="limit of the torque [N m]")
left.set_title(f"{count} problems, {mesh.size} devices")
for i in range(0, count, max(count // 40, 1)):
    right.plot(dt * np.arange(horizon + 1), angles[i], color=f"C{owner[i]}", lw=0.8)
right.axhline(np.pi, color="0.3", linestyle="--", linewidth=1.0)
right.set(xlabel="time [s]", ylabel="angle [rad]")
right.set_title("some of them, in the color of their device")
figure.savefig(args.out / "many_devices.png", dpi=110)

# ![How far up pendulums of different masses and motors get, and the motion of some of
# them](many_devices.png)

# %% What must hold, and what to change next
# - On a machine with GPUs leave `jax_num_cpu_devices` out.
# - `batch_size=16` bounds the memory of each device.
# - [Several devices](../several-devices.md) has derivatives, and several hosts.
some = [0, count // 2, count - 1]
for i in some:
    alone = dp.solve(
        pendulums(masses[i], limits[i, None]), dp.DDP(), x0s[i], guesses[i],
        max_steps=500, throw=False,
    )  # fmt: skip
    assert np.allclose(us[i], alone.us[:, 0], atol=1e-6), "the mesh changes a solution"
assert np.all(solutions.success)
assert np.any(ends > 175) and np.any(ends < 120)
assert np.all(np.abs(us) <= np.asarray(limits)[:, None])
