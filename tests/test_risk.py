"""Spectral risks: every identity that they have, and the methods that minimize them."""

import functools as ft
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import _isotonic


L = dp.losses
CHI2, KL = L.ChiSquare(), L.KL()
GENERATORS = {
    "KL": KL,
    "reverse KL": L.ReverseKL(),
    "chi2": CHI2,
    "Neyman": L.Neyman(),
    "alpha 1.5": L.Alpha(1.5),
    "alpha 3": L.Alpha(3.0),
    "Hellinger": L.SquaredHellinger(),
    "Jensen-Shannon": L.JensenShannon(),
    "Jeffreys": L.Jeffreys(),
    "Le Cam": L.LeCam(),  # pyright: ignore
    "function": L.generator(lambda u: (u - 1) ** 2 + (u - 1) ** 4 / 4),
}

N = 23
LOSSES = jnp.asarray(np.random.default_rng(0).normal(size=N))
# n q0 = 10.81 is not an integer; 46 / 2 is.
SPECTRA = {
    "superquantile": L.spectrum("superquantile", N, 0.47),
    "extremile": L.spectrum("extremile", N, 2.5),
    "esrm": L.spectrum("esrm", N, 2.0),
}

every_f = pytest.mark.parametrize("f", GENERATORS.values(), ids=GENERATORS)
closed_f = pytest.mark.parametrize("f", [CHI2, KL], ids=["chi2", "KL"])
every_sigma = pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)


@ft.cache
def _compiled(f):
    """The weights, as the gradient of the risk, and the risk."""

    @jax.jit
    def call(losses, sigma, nu):
        fn = lambda losses: L.spectral_risk(losses, sigma, f, smoothing=nu)
        h, q = jax.value_and_grad(fn)(losses)
        return q, h

    return call


@ft.cache
def _compiled_weights(f):
    return jax.jit(
        lambda losses, sigma, nu: L.spectral_weights(losses, sigma, f, smoothing=nu)
    )


def compiled(f):
    return lambda losses, sigma, nu: _compiled(f)(losses, sigma, jnp.asarray(nu))


def compiled_weights(f):
    return lambda losses, sigma, nu: _compiled_weights(f)(
        losses, sigma, jnp.asarray(nu)
    )


def weights(losses, sigma, f, nu):
    return compiled(f)(losses, sigma, nu)[0]


def risk(losses, sigma, f, nu):
    return compiled(f)(losses, sigma, nu)[1]


def divergence(f, q):
    return float(jnp.mean(f.value(len(q) * q)))


# Spectra --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
@pytest.mark.parametrize(
    "kind, parameter, cumulative",
    [
        ("superquantile", 0.0, lambda t: t),
        ("superquantile", 0.5, lambda t: np.maximum(t - 0.5, 0) / 0.5),
        ("superquantile", 0.47, lambda t: np.maximum(t - 0.47, 0) / (1 - 0.47)),
        ("extremile", 1.0, lambda t: t),
        ("extremile", 2.5, lambda t: t**2.5),
        ("esrm", 1.0, lambda t: np.expm1(t) / np.expm1(1)),
        ("esrm", 1e-3, lambda t: np.expm1(1e-3 * t) / np.expm1(1e-3)),
    ],
)
def test_spectrum_is_the_increment_of_the_integral(kind, parameter, cumulative, n):
    sigma = np.asarray(L.spectrum(kind, n, parameter))
    # With more digits, where there are, for the differences.
    expected = np.diff(cumulative(np.arange(n + 1, dtype=np.longdouble) / n))
    np.testing.assert_allclose(sigma, expected, rtol=0, atol=1e-15)
    assert abs(sigma.sum() - 1) < 1e-14
    assert np.all(np.diff(sigma) >= 0) and np.all(sigma >= 0)


