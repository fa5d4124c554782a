"""Trains a small Transformer on characters, with three losses and by distillation."""

# %%
# The text is that of Python's own `help`.
import argparse
import pydoc_data.topics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from diffprog import losses, plot


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()

context, width, heads, layers = (16, 32, 2, 1) if args.fast else (64, 64, 4, 2)
batch, num_steps, num_tests = (8, 10, 16) if args.fast else (16, 300, 128)

# %%
# Its characters as numbers; the last tenth is for the test.
text = "\n".join(pydoc_data.topics.topics.values())
alphabet, codes = np.unique(list(text), return_inverse=True)
codes, test = np.split(codes, [len(codes) * 9 // 10])
k = len(alphabet)


# %%
# The model: the scores of the next character, at every place of a window.
def init(key):
    keys = iter(jax.random.split(key, 4 * layers + 3))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    matrix = lambda m, n: normal(m, n) / (2 * m**0.5)
    shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    block = lambda: {n: matrix(a * width, b * width) for n, (a, b) in shapes.items()}
    return {
        "letters": 0.3 * normal(k, width),
        "places": 0.3 * normal(context, width),
        "blocks": [block() for _ in range(layers)],
        "head": matrix(width, k),
    }


def scores(params, letters):
    x = params["letters"][letters] + params["places"]
    for block in params["blocks"]:
        qkv = jax.nn.standardize(x) @ block["qkv"]
        qkv = jnp.moveaxis(qkv.reshape(*x.shape[:-1], 3, heads, -1), -3, 0)
        h = jax.nn.dot_product_attention(*qkv, is_causal=True)
        x = x + h.reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ block["up"]) @ block["down"]
    return jax.nn.standardize(x) @ params["head"]


# %%
# One scan trains a model, and gives its loss per character after each step. With a
# teacher, the targets are the probabilities that the teacher gives.
schedule = optax.warmup_cosine_decay_schedule(0, 1e-2, num_steps // 10, num_steps)
optimizer = optax.adam(schedule)


def windows(codes, starts):
    rows = codes[starts[:, None] + np.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


@eqx.filter_jit
def train(params, loss, key, codes, teacher=None):
    def step(carry, key):
        params, state = carry
        starts = jax.random.randint(key, (batch,), 0, len(codes) - context)
        letters, targets = windows(codes, starts)
        if teacher is not None:
            targets = losses.f_softargmax(scores(teacher, letters), losses.KL())
        objective = lambda p: jnp.mean(loss(scores(p, letters), targets)) / context
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    carry = params, optimizer.init(params)
    (params, _), history = jax.lax.scan(step, carry, jax.random.split(key, num_steps))
    return params, history


# %%
# Four models from the same start, with the reference "unit" of entmax. Bits are
# infinite where a true character has probability 0 (missed). Calibration is how far the
# largest probability is from how often that character is the true one (top-1).
divergences = {
    "KL": losses.KL(),
    "Jensen-Shannon": losses.JensenShannon(),
    "alpha = 1.5": losses.Alpha(1.5),
    "alpha = 1.5, distilled": losses.Alpha(1.5),  # the first is its teacher
}
letters, truth = windows(test, 300 * np.arange(num_tests))
start_key, key = jax.random.split(jax.random.key(0))
models, histories, reliabilities, supports = {}, {}, {}, {}
print(" " * 24 + "bits  f-loss  top-1  calibration  support  missed    time")
for name, f in divergences.items():
    start, loss = time.perf_counter(), losses.FLoss(f, "unit")
    teacher = models["KL"] if "distilled" in name else None
    models[name], history = train(init(start_key), loss, key, codes, teacher)
    theta = scores(models[name], letters)
    p = np.asarray(losses.f_softargmax(theta, f, "unit"))
    true = np.take_along_axis(p, truth[..., None], -1)
    bits = -np.mean(np.log2(true)) if np.all(true > 0) else np.inf
    right, sure = 1.0 * (p.argmax(-1) == truth), p.max(-1)
    totals = lambda weights: np.histogram(sure, 10, (0, 1), weights=weights)[0]
    count, sums, hits = map(totals, (None, sure, right))
    error = np.abs(sums - hits).sum() / truth.size
    assert args.fast or (right.mean() > 0.35 and error < 0.1), name
    histories[name], supports[name] = np.asarray(history), np.sum(p > 0, -1)
    reliabilities[name] = [a[count > 20] / count[count > 20] for a in (sums, hits)]
    print(
        f"{name:<22}{bits:6.3f} {loss(theta, truth).mean() / context:7.3f} "
        f"{right.mean():6.3f} {error:12.3f} {supports[name].mean():8.1f} "
        f"{np.mean(true == 0):7.4f} {time.perf_counter() - start:5.1f} s"
    )

# %%
# Each loss has its own unit, so the curves start at 1.
figure = Figure(figsize=(11, 3.8), layout="constrained")
left, middle, right = figure.subplots(1, 3)
middle.plot([0, 1], [0, 1], color="0.7", linestyle="--")
for name, history in histories.items():
    left.plot(history / history[0], label=name, linewidth=1)
    middle.plot(*reliabilities[name], marker=".")
    right.hist(supports[name].ravel(), np.arange(0, k + 5, 4), histtype="step")
left.set(xlabel="step", ylabel="training loss / that at the start", ylim=(0, 1.05))
middle.set(xlabel="probability of the likeliest", ylabel="how often it is the true one")
right.set(xlabel="characters of positive probability", ylabel="places", yscale="log")
right.set_title("KL and Jensen-Shannon: all", fontsize="medium")
figure.legend(loc="outside upper center", ncols=4, frameon=False)
figure.savefig(args.out / "characters.png", dpi=100)

# %%
# What must hold.
for name, f in divergences.items():
    assert histories[name][-3:].mean() < histories[name][0], name
    assert (supports[name].mean() < k) == f.sparse, name
