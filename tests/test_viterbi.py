"""Smoothed paths, against enumeration."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog import losses


KL = losses.KL()
CHI, JS = losses.ChiSquare(), losses.JensenShannon()
MOVES, S = 4, 3
PATHS = np.array(list(itertools.product(range(S), repeat=MOVES + 1)))
CASES = [(KL, "unit"), (losses.Alpha(1.5), "uniform")]
FAMILIES = pytest.mark.parametrize("f, reference", CASES, ids=str)
ZEROS = np.zeros(S)


def logsumexp(scores):
    return scores.max() + np.log(np.sum(np.exp(scores - scores.max())))


def smooth(
    theta,
    f: losses.AbstractDivergence = KL,
    reference="unit",
    temperature=1.0,
    start=ZEROS,
    final=ZEROS,
    mask=None,
):
    """Value and marginals."""
    mask = np.ones(len(theta), bool) if mask is None else mask
    return _smooth(theta, f, reference, temperature, start, final, mask)


@ft.partial(jax.jit, static_argnames="reference")
def _smooth(theta, f, reference, temperature, start, final, mask):
    ends = {"start": start, "final": final, "mask": mask}
    value = lambda theta: losses.soft_viterbi(
        theta, f, reference, temperature=temperature, **ends
    )
    return jax.value_and_grad(value)(theta)


@ft.partial(jax.jit, static_argnames="reference")
def product(theta, Z, f, reference):
    """The Hessian times Z."""
    marginals = lambda theta: smooth(theta, f, reference, 0.7)[1]
    return jax.jvp(marginals, (theta,), (Z,))[1]


viterbi = jax.jit(losses.viterbi)


def potentials(seed, *batch):
    return 2 * np.random.default_rng(seed).normal(size=(*batch, MOVES, S, S))


def blocked(seed):
    """Impossible moves, an unreachable state, and one that cannot be left."""
    theta = potentials(seed)
    theta[1, 2, :] = theta[2, :, 0] = theta[0, 0, 1] = theta[3, 1, 1] = -np.inf
    return theta


def scores_of_paths(theta, start=ZEROS, final=ZEROS):
    moves = theta[np.arange(MOVES), PATHS[:, 1:], PATHS[:, :-1]]
    return moves.sum(-1) + start[PATHS[:, 0]] + final[PATHS[:, -1]]


def test_kl_is_the_log_partition_of_all_paths():
    theta, start, final = potentials(0), np.array([0.3, -1, 2]), np.array([1, 0, 0.5])
    alone = np.array([-np.inf, 0, -np.inf])  # S^T paths from one state
    for ends in ((ZEROS, ZEROS), (start, final), (alone, final)):
        scores = scores_of_paths(theta, *ends)
        value, marginals = smooth(theta, start=ends[0], final=ends[1])
        np.testing.assert_allclose(value, logsumexp(scores), atol=1e-12)
        expected = np.zeros_like(theta)
        for path, score in zip(PATHS, scores, strict=True):
            expected[np.arange(MOVES), path[1:], path[:-1]] += np.exp(score - value)
        np.testing.assert_allclose(marginals, expected, atol=1e-12)
        np.testing.assert_allclose(marginals.sum((1, 2)), 1, atol=1e-12)


@pytest.mark.parametrize("f", [KL, CHI], ids=str)
def test_the_limit_of_no_temperature_is_viterbi(f):
    for theta in (potentials(1), blocked(1)):
        scores = scores_of_paths(theta)
        value, path = viterbi(theta)
        np.testing.assert_allclose(value, scores.max(), atol=1e-12)
        np.testing.assert_array_equal(path, PATHS[scores.argmax()])
        # So low that the second best path counts for nothing, whatever was drawn.
        second, best = np.sort(scores)[-2:]
        beta = min(1e-3, (best - second) / 30)
        soft, marginals = smooth(theta, f, temperature=beta)
        np.testing.assert_allclose(soft, value, atol=1e-3)
        hard = np.zeros_like(theta)
        hard[np.arange(MOVES), path[1:], path[:-1]] = 1
        np.testing.assert_allclose(marginals, hard, atol=1e-6)


def test_bounds_of_the_smoothing():
    beta, choices, theta = 0.4, MOVES + 1, potentials(2)
    hard, _ = viterbi(theta)
    for f, most in ((KL, np.log(S)), (CHI, (1 - 1 / S) / 2)):
        gap = smooth(theta, f, temperature=beta)[0] - hard
        assert -1e-12 <= gap <= choices * beta * most + 1e-12
        flat, _ = smooth(0 * theta, f, temperature=beta)
        np.testing.assert_allclose(flat, choices * beta * most, atol=1e-12)


@FAMILIES
def test_marginals_sum_to_one_and_shifts_pass_through(f, reference):
    def largest(scores):
        """With an entropy that is 0 for a sure choice."""
        Q = (scores > -np.inf).sum(-1) if reference == "unit" else 1
        value = losses.f_softmax(scores, f, reference, temperature=0.7)
        return np.asarray(value) + 0.7 * f.at_zero * (Q - 1)

    for theta in (potentials(3), blocked(3)):
        value, marginals = smooth(theta, f, reference, 0.7)
        marginals = np.asarray(marginals)
        np.testing.assert_allclose(
            value, largest(ft.reduce(lambda v, move: largest(move + v), theta, ZEROS)),
            atol=1e-12,
        )  # fmt: skip
        np.testing.assert_allclose(marginals.sum((1, 2)), 1, atol=1e-12)
        assert (marginals >= 0).all() and (marginals[theta == -np.inf] == 0).all()
        # What comes in leaves again.
        into, out_of = marginals[:-1].sum(2), marginals[1:].sum(1)
        np.testing.assert_allclose(into, out_of, atol=1e-12)
        theta[2] += 1.5
        shifted, same = smooth(theta, f, reference, 0.7)
        np.testing.assert_allclose(shifted, value + 1.5, atol=1e-12)
        np.testing.assert_allclose(same, marginals, atol=1e-12)


@pytest.mark.costly
@pytest.mark.parametrize("f, reference", [(KL, "unit"), (JS, "unit")], ids=str)
def test_products_with_the_hessian(f, reference):
    Z, Y, step = potentials(4), potentials(5), 1e-5
    for theta in (potentials(6), blocked(6)):
        HZ, HY = (np.asarray(product(theta, A, f, reference)) for A in (Z, Y))
        assert np.isfinite(HZ).all() and (HZ[theta == -np.inf] == 0).all()
        np.testing.assert_allclose(np.vdot(Y, HZ), np.vdot(Z, HY), atol=1e-12)
        moved = (theta + step * Z, theta - step * Z)
        ahead, behind = (smooth(a, f, reference, 0.7)[1] for a in moved)
        np.testing.assert_allclose(HZ, (ahead - behind) / (2 * step), atol=1e-7)


@pytest.mark.costly
@pytest.mark.parametrize("f", [KL, JS], ids=str)
def test_no_path_at_all(f):
    nowhere = potentials(7)
    nowhere[1] = -np.inf
    value, gradient = smooth(nowhere, f, "unit", 0.7)
    assert value == -np.inf and (gradient == 0).all()
    assert (product(nowhere, potentials(8), f, "unit") == 0).all()
    assert viterbi(nowhere)[0] == -np.inf


def test_padding():
    theta = potentials(9)
    padded = np.concatenate([theta, np.full((2, S, S), 7.0)])
    mask = np.arange(MOVES + 2) < MOVES
    value, gradient = smooth(padded, mask=mask)
    expected, marginals = smooth(theta)
    np.testing.assert_allclose(value, expected, atol=1e-12)
    np.testing.assert_allclose(gradient[:MOVES], marginals, atol=1e-12)
    assert (gradient[MOVES:] == 0).all()
    (score, path), (expected, states) = viterbi(padded, mask=mask), viterbi(theta)
    np.testing.assert_array_equal(score, expected)
    np.testing.assert_array_equal(path[: MOVES + 1], states)
    assert (path[MOVES:] == states[-1]).all()


@pytest.mark.slow
def test_derivatives_in_everything_else():
    rng = np.random.default_rng(10)
    start, final, q = np.array([0.3, -1, 2]), np.array([1, 0, 0.5]), np.array([1, 2, 3])
    inputs = [potentials(10), start, final, q / 3, np.array(0.7), np.array(1.4)]

    @jax.jit
    def value(theta, start, final, q, beta, alpha):
        ends = {"start": start, "final": final}
        f = losses.Alpha(alpha)
        return losses.soft_viterbi(theta, f, q, temperature=beta, **ends)

    gradients, step = jax.jit(jax.grad(value, range(6)))(*inputs), 1e-6
    for i, gradient in enumerate(gradients):
        Z = rng.normal(size=inputs[i].shape)
        moved = lambda s: [a + s * Z if i == j else a for j, a in enumerate(inputs)]
        slope = (value(*moved(step)) - value(*moved(-step))) / (2 * step)
        np.testing.assert_allclose(np.vdot(gradient, Z), slope, rtol=1e-6)


def test_batches():
    theta = potentials(11, 3)
    for function in (smooth, viterbi):
        together = jax.tree.leaves(jax.jit(jax.vmap(function))(theta))
        for i, each in enumerate(theta):
            for a, b in zip(together, jax.tree.leaves(function(each)), strict=True):
                np.testing.assert_allclose(a[i], b, atol=1e-12)


def test_single_precision_stays():
    theta = potentials(0).astype(np.float32)
    found, exact = (smooth(a) + viterbi(a)[:1] for a in (theta, potentials(0)))
    assert {a.dtype for a in found} == {jnp.dtype("float32")}
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_wrong_calls(unchecked):
    theta = jnp.zeros((4, S, S))
    with pytest.raises(ValueError, match="`potentials` has shape"):
        losses.soft_viterbi(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="`temperature` is 0"):
        losses.soft_viterbi(theta, temperature=0.0)
    with pytest.raises(ValueError, match="`start` has shape"):
        losses.soft_viterbi(theta, start=jnp.zeros(2))
    with pytest.raises(ValueError, match="`mask` has shape"):
        losses.viterbi(theta, mask=jnp.ones(2, bool))