def test_spectrum_of_many_losses_keeps_its_digits():
    n, r = 10**6, 2.0
    sigma = np.asarray(L.spectrum("extremile", n, r))
    exact = (2.0 * np.arange(1, n + 1) - 1) / n**2
    np.testing.assert_allclose(sigma, exact, rtol=1e-13)
    steep = L.spectrum("esrm", 10, 2000.0)
    expected = np.exp(-200.0 * np.arange(10)[::-1])
    np.testing.assert_allclose(steep, expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("q0", [0.0, 0.25, 0.5, 0.75])
def test_divergences_of_the_superquantile(q0):
    # The spectrum is piecewise constant on the grid: exact for n q0 integer.
    sigma = L.spectrum("superquantile", 20, q0)
    # (s - 1)^2, twice the generator
    assert abs(2 * divergence(CHI2, sigma) - q0 / (1 - q0)) < 1e-13
    assert abs(divergence(KL, sigma) + np.log(1 - q0)) < 1e-13


@pytest.mark.parametrize("r", [1.5, 2.0, 2.5])
def test_divergences_of_the_extremile(r):
    # In the limit of many losses; below it by Jensen's inequality.
    chi2, kl = (r - 1) ** 2 / (2 * r - 1), np.log(r) + 1 / r - 1
    errors = []
    for n in (500, 5000):
        sigma = L.spectrum("extremile", n, r)
        errors.append((chi2 - 2 * divergence(CHI2, sigma), kl - divergence(KL, sigma)))
    (chi2_500, kl_500), (chi2_5000, kl_5000) = errors
    assert 0 < chi2_5000 < chi2_500 / 10 < 1e-4
    assert 0 < kl_5000 < kl_500 / 10 < 1e-4


# The risk without smoothing -------------------------------------------------------


@every_sigma
def test_risk_is_the_largest_mean_over_all_orders(sigma):
    small = np.asarray(LOSSES[:6])
    sigma = np.asarray(sigma[-6:] / jnp.sum(sigma[-6:]))
    orders = [small[list(p)] @ sigma for p in itertools.permutations(range(6))]
    value = L.spectral_risk(jnp.asarray(small), jnp.asarray(sigma))
    assert abs(value - max(orders)) < 1e-14


@every_sigma
def test_subgradient_is_sigma_at_the_ranks(sigma):
    expected = np.zeros(N)
    expected[np.argsort(LOSSES)] = sigma
    np.testing.assert_array_equal(jax.grad(L.spectral_risk)(LOSSES, sigma), expected)
    np.testing.assert_array_equal(L.spectral_weights(LOSSES, sigma), expected)


@pytest.mark.parametrize("q0", [0.0, 0.3, 0.47, 0.9])
def test_superquantile_is_a_minimum_over_thresholds(q0):
    l = np.asarray(LOSSES)
    values = [t + np.maximum(l - t, 0).sum() / (N * (1 - q0)) for t in l]
    value = L.spectral_risk(LOSSES, L.spectrum("superquantile", N, q0))
    assert abs(value - min(values)) < 1e-13  # piecewise linear: least at a loss


def test_extremile_of_order_two_is_the_mean_of_the_larger_of_two():
    pairs = np.maximum(LOSSES[:, None], LOSSES[None, :]).mean()
    value = L.spectral_risk(LOSSES, L.spectrum("extremile", N, 2))
    assert abs(value - pairs) < 1e-14


# Optimality of the smoothed weights -----------------------------------------------


@pytest.mark.costly
@every_f
@every_sigma
def test_optimality_certificate(f, sigma):
    for nu in (0.01, 0.3, 5.0):
        q = weights(LOSSES, sigma, f, nu)
        # q is in the permutahedron
        smallest = np.cumsum(np.sort(q)) - np.cumsum(sigma)
        assert smallest.min() > -1e-14
        assert abs(np.sum(q) - 1) < 1e-14
        # and its gradient attains the largest <g, q> there.
        held = np.where(q > 0, q, 1)
        at_zero = f.link(jnp.zeros(())) if f.sparse else 0.0
        link = f.origin + np.where(q > 0, f.link(jnp.asarray(N * held)), at_zero)
        g = np.asarray(LOSSES) - nu * link
        assert abs(np.sum(np.sort(g) * sigma) - np.sum(g * q)) < 1e-12


@pytest.mark.costly
@every_f
def test_value_is_primal_value(f):
    for sigma in SPECTRA.values():
        q, h = compiled(f)(LOSSES, sigma, 0.3)
        assert abs(h - (jnp.sum(q * LOSSES) - 0.3 * divergence(f, q))) < 1e-14


@pytest.mark.costly
@pytest.mark.parametrize("name", ["chi2", "KL", "Le Cam"])
def test_gradient_of_risk_is_weights(name):
    f = GENERATORS[name]
    for sigma in SPECTRA.values():
        q = compiled_weights(f)(LOSSES, sigma, 0.3)
        np.testing.assert_allclose(weights(LOSSES, sigma, f, 0.3), q, atol=1e-16)


@pytest.mark.costly
@every_f
def test_mean_and_risk_enclose_the_smoothed_risk(f):
    for sigma in SPECTRA.values():
        plain = L.spectral_risk(LOSSES, sigma)
        for nu in (0.01, 0.3, 5.0):
            h = risk(LOSSES, sigma, f, nu)
            assert jnp.mean(LOSSES) + 1e-6 < h < plain - 1e-6
            # infinite where f(0) is and sigma has zeros
            assert plain - h <= nu * divergence(f, sigma) + 1e-14


@pytest.mark.costly
@every_f
@every_sigma
def test_much_smoothing_gives_the_mean(f, sigma):
    q, h = compiled(f)(LOSSES, sigma, 1e9)
    np.testing.assert_allclose(q, 1 / N, rtol=1e-8)
    assert abs(h - jnp.mean(LOSSES)) < 1e-8
    # With less of it by how much they differ, to first order.
    nu, mean, curvature = 1e4, jnp.mean(LOSSES), f.curvature(jnp.ones(()))
    q, h = compiled(f)(LOSSES, sigma, nu)
    slope = curvature * (LOSSES - mean)
    np.testing.assert_allclose(nu * (N * q - 1), slope, rtol=0, atol=1e-2)
    variance = jnp.var(LOSSES)
    np.testing.assert_allclose(nu * (h - mean), curvature * variance / 2, rtol=1e-3)


@pytest.mark.costly
@every_f
def test_no_smoothing_gives_the_risk(f):
    sigma = SPECTRA["extremile"]  # without zeros, the blocks are single losses
    q, h = compiled(f)(LOSSES, sigma, 1e-9)
    np.testing.assert_allclose(q, L.spectral_weights(LOSSES, sigma), atol=1e-14)
    assert abs(h - L.spectral_risk(LOSSES, sigma)) < 1e-6
    if np.isfinite(f.at_zero):
        sigma = SPECTRA["superquantile"]
        q, h = compiled(f)(LOSSES, sigma, 1e-6)
        np.testing.assert_allclose(q, L.spectral_weights(LOSSES, sigma), atol=1e-4)
        assert abs(h - L.spectral_risk(LOSSES, sigma)) < 1e-4


@pytest.mark.costly
@every_f
def test_uniform_spectrum_gives_uniform_weights(f):
    sigma = L.spectrum("superquantile", N, 0.0)
    for nu in (1e-3, 0.3, 100.0):
        q, h = compiled(f)(LOSSES, sigma, nu)
        np.testing.assert_allclose(q, 1 / N, rtol=1e-14)
        assert abs(h - jnp.mean(LOSSES)) < 1e-14


@pytest.mark.costly
@every_f
def test_shifts_and_orders(f):
    sigma = SPECTRA["superquantile"]
    q, h = compiled(f)(LOSSES, sigma, 0.3)
    shifted, value = compiled(f)(LOSSES + 7.5, sigma, 0.3)
    np.testing.assert_allclose(shifted, q, rtol=0, atol=1e-13)
    assert abs(value - h - 7.5) < 1e-13
    order = np.random.default_rng(1).permutation(N)
    permuted, value = compiled(f)(LOSSES[order], sigma, 0.3)
    np.testing.assert_allclose(permuted, q[order], rtol=0, atol=1e-15)
    # Sums in another order.
    rounding = N * jnp.finfo(float).eps * jnp.sum(q * jnp.abs(LOSSES))
    assert abs(value - h) <= rounding


@pytest.mark.costly
@every_f
def test_equal_losses_have_equal_weights(f):
    ties = jnp.round(LOSSES, 0)
    for sigma in SPECTRA.values():
        q = np.asarray(weights(ties, sigma, f, 0.3))
        for value in np.unique(ties):
            assert np.ptp(q[np.asarray(ties) == value]) < 1e-13
    q = weights(jnp.ones(N), SPECTRA["extremile"], f, 0.3)
    np.testing.assert_allclose(q, 1 / N, rtol=1e-13)


@closed_f
def test_pooling_and_splitting_find_the_same_blocks(f):
    ordered = jnp.sort(LOSSES)
    split = jax.jit(ft.partial(_isotonic.split_blocks, f))
    pooled = jax.jit(ft.partial(_isotonic.blocks, f))
    for sigma, nu in itertools.product(SPECTRA.values(), (0.01, 0.3, 5.0)):
        first = np.asarray(split(ordered, sigma, nu))
        ids = pooled(ordered, sigma, nu)
        np.testing.assert_array_equal(np.cumsum(first) - 1, ids)


@closed_f
def test_weights_are_isotonic_regression(f):
    """Against the min-max formula on all intervals."""
    nu, sigma = 0.3, np.asarray(SPECTRA["extremile"])
    order = np.argsort(LOSSES)
    z = np.asarray(LOSSES)[order] / nu

    def level(i, j):
        part = slice(i, j + 1)
        if f == KL:
            return np.log(np.exp(z[part]).sum() / sigma[part].sum() / N)
        return np.mean(z[part] + 1 - N * sigma[part])

    v = np.array(
        [
            max(min(level(i, j) for j in range(k, N)) for i in range(k + 1))
            for k in range(N)
        ]
    )
    expected = np.exp(z - v) / N if f == KL else (1 + z - v) / N
    q = weights(LOSSES, jnp.asarray(sigma), f, nu)
    np.testing.assert_allclose(np.asarray(q)[order], expected, rtol=0, atol=1e-14)


# Derivatives ----------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("name", ["chi2", "KL", "Le Cam"])
def test_derivatives_of_weights(name):
    f, nu, n = GENERATORS[name], jnp.asarray(0.3), compiled_weights(GENERATORS[name])
    jacobians = jax.jit(jax.jacrev(n, (0, 2)))
    for sigma in SPECTRA.values():
        by_losses, by_nu = jacobians(LOSSES, sigma, nu)
        # w_i / nu (dl_i - mean of dl over the block), w = f*'' / n
        order, ids = np.argsort(LOSSES), np.zeros(N, int)
        ids[order] = np.cumsum(_first(f, LOSSES[order], sigma, nu)) - 1
        q = n(LOSSES, sigma, nu)
        w = np.asarray(f.curvature(N * q)) / N
        same = ids[:, None] == ids[None, :]
        W = np.maximum((same * w).sum(1), 1e-300)
        expected = (np.diag(w) - np.outer(w, w) * same / W[:, None]) / 0.3
        np.testing.assert_allclose(by_losses, expected, rtol=0, atol=1e-13)
        # and central differences
        step, e = jnp.cos(jnp.arange(1.0 * N)), 1e-6
        change = n(LOSSES + e * step, sigma, nu) - n(LOSSES - e * step, sigma, nu)
        np.testing.assert_allclose(by_losses @ step, change / (2 * e), atol=2e-9)
        change = n(LOSSES, sigma, nu + e) - n(LOSSES, sigma, nu - e)
        np.testing.assert_allclose(by_nu, change / (2 * e), atol=2e-9)


def _first(f, ordered, sigma, nu):
    """Where blocks begin: where l - nu f'(n q) rises."""
    q = np.sort(compiled_weights(f)(ordered, sigma, nu))
    held = np.maximum(N * q, 1e-300)
    levels = np.asarray(ordered - nu * f.link(jnp.asarray(held)))
    return np.concatenate([[True], np.diff(levels) > 1e-9])


@pytest.mark.parametrize("name", ["chi2"])
def test_second_derivative_of_risk_is_derivative_of_weights(name):
    f, sigma = GENERATORS[name], SPECTRA["extremile"]
    value = lambda l: L.spectral_risk(l, sigma, f, smoothing=0.3)
    hessian = jax.jit(jax.jacfwd(jax.grad(value)))(LOSSES)
    jacobian = jax.jit(jax.jacfwd(lambda l: compiled_weights(f)(l, sigma, 0.3)))
    np.testing.assert_allclose(hessian, jacobian(LOSSES), rtol=0, atol=1e-14)
    np.testing.assert_allclose(hessian, hessian.T, rtol=0, atol=1e-14)
    assert np.linalg.eigvalsh(hessian).min() > -1e-14
    np.testing.assert_allclose(hessian.sum(1), 0, atol=1e-13)


@pytest.mark.parametrize("name", ["Le Cam"])
def test_risk_changes_with_spectrum_and_smoothing(name):
    f, sigma = GENERATORS[name], SPECTRA["extremile"]
    other = SPECTRA["esrm"] - sigma
    fn = jax.jit(lambda t, s: risk(LOSSES, sigma + t * other, f, 0.3 + s))
    by_sigma, by_nu = jax.jit(jax.grad(fn, (0, 1)))(jnp.zeros(()), jnp.zeros(()))
    e = 1e-5
    assert abs(by_sigma - (fn(e, 0.0) - fn(-e, 0.0)) / (2 * e)) < 1e-9
    assert abs(by_nu - (fn(0.0, e) - fn(0.0, -e)) / (2 * e)) < 1e-9
    q = weights(LOSSES, sigma, f, 0.3)
    assert abs(by_nu + divergence(f, q)) < 1e-14


@pytest.mark.slow
def test_traced_alpha():
    sigma = SPECTRA["extremile"]

    def fn(alpha):
        f = L.Alpha(alpha)
        q = L.spectral_weights(LOSSES, sigma, f, smoothing=0.3)
        return q, L.spectral_risk(LOSSES, sigma, f, smoothing=0.3)

    both = jax.jit(lambda alpha: jax.jvp(fn, (alpha,), (jnp.ones(()),)))
    for alpha, f in ((1.5, L.Alpha(1.5)), (2.0, CHI2), (1.0, KL)):
        (q, h), _ = both(jnp.asarray(alpha))
        np.testing.assert_allclose(q, weights(LOSSES, sigma, f, 0.3), atol=1e-13)
        assert abs(h - risk(LOSSES, sigma, f, 0.3)) < 1e-13
    _, (dq, dh) = both(jnp.asarray(1.5))
    (q1, h1), _ = both(jnp.asarray(1.5 + 1e-6))
    (q0, h0), _ = both(jnp.asarray(1.5 - 1e-6))
    np.testing.assert_allclose(dq, (q1 - q0) / 2e-6, rtol=0, atol=1e-9)
    assert abs(dh - (h1 - h0) / 2e-6) < 1e-8


@pytest.mark.costly
@pytest.mark.parametrize("name", ["chi2", "Le Cam"])
def test_equal_losses_of_equal_weight_do_not_share_a_block(name):
    # The largest have weight sigma whatever their order: q does not change there.
    f, sigma = GENERATORS[name], SPECTRA["superquantile"]
    top = LOSSES >= jnp.sort(LOSSES)[-3]
    losses = jnp.where(top, 9.0, LOSSES)
    q = compiled_weights(f)(losses, sigma, 0.3)
    np.testing.assert_allclose(q[top], sigma[-1], rtol=0, atol=1e-14)
    fn = ft.partial(compiled_weights(f), sigma=sigma, nu=0.3)
    _, change = jax.jvp(fn, (losses,), (jnp.cos(jnp.arange(1.0 * N)),))
    np.testing.assert_allclose(change[top], 0, atol=1e-14)
    assert jnp.max(jnp.abs(change)) > 1e-3


# The capped softargmax ------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("name", ["KL", "chi2", "alpha 3", "Neyman", "Jeffreys"])
def test_capped_softargmax_gives_the_weights_of_the_superquantile(name):
    f = GENERATORS[name]
    capped = jax.jit(
        lambda losses, cap, nu: L.capped_f_softargmax(
            losses, f, "uniform", cap=cap, temperature=nu
        )
    )
    for q0 in (0.0, 0.47, 10 / N, 0.9):
        sigma = L.spectrum("superquantile", N, q0)
        for nu in (0.01, 0.3, 5.0):
            p = capped(LOSSES, 1 / (N * (1 - q0)), nu)
            q = weights(LOSSES, sigma, f, nu)
            np.testing.assert_allclose(p, q, rtol=0, atol=1e-13)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["chi2", "Neyman"])
