"""f-softmax, f-softargmax and their losses: identities, derivatives, hard inputs."""

import inspect
import itertools
import re
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.test_util import check_grads

import diffprog as dp
from diffprog import losses, optim
from diffprog._common.types import AbstractPart
from diffprog._operators.call import check
from diffprog._operators.root import below, bracket, root_and_count, sums
from diffprog.losses import (
    AbstractDivergence,
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

from .helpers import close


FAMILIES = {
    "KL": KL(),
    "ReverseKL": ReverseKL(),
    "ChiSquare": ChiSquare(),
    "Neyman": Neyman(),
    "SquaredHellinger": SquaredHellinger(),
    "JensenShannon": JensenShannon(),
    "Jeffreys": Jeffreys(),
    "LeCam": LeCam(),  # pyright: ignore
    "LeCam from its edge": LeCam(at_most_one=True),  # pyright: ignore
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
# What is expensive to compile is tested with these: one solved in closed form, one that
# is smooth, one with an edge, powers, one with an infinite f(0), a traced alpha.
FEW = ("KL", "JensenShannon", "LeCam", "1.5", "1.3", "-0.5", "traced 0.3")
INFINITE = ("ReverseKL", "Neyman", "Jeffreys", "-0.5")  # f(0)
K = 6
MEASURE = np.array([0.2, 1.7, 0.6, 1.0, 0.1, 2.4])
REFERENCES = {"unit": "unit", "uniform": "uniform", "array": MEASURE}
THETA = np.random.default_rng(0).normal(size=(4, K)) * [[0.3], [1.0], [2.0], [5.0]]

LABELS_OF_TWO = np.array([0, 1])

family = pytest.mark.parametrize("name", FAMILIES)
few_families = pytest.mark.parametrize("name", FEW)


def measure(q) -> np.ndarray:
    named = dict(unit=np.ones(K), uniform=np.full(K, 1 / K))
    return named[q] if isinstance(q, str) else q


def divergence(f, p, q):
    return jnp.sum(q * f.value(p / q), -1)


# Generators -----------------------------------------------------------------------


@pytest.mark.costly
@family
def test_generators_are_consistent(name):
    f, u = FAMILIES[name], np.array([0.03, 0.4, 1.0, 1.8, 30.0])

    @jax.jit
    def evaluate(u):
        link = f.link(u)
        first = jax.grad(f.value)
        slopes = jax.vmap(first)(u), jax.vmap(jax.grad(first))(u)
        at = f.value(jnp.ones(1)), f.value(jnp.zeros(()))
        functions = f.value(u), link, f.curvature(u), f.conjugate(link)
        return at, slopes, functions, f.pair(link)

    found = jax.tree.map(np.asarray, evaluate(u))
    (at_one, at_zero), (slope, second), functions, (ratio, pair_curvature) = found
    value, link, curvature, conjugate = functions
    close(at_one, 0)
    close(link + f.origin, slope, 1e-11)
    close(1 / curvature, second, 1e-10)
    close(ratio, u, 1e-11)
    close(pair_curvature, curvature, 1e-10)
    # f*(f'(u)) = u f'(u) - f(u)
    close(conjugate - f.lift, u * slope - value, 1e-10)
    if name not in INFINITE:
        close(at_zero, f.at_zero)
    assert np.isinf(f.at_zero) == (name in INFINITE)


@family
def test_the_step_of_the_solver(name):
    f, S, Q = FAMILIES[name], jnp.array([0.5, 1.0, 1 + 1e-9, 3.0]), jnp.asarray(5.0)
    desired = Q * (f.link(S / Q) - f.link(1 / Q)) * f.curvature(S / Q)
    close(f.mean_step(S, Q), desired, 1e-13 if name != "traced 0.97" else 1e-12)


def test_dualities_of_divergences():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.25, 0.35])
    D = lambda f, p, q: divergence(f, jnp.asarray(p), jnp.asarray(q))
    for alpha in (-0.7, 0.2, 1.5):
        close(D(Alpha(alpha), p, q), D(Alpha(1 - alpha), q, p))
    close(D(Jeffreys(), p, q), D(KL(), p, q) + D(ReverseKL(), p, q))
    m = (p + q) / 2
    close(D(JensenShannon(), p, q), D(KL(), p, m) + D(KL(), q, m))
    # The measures have the same mass: all linear terms cancel.
    for f, terms in (
        (KL(), p * np.log(p / q)),
        (ReverseKL(), q * np.log(q / p)),
        (ChiSquare(), (p - q) ** 2 / (2 * q)),
        (Neyman(), (p - q) ** 2 / (2 * p)),
        (SquaredHellinger(), (np.sqrt(p) - np.sqrt(q)) ** 2),
        (LeCam(), (p - q) ** 2 / (p + q)),  # pyright: ignore
    ):
        close(D(f, p, q), terms.sum())


# Values and probabilities ---------------------------------------------------------


def test_kl_is_softmax():
    q = jnp.asarray(MEASURE)
    softmax = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    close(f_softargmax(THETA, KL(), q), softmax(THETA + np.log(MEASURE)))
    value = np.log((MEASURE * np.exp(THETA)).sum(-1)) + 1 - MEASURE.sum()
    close(f_softmax(THETA, KL(), q), value)
    close(f_softargmax(THETA, KL()), softmax(THETA))


def project(theta):
    """The Euclidean projection on the simplex, by sorting."""
    z = np.sort(theta)[::-1]
    taus = (np.cumsum(z) - 1) / np.arange(1, len(z) + 1)
    return np.maximum(theta - taus[np.nonzero(z > taus)[0][-1]], 0)


def test_sparsemax_and_entmax_of_known_scores():
    desired = np.stack([project(theta) for theta in THETA])
    close(losses.sparsemax(THETA), desired)
    theta = jnp.array([-2.0, 0.0, 0.5])
    np.testing.assert_allclose(losses.sparsemax(theta), [0, 0.25, 0.75])
    np.testing.assert_allclose(losses.entmax15(theta), [0, 0.3260, 0.6740], atol=5e-5)
    kl = f_softargmax(theta, KL())
    np.testing.assert_allclose(kl, [0.0486, 0.3592, 0.5922], atol=5e-5)
    close(losses.entmax(theta, 1.3), f_softargmax(theta, Alpha(1.3), "unit"))


@pytest.mark.costly
@pytest.mark.parametrize("alpha", (-0.5, 0.5, 1.5, 2.0, 2.5))
def test_constant_measures_rescale_scores(alpha):
    c = 0.3
    scaled = f_softargmax(c ** (alpha - 1) * THETA, Alpha(alpha), "unit")
    close(f_softargmax(THETA, Alpha(alpha), np.full(K, c)), scaled, 1e-11)
    assert (jnp.ptp(scaled, -1) > 1e-3).all()  # not the same for all classes


@pytest.mark.costly
@family
def test_shifts_permutations_and_equal_scores(name):
    f, order = FAMILIES[name], np.array([3, 0, 5, 1, 4, 2])
    p, value = f_softargmax(THETA, f, MEASURE), f_softmax(THETA, f, MEASURE)
    close(p.sum(-1), 1, 1e-13)
    close(f_softargmax(THETA + 2.5, f, MEASURE), p, 1e-11)
    close(f_softmax(THETA + 2.5, f, MEASURE), value + 2.5)
    close(f_softargmax(THETA[:, order], f, MEASURE[order]), p[:, order])
    equal = f_softargmax(np.full((4, K), 0.7), f, MEASURE)
    close(equal, np.tile(MEASURE / MEASURE.sum(), (4, 1)), 1e-11)
    assert (jnp.abs(p - equal).max(-1) > 1e-4).all()


