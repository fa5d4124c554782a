"""Energy models learned with their log-partition, against sums over the whole set."""

import itertools
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from diffprog import losses


FAMILIES = [
    losses.KL(),
    losses.ReverseKL(),
    losses.LeCam(),  # pyright: ignore
    losses.Alpha(1.5),
]
k = 5
subsets = losses.Subsets(k)
n = subsets.size


def table(params, x, y):
    """Any function on the set: y is a number."""
    return params[y]


def pairwise(params, x, y):
    return y @ params @ y / 2 + x @ y


free = lambda params, x: x  # t itself is the input
everything = losses.Enumeration(np.arange(n))
g = np.random.default_rng(0).normal(size=n) * 2
SCORES = pytest.mark.parametrize("f", FAMILIES, ids=str)
MASS = pytest.mark.parametrize("mass", [1.0, float(n)], ids=["uniform", "unit"])


def learned(f, g, t, mass=1.0, most=1e6):
    """The objective of y = 3 and its monitor, and the derivatives in g and t."""
    # In one dtype, and all of them, to compile once.
    return _learned(f, g, *(np.asarray(a, g.dtype) for a in (t, mass, most)))


def exact(f, g, mass=1.0):
    """The objective of y = 3 at the best t; this t; the softmax, the softargmax."""
    return _exact(f, g, np.asarray(mass, g.dtype))


@jax.jit
def _learned(f, g, t, mass, most):
    def value(g, t):
        objective = losses.minmin_objective(
            table, free, everything, f, mass=mass, max_ratio=most
        )
        return objective(g, t, 3)

    return jax.value_and_grad(value, (0, 1), has_aux=True)(g, t)


@jax.jit
def _exact(f, g, mass):
    value, tau = losses.exact_objective(table, everything, f, mass=mass)(g, None, 3)
    q = jnp.full(n, mass / n)
    return value, tau, losses.f_softmax(g, f, q), losses.f_softargmax(g, f, q)


def constant(f, mass):
    """What makes the value a Fenchel-Young loss."""
    return f.at_zero * (mass - 1) if np.isfinite(f.at_zero) else 0.0


@pytest.mark.costly
@MASS
@SCORES
def test_the_minimum_over_t_is_the_smoothed_maximum(f, mass):
    value, tau, softmax, _ = exact(f, g, mass)
    expected = softmax + constant(f, mass) - g[3]
    np.testing.assert_allclose(value, expected, atol=1e-12, rtol=1e-12)
    (at_tau, _), (_, slope) = learned(f, g, tau, mass)
    np.testing.assert_allclose(at_tau, value, atol=1e-12, rtol=1e-12)
    assert abs(slope) < 1e-12
    for t in (tau - 0.1, tau + 0.1):
        assert learned(f, g, t, mass)[0][0] > at_tau
    if isinstance(f, losses.KL):
        np.testing.assert_allclose(tau, np.log(mass * np.exp(g).mean()), atol=1e-12)
        np.testing.assert_allclose(value, tau - g[3], atol=1e-12)


@SCORES
def test_with_the_unit_measure_it_is_the_fenchel_young_loss(f):
    finite = math.isfinite(f.at_zero)
    label = np.array(3)
    loss = jax.jit(lambda g: losses.f_loss(g, label, f, "unit", constant=finite))
    np.testing.assert_allclose(exact(f, g, float(n))[0], loss(g), rtol=1e-12)


@MASS
@SCORES
def test_the_gradient_at_the_best_t_is_that_of_the_loss(f, mass):
    _, tau, _, p = exact(f, g, mass)
    _, (gradient, _) = learned(f, g, tau, mass)
    np.testing.assert_allclose(gradient, p - np.eye(n)[3], atol=1e-12)


def test_the_gap_of_a_wrong_t():
    for f, scores, gap in (
        (losses.KL(), g, lambda d: np.exp(d) - 1 - d),
        (losses.ChiSquare(), g / 20, lambda d: d**2 / 2),  # no ratio is 0
    ):
        value, tau, _, _ = exact(f, scores)
        for d in (-0.3, 0.2, 0.4):
            (at, _), _ = learned(f, scores, tau - d)
            np.testing.assert_allclose(at - value, gap(d), atol=1e-12)


@pytest.mark.parametrize("f", [losses.KL(), losses.ReverseKL()], ids=str)
def test_the_expected_gradient_of_samples_is_the_gradient(f):
    few, B = g[:4] / 4, 2
    draws = np.array(list(itertools.product(range(4), repeat=B)))

    def gradients(candidates):
        sampler = losses.Enumeration(candidates)
        objective = losses.minmin_objective(table, free, sampler, f)
        return jax.grad(lambda g, t: objective(g, t, 1)[0], (0, 1))(few, 0.5)

    found = jax.jit(jax.vmap(gradients))(draws)
    for a, b in zip(found, jax.jit(gradients)(np.arange(4)), strict=True):
        assert (np.std(a, 0) > 1e-3).all()  # of samples, each another one
        np.testing.assert_allclose(np.mean(a, 0), b, atol=1e-12)


