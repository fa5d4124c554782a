"""Constraints in learning on data: what limits on rates do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_diabetes

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
