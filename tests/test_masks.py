"""Scores that are infinite, or as far below the others as a mask is.

What is computed in float32 is compared with float64, where an infinite score is a very
large one. A new loss or operator is tested by adding one line.
"""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from diffprog import losses
from diffprog.losses import Alpha, ChiSquare, f_softargmax, f_softmax, KL, LeCam

from .test_losses import FAMILIES, INFINITE


K, HUGE, LOWEST = 4, 1e150, float(np.finfo("f4").min)
LARGE = float(np.finfo("f4").max) / 8  # may be infinite in float32
RNG = np.random.default_rng(0)
# Class 0 is the target of all rows.
PLACES = [(1,), (0,), (0, 2), (1, 3)]
VALUES = (-np.inf, np.inf, LOWEST)
ROWS = [(places, value) for value in VALUES for places in PLACES]
U = RNG.normal(size=(len(ROWS), K))
for row, (places, value) in zip(U, ROWS):
    row[list(places)] = value
V, Y = RNG.normal(size=U.shape), RNG.normal(size=U.shape)
SIGNS, COUNTS = np.sign(Y), RNG.poisson(1.0, U.shape).astype(float)
LABELS = np.zeros(len(ROWS), int)
SOFT = RNG.dirichlet(np.ones(K), len(ROWS)) * [1.0, 0.0, 1.0, 0.0]
SOFT /= SOFT.sum(-1, keepdims=True)
MEASURE = np.array([0.2, 1.7, 0.6, 1.0])

LOSSES = {
    "Squared": (losses.Squared(), Y),
    "Logistic": (losses.Logistic(), SIGNS),
    "Huber": (losses.Huber(1.5), Y),
    "Absolute": (losses.Absolute(), Y),
    "Euclidean": (losses.Euclidean(), Y),
    "Poisson": (losses.Poisson(), COUNTS),
    "Hinge": (losses.Hinge(), SIGNS),
    "Hinge-labels": (losses.Hinge(), LABELS),
    "CE-labels": (losses.SoftmaxCrossEntropy(), LABELS),
    "CE-soft": (losses.SoftmaxCrossEntropy(), SOFT),
    "KL": (losses.FLoss(KL(), temperature=0.5), SOFT),
    "sparsemax": (losses.FLoss(ChiSquare(), "unit"), LABELS),
    "entmax": (losses.FLoss(Alpha(1.5), MEASURE), SOFT),
    "Alpha3": (losses.FLoss(Alpha(3.0), MEASURE), LABELS),
    "LeCam": (losses.FLoss(LeCam(), "unit"), SOFT),  # pyright: ignore
}


def agree(low, high, tolerance=2e-5):
    """float32 against float64, whose numbers may be too large for float32."""
    leaves = jtu.tree_leaves_with_path(low)
    for (path, a), b in zip(leaves, jtu.tree_leaves(high), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        b = np.where(np.abs(b) > LARGE, np.copysign(np.inf, b), b)
        a = np.where(np.abs(a) > LARGE, np.copysign(np.inf, a), a)
        name = jtu.keystr(path)
        np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=name)


def in_both(fn, *args):
    """`fn` in float32, and in float64 with very large scores for infinite ones."""
    fn = eqx.filter_jit(fn)
    short = lambda a: jnp.asarray(a, "f4") if a.dtype == float else jnp.asarray(a)
    large = lambda a: jnp.where(jnp.isinf(a), jnp.sign(a) * HUGE, a)
    args = jtu.tree_map(np.asarray, args)
    low = jtu.tree_map(short, args)
    return fn(*low), fn(
        *(large(jnp.asarray(a)) if a.dtype == float else a for a in args)
    )


@pytest.mark.costly
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss, y = LOSSES[name]

    def everything(u, y, v):
        value = lambda u: loss(u, y)
        factor, g = loss.factor(u, y), loss.gradient(u, y)
        Rr, slope = factor.mv(factor.rho), jax.jvp(value, (u,), (v,))[1]
        out = {
            "value": value(u),
            "gradient": g,
            "autodiff": jax.grad(lambda u: jnp.sum(value(u)))(u),
            # Else infinities of both signs may meet.
            "jvp": jnp.where(jnp.all(jnp.abs(g) < LARGE, -1), slope, 0),
            "Hessian": loss.hessian_mv(u, y, v),
            "twice": jax.jvp(lambda u: loss.gradient(u, y), (u,), (v,))[1],
            "factor": Rr if factor.remainder is None else Rr + factor.remainder,
        }
        if name != "Squared":  # there it is infinite, and v / tau is
            out["prox"] = loss.prox(u, 0.7, y)
            if y.dtype == u.dtype:
                in_y = jax.jvp(lambda y: loss(u, y), (y,), (jnp.zeros_like(y),))
                out["jvp in targets"] = in_y[1]
        return out

    agree(*in_both(everything, U, y, V))


# The operators --------------------------------------------------------------------


