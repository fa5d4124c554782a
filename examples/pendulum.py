"""Swing a pendulum up.

From hanging at rest to standing upright: a problem, a solve, what it says and how it is
drawn. The first program to read.
"""

# %%
# JAX computes with 32 bits unless told otherwise, before the first array. All programs
# here have the options `--out`, the folder for pictures, and `--fast`.
import argparse

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a short horizon, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% The problem
# A system is an object with three methods: `dynamics(x, u, t)` is the next state,
# `cost(x, u, t)` what a stage costs, and `terminal_cost(x)` what the last state costs.
# This pendulum comes with the package: its state is the angle, 0 where it hangs, and
# the velocity; its control is a torque. Torques cost little here, the error at the end
# much.
#
# A horizon of 50 stages of 0.05 s makes a problem of it.
horizon = 30 if args.fast else 50
pendulum = dp.systems.Pendulum(dt=0.05, control_weight=1e-4)
problem = dp.ControlProblem.from_system(pendulum, horizon)

# %% The solve
# It begins with a first state, hanging at rest, and a guess of the controls: no torque
# at all. [`dp.DDP`][diffprog.DDP] is the rule that flows backward through the stages;
# it returns a correction of each torque, and a gain that answers to the state.
us = jnp.zeros((horizon, 1))
solution = dp.solve(problem, dp.DDP(), pendulum.x0, us)
print(solution)
angle, velocity = solution.xs[-1]
print(f"ends at {angle:.4f} rad, {velocity:.4f} rad/s; upright is {np.pi:.4f} rad")

# The first line is the one to look at. `successful` means finite, and stationary: an
# iteration more would lower the cost by no more than the predicted decrease. Anything
# else raises an error that says what to do; with `throw=False` it is returned instead,
# and `solution.success` tells. The pendulum ends within two degrees of upright.

# %% What it does
# `solution.xs` holds the 51 states, and `solution.us` the 50 torques.
axes = plot.trajectory(
    solution,
    dt=pendulum.dt,
    names=["angle [rad]", "velocity [rad/s]"],
    input_names=["torque [N m]"],
)
axes[0].figure.savefig(args.out / "pendulum.png", dpi=110)

# It swings back once before it goes up, although nobody told it to: torques cost
# something, and swinging does not.
#
# ![Angle and velocity over time, and the torque below](pendulum.png)

# %% How it got there
# Each solve keeps its history: cost, step size, slope and more at each iteration.
ax = plot.convergence({"DDP": solution})
ax.figure.savefig(args.out / "pendulum_convergence.png", dpi=110)

# While the swing is being found each iteration takes off about half of what is left.
# Near the solution DDP converges quadratically: the number of right digits doubles.
#
# ![Cost above the best, against the iteration](pendulum_convergence.png)

# %% What must hold, and what to change next
# - `dp.ILQR()`, `dp.GaussNewton()` or `dp.Newton()` take the place of `dp.DDP()`: [how
#   to choose](../how-to-choose.md) compares them.
# - `dp.systems.Pendulum(mass=2.0)` is another problem of the same shape. It compiles
#   nothing, and neither does another `x0`.
# - `control_bounds=(-3.0, 3.0)` gives the motor a [limit](../limits.md). With a weak
#   one it has to swing more often.
# - Your own system: [getting started](../getting-started.md) writes one.
assert solution.success
assert abs(angle - np.pi) < 0.05 and abs(velocity) < 0.1
