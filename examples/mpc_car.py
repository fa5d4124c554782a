"""Race by a receding horizon.

At every tick the car plans 40 stages ahead, drives one of them, and plans again. The
borders of the track and an obstacle on its line are constraints, inputs have limits.
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
from diffprog.systems import Race, Track


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)
horizon = 40
ticks = 10 if args.fast else 190


# %% The race
# A car of 1:43 on its track, a dynamic bicycle with tire forces. The cost wants
# progress at 3 m/s, and little holds the car to the middle; borders are constraints,
# and so is a round obstacle. Where the obstacle is are numbers of the problem, so that
# it could move.
class Course(eqx.Module):
    race: Race
    place: jax.Array
    radius: float = 0.1

    def dynamics(self, x, u, t):
        return self.race.dynamics(x, u, t)

    def cost(self, x, u, t):
        return self.race.cost(x, u, t)

    def terminal_cost(self, x):
        return self.race.terminal_cost(x)

    @property
    def control_bounds(self):
        return self.race.control_bounds

    def borders(self, x, *_):
        return self.race.borders(x)

    def obstacle(self, x, *_):
        """How far the car is inside, relative to the radius."""
        return 1 - jnp.sum((x[:2] - self.place) ** 2) / self.radius**2


track = Track.simple()
race = Race.miniature(track, squashed=False)
race = eqx.tree_at(lambda r: (r.q_contour, r.q_border), race, (1e-3, 0.0))


def make(place):
    course = Course(race, place)
    rows = (
        dp.Inequality(course.borders, name="borders"),
        dp.Inequality(course.obstacle, name="obstacle"),
    )
    return dp.ControlProblem.from_system(
        course, horizon, constraints=rows, terminal_constraints=rows
    )


# %% The controller
# [`dp.MPC`][diffprog.MPC] keeps a plan. Each call takes the state that was measured,
# moves the plan by one stage, improves it by three iterations, and returns the control
# of now. Multipliers of the constraints move along with the plan. The work of a tick is
# fixed, and so is its time, nearly: no loop waits for convergence.
#
# Rows that depend on the state alone are not held against the state of now.
place = track.center(0.45 * track.length) + jnp.array([0.02, 0.0])
problem = make(place)
controller = dp.MPC(problem, dp.ILQR(), iterations=3)
state = controller.init(race.x0)
jax.block_until_ready(controller(race.x0, state))  # compiles
step = jax.jit(lambda x, u: race.dynamics(x, u, 0))
x, xs, us, times, violations = race.x0, [race.x0], [], [], []
for tick in range(ticks):
    start = time.perf_counter()
    u, state = jax.block_until_ready(controller(x, state))
    times.append(1e3 * (time.perf_counter() - start))
    x = step(x, u)
    xs.append(np.asarray(x))
    us.append(np.asarray(u))
    violations.append(float(state.violation))
xs, us = np.stack(xs), np.stack(us)
speed = np.hypot(xs[:, 3], xs[:, 4])
margins = np.asarray(jax.vmap(race.border_margin)(xs))
distance = np.linalg.norm(xs[:, :2] - np.asarray(place), axis=1)
lower, upper = map(np.asarray, race.control_bounds)
percentiles = np.percentile(times, [50, 90, 99])
print("a tick takes {:.2f} / {:.2f} / {:.2f} ms (50, 90, 99 %)".format(*percentiles))
print(f"{xs[-1, -2] / track.length:.2f} laps, mean speed {speed.mean():.2f} m/s")
print(f"least distance to a border {1e3 * margins.min():.1f} mm")
print(f"least distance to the obstacle {1e3 * (distance.min() - 0.1):.1f} mm")

# The run on this page shared its core with other programs; alone on one a tick took
# 3.1, 4.1 and 5.2 ms, of a stage of 20 ms. The center of the car touches the obstacle,
# and comes no closer.

# %% What it looks like
ax = plot.race(xs, speed, track)
angle = np.linspace(0, 2 * np.pi, 60)
circle = np.asarray(place) + 0.1 * np.stack([np.cos(angle), np.sin(angle)], 1)
ax.fill(*circle.T, color="C3", alpha=0.5)
ax.figure.savefig(args.out / "mpc_car.png", dpi=120)

# ![The way of the car around the obstacle, colored by its speed](mpc_car.png)

# %% What must hold, and what to change next
# - `iterations=1` halves the time of a tick; see what it does to the violations.
# - `controller(x, state, problem=make(elsewhere))` moves the obstacle while it drives.
# - [Receding horizon](../receding-horizon.md) has the rest: costs of ticks, what to do
#   when one fails, saving a run.
assert np.all((lower <= us) & (us <= upper)), "a limit was exceeded"
if not args.fast:
    assert margins.min() > -2e-3, "the car left the track"
    assert distance.min() > 0.098, "the car hit the obstacle"
    assert xs[-1, -2] > track.length, "the lap is not complete"
