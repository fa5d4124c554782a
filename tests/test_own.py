"""Divergences and losses of a user that break their contract are told which."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import diffprog as dp
from diffprog.losses import AbstractDivergence, AbstractLoss, f_softargmax

from .test_extending import Arsinh, Quantile
from .test_losses import Scaled


def own(cls, **methods):
    """A class as a user may write it, with other methods."""
    hidden = ("__dict__", "__weakref__", "__init__", "_abc_impl")
    body = {k: v for k, v in vars(cls).items() if k not in hidden} | methods
    return type("Own", cls.__bases__, body)


@pytest.mark.parametrize(
    "method, answer, message",
    [
        ("link", lambda self, u: jnp.sum(u), "returned .* an array of that shape"),
        ("pair", lambda self, w: w, "returned .* two arrays of that shape"),
        ("mean_step", lambda self, S, Q: None, "returned None .* an array"),
    ],
)
def test_a_divergence_answers_for_every_entry(method, answer, message):
    f = own(Arsinh, **{method: answer})()
    with pytest.raises(ValueError, match=f"`Own.{method}` {message}"):
        f_softargmax(jnp.zeros((2, 3)), f, "unit")


def test_a_divergence_with_a_wrong_signature():
    f = own(Arsinh, conjugate=lambda self: 0.0)()
    with pytest.raises(TypeError) as caught:
        f_softargmax(jnp.zeros((2, 3)), f, "unit")
    assert "`Own.conjugate` was given 1 array." in caught.value.__notes__


def test_numbers_of_a_divergence_fit_the_rows():
    with pytest.raises(ValueError, match="`c` has shape .7,.; one that broadcasts"):
        f_softargmax(jnp.zeros((2, 3)), Scaled(jnp.ones(7)), "unit")  # pyright: ignore


def test_missing_methods():
    class Half(AbstractDivergence):
        sparse: ClassVar[bool] = False

    class Quarter(AbstractLoss):
        smooth: ClassVar[bool] = True

    with pytest.raises(TypeError, match="class Half .*conjugate, curvature, link"):
        Half()  # pyright: ignore
    with pytest.raises(TypeError, match="class Quarter .*factor, gradient"):
        Quarter()  # pyright: ignore


def direction(loss, oracle):
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    vd = dp.value_and_direction(loss, oracle)
    return vd(model, jnp.ones((4, 2)), jnp.zeros((4, 3)))


@pytest.mark.parametrize(
    "method, solver",
    [
        ("__call__", None),
        ("gradient", None),
        ("conjugate", None),
        ("conjugate_prox", None),
        ("conjugate_prox", dp.oracles.ProximalGradient()),
        ("block_update", dp.oracles.CoordinateAscent()),
    ],
)
def test_a_loss_answers_for_every_example(method, solver):
    loss = own(Quantile, **{method: lambda self, *arguments: jnp.zeros(7)})()
    with pytest.raises(ValueError, match=f"`Own.{method}` returned .*shape .7,"):
        direction(loss, dp.oracles.ProxLinear(1.0, solver))


@pytest.mark.parametrize("method", ["count", "hessian_mv", "factor"])
def test_a_loss_that_forgets_to_return(method):
    loss = own(Quantile, **{method: lambda self, *arguments: None})()
    with pytest.raises((TypeError, ValueError), match=f"`Own.{method}` .*None; "):
        solver = dp.oracles.CG() if method == "hessian_mv" else dp.oracles.Cholesky()
        direction(loss, dp.oracles.GaussNewton(1.0, solver))
