"""Choose what flows backward.

One small network, one loop, eight rules for the backward pass: the gradient, Adam,
Gauss-Newton and its dual, prox-linear, target propagation, Moreau and ProxProp.

At every step training asks a network how its parameters should change. Back-propagation
is one answer. Others send another message through the same layers, for another price;
nothing else of the program changes.
"""

# %%
import argparse
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from matplotlib.figure import Figure

import diffprog as dp
from diffprog import oracles


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default="out", help="for the picture")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_enable_x64", True)

# %% A problem to look at
# Three spirals of 50 points each, and a network 2-16-16-3 that shall tell them apart. It
# is a [`dp.Network`][diffprog.Network]: some rules need to know the layers.
m, keys = 50, jr.split(jr.key(0), 4)
labels = jnp.repeat(jnp.arange(3), m)
radius = jnp.tile(jnp.linspace(0.2, 2.0, m), 3)
turn = 2 * radius + 2 * jnp.pi * labels / 3 + 0.15 * jr.normal(keys[0], (3 * m,))
points = radius[:, None] * jnp.stack([jnp.cos(turn), jnp.sin(turn)], 1)
first, second, last = (
    eqx.nn.Linear(a, b, key=key)
    for a, b, key in zip((2, 16, 16), (16, 16, 3), keys[1:], strict=True)
)
net = dp.Network([first, jnp.tanh, second, jnp.tanh, last])
loss = dp.losses.SoftmaxCrossEntropy()


# %% The loop
# [`dp.value_and_direction`][diffprog.value_and_direction] stands where `value_and_grad`
# would, and takes an *oracle*, which says what flows backward. The direction is arranged
# like the gradient, so any optimizer of optax takes it. `step` hands a state on from
# step to step, for a damping that adapts.
@eqx.filter_jit
def train(oracle, rate, optimizer, num_steps):
    vd = dp.value_and_direction(loss, oracle)
    params, rest = eqx.partition(net, eqx.is_inexact_array)

    def step(carry, _):
        params, state, memory = carry
        model = eqx.combine(params, rest)
        (value, aux), direction, state = vd.step(model, state, points, labels)
        direction = eqx.filter(direction, eqx.is_inexact_array)
        cosine = -aux.slope / (aux.gradient * optax.tree.norm(direction))
        updates, memory = optimizer.update(direction, memory)
        params = jax.tree.map(lambda w, u: w - rate * u, params, updates)
        return (params, state, memory), (value, cosine)

    carry = params, vd.init(net), optimizer.init(params)
    (params, *_), (values, cosines) = jax.lax.scan(step, carry, length=num_steps)
    return eqx.combine(params, rest), values, cosines[0]


