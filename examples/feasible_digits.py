"""Bound the loss of every example.

Not on average: a network has to give the right digit of every single training image the
probability 0.6, or pay where it cannot. Every image has a multiplier of its own.
"""

# %%
# A mean is content with a few examples far off. A bound for each of them is not.
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffprog as dp


try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few epochs, as a test")
parser.add_argument("--units", type=int, default=48, help="of the hidden layer")
args = parser.parse_args()
digits = load_digits()
images = (digits.data / 16).astype(np.float32)
parts = train_test_split(images, digits.target, test_size=0.25, random_state=0)
images, unseen, labels, unseen_labels = (jnp.asarray(part) for part in parts)
limit, seeds = float(-np.log(0.6)), (0,) if args.fast else (0, 1)
epochs, batch, rows = (3 if args.fast else 300), 128, len(images)


# %% A network of one hidden layer
def init(key):
    first, last = jax.random.split(key)
    W = jax.random.normal(first, (64, args.units)) / 8
    V = jax.random.normal(last, (args.units, 10)) / args.units**0.5
    return W, jnp.zeros(args.units), V, jnp.zeros(10)


def scores(params, images):
    W, b, V, c = params
    return jax.nn.relu(images @ W + b) @ V + c


def losses(params, images, labels):
    outputs = scores(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


# %% A limit with many rows
# `weight` is that of the mean loss: 0 leaves nothing but the limits. A batch sees some
# rows of the table of multipliers, those of its images.
def measure(params, index, weight):
    found = losses(params, images[index], labels[index])
    bound = dp.constrained.at_most(found, limit, index=index, rows=rows)
    return weight * jnp.mean(found), {"losses": bound}


tx = optax.adamw(2e-3)


@jax.jit
def train(key, dual, weight):
    lagrangian = dp.constrained.Lagrangian(measure, dual)

    def step(carry, index):
        params, state, duals = carry
        _, grads, duals = lagrangian.step(params, duals, index, weight)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, duals), None

    def epoch(carry, key):
        order = jax.random.permutation(key, rows)
        order = order[: rows // batch * batch].reshape(-1, batch)
        carry, _ = jax.lax.scan(step, carry, order)
        found = losses(carry[0], images, labels)
        price = jnp.max(carry[2]["losses"].value)
        return carry, (jnp.mean(found), jnp.max(found) - limit, price)

    params = init(key)
    duals = lagrangian.init(params, jnp.arange(batch), weight)
    carry = params, tx.init(params), duals
    (params, *_), history = jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
    return params, history


# %% Four runs
# The mean alone; the limits alone; the mean with limits that give way where they cost
# more than they are worth.
runs = {
    "mean": (dp.constrained.Penalty(0.0), 1.0),
    "limits": (dp.constrained.Ascent(0.1), 0.0),
    "relaxed, and mean": (dp.constrained.Relaxed(1.0), 1.0),
    "relaxed": (dp.constrained.Relaxed(1.0), 0.0),
}
found, histories = {}, {}
print(f"{'':20} training: violated  largest   unseen: right  5 largest  mean")
for seed in seeds:
    for name, run in runs.items():
        params, history = train(jax.random.key(seed), *run)
        histories.setdefault(name, history)
        seen = losses(params, images, labels)
        new = losses(params, unseen, unseen_labels)
        right = jnp.mean(jnp.argmax(scores(params, unseen), -1) == unseen_labels)
        row = jnp.mean(seen > limit), jnp.max(seen), right, jnp.mean(jnp.sort(new)[-5:])
        a, b, c, d = found[name, seed] = [float(number) for number in row]
        print(
            f"{name:18}{seed:2} {100 * a:16.2f} % {b:8.2f} {100 * c:13.1f} % {d:9.2f}"
            f" {jnp.mean(new):6.2f}"
        )

# The network is large enough that the mean of the losses reaches every bound as well,
# far below it. What bounds change is the tail on unseen images: the mean of the five
# largest losses. Where they give way, beside the mean, it is less than half, for 0.2 to
# 0.4 points of accuracy. Bounds alone cost more, since nothing pushes a loss that is
# within its bound any further.

# %% What is seen
figure = Figure((10.0, 3.2), layout="constrained")
axes = figure.subplots(1, 3)
titles = "mean training loss", "largest violation", "largest multiplier"
for axis, title, place in zip(axes, titles, range(3), strict=True):
    for name, history in histories.items():
        axis.plot(history[place], label=name)
    axis.set(xlabel="epoch", title=title)
axes[0].set_yscale("log")
axes[1].axhline(0, color="0.35", linewidth=1.0, linestyle="--")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
figure.savefig(args.out / "feasible_digits.png", dpi=110)

# ![Mean loss, largest violation and largest multiplier by epoch](feasible_digits.png)

# %% What must hold, and what to change next
# Ask for 0.9 in the place of 0.6, or take `--units 8`, with which no network keeps all
# [bounds](../constrained-learning.md#a-limit-for-every-example). With 48:
for seed in () if args.fast or args.units != 48 else seeds:
    violated, largest, *_ = found["limits", seed]
    assert violated <= 0.003 and largest <= 0.6
    _, _, right, tail = found["mean", seed]
    _, _, other, relaxed = found["relaxed, and mean", seed]
    assert relaxed <= 0.65 * tail and other >= right - 0.01