def test_derivatives_of_capped_softargmax(name):
    f, direction = GENERATORS[name], jnp.cos(jnp.arange(1.0 * N))

    @jax.jit
    def fn(t, c, nu):
        scores = LOSSES + t * direction
        return L.capped_f_softargmax(scores, f, "uniform", cap=c, temperature=nu)

    at = jnp.array([0.0, 0.082, 0.3])
    tangents = jax.jit(jax.jacfwd(fn, (0, 1, 2)))(*at)
    for i, tangent in enumerate(tangents):
        e = 1e-6 * jnp.eye(3)[i]
        difference = (fn(*(at + e)) - fn(*(at - e))) / 2e-6
        np.testing.assert_allclose(tangent, difference, rtol=0, atol=2e-8)
    assert np.sum(np.asarray(fn(*at)) == 0.082) > 3


def test_capped_softargmax_of_rows_and_masks():
    scores = LOSSES[:20].reshape(4, 5)
    caps = jnp.asarray([0.25, 0.3, 0.5, 1.0])
    capped = ft.partial(L.capped_f_softargmax, temperature=0.3)
    p = jax.jit(ft.partial(capped, f=CHI2, reference="uniform", axis=0))(
        scores.T, cap=caps
    ).T
    one = jax.jit(lambda row, cap: capped(row, CHI2, "uniform", cap=cap))
    for row, cap, found in zip(np.asarray(scores), np.asarray(caps), p, strict=True):
        # min(q (1 + theta / beta - tau), cap), where the tau of sum 1 is halved out
        at = lambda tau: np.clip((1 + row / 0.3 - tau) / 5, 0, cap)
        low, high = row.min() / 0.3 - 5, row.max() / 0.3 + 1
        for _ in range(80):
            tau = (low + high) / 2
            low, high = (tau, high) if at(tau).sum() > 1 else (low, tau)
        np.testing.assert_allclose(found, at(low), rtol=0, atol=1e-14)
        np.testing.assert_allclose(one(row, cap), at(low), rtol=0, atol=1e-14)
    # Without effect it is the softargmax.
    whole = L.f_softargmax(scores[3], CHI2, "uniform", temperature=0.3)
    np.testing.assert_allclose(p[3], whole, rtol=0, atol=1e-14)
    three = jax.jit(lambda scores, where: capped(scores, KL, cap=0.5, where=where))
    masked = three(scores[0, :3], jnp.asarray([True, False, True]))
    np.testing.assert_allclose(masked, [0.5, 0, 0.5], rtol=0, atol=1e-15)
    far = three(jnp.asarray([0.0, 1e4, 2e4]), jnp.ones(3, bool))
    np.testing.assert_allclose(far, [0, 0.5, 0.5], rtol=0, atol=1e-15)