@pytest.mark.costly
@family
def test_the_derivative_of_f_is_the_inverse_link(name):
    f = FAMILIES[name]
    p = np.tile([0.05, 0.3, 0.1, 0.25, 0.12, 0.18], (4, 1))
    theta = f.link(jnp.asarray(p / MEASURE)) + 0.4
    close(f_softargmax(theta, f, MEASURE), p, 1e-10)


@pytest.mark.costly
@family
def test_value_is_score_minus_divergence(name):
    f, q = FAMILIES[name], jnp.asarray(np.tile(MEASURE, (4, 1)))
    p = f_softargmax(THETA, f, MEASURE)
    value = jnp.sum(p * THETA, -1) - divergence(f, p, q)
    close(f_softmax(THETA, f, MEASURE), value, 1e-11)


@pytest.mark.costly
@family
@pytest.mark.parametrize("named", ("unit", "uniform"))
def test_named_references(name, named):
    f, q = FAMILIES[name], measure(named)
    close(f_softargmax(THETA, f, named), f_softargmax(THETA, f, q), 1e-11)


@pytest.mark.costly
@family
def test_the_residual_is_the_l1_error(name):
    f = FAMILIES[name]

    @jax.jit
    def evaluate(theta):
        s = check(theta, f, "uniform", -1, None, 1.0, None).set_up()
        sigma, _ = root_and_count(s.classes, s.f, s.problem)
        y = s.problem.scores - s.problem.m
        mass = lambda sigma: s.problem.q * s.f.pair(sigma + y)[0]
        dual = lambda sigma: (
            jnp.sum(s.problem.q * s.f.conjugate(sigma + y), -1) - sigma[:, 0]
        )
        _, W = sums(s.classes, s.f, sigma + y, s.problem.q)
        h = 1e-4 * jnp.minimum(jnp.abs(sigma), 1)
        excess = (dual(sigma - h) - dual(sigma))[:, None]
        moved = [mass(sigma + shift) for shift in (-1e-2, -1e-5)]
        return mass(sigma), moved, excess / (W * h * h / 2)

    mass, moved, ratio = jax.tree.map(np.asarray, evaluate(jnp.asarray(THETA)))
    for moved_mass in moved:
        residual = np.abs(moved_mass.sum(-1) - 1)
        close(np.abs(moved_mass - mass).sum(-1), residual, 1e-13)
    np.testing.assert_allclose(ratio, 1, rtol=0.02)


@pytest.mark.costly
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_losses_have_a_margin(name):
    f = FAMILIES[name]
    margin = dict(ChiSquare=1.0, LeCam=3.0).get(name) or 1 / (f.alpha - 1)
    # Near the margin the loss of small alpha is a high power of what is missing:
    # below rounding, unless more is missing than shows in the probabilities.
    scores = jnp.array([[margin - missing, 0, -1.0] for missing in (0, 1e-3, 0.1)])
    p, loss = (
        f_softargmax(scores, f, "unit"),
        f_loss(scores, jnp.zeros(3, int), f, "unit"),
    )
    close(p[0], [1, 0, 0])
    assert p[1, 0] < 1 - 1e-12 and loss[2] > 1e-8
    close(loss[0], 0, 1e-14)


def test_alpha_one_half_is_hellinger():
    for q in REFERENCES.values():
        half = f_softargmax(THETA, Alpha(0.5), q)
        close(half, f_softargmax(THETA / 2, SquaredHellinger(), q))


@pytest.mark.costly
@pytest.mark.parametrize("alpha, f", [(1.0, KL()), (0.0, ReverseKL())])
@pytest.mark.parametrize("kind", (float, jnp.asarray))
def test_alpha_is_continuous(alpha, f, kind):
    @eqx.filter_jit
    def all_of(f, theta):
        qs = REFERENCES.values()
        return [(f_softargmax(theta, f, q), f_softmax(theta, f, q)) for q in qs]

    expected = all_of(f, THETA)
    for near in (alpha - 1e-7, alpha + 1e-7):
        close(all_of(Alpha(kind(near)), THETA), expected, 1e-6)
    traced = Alpha(jnp.asarray(alpha))
    close(f_softargmax(THETA, traced, "unit"), expected[0][0], 1e-11)


@pytest.mark.costly
@family
def test_splitting_a_class_changes_no_other(name):
    f, j = FAMILIES[name], 2
    split = np.concatenate([THETA, THETA[:, j : j + 1]], 1)
    q = np.concatenate([MEASURE, MEASURE[j : j + 1] / 2])
    q[j] /= 2
    p, together = f_softargmax(split, f, q), f_softargmax(THETA, f, MEASURE)
    close(f_softmax(split, f, q), f_softmax(THETA, f, MEASURE))
    close(p[:, -1], together[:, j] / 2)
    close(p[:, :-1].at[:, j].multiply(2), together)


def test_two_classes_of_chi_square_in_closed_form():
    s = jnp.linspace(-2.5, 2.5, 11)
    sigmoid = losses.f_sigmoid(s, ChiSquare(), "unit")
    close(sigmoid, jnp.clip((1 + s) / 2, 0, 1))
    softplus = lambda s: losses.f_softplus(s, ChiSquare(), "unit")
    close(jax.vmap(jax.grad(softplus))(s), sigmoid)
    close(losses.f_sigmoid(s, KL(), "uniform"), jax.nn.sigmoid(s))
    prior = losses.f_sigmoid(s, KL(), np.array([0.2, 0.8]))
    close(prior, jax.nn.sigmoid(s + np.log(4)))


# Derivatives ----------------------------------------------------------------------


def derivatives(f, theta, q):
    """Everything of one row: value, gradients, Hessian, Jacobian in q."""

    def gradients(theta, q):
        found = jax.grad(lambda theta, q: f_softmax(theta, f, q), (0, 1))(theta, q)
        return found, found

    p = lambda theta: 2 * (f_softargmax(theta, f, q),)
    second, (gradient, in_q) = jax.jacfwd(gradients, (0, 1), has_aux=True)(theta, q)
    (hessian, mixed), (mixed_back, _) = second
    forward, probabilities = jax.jacfwd(p, has_aux=True)(theta)
    return dict(
        p=probabilities,
        gradient=gradient,
        in_q=in_q,
        hessian=hessian,
        forward=forward,
        reverse=jax.jacrev(p, has_aux=True)(theta)[0],
        mixed=mixed,
        mixed_back=mixed_back,
    )


@pytest.mark.costly
@few_families
def test_first_and_second_derivatives(name):
    f, theta, q = FAMILIES[name], jnp.asarray(THETA[1]), jnp.asarray(MEASURE)
    d = jax.jit(lambda theta, q: derivatives(f, theta, q))(theta, q)
    d, q = jax.tree.map(np.asarray, (d, q))
    J, p = d["hessian"], d["p"]
    close(d["gradient"], p)
    close(J, d["forward"])
    close(J, d["reverse"])
    close(J, J.T, 1e-14)
    close(J.sum(1), 0)
    assert np.linalg.eigvalsh(J).min() > -1e-14
    support = p > 0

    @jax.jit
    def known(u):
        return f.curvature(u), u * (f.link(u) + f.origin) - f.value(u)

    curvature, conjugate = known(np.where(support, p / q, 1))
    w = np.where(support, q * curvature, 0)
    close(J, np.diag(w) - np.outer(w, w) / w.sum())
    close(d["mixed"], d["mixed_back"].T)
    # d softmax / dq = f*(theta - tau), where theta - tau is f'(u) on the support.
    conjugate = np.where(support, conjugate, 0 if name in INFINITE else -f.at_zero)
    close(d["in_q"], conjugate, 1e-11)
    h = 1e-5 * np.eye(K)[2]
    ends = [f_softargmax(theta, f, q + sign * h) for sign in (1, -1)]
    close(d["mixed"][:, 2], (ends[0] - ends[1]) / 2e-5, 1e-8)


