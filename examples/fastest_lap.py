"""The fastest lap of a circuit.

Minimum time over a whole lap is one problem: the borders of the track, the grip of the
tires and the power of the engine are constraints. The circuit comes from a CSV file.
"""

# %%
# It needs a circuit, `--track FILE.csv`. Without one it takes `examples/circuit.csv`.
import argparse
import dataclasses
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot
from diffprog.systems import Track


here = pathlib.Path(__file__).parent
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--track", type=pathlib.Path, default=here / "circuit.csv")
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="long stages, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% The circuit
# Each line of the file is a point of the center line and the distances from it to both
# borders, `x_m,y_m,w_tr_right_m,w_tr_left_m`, in meters: the format of public databases
# of race tracks. What is wrong with a file is said in one sentence, with its line.
try:
    track = Track.from_csv(args.track)
except (OSError, ValueError) as error:
    raise SystemExit(f"No circuit from {args.track}: {error}") from None
stages = round(track.length / (10.0 if args.fast else 5.0))
step = track.length / stages
print(f"{track.length:.1f} m in {stages} stages of {step:.2f} m")

# %%
# Time is what we look for, so it is not what we count in: a stage is a piece of the
# center line, and the time that it takes is its cost. The problem needs to know the
# curvature of the track and its widths, in the middle of each stage. It goes on for
# 100 m beyond the line: nothing follows the end of a plan, so it may end in a wall.
planned = stages + round(100.0 / step)
middles = step * (jnp.arange(planned) + 0.5)
curvature = jax.vmap(jax.grad(track.heading))(middles)
left, right = track.half_widths(middles)


# %% The car
# The state: how far the car is to the left of the center line [m], its heading relative
# to that [rad], its speed [m/s], and the curvature of its path [1/m]. The controls:
# acceleration, as a share of the grip, and how fast the curvature changes along the
# track, as a share of the fastest. Well-scaled controls are near 1; damping treats them
# alike.
#
# Each number is a field, so that another one is another problem for the same program.
# The constraints are methods that return what must not be positive.
class Lap(eqx.Module):
    curvature: jax.Array
    left: jax.Array  # how far the middle of the car may be from the center line [m]
    right: jax.Array
    grip: float = 12.0  # [m/s^2]
    power: float = 250.0  # by mass [W/kg]
    steer: float = 4e-3  # [1/m^2]
    haste: float = 1e-3

    def slope(self, x, u, t):  # by the length of the center line
        side, heading, speed, bend = x
        length = (1 - side * self.curvature[t]) / jnp.cos(heading)
        turn = length * bend - self.curvature[t]
        push, steer = self.grip * u[0], self.steer * u[1]
        climb = length * jnp.sin(heading)
        return jnp.stack([climb, turn, length * push / speed, steer])

    def dynamics(self, x, u, t):
        half = x + step / 2 * self.slope(x, u, t)
        return x + step * self.slope(half, u, t)

    def cost(self, x, u, t):  # the time, and a little for hasty hands and feet
        length = (1 - x[0] * self.curvature[t]) / jnp.cos(x[1])
        return step * (length / x[2] + self.haste * u @ u)

    def terminal_cost(self, x):
        return jnp.zeros_like(x[0])

    def borders(self, x, u, t):
        return jnp.stack([x[0] - self.left[t], -x[0] - self.right[t]])

    def tires(self, x, u, t):  # a circle of accelerations, at most 0 inside of it
        sideways = x[2] ** 2 * x[3] / self.grip
        return (u[0] ** 2 + sideways**2 - 1)[None]

    def engine(self, x, u, t):
        return (self.grip * u[0] * x[2] / self.power - 1)[None]


def problem(lap):
    rows = dict(borders=lap.borders, tires=lap.tires, engine=lap.engine)
    rows = [dp.Inequality(row, name=name) for name, row in rows.items()]
    bounds = -jnp.ones(2), jnp.ones(2)
    return dp.ControlProblem.from_system(lap, planned, bounds, rows)