# Batches and precision ------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("name", ["chi2", "alpha 1.5"])
def test_vmap_equals_loop(name):
    f, sigma = GENERATORS[name], SPECTRA["superquantile"]
    tables = jnp.stack([LOSSES, 5 * LOSSES, -LOSSES])
    batched = jax.jit(jax.vmap(lambda losses: compiled(f)(losses, sigma, 0.3)))
    for losses, q, h in zip(tables, *batched(tables)):
        one, value = compiled(f)(losses, sigma, 0.3)
        np.testing.assert_allclose(q, one, rtol=0, atol=1e-15)
        assert abs(h - value) < 1e-14


@pytest.mark.costly
@pytest.mark.parametrize("name", ["chi2", "alpha 1.5"])
def test_float32(name):
    f, sigma = GENERATORS[name], SPECTRA["superquantile"]
    losses = LOSSES.astype(jnp.float32)
    q, h = compiled(f)(losses, sigma.astype(jnp.float32), 0.3)
    assert q.dtype == h.dtype == jnp.float32
    q64, h64 = compiled(f)(LOSSES, sigma, 0.3)
    np.testing.assert_allclose(q, q64, rtol=0, atol=1e-6)
    assert abs(float(h) - float(h64)) < 1e-6
    if name == "chi2":
        cap = 1 / (N * 0.53)
        p = L.capped_f_softargmax(losses, f, "uniform", cap=cap, temperature=0.3)
        assert p.dtype == jnp.float32
        np.testing.assert_allclose(p, q64, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_and_one_loss():
    few, sigma = LOSSES[:4].astype(jnp.bfloat16), L.spectrum("extremile", 4, 2)
    q = compiled_weights(CHI2)(few, sigma, 0.3)
    assert q.dtype == jnp.bfloat16
    exact = compiled_weights(CHI2)(few.astype(float), sigma, 0.3)
    assert jnp.ptp(exact) > 0.1
    np.testing.assert_allclose(q.astype(float), exact, rtol=2.0**-8, atol=1e-6)
    one = jnp.ones(1)
    for f in (CHI2, L.Alpha(1.5)):
        q, h = compiled(f)(one, one, 1.0)
        assert q == 1 and h == 1


# Wrong calls ----------------------------------------------------------------------

SPECTRUM: Any = L.spectrum  # for arguments of wrong types


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: SPECTRUM("cvar", 3, 0.5), ValueError, "'cvar'.*superquantile"),
        (lambda: L.spectrum("superquantile", 3, 1.0), ValueError, r"1; a number in \["),
        (lambda: L.spectrum("extremile", 3, 0.5), ValueError, "0.5; a number >= 1"),
        (lambda: L.spectrum("esrm", 3, 0.0), ValueError, "0; a number > 0"),
        (lambda: L.spectrum("esrm", 0, 1.0), ValueError, "`n` is 0; an integer >= 1"),
        (lambda: SPECTRUM("esrm", 3, "1"), TypeError, "`parameter` is '1'"),
        (lambda: L.spectral_risk(jnp.ones((2, 3)), jnp.ones(3)), ValueError, "vmap"),
        (
            lambda: L.spectral_risk(jnp.ones(3), jnp.ones(2)),
            ValueError,
            r"\(2,\); \(3,",
        ),
        (
            lambda: L.spectral_risk(jnp.ones(3, int), jnp.ones(3)),
            TypeError,
            "dtype int",
        ),
        (
            lambda: L.spectral_risk(jnp.ones(2), jnp.asarray([0.7, 0.3])),
            ValueError,
            "not a spectrum.*do not fall",
        ),
        (
            lambda: L.spectral_risk(jnp.ones(2), jnp.full(2, 0.5), CHI2),
            TypeError,
            "`smoothing` is missing",
        ),
        (
            lambda: L.spectral_weights(jnp.ones(2), jnp.full(2, 0.5), smoothing=1.0),
            TypeError,
            "`f` is missing",
        ),
        (
            lambda: L.spectral_risk(jnp.ones(2), jnp.full(2, 0.5), KL, smoothing=0.0),
            ValueError,
            "0.0; a number > 0",
        ),
        (lambda: L.capped_f_softargmax(jnp.ones(3), KL, cap=0.3), ValueError, "1 / 3"),
        (
            lambda: dp.optim.lsvrg(absolute, jnp.ones(1), learning_rate=0.1, period=0),
            ValueError,
            "`period` is 0",
        ),
        (lambda: descent("prospect", learning_rate=-0.1), ValueError, "-0.1; a number"),
        (lambda: descent("lsvrg", l2=-1.0), ValueError, "`l2` is -1.0; a number >= 0"),
        (lambda: descent("lsvrg", period=True), ValueError, "`period` is True"),
        (lambda: descent("lsvrg", f=None), TypeError, "`f` is missing"),
        (lambda: descent("prospect", smoothing=0), ValueError, "is 0; a number > 0"),
        (lambda: descent("prospect", sigma=[0.7, 0.3]), ValueError, "not a spectrum"),
        (
            lambda: descent("prospect").init({"w": 1}, jnp.ones(2)),
            TypeError,
            r"`params\['w'\]` has dtype int64; floats",
        ),
        (
            lambda: dp.optim.lsvrg(absolute, jnp.ones(1), learning_rate=0.1).init(
                jnp.ones(2), (jnp.ones((3, 2)), jnp.ones(3))
            ),
            ValueError,
            "length 3; 1, the length",
        ),
    ],
)
def test_errors_say_what_came_and_what_is_accepted(call, error, words):
    with pytest.raises(error, match=words):
        call()


