"""Learns which labels go together, and the log-partition of every input with them."""

# %%
# Settings. An input has k labels on or off: 2^k subsets, few enough here to check the
# answer. The objective never lists them; it looks at a few random ones per example.
import argparse
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax

import diffprog as dp


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
matplotlib.use("Agg")
import matplotlib.pyplot as plt


k, n, num_train, num_test = 7, 5, 2000, 500
num_steps, batch, num_samples = (100, 64, 32) if args.fast else (1200, 64, 32)
labels = dp.losses.Subsets(k)
every = labels.all()


# %%
# The energy scores labels one by one, from the input, and in pairs. The log-partition
# is a small network.
def energy(params, x, y):
    model = params["energy"]
    return y @ (model["A"] @ x + model["b"]) + y @ model["P"] @ y / 2


def log_partition(params, x):
    net = params["partition"]
    hidden = jnp.tanh(net["W"] @ x + net["c"])
    return net["v"] @ hidden + net["d"]


def initial(key, start):
    width, (first, second) = 64, jr.split(key)
    partition = {
        "W": jr.normal(first, (width, n)) / jnp.sqrt(n),
        "c": jnp.zeros(width),
        "v": 0.01 * jr.normal(second, (width,)),
        "d": jnp.asarray(start),
    }
    model = {"A": jnp.zeros((k, n)), "b": jnp.zeros(k), "P": jnp.zeros((k, k))}
    return {"energy": model, "partition": partition}


# %%
# Data from such a model: labels that like or exclude each other.
keys = jr.split(jr.key(0), 6)
P = jnp.triu(1.2 * jr.normal(keys[0], (k, k)), 1)
truth = {"A": jr.normal(keys[1], (k, n)), "b": -jnp.ones(k), "P": P + P.T}
xs = jr.normal(keys[2], (num_train + num_test, n))
score = jax.vmap(energy, (None, None, 0))
scores = jax.vmap(lambda x: score({"energy": truth}, x, every.candidates))(xs)
ys = every.candidates[jr.categorical(keys[3], scores)]
train, test = slice(None, num_train), slice(num_train, None)


# %%
# Training, and the exact loss on the way. The reference is 1 for each subset.
def fit(f, exactly):
    mass = float(labels.size)
    sampled = dp.losses.minmin_objective(
        energy, log_partition, labels, f, num_samples=num_samples, mass=mass
    )
    exact = dp.losses.exact_objective(energy, every, f, mass=mass)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, num_steps))

    def loss(params, key):
        rows, keys = jr.randint(key, (batch,), 0, num_train), jr.split(key, batch)
        if exactly:
            values = jax.vmap(exact, (None, 0, 0))(params, xs[rows], ys[rows])[0]
        else:
            each = jax.vmap(sampled, (None, 0, 0, 0))
            values = each(params, xs[rows], ys[rows], keys)[0]
        return jnp.mean(values)

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def some_steps(carry, key):
        carry, _ = jax.lax.scan(step, carry, jr.split(key, num_steps // 20))
        return carry, evaluate(carry[0])[0].mean()

    evaluate = lambda params: jax.vmap(exact, (None, 0, 0))(params, xs[test], ys[test])
    # Right at first: u(0 - t) = 1 / 2^k. Far below, weights explode; far above, where
    # ratios can be 0, all samples have weight 0.
    start = -f.origin - f.link(jnp.array(1 / mass))
    params = initial(keys[4], start)
    carry, curve = (params, optimizer.init(params)), [evaluate(params)[0].mean()]
    clock = time.perf_counter()
    for key in jr.split(keys[5], 20):
        carry, value = some_steps(carry, key)
        curve.append(value)
    seconds = time.perf_counter() - clock
    t = jax.vmap(log_partition, (None, 0))(carry[0], xs[test])
    return np.array(curve), np.asarray(t), np.asarray(evaluate(carry[0])[1]), seconds


divergences = {"KL": dp.losses.KL(), "alpha = 1.5": dp.losses.Alpha(1.5)}
ways = {"exact": True, "min-min": False}
results = {(a, b): fit(divergences[a], ways[b]) for a in divergences for b in ways}
print("loss on test data; t against the exact log-partition")
for (name, way), (curve, t, tau, seconds) in results.items():
    line = f"{name:<12} {way:<8} {curve[0]:.4f} -> {curve[-1]:.4f}  {seconds:4.1f} s"
    if way == "min-min":
        error, r = np.abs(t - tau).mean(), np.corrcoef(t, tau)[0, 1]
        line += f"  mean error {error:.3f}, correlation {r:.4f}"
    print(line)

# %%
# Pictures.
figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), layout="constrained")
for (top, bottom), name in zip(axes.T, divergences, strict=True):
    steps = np.linspace(0, num_steps, 21)[1:]
    for way, style in (("min-min", "o-"), ("exact", "k--")):
        top.plot(steps, results[name, way][0][1:], style, markersize=4, label=way)
    top.set(title=name, xlabel="step", ylabel="exact loss on test data")
    top.legend(frameon=False)
    _, t, tau, _ = results[name, "min-min"]
    bottom.axline((tau[0], tau[0]), slope=1, color="k", linestyle="--", linewidth=1)
    bottom.plot(tau, t, ".", alpha=0.5)
    bottom.set(xlabel="exact log-partition", ylabel="learned t(x), unseen x")
figure.savefig(args.out / "multilabel.png", dpi=120)

# %%
# What must hold.
for name in divergences:
    (curve, t, tau, _), best = results[name, "min-min"], results[name, "exact"][0][-1]
    assert best - 0.01 <= curve[-1] < curve[0], name
    if not args.fast:
        assert curve[-1] - best < 0.1, name
        assert np.corrcoef(t, tau)[0, 1] > 0.98, name