def test_the_sampled_gradient_is_the_stated_one():
    x, y, t, B, key = np.full(k, 0.3), np.ones(k), -2.0, 16, jr.key(5)
    params = {"g": g[: k * k].reshape(k, k), "t": np.array(t)}
    objective = losses.minmin_objective(
        lambda params, x, y: pairwise(params["g"], x, y),
        lambda params, x: params["t"],
        subsets,
        losses.ChiSquare(),
        num_samples=B,
    )
    value = lambda params: objective(params, x, y, key)
    (_, monitor), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    samples = np.asarray(jax.jit(jax.vmap(subsets))(jr.split(key, B)))
    scores = np.array([pairwise(params["g"], x, s) for s in samples])
    a = np.maximum(1 + scores - t, 0)  # u(g - t)
    assert a.any()
    expected = sum(w * np.outer(s, s) / 2 for w, s in zip(a / B, samples, strict=True))
    expected = expected - np.outer(y, y) / 2
    np.testing.assert_allclose(gradient["g"], expected, atol=1e-12)
    np.testing.assert_allclose(gradient["t"], 1 - a.mean(), atol=1e-12)
    np.testing.assert_allclose(monitor.mean, a.mean(), atol=1e-12)
    np.testing.assert_allclose(monitor.variance, a.var(), atol=1e-12)


def test_one_number_for_t_is_self_normalized_likelihood():
    for c in (3.0, 5.0):
        (value, _), (dg, dc) = learned(losses.KL(), g, c, float(n))
        p = np.exp(g - c)
        np.testing.assert_allclose(value, c - 1 + p.sum() - g[3], rtol=1e-12)
        np.testing.assert_allclose(dg, p - np.eye(n)[3], atol=1e-12)
        np.testing.assert_allclose(dc, 1 - p.sum(), rtol=1e-12)


@SCORES
def test_the_same_added_to_both_changes_nothing(f):
    before, after = learned(f, g, 4.0, 2.0), learned(f, g + 1.25, 5.25, 2.0)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@SCORES
def test_the_mean_ratio_is_one_at_the_best_t(f):
    _, tau, _, p = exact(f, g, 7.0)
    (_, monitor), _ = learned(f, g, tau, 7.0)
    np.testing.assert_allclose(monitor.mean, 1, atol=1e-12)
    np.testing.assert_allclose(monitor.variance, np.var(n * p), rtol=1e-12)


def test_weights_of_an_enumeration():
    weights = np.exp(g[::-1]) / np.exp(g).sum()
    weighted = losses.Enumeration(np.arange(n), weights)
    f = losses.Alpha(1.5)

    @jax.jit
    def both(g, weights):
        weighted = losses.Enumeration(np.arange(n), weights)
        best, tau = losses.exact_objective(table, weighted, f)(g, None, 2)
        value, monitor = losses.minmin_objective(table, free, weighted, f)(g, tau, 2)
        return best, losses.f_softmax(g, f, weights) - g[2], value, monitor.mean

    best, softmax, value, mean = both(g, weighted.weights)
    np.testing.assert_allclose([softmax, value], best, atol=1e-12)
    np.testing.assert_allclose(mean, 1, atol=1e-12)


def test_derivative_in_alpha():
    few, few_scores = losses.Enumeration(np.arange(4)), jnp.asarray(g[:4])

    @jax.jit
    def slopes(alpha):
        exact = lambda a: losses.exact_objective(table, few, losses.Alpha(a))
        best = lambda a: exact(a)(few_scores, None, 3)
        learned = lambda a, t: losses.minmin_objective(
            table, free, few, losses.Alpha(a)
        )(few_scores, t, 3)[0]
        (value, tau), slope = jax.value_and_grad(best, has_aux=True)(alpha)
        return value, slope, jax.grad(learned)(alpha, tau)

    _, slope, other = slopes(jnp.array(1.4))
    np.testing.assert_allclose(slope, other, rtol=1e-11)
    h = 1e-5
    (ahead, *_), (behind, *_) = slopes(jnp.array(1.4 + h)), slopes(jnp.array(1.4 - h))
    difference = (ahead - behind) / (2 * h)
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-9)


# Numbers --------------------------------------------------------------------------


CASES = [(f, np.float64) for f in FAMILIES] + [(f, np.float32) for f in FAMILIES[::2]]


@pytest.mark.parametrize("f, dtype", CASES, ids=str)
def test_far_too_small_t_gives_bounded_gradients(f, dtype):
    most, scores = dtype(1e3), g.astype(dtype)
    at = lambda t: learned(f, scores, dtype(t), dtype(1), most)
    for t in (-1e4, -30.0, 0.0, 30.0, 1e4):
        for leaf in jax.tree.leaves(at(t)):
            assert leaf.dtype == dtype and np.isfinite(leaf).all()
        assert np.abs(at(t)[1][1]) <= most * (1 + 1e-5)
    # Past the limit it is a line.
    ((low, _), (_, slope)), ((high, _), (_, same)) = at(-1e4), at(-1e4 - 8)
    np.testing.assert_allclose((low - high) / 8, 1 - most, rtol=2e-2)
    np.testing.assert_allclose([slope, same], 1 - most, rtol=1e-5)


