"""Swing a pole up, with noise and limits.

A pole on a cart, by a receding horizon: what is measured has noise, the plant is not
the model, the force has limits and the rail has ends.
"""

# %%
import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog.systems import CartPole


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)
dt, horizon = 0.04, 50
ticks = 10 if args.fast else 200

# %% Model and plant
# The model is what the controller knows. The plant is what happens: its pole is 5 %
# heavier and its friction twice as large, and it moves in ten finer steps. What is
# measured has noise: 5 mm and half a degree, and ten times as much for velocities. The
# force has limits, and so has the rail, as a constraint that keeps a margin for the
# noise.
model = CartPole(dt=dt, friction=0.05, method="rk4")
plant = CartPole(dt=dt / 10, friction=0.1, pole_mass=0.21)
noise = jnp.array([0.005, 0.01, 0.05, 0.1])
force, rail, margin = 8.0, 0.9, 0.1
goal = jnp.array([0.0, model.target, 0.0, 0.0])


def error(x, *weights):
    return jnp.sum(jnp.array(weights) * (x - goal) ** 2)


limit = jnp.array([force])
on_rail = dp.Inequality(lambda x, *_: jnp.abs(x[:1]) - rail + margin, "rail")
problem = dp.ControlProblem(
    lambda x, u, t: model.dynamics(x, u, t),
    lambda x, u, t: dt * (error(x, 1, 1, 0.1, 0.1) + 0.02 * jnp.sum(u**2)),
    lambda x: error(x, 10, 30, 3, 3),
    horizon,
    control_bounds=(-limit, limit),
    constraints=on_rail,
    terminal_constraints=on_rail,
)


def move(x, u, t):
    return jax.lax.fori_loop(0, 10, lambda _, x: plant.dynamics(x, u, t), x)


# %% The loop
# That of a robot: measure, improve the plan, push. It begins with a plan that is solved
# to the end.
controller = dp.MPC(problem, dp.ILQR(), iterations=2)
x = model.x0
solution = dp.solve(problem, dp.ILQR(), x, jnp.zeros((horizon, 1)), throw=False)
state = controller.init(x, solution.us, state=solution.state)
step, rng = jax.jit(move), np.random.default_rng(0)
jax.block_until_ready(controller(x, state))  # compiles
xs, us, plans, times = [x], [], [], []
for tick in range(ticks):
    measured = x + noise * rng.normal(size=4)
    start = time.perf_counter()
    u, state = jax.block_until_ready(controller(measured, state))
    times.append(1e3 * (time.perf_counter() - start))
    x = step(x, u, tick)
    xs.append(np.asarray(x))
    us.append(np.asarray(u))
    plans.append(np.asarray(state.xs))
xs, us = np.stack(xs), np.stack(us)
percentiles = np.percentile(times, [50, 90, 99])
print("a tick takes {:.2f} / {:.2f} / {:.2f} ms (50, 90, 99 %)".format(*percentiles))
print(
    f"largest force {np.abs(us).max():.3f} N, farthest {np.abs(xs[:, 0]).max():.3f} m"
)

# Half of the ticks take less than the first of these times. Each does the same work,
# two iterations, whatever comes.

# %% Many carts at once
# [`dp.simulate`][diffprog.simulate] is the loop as one program, here for 16 carts whose
# poles weigh differently.


def run(mass, key):
    robot = CartPole(dt=dt / 10, friction=0.1, pole_mass=mass)

    def move(x, u, t):
        return jax.lax.fori_loop(0, 10, lambda _, x: robot.dynamics(x, u, t), x)

    found = dp.simulate(controller, move, model.x0, ticks, noise, key, state=begin)
    return found.xs


begin = controller.init(model.x0, solution.us, state=solution.state)
masses = jnp.linspace(0.19, 0.21, 4 if args.fast else 16)
keys = jax.random.split(jax.random.key(1), len(masses))
many = np.asarray(jax.jit(jax.vmap(run))(masses, keys))
angles = many[:, -25:, 1] - model.target
upright = np.abs(angles).max(1) < 0.2
print(f"{upright.sum()} of {len(masses)} carts hold their pole in the last second")

# %% What it looks like
# Angle with some of the plans, place, and force.
figure = Figure((7.0, 7.0), layout="constrained")
axes = figure.subplots(3, 1, sharex=True)
t = dt * np.arange(len(xs))
for i in range(0, len(plans), 5):
    axes[0].plot(t[i] + dt * np.arange(horizon + 1), plans[i][:, 1], "C0", alpha=0.2)
for path in many:
    axes[0].plot(t, path[:, 1], "0.7", lw=0.5, zorder=0)
axes[0].plot(t, xs[:, 1], "k")
axes[0].axhline(model.target, color="C3", ls=":")
axes[0].set(ylabel="angle [rad]", xlim=(0, t[-1]))
axes[1].plot(t, xs[:, 0], "k")
axes[2].step(t[:-1], us[:, 0], "k", where="post")
for ax, most, label in ((axes[1], rail, "place [m]"), (axes[2], force, "force [N]")):
    ax.hlines([-most, most], 0, t[-1], color="C3", ls=":")
    ax.set(ylabel=label)
axes[2].set(xlabel="time [s]")
figure.savefig(args.out / "mpc_cart_pole.png", dpi=110)

# Plans in blue, the plant in black, the other carts in gray. The force is at its limit
# while the pole goes up, and noise keeps it busy afterwards.
#
# ![Angle with plans, place and force of the cart](mpc_cart_pole.png)

# %% What must hold, and what to change next
# - A heavier pole, or ten times the noise: where does it begin to fall?
# - `iterations=1` and a shorter horizon make ticks cheaper, and plans worse.
# - [Receding horizon](../receding-horizon.md) says what a tick promises.
assert np.all(np.abs(us) <= force), "a limit of the force was exceeded"
if not args.fast:
    assert np.abs(xs[-25:, 1] - model.target).max() < 0.2, "the pole has fallen"
    assert np.abs(xs[:, 0]).max() < rail, "the cart ran into the end of the rail"
    assert upright.all()
