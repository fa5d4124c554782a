"""Park a car whose controls have limits.

A car drives into its place, as fast as its steering and its acceleration let it: both
are at a limit most of the time. The limits come with the system, and every iterate
keeps them.
"""

# %%
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot


try:
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a short horizon, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)


# %% The car
# It is that of Tassa, Mansard and Todorov, "Control-Limited Differential Dynamic
# Programming", 2014. Its state is the position of the middle of the rear axle [m], the
# heading [rad] and the speed of the front wheels [m/s]; its controls are their angle
# [rad] and their acceleration [m/s^2]. It shall stand at the origin, along x. The
# limits of the controls are `control_bounds`: `from_system` finds them by this name.
def smooth_abs(z, width):
    return jnp.sqrt(z**2 + width**2) - width


class Parking(eqx.Module):
    dt: float = 0.03
    wheelbase: float = 2.0
    limits: tuple[float, float] = (0.5, 2.0)

    @property
    def control_bounds(self):
        upper = jnp.stack(self.limits)
        return -upper, upper

    def dynamics(self, x, u, t):
        (angle, acceleration), (heading, speed) = u, x[2:]
        front = self.dt * speed
        side = front * jnp.sin(angle)
        back = self.wheelbase - jnp.sqrt(self.wheelbase**2 - side**2)
        back += front * jnp.cos(angle)
        step = back * jnp.cos(heading), back * jnp.sin(heading)
        turn = jnp.arcsin(side / self.wheelbase)
        return x + jnp.stack([*step, turn, self.dt * acceleration])

    def cost(self, x, u, t):
        near = smooth_abs(x[:2], 0.1)
        return 0.01 * (u[0] ** 2 + 0.01 * u[1] ** 2) + 0.001 * jnp.sum(near)

    def terminal_cost(self, x):
        weights, widths = jnp.array([[0.1, 0.1, 1.0, 0.3], [0.01, 0.01, 0.01, 1.0]])
        return weights @ smooth_abs(x, widths)


# %% The solve
# The car stands across its place; the first guess are small waves of both controls.
# The second call does not compile.
horizon, max_steps = (50, 20) if args.fast else (500, 400)
car = Parking()
problem = dp.ControlProblem.from_system(car, horizon)
x0 = jnp.array([1.0, 1.0, 1.5 * jnp.pi, 0.0])
t = jnp.arange(horizon)
guess = 0.1 * jnp.stack([jnp.sin(0.7 * t), jnp.cos(1.3 * t)], axis=1)
for _ in range(2):
    start = time.perf_counter()
    solution = dp.solve(problem, dp.DDP(), x0, guess, max_steps=max_steps)
    jax.block_until_ready(solution)
    seconds = time.perf_counter() - start
print(solution)
lower, upper = map(np.asarray, problem.control_bounds)
xs, us = np.asarray(solution.xs), np.asarray(solution.us)
held = (us == lower) | (us == upper)
multipliers = np.maximum(solution.multipliers.lower, solution.multipliers.upper)
print(f"{seconds * 1e3:.0f} ms, {held.sum()} of {held.size} controls at a limit")
print(f"largest multiplier of a limit {multipliers.max():.6f}")
x, y, heading, speed = xs[-1]
print(f"left at the end: {np.hypot(x, y):.3f} m, {heading:.4f} rad, {speed:.3f} m/s")

# A multiplier is the rate at which the cost falls where its limit gives way. [Limits of
# the controls](../limits.md) explains how DDP keeps them at each of the 500 stages.


# %% The way of the car, and its controls
def parts(x, angle):
    """The corners of the body and of the wheels, of which those in front are turned."""
    boxes = [(1.0, 0.0, 3.0, 1.4, 0.0)]  # ahead, to the left, length, width, turned
    for ahead, turned in ((0.0, 0.0), (car.wheelbase, angle)):
        boxes += [(ahead, left, 0.5, 0.2, turned) for left in (-0.6, 0.6)]
    for ahead, left, length, width, turned in boxes:
        corners = np.array([[1, 1, -1, -1], [1, -1, -1, 1]])
        corners = np.array([length, 1j * width]) / 2 @ corners
        corners = ahead + 1j * left + np.exp(1j * turned) * corners
        corners = x[0] + 1j * x[1] + np.exp(1j * x[2]) * corners
        yield corners.real, corners.imag


def draw(ax, x, angle, **options):
    return [ax.fill(*part, **options)[0] for part in parts(x, angle)]


place = dict(facecolor="C2", alpha=0.3, zorder=0)
angles = np.append(us[:, 0], us[-1, 0])
figure = Figure((10.5, 4.8), layout="constrained")
way, *rows = figure.subplot_mosaic("wa;wb", width_ratios=[1, 1.4]).values()
plot.race(xs, xs[:, 3], ax=way)
way.fill(*next(parts(0 * xs[0], 0.0)), **place)
for i in range(0, horizon + 1, horizon // 5):
    shade = str(0.75 * (1 - i / horizon))
    draw(way, xs[i], angles[i], fill=False, edgecolor=shade, linewidth=0.8)
names = ["angle [rad]", "acceleration [m/s$^2$]"]
plot.inputs(us, dt=car.dt, names=names, limits=(lower, upper), ax=rows)
rows[0].sharex(rows[1])
figure.savefig(args.out / "parking.png", dpi=110)

# ![The way of the car, its steering and its acceleration](parking.png)
#
# The controls are flat where they are at a limit, and the car changes its direction
# four times.

# %%
# The same as an animation.
ax = Figure((4.2, 4.6), layout="constrained").subplots()
ax.set(aspect="equal", xlim=(-4.0, 6.0), ylim=(-4.3, 6.3), xlabel="x [m]")
ax.fill(*next(parts(0 * xs[0], 0.0)), **place)
patches = draw(ax, xs[0], 0.0, color="0.2")
patches[0].set(color="C0", alpha=0.7)
writer = PillowWriter(fps=15)
with writer.saving(ax.figure, str(args.out / "parking.gif"), dpi=75):
    for i in [*range(0, horizon, 5), *[horizon] * 15]:
        for patch, part in zip(patches, parts(xs[i], angles[i])):
            patch.set_xy(np.stack(part, axis=1))
        ax.set_title(f"{i * car.dt:.1f} s, {xs[i, 3]:+.1f} m/s")
        writer.grab_frame()

# ![The car drives into its place](parking.gif)

# %% What must hold, and what to change next
# The problem has several local minima, and another guess may end in another one; [the
# benchmarks](../benchmarks-limits.md) show where other solvers end. Widen `limits` to
# see what they cost.
assert np.all(us >= lower) and np.all(us <= upper)
assert solution.success and solution.cost < solution.history["cost"][0]
if not args.fast:
    assert held.mean() > 0.5
    assert np.hypot(x, y) < 0.05 and abs(heading) < 0.01 and abs(speed) < 0.05