@SCORES
def test_no_ratio_reaches_the_limit_in_a_set_that_is_small_enough(f):
    value, tau, _, _ = exact(f, g)
    for most in (float(n), 1e9):
        (at, _), _ = learned(f, g, tau, 1.0, most)
        np.testing.assert_allclose(at, value, atol=1e-12)


def test_enormous_mass():
    # A constant energy on a set whose size float32 can just hold.
    f, mass, t = losses.KL(), np.float32(1e38), np.float32(1.5 + 38 * math.log(10))
    flat = np.full(n, 1.5, np.float32)
    most = np.float32(1e6)
    (value, monitor), _ = learned(f, flat, t, mass, most)  # pyright: ignore
    np.testing.assert_allclose(value, 38 * math.log(10), rtol=1e-6)
    np.testing.assert_allclose(monitor.mean, 1, rtol=1e-4)


@pytest.mark.parametrize("f", FAMILIES[1:3], ids=str)
def test_impossible_y(f):
    # As with the set without them, and the rest of the mass.
    rest = losses.Enumeration(np.delete(np.arange(n), 7))
    left = 5.0 * (n - 1) / n
    lacking = np.where(np.arange(n) == 7, -np.inf, g)
    (a, _), (da, _) = learned(f, lacking, 5.0, 5.0)
    objective = losses.minmin_objective(table, free, rest, f, mass=left)
    b, db = jax.jit(jax.value_and_grad(lambda g: objective(g, 5.0, 3)[0]))(g)
    shift = constant(f, 5.0) - constant(f, left) - f.lift * (5.0 - left)
    np.testing.assert_allclose(a - b, shift, atol=1e-12)
    np.testing.assert_allclose(da, db, atol=1e-12)


def test_batches():
    batch = 3
    xs, ys = g[: batch * k].reshape(batch, k), np.ones((batch, k))
    params, keys = g[: k * k].reshape(k, k), jr.split(jr.key(0), batch)
    partition = lambda params, x: jnp.sum(x)
    objective = losses.minmin_objective(pairwise, partition, subsets, losses.KL())
    together = jax.jit(jax.vmap(objective, (None, 0, 0, 0)))(params, xs, ys, keys)
    one = jax.jit(objective)
    alone = [one(params, *each) for each in zip(xs, ys, keys, strict=True)]
    for i, leaves in enumerate(map(jax.tree.leaves, alone)):
        for a, b in zip(jax.tree.leaves(together), leaves, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12)


def test_a_function_as_generator():
    own = losses.generator(lambda u: u * jnp.log(u))
    (a, _), (da, _) = learned(own, g, 1.3)
    (b, _), (db, _) = learned(losses.KL(), g, 1.3)
    np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(da, db, atol=1e-12)


# Sets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, size", [(subsets, 32), (losses.Permutations(4), 24)], ids=str
)
def test_sets_and_their_samples(family, size):
    rows = np.asarray(family.all().candidates)
    assert rows.shape == (size, family.k) and family.size == size
    assert len(np.unique(rows, axis=0)) == size
    samples = jax.jit(jax.vmap(family))(jr.split(jr.key(1), 250 * size))
    assert samples.dtype == rows.dtype
    found, counts = np.unique(np.asarray(samples), axis=0, return_counts=True)
    np.testing.assert_array_equal(found, np.unique(rows, axis=0))
    # chi-square of size - 1 degrees of freedom: 62 and 50 at 0.1 percent
    assert np.sum((counts - 250) ** 2 / 250) < 2 * size


def test_dtype_of_subsets():
    assert losses.Subsets(3, jnp.float32)(jr.key(0)).dtype == jnp.float32
    assert losses.Subsets(3, int).all().candidates.dtype == jnp.dtype(int)


def test_wrong_calls(unchecked):
    make = losses.minmin_objective
    for options, words in (
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"mass": -1.0}, "`mass` is -1.0"),
        ({"max_ratio": math.inf}, "`max_ratio` is inf"),
    ):
        with pytest.raises(ValueError, match=words):
            make(table, free, subsets, losses.KL(), **options)  # pyright: ignore
    with pytest.raises(ValueError, match="alpha of shape"):
        make(table, free, subsets, losses.Alpha(jnp.array([1.5, 1.7])))
    with pytest.raises(ValueError, match="`key` is missing"):
        make(table, free, subsets, losses.KL())(g, 0.0, 3)
    with pytest.raises(ValueError, match="`energy` returns shape"):
        make(lambda *_: g, free, everything, losses.KL())(g, 0.0, 3)
    with pytest.raises(ValueError, match="`log_partition` returns shape"):
        make(table, lambda *_: g, everything, losses.KL())(g, 0.0, 3)
    with pytest.raises(ValueError, match="too many to list"):
        losses.Subsets(40).all()
    with pytest.raises(ValueError, match="`k` is 0"):
        losses.Permutations(0)