@pytest.mark.costly
@few_families
def test_the_hessian_operator_is_the_hessian(name):
    f = FAMILIES[name]
    operator = losses.hessian_operator(THETA[1], f, MEASURE, temperature=0.7)
    scaled = lambda theta: f_softmax(theta, f, MEASURE, temperature=0.7)
    J = np.asarray(jax.jit(jax.hessian(scaled))(jnp.asarray(THETA[1])))
    b = jnp.asarray(np.random.default_rng(1).normal(size=K))

    @jax.jit
    def products(operator, b):
        roots = operator.sqrt_mv, operator.sqrt_transpose_mv
        A, back = (jax.vmap(root, out_axes=1)(jnp.eye(K)) for root in roots)
        return A, back, operator.as_matrix(), lx.diagonal(operator), operator.pinv_mv(b)

    found = jax.tree.map(np.asarray, products(operator, b))
    A, back, matrix, diagonal, applied = found
    close(matrix, J)
    close(diagonal, np.diag(J))
    close(A @ A.T, J)
    close(back, A.T)
    # A support of one class leaves nothing of J but its rounding.
    size = np.linalg.norm(J, 2)
    pinv = np.linalg.pinv(J, rtol=1e-10 * max(1.0, 1.0 / max(size, 1e-300)))
    np.testing.assert_allclose(applied, pinv @ b, rtol=1e-9, atol=1e-9)
    damped = operator + 0.1 * lx.IdentityLinearOperator(operator.in_structure())
    damped = lx.TaggedLinearOperator(damped, lx.positive_semidefinite_tag)
    x = lx.linear_solve(damped, b, lx.CG(1e-12, 1e-12)).value
    close((J + 0.1 * np.eye(K)) @ x, b, 1e-9)


@pytest.mark.costly
@pytest.mark.parametrize("name", ("KL", "1.5", "JensenShannon", "LeCam", "traced 0.3"))
def test_third_derivatives_of_a_value(name):
    f, theta = FAMILIES[name], jnp.asarray(THETA[1])
    h = jnp.asarray(np.random.default_rng(2).normal(size=K))

    @jax.jit
    def both(theta):
        p = lambda theta: f_softargmax(theta, f, MEASURE)
        along = lambda theta: jax.jvp(p, (theta,), (h,))[1]
        twice = jax.jvp(along, (theta,), (h,))[1]
        cubic = jax.hessian(lambda theta: jnp.vdot(h, p(theta)))(theta)
        return p(theta), twice, cubic

    p, twice, cubic = both(theta)
    # d2p = m delta^2 - w d2tau, with m = q f*'''
    p, twice, cubic, h = map(np.asarray, (p, twice, cubic, h))
    curvature, slope = jax.jit(jax.vmap(jax.value_and_grad(f.curvature)))(
        np.where(p > 0, p / MEASURE, 1)
    )
    w = np.where(p > 0, MEASURE * curvature, 0)
    m = np.where(p > 0, MEASURE * slope * curvature, 0)
    delta = h - w @ h / w.sum()
    d2tau = m @ delta**2 / w.sum()
    close(twice, m * delta**2 - w * d2tau, 1e-11)
    close(cubic, cubic.T, 1e-11)
    close(cubic @ h, twice, 1e-11)  # third derivatives of the value: any order


@pytest.mark.slow
def test_derivatives_in_alpha_and_temperature():
    theta, y = jnp.asarray(THETA[1]), jnp.asarray(MEASURE / MEASURE.sum())

    @jax.jit
    def functions(alpha, beta):
        f = Alpha(alpha)
        p = f_softargmax(theta, f, MEASURE, temperature=beta)
        loss = f_loss(theta, y, f, MEASURE, temperature=beta)
        return jnp.append(p, jnp.stack([f_softmax(theta, f, MEASURE), loss]))

    both = jax.jit(jax.jacfwd(functions, (0, 1)))
    second = jax.jit(jax.jacfwd(jax.jacrev(functions)))
    third = jax.jit(lambda a: functions(a, 0.8))
    for alpha in (-0.4, 0.0, 0.5, 0.93, 1.0, 1.0 + 1e-7, 1.05, 1.5, 2.0):
        h, at = 1e-5, lambda a, b: functions(jnp.asarray(a), jnp.asarray(b))
        in_alpha, in_beta = both(jnp.asarray(alpha), jnp.asarray(0.8))
        close(in_alpha, (third(alpha + h) - third(alpha - h)) / (2 * h), 2e-8)
        close(in_beta, (at(alpha, 0.8 + h) - at(alpha, 0.8 - h)) / (2 * h), 2e-8)
        curve = third(alpha + 1e-3) - 2 * third(alpha) + third(alpha - 1e-3)
        curvature = second(jnp.asarray(alpha), jnp.asarray(0.8))
        np.testing.assert_allclose(curvature, curve / 1e-6, rtol=2e-4, atol=2e-4)


def test_the_derivative_in_the_temperature():
    for f in (KL(), Alpha(1.5), JensenShannon()):
        value = lambda beta, f=f: f_softmax(THETA[1], f, MEASURE, temperature=beta)

        @jax.jit
        def both(beta, f=f, value=value):
            p = f_softargmax(THETA[1], f, MEASURE, temperature=beta)
            return jax.grad(value)(beta), -divergence(f, p, jnp.asarray(MEASURE))

        found, expected = both(0.6)
        close(found, expected, 1e-11)


# Losses ---------------------------------------------------------------------------


@pytest.mark.costly
@few_families
def test_a_loss_is_zero_at_its_own_probabilities(name):
    f, q = FAMILIES[name], jnp.asarray(MEASURE)
    theta, y = jnp.asarray(THETA[1]), jnp.asarray([0.1, 0.2, 0.05, 0.4, 0.1, 0.15])
    soft = lambda theta, y: f_loss(theta, y, f, q)
    label = lambda theta: f_loss(theta, jnp.asarray(3), f, q, smoothing=0.1)

    @jax.jit
    def everything(theta, y):
        p = f_softargmax(theta, f, q)
        return dict(
            p=p,
            value=f_softmax(theta, f, q),
            loss=soft(theta, y),
            own=soft(theta, p),
            gradient=jax.grad(soft)(theta, y),
            hessian=jax.hessian(soft)(theta, y),
            jacobian=jax.jacfwd(lambda t: f_softargmax(t, f, q))(theta),
            label=label(theta),
            label_gradient=jax.grad(label)(theta),
        )

    d = everything(theta, y)
    D = divergence(f, y, q)
    d, theta, y = jax.tree.map(np.asarray, (d, theta, y))
    close(d["loss"], d["value"] + D - theta @ y, 1e-11)
    assert d["loss"] > 0
    close(d["own"], 0, 1e-13)
    close(d["gradient"], d["p"] - y)
    close(d["hessian"], d["jacobian"])
    smooth = 0.9 * np.eye(K)[3] + 0.1 * MEASURE / MEASURE.sum()
    close(d["label"], d["value"] + divergence(f, smooth, q) - theta @ smooth, 1e-11)
    close(d["label_gradient"], d["p"] - smooth)


