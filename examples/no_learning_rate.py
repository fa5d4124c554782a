"""Train without a learning rate.

A model of the loss says how long a step should be. A network learns digits with nothing
to tune, beside Adam with five learning rates.
"""

# %%
# A rate that is too small wastes time, one too large wastes the run, and the best one
# changes with the network, the batch and the day of the training. The curvature of the
# loss knows better: along a direction d the best length is
#
# $$t = -\frac{\langle g, d \rangle}{\langle d, (C + \rho I) d \rangle},$$
#
# with the gradient g and the Gauss-Newton matrix C of the batch, of which one product
# with the Jacobian is enough.
import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import diffprog as dp


try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few epochs, as a test")
args = parser.parse_args()

# %% Digits, and a network for them
# 1797 images of 8 x 8 pixels, of which the network sees 1280, in batches of 128.
images, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(digits))
images, digits = jnp.asarray(images[order] / 16, "float32"), jnp.asarray(digits[order])
first, last = jr.split(jr.key(0))
start = dp.Network(
    [eqx.nn.Linear(64, 64, key=first), jnp.tanh, eqx.nn.Linear(64, 10, key=last)]
)
loss, n, batch = dp.losses.SoftmaxCrossEntropy(), 1280, 128


# %% The loop
# Of the usual loop one line is new: `update` is given the curvature of the batch. A
# *recipe*, [`dp.optim.ggn`][diffprog.optim.ggn], makes it from model and batch; Adam is
# given it too, and does not look at it.
@eqx.filter_jit
def train(optimizer, rate, num_epochs):
    params, rest = eqx.partition(start, eqx.is_inexact_array)
    curvature = dp.optim.ggn(loss)

    def judge(params, rows):
        outputs = jax.vmap(eqx.combine(params, rest))(images[rows])
        return loss(outputs, digits[rows]), jnp.argmax(outputs, 1) == digits[rows]

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(lambda params: jnp.mean(judge(params, rows)[0]))(params)
        at = curvature(eqx.combine(params, rest), images[rows], digits[rows])
        updates, state = optimizer.update(grads, state, params, curvature=at)
        params = jax.tree.map(lambda w, u: w + rate * u, params, updates)
        return (params, state), None

    def epoch(carry, key):
        rows = jr.permutation(key, n).reshape(-1, batch)
        carry, _ = jax.lax.scan(step, carry, rows)
        losses, right = judge(carry[0], jnp.arange(len(digits)))
        return carry, (jnp.mean(losses[:n]), jnp.mean(right[n:]))

    keys = jr.split(jr.key(1), num_epochs)
    return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[1]


# %% Three optimizers
# - [`dp.optim.recommended`][diffprog.optim.recommended] has a direction of its own: for
#   dense layers by the Kronecker factors of their curvature, for others Muon.
# - [`dp.optim.model_step`][diffprog.optim.model_step] around Adam has the direction of
#   Adam, and the length of the model. The rate inside is 1.
# - Adam, with five rates.
#
# `rate` multiplies what the optimizer says: 1 for the first two.
adam = optax.adam(1.0)
runs = {
    "recommended": (dp.optim.recommended(), 1.0),
    "Adam, model step": (dp.optim.model_step(adam), 1.0),
}
for rate in (0.001, 0.003, 0.01, 0.03, 0.1):
    runs[f"Adam, {rate}"] = optax.with_extra_args_support(adam), rate
curves, num_epochs = {}, 3 if args.fast else 20
print(f"{'':18} training loss  right of the unseen  seconds")
for name, (optimizer, rate) in runs.items():
    run = optimizer, jnp.asarray(rate), num_epochs
    jax.block_until_ready(train(*run))  # compiles
    begin = time.process_time()
    losses, right = map(np.asarray, train(*run))
    seconds, curves[name] = time.process_time() - begin, losses
    print(f"{name:18}{losses[-1]:14.1e}{100 * right[-1]:19.1f} %{seconds:9.2f}")

# No rate was chosen, and after 20 epochs the loss is a tenth of that of the best Adam.
# A step costs two to three times as much. Around Adam the model finds a length that is
# as good as one of the better rates, without the jumps of the largest.

# %% What is seen
figure = Figure(figsize=(8, 4), layout="constrained")
axis = figure.subplots()
for name, losses in curves.items():
    style = {"linestyle": "--", "linewidth": 1} if name[:5] == "Adam," else {}
    if name in ("recommended", "Adam, model step"):
        style = {"linewidth": 2.5}
    axis.semilogy(np.arange(1, num_epochs + 1), losses, label=name, **style)
axis.set(xlabel="epoch", ylabel="training loss")
axis.legend(frameon=False)
figure.savefig(args.out / "no_learning_rate.png", dpi=110)

# ![Training losses with and without a learning rate](no_learning_rate.png)

# %% What must hold, and what to change next
# Give another `base` to `recommended` or `model_step`, any that optax has; take a model
# of Flax or haiku, with its `predict` ([the loops](../optim/index.md)); and read where
# this pays and where it does not, on [seven networks](../benchmarks-training.md).
assert all(losses[-1] < losses[0] for losses in curves.values())
if not args.fast:
    tuned = [curve[-1] for name, curve in curves.items() if name[-1].isdigit()]
    assert 2 * curves["recommended"][-1] < min(tuned)
    assert curves["Adam, model step"][-1] < sorted(tuned)[2]