def operators(f, finite: bool) -> dict[str, Any]:
    """The operators of a generator; `finite` says whether f(0) is.

    Else the value of a class far below falls as the logarithm of its distance. One that
    is excluded does not cost f(0), as one far below does.
    """
    excluded = lambda u: (u == -jnp.inf).astype(u.dtype)
    missing = lambda u: jnp.sum(excluded(u) * MEASURE.astype(u.dtype)[None], -1)
    at_zero = lambda u: jnp.asarray(f.at_zero, u.dtype)
    out: dict[str, Any] = {
        "p": lambda u: f_softargmax(u, f, MEASURE),
        "warm": lambda u: f_softargmax(u, f, "unit", temperature=0.5),
        "capped": lambda u: losses.capped_f_softargmax(u, f, MEASURE, cap=0.6),
        "sigmoid": lambda u: losses.f_sigmoid(u, f, "unit"),
    }
    if finite:
        out["softmax"] = lambda u: f_softmax(u, f, MEASURE) - at_zero(u) * missing(u)
        softplus = lambda u: losses.f_softplus(u, f, "unit")
        out["softplus"] = lambda u: softplus(u) - at_zero(u) * excluded(u)
    return out


@pytest.mark.costly
@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "LeCam from its edge"])
def test_operators(name):
    def everything(u, v):
        out = {}
        for key, fn in operators(FAMILIES[name], name not in INFINITE).items():
            value, pull = jax.vjp(fn, u)
            weights = v if value.ndim == 2 else v[:, 0]
            out[key] = value, pull(weights)[0], jax.jvp(fn, (u,), (v,))[1]
        return out

    agree(*in_both(everything, U, V))


GAPS = [1e3, 1e6, 1e9, 1e15, 1e30, float(np.finfo("f4").max)]
FAR = {**FAMILIES, "-20": Alpha(-20.0), "traced -20": Alpha(jnp.asarray(-20.0))}
FAR["function"] = losses.generator(lambda u: u * jnp.log(u))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAR)
def test_scores_far_below_the_largest(name):
    """Of two classes that lead, and with one that leads and is at the cap."""
    f = FAR[name]
    below, leaders = np.stack([V[:6]] * 2)
    below[:, 1] = leaders[:, 1] = -np.array(GAPS)
    leaders[:, 1] *= -1

    def everything(u, leaders, v):
        out = {}
        fns = operators(f, True)
        del fns["warm"]  # whose scores are too large for float32
        for key, fn in fns.items():
            value, pull = jax.vjp(fn, leaders if key == "capped" else u)
            out[key] = value, pull(v if value.ndim == 2 else v[:, 0])[0]
        prox = losses.FLoss(f, "unit").conjugate_prox
        soft = jnp.broadcast_to(jnp.asarray([0.4, 0.1, 0.2, 0.3], u.dtype), u.shape)
        return out, prox(u, 2.0, soft)

    agree(*in_both(everything, below, leaders, V[6:]), tolerance=1e-4)


@pytest.mark.costly
@pytest.mark.parametrize("f", [None, KL(), ChiSquare(), Alpha(1.5)])
def test_risks(f):
    sigma = losses.spectrum("superquantile", K, 0.5)

    def everything(u, sigma):
        options = {} if f is None else dict(smoothing=0.5)
        risk = lambda u, sigma: losses.spectral_risk(u, sigma, f, **options)
        weights = lambda u: losses.spectral_weights(u, sigma, f, **options)
        in_sigma = lambda u: jax.jvp(ft.partial(risk, u), (sigma,), (0 * sigma,))[1]
        return (
            jax.vmap(jax.value_and_grad(risk), (0, None))(u, sigma),
            jax.vmap(weights)(u),
            jax.vmap(in_sigma)(u),
        )

    agree(*in_both(everything, U, np.asarray(sigma)))


def test_risks_where_a_weight_is_lost_to_rounding():
    """Of a generator whose f(0) is infinite: the others count as they did."""
    sigma = losses.spectrum("superquantile", K, 0.5)

    def risk(*u):
        u = jnp.array(u, "f4")
        fn = losses.spectral_risk
        low = fn(u, sigma.astype("f4"), losses.ReverseKL(), smoothing=0.5)
        high = fn(u.astype(float), sigma, losses.ReverseKL(), smoothing=0.5)
        return float(low), float(high)

    low, high = risk(0.3, LOWEST, -0.2, 1.0)
    # The ratio is a tenth of the least float: nu / n (1 + ln 10) at most is lost.
    assert -11 < high < low < high + 0.5 / K * (1 + np.log(10))
    assert risk(0.3, LOWEST, np.inf, 1.0)[0] == np.inf


@pytest.mark.slow
def test_derivatives_in_targets_of_zero():
    """f'(0) where that is finite, also of a class whose target is 0."""
    y = jnp.array([0.5, 0.5, 0.0])
    for f in (ChiSquare(), Alpha(1.5), Alpha(3.0), Alpha(jnp.asarray(1.5)), LeCam()):  # pyright: ignore
        slope = jax.grad(lambda y, f=f: losses.f_loss(jnp.zeros(3), y, f, "unit"))(y)
        origin = -3.0 if isinstance(f, LeCam) else f.origin
        np.testing.assert_allclose(slope[2], origin, rtol=1e-12)
    slope = jax.grad(lambda y: losses.f_loss(jnp.zeros(3), y, KL()))(y)
    np.testing.assert_allclose(slope, [np.log(0.5), np.log(0.5), 0.0])
