"""A simulator outside of JAX.

A crane whose simulator is a class of NumPy, with a state of its own and small steps
inside: what a library of somebody else looks like. The solve calls it, and finds its
derivatives by differences.
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
parser.add_argument("--fast", action="store_true", help="a short horizon, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)


# %% The simulator
# A trolley pulls a load on a rope of 8 m. It brakes by dry friction, and air slows the
# load down: things that simulators do in a loop of many small steps. This one remembers
# its state, as they do, and counts how often it is called.
class Crane:
    rope, load, trolley, small_steps = 8.0, 500.0, 300.0, 20  # [m], [kg], [kg]

    def __init__(self):
        self.state, self.calls = np.zeros(4), 0

    def slope(self, force):
        _, angle, speed, rate = self.state
        sine, cosine = np.sin(angle), np.cos(angle)
        friction = 200 * np.tanh(speed / 0.1)
        swing = self.load * sine * (self.rope * rate**2 + 9.81 * cosine)
        push = (force - friction + swing) / (self.trolley + self.load * sine**2)
        drag = 0.05 * rate * abs(rate)
        turn = -(push * cosine + 9.81 * sine) / self.rope - drag
        return np.array([speed, rate, push, turn])

    def run(self, force, seconds):
        self.calls += 1
        for _ in range(self.small_steps):
            self.state = self.state + seconds / self.small_steps * self.slope(force)


# %% As dynamics
# What [`dp.external`][diffprog.external] takes is a function of NumPy's arrays. The
# next state must follow from what it is given: the simulator is set at each call,
# whatever it remembers.
crane, dt = Crane(), 0.1
horizon = 40 if args.fast else 80


def dynamics(x, u, t):
    crane.state = np.array(x)
    crane.run(1000 * u[0], dt)
    return crane.state


# %% The problem
# Ten meters to the right, from rest to rest, with at most 1 kN. Costs are functions of
# JAX as always; limits and constraints are as with any other dynamics.
goal = jnp.array([1.0 if args.fast else 10.0, 0.0, 0.0, 0.0])
limit = jnp.array([1.0])
problem = dp.ControlProblem(
    dp.external(dynamics),
    cost=lambda x, u, t: dt * (0.1 * u[0] ** 2 + x[1] ** 2),
    terminal_cost=lambda x: 20 * jnp.sum((x - goal) ** 2),
    horizon=horizon,
    control_bounds=(-limit, limit),
)
guess = jnp.zeros((horizon, 1))

# %% The solve
# [`dp.ILQR`][diffprog.ILQR] needs first derivatives only. They are central differences
# here: ten calls for each stage, of four states and one control in both directions.
solution = dp.solve(problem, dp.ILQR(), jnp.zeros(4), guess)
print(solution)
print(f"{crane.calls} calls of the simulator")

# %% What it does
xs, us = np.asarray(solution.xs), np.asarray(solution.us)
t = dt * np.arange(horizon + 1)
figure = Figure((11.0, 4.4), layout="constrained")
way, *curves = figure.subplot_mosaic("wf;wa", width_ratios=[1.4, 1]).values()
ends = xs[:, 0] + crane.rope * np.sin(xs[:, 1]), -crane.rope * np.cos(xs[:, 1])
way.plot(xs[:, 0], 0 * xs[:, 0], color="0.3", lw=3)
for i in range(0, horizon + 1, 5):
    way.plot([xs[i, 0], ends[0][i]], [0, ends[1][i]], "o-", color="C0", ms=4, lw=0.8)
way.plot(*ends, "C3")
way.set(aspect="equal", xlabel="x [m]", ylabel="z [m]")
curves[0].stairs(us[:, 0], t, baseline=None)
curves[0].axhline(1.0, color="0.35", lw=1.0, ls="--")
curves[0].axhline(-1.0, color="0.35", lw=1.0, ls="--")
curves[0].set(ylabel="force [kN]")
curves[1].plot(t, np.degrees(xs[:, 1]))
curves[1].set(xlabel="time [s]", ylabel="angle of the rope [degrees]")
figure.savefig(args.out / "simulator.png", dpi=110)

# ![The trolley, its rope every half second and the way of the load; force and
# angle](simulator.png)

# %% What must hold, and what to change next
# - A simulator that knows its derivatives gives them: `dp.external(dynamics,
#   jacobian)`.
# - One that takes many states at once gets them so, with `vectorized=True`.
# - [External simulators](../external-simulators.md) says what calls cost, what happens
#   to errors, and how it goes with MuJoCo.
assert solution.success
assert np.allclose(xs[-1], goal, atol=0.1), "the load does not arrive at rest"
assert np.all(np.abs(us) <= 1.0)
