"""Rewards and logits of sequences, against enumeration."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog import losses


V, T = 3, 4
KL = losses.KL()
EOS = pytest.mark.parametrize("eos", [None, 1])


@ft.partial(jax.jit, static_argnames="eos")
def _to_logits(rewards, f, eos):
    """Logits and value of the root; the gradient of the value; the policies."""
    value = lambda r: losses.arm_from_ebm(r, f, "unit", eos=eos)[::-1]
    (root, logits), visits = jax.value_and_grad(value, has_aux=True)(rewards)
    return logits, root, visits, policies(logits, f)


@ft.partial(jax.jit, static_argnames="eos")
def _to_rewards(logits, f, eos):
    return losses.ebm_from_arm(logits, f, "unit", eos=eos)


def to_logits(rewards, f=KL, eos=None):
    return _to_logits(rewards, f, eos)


def to_rewards(logits, f=KL, eos=None):
    return _to_rewards(logits, f, eos)


@jax.jit
def policies(logits, f):
    return [losses.f_softargmax(q, f, "unit") for q in logits]


def tables(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(V,) * (t + 1)) for t in range(T)]


@ft.cache
def sequences(eos):
    """All sequences that end at `eos` or at T."""
    found = set()
    for y in itertools.product(range(V), repeat=T):
        found.add(y[: y.index(eos) + 1] if eos in y else y)
    return sorted(found)


def totals(tables, eos):
    """The sum of a table along every sequence."""
    tables = [np.asarray(table) for table in tables]
    along = lambda y: sum(tables[t][y[: t + 1]] for t in range(len(y)))
    return np.array([along(y) for y in sequences(eos)])


def logsumexp(scores):
    return scores.max() + np.log(np.sum(np.exp(scores - scores.max())))


def log_probabilities(logits, eos):
    return totals([np.log(p) for p in policies(logits, KL)], eos)


@EOS
def test_they_are_the_same_distribution(eos):
    rewards = tables(0)
    logits, log_partition, _, _ = to_logits(rewards, eos=eos)
    R = totals(rewards, eos)
    np.testing.assert_allclose(logsumexp(R), log_partition, atol=1e-12)
    log_p = log_probabilities(logits, eos)
    np.testing.assert_allclose(R - logsumexp(R), log_p, atol=1e-12)


WAYS = [(KL, None), (KL, 1), (losses.Alpha(1.5), 1)]


@pytest.mark.costly
@pytest.mark.parametrize("f, eos", WAYS, ids=str)
def test_there_and_back(f, eos):
    given = tables(1)
    back = to_rewards(to_logits(given, f, eos)[0], f, eos)
    rewards = to_rewards(given, f, eos)
    forth = to_logits(rewards, f, eos)[0]
    for a, b in zip(given[:-1], rewards):
        assert np.abs(a - b).max() > 0.1  # there is another place
    for a, b, c in zip(given, back, forth, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-12)
        np.testing.assert_allclose(c, a, atol=1e-12)


@EOS
def test_shaping_changes_no_probability(eos):
    rewards, root = tables(2), np.array(0.7)
    after = [*tables(3)[:-1], np.zeros((V,) * T)]
    if eos is not None:
        for values in after:
            values[..., eos] = 0  # these states are terminal
    before = [root, *after[:-1]]
    shaped = [
        r + c[..., None] - d for r, c, d in zip(rewards, before, after, strict=True)
    ]
    R = totals(rewards, eos)
    np.testing.assert_allclose(totals(shaped, eos), R + root, atol=1e-12)
    # What is added to all logits of a state moves rewards in just this way.
    logits = to_logits(rewards, eos=eos)[0]
    moved = [q + c[..., None] for q, c in zip(logits, before, strict=True)]
    again = to_rewards(moved, eos=eos)
    np.testing.assert_allclose(totals(again, eos), R + root, atol=1e-12)


@pytest.mark.parametrize("f, eos", WAYS, ids=str)
def test_the_gradient_are_the_visits(f, eos):
    rewards = tables(4)
    _, _, visits, pi = to_logits(rewards, f, eos)
    pi, expected = list(map(np.asarray, pi)), [np.zeros_like(r) for r in rewards]
    for y in sequences(eos):
        probability = np.prod([pi[t][y[: t + 1]] for t in range(len(y))])
        for t in range(len(y)):
            expected[t][y[: t + 1]] += probability
    for a, b in zip(visits, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@EOS
def test_the_value_is_mean_reward_plus_entropy(eos):
    rewards = tables(5)
    value, R = to_logits(rewards, eos=eos)[1], totals(rewards, eos)
    log_p = R - logsumexp(R)
    expected = np.exp(log_p) @ (R - log_p)
    np.testing.assert_allclose(value, expected, atol=1e-12)


def divergences(logits, other):
    """KL between the policies of each state, and the spread of the difference."""
    a, b = ([np.asarray(p) for p in policies(q, KL)] for q in (logits, other))
    kl = [np.sum(p * np.log(p / q), -1) for p, q in zip(a, b, strict=True)]
    return kl, [np.ptp(p - q, -1) for p, q in zip(logits, other, strict=True)]


def prefixes(eos):
    """Every sequence with each state on its way."""
    for y in sequences(eos):
        for t in range(len(y)):
            yield y, y[:t]


@EOS
def test_the_divergence_of_sequences_is_that_of_the_policies_on_the_way(eos):
    logits, other = tables(6), tables(7)
    log_p, log_q = log_probabilities(logits, eos), log_probabilities(other, eos)
    p = dict(zip(sequences(eos), np.exp(log_p), strict=True))
    kl, _ = divergences(logits, other)
    expected = sum(p[y] * kl[len(s)][s] for y, s in prefixes(eos))
    np.testing.assert_allclose(np.exp(log_p) @ (log_p - log_q), expected, atol=1e-12)


@EOS
def test_bounds_of_distillation(eos):
    logits, other = tables(8), tables(9)
    kl, spread = divergences(logits, other)
    for a, b in zip(kl, spread, strict=True):
        assert (a > 0).all()  # or there is nothing to bound
        assert (a <= b**2 / 8).all() and (a <= b).all()
    log_p, log_q = log_probabilities(logits, eos), log_probabilities(other, eos)
    worst = max(spread[len(s)][s] for _, s in prefixes(eos))
    length = np.exp(log_p) @ [len(y) for y in sequences(eos)]
    assert 0 < np.exp(log_p) @ (log_p - log_q) <= length * worst**2 / 8
    assert np.abs(log_p - log_q).max() <= T * worst


@pytest.mark.parametrize("f", [losses.Alpha(1.5)], ids=str)
def test_other_divergences_do_not_give_the_same_distribution(f):
    # Small, so that more than one sequence has a probability.
    first, second = np.array([0.8, 0.0, -0.8]), np.diag([1.2, 0.6, 0.0])
    _, value, _, pi = to_logits([first, second], f)
    q = np.asarray(pi[0])[:, None] * np.asarray(pi[1])
    R = (first[:, None] + second).ravel()
    operators = losses.f_softargmax, losses.f_softmax
    p, smooth = jax.jit(lambda R: [op(R, f, "unit") for op in operators])(R)
    np.testing.assert_allclose(q.sum(), 1, atol=1e-12)
    assert np.abs(p - q.ravel()).max() > 1e-2
    assert abs(value - (smooth + f.at_zero * (len(R) - 1))) > 1e-2


def test_a_reference_over_tokens():
    rewards, q = tables(10), np.array([0.2, 0.5, 1.3])
    value = jax.jit(lambda r, q: losses.arm_from_ebm(r, KL, q)[1])(rewards, q)
    expected = to_logits([r + np.log(q) for r in rewards])[1]
    np.testing.assert_allclose(value, expected, atol=1e-12)


def test_impossible_tokens():
    rewards = tables(11)
    rewards[1][0] = -np.inf  # the prefix 0 leads nowhere
    rewards[2][1, 2, 0] = -np.inf
    logits, value, visits, _ = to_logits(rewards)
    np.testing.assert_allclose(value, logsumexp(totals(rewards, None)))
    np.testing.assert_allclose([v.sum() for v in visits], 1, atol=1e-12)
    assert visits[0][0] == 0 and not visits[1][0].any() and visits[2][1, 2, 0] == 0
    back = to_rewards(logits)
    for t in (2, 3):
        np.testing.assert_allclose(back[t], rewards[t], atol=1e-12)


@pytest.mark.costly
@EOS
def test_rewards_of_given_sequences(eos):
    logits = tables(12)
    rewards = [np.asarray(r) for r in to_rewards(logits, eos=eos)]
    rows = np.full((len(sequences(eos)), T, V), np.nan)
    tokens, expected = np.zeros(rows.shape[:2], int), np.zeros(rows.shape[:2])
    for i, y in enumerate(sequences(eos)):
        for t, token in enumerate(y):
            tokens[i, t], rows[i, t] = token, logits[t][y[:t]]
            expected[i, t] = rewards[t][y[: t + 1]]

    @jax.jit
    def score(rows, tokens):
        value = lambda rows: losses.rewards_from_logits(rows, tokens, eos=eos)
        return value(rows), jax.grad(lambda rows: value(rows).sum())(rows)

    found, gradient = score(rows, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # Token minus policy, but for the first V; 0 whatever lies behind the end.
    shares = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    moved = np.eye(V)[tokens] - np.where(np.arange(T)[:, None] > 0, shares, 0)
    moved = np.where(np.isnan(rows), 0, moved)
    np.testing.assert_allclose(gradient, moved, atol=1e-12)
    log_p = found.sum(-1) - logsumexp(logits[0])
    np.testing.assert_allclose(log_p, log_probabilities(logits, eos), atol=1e-12)
    one, _ = jax.jit(jax.vmap(score))(rows, tokens)
    np.testing.assert_allclose(one, found, atol=1e-12)


def test_a_large_vocabulary_in_single_precision(unchecked):
    # No constant of the size of the vocabulary may swallow the rest.
    logits, tokens = np.random.default_rng(0).normal(size=(2, 20_000)), np.array([1, 2])
    for f in (KL, losses.Alpha(1.5)):
        score = jax.jit(lambda q: losses.rewards_from_logits(q, tokens, f, "unit"))
        single = score(logits.astype(np.float32))
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, score(logits), rtol=1e-5)


def test_single_precision_stays():
    rewards = [r.astype(np.float32) for r in tables(0)[:2]]
    found = to_logits(rewards, eos=1)
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_wrong_calls(unchecked):
    rewards = tables(0)
    with pytest.raises(ValueError, match=r"`rewards\[1\]` has shape \(2, 3\)"):
        losses.arm_from_ebm([rewards[0], jnp.zeros((2, 3))])
    with pytest.raises(ValueError, match="`logits` is empty"):
        losses.ebm_from_arm([])
    with pytest.raises(ValueError, match="`eos` is 3"):
        losses.arm_from_ebm(rewards, eos=3)
    with pytest.raises(TypeError, match="`reference` is missing"):
        losses.arm_from_ebm(rewards, losses.ChiSquare())
    with pytest.raises(TypeError, match="`rewards` is 3.0; a list of arrays"):
        losses.arm_from_ebm(3.0)  # pyright: ignore
    with pytest.raises(ValueError, match="`tokens` has shape"):
        losses.rewards_from_logits(jnp.zeros((4, V)), jnp.zeros(3, int))


@pytest.mark.parametrize("bad", [3, -1])
def test_tokens_that_there_are_not(bad):
    rewards, logits = losses.rewards_from_logits, jnp.zeros((2, 3))
    tokens = jnp.array([1, bad])
    with pytest.raises(ValueError, match=f"contains {bad}; the tokens are 0 to 2"):
        rewards(logits, tokens)
    # Behind the end there may be anything.
    assert rewards(logits, tokens, eos=1)[1] == 0

    @jax.jit
    def run(logits, tokens):
        total = lambda logits, **end: rewards(logits, tokens, **end).sum()
        return [jax.value_and_grad(total)(logits), jax.grad(total)(logits, eos=1)]

    (value, gradient), ended = run(logits, tokens)
    assert jnp.isnan(value) and jnp.isnan(gradient).any() and jnp.isfinite(ended).all()