# %% The first lap
# It begins with a guess of the states: along the center line at 12 m/s, slow and far
# from any limit. No controls need to be known that drive so, since [a solve from
# states](../starting-from-states.md) closes the gaps. The penalty of the first round is
# small; with a large one the car is held to the borders before it knows how to drive.
def solve(lap, x0, us, **start):
    outer = dp.AugmentedLagrangian(penalty=1.0)
    found = dp.solve(
        problem(lap), dp.DDP(), x0, us, outer=outer, max_steps=600, **start
    )
    length = (1 - found.xs[:-1, 0] * curvature) / jnp.cos(found.xs[:-1, 1])
    return found, float(jnp.sum((step * length / found.xs[:-1, 2])[:stages]))


car = 1.0  # half of its width [m]
lap = Lap(curvature, left - car, right - car)
x0 = jnp.array([0.0, 0.0, 12.0, curvature[0]])
guess = jnp.tile(x0, (planned + 1, 1)).at[:-1, 3].set(curvature)
first, seconds = solve(lap, x0, jnp.zeros((planned, 2)), xs=guess)
print(first)
print(f"from a slow start: {seconds:.2f} s")

# The cost is the time, and a little for hasty hands and feet.

# %% The flying lap
# A lap that begins as the first one crossed the line, from its controls. For comparison
# the first lap in a lane of 10 cm on either side of the center line. Both are other
# numbers for the program that is compiled already.
flying, best = solve(lap, first.xs[stages], first.us, xs=first.xs)
lane = dataclasses.replace(lap, left=0 * left + 0.1, right=0 * right + 0.1)
middle, slow = solve(lane, x0, first.us, xs=first.xs)
print(f"flying: {best:.2f} s; near the center line, from the start: {slow:.2f} s")
for name, pushes in flying.multipliers.constraints.items():
    share = float(jnp.mean(jnp.any(pushes > 1e-6, axis=1)))
    print(f"{name:8} active in {100 * share:.0f} % of the stages")

# The tires are at their limit nearly everywhere, as those of a racing driver are.

# %% What it looks like
# Points of the plane again: from the center line to the left.
s = step * jnp.arange(stages + 1)
xs, us = np.asarray(flying.xs)[: stages + 1], np.asarray(flying.us)[:stages]
places = np.asarray(track.center(s) - xs[:, :1] * track.normal(s))
ax = plot.race(places, xs[:, 2], track)
ax.figure.savefig(args.out / "fastest_lap.png", dpi=110)

# From outside to inside to outside, as it is taught, and nobody told it to.
#
# ![The flying lap between the borders, colored by its speed](fastest_lap.png)

# %%
# Over the way: it brakes into corners while it turns in, within the circle of grip.
sideways = xs[:-1, 2] ** 2 * xs[:-1, 3] / lap.grip
axes = plot.inputs(
    np.stack([us[:, 0], sideways, us[:, 1]], axis=1), xs[:, 2], dt=step,
    names=["push [grip]", "sideways [grip]", "steering [share]"],
    limits=(-np.ones(3), np.ones(3)),
)  # fmt: skip
axes[-1].set_xlabel("way along the center line [m]")
axes[0].figure.savefig(args.out / "fastest_lap_inputs.png", dpi=110)

# ![Speed, push, sideways acceleration and steering along the
# lap](fastest_lap_inputs.png)

# %% What must hold, and what to change next
# - `python examples/fastest_lap.py --track FILE.csv`: your circuit. Others take other
#   stages; keep them shorter than the tightest corner.
# - `dataclasses.replace(lap, grip=18.0)`: what do better tires gain? With [a
#   derivative](../gradients.md) the answer is one call, seconds for each m/s^2.
# - The car here is a point with a heading. [The car race](../examples.md#the-car-race)
#   drives a dynamic bicycle with tire forces, by a receding horizon.
assert first.success and flying.success and middle.success
assert best < seconds < slow
for row in (lap.borders, lap.tires, lap.engine):
    assert np.max(jax.vmap(row)(xs[:-1], us, np.arange(stages))) < 1e-6
