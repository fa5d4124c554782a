"""Learns the order of two symbols in a long sequence, by target propagation."""

# %%
# LAPACK's threads wait busily between its calls, and get in the way of the training
# loop where there are few cores: one is enough here. (Before NumPy is imported.)
import os


os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import pathlib
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax

import diffprog as dp


matplotlib.use("Agg")
import matplotlib.pyplot as plt


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default="out", help="for the pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
T, width, batch, num_test = (20, 20, 20, 200) if args.fast else (60, 100, 20, 1000)
num_steps, every = (20, 10) if args.fast else (2000, 25)


# %%
# A sequence of T symbols out of six. Two of them are bits, one in the second tenth and
# one in the sixth; the others distract. The label says what both bits are, in order.
def draw(key, size):
    keys = jr.split(key, 4)
    symbols = jr.randint(keys[0], (size, T), 2, 6)
    bits = jr.randint(keys[1], (size, 2), 0, 2)
    rows = jnp.arange(size)
    first = jr.randint(keys[2], (size,), T // 10, 2 * T // 10)
    second = jr.randint(keys[3], (size,), 5 * T // 10, 6 * T // 10)
    symbols = symbols.at[rows, first].set(bits[:, 0])
    symbols = symbols.at[rows, second].set(bits[:, 1])
    return jax.nn.one_hot(symbols, 6), bits[:, 0] + 2 * bits[:, 1]


# %%
# A plain recurrent network and a linear layer, with orthonormal weights.
def network(key):
    keys = jr.split(key, 3)
    head = eqx.nn.Linear(width, 4, key=keys[0])
    weight = jax.nn.initializers.orthogonal()(keys[1], (4, width))
    at = lambda layer: (layer.weight, layer.bias)
    head = eqx.tree_at(at, head, (weight, jnp.zeros(4)))
    return dp.Network([dp.Recurrent(dp.RNNCell(6, width, key=keys[2]), width), head])


# %%
# Target propagation with the published step sizes, in its two forms. Back-propagation
# with the published one, and with Adam.
targets = lambda local: dp.oracles.TargetPropagation(0.01, 10.0, local=local)
published = optax.sgd(1e-5, momentum=0.9, nesterov=True)
ways = {
    "targets, not local": (targets(False), optax.sgd(0.1)),
    "targets, local": (targets(True), optax.sgd(0.1)),
    "gradient, momentum": (dp.oracles.Gradient(), published),
    "gradient, Adam": (dp.oracles.Gradient(), optax.adam(1e-3)),
}
loss = dp.losses.SoftmaxCrossEntropy()
test = draw(jr.key(1), num_test)


def train(oracle, optimizer, key):
    """The accuracy on test sequences, and the loss, after every few steps."""
    params, rest = eqx.partition(network(jr.key(0)), eqx.is_inexact_array)
    vd = dp.value_and_direction(loss, oracle)

    def step(carry, key):
        params, state = carry
        value, direction = vd(eqx.combine(params, rest), *draw(key, batch))
        direction = eqx.filter(direction, eqx.is_inexact_array)
        updates, state = optimizer.update(direction, state)
        return (optax.apply_updates(params, updates), state), value

    def some_steps(carry, keys):
        carry, values = jax.lax.scan(step, carry, keys)
        scores = jax.vmap(eqx.combine(carry[0], rest))(test[0])
        right = jnp.argmax(scores, -1) == test[1]
        return carry, (jnp.mean(right), jnp.mean(values))

    keys = jr.split(key, (num_steps // every, every))
    return jax.lax.scan(some_steps, (params, optimizer.init(params)), keys)[1]


curves = {}
for name, way in ways.items():
    run = jax.jit(lambda key, way=way: train(*way, key))
    compiled, start = run.lower(jr.key(2)).compile(), time.perf_counter()
    curves[name] = [np.asarray(curve) for curve in compiled(jr.key(2))]
    seconds = time.perf_counter() - start
    accuracy, losses = curves[name]
    print(f"{name:<24}{losses[-1]:8.4f}{accuracy[-1]:8.3f}{seconds:7.1f} s")

# %%
# Pictures.
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
steps = every * np.arange(1, num_steps // every + 1)
for name, values in curves.items():
    for axis, curve in zip(axes, values, strict=True):
        axis.plot(steps, curve, label=name)
axes[0].set(xlabel="step", ylabel="accuracy on test sequences", ylim=(0, 1.02))
axes[0].axhline(0.25, color="k", linestyle=":", linewidth=1)
axes[1].set(xlabel="step", ylabel="training loss", yscale="log")
axes[0].legend(frameon=False)
figure.savefig(args.out / "temporal_order.png", dpi=120)

# %%
# What must hold.
assert all(np.isfinite(curve).all() for values in curves.values() for curve in values)
if not args.fast:
    final = {name: values[0][-1] for name, values in curves.items()}
    assert final["targets, not local"] > 0.95
    assert final["gradient, momentum"] < 0.3
