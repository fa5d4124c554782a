"""Digits with six losses.

The same network, with the same batches, and six f-divergences in the place of that of
softmax: what differs is how many classes keep a chance.
"""

# %%
# A network ends in scores, one per class. An f-divergence turns them into
# probabilities, by `f_softargmax`, and has a loss that fits these, `f_loss`: [how they
# are made](../losses/index.md).
import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffprog import losses, plot


try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few epochs, as a test")
args = parser.parse_args()

# %% Six divergences
# Each with its reference: "unit", 1 for every class, as in entmax, or "uniform". With
# the latter the sparse ones would have few zeros. The last two have heavy tails: with
# "unit" they would need larger scores. For KL both give the same probabilities.
divergences = {
    "KL": (losses.KL(), "unit"),
    "alpha = 1.5": (losses.Alpha(1.5), "unit"),
    "chi-square": (losses.ChiSquare(), "unit"),
    "Le Cam": (losses.LeCam(), "unit"),
    "Jensen-Shannon": (losses.JensenShannon(), "uniform"),
    "sq. Hellinger": (losses.SquaredHellinger(), "uniform"),
}

# %% The training
# 1797 images of 8 x 8 pixels. A quarter of them is for the test.
digits = load_digits()
images = (digits.data / 16).astype(np.float32)
data = train_test_split(images, digits.target, test_size=0.25, random_state=0)
epochs, batch = (4 if args.fast else 40), 64
optimizer = optax.adam(3e-3)


# %%
# A network of one hidden layer. The whole training is a scan over scans, and compiles
# once for each divergence. All start from the same weights and see the same batches.
def init(key):
    W, V = jax.random.normal(key, (2, 64, 64)) / 8
    return W, jnp.zeros(64), V[:, :10], jnp.zeros(10)


def scores(params, images):
    W, b, V, c = params
    return jax.nn.relu(images @ W + b) @ V + c


def mean_loss(params, images, labels, loss):
    return jnp.mean(loss(scores(params, images), labels))


@eqx.filter_jit
def train(params, loss, key, data):
    images, test_images, labels, test_labels = data

    def step(carry, index):
        params, state = carry
        gradient = jax.grad(mean_loss)(params, images[index], labels[index], loss)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(images))
        order = order[: len(order) // batch * batch].reshape(-1, batch)
        carry, _ = jax.lax.scan(step, carry, order)
        right = jnp.argmax(scores(carry[0], test_images), -1) == test_labels
        return carry, (mean_loss(carry[0], images, labels, loss), jnp.mean(right))

    carry = params, optimizer.init(params)
    (params, _), history = jax.lax.scan(epoch, carry, jax.random.split(key, epochs))
    return params, history


# %% What came out
# The support is the number of classes of positive probability, on average over the
# test; the residual says how far the probabilities are from summing to 1.
start_key, key = jax.random.split(jax.random.key(0))
histories, supports = {}, {}
print(f"{'divergence':<16}{'reference':<11}accuracy  support  residual")
for name, (f, reference) in divergences.items():
    params, history = train(init(start_key), losses.FLoss(f, reference), key, data)
    histories[name] = [np.asarray(h) for h in history]
    solved = losses.diagnose(scores(params, data[1]), f, reference)
    supports[name] = np.asarray(solved.support)
    print(
        f"{name:<16}{reference:<11}{history[1][-1]:8.3f} {supports[name].mean():8.2f}"
        f"{solved.residual.max():10.1e}"
    )

# The test has 450 images, and the six accuracies lie four images apart, which says
# nothing. What differs is the support. With alpha = 1.5, chi-square and Le Cam most
# images keep a single class.

# %%
figure = Figure(figsize=(9, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
for name, (loss, accuracy) in histories.items():
    left.semilogy(np.arange(1, epochs + 1), loss / loss[0], label=name)
    right.plot(np.arange(1, epochs + 1), 100 * (1 - accuracy))
left.set(xlabel="epoch", ylabel="training loss / that after epoch 1")
right.set(xlabel="epoch", ylabel="test error [%]", ylim=(0, 12))
figure.legend(loc="outside right center", frameon=False)
figure.savefig(args.out / "digits_curves.png", dpi=120)

# ![Training loss and test error of six divergences](digits_curves.png)

# %% The operators
# The probability of the first of three classes with the scores x, y
# and 0. Where it is hatched, it is exactly 0 (white) or exactly 1 (black).
grid = np.linspace(-4, 4, 240, dtype=np.float32)
x, y = np.meshgrid(grid, grid)
plane = np.stack([x, y, np.zeros_like(x)], -1)
figure = Figure(figsize=(9, 6.2), layout="constrained")
all_axes, zeros = figure.subplots(2, 3, sharex=True, sharey=True), {}
for ax, (name, (f, reference)) in zip(all_axes.flat, divergences.items(), strict=True):
    p = np.asarray(losses.f_softargmax(plane, f, reference))
    zeros[name] = np.mean(p == 0)
    ax.contour(grid, grid, p[..., 0], np.arange(1, 10) / 10, colors="w", linewidths=0.6)
    for exact, color in ((p[..., 0] == 0, "w"), ((p[..., 1:] == 0).all(-1), "k")):
        hatched = ax.contourf(
            grid, grid, exact, [0.5, 2], colors="none", hatches=["//"]
        )
        hatched.set(edgecolor=color, linewidth=0)
    picture = ax.pcolormesh(grid, grid, p[..., 0], vmin=0, vmax=1, zorder=0)
    ax.set(title=f"{name} ({reference})", aspect="equal")
figure.supxlabel("score of the first class; that of the third is 0")
figure.supylabel("score of the second class")
figure.colorbar(picture, ax=all_axes, label="probability of the first", shrink=0.7)
figure.savefig(args.out / "digits_operators.png", dpi=100)

# ![A probability over the plane of three scores, for six
# divergences](digits_operators.png)

# %% What must hold, and what to change next
# Where a divergence is sparse, most probabilities of the digits are 0; the others give
# no zeros. Try `losses.Alpha(1.1)`, or a generator of your own: [losses of any
# f-divergence](../losses/index.md).
for name, (f, _) in divergences.items():
    (loss, accuracy), support = histories[name], supports[name]
    assert loss[-1] < loss[0] and accuracy[-1] > (0.8 if args.fast else 0.95), name
    assert zeros[name] > 0.1 if f.sparse else zeros[name] == 0, name
    assert support.mean() < 5 if f.sparse else np.all(support == 10), name
