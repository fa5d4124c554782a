"""Swings a pendulum up and stops it upright; the first program to read."""

# %%
# A system is an object with three methods: the next state, the cost of a stage and the
# cost of the last state. This one comes with the package.
import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default="out", help="for the pictures")
parser.add_argument("--fast", action="store_true", help="a short horizon, as a test")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_enable_x64", True)

# %%
# From hanging at rest, and from no torque at all. Other directions and searches take
# the same place: dp.ILQR(), dp.Newton(), dp.AdaptiveDamping(), ...
horizon = 30 if args.fast else 50
pendulum = dp.systems.Pendulum(dt=0.05, control_weight=1e-4)
problem = dp.ControlProblem.from_system(pendulum, horizon)
us = jnp.zeros((horizon, 1))
solution = dp.solve(problem, dp.DDP(), pendulum.x0, us)
print(solution)
angle, velocity = solution.xs[-1]
print(f"ends at {angle:.4f} rad, {velocity:.4f} rad/s; upright is {np.pi:.4f} rad")

# %%
# Pictures.
axes = plot.trajectory(
    solution,
    dt=pendulum.dt,
    names=["angle [rad]", "velocity [rad/s]"],
    input_names=["torque [N m]"],
)
axes[0].figure.savefig(args.out / "pendulum.png", dpi=120)
ax = plot.convergence({"DDP": solution})
ax.figure.savefig(args.out / "pendulum_convergence.png", dpi=120)

# %%
# What must hold.
assert solution.result == dp.RESULTS.successful
assert abs(angle - np.pi) < 0.05 and abs(velocity) < 0.1
