"""Whatever comes in: every loss, operator and oracle under masks, extremes, dtypes and
conventions of targets, as hypothesis draws them.

What masks, gaps and targets give is compared with references in `test_masks`,
`test_targets` and `test_precision`; here they meet each other. A new loss or generator
is drawn by its line there, a new oracle by its line in `test_precision`.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, HealthCheck, Phase, settings, strategies as st

import diffprog as dp
from diffprog.losses import f_loss, f_softargmax, f_softmax, FLoss, Hinge

from .test_losses import FAMILIES
from .test_masks import LOSSES
from .test_precision import network, ORACLES


M, K = 6, 4
DTYPES = ["bfloat16", "float16", "float32", "float64"]
EXTREMES = [0.0, -1e3, -np.inf, np.inf, "lowest", "highest"]
draws = dict(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    extremes=st.lists(
        st.tuples(
            st.integers(0, M - 1), st.integers(1, K - 1), st.sampled_from(EXTREMES)
        ),
        max_size=8,
    ),
    jitted=st.booleans(),
)
property_test = lambda count: settings(
    max_examples=count,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def scores(seed, dtype, extremes):
    """Random ones, some of them extreme. Those of class 0 never are."""
    u = np.random.default_rng(seed).normal(size=(M, K))
    u = jnp.asarray(u, dtype)
    for row, column, value in extremes:
        named = {"lowest": jnp.finfo(dtype).min, "highest": jnp.finfo(dtype).max}
        u = u.at[row, column].set(named.get(value, value))
    return u


def in_its_dtype(targets, dtype):
    targets = np.asarray(targets)[:M]
    return jnp.asarray(targets, dtype if targets.dtype == float else targets.dtype)


@ft.cache
def compiled(fn):
    return eqx.filter_jit(fn)


def everything_of_a_loss(loss, u, y):
    factor = loss.factor(u, y)
    return dict(
        value=loss(u, y),
        gradient=loss.gradient(u, y),
        Hessian=loss.hessian_mv(u, y, jnp.ones_like(u)),
        factor=factor.mv(factor.rho),
    )


@pytest.mark.costly
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_anything(name):
    loss, targets = LOSSES[name]

    @property_test(20)
    @given(**draws)
    def check(seed, dtype, extremes, jitted):
        u, y = scores(seed, dtype, extremes), in_its_dtype(targets, dtype)
        call = compiled(everything_of_a_loss) if jitted else everything_of_a_loss
        out = call(loss, u, y)
        assert {a.dtype for a in out.values()} == {jnp.dtype(dtype)}
        assert not any(jnp.isnan(a).any() for a in out.values())
        # Rows do not know of each other, but for the number of steps of a loop.
        mild = ~jnp.any(jnp.isinf(u) | (jnp.abs(u) > 100), 1)
        again = call(loss, jnp.where(mild[:, None], u, 0), y)
        for a, b in zip(out.values(), again.values(), strict=True):
            a, b = np.float64(a[mild]), np.float64(b[mild])
            eps = 16 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(a, b, rtol=eps, atol=eps)

    check()


def everything_of_a_generator(f, u, labels, soft):
    out = dict(
        p=f_softargmax(u, f, "unit"),
        softmax=f_softmax(u, f, "uniform", temperature=0.5),
        labels=f_loss(u, labels, f, "unit", constant=False),
        soft=f_loss(u, soft, f, "unit", smoothing=0.1),
    )
    loss = lambda u: jnp.sum(f_loss(u, labels, f, "unit", constant=False))
    return out | dict(gradient=jax.grad(loss)(u))


@pytest.mark.costly
@pytest.mark.parametrize("name", FAMILIES)
def test_operators_of_anything(name):
    f = FAMILIES[name]

    @property_test(10)
    @given(**draws)
    def check(seed, dtype, extremes, jitted):
        u, labels = scores(seed, dtype, extremes), jnp.zeros(M, int)
        soft = jnp.broadcast_to(jnp.eye(1, K, dtype=dtype), u.shape)
        call = everything_of_a_generator
        out = (compiled(call) if jitted else call)(f, u, labels, soft)
        assert {a.dtype for a in out.values()} == {jnp.dtype(dtype)}
        assert not any(jnp.isnan(a).any() for a in out.values())
        p, eps = np.asarray(out["p"], float), float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(p.sum(1), 1, atol=max(K * eps, 1e-5))
        assert np.all(p[np.isneginf(np.asarray(u, float))] == 0)
        g = np.asarray(out["gradient"], float)
        np.testing.assert_allclose(g, p - np.eye(1, K), atol=max(4 * eps, 1e-5))

    check()


# The losses of labels, of which the last class is masked.
OF_LABELS = {
    "cross-entropy": dp.losses.SoftmaxCrossEntropy(ignore_label=-1),
    "hinge": Hinge(ignore_label=-1),
    "sparsemax": FLoss(dp.losses.ChiSquare(), "unit", ignore_label=-1),
}


# Rules that invert what comes after a layer: a mask goes into the loss then.
OF_FINITE = "targets", "differences", "inverses"
# Ridge regressions over the inputs of a layer, whatever the loss ignores.
OF_INPUTS = "inverses", "proximal back-propagation"
OF_A_GAP = "interior", "ascent", "proximal"  # two programs stop at other points


@pytest.mark.costly
@pytest.mark.parametrize("oracle", ORACLES)
def test_oracles_of_anything(oracle):
    """A class that is masked is none, and an example that is ignored is none."""

    @property_test(4)
    @given(
        loss=st.sampled_from(list(OF_LABELS)[oracle == "interior" :]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    )
    def check(loss, dtype, seed):
        rng = np.random.default_rng(seed)
        net = network(4, 3 * [dtype])
        x = jnp.asarray(rng.normal(size=(M, 3)), dtype)
        labels = jnp.asarray(rng.integers(0, 2, M)).at[2].set(-1)
        wider = dp.Network([*net.layers, masked])
        key = jax.random.key(0) if oracle == "subspace" else None
        found = []
        every, kept = np.arange(M) >= 0, np.arange(M) != 2
        kept = every if oracle in OF_INPUTS else kept
        wider = net if oracle in OF_FINITE else wider
        for model, rows in ((net, kept), (wider, every)):
            vd = dp.value_and_direction(OF_LABELS[loss], ORACLES[oracle])
            step = vd.step(model, vd.init(model), x[rows], labels[rows], key=key)
            (value, aux), direction, _ = step
            assert aux.result == dp.RESULTS.successful, (loss, dtype, aux)
            leaves = jax.tree.leaves(direction)
            assert {a.dtype for a in leaves} == {jnp.dtype(dtype)}
            found.append((value, np.concatenate([np.ravel(a) for a in leaves])))
        (value, d), (masked_value, masked_d) = found
        eps = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(masked_value, value, rtol=eps)
        if eps > 0.001 and loss != "cross-entropy":
            return  # a rounding may decide on which side of a kink an output is
        distance = np.linalg.norm(np.float64(masked_d) - np.float64(d))
        eps = max(eps, 0.01 * (oracle in OF_A_GAP))
        assert distance <= 10 * eps * np.linalg.norm(np.float64(d))

    check()


def masked(outputs):
    return jnp.concatenate([outputs, jnp.full(1, -jnp.inf, outputs.dtype)])