def descent(name, **options):
    """A method, with a list as its spectrum."""
    usual = dict(sigma=[0.5, 0.5], f=KL, smoothing=1.0, learning_rate=0.1)
    square = lambda w, x: jnp.sum((jnp.asarray(w) - x) ** 2)
    return getattr(dp.optim, name)(square, **(usual | options))


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_lists_and_python_numbers_describe_a_method():
    data, key = jnp.array([0.0, 1.0]), jax.random.key(0)
    for method, same in (
        (descent("prospect"), descent("prospect", sigma=jnp.array([0.5, 0.5]))),
        (descent("lsvrg", period=np.int64(5)), descent("lsvrg", period=5)),
    ):
        state, other = method.init(0.0, data), same.init(jnp.zeros(()), data)
        state, other = method.step(state, data, key), same.step(other, data, key)
        assert state.params == other.params != 0


# Minimizing -----------------------------------------------------------------------


def absolute(params, example):
    a, b = example
    return jnp.abs(jnp.sum(a * params) - b)


def squared(params, example):
    a, b = example
    return 0.5 * (jnp.sum(a * params["slope"]) + params["offset"] - b) ** 2


def regression(n=20, d=2):
    rng = np.random.default_rng(3)
    a = rng.normal(size=(n, d))
    b = a @ np.ones(d) + 0.3 * rng.normal(size=n)
    params = dict(slope=jnp.zeros(d), offset=jnp.zeros(()))
    return params, (jnp.asarray(a), jnp.asarray(b))


