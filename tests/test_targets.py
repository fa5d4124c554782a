"""One rule for targets that a loss does not accept, for every loss, called directly,
under `jit` and by `value_and_direction`: a message where they are known, else NaN.

A new loss is tested by adding its targets to `ACCEPTED`, and what is wrong to `WRONG`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog import losses
from diffprog.losses import Alpha, ChiSquare, FLoss, Hinge, KL, SoftmaxCrossEntropy

from .helpers import close


U = jnp.array([[0.3, -1.2, 0.1], [2.0, 0.5, -0.4], [0.2, 0.2, 1.5]])
SIGNS = np.array([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
LABELS = np.array([0, 2, 1])
SOFT = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.4, 0.3, 0.3]])
FLOATS = np.array([[0.5, -1.0, 0.0], [1.0, 2.0, 3.0], [-0.2, 0.0, 9.0]])

ACCEPTED = {
    "Squared": (losses.Squared(), FLOATS),
    "Huber": (losses.Huber(), FLOATS),
    "Absolute": (losses.Absolute(), FLOATS),
    "Euclidean": (losses.Euclidean(), FLOATS),
    "Poisson": (losses.Poisson(), np.abs(FLOATS)),
    "Logistic": (losses.Logistic(), SIGNS),
    "Hinge": (Hinge(), SIGNS),
    "Hinge of labels": (Hinge(), LABELS),
    "cross-entropy of labels": (SoftmaxCrossEntropy(), LABELS),
    "cross-entropy": (SoftmaxCrossEntropy(), 2 * SOFT),
    "KL of labels": (FLoss(KL(), temperature=0.5), LABELS),
    "sparsemax of labels": (FLoss(ChiSquare(), "unit"), LABELS),
    "sparsemax": (FLoss(ChiSquare(), "unit"), SOFT),
    "smoothed": (FLoss(Alpha(0.0), "uniform", smoothing=0.1), LABELS),
    "function": (losses.as_loss(lambda u, y: jnp.sum((u - y) ** 2, -1)), FLOATS),
}
BINARY = "binary targets are 1.0 and -1.0: of zeros and ones make"
RANGE = "the 3 classes are 0 to 2"
SUMS = "probabilities are >= 0, and sum up to 1"
ONE_HOT, ONE_BASED = np.eye(3)[LABELS], LABELS + 1
THIRD = ONE_BASED, f"label 3; {RANGE}"
FAR = 2**32, "label 4294967296; the 3 classes"  # 0 in 32 bits
# What the second row makes wrong, and what is wrong as a whole.
WRONG = {
    "Poisson": [(-1.0, "contains -1.0; counts"), (np.nan, "contains nan; counts")],
    "Logistic": [(0.0, f"contains 0.0; {BINARY}"), (ONE_HOT, BINARY)],
    "Hinge": [(0.0, f"contains 0.0; {BINARY}"), (ONE_HOT, BINARY)],
    "Hinge of labels": [(-1, f"label -1; {RANGE}"), FAR, THIRD],
    "cross-entropy of labels": [(3, f"label 3; {RANGE}"), FAR, THIRD],
    "cross-entropy": [(-0.1, "contains -0.1; weights"), (np.inf, "contains inf")],
    "KL of labels": [(-100, f"label -100; {RANGE}")],
    "sparsemax of labels": [(3, f"label 3; {RANGE}"), FAR],
    "sparsemax": [(-0.1, f"the entry -0.1; {SUMS}"), (3 * SOFT, "row of sum 3; prob")],
    "smoothed": [(3, f"label 3; {RANGE}")],
}  # fmt: skip
PROBABILITIES = "cross-entropy", "sparsemax"  # traced ones are not looked at


def spoiled(name, wrong):
    """The targets with a wrong second row."""
    if np.ndim(wrong):
        return wrong
    targets = ACCEPTED[name][1].copy()
    targets[1] = wrong
    return targets


@eqx.filter_jit
def compiled(loss, u, y):
    """The losses and what has a row per example, with the targets traced."""
    by_autodiff = jax.grad(lambda u: jnp.sum(loss(u, y)))(u)
    return loss(u, y), loss.gradient(u, y), by_autodiff


@pytest.mark.costly
@pytest.mark.parametrize("name", ACCEPTED)
def test_targets_that_are_accepted(name, unchecked):
    loss, targets = ACCEPTED[name]
    value, gradient, by_autodiff = compiled(loss, U, jnp.asarray(targets))
    assert jnp.isfinite(value).all() and (value > 0).any()
    close(gradient, by_autodiff)
    for given in (targets, jnp.asarray(targets), targets.tolist()):
        if name != "function" or not isinstance(given, list):
            close(loss(U, given), value)
            assert loss.count(U, given) == 3
    empty = loss(U[:0], targets[:0]), loss.gradient(U[:0], targets[:0])
    assert [a.shape for a in empty] == [(0,), (0, 3)]
    with pytest.raises(
        TypeError, match="`outputs` has dtype int64; an array of floats"
    ):
        loss(U.astype(int), targets)
    if name != "function":
        with pytest.raises((TypeError, ValueError), match="complex128|both must agree"):
            loss(U, targets + 0j)


@pytest.mark.costly
@pytest.mark.parametrize("name", WRONG)
def test_targets_that_are_not(name, unchecked):
    loss, accepted = ACCEPTED[name]
    good = compiled(loss, U, jnp.asarray(accepted))
    for wrong, message in WRONG[name]:
        targets = spoiled(name, wrong)
        for given in (targets, jnp.asarray(targets), targets.tolist()):
            for call in (loss, loss.gradient, loss.count, loss.factor):
                with pytest.raises(ValueError, match=message):
                    call(U, given)
        with pytest.raises(ValueError, match=message):  # known, under `jit`
            jax.jit(lambda u, y=targets: loss(u, y))(U)
        if np.ndim(wrong) or name in PROBABILITIES:
            continue
        for item, right in zip(compiled(loss, U, jnp.asarray(targets)), good):
            assert jnp.isnan(item[1]).any()
            close(item[::2], right[::2])


@pytest.mark.costly
@pytest.mark.parametrize("name", WRONG)
def test_the_door_knows_the_targets(name, unchecked):
    loss, accepted = ACCEPTED[name]
    model = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    vd = dp.value_and_direction(loss, dp.oracles.Gradient())
    state = vd.init(model)
    assert jnp.isfinite(vd(model, U, accepted)[0])
    for wrong, message in WRONG[name]:
        targets = spoiled(name, wrong)
        with pytest.raises(ValueError, match=message):
            vd(model, U, targets)
        with pytest.raises(ValueError, match=message):
            vd.step(model, state, U, jnp.asarray(targets))
        if np.ndim(wrong) == 0 and name not in PROBABILITIES:
            step = jax.jit(lambda y: vd.step(model, state, U, y)[0])
            value, aux = step(jnp.asarray(targets))
            assert jnp.isnan(value) and aux.result == dp.RESULTS.nonfinite_rollout


def test_one_based_labels_of_a_classifier():
    # A third of the labels does not exist: no training on the others.
    model = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    vd = dp.value_and_direction(SoftmaxCrossEntropy(), dp.oracles.Gradient())
    with pytest.raises(ValueError, match="label 3; the 3 classes are 0 to 2"):
        vd(model, U, ONE_BASED)


# Labels that are to be ignored ----------------------------------------------------

PLAIN = {
    "cross-entropy": SoftmaxCrossEntropy(),
    "sparsemax": FLoss(ChiSquare(), "unit"),
    "Hinge": Hinge(),
}
IGNORING = {
    "cross-entropy": SoftmaxCrossEntropy(ignore_label=-100),
    "sparsemax": FLoss(ChiSquare(), "unit", ignore_label=-100),
    "Hinge": Hinge(ignore_label=-100),
}


@eqx.filter_jit
def everything(loss, u, v, y):
    f = loss.factor(u, y)
    return (
        loss(u, y),
        loss.gradient(u, y),
        jax.grad(lambda u: jnp.sum(loss(u, y)))(u),
        loss.hessian_mv(u, y, v),
        f.mv(f.rho) + (0 if f.remainder is None else f.remainder),
        loss.conjugate_prox(v, 1.0, y),
        loss.conjugate(jnp.zeros_like(u), y),
    )


@pytest.mark.costly
@pytest.mark.parametrize("name", IGNORING)
def test_an_ignored_label_has_no_loss(name, unchecked):
    loss, labels = IGNORING[name], jnp.array([0, -100, 1])
    u, v = U.at[1].set(jnp.nan), 1 + U * U
    found = everything(loss, u, v, labels)
    plain = PLAIN[name]
    rest = everything(plain, U[::2], v[::2], labels[::2])
    for item, other in zip(found, rest):
        close(item[1], 0)
        close(item[::2], other)
    close(loss(u, labels), found[0])  # known labels
    assert loss.count(u, labels) == 2 and plain.count(U, LABELS) == 3
    tokens = jnp.array([[0, -100], [-100, -100], [1, 1]])
    assert loss.count(jnp.zeros((3, 2, 3)), tokens) == 2
    with pytest.raises(ValueError, match="label 5; the 3 classes"):
        loss(U, jnp.array([0, -100, 5]))
    with pytest.raises(ValueError, match="label -100; the 3 classes"):
        plain(U, labels)


@pytest.mark.parametrize("name", IGNORING)
def test_no_other_label_is_ignored(name):
    loss = IGNORING[name]
    value = jax.jit(lambda y: loss(U, y))(jnp.array([0, 2**32 - 100, 1]))
    np.testing.assert_array_equal(jnp.isnan(value), [False, True, False])


def test_nan_in_16_bits_raises_and_does_not_warn():
    for dtype in ("bfloat16", "float16"):
        y = jnp.ones((3, 3), dtype).at[1].set(jnp.nan)
        with pytest.raises(ValueError, match="contains nan; counts"):
            losses.Poisson()(U, y)
        with pytest.raises(ValueError, match="a row of sum nan|the entry nan"):
            FLoss(KL())(U, y / 3)


def test_unsigned_labels():
    labels = LABELS.astype("uint8")
    logp = jax.nn.log_softmax(U)[jnp.arange(len(labels)), labels]
    close(losses.f_loss(U, labels, KL()), -logp)
    rewards = losses.rewards_from_logits(U, labels)
    close(rewards, losses.rewards_from_logits(U, LABELS))
    assert jnp.any(rewards != 0)


@pytest.mark.costly
@pytest.mark.parametrize("oracle", ["Gradient", "GaussNewton"])
def test_the_mean_is_over_labels_that_count(oracle):
    labels = jnp.array([0, -100, 1])
    model = eqx.nn.Linear(3, 3, key=jax.random.key(0))
    oracle = getattr(dp.oracles, oracle)(damping=0.1)
    loss = SoftmaxCrossEntropy(ignore_label=-100)
    vd = dp.value_and_direction(loss, oracle)
    value, direction = vd(model, U, labels)
    alone, same = vd(model, U[::2], labels[::2])
    close(value, alone)
    close(direction.weight, same.weight)
    network = dp.Network([model])
    problem = dp.NetworkProblem(network, loss, labels)
    close(problem.terminal_cost(jax.vmap(model)(U)), alone)
    # Nothing to learn.
    value, direction = vd(model, U, jnp.full(3, -100))
    assert value == 0 and not direction.weight.any()


@pytest.mark.parametrize("label", [True, 1.0, "pad"])
def test_an_ignored_label_is_an_int(label, unchecked):
    for build in (
        SoftmaxCrossEntropy,
        Hinge,
        lambda label: FLoss(KL(), ignore_label=label),
    ):
        with pytest.raises(TypeError, match="`ignore_label` is .*a Python int such as"):
            build(label)


@pytest.mark.slow
def test_masked_rows_may_hold_any_target(unchecked):
    f_loss = losses.f_loss
    where = (jnp.array([0, -100, 1]) != -100)[:, None]
    labels, soft = jnp.array([0, -100, 1]), jnp.asarray(SOFT).at[1].set(jnp.nan)

    def run(u, beta, y, where):
        total = lambda u, beta: f_loss(
            u, y, ChiSquare(), "unit", where=where, temperature=beta
        ).sum()
        return f_loss(
            u, y, ChiSquare(), "unit", where=where, temperature=beta
        ), jax.grad(total, (0, 1))(u, beta)

    for y in (labels, soft):
        for call in (run, jax.jit(run)):
            value, (by_scores, by_beta) = call(U, jnp.asarray(0.7), y, where)
            close(value[1], 0)
            close(by_scores[1], 0)
            rest = run(U[::2], jnp.asarray(0.7), y[::2], None)
            close(value[::2], rest[0])
            close(by_scores[::2], rest[1][0])
            close(by_beta, rest[1][1])


def test_what_is_not_finite_is_not_swallowed(unchecked):
    u = U.at[:2, 0].set(jnp.array([jnp.nan, jnp.inf]))
    for name, (loss, targets) in ACCEPTED.items():
        found = compiled(loss, u, jnp.asarray(targets))
        value, gradient, _ = map(np.asarray, found)
        assert np.isnan(value[0]) and np.isnan(gradient[0]).any(), name
        if isinstance(loss, losses.AbstractDualLoss):
            conjugate = jax.jit(lambda u, y, loss=loss: loss.conjugate(u, y))
            assert np.isnan(np.asarray(conjugate(u, jnp.asarray(targets)))[0]), name
    close(np.asarray(losses.Euclidean()(u, jnp.zeros((3, 3))))[1], np.inf)
