"""f-softmax, f-softargmax and their losses: identities, derivatives, hard inputs."""

import itertools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.test_util import check_grads

from diffprog import losses
from diffprog.losses import (
    Alpha,
    ChiSquare,
    f_loss,
    f_softargmax,
    f_softmax,
    Jeffreys,
    JensenShannon,
    KL,
    LeCam,
    Neyman,
    ReverseKL,
    SquaredHellinger,
)
from diffprog.losses._call import check
from diffprog.losses._root import bisect, bracket, newton, solve, sums


FAMILIES = {
    "KL": KL(),
    "ReverseKL": ReverseKL(),
    "ChiSquare": ChiSquare(),
    "Neyman": Neyman(),
    "SquaredHellinger": SquaredHellinger(),
    "JensenShannon": JensenShannon(),
    "Jeffreys": Jeffreys(),
    "LeCam": LeCam(),
    "1.5": Alpha(1.5),
    "0.5": Alpha(0.5),
    "1.3": Alpha(1.3),
    "3": Alpha(3.0),
    "-0.5": Alpha(-0.5),
    "traced 1.5": Alpha(jnp.asarray(1.5)),
    "traced 0.3": Alpha(jnp.asarray(0.3)),
    "traced 0.97": Alpha(jnp.asarray(0.97)),
}
SPARSE = ("ChiSquare", "LeCam", "1.5", "1.3", "3")
INFINITE = ("ReverseKL", "Neyman", "Jeffreys", "-0.5")  # f(0)
K = 6
MEASURE = np.array([0.2, 1.7, 0.6, 1.0, 0.1, 2.4])
REFERENCES = {"unit": "unit", "uniform": "uniform", "array": MEASURE}
THETA = np.random.default_rng(0).normal(size=(4, K)) * [[0.3], [1.0], [2.0], [5.0]]

family = pytest.mark.parametrize("name", FAMILIES)


def measure(q) -> np.ndarray:
    named = dict(unit=np.ones(K), uniform=np.full(K, 1 / K))
    return named[q] if isinstance(q, str) else q


def divergence(f, p, q):
    return jnp.sum(q * f.value(p / q), -1)


def close(actual, desired, tolerance=1e-12):
    np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)


# Generators -----------------------------------------------------------------------


@family
def test_generators_are_consistent(name):
    f, u = FAMILIES[name], jnp.array([0.03, 0.4, 1.0, 1.8, 30.0])
    close(f.value(jnp.ones(1)), 0)
    slope = jax.vmap(jax.grad(f.value))(u)
    close(f.link(u) + f.origin, slope, 1e-11)
    close(1 / f.curvature(u), jax.vmap(jax.grad(jax.grad(f.value)))(u), 1e-10)
    ratio, curvature = f.pair(f.link(u))
    close(ratio, u, 1e-11)
    close(curvature, f.curvature(u), 1e-10)
    # f*(f'(u)) = u f'(u) - f(u)
    close(f.conjugate(f.link(u)) - f.lift, u * slope - f.value(u), 1e-10)
    at_zero = f.value(jnp.zeros(()))
    close(at_zero, f.at_zero) if name not in INFINITE else None
    assert np.isinf(f.at_zero) == (name in INFINITE)


@family
def test_the_step_of_the_solver(name):
    f, S, Q = FAMILIES[name], jnp.array([0.5, 1.0, 1 + 1e-9, 3.0]), jnp.asarray(5.0)
    desired = Q * (f.link(S / Q) - f.link(1 / Q)) * f.curvature(S / Q)
    close(f.mean_step(S, Q), desired, 1e-13 if name != "traced 0.97" else 1e-12)


def test_t13_dualities():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.25, 0.35])
    D = lambda f, p, q: divergence(f, jnp.asarray(p), jnp.asarray(q))
    for alpha in (-0.7, 0.2, 1.5):
        close(D(Alpha(alpha), p, q), D(Alpha(1 - alpha), q, p))
    close(D(Jeffreys(), p, q), D(KL(), p, q) + D(ReverseKL(), p, q))
    m = (p + q) / 2
    close(D(JensenShannon(), p, q), D(KL(), p, m) + D(KL(), q, m))


