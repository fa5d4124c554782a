"""Learn from data with gross errors.

A curve through points of which a quarter is far off, by prox-linear steps on the sum of
distances, which keep the kinks that a gradient does not see.
"""

# %%
# Squares give a gross error all the weight; distances do not. But distances have kinks:
# a gradient knows nothing of them, and Gauss-Newton has no curvature to work with. The
# prox-linear method keeps the loss as it is, and linearizes the network alone.
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

import diffprog as dp


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% The data
# 80 points of a curve with a little noise; a quarter of them is off by a lot, always
# upward. The network has 49 parameters.
keys = jr.split(jr.key(0), 6)
curve = lambda x: jnp.sin(2 * x) + 0.3 * x
inputs = jnp.sort(jr.uniform(keys[0], (80, 1), minval=-3.0, maxval=3.0), 0)
wrong = jr.uniform(keys[1], (80, 1)) < 0.25
errors = 0.05 * jr.normal(keys[2], (80, 1))
targets = curve(inputs) + jnp.where(wrong, 2 + 2 * jr.uniform(keys[3], (80, 1)), errors)
layers = eqx.nn.Linear(1, 16, key=keys[4]), jnp.tanh, eqx.nn.Linear(16, 1, key=keys[5])
start = dp.Network(layers)
distance = dp.losses.Absolute()


def mean_distance(model):
    return jnp.mean(distance(jax.vmap(model)(inputs), targets))


# %% Four ways
# All points at once, so that there is no noise of batches. Subgradient descent is the
# usual way; its step sizes, and that of Adam, are the best of 1, 0.3, 0.1, 0.03, 0.01
# for the lowest distance at the end. Gauss-Newton minimizes the squared distance, which
# is what the gross errors ruin. Prox-linear steps end early: from the 60th on they find
# curves through the gross errors too, with a mean distance of 0.40 after 100.
def train(loss, oracle, optimizer, num_steps):
    """The model, and the mean distance and the seconds after each step."""
    vd = dp.value_and_direction(loss, oracle)
    params, rest = eqx.partition(start, eqx.is_inexact_array)

    @jax.jit
    def step(params, state, opt_state):
        model = eqx.combine(params, rest)
        before = mean_distance(model)
        _, direction, state = vd.step(model, state, inputs, targets)
        updates, opt_state = optimizer.update(direction, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, before

    state, opt_state = vd.init(start), optimizer.init(params)
    step(params, state, opt_state)  # compile
    found, begin = [], time.process_time()
    for _ in range(num_steps):
        params, state, opt_state, before = step(params, state, opt_state)
        found.append((float(before), time.process_time() - begin))
    return eqx.combine(params, rest), *zip(*found)


O, count = dp.oracles, (10, 20) if args.fast else (40, 2000)
decreasing = lambda s: optax.sgd(lambda t: s / jnp.sqrt(1 + t / 100))
adaptive = lambda initial: O.MadsenNielsen(initial)
METHODS = {
    "prox-linear": (
        distance, O.ProxLinear(adaptive(0.1)), optax.sgd(1.0), count[0]),
    "subgradient": (distance, O.Gradient(), decreasing(0.3), count[1]),
    "Adam": (distance, O.Gradient(), optax.adam(0.1), count[1]),
    "Gauss-Newton, squares": (
        dp.losses.Squared(), O.GaussNewton(adaptive(0.1)), optax.sgd(1.0), count[0]),
}  # fmt: skip
grid = jnp.linspace(-3, 3, 200)[:, None]
print("method                  steps   seconds   mean distance   error of the curve")
runs = {}
for name, method in METHODS.items():
    model, distances, seconds = train(*method)
    error = float(jnp.mean(jnp.abs(jax.vmap(model)(grid) - curve(grid))))
    runs[name] = model, distances, seconds, error
    print(
        f"{name:22} {len(seconds):6} {seconds[-1]:9.2f} {distances[-1]:15.4f}"
        f" {error:20.4f}"
    )

# Forty steps with the model bring the curve closer to the true one than two thousand
# subgradients, in a fifth of the time. That of squares is off by ten times as much.

# %% What is seen
figure = Figure(figsize=(12, 3.6), layout="constrained")
axes = figure.subplots(1, 3)
for name, (model, distances, seconds, _) in runs.items():
    axes[0].plot(grid, jax.vmap(model)(grid), label=name)
    if "squares" not in name:
        axes[1].semilogx(range(1, len(seconds) + 1), distances, label=name)
        axes[2].semilogx(seconds, distances, label=name)
axes[0].plot(inputs, targets, "k.", ms=3)
axes[0].plot(grid, curve(grid), "k--", lw=0.8)
axes[0].set(title="the curves", xlabel="x", ylabel="y")
axes[0].legend(frameon=False, fontsize=8)
axes[1].set(xlabel="steps", ylabel="mean distance", ylim=(0.4, 1.0))
axes[2].set(xlabel="seconds", ylabel="mean distance", ylim=(0.4, 1.0))
figure.savefig(args.out / "prox_linear_regression.png", dpi=120)

# ![Curves through the data, distances by step and time](prox_linear_regression.png)

# %% What must hold, and what to change next
# Take `dp.losses.Huber(0.1)`, which has a curvature, and `GaussNewton` with it; or
# mini-batches, whose noise [this method does not bear](../oracles/prox_linear.md).
# Squares are pulled away by the gross errors, distances are not; and the model of a
# prox-linear step is worth many subgradients.
if not args.fast:
    final = {name: distances[-1] for name, (_, distances, _, _) in runs.items()}
    assert runs["prox-linear"][3] < 0.1 < 0.4 < runs["Gauss-Newton, squares"][3]
    assert final["prox-linear"] < min(final["subgradient"], 1.02 * final["Adam"])
