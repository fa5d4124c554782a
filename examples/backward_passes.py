"""Choose what flows backward.

One small network, one loop, eight rules for the backward pass: the gradient, Adam,
Gauss-Newton and its dual, prox-linear, target propagation, Moreau and ProxProp.
"""

# %%
# How should the parameters of a network change? Back-propagation is one answer. Others
# send another message through the same layers, at another price.
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import diffprog as dp
from diffprog import oracles


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% A problem to look at
# Three spirals of 50 points each, and a network 2-16-16-3 that shall tell them apart.
# It is a [`dp.Network`][diffprog.Network], since some rules have to know the layers.
m, keys = 50, jr.split(jr.key(0), 4)
labels = jnp.repeat(jnp.arange(3), m)
radius = jnp.tile(jnp.linspace(0.2, 2.0, m), 3)
turn = 2 * radius + 2 * jnp.pi * labels / 3 + 0.15 * jr.normal(keys[0], (3 * m,))
points = radius[:, None] * jnp.stack([jnp.cos(turn), jnp.sin(turn)], 1)
sizes = zip((2, 16, 16), (16, 16, 3), keys[1:], strict=True)
first, second, last = (eqx.nn.Linear(a, b, key=key) for a, b, key in sizes)
net = dp.Network([first, jnp.tanh, second, jnp.tanh, last])
loss = dp.losses.SoftmaxCrossEntropy()


# %% The loop
# [`dp.value_and_direction`][diffprog.value_and_direction] stands where `value_and_grad`
# would. Its *oracle* says what flows backward; its direction is arranged like the
# gradient, for any optimizer of optax. `step` has a state, for dampings that adapt.
@eqx.filter_jit
def train(oracle, rate, optimizer, num_steps):
    vd = dp.value_and_direction(loss, oracle)
    params, rest = eqx.partition(net, eqx.is_inexact_array)

    def step(carry, _):
        params, state, memory = carry
        model = eqx.combine(params, rest)
        (value, _), direction, state = vd.step(model, state, points, labels)
        direction = eqx.filter(direction, eqx.is_inexact_array)
        updates, memory = optimizer.update(direction, memory)
        params = jax.tree.map(lambda w, u: w - rate * u, params, updates)
        return (params, state, memory), value

    carry = params, vd.init(net), optimizer.init(params)
    (params, *_), values = jax.lax.scan(step, carry, length=num_steps)
    return eqx.combine(params, rest), values


# %% What goes back through the layers
# - *gradient*: how the loss changes with the output.
# - *Gauss-Newton*: how it would change after the step, by a quadratic model of the
#   loss; *dual*: the same by ten products in the space of outputs.
# - *prox-linear*: the same by the loss itself; only the network is linearized.
# - *targets*: what the output of every layer should have been, by inverses of layers.
# - *Moreau*: solutions of small problems; *ProxProp*: for the parameters alone.
#
# Some have a damping, which follows what the last step was worth (`MadsenNielsen`). The
# others have a rate, or an alpha: the best of three stands in the table. These numbers
# are arrays, so that a row compiles once.
number, some = lambda a: jnp.asarray(a, float), (1.0, 3.0, 10.0)
plain, adam, few, many = optax.identity(), optax.scale_by_adam(), 60, 1000
adapts = lambda least: oracles.MadsenNielsen(0.1, minimum=least)
dual = oracles.DualGaussNewton(adapts(0.01), oracles.DualCG(10))
targets = oracles.TargetPropagation(0.01, 1.0, local=False)
prox_prop = lambda alpha: oracles.prox_prop(150 * alpha, 150.0)
rates = lambda oracle, *rates: [(oracle, number(rate)) for rate in rates]
alphas = lambda oracle: [(oracle(number(alpha)), number(1)) for alpha in some]
rows = {
    "gradient": (rates(oracles.Gradient(), 0.3, 1, 3), plain, many),
    "gradient, Adam": (rates(oracles.Gradient(), 0.01, 0.03, 0.1), adam, many),
    "Gauss-Newton": (rates(oracles.GaussNewton(adapts(1e-6)), 1), plain, few),
    "dual, 10 products": (rates(dual, 1), plain, few),
    "prox-linear": (rates(oracles.ProxLinear(adapts(1e-6)), 1), plain, few),
    "targets": (rates(targets, *some), plain, many),
    "Moreau": (alphas(oracles.MoreauBackprop), plain, many),
    "ProxProp": (alphas(prox_prop), plain, many),
}
print(f"{'':18} steps to 0.01  ms per step  ms to 0.01  loss at the end")
curves, models = {}, {}
for name, (tried, optimizer, steps) in rows.items():
    found, steps = [], min(steps, 6) if args.fast else steps
    for oracle, rate in tried:
        run = oracle, rate, optimizer, steps
        jax.block_until_ready(train(*run))  # compiles
        start = time.process_time()
        found.append(jax.block_until_ready(train(*run)))
        ms = 1e3 * (time.process_time() - start) / steps
    models[name], values = min(found, key=lambda result: result[1][-1])
    curves[name] = np.asarray(values), ms
    reached = np.append(np.flatnonzero(values < 0.01) + 1, np.inf)[0]
    print(f"{name:18}{reached:13.0f}{ms:13.3f}{reached * ms:12.1f}{values[-1]:17.1e}")

# Ten steps with a model of the loss do what 181 of the gradient do, and a step costs
# more; with a good rate Adam is first by the clock here. Prices change with the network
# and the batch: see [the benchmarks](../benchmarks-oracles.md).

# %% What is seen
grid = jnp.linspace(-2.3, 2.3, 200)
plane = jnp.stack(jnp.meshgrid(grid, grid), -1)
regions = jnp.argmax(jax.vmap(jax.vmap(models["Gauss-Newton"]))(plane), -1)
figure = Figure(figsize=(12, 3.8), layout="constrained")
left, middle, right = figure.subplots(1, 3)
levels, colors = (-0.5, 0.5, 1.5, 2.5), ("C0", "C1", "C2")
left.contourf(grid, grid, regions, levels, colors=colors, alpha=0.3)
left.scatter(*points.T, 9, np.asarray(colors)[labels])
left.set(title="trained by Gauss-Newton", aspect="equal", xticks=[], yticks=[])
for name, (values, ms) in curves.items():
    middle.loglog(np.arange(1, len(values) + 1), values, label=name)
    right.loglog(ms * np.arange(1, len(values) + 1), values)
middle.set(xlabel="steps", ylabel="loss", ylim=(1e-5, 5))
right.set(xlabel="milliseconds", ylim=(1e-5, 5))
figure.legend(loc="outside right", frameon=False)
figure.savefig(args.out / "backward_passes.png", dpi=110)

# ![Spirals with the regions of the network; losses of eight rules](backward_passes.png)

# %% What must hold, and what to change next
# Take [a loss with kinks](../oracles/prox_linear.md): Gauss-Newton has nothing but the
# gradient there. Or a sequence, through which targets
# [come back and gradients do not](../oracles/target_propagation.md).
assert all(values[-1] < values[0] for values, _ in curves.values())
if not args.fast:
    steps = {name: np.argmax(values < 0.01) for name, (values, _) in curves.items()}
    assert all(values[-1] < 0.01 for values, _ in curves.values())
    assert 10 * max([*steps.values()][2:5]) < steps["gradient"]
