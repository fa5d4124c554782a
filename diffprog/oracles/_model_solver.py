"""What the solvers of prox-linear models share."""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._common.loops import while_loop
from .._common.tree import vdot
from .._common.types import AbstractPart
from ..losses import AbstractDualLoss
from ..losses._loss import answered, total
from ._base import Linearization


class Found(NamedTuple):
    """A step, and what is known of it.

    - `step`: d, like the parameters.
    - `z`: the linearized outputs there, f + J d.
    - `gap`: the duality gap.
    - `num_inner`: iterations.
    - `good`: whether the step can be trusted.
    """

    step: PyTree
    z: Array
    gap: Array
    num_inner: Array
    good: Array


class AbstractModelSolver(AbstractPart):
    """Minimizes a prox-linear model until the duality gap is small."""

    @abc.abstractmethod
    def minimize(self, at: Linearization, damping: Array, gap: Array) -> Found:
        """Stops where P(d) - D(alpha) <= gap (P(0) - D(alpha))."""


def model(at: Linearization, damping: Array, d: PyTree, z: Array) -> Array:
    """P(d) where z = f + J d."""
    losses = at.loss(z, at.targets)
    return at.weight * jnp.sum(losses) + damping * vdot(d, d) / 2


def reached(at: Linearization, damping: Array, gap: Array, found: Found) -> Array:
    """Whether the gap is as small as was asked for, or lost in rounding."""
    P = model(at, damping, found.step, found.z)
    return found.gap <= gap * (at.value - P + found.gap) + at.rounding()


def dual(at: Linearization) -> AbstractDualLoss:
    """The loss, where it has a conjugate. Raises for others."""
    if not isinstance(at.loss, AbstractDualLoss):
        raise TypeError(
            "The loss carries no conjugate, as none does that is given as a function: "
            "use one of `dp.losses`, such as `dp.losses.Huber()`, or `GaussNewton` "
            "instead of `ProxLinear`."
        )
    return at.loss


def fenchel(at: Linearization, losses: Array, z: Array, alpha: Array) -> Array:
    """c sum_i (l_i(z_i) + l_i*(alpha_i) - <alpha_i, z_i>), `losses` being l_i(z_i)."""
    conjugates = dual(at).conjugate(alpha, at.targets)
    both = losses + answered(at.loss, "conjugate", conjugates, losses.shape)
    inner = jnp.where(jnp.isinf(z), 0, alpha * z)  # what is excluded has no alpha
    return at.weight * jnp.sum(both - total(inner))


def prox(at: Linearization, vector: Array, tau: Array) -> Array:
    """The proximal operator of the conjugates."""
    found = dual(at).conjugate_prox(vector, tau, at.targets)
    return answered(at.loss, "conjugate_prox", found, vector.shape)


def halved(too_long: Callable, t: Array, shortest: float = 1e-9) -> Array:
    """The first of t, t/2, t/4 ... that is not too long; 0 where that is too short."""
    unfinished = lambda t: too_long(t) & (t > shortest)
    t = while_loop(unfinished, lambda t: t / 2, t)
    return jnp.where(t > shortest, t, 0)


def bounded(minimize: Callable) -> Callable:
    """With outputs that can be added up: an excluded class is only very far below.

    In what is found it is where it was: no step moves it.
    """

    @ft.wraps(minimize)
    def within(self, at: Linearization, damping: Array, gap: Array) -> Found:
        far = jnp.sqrt(jnp.finfo(at.outputs.dtype).max)
        near = dataclasses.replace(at, outputs=jnp.clip(at.outputs, -far, far))
        found = minimize(self, near, damping, gap)
        beyond = jnp.abs(at.outputs) > far
        return found._replace(z=jnp.where(beyond, at.outputs, found.z))

    return within