L2 = 0.1


def minimizer(sigma, f, nu):
    """By Newton's method with the exact Hessian, and how well it did."""
    params, data = regression()
    vector, unravel = ravel_pytree(params)

    def objective(w):
        losses = jax.vmap(squared, (None, 0))(unravel(w), data)
        value = L.spectral_risk(losses, sigma, f, smoothing=nu)
        return value + L2 / 2 * jnp.sum(w**2)

    @jax.jit
    def newton(w):
        gradient, hessian = jax.grad(objective)(w), jax.hessian(objective)(w)
        return w - jnp.linalg.solve(hessian, gradient), jnp.max(jnp.abs(gradient))

    for _ in range(30):
        w, error = newton(vector)
        vector = w
    assert newton(vector)[1] < 1e-13
    return vector


def errors(method, solution, num_steps, seed=0):
    """The distance to the solution after every epoch."""
    params, data = regression()
    keys = jax.random.split(jax.random.key(seed), num_steps).reshape(-1, 20)

    def epoch(state, keys):
        state, _ = lax.scan(lambda s, k: (method.step(s, data, k), None), state, keys)
        w, _ = ravel_pytree(state.params)
        return state, jnp.linalg.norm(w - solution)

    run = jax.jit(lambda keys: lax.scan(epoch, method.init(params, data), keys))
    return run(keys)


