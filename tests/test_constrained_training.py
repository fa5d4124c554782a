"""Constraints in learning on data: what limits on rates do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split

import diffprog as dp


pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def mean(values, of):
    return jnp.mean(values.astype(float), where=of)


@pytest.fixture(scope="module")
def diabetes():
    """Measurements, whether the disease went on, and who is heavy: 442 people."""
    data, progress = map(np.asarray, load_diabetes(return_X_y=True))
    above = lambda values: jnp.asarray(values > np.median(values))
    inputs = jnp.asarray((data - data.mean(0)) / data.std(0))
    return inputs, above(progress), above(data[:, 2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["free", "smooth", "strict"])
def test_two_groups_are_told_alike(kind, diabetes):
    """The gap of their rates is at most 5 %: that of sigmoids does not suffice."""
    inputs, label, heavy = diabetes
    gap = lambda rates: jnp.abs(mean(rates, heavy) - mean(rates, ~heavy))

    def measure(w):
        scores = inputs @ w[1:] + w[0]
        loss = jnp.mean(jax.nn.softplus(jnp.where(label, -scores, scores)))
        true = gap(scores > 0)
        strict = true if kind == "strict" else None
        smooth = gap(jax.nn.sigmoid(scores))
        at_most = dp.constrained.at_most(smooth, 0.05, strict=strict)
        return loss, {"gap": at_most}, true

    PI, Penalty = dp.constrained.PI, dp.constrained.Penalty
    dual = Penalty(0.0) if kind == "free" else PI(2.0, gain=20.0)
    lagrangian, tx = dp.constrained.Lagrangian(measure, dual), optax.adam(0.01)

    def step(carry, _):
        w, state, duals, best = carry
        (loss, report), grads, duals = lagrangian.step(w, duals)
        best = best.update(w, loss, report)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(w, updates), state, duals, best), None

    w = jnp.zeros(11)
    carry = w, tx.init(w), lagrangian.init(w), dp.constrained.Best(w)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000)[0])
    w, _, _, best = run(carry)
    found = measure(best.params if kind == "strict" else w)[2]
    if kind == "strict":
        assert best.found and found <= 0.05
    else:
        assert found > (0.5 if kind == "free" else 0.1)


@pytest.mark.slow
def test_few_units_violate_more_bounds_but_less():
    """Bounds of every loss that eight units cannot keep, against the mean loss.

    The training data of `examples/feasible_digits.py`.
    """
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (images / 16).astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0)
    images, _, labels, _ = (jnp.asarray(part) for part in parts)
    rows, limit, tx = len(images), -np.log(np.float32(0.6)), optax.adamw(2e-3)

    def losses(params, images, labels):
        W, b, V, c = params
        outputs = jax.vmap(lambda x: jax.nn.relu(x @ W + b) @ V + c)(images)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    def measure(params, index, weight):
        found = losses(params, images[index], labels[index])
        bound = dp.constrained.at_most(found, limit, index=index, rows=rows)
        return weight * jnp.mean(found), {"losses": bound}

    @jax.jit
    def train(key, step, weight):
        lagrangian = dp.constrained.Lagrangian(measure, dp.constrained.Ascent(step))

        def update(carry, index):
            params, state, duals = carry
            _, grads, duals = lagrangian.step(params, duals, index, weight)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, duals), None

        def epoch(carry, key):
            order = jax.random.permutation(key, rows)[: rows // 128 * 128]
            return jax.lax.scan(update, carry, order.reshape(-1, 128))[0], None

        first, last = jax.random.split(key)
        W = jax.random.normal(first, (64, 8), np.float32) / 8
        V = jax.random.normal(last, (8, 10), np.float32) / np.float32(8**0.5)
        params = W, jnp.zeros(8, np.float32), V, jnp.zeros(10, np.float32)
        duals = lagrangian.init(params, jnp.arange(128), weight)
        carry = params, tx.init(params), duals
        carry, _ = jax.lax.scan(epoch, carry, jax.random.split(key, 300))
        return losses(carry[0], images, labels)

    keys = [jax.random.key(seed) for seed in (0, 1)]
    weigh = lambda step, weight: np.array(
        [train(key, np.float32(step), np.float32(weight)) for key in keys]
    )
    mean, bounds = weigh(0, 1), weigh(0.1, 0)
    assert 0.02 > np.mean(mean > limit) > 0.008
    assert np.mean(bounds > limit) > 1.1 * np.mean(mean > limit)
    assert np.all(bounds.max(1) < 0.5 * mean.max(1))
