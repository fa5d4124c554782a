"""Trains a small convolutional network on digits by Gauss-Newton, SGD and Adam."""

# %%
import argparse
import itertools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import diffprog as dp


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few epochs, as a test")
parser.add_argument("--tune", action="store_true", help="how the settings were found")
args = parser.parse_args()

# %%
# 1797 images of 8 x 8 pixels; the writers of the last 517, for the test, are others.
n, digits = 1280, load_digits()
images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
labels = jnp.asarray(digits.target)
cross_entropy = dp.losses.SoftmaxCrossEntropy()

# %%
# The methods: rules backward, optimizer without its rate, rates, sizes of the batch.
# The first of each is the best of them all; for Gauss-Newton, the best that also stands
# a third of the damping. The damping is constant: rules that adapt it judge a step on
# its own batch, which can be fitted with hardly any. Adam would undo any `scale`.
gradient, solver = dp.oracles.Gradient(), dp.oracles.CG(10, in_outputs=True)
duals = lambda *a: [dp.oracles.DualGaussNewton(jnp.asarray(b), solver) for b in a]
momentum, adam, sgd = optax.trace(0.9), optax.scale_by_adam(), optax.identity()
dampings, sizes = duals(0.01, 0.003, 0.03, 0.1), [16, 32, 64, 128]
methods = {
    "Gauss-Newton, SGD": (dampings, [sgd], [0.3, 0.5, 1.0], [128, 64, 256]),
    "Gauss-Newton, Adam": (duals(1.0, 0.1), [adam], [0.02, 0.01, 0.03, 0.05], [32, 64]),
    "SGD, momentum 0.9": ([gradient], [momentum], [0.1, 0.05, 0.2, 0.3, 0.5], sizes),
    "Adam": ([gradient], [adam], [0.03, 0.005, 0.01, 0.02, 0.05], [32, 16, 64, 128]),
}


# %%
# Two convolutions of stride 2 and a dense layer: 1898 parameters. A convolution is
# written as a product with patches, because XLA's own is slow in loops on the CPU.
def convolution(dense, image):
    size, image = len(image), jnp.pad(image, ((1, 1), (1, 1), (0, 0)))
    corners = itertools.product(range(3), range(3))
    patches = [image[i : i + size : 2, j : j + size : 2] for i, j in corners]
    return jax.vmap(jax.vmap(dense))(jnp.concatenate(patches, -1))


class Classifier(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        sizes = zip((9, 72, 64), (8, 16, 10), jax.random.split(key, 3), strict=True)
        self.layers = [eqx.nn.Linear(n, m, key=key) for n, m, key in sizes]

    def __call__(self, image):
        first, second, head = self.layers
        features = jnp.tanh(convolution(first, image))
        return head(jnp.ravel(jnp.tanh(convolution(second, features))))


# %%
# Only the rule backward and the optimizer differ between the methods. Five models in an
# epoch are kept, to be judged off the clock.
@eqx.filter_jit
def epoch(carry, key, rule, optimizer, rate, batch):
    vd = dp.value_and_direction(cross_entropy, rule)

    def step(carry, rows):
        model, memory, state = carry
        _, direction, state = vd.step(model, state, images[rows], labels[rows])
        updates, memory = optimizer.update(direction, memory)
        model = jax.tree.map(lambda w, u: w - rate * u, model, updates)
        return (model, memory, state), None

    def fifth(carry, rows):
        carry, _ = jax.lax.scan(step, carry, rows)
        return carry, carry[0]

    rows = jax.random.permutation(key, n).reshape(5, -1, batch)
    return jax.lax.scan(fifth, carry, rows)


@jax.jit
@jax.vmap
def judge(model):
    scores = jax.vmap(model)(images)
    wrong = jnp.argmax(scores, -1) != labels
    loss = jnp.mean(cross_entropy(scores, labels)[:n])
    return loss, jnp.mean(wrong[:n]), jnp.mean(wrong[n:])


def run(rule, optimizer, rate, batch, num_epochs=7, budget=0.0, seed=0):
    """Judgments five times an epoch, epochs to 2 % error, and seconds of an epoch."""
    key, model = jax.random.key(seed), Classifier(jax.random.key(seed))
    state = dp.value_and_direction(cross_entropy, rule).init(model)
    carry = model, optimizer.init(model), state
    options = rule, optimizer, jnp.asarray(rate), batch
    jax.block_until_ready(epoch(carry, key, *options))  # compiles
    times, found = [], []
    while len(times) < num_epochs or len(times) * np.median(times) < budget:
        key, start = jax.random.fold_in(key, len(times)), time.perf_counter()
        carry, models = jax.block_until_ready(epoch(carry, key, *options))
        times.append(time.perf_counter() - start)
        found.append(judge(models))
    found = np.concatenate(found, 1)
    reached = np.append(np.flatnonzero(found[1] <= 0.02) + 1, np.inf)[0] / 5
    return found, reached, np.median(times)


# %%
# The tuning: damping, rate, batch, and epochs to 2 %, the mean over three seeds.
for name, grid in methods.items() if args.tune else ():
    for rule, *options in itertools.product(*grid):
        mean = np.mean([run(rule, *options, seed=seed)[1] for seed in range(3)])
        print(f"{name:<19}", rule.damping, *options[1:], f"{mean:.2f}", flush=True)

# %%
# The others run for as many epochs as Gauss-Newton, and on until its time is over.
results, budget, num_epochs = {}, 0.0, 2 if args.fast else 15
print("                     batch  epochs to 2 %  seconds  s / epoch  test error")
for name, grid in methods.items():
    *best, batch = (choices[0] for choices in grid)
    found, reached, seconds = results[name] = run(*best, batch, num_epochs, budget)
    budget, error = budget or num_epochs * seconds, found[2][5 * num_epochs - 1]
    text = f"{name:<21}{batch:>5}{reached:>15.1f}{reached * seconds:>9.3f}"
    print(f"{text}{seconds:>11.4f}{100 * error:>10.1f} %")

# %%
# Against epochs on the left, against seconds on the right.
figure = Figure(figsize=(9, 6), layout="constrained")
axes = figure.subplots(2, 2, sharey="row", sharex="col")
for name, ((loss, error, _), _, seconds) in results.items():
    for (top, bottom), unit in zip(axes.T, (1, seconds), strict=True):
        top.semilogy(unit * np.arange(1, len(loss) + 1) / 5, loss, label=name)
        bottom.plot(unit * np.arange(1, len(loss) + 1) / 5, 100 * error)
        bottom.axhline(2, color="gray", linewidth=0.5)
axes[0, 0].set(ylabel="training loss", xlim=(0, 8))
axes[1, 0].set(xlabel="epochs", ylabel="training error [%]", ylim=(0, 12))
axes[1, 1].set(xlabel="seconds", xlim=(0, budget))
axes[0, 1].legend(frameon=False)
figure.savefig(args.out / "digits_gauss_newton.png", dpi=120)

# %%
# What must hold: fewer epochs to 2 % than SGD and Adam, if not fewer seconds.
assert all(found[0, -1] < found[0, 0] for found, *_ in results.values())
if not args.fast:
    dual_sgd, _, *others = (reached for _, reached, _ in results.values())
    assert dual_sgd + 0.5 < min(others) and max(others) < num_epochs