# Values and probabilities ---------------------------------------------------------


def test_t1_kl_is_softmax():
    q = jnp.asarray(MEASURE)
    close(f_softargmax(THETA, KL(), q), jax.nn.softmax(THETA + jnp.log(q)[None]))
    value = jax.nn.logsumexp(THETA + jnp.log(q)[None], -1) + 1 - q.sum()
    close(f_softmax(THETA, KL(), q), value)
    close(f_softargmax(THETA, KL()), jax.nn.softmax(THETA))


def project(theta):
    """The Euclidean projection on the simplex, by sorting."""
    z = np.sort(theta)[::-1]
    taus = (np.cumsum(z) - 1) / np.arange(1, len(z) + 1)
    return np.maximum(theta - taus[np.nonzero(z > taus)[0][-1]], 0)


def test_t2_sparsemax_and_entmax():
    desired = np.stack([project(theta) for theta in THETA])
    close(losses.sparsemax(THETA), desired)
    theta = jnp.array([-2.0, 0.0, 0.5])
    np.testing.assert_allclose(losses.sparsemax(theta), [0, 0.25, 0.75])
    np.testing.assert_allclose(losses.entmax15(theta), [0, 0.3260, 0.6740], atol=5e-5)
    kl = f_softargmax(theta, KL())
    np.testing.assert_allclose(kl, [0.0486, 0.3592, 0.5922], atol=5e-5)
    close(losses.entmax(theta, 1.3), f_softargmax(theta, Alpha(1.3), "unit"))


@pytest.mark.parametrize("alpha", (-0.5, 0.5, 1.5, 2.0, 2.5))
def test_t3_constant_measures_rescale_scores(alpha):
    c = 0.3
    scaled = f_softargmax(c ** (alpha - 1) * THETA, Alpha(alpha), "unit")
    close(f_softargmax(THETA, Alpha(alpha), np.full(K, c)), scaled, 1e-11)


@family
def test_t4_shifts_permutations_and_equal_scores(name):
    f, order = FAMILIES[name], np.array([3, 0, 5, 1, 4, 2])
    p, value = f_softargmax(THETA, f, MEASURE), f_softmax(THETA, f, MEASURE)
    close(p.sum(-1), 1, 1e-13)
    close(f_softargmax(THETA + 2.5, f, MEASURE), p, 1e-11)
    close(f_softmax(THETA + 2.5, f, MEASURE), value + 2.5)
    close(f_softargmax(THETA[:, order], f, MEASURE[order]), p[:, order])
    equal = f_softargmax(np.full((4, K), 0.7), f, MEASURE)
    close(equal, np.tile(MEASURE / MEASURE.sum(), (4, 1)), 1e-11)


@family
def test_t5_inverse_link(name):
    f = FAMILIES[name]
    p = np.tile([0.05, 0.3, 0.1, 0.25, 0.12, 0.18], (4, 1))
    theta = f.link(jnp.asarray(p / MEASURE)) + 0.4
    close(f_softargmax(theta, f, MEASURE), p, 1e-10)


@family
def test_t7_value_and_divergence(name):
    f, q = FAMILIES[name], jnp.asarray(np.tile(MEASURE, (4, 1)))
    p = f_softargmax(THETA, f, MEASURE)
    value = jnp.sum(p * THETA, -1) - divergence(f, p, q)
    close(f_softmax(THETA, f, MEASURE), value, 1e-11)


@family
@pytest.mark.parametrize("named", ("unit", "uniform"))
def test_named_references(name, named):
    f, q = FAMILIES[name], measure(named)
    close(f_softargmax(THETA, f, named), f_softargmax(THETA, f, q), 1e-11)