# %% The rules
# What goes back through the layers, for each example:
#
# - *gradient*: how the loss changes with the output, and nothing else.
# - *Gauss-Newton*: the same after the step, by a quadratic model of the loss; *dual*,
#   found by ten products in the space of outputs, not by a factorization.
# - *prox-linear*: the same by the loss itself; only the network is linearized.
# - *targets*: what the output of every layer should have been, by inverses of layers.
# - *Moreau*: solutions of a small problem at every layer; *ProxProp*: that for the
#   parameters only.
#
# The second to fourth have a damping that follows what the last step was worth
# (`MadsenNielsen`). The others have a rate, or alpha, that must be found: the best of
# three stands in the table. These numbers are arrays, so that a row compiles once.
plain, adam, few = optax.identity(), optax.scale_by_adam(), 60
adapts = lambda least: oracles.MadsenNielsen(0.1, minimum=least)
dual = oracles.DualGaussNewton(adapts(0.01), oracles.DualCG(10))
targets = oracles.TargetPropagation(0.01, 1.0, local=False)
prox_prop = lambda alpha: oracles.prox_prop(150 * alpha, 150.0)
fixed = lambda oracle, *rates: [(oracle, jnp.asarray(1.0 * r)) for r in rates]
inside = lambda oracle, *alphas: [
    (oracle(jnp.asarray(alpha)), jnp.asarray(1.0)) for alpha in alphas
]
rows = {
    "gradient": (fixed(oracles.Gradient(), 0.3, 1, 3), plain, 1000),
    "gradient, Adam": (fixed(oracles.Gradient(), 0.01, 0.03, 0.1), adam, 1000),
    "Gauss-Newton": (fixed(oracles.GaussNewton(adapts(1e-6)), 1), plain, few),
    "dual, 10 products": (fixed(dual, 1), plain, few),
    "prox-linear": (fixed(oracles.ProxLinear(adapts(1e-6)), 1), plain, few),
    "targets": (fixed(targets, 1, 3, 10), plain, 1000),
    "Moreau": (inside(oracles.MoreauBackprop, 0.3, 1.0, 3.0), plain, 500),
    "ProxProp": (inside(prox_prop, 1.0, 3.0, 10.0), plain, 500),
}
print(f"{'':18} cosine  steps to 0.01  ms per step  ms to 0.01  loss at the end")
curves, models = {}, {}
for name, (tried, optimizer, steps) in rows.items():
    found, steps = [], min(steps, 6) if args.fast else steps
    for oracle, rate in tried:
        run = oracle, rate, optimizer, steps
        jax.block_until_ready(train(*run))  # compiles
        start = time.process_time()
        found.append(jax.block_until_ready(train(*run)))
        ms = 1e3 * (time.process_time() - start) / steps
    models[name], values, cosine = min(found, key=lambda result: result[1][-1])
    curves[name] = np.asarray(values), ms
    reached = np.append(np.flatnonzero(values < 0.01) + 1, np.inf)[0]
    print(
        f"{name:18} {cosine:6.2f} {reached:14.0f} {ms:12.3f} {reached * ms:11.1f}"
        f" {values[-1]:16.1e}"
    )

# `cosine` is that of the angle between the first direction and the gradient: the second
# order turns it a little, targets turn it much. Nine steps with a model of the loss do
# what 181 of the gradient do, and each costs twenty times as much; here Adam with a good
# rate is first by the clock. On larger problems the prices differ:
# [the benchmarks](../benchmarks-oracles.md) have them.

# %% What is seen
# The regions that Gauss-Newton found, and the losses against steps and against the time
# of the processor.
grid = jnp.linspace(-2.3, 2.3, 200)
plane = jnp.stack(jnp.meshgrid(grid, grid), -1)
regions = jnp.argmax(jax.vmap(jax.vmap(models["Gauss-Newton"]))(plane), -1)
figure = Figure(figsize=(12, 3.8), layout="constrained")
axes = figure.subplots(1, 3)
levels = -0.5, 0.5, 1.5, 2.5
axes[0].contourf(grid, grid, regions, levels, colors=["C0", "C1", "C2"], alpha=0.3)
for arm in range(3):
    axes[0].plot(*points[labels == arm].T, ".", color=f"C{arm}")
axes[0].set(title="spirals and regions", aspect="equal", xticks=[], yticks=[])
for name, (values, ms) in curves.items():
    steps = np.arange(1, len(values) + 1)
    axes[1].loglog(steps, values, label=name)
    axes[2].loglog(ms * steps, values)
axes[1].set(xlabel="steps", ylabel="loss", ylim=(1e-5, 5))
axes[2].set(xlabel="milliseconds", ylim=(1e-5, 5))
figure.legend(loc="outside right", frameon=False)
figure.savefig(args.out / "backward_passes.png", dpi=110)

# ![Spirals with the regions of the network; losses of eight rules](backward_passes.png)

# %% What must hold, and what to change next
# The second order needs a tenth of the steps of the gradient. Now take
# [a loss with kinks](../oracles/prox_linear.md), where Gauss-Newton has nothing but the
# gradient and prox-linear goes on; many layers, where gradients vanish and
# [targets do not](temporal_order.md); or [a rule of your own](../oracles/own_oracle.md).
if not args.fast:
    first = {name: np.argmax(values < 0.01) for name, (values, _) in curves.items()}
    assert all(values[-1] < 0.01 for values, _ in curves.values())
    for name in ("Gauss-Newton", "dual, 10 products", "prox-linear"):
        assert 10 * first[name] < first["gradient"], name
assert all(values[-1] < values[0] for values, _ in curves.values())
