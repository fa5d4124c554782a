"""The experiment `benchmarks/row_kernel.py`, interpreted, agrees with the package."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog import losses
from diffprog.losses import Alpha, f_softargmax


# Newer versions of JAX warn that its Triton backend will go.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
pytest.importorskip("jax.experimental.pallas.triton", reason="needs Triton")

FAMILIES = {
    "KL": losses.KL(),
    "ReverseKL": losses.ReverseKL(),
    "ChiSquare": losses.ChiSquare(),
    "Neyman": losses.Neyman(),
    "SquaredHellinger": losses.SquaredHellinger(),
    "JensenShannon": losses.JensenShannon(),
    "Jeffreys": losses.Jeffreys(at_most_one=True),
    "LeCam": losses.LeCam(at_most_one=True),  # pyright: ignore
    "1.5": Alpha(1.5),
    "1.3": Alpha(1.3),
}
# Compiles in half the time.
quick = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
few = ("KL", "LeCam", "Jeffreys", "1.3")


def row_softargmax(*args):
    from benchmarks import row_kernel  # which imports Triton

    return row_kernel.row_softargmax(*args)


def rows(k: int) -> jax.Array:
    """Scores of several widths, an infinite one, and a row without classes."""
    z = np.random.default_rng(k).normal(size=(5, k))
    z *= np.array([[0.1], [1.0], [5.0], [100.0], [1.0]])
    z[1, 1::3] = -np.inf
    z[3, 2], z[4] = np.inf, -np.inf
    return jnp.asarray(z, jnp.float32)


@pytest.mark.costly
@pytest.mark.parametrize(
    "name, k, q",
    [
        *((name, 1000, 1.0) for name in FAMILIES),
        *((name, 100, 0.01) for name in ("KL", "1.3")),
        *((name, 5, 1.0) for name in few),
    ],
)
def test_the_row_kernel_agrees(name, k, q):
    f, scores = FAMILIES[name], rows(k)
    reference = "unit" if q == 1 else jnp.float32(q)
    expected = quick(lambda s: f_softargmax(s, f, reference))(scores)
    found = quick(lambda s: row_softargmax(s, f, q, True))(scores)
    assert found.dtype == jnp.float32
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).sum(-1).max() <= 2e-6
    assert np.all(found[4] == 0)


def test_derivatives_of_the_row_kernel():
    f, scores = Alpha(1.5), rows(20)[:3]
    direction = jnp.cos(jnp.arange(60.0)).reshape(3, 20).astype(jnp.float32)

    def derivatives(operator):
        change = lambda s: jax.jvp(operator, [s], [direction])[1]
        return quick(lambda s: (change(s), jax.vjp(operator, s)[1](direction)))(scores)

    expected = derivatives(lambda s: f_softargmax(s, f, "unit"))
    found = derivatives(jax.vmap(lambda s: row_softargmax(s, f, 1.0, True)))
    for found, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5, rtol=1e-5)


def test_the_row_kernel_sees_nan():
    spoiled = rows(12)[:3].at[0, 3].set(jnp.nan)
    p = quick(lambda s: row_softargmax(s, Alpha(1.5), 1.0, True))(spoiled)
    assert jnp.isnan(p).all(-1).tolist() == [True, False, False]


@pytest.mark.parametrize("f", FAMILIES.values(), ids=FAMILIES)
def test_the_row_kernel_lowers_for_cuda(f):
    """To Triton's language, that is: its compiler runs on the GPU's machine only."""
    scores = jnp.zeros((2, 3, 1000), jnp.float32)
    operator = jax.vmap(lambda s: row_softargmax(s, f))
    traced = jax.jit(lambda s: jax.vjp(operator, s)[1](s)).trace(scores)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