@pytest.mark.costly
@family
def test_labels_are_one_hot_probabilities(name):
    f, labels = FAMILIES[name], jnp.array([0, 5, 2, 1])
    constant = name not in INFINITE
    hard = f_loss(THETA, labels, f, MEASURE, constant=constant)
    hot = jax.nn.one_hot(labels, K, dtype=float)
    close(hard, f_loss(THETA, hot, f, MEASURE, constant=constant), 1e-11)
    own = jnp.asarray(MEASURE)[labels]
    D = own * f.value(1 / own) + (MEASURE.sum() - own) * f.at_zero if constant else 0
    scores = THETA[np.arange(4), labels]
    close(hard, f_softmax(THETA, f, MEASURE) + D - scores, 1e-11)
    # Else it is 0, to rounding.
    wrong = f_softargmax(THETA, f, MEASURE)[np.arange(4), labels] < 0.9
    assert wrong.any() and ((hard > 0) | ~wrong | (not constant)).all()


def test_losses_with_common_offsets_and_temperature():
    for f in (KL(), Alpha(1.5), LeCam()):  # pyright: ignore
        loss = lambda theta: f_loss(theta, jnp.array([0, 5, 2, 1]), f, "unit")
        np.testing.assert_allclose(loss(THETA + 1e4), loss(THETA), atol=1e-11)
        warm = f_loss(THETA, jnp.array([0, 5, 2, 1]), f, "unit", temperature=2.0)
        close(warm, 2 * loss(THETA / 2))
    cross_entropy = -jax.nn.log_softmax(THETA)[np.arange(4), [0, 5, 2, 1]]
    close(f_loss(THETA, jnp.array([0, 5, 2, 1]), KL()), cross_entropy)


def test_supervised_losses():
    outputs, labels = jnp.asarray(THETA), jnp.array([0, 5, 2, 1])
    hot = jnp.asarray(np.eye(K)[labels])

    @jax.jit
    def of_classes(outputs):
        entropy, power = losses.SoftmaxCrossEntropy(), Alpha(1.5)
        tokens = losses.FLoss(power, "unit", temperature=0.5)(
            outputs.reshape(2, 2, K), labels.reshape(2, 2)
        )
        each = f_loss(outputs, labels, power, "unit", temperature=0.5)
        same = entropy(outputs, labels), entropy(outputs, hot)
        same += losses.FLoss(KL())(outputs, labels), f_loss(outputs, labels, KL())
        return tokens, each.reshape(2, 2).sum(1), same

    tokens, each, same = of_classes(outputs)
    close(tokens, each)
    for found in same[:3]:
        close(found, same[3])
    u, y = jnp.array([[0.5, -3.0], [1.0, 0.0]]), jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    logistic = np.log1p(np.exp(-np.asarray(y) * np.asarray(u))).sum(1)
    known = [
        (losses.Squared(), [(0.25 + 4) / 2, (4 + 1) / 2]),
        (losses.Logistic(), logistic),
        (losses.Hinge(), [0.5, 3.0]),
        (losses.Huber(1.5), [0.125 + 1.5 * (2 - 0.75), 1.5 * (2 - 0.75) + 0.5]),
        (losses.Absolute(), [0.5 + 2, 2 + 1]),
        (losses.Euclidean(), np.sqrt([0.25 + 4, 4 + 1])),
    ]
    found = jax.jit(lambda u, y: [loss(u, y) for loss, _ in known])(u, y)
    close(np.stack(found), [values for _, values in known])
    counts = jnp.array([[2.0, 0.0], [1.0, 3.0]])
    close(losses.Poisson()(u, counts), np.exp(u).sum(1) - [2 * 0.5, 1.0])
    scores = jnp.array([[2.0, 0.5, 0.0], [0.0, 2.0, 1.5]])
    close(losses.Hinge()(scores, jnp.array([0, 2])), [0.0, 1.5])


# The solver -----------------------------------------------------------------------


def set_up(theta, f, q):
    return check(jnp.asarray(theta), f, q, -1, None, 1.0, None).set_up()


class Scaled(AbstractDivergence):
    """f(u) = c (u ln u - u + 1), with derivatives in c."""

    c: jax.Array
    sparse: ClassVar[bool] = False
    convex_ratio: ClassVar[bool] = True
    origin: ClassVar[float] = 0.0

    @property
    def at_zero(self):
        return self.c

    @property
    def lift(self):
        return self.c

    def value(self, u):
        return self.c * (jax.scipy.special.xlogy(u, u) - u + 1)

    def link(self, u):
        return self.c * jnp.log(u)

    def pair(self, w):
        u = jnp.exp(w / self.c)
        return u, self.curvature(u)

    def curvature(self, u):
        return u / self.c

    def conjugate(self, w):
        return self.c * jnp.exp(w / self.c)

    def mean_step(self, S, Q):
        return S * jnp.log(S)


@pytest.mark.slow
def test_fields_of_a_divergence_have_derivatives():
    # c KL at temperature 1 is KL at temperature c.
    theta, labels = jnp.asarray(THETA), jnp.arange(4)
    sigma = losses.spectrum("superquantile", K, 0.5)

    def every(f, c):
        options: Any = dict(reference="uniform", temperature=c)
        return (
            f_softargmax(theta, f, **options),
            f_softmax(theta, f, **options),
            f_loss(theta, labels, f, smoothing=0.1, **options),
            losses.capped_f_softargmax(theta, f, cap=0.4, **options),
            losses.spectral_weights(theta[3], sigma, f=f, smoothing=c),
            losses.spectral_risk(theta[3], sigma, f=f, smoothing=c),
        )

    @jax.jit
    def changes(c):
        own = lambda c: every(Scaled(c), 1.0)  # pyright: ignore
        return [jax.jvp(fn, [c], [1.0]) for fn in (own, lambda c: every(KL(), c))]

    for found, expected in zip(*map(jax.tree.leaves, changes(jnp.asarray(1.7)))):
        close(found, expected, 1e-11)


def bisect(classes, f, problem):
    """The sigma of every row by halving its bracket: slow, and true for every f."""
    y = below(problem.scores, problem.m)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        S, _ = sums(classes, f, middle + y, problem.q)
        return jnp.where(S < 1, middle, low), jnp.where(S < 1, high, middle)

    steps = jnp.finfo(y.dtype).nmant + 16
    low, high = jax.lax.fori_loop(0, steps, halve, bracket(classes, f, problem))
    return (low + high) / 2


@pytest.mark.costly
@family
def test_brackets_and_bisection(name):
    f = FAMILIES[name]
    rng = np.random.default_rng(3)
    hard = np.stack(
        [np.zeros(K), [0, 0, -1e3, -1e3, 0, -2], 50.0 * np.arange(K), THETA[0]]
    )

    def masses(theta, q):
        """At both ends of the brackets, and what halving them gives."""
        s = set_up(theta, f, q)
        y = s.problem.scores - s.problem.m
        ends = [
            sums(s.classes, s.f, end + y, s.problem.q)[0]
            for end in bracket(s.classes, s.f, s.problem)
        ]
        root = bisect(s.classes, s.f, s.problem)
        return *ends, s.problem.q * s.f.pair(root + y)[0]

    for theta, q in ((hard, 10.0 ** rng.uniform(-6, 6, K)), (THETA, "unit")):
        S_low, S_high, halved = jax.jit(lambda theta, q=q: masses(theta, q))(theta)
        assert (S_low <= 1 + 1e-9).all() and (S_high >= 1 - 1e-9).all()
    close(f_softargmax(THETA, f, "unit"), halved, 1e-11)