CASES = [
    ("prospect", "superquantile", 0.47, CHI2),
    ("prospect", "extremile", 2.0, KL),
    ("lsvrg", "esrm", 1.0, L.Alpha(1.5)),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, parameter, f", CASES)
def test_methods_converge_linearly(name, kind, parameter, f):
    sigma = L.spectrum(kind, 20, parameter)
    solution = minimizer(sigma, f, 1.0)
    # With 0.05 it depends on the examples that are drawn whether Prospect converges.
    method = getattr(dp.optim, name)(
        squared, sigma, f, smoothing=1.0, learning_rate=0.02, l2=L2
    )
    state, error = errors(method, solution, 20 * 120)
    assert error[0] > 0.1 and error[-1] < 1e-12
    # Four more digits take as long as the four before.
    at = [int(np.argmax(error < tolerance)) for tolerance in (1e-4, 1e-8, 1e-12)]
    assert at[2] - at[1] <= 1.5 * (at[1] - at[0]) + 2, at
    if name == "prospect":
        check_tables(state, sigma, f)


def check_tables(state, sigma, f):
    """What is kept from step to step is what its definition says."""
    rows = jax.vmap(lambda g: ravel_pytree(g)[0])(state.gradients)
    mean, _ = ravel_pytree(state.mean_gradient)
    np.testing.assert_allclose(state.table_weights @ rows, mean, rtol=0, atol=1e-14)
    q = compiled_weights(f)(state.losses, sigma, 1.0)
    np.testing.assert_allclose(state.weights, q, rtol=0, atol=1e-14)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["prospect", "lsvrg"])
