"""Learn costs and a mass through the solver.

Somebody balances a pole on a cart, from six starts, with a force that is limited. Which
mass of the pole, and which costs of force and turning, explain what was shown?
"""

# %%
import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import diffprog as dp
from diffprog.systems import CartPole


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="few steps, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% A planner with unknown numbers
# The starts are tilted, and the cart may be pushed with 4 N. Numbers of a module are
# data; these are positive, and learned as logarithms.
horizon, limit = 40, 4.0
tilts = jnp.pi / 180 * jnp.array([-15.0, -11.0, -6.0, 4.0, 9.0, 14.0])
x0s = jnp.zeros((6, 4)).at[:, 1].set(-jnp.pi + tilts)
truth = dict(pole_mass=0.2, force_weight=0.02, rate_weight=0.1)
first = dict(pole_mass=0.4, force_weight=0.05, rate_weight=0.3)


class Balance(eqx.Module):
    plant: CartPole
    force_weight: jax.Array
    rate_weight: jax.Array

    def dynamics(self, x, u, t):
        return self.plant.dynamics(x, u, t)

    def cost(self, x, u, t):
        return self.terminal_cost(x) + self.force_weight * u[0] ** 2

    def terminal_cost(self, x):
        position, angle, _, rate = x
        return position**2 + (angle + jnp.pi) ** 2 + self.rate_weight * rate**2


def plan(logs, xss=None):
    known = jax.tree.map(jnp.exp, logs)
    plant = CartPole(pole_mass=known["pole_mass"])
    system = Balance(plant, known["force_weight"], known["rate_weight"])
    bounds = -limit, limit
    problem = dp.ControlProblem.from_system(system, horizon, control_bounds=bounds)
    uss = jnp.zeros((6, horizon, 1))
    return dp.solve_batch(problem, dp.DDP(), x0s, uss, xss=xss)


# %% What is shown
# What is seen are the states, to about a millimeter and a milliradian.
logarithms = lambda numbers: {k: jnp.log(v) for k, v in numbers.items()}
shown = plan(logarithms(truth))
seen = shown.xs + 1e-3 * jr.normal(jr.key(0), shown.xs.shape)
print("at a limit:", int((jnp.abs(shown.us) == limit).sum()), "of", shown.us.size)


# %% The loss, through the solves
# Derivatives of a solution are those of the conditions that it satisfies: one more
# backward pass, and no memory of iterations. So [a solve is a function as
# others](../gradients.md), and `jax.grad` takes it. The loss is differentiated through
# all six solves, limits included. They start from the states that were seen, and so end
# where these are.
def loss(logs):
    solutions = plan(logs, seen)
    return jnp.mean((solutions.xs - seen) ** 2), solutions.success


@jax.jit
def step(logs, memory):
    (value, good), slopes = jax.value_and_grad(loss, has_aux=True)(logs)
    updates, memory = tx.update(slopes, memory)
    return value, jnp.all(good), optax.apply_updates(logs, updates), memory


steps = 15 if args.fast else 140
tx = optax.adam(optax.cosine_decay_schedule(0.1, 140))
logs = logarithms(first)
memory, losses, numbers = tx.init(logs), [], []
for i in range(steps):
    numbers.append([float(jnp.exp(logs[name])) for name in truth])
    value, good, logs, memory = step(logs, memory)
    losses.append(float(value))
    assert good and np.isfinite(value)
    if i % 35 == 0 or i == steps - 1:
        print(f"{i:3d}  loss {value:.3e} ", *(f"{v:.4f}" for v in numbers[-1]))

# The loss ends at 1e-6, where the noise of a millimeter and a milliradian is.

# %% What was learned
figure = Figure((10.0, 3.4), layout="constrained")
left, middle, right = figure.subplots(1, 3)
left.semilogy(losses, color="C3")
left.axhline(1e-6, color="0.35", linewidth=1.0, linestyle="--")
left.set(xlabel="step", ylabel="mean squared error", title="loss, that of the noise")
for (name, true), curve in zip(truth.items(), np.transpose(numbers), strict=True):
    (line,) = middle.semilogy(curve, label=name.replace("_", " "))
    middle.axhline(true, color=line.get_color(), linewidth=1.0, linestyle="--")
middle.legend(frameon=False, loc="upper right", fontsize=8)
middle.set(xlabel="step", title="numbers, and the true ones")
found, seconds = plan(logs, seen), 0.05 * np.arange(horizon)
for i, color in ((0, "C0"), (3, "C1"), (5, "C2")):
    right.plot(seconds, shown.us[i, :, 0], ".", color=color, markersize=5)
    right.plot(seconds, found.us[i, :, 0], color=color)
right.axhline(limit, color="0.35", linewidth=1.0, linestyle="--")
right.axhline(-limit, color="0.35", linewidth=1.0, linestyle="--")
right.set(xlabel="time [s]", ylabel="force [N]", title="shown (dots) and learned")
figure.savefig(args.out / "learn_from_demonstrations.png", dpi=110)

# On the right are forces of three of the starts, of which the loss knows nothing.
#
# ![The loss, the numbers that are learned, and forces](learn_from_demonstrations.png)

# %% What must hold, and what to change next
# - `plan(logs)` in the loss starts from zero controls instead: do the solves still end
#   at what was seen?
# - Ten times the noise: which of the three numbers suffers first?
# - A network instead of `terminal_cost` is learned in the same way: any module is data.
assert losses[-1] < losses[0] / 2
if not args.fast:
    for name, true in truth.items():
        error = abs(float(jnp.exp(logs[name])) / true - 1)
        print(f"{name:16} off by {100 * error:.2f} %")
        assert error < 0.01, "the numbers are not those of the demonstrations"