@pytest.mark.costly
@pytest.mark.parametrize(
    "name", [n for n, f in FAMILIES.items() if f.convex_ratio is True]
)
def test_newton_falls_to_the_root(name):
    f = FAMILIES[name]
    s = set_up(THETA, f, "uniform")
    y = s.problem.scores - s.problem.m
    low, high = bracket(s.classes, s.f, s.problem)
    root, sigma = bisect(s.classes, s.f, s.problem), high
    assert high[0, 0] > root[0, 0] + 1e-3 * jnp.abs(root[0, 0])  # a way to go
    for _ in range(8):
        S, W = sums(s.classes, s.f, sigma + y, s.problem.q)
        new = sigma - s.f.mean_step(S, s.problem.Q) / W
        slack = 1e-13 * jnp.abs(sigma)
        if name != "Jeffreys":
            assert (new <= sigma + slack).all() and (new >= root - slack).all()
        sigma = jnp.clip(new, low, high)
    close(sigma, root, 1e-13)


def stress(k=512):
    """Rows of many shapes: ramps, ties around the edge of the support, heavy tails."""
    rng, j = np.random.default_rng(4), np.arange(k)
    rows = [
        np.zeros(k),
        -j / k,
        -8.0 * j / k,
        -np.log1p(j),
        -2 * np.log1p(j),
        40.0 * (j == 3),
    ]
    for ties, gap in itertools.product((1, 2, 30), (0.5, 1.0, 1.99, 2.01, 4.0)):
        rows.append(np.where(j < ties, 0.0, -gap))
    rows += [scale * rng.normal(size=k) for scale in (0.1, 1, 4, 12)]
    rows += [rng.standard_t(2, k), rng.gumbel(size=k), rng.uniform(0, 5, k)]
    return np.stack(rows)


@pytest.mark.costly
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("3", "-0.5", "0.5")])
def test_at_most_nine_evaluations(name):
    for q in ("unit", "uniform"):
        found = losses.diagnose(stress(), FAMILIES[name], q)
        assert found.evaluations <= 9
        assert found.residual.max() < 1e-9


@pytest.mark.costly
@pytest.mark.parametrize(
    "name, k, q",
    [
        *((name, 32_000, "unit") for name in FAMILIES),
        *((name, 32_000, "uniform") for name in FEW),
        ("1.5", 1000, "uniform"),
        ("LeCam", 1000, "unit"),
        ("1.5", 2**18, "unit"),
    ],
)
def test_float32_mass(name, k, q):
    f, rng = FAMILIES[name], np.random.default_rng(5)
    theta = (rng.normal(size=(2, k)) * [[1], [4]]).astype("f4")
    p = f_softargmax(theta, f, q)
    exact = f_softargmax(theta.astype(float), f, q)
    assert p.dtype == jnp.float32
    assert np.abs(np.asarray(p, float) - np.asarray(exact)).sum(-1).max() < 5e-6


@pytest.mark.costly
@pytest.mark.parametrize("name", ("LeCam", "ChiSquare", "JensenShannon", "1.5"))
def test_float32_mass_of_nearly_equal_scores(name):
    theta = (1e-3 * np.random.default_rng(8).normal(size=(1, 32_768))).astype("f4")
    p = f_softargmax(theta, FAMILIES[name], "unit")
    exact = f_softargmax(theta.astype(float), FAMILIES[name], "unit")
    assert jnp.abs(p.astype(float) - exact).sum() < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("alpha", (3.0, 5.0))
def test_float32_mass_of_large_alpha(alpha):
    rng = np.random.default_rng(9)
    theta = (rng.normal(size=(4001, 20)) * rng.choice([0.3, 1, 3], (4001, 1))).astype(
        "f4"
    )
    exact = f_softargmax(theta.astype(float), Alpha(alpha), "unit")
    for f in (Alpha(alpha), Alpha(jnp.asarray(alpha, jnp.float32))):
        p = np.asarray(f_softargmax(theta, f, "unit"), float)
        assert np.abs(p.sum(-1) - 1).max() < 1e-6
        assert np.abs(p - np.asarray(exact)).sum(-1).max() < 1e-5
    value = lambda theta: f_softmax(theta, Alpha(alpha), "unit").sum()
    close(jax.grad(value)(jnp.asarray(theta)), p, 1e-5)


@pytest.mark.slow
def test_a_generator_given_as_a_function():
    def jensen_shannon(u):  # not normalized
        return u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2) + 3 * u

    own, named = losses.generator(jensen_shannon), JensenShannon()
    close(f_softargmax(THETA, own, MEASURE), f_softargmax(THETA, named, MEASURE), 1e-9)
    close(
        f_softmax(THETA, jensen_shannon, MEASURE),
        f_softmax(THETA, named, MEASURE),
        1e-9,
    )
    gradient = jax.grad(
        lambda t: f_loss(t, jnp.asarray(1), own, MEASURE, smoothing=0.1)
    )
    p = f_softargmax(THETA[1], named, MEASURE)
    y = 0.9 * np.eye(K)[1] + 0.1 * MEASURE / MEASURE.sum()
    close(gradient(jnp.asarray(THETA[1])), p - y, 1e-8)
    with pytest.raises(ValueError, match=r"f''\(0.0001\) = -.*strictly convex"):
        f_softargmax(THETA, lambda u: -(u**2), "unit")


# Hard inputs ----------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("name", ("KL", "ReverseKL", "LeCam", "1.5", "traced 0.3"))
def test_excluded_classes(name):
    f, keep = FAMILIES[name], np.array([True, True, False, True, False, True])
    q = MEASURE
    labels, old = jnp.array([0, 1, 3, 2]), jnp.array([0, 1, 5, 3])

    @jax.jit
    def without(scores, q):
        return (
            f_softargmax(scores, f, q),
            f_softmax(scores, f, q),
            f_loss(scores, labels, f, q, smoothing=0.2),
            f_softargmax(scores, f, "uniform"),
        )

    p, value, loss, even = without(THETA[:, keep], q[keep])
    masked = np.where(keep, THETA, -np.inf)
    everywhere = np.ones_like(keep)
    calls = (masked, q, everywhere), (THETA, q * keep, everywhere), (THETA, q, keep)

    @jax.jit
    def evaluate(scores, q, where):
        def all_of(scores):
            return (
                f_softargmax(scores, f, q, where=where),
                f_softmax(scores, f, q, where=where),
                f_loss(scores, old, f, q, where=where, smoothing=0.2),
            )

        got, pull = jax.vjp(all_of, scores)
        return got, pull((jnp.ones_like(scores), jnp.zeros(4), jnp.ones(4)))[0]

    for call in calls:
        (got, top, lost), gradient = evaluate(*call)
        close(got[:, keep], p, 1e-11)
        assert (got[:, ~keep] == 0).all()
        close(top, value, 1e-11)
        close(lost, loss, 1e-11)
        assert np.isfinite(gradient).all() and (gradient[:, ~keep] == 0).all()
    uniform = f_softargmax(masked, f, "uniform")
    close(uniform[:, keep], even, 1e-11)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["KL", "1.5", "traced 0.3"])
def test_nan_is_no_missing_class(name):
    f, scores = FAMILIES[name], jnp.array([[jnp.nan, jnp.nan], [1.0, 2.0]])
    for values in (
        f_softmax(scores, f, "unit"),
        f_loss(scores, LABELS_OF_TWO, f, "unit"),
    ):
        assert np.isnan(values[0]) and np.isfinite(values[1])