def test_the_mean_of_a_step_is_the_gradient(name):
    params, data = regression()
    sigma = L.spectrum("superquantile", 20, 0.47)
    rate = 0.05
    method = getattr(dp.optim, name)(
        squared, sigma, CHI2, smoothing=1.0, learning_rate=rate
    )
    state = jax.jit(method.init)(params, data)
    # Elsewhere, where what is remembered corrects.
    state = state._replace(params=dict(slope=jnp.ones(2), offset=jnp.ones(())))

    @jax.jit
    @jax.vmap
    def draw(key):
        step = method.step(state, data, key).params["slope"]
        return jax.random.randint(key, (), 0, 20), step

    drawn, steps = draw(jax.random.split(jax.random.key(1), 500))
    examples, first = np.unique(drawn, return_index=True)
    assert len(examples) == 20

    def weighted(w):
        losses = jax.vmap(squared, (None, 0))(w, data)
        return jnp.sum(state.weights * losses)

    gradient = jax.grad(weighted)(state.params)["slope"]
    mean = np.asarray(steps)[first].mean(0)
    np.testing.assert_allclose((1 - mean) / rate, gradient, rtol=0, atol=1e-13)


def test_lsvrg_without_smoothing_and_float32():
    sigma = L.spectrum("esrm", 20, 1.0)
    method = dp.optim.lsvrg(squared, sigma, learning_rate=0.02, l2=L2, period=40)
    params, data = jax.tree.map(lambda a: jnp.asarray(np.float32(a)), regression())
    state = jax.jit(method.init)(params, data)
    keys = jax.random.split(jax.random.key(0), 4000)
    run = jax.jit(
        lambda s: lax.scan(lambda s, k: (method.step(s, data, k), None), s, keys)[0]
    )
    end = run(state)
    assert end.params["slope"].dtype == jnp.float32 and end.num_steps == 4000

    def risk_at(params):
        losses = jax.vmap(squared, (None, 0))(params, data)
        squares = sum(jnp.sum(w**2) for w in params.values())
        return L.spectral_risk(losses, sigma.astype(jnp.float32)) + L2 / 2 * squares

    # No direction decreases the risk: a kink, so no gradient says it.
    risk_at = jax.jit(risk_at)
    best = risk_at(end.params)
    assert best < risk_at(params)
    rng = np.random.default_rng(0)
    for _ in range(20):
        move = jax.tree.map(
            lambda w: np.float32(np.asarray(w) + 0.02 * rng.normal(size=w.shape)),
            end.params,
        )
        assert risk_at(move) > best - 1e-6