@family
def test_t6_the_residual_is_the_l1_error(name):
    f = FAMILIES[name]
    s = check(jnp.asarray(THETA), f, "uniform", -1, None, 1.0, None).set_up()
    sigma, _ = solve(s.classes, s.f, s.problem)
    y = s.problem.scores - s.problem.m
    mass = lambda sigma: s.problem.q * s.f.pair(sigma + y)[0]
    for shift in (-1e-2, -1e-5):
        moved = mass(sigma + shift)
        residual = jnp.abs(moved.sum(-1) - 1)
        close(jnp.abs(moved - mass(sigma)).sum(-1), residual, 1e-13)
    dual = lambda sigma: jnp.sum(s.problem.q * s.f.conjugate(sigma + y), -1) - sigma[:, 0]
    _, W = sums(s.classes, s.f, sigma + y, s.problem.q)
    h = 1e-4 * jnp.minimum(jnp.abs(sigma), 1)
    excess = (dual(sigma - h) - dual(sigma))[:, None]
    np.testing.assert_allclose(excess / (W * h * h / 2), 1, rtol=0.02)


@pytest.mark.parametrize("name", SPARSE)
def test_t11_margins(name):
    f = FAMILIES[name]
    margin = dict(ChiSquare=1.0, LeCam=3.0).get(name) or 1 / (f.alpha - 1)
    scores = jnp.array([[margin, 0, -1.0], [margin - 1e-3, 0, -1.0]])
    p, loss = f_softargmax(scores, f, "unit"), f_loss(scores, jnp.zeros(2, int), f, "unit")
    close(p[0], [1, 0, 0])
    assert p[1, 0] < 1 and loss[1] > 0
    close(loss[0], 0, 1e-14)


def test_t12_alpha_one_half_is_hellinger():
    for q in REFERENCES.values():
        half = f_softargmax(THETA, Alpha(0.5), q)
        close(half, f_softargmax(THETA / 2, SquaredHellinger(), q))


@pytest.mark.parametrize("alpha, f", [(1.0, KL()), (0.0, ReverseKL())])
@pytest.mark.parametrize("kind", (float, jnp.asarray))
def test_t14_alpha_is_continuous(alpha, f, kind):
    for q in REFERENCES.values():
        p, value = f_softargmax(THETA, f, q), f_softmax(THETA, f, q)
        for near in (alpha - 1e-7, alpha + 1e-7):
            close(f_softargmax(THETA, Alpha(kind(near)), q), p, 1e-6)
            close(f_softmax(THETA, Alpha(kind(near)), q), value, 1e-6)
    traced = Alpha(jnp.asarray(alpha))
    close(f_softargmax(THETA, traced, "unit"), f_softargmax(THETA, f, "unit"), 1e-11)


@family
def test_t15_splitting_a_class(name):
    f, j = FAMILIES[name], 2
    split = np.concatenate([THETA, THETA[:, j : j + 1]], 1)
    q = np.concatenate([MEASURE, MEASURE[j : j + 1] / 2])
    q[j] /= 2
    p, together = f_softargmax(split, f, q), f_softargmax(THETA, f, MEASURE)
    close(f_softmax(split, f, q), f_softmax(THETA, f, MEASURE))
    close(p[:, -1], together[:, j] / 2)
    close(p[:, :-1].at[:, j].multiply(2), together)


def test_t16_binary():
    s = jnp.linspace(-2.5, 2.5, 11)
    sigmoid = losses.f_sigmoid(s, ChiSquare(), "unit")
    close(sigmoid, jnp.clip((1 + s) / 2, 0, 1))
    softplus = lambda s: losses.f_softplus(s, ChiSquare(), "unit")
    close(jax.vmap(jax.grad(softplus))(s), sigmoid)
    close(losses.f_sigmoid(s, KL(), "uniform"), jax.nn.sigmoid(s))
    prior = losses.f_sigmoid(s, KL(), np.array([0.2, 0.8]))
    close(prior, jax.nn.sigmoid(s + np.log(4)))