@pytest.mark.costly
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_not_known_is_nan_everywhere(name):
    """NaN among the scores; and traced numbers outside of their domain."""
    f = FAMILIES[name]

    @jax.jit
    def run(scores, beta, cap, q):
        return {
            "p": f_softargmax(scores, f, q, temperature=beta),
            "sigmoid": losses.f_sigmoid(scores[:1, :1], f, "unit", temperature=beta),
            "capped": losses.capped_f_softargmax(
                scores, f, q, cap=cap, temperature=beta
            ),
            "w": losses.hessian_operator(scores[0], f, q, temperature=beta).w,
            "value": f_softmax(scores, f, q, temperature=beta),
            "loss": f_loss(scores, jnp.array([[0.5, 0.5]]), f, q, temperature=beta),
            "lattice": losses.soft_viterbi(
                jnp.stack([scores, scores])[None, :, 0], f, q, temperature=beta
            ),
        }

    scores, q = jnp.array([[0.3, -0.2]]), jnp.ones(2)
    good = run(scores, 1.0, 0.8, q)
    assert all(jnp.isfinite(a).all() for a in good.values())
    for wrong in (
        run(scores.at[0, 0].set(jnp.nan), 1.0, 0.8, q),
        run(scores, 0.0, 0.8, q),
        run(scores, -1.0, 0.8, q),
    ):
        assert all(jnp.isnan(a).all() for a in wrong.values())
    assert jnp.isnan(run(scores, 1.0, jnp.nan, q)["capped"]).all()
    smoothed = jax.jit(lambda s: f_loss(scores, jnp.array([1]), f, q, smoothing=s))
    assert jnp.isfinite(smoothed(0.1)) and jnp.isnan(smoothed(1.5))


@pytest.mark.costly
@pytest.mark.parametrize("name", ("KL", "1.5", "ReverseKL", "LeCam", "traced 0.3"))
def test_rows_without_classes(name):
    f, scores = FAMILIES[name], jnp.asarray(THETA).at[1].set(-jnp.inf)
    assert (f_softargmax(scores, f, "uniform")[1] == 0).all()

    @jax.jit
    def evaluate(scores, q):
        def outputs(scores):
            return (
                f_softargmax(scores, f, q),
                f_softmax(scores, f, q),
                f_loss(scores, jnp.zeros(4, int), f, q, smoothing=0.1),
            )

        got, pull = jax.vjp(outputs, scores)
        return got, pull((jnp.ones_like(scores), jnp.ones(4), jnp.ones(4)))[0]

    for q in (np.ones(K), MEASURE):
        (p, value, loss), gradient = evaluate(scores, q)
        assert (p[1] == 0).all() and value[1] == -jnp.inf and loss[1] == 0
        close(p[0], f_softargmax(THETA, f, q)[0], 1e-11)
        assert np.isfinite(gradient).all() and (gradient[1] == 0).all()


@pytest.mark.costly
@family
def test_one_class_ties_and_distant_scores(name):
    f = FAMILIES[name]
    close(f_softargmax(np.array([[3.0]]), f, "unit"), [[1.0]])
    scores = np.array([[0.0, 1e4, 1e4, -1e4, 0.0, 0.0], [1e4, 0, 0, 0, 0, 0]])
    for q in ("unit", "uniform"):
        p = f_softargmax(np.concatenate([scores, scores]), f, q)
        assert np.isfinite(p).all()
        close(p.sum(-1), 1, 1e-11)
        close(p[0, 1], p[0, 2], 1e-14)
        assert p[0, 1] > 0.45 and p[1, 0] > 0.9
    single = f_softargmax(THETA.astype("f4") + np.float32(1e4), f, "unit")
    rounded = (THETA.astype("f4") + np.float32(1e4)).astype(float)
    np.testing.assert_allclose(single, f_softargmax(rounded, f, "unit"), atol=5e-6)


@pytest.mark.costly
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_short_floats_are_computed_in_float32(dtype):
    scores = jnp.asarray(np.tile(THETA, (1, 50)), dtype)
    try:
        jax.jit(lambda a: a.astype("f4"))(scores).block_until_ready()
    except jax.errors.JaxRuntimeError:
        pytest.skip(f"no {dtype} on this processor, whatever is computed")
    for f in (KL(), Alpha(1.5), JensenShannon()):
        p = f_softargmax(scores, f, "unit")
        assert p.dtype == scores.dtype
        exact = f_softargmax(scores.astype("f4"), f, "unit")
        # Half a unit in the last place. Two programs may differ in float32, so that
        # what is between two short floats may go to either.
        short = jnp.finfo(dtype)
        half, least = float(short.eps) / 2, float(short.smallest_subnormal) / 2
        error = np.abs(np.asarray(p, float) - np.asarray(exact, float))
        assert (error <= 1.01 * np.maximum(half * np.asarray(exact), least)).all()
        loss = lambda s, f=f: f_loss(s, jnp.zeros(4, int), f, "unit").sum()
        assert jax.eval_shape(jax.grad(loss), scores).dtype == scores.dtype


def test_axes_batches_and_alpha_per_row():
    scores = np.random.default_rng(7).normal(size=(2, 5, 3))
    f = Alpha(1.5)
    p = f_softargmax(scores, f, "unit", axis=1)
    last = np.asarray(f_softargmax(np.moveaxis(scores, 1, -1), f, "unit"))
    close(p, np.moveaxis(last, -1, 1))
    mapped = jax.vmap(lambda s: f_softargmax(s, f, "unit", axis=0))(jnp.asarray(scores))
    close(p, mapped)
    alphas = jnp.array([[1.2, 1.5, 2.0], [0.5, 1.0, 3.0]])
    rows = f_softargmax(scores, Alpha(alphas), "unit", axis=1)
    rows = np.asarray(rows)
    for i, j in itertools.product(range(2), range(3)):
        own = f_softargmax(scores[i, :, j], Alpha(float(alphas[i, j])), "unit")
        close(rows[i, :, j], own, 1e-10)
    heads = np.asarray(f_softargmax(scores, Alpha(alphas[:, :1]), "unit", axis=1))
    close(heads[:, :, 0], rows[:, :, 0])
    jitted = jax.jit(lambda s: f_softargmax(s, f, "unit", axis=1))
    close(jitted(scores), p, 1e-14)


@pytest.mark.slow
def test_classes_on_several_axes():
    scores = np.random.default_rng(7).normal(size=(2, 3, 2, 2))
    flat, f = np.moveaxis(scores, 1, -1).transpose(0, 1, 3, 2), Alpha(1.5)
    flat = flat.reshape(2, 2, 6)  # of the axes 1 and 3
    where, beta = scores > -1, np.array([[0.5, 1.0], [2.0, 0.7]])
    flat_where, y = flat > -1, np.random.default_rng(1).dirichlet(np.ones(6), (2, 2))
    back = lambda a: np.asarray(a).reshape(2, 2, 3, 2).transpose(0, 2, 1, 3)
    options: dict[str, Any] = dict(temperature=beta, where=where)
    flat_options: dict[str, Any] = dict(temperature=beta, where=flat_where)
    for axis in ((1, 3), (1, -1)):
        p = f_softargmax(scores, f, "unit", axis=axis, **options)
        close(p, back(f_softargmax(flat, f, "unit", **flat_options)))
    close(
        f_softmax(scores, f, "uniform", axis=(1, 3), **options),
        f_softmax(flat, f, "uniform", **flat_options),
    )
    for targets, other in ((np.array([[0, 5], [2, 3]]), None), (back(y), y)):
        other = targets if other is None else other
        close(
            f_loss(scores, targets, f, "unit", axis=(1, 3)),
            f_loss(flat, other, f, "unit"),
        )
    scores = jnp.asarray(scores)
    capped = losses.capped_f_softargmax(scores, f, "unit", cap=0.3, axis=(1, 3))
    flat = losses.capped_f_softargmax(jnp.asarray(flat), f, "unit", cap=0.3)
    close(capped, back(flat))
    close(losses.diagnose(scores, f, "unit", axis=(0, 1, 2, 3)).residual, 0)
    for axis in ((1, -3), (), (1, 4)):
        with pytest.raises(ValueError, match="or a tuple of different ones"):
            f_softargmax(scores, f, "unit", axis=axis)


