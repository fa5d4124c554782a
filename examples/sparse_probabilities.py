"""Probabilities that are exactly zero.

f-softargmax turns scores into probabilities as softmax does, but a class that is far
behind gets none. First three scores, then a classifier that says which digits are
possible at all.
"""

# %%
# Softmax gives every class some probability, however hopeless its score is: nothing is
# ever ruled out. Other divergences make other softmaxes, and some of these have zeros.
import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from diffprog import losses, plot


try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()

# %% Three scores
# The probabilities are those of the best trade of score against divergence,
#
# $$\operatorname{softargmax}_f(\theta) = \operatorname{argmax}_{p \in \Delta} \;
# \langle p, \theta \rangle - \sum_j q_j f(p_j / q_j).$$
#
# With f of Kullback and Leibler that is softmax. Two others are known by names of their
# own where the reference q is 1 for every class, `"unit"`: alpha = 1.5 is 1.5-entmax,
# and chi-square is sparsemax. `"uniform"` would be 1/3 each, and another operator.
divergences = {
    "KL (softmax)": losses.KL(),
    "alpha = 1.5 (entmax)": losses.Alpha(1.5),
    "chi-square (sparsemax)": losses.ChiSquare(),
}
theta = jnp.array([1.0, 0.5, -1.0])
for name, f in divergences.items():
    for factor in (1, 2):
        p = losses.f_softargmax(factor * theta, f, "unit")
        print(f"{name:24} {factor} x scores", *(f"{one:7.3f}" for one in p))

# A zero is exact: a class that is more than a margin behind is out. The margin is 1 for
# chi-square and 2 for alpha = 1.5, between the best score and the second where a single
# class is left. So the size of scores decides how many zeros there are, and training
# finds it.

# %% The loss that fits
# Each operator has a loss, [`losses.FLoss`][diffprog.losses.FLoss]: convex, with the
# gradient p - y, and 0 exactly where p is the label. For KL it is the cross entropy.
# Cross entropy of sparse probabilities would be infinite at a zero; this one is not.
lead = jnp.linspace(-3.0, 3.0, 9 if args.fast else 121)
scores = jnp.stack([lead, jnp.zeros_like(lead)], 1)
lines = {
    name: (
        losses.f_softargmax(scores, f, "unit")[:, 0],
        losses.f_loss(scores, jnp.zeros(len(lead), int), f, "unit"),
    )
    for name, f in divergences.items()
}


# %% Digits that are hard to read
# 300 images to learn from, 1497 to judge by, all with noise. Only the loss changes.
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
noise = 0.25 * np.random.default_rng(1).normal(size=images.shape)
images = jnp.asarray(images[order] / 16 + noise, "float32")
labels, n = jnp.asarray(labels[order]), 300
optimizer = optax.adamw(3e-3, weight_decay=0.3)


@eqx.filter_jit
def train(loss, num_steps):
    net = eqx.nn.MLP(64, 10, 64, 1, key=jr.key(0))
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    outputs = lambda params, x: jax.vmap(eqx.combine(params, rest))(x)

    def step(carry, key):
        params, state = carry
        rows = jr.choice(key, n, (50,), replace=False)
        mean = lambda w: jnp.mean(loss(outputs(w, images[rows]), labels[rows]))
        updates, state = optimizer.update(jax.grad(mean)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, carry, jr.split(jr.key(1), num_steps))
    return outputs(params, images[n:])


# %% What the zeros say
# `support` is how many digits have a positive probability, on average; `missed` how
# often the true one has none; `calibration` how far the largest probability is from how
# often it is right. `one left` says of how many images one digit is left, and how many
# of these are right.
truth, sizes, table = np.asarray(labels[n:]), {}, {}
print(f"{'':24} right  calibration  support  one left: right  more: right  missed")
for name, f in divergences.items():
    found = train(losses.FLoss(f, "unit"), 20 if args.fast else 600)
    p = np.asarray(losses.f_softargmax(found, f, "unit"))
    right, sure, sizes[name] = p.argmax(1) == truth, p.max(1), (p > 0).sum(1)
    bins = np.minimum((10 * sure).astype(int), 9)
    error = sum(abs(np.sum((sure - right)[bins == i])) for i in range(10)) / len(p)
    one = sizes[name] == 1
    share = lambda rows: f"{100 * rows.mean():5.1f} %" if rows.size else "      -"
    missed = np.mean(p[np.arange(len(p)), truth] == 0)
    table[name] = right.mean(), right[one].mean() if one.any() else 0.0, missed
    print(
        f"{name:22}{share(right)} {error:10.3f} {sizes[name].mean():9.2f}"
        f" {share(one)} {share(right[one])} {share(right[~one])} {100 * missed:6.1f} %"
    )

# A quarter of the images has one digit left, and nearly all of these are right. For the
# others two or three digits are possible at all, and the true one is seldom left out.

# %% What is seen
figure = Figure(figsize=(12, 3.8), layout="constrained")
left, middle, bars = figure.subplots(1, 3)
for i, (name, (p, loss)) in enumerate(lines.items()):
    left.plot(lead, p, label=name)
    middle.plot(lead, loss)
    count = np.bincount(sizes[name], minlength=11)[1:]
    bars.bar(np.arange(1, 11) + 0.27 * (i - 1), count / count.sum(), 0.27)
left.set(xlabel="lead of the first of two classes", ylabel="its probability")
middle.set(xlabel="lead", ylabel="loss, if it is the true one")
bars.set(xlabel="digits of positive probability", ylabel="share of the images")
figure.legend(loc="outside upper center", ncols=3, frameon=False)
figure.savefig(args.out / "sparse_probabilities.png", dpi=110)

# ![Probability and loss against a lead; sizes of supports](sparse_probabilities.png)

# %% What must hold, and what to change next
# Take `losses.Alpha(1.2)`, between the first two, or thousands of classes; all
# [generators and references](../losses/index.md) have a page.
for name, (right, alone, missed) in table.items():
    assert args.fast or right > 0.75
    assert missed == 0 if "KL" in name else args.fast or alone > 0.98 > 10 * missed
