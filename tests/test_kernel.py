"""The row kernel for the GPU: in interpret mode it agrees with the other path."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog import losses
from diffprog.losses import _kernel, Alpha, f_loss, f_softargmax, f_softmax
from diffprog.losses._call import check
from diffprog.losses._root import on_chip


FAMILIES = {
    "KL": losses.KL(),
    "ReverseKL": losses.ReverseKL(),
    "ChiSquare": losses.ChiSquare(),
    "Neyman": losses.Neyman(),
    "SquaredHellinger": losses.SquaredHellinger(),
    "JensenShannon": losses.JensenShannon(),
    "Jeffreys": losses.Jeffreys(),
    "LeCam": losses.LeCam(),  # pyright: ignore
    "1.5": Alpha(1.5),
    "1.3": Alpha(1.3),
}
# Compiles in half the time.
quick = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
few = ("KL", "LeCam", "Jeffreys", "1.3")
each_family = pytest.mark.parametrize("f", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def use(monkeypatch):
    """Sets the mode of the calls that follow."""
    return lambda mode: monkeypatch.setattr(_kernel, "MODE", mode)


def rows(k: int) -> jax.Array:
    """Scores of several widths, an infinite one, and a row without classes."""
    z = np.random.default_rng(k).normal(size=(5, k))
    z *= np.array([[0.1], [1.0], [5.0], [100.0], [1.0]])
    z[1, 1::3] = -np.inf
    z[3, 2], z[4] = np.inf, -np.inf
    return jnp.asarray(z, jnp.float32)


def in_both_modes(outputs, use, mode: str, scores):
    """What a function returns with the kernel off, and in `mode`."""
    expected = quick(lambda scores: outputs(scores))(scores)
    use(mode)
    return expected, quick(lambda scores: outputs(scores))(scores)


@pytest.mark.costly
@pytest.mark.parametrize(
    "name, k, reference",
    [
        *((name, 1000, "unit") for name in FAMILIES),
        *((name, 100, "uniform") for name in few),
        *((name, 5, "unit") for name in few),
    ],
)
def test_agrees(name, k, reference, use):
    f, scores = FAMILIES[name], rows(k)

    @quick
    def both(scores):
        expected = f_softargmax(scores, f, reference)
        use("interpret")
        return f_softargmax(scores, f, reference), expected

    found, expected = both(scores)
    assert chosen(scores, f, reference)
    assert found.dtype == jnp.float32
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).sum(-1).max() <= 2e-6
    assert np.all(found[4] == 0)


def test_derivatives_agree(use):
    """The rules are the same: they ask for sigma only."""
    f, scores = Alpha(1.5), rows(20)[:3]
    direction = jnp.cos(jnp.arange(60.0)).reshape(3, 20).astype(jnp.float32)
    labels = jnp.array([0, 3, 6])
    loss = lambda s: f_loss(s, labels, f, "unit", constant=False).sum()

    def outputs(scores):
        _, change = jax.jvp(lambda s: f_softargmax(s, f, "unit"), [scores], [direction])
        return change, *jax.jvp(jax.grad(loss), [scores], [direction])

    expected, found = in_both_modes(outputs, use, "interpret", scores)
    assert chosen(scores, f, "unit")
    for found, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5, rtol=1e-5)


def test_options(use):
    """Masks, temperatures, another axis, 16 bits, `vmap`, one class, NaN."""
    f, scores = Alpha(1.5), rows(12)[:3]
    where, beta = jnp.arange(12) % 4 > 0, jnp.array([0.5, 1.0, 2.0], jnp.float32)
    deep = jnp.stack([scores, scores + 1]).transpose(2, 0, 1)
    spoiled = scores.at[0, 3].set(jnp.nan)
    short = scores.astype(jnp.bfloat16)

    def outputs(scores):
        soft = lambda s, **options: f_softargmax(s, f, "uniform", **options)
        return (
            soft(scores, where=where, temperature=beta),
            soft(deep, axis=0),
            jax.vmap(soft, in_axes=1, out_axes=1)(deep),
            jax.vmap(lambda s, b: soft(s, temperature=b))(scores, beta),
            soft(short.astype(jnp.float32)),
            soft(scores[:, :1]),
            f_softmax(scores, f, "unit", where=where),
            jnp.isnan(soft(spoiled)),
        ), soft(short)

    (expected, _), (found, low) = in_both_modes(outputs, use, "interpret", scores)
    assert chosen(scores, f, "uniform") and chosen(short, f, "uniform")
    assert found[-1].tolist() == [[True] * 12, [False] * 12, [False] * 12]
    # Rounding may go either way: half a unit in the last place, not the same number.
    assert low.dtype == jnp.bfloat16
    half = 0.505 * float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(low.astype(jnp.float32), found[4], atol=0, rtol=half)
    for found, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-6, rtol=1e-6)


def chosen(scores, f, reference, axis_name=None) -> bool:
    call = check(scores, f, reference, -1, None, 1.0, axis_name)
    found = []

    @ft.partial(jax.make_jaxpr, axis_env=[("classes", 2)])
    def trace(call):
        s = call.set_up()
        found.append(on_chip(s.classes, s.f, s.problem))
        return s.problem.m

    trace(call)
    return found[0]


def test_applies(use):
    scores, f = rows(5), Alpha(1.5)
    assert not chosen(scores, f, "unit")  # off unless it is asked for
    use("auto")
    assert chosen(scores, f, "unit") and chosen(scores, f, "uniform")
    assert chosen(jnp.zeros((1, _kernel.LIMIT), jnp.float32), f, "unit")
    assert not chosen(jnp.zeros((1, _kernel.LIMIT + 1), jnp.float32), f, "unit")
    assert not chosen(scores.astype(jnp.float64), f, "unit")
    assert not chosen(scores[:0], f, "unit")
    assert not chosen(scores, f, "unit", "classes")
    assert not chosen(scores, f, jnp.ones(5, jnp.float32))
    assert not chosen(scores, Alpha(2.5), "unit")
    assert not chosen(scores, Alpha(jnp.float32(1.5)), "unit")
    assert not chosen(scores, lambda u: u * jnp.log(u), "unit")


def test_default_path_elsewhere(use):
    """On the CPU "auto" computes what "off" does, by the same operations."""
    scores, f = rows(100), Alpha(1.5)

    def outputs(scores):
        loss = lambda s: f_softmax(s[:4], f, "unit").sum()
        return f_softargmax(scores, f, "unit"), jax.grad(loss)(scores)

    def operations():
        text = jax.jit(lambda scores: outputs(scores)).lower(scores).as_text()
        return set(re.findall(r"stablehlo\.\w+|triton", text))

    before = operations()
    expected, found = in_both_modes(outputs, use, "auto", scores)
    close = ft.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6)
    jax.tree.map(close, found, expected)
    # All there is to choose from is the default.
    assert operations() - {"stablehlo.case"} == before


def lower_for_cuda(function, *arguments) -> str:
    pytest.importorskip("jax.experimental.pallas.triton", reason="needs Triton")
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@each_family
def test_lowers_for_cuda(f, use):
    """To Triton's language, that is: its compiler runs on the GPU's machine only."""
    use("auto")
    scores = jnp.zeros((3, 1000), jnp.float32)
    text = lower_for_cuda(lambda s: f_softargmax(s, f, "unit"), scores)
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
    assert "stablehlo.while" not in text  # nothing is left of the other path


def test_derivatives_lower_for_cuda(use):
    use("auto")
    scores, f = jnp.zeros((2, 3, 1000), jnp.float32), Alpha(1.5)
    loss = lambda s: f_softmax(s, f, "unit").sum() + f_softargmax(s, f, "unit").max()
    text = lower_for_cuda(jax.vmap(jax.value_and_grad(loss)), scores)
    assert "triton" in text and "stablehlo.while" not in text