def test_numbers_per_row_may_have_the_axis_of_the_classes():
    alpha, beta = np.array([1.2, 1.5, 2.0, 3.0]), np.array([0.5, 1.0, 2.0, 1.5])
    scores, column = jnp.asarray(THETA), lambda a: jnp.asarray(a)[:, None]
    close(
        losses.entmax(scores, column(alpha), temperature=column(beta)),
        losses.entmax(scores, jnp.asarray(alpha), temperature=beta),
    )
    close(
        losses.entmax(scores.T, column(alpha).T, axis=0),
        losses.entmax(scores, jnp.asarray(alpha)).T,
    )
    with pytest.raises(ValueError, match=r"`alpha` has shape \(4, 2\)"):
        losses.entmax(scores, jnp.ones((4, 2)))


def test_diagnostics():
    found = losses.diagnose(THETA, Alpha(1.5), "unit")
    p = losses.entmax15(THETA)
    np.testing.assert_array_equal(found.support, (p > 0).sum(-1))
    assert found.support[0] > 1 and found.support[-1] < K
    assert found.residual.max() < 1e-14 and found.evaluations <= 9


def test_wrong_calls(unchecked):
    raises = lambda kind, match: pytest.raises(kind, match=match)
    with raises(TypeError, "`scores` has dtype int64; floats are expected"):
        f_softargmax(np.arange(3), KL())
    with raises(ValueError, r"`axis` is 2; an integer from -2 to 1"):
        f_softargmax(THETA, KL(), axis=2)
    with raises(
        TypeError, r"`reference` is missing; for ChiSquare\(\) = Alpha\(2\) it matters"
    ):
        f_softargmax(THETA, ChiSquare())
    with raises(ValueError, r'`reference` is "prior"; "unit", "uniform" or an array'):
        f_softargmax(THETA, KL(), "prior")  # pyright: ignore
    with raises(ValueError, r"`reference` has shape \(5,\); one that broadcasts to"):
        f_softargmax(THETA, KL(), np.ones(5))
    with raises(ValueError, "`reference` has a negative or NaN entry"):
        f_softargmax(THETA, KL(), -MEASURE)
    with raises(ValueError, r"`alpha` has shape \(3,\); one that broadcasts to \(4,\)"):
        f_softargmax(THETA, Alpha(jnp.ones(3)), "unit")
    with raises(ValueError, "`alpha` is nan; a finite number is expected"):
        Alpha(float("nan"))
    with raises(ValueError, "`alpha` is .*inf.*; finite numbers are expected"):
        Alpha(jnp.array([1.0, jnp.inf]))
    with raises(TypeError, "`alpha` is an array of dtype int32"):
        Alpha(jnp.array(1, jnp.int32))
    with raises(TypeError, "`alpha` is '1.5'; a number"):
        Alpha("1.5")  # pyright: ignore
    with raises(TypeError, "`f` is 'kl'; a generator such as"):
        f_softargmax(THETA, "kl", "unit")  # pyright: ignore
    with raises(TypeError, "`where` has dtype float64; booleans are expected"):
        f_softargmax(THETA, KL(), where=np.ones(K))
    with raises(ValueError, "contains the label 6; the 6 classes are 0 to 5"):
        f_loss(THETA, np.array([0, 1, 2, 6]), KL())
    with raises(ValueError, r"`targets` has shape \(3,\) and dtype int64; labels"):
        f_loss(THETA, np.array([0, 1, 2]), KL())
    with raises(ValueError, r"infinite with ReverseKL\(\).*smoothing=0.1"):
        f_loss(THETA, np.array([0, 1, 2, 3]), ReverseKL(), "unit")
    with raises(ValueError, r"`scores` has shape \(4, 6\); one row \(k,\) is expected"):
        losses.hessian_operator(THETA, KL())
    with raises(ValueError, r"`scores` has shape \(2, 0\): no class on axis -1"):
        f_softargmax(np.zeros((2, 0)), KL())


OPERATORS = {
    "f_softargmax": lambda **options: f_softargmax(THETA, KL(), **options),
    "f_softmax": lambda **options: f_softmax(THETA, KL(), **options),
    "f_loss": lambda **options: f_loss(THETA, LABELS, KL(), **options),
    "entmax": lambda **options: losses.entmax(THETA, 1.3, **options),
    "entmax15": lambda **options: losses.entmax15(THETA, **options),
    "sparsemax": lambda **options: losses.sparsemax(THETA, **options),
    "capped_f_softargmax": lambda **options: losses.capped_f_softargmax(
        jnp.asarray(THETA), KL(), cap=0.5, **options
    ),
    "diagnose": lambda **options: losses.diagnose(THETA, KL(), **options),
}
LABELS = np.array([0, 1, 2, 3])


@pytest.mark.parametrize("name", OPERATORS)
def test_the_axis_has_another_name_elsewhere(name):
    with pytest.raises(TypeError, match=f"`{name}` takes no `dim`: say `axis=0`"):
        OPERATORS[name](dim=0)
    with pytest.raises(TypeError, match=f"`{name}` takes no `n_iter`: its arguments"):
        OPERATORS[name](n_iter=3)


@pytest.mark.parametrize(
    "name, f", [("entmax15", Alpha(1.5)), ("sparsemax", ChiSquare())]
)
def test_losses_have_other_names_elsewhere(name, f):
    for other in (f"{name}_loss", f"{name.capitalize()}Loss"):
        with pytest.raises(AttributeError, match=f"has no attribute `{other}`; ") as e:
            getattr(losses, other)
        given = dict(dp=dp, scores=THETA, targets=LABELS)
        said = eval(str(e.value).split("`")[-2], given)
        values = said if other.endswith("_loss") else said(THETA, LABELS)
        np.testing.assert_array_equal(values, losses.f_loss(THETA, LABELS, f, "unit"))
    with pytest.raises(AttributeError, match="has no attribute `entmax_loss_15`$"):
        losses.entmax_loss_15  # pyright: ignore


class _Open(AbstractPart):
    options: dict

    def __init__(self, **options):
        self.options = options


def test_parts_say_where_options_of_other_libraries_are():
    public = [*vars(losses).values(), *vars(dp.oracles).values(), *vars(optim).values()]
    is_part = lambda one: isinstance(one, type) and issubclass(one, AbstractPart)
    parts = {one for one in public if is_part(one) and "Abstract" not in one.__name__}
    assert {dp.oracles.GaussNewton, losses.Huber, optim.Cauchy} < parts
    for part in parts:
        names = "`, `".join(inspect.signature(part).parameters)
        known = f"its arguments are `{names}`" if names else "it takes none"
        with pytest.raises(TypeError) as error:
            part(beta=0.1)
        assert str(error.value) == f"`{part.__name__}` takes no `beta`: {known}."
    for name in ("learning_rate", "lr"):
        options: Any = {name: 0.1}
        with pytest.raises(TypeError, match=f"no `{name}`: the optimizer scales its"):
            dp.oracles.GaussNewton(**options)
    rules: list[Any] = [optim.kfac, optim.llqr, optim.model_step, optim.recommended]
    for fn in rules:
        match = f"`{fn.__name__}` takes no `lr`: .*(long|0.1)"
        with pytest.raises(TypeError, match=match):
            fn(lr=0.1)
        with pytest.raises(TypeError, match="takes no `beta`: its arguments are `.*`,"):
            fn(beta=0.1)
    with pytest.raises(TypeError, match="`dp.value_and_direction` takes it"):
        losses.Squared(reduction="sum")  # pyright: ignore
    assert _Open(learning_rate=0.1).options == {"learning_rate": 0.1}


