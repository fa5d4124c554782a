"""What directions for networks ask of a loss, for every loss of a list."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog import losses
from diffprog.losses import Alpha, ChiSquare, KL, ReverseKL


M, K = 3, 4  # examples, outputs
RNG = np.random.default_rng(0)
U = RNG.normal(size=(M, K)) * [[0.5], [2.0], [6.0]]
Y = RNG.normal(size=(M, K))
SIGNS = np.sign(RNG.normal(size=(M, K)))
LABELS = np.array([0, 3, 1])
TOKENS = np.array([[0, 1], [1, 1], [0, 0]])
SOFT = RNG.dirichlet(np.ones(K), size=M)
MEASURE = np.array([0.2, 1.7, 0.6, 1.0])


def custom(outputs, targets):
    """Convex, with a Hessian that is not diagonal."""
    r = outputs - targets
    return jnp.log1p(jnp.sum(jnp.cosh(r), -1)) + jnp.sum(r, -1) ** 4


# Name: loss, outputs, targets.
CASES = {
    "Squared": (losses.Squared(), U, Y),
    "Logistic": (losses.Logistic(), U, SIGNS),
    "Huber": (losses.Huber(1.5), U, Y),
    "Absolute": (losses.Absolute(), U, Y),
    "Hinge": (losses.Hinge(), U, SIGNS),
    "Hinge-labels": (losses.Hinge(), U, LABELS),
    "CE-labels": (losses.SoftmaxCrossEntropy(), U, LABELS),
    "CE-soft": (losses.SoftmaxCrossEntropy(), U, SOFT * [[1.0], [0.3], [2.0]]),
    "CE-tokens": (losses.SoftmaxCrossEntropy(), U.reshape(M, 2, 2), TOKENS),
    "KL": (losses.FLoss(KL(), temperature=0.5), U, SOFT),
    "sparsemax": (losses.FLoss(ChiSquare(), "unit"), U, LABELS),
    "entmax": (losses.FLoss(Alpha(1.5), MEASURE), U, SOFT),
    "ReverseKL": (losses.FLoss(ReverseKL(), "uniform", smoothing=0.1), U, LABELS),
    "custom": (losses.as_loss(custom), U, Y),
}  # fmt: skip


def case(name, dtype=float):
    loss, u, y = CASES[name]
    y = jnp.asarray(y, dtype) if np.asarray(y).dtype == float else jnp.asarray(y)
    return loss, jnp.asarray(u, dtype), y


every = pytest.mark.parametrize("name", CASES)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@eqx.filter_jit
def derivatives(loss, u, y, v):
    f = loss.factor(u, y)
    back = f.mv(f.transpose_mv(v))
    g = f.mv(f.rho)
    return {
        "gradient": loss.gradient(u, y),
        "autodiff": jax.grad(lambda u: jnp.sum(loss(u, y)))(u),
        "Hv": loss.hessian_mv(u, y, v),
        "RRv": back,
        "g": g if f.remainder is None else g + f.remainder,
        "remainder": f.remainder,
        "negative": f.negative_curvature,
    }


@eqx.filter_jit
def hessian(loss, u, y, v):
    H = jax.hessian(lambda u: jnp.sum(loss(u, y)))(u)
    axes = tuple(range(u.ndim, 2 * u.ndim))
    return jnp.sum(H * v.reshape((1,) * u.ndim + u.shape), axes)


def test_negative_curvature():
    loss = losses.as_loss(lambda u, y: jnp.sum((u * u - y) ** 2, -1))
    factor = loss.factor(jnp.array([[0.1, 3.0], [2.0, 2.0]]), jnp.ones((2, 2)))
    assert factor.negative_curvature.tolist() == [True, False]


@every
def test_gradient_hessian_and_factor(name):
    loss, u, y = case(name)
    v = jnp.asarray(RNG.normal(size=u.shape))
    d = derivatives(loss, u, y, v)
    close(d["gradient"], d["autodiff"])
    close(d["Hv"], hessian(loss, u, y, v), 1e-11)
    close(d["RRv"], d["Hv"])
    close(d["g"], d["gradient"])
    assert not d["negative"].any()
