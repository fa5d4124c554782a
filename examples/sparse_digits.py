"""Train a network of half the weights.

Or of 70 or 30 %, as asked for: gates that are exactly 0, and a limit on the share that
is left.
"""

# %%
# Every input and every hidden unit has a gate that is closed, exactly 0, with some
# probability. The limit is on the expected share of weights that are left.
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
parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
args = parser.parse_args()
data, digits = load_digits(return_X_y=True)
parts = train_test_split(np.float32(data / 16), digits, test_size=0.25, random_state=0)
images, unseen, labels, unseen_labels = (jnp.asarray(part) for part in parts)
epochs, batch = (3 if args.fast else 250), 128


# %% The network and its gates
# 64-128-10 units. Without a key the gates are those of the median.
def init(key):
    first, last = jax.random.split(key)
    W = jax.random.normal(first, (64, 128)) / 8
    V = jax.random.normal(last, (128, 10)) / 11
    gates = [dp.constrained.HardConcrete(size, 0.1) for size in (64, 128)]
    return {"net": (W, jnp.zeros(128), V, jnp.zeros(10)), "gates": gates}


def scores(params, images, keys=(None, None)):
    W, b, V, c = params["net"]
    inputs, units = (gate(key) for gate, key in zip(params["gates"], keys, strict=True))
    return (jax.nn.relu((images * inputs) @ W + b) * units) @ V + c


def share(inputs, units):
    """Weights are left where both their ends are."""
    return (inputs * units * 64 + units * 10) / 74


def density(params):
    return share(*(gate.density() for gate in params["gates"]))


def realized(params):
    return share(*(gate.realized_density() for gate in params["gates"]))


# %% The limit
# With a limit, PI finds the multiplier. Without one, the density is part of the loss,
# with a weight that has to be guessed: 0.1 lands at 72 %, 1 at 40 %.
def measure(params, index, key, limit, weight):
    outputs = scores(params, images[index], jax.random.split(key))
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels[index])
    loss, left = jnp.mean(losses), density(params)
    constraint = dp.constrained.at_most(left, limit)
    return loss + weight * left, {"density": constraint}, loss


tx = optax.multi_transform(
    {"net": optax.adam(2e-3), "gates": optax.adam(0.03)},
    {"net": "net", "gates": "gates"},
)
lagrangian = dp.constrained.Lagrangian(measure, dp.constrained.PI(0.05, gain=20.0))


@jax.jit
def train(key, limit, weight):
    def step(carry, now):
        params, state, duals = carry
        given = *now, limit, weight
        (_, report), grads, duals = lagrangian.step(params, duals, *given)
        updates, state = tx.update(grads, state, params)
        price = report.multipliers["density"]
        return (optax.apply_updates(params, updates), state, duals), (report.aux, price)

    def epoch(carry, key):
        order = jax.random.permutation(key, len(images))
        order = order[: len(order) // batch * batch].reshape(-1, batch)
        carry, (loss, price) = jax.lax.scan(
            step, carry, (order, jax.random.split(key, len(order)))
        )
        return carry, (jnp.mean(loss), density(carry[0]), price[-1])

    params = init(key)
    given = jnp.arange(batch), key, limit, weight
    carry = params, tx.init(params), lagrangian.init(params, *given)
    (params, _, _), history = jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
    right = jnp.argmax(scores(params, unseen), -1) == unseen_labels
    return density(params), realized(params), jnp.mean(right), history


# %% Five runs
# Density, that of the gates of the median, and the accuracy on unseen digits.
asked = {"limit 70 %": (0.7, 0.0), "limit 50 %": (0.5, 0.0), "limit 30 %": (0.3, 0.0)}
asked |= {"penalty 0.1": (1.0, 0.1), "penalty 1": (1.0, 1.0)}
found, histories = {}, {}
print(f"{'':12} density  median  accuracy")
for name, (limit, weight) in asked.items():
    *found[name], histories[name] = train(jax.random.key(args.seed), limit, weight)
    print(f"{name:12}", *(f"{100 * float(number):7.2f}" for number in found[name]))

# A limit is met, with `--seed 1` and 2 too; where penalties land nobody could say. The
# median network, which is what is kept, is sparser than the expected one.

# %% What is seen
figure = Figure((10.0, 3.2), layout="constrained")
axes = figure.subplots(1, 3)
titles = "training loss", "density [%]", "multiplier"
for axis, title, place in zip(axes, titles, range(3), strict=True):
    for name, history in histories.items():
        values = 100 * history[place] if place == 1 else history[place]
        if place == 2:
            values = np.where(np.asarray(values) > 0, values, np.nan)
        axis.plot(values, "--" if "penalty" in name else "-", label=name)
    axis.set(xlabel="epoch", title=title)
    if place != 1:
        axis.set_yscale("log")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
figure.savefig(args.out / "sparse_digits.png", dpi=110)

# ![Cross-entropy, density and multiplier against the epoch](sparse_digits.png)

# %% What must hold, and what to change next
# Limit inputs and units apart, each with a name of its own; or put gates into a network
# of yours: [`HardConcrete`][diffprog.constrained.HardConcrete] is a module.
if not args.fast:
    for percent, accuracy in ((70, 0.97), (50, 0.95), (30, 0.92)):
        left, _, right = found[f"limit {percent} %"]
        assert abs(100 * left - percent) < 1 and right >= accuracy, percent