@pytest.mark.parametrize("name", ["f_softplus", "f_sigmoid"])
def test_entry_by_entry_there_is_no_axis(name):
    operator = getattr(losses, name)
    for option in ("axis", "dim"):
        match = f"`{name}` takes no `{option}`: it takes every entry by itself"
        with pytest.raises(TypeError, match=match):
            operator(THETA, KL(), **{option: 0})


@pytest.mark.parametrize(
    "f, name",
    [
        (Alpha(1.5), r"Alpha\(1.5\)"),
        (Alpha(1.05), r"Alpha\(1.05\)"),
        (Alpha(jnp.array([1.5, 1.2])), r"Alpha\(f64\[2\]\)"),
        (Alpha(0.0), r"ReverseKL\(\) = Alpha\(0\)"),
        (LeCam(), r"LeCam\(.*\)"),  # pyright: ignore
        (lambda u: u * jnp.log(u), r"generator\(<lambda>\)"),
    ],
)
def test_a_generator_has_the_name_that_was_written(f, name):
    missing = f"`reference` is missing; for {name} it matters"
    with pytest.raises(TypeError, match=missing):
        losses.FLoss(f)
    if not isinstance(f, type(Alpha(jnp.array([1.5])))):
        with pytest.raises(TypeError, match=missing):
            f_softargmax(THETA[0], f)
    with pytest.raises(ValueError, match=r"ReverseKL\(\) = Alpha\(0\), whose f"):
        f_loss(THETA, LABELS, Alpha(0.0), "unit")


def test_more_wrong_calls(unchecked):
    raises = lambda kind, match: pytest.raises(kind, match=match)
    with raises(TypeError, r"`f` is the class KL; .*`dp.losses.KL\(\)`"):
        f_softargmax(THETA, KL)  # pyright: ignore
    with raises(TypeError, r"`f` is Alpha, which returned Alpha.*Alpha\(1.5\)`"):
        losses.FLoss(Alpha, "unit")
    with raises((TypeError, IndexError), "which was called with one number"):
        losses.generator(lambda u: u[0])
    with raises(TypeError, r"`f` is an array of shape \(4,\)"):
        f_loss(THETA, KL(), LABELS)  # pyright: ignore
    with raises(TypeError, "scores come before targets"):
        f_loss(LABELS, THETA, KL())
    for bad in (0.0, -1.0, np.array([1.0, -1.0, 1.0, 1.0])):
        with raises(ValueError, "`temperature` is .*-?[01].*expected"):
            f_softargmax(THETA, KL(), temperature=bad)
    with raises(TypeError, "`temperature` is 'hot'; a number > 0"):
        losses.FLoss(KL(), temperature="hot")  # pyright: ignore
    for bad in (2.0, -0.1):
        with raises(ValueError, rf"`smoothing` is {bad}; a number in \[0, 1\]"):
            losses.FLoss(KL(), smoothing=bad)
    one_hot = np.eye(K)[LABELS]
    with raises(ValueError, r"Convert them with `targets.astype\(float\)`"):
        f_loss(THETA, one_hot.astype(int), KL())
    with raises(ValueError, r"Convert them with `targets.astype\(int\)`"):
        losses.SoftmaxCrossEntropy()(jnp.asarray(THETA), jnp.arange(4.0))
    for loss in (losses.Logistic(), losses.Hinge()):
        with raises(ValueError, "contains 0.0; binary targets are 1.0 and -1.0"):
            loss(jnp.asarray(THETA), jnp.asarray(one_hot))
    with raises(ValueError, "`delta` is -1.0; a number > 0"):
        losses.Huber(-1.0)


def test_losses_of_classes_need_classes(unchecked):
    for loss in (losses.SoftmaxCrossEntropy(), losses.FLoss(KL())):
        with pytest.raises(
            ValueError, match=r"`outputs` has shape \(3,\); \(examples, c"
        ):
            loss(jnp.ones(3), jnp.array([0.0, 0.0, 1.0]))
        # Else every loss would be 0.
        with pytest.raises(ValueError, match=r"of which there is one: .*Logistic\(\)"):
            loss(jnp.ones((3, 1)), jnp.array([0, 1, 1]))
        with pytest.raises(ValueError, match=r"of which there is one: .*Logistic\(\)"):
            jax.jit(loss.gradient)(jnp.ones((3, 1)), jnp.array([0, 1, 1]))
    with pytest.raises(ValueError, match=r"of which there is one: .*targets 1.0 and"):
        losses.Hinge()(jnp.ones((3, 1)), jnp.array([1, -1, 1]))
    with pytest.raises(TypeError, match=r"`outputs` is \[\[1.0\]\]; an array of"):
        losses.Squared()([[1.0]], [[2.0]])  # pyright: ignore


def test_wrong_parts_of_energies_and_risks(unchecked):
    energy, subsets = lambda w, x, y: jnp.dot(w, y), losses.Subsets(3)
    anything: Any = losses
    descent: Any = optim
    sigma = losses.spectrum("superquantile", 3, 0.5)
    for call, message in (
        (lambda: anything.exact_objective(energy, subsets, KL()), "`subsets.all()`"),
        (lambda: anything.exact_objective("e", subsets.all(), KL()), "`energy` is 'e'"),
        (
            lambda: anything.minmin_objective(energy, energy, losses.Subsets, KL()),
            "`sampler` is the class Subsets",
        ),
        (lambda: anything.Subsets(3.0), "`k` is 3.0; a Python int"),
        (lambda: anything.Enumeration(3), "`candidates` has the shapes ()"),
        (
            lambda: losses.Enumeration(jnp.ones((4, 2)), np.ones(2)),
            "one for each of the 4 candidates",
        ),
        (
            lambda: descent.prospect(
                losses.Squared(), sigma, KL(), smoothing=1.0, learning_rate=0.1
            ),
            "`loss` is Squared(); a function `loss(params, example)`",
        ),
        (
            lambda: descent.lsvrg(energy, 0.5, learning_rate=0.1),
            "`sigma` has shape (); a spectrum",
        ),
        (
            lambda: losses.viterbi(jnp.ones((3, 2, 2), int)),
            "`potentials` has dtype int",
        ),
        (lambda: anything.sparsemax(0.5), "`scores` is one number"),
        (lambda: anything.sparsemax(None), "`scores` is None; an array is expected"),
        (lambda: anything.entmax15("s"), "`scores` is 's'; an array is expected"),
        (
            lambda: anything.capped_f_softargmax(THETA, KL(), cap="c"),
            "`cap` is 'c'; a number > 0",
        ),
        (
            lambda: losses.soft_viterbi(np.ones((3, 2, 2)), temperature=np.float32(0)),
            "`temperature` is 0.0; a number > 0 is expected; for the limit 0 use",
        ),
        (
            lambda: anything.viterbi(jnp.ones((3, 2, 2)), mask=jnp.ones(3)),
            "`mask` has shape (3,) and dtype float64; booleans of shape (3,)",
        ),
        (lambda: losses.Huber(jnp.array(-1.0)), "`delta` is -1.0; a number > 0"),
        (
            lambda: anything.f_softargmax(KL(), THETA),
            "`scores` is KL(); an array is expected, and f comes after it",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            call()


@pytest.mark.slow
def test_gradients_in_both_modes_to_second_order():
    f = lambda t, q: f_softargmax(t, LeCam(), q)  # pyright: ignore
    check_grads(f, (jnp.asarray(THETA[1]), jnp.asarray(MEASURE)), 2, ("fwd", "rev"))
