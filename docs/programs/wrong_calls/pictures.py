"""Pictures.

`xs` are states of two numbers and `us` one control, of five stages.
"""

import sys

import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot


xs, us = np.zeros((6, 2)), np.zeros((5, 1))
circle = dp.systems.Track.circle()
problem = dp.ControlProblem.from_system(dp.systems.Pendulum(), 5)

# %% Install what draws: `pip install 'diffprog[viz]'`.
known = {name: sys.modules.pop(name) for name in [*sys.modules] if "matplotlib" in name}
sys.modules["matplotlib"] = None
try:
    plot.convergence({})
finally:
    del sys.modules["matplotlib"]
    sys.modules.update(known)

# %% [slow] Give controls beside states.
plot.trajectory(xs)

# %% [slow] Name every column.
plot.trajectory(xs, us, names=["angle"])

# %% Draw a chain phase by phase.
plot.trajectory((xs, xs[:3]), us)

# %% Give the axes, or leave `ax` out.
plot.trajectory(xs, us, ax="left")

# %% A speed is one number for each stage.
plot.inputs(us, np.ones(3))

# %% Limits come as a pair.
plot.inputs(us, limits=1.0)

# %% Limits have the shape of a control.
plot.inputs(us, limits=(-np.ones(3), 1.0))

# %% Give solutions.
plot.convergence({"pendulum": xs})

# %% Give at least one.
plot.convergence({})

# %% [slow] A history is kept unless `history=False`.
options = dict(max_steps=1, history=False, throw=False)
bare = dp.solve(problem, dp.ILQR(), jnp.ones(2), jnp.zeros((5, 1)), **options)
plot.convergence({"bare": bare})

# %% [slow] Draw one solution of a batch.
x0s, uss = jnp.ones((2, 2)), jnp.zeros((2, 5, 1))
plot.trajectory(dp.solve_batch(problem, dp.ILQR(), x0s, uss))

# %% With a race give its solution.
race = dp.ControlProblem.from_system(
    dp.systems.Race(dp.systems.Car.miniature(), circle), 5
)
plot.race(race, np.ones(5))

# %% With states give speeds, and the track.
plot.race(xs)

# %% A speed is one number for each position.
plot.race(xs, np.ones(3), circle)

# %% Animations are written as GIF.
plot.animation("race.mp4", xs, circle, dt=0.1, length=0.1, width=0.05)

# %% Every first, second, ... picture is drawn.
plot.animation("race.gif", xs, circle, dt=0.1, length=0.1, width=0.05, every=0.5)

# %% Say how long a stage takes, and how large the car is.
plot.animation("race.gif", xs, circle)

# %% A path has positions, one for each time.
plot.race(np.ones(5), np.ones(5), circle)

# %% Give a track, or a race on one.
plot.track("circle")

# %% Name a folder, not a file.
plot.folder("/dev/null")
