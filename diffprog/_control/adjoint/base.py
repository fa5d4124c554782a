"""How the derivatives of a solution are found."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from ..._chain.constraints import Duals
from ..._chain.vector import VectorChain
from ..._common.types import AbstractPart, Rows
from ..direction import AbstractDirection


class Found(eqx.Module):
    """What a solve found, and what of it has derivatives.

    - `xs`, `final`, `us`, `cost`: states, controls, and J.
    - `duals`: the multipliers of constraints; `None` without.
    - `costates`: of the first state, and after each stage; `None` where the solution
        has no multipliers.
    - `gradients`: of the Lagrangian in the controls, likewise.
    """

    xs: Rows
    final: Float[Array, " _"]
    us: Rows
    cost: Float[Array, ""]
    duals: Duals | None = None
    costates: tuple[Array, Rows] | None = None
    gradients: Rows | None = None


class Solved(eqx.Module):
    """What a solve did.

    - `method`, `us`: the direction, and the first guess of the controls.
    - `history`: step size and damping of every iteration, and NaN after the last one;
        empty unless the adjoint `replays`.
    - `found`: what was found; it has no derivatives.
    - `successful`: whether the result is.
    - `with_states`: whether the first guess had states.
    """

    method: AbstractDirection
    us: Rows
    history: Any
    found: Found
    successful: Bool[Array, ""]
    with_states: bool = eqx.field(static=True)


class AbstractAdjoint(AbstractPart):
    """How the derivatives of a solution are found.

    - `replays`: whether it needs the step sizes of all iterations.
    """

    replays: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def connect(self, chain: VectorChain, x0: Array, solved: Solved) -> Found:
        """What was found, as a function of the numbers of the chain and of x0."""

    @abc.abstractmethod
    def without(self, chain: VectorChain, x0: Array, rest: PyTree) -> PyTree:
        """What else is known, and has no derivatives."""


class NoAdjoint(AbstractAdjoint):
    """No derivatives: asking for them raises `NotImplementedError`."""

    replays: ClassVar[bool] = False

    def connect(self, chain, x0, solved):
        return connected(_refuse, (chain, x0), solved.found, None)

    def without(self, chain, x0, rest):
        return connected(_refuse, (chain, x0), rest, None)


def still(tree: PyTree) -> PyTree:
    """The tree without its derivatives."""
    stop = lambda a: lax.stop_gradient(a) if eqx.is_inexact_array(a) else a
    return jtu.tree_map(stop, tree)


def connected(tangents: Callable, data: PyTree, out: PyTree, known: PyTree) -> PyTree:
    """`out`, whose derivatives in the floats of `data` are `tangents`.

    `tangents(of, numbers, dots, out, known)` has the floats of the data and their
    tangents; `of(numbers)` is the data. All of it but `known` may be differentiated
    again.
    """
    numbers, rest = eqx.partition(data, eqx.is_inexact_array)
    arrays, static = eqx.partition(rest, eqx.is_array)
    out, fixed = eqx.partition(out, eqx.is_inexact_array)
    kept, form = eqx.partition((out, known), eqx.is_array)

    @jax.custom_jvp
    def call(numbers, arrays, kept):
        return eqx.combine(kept, form)[0]

    @call.defjvp
    def _(primals, dots):
        numbers, arrays, kept = primals
        of = lambda numbers: eqx.combine(numbers, arrays, static)
        out, (_, known) = call(*primals), eqx.combine(kept, form)
        return out, tangents(of, numbers, dots[0], out, known)

    return eqx.combine(call(numbers, arrays, kept), fixed)


def with_nan(chain: VectorChain, x0: Array, rest: PyTree) -> PyTree:
    """Numbers whose derivatives are NaN, where they are asked for."""

    def tangents(of, numbers, dots, out, known):
        total = sum(jnp.sum(dot) for dot in jtu.tree_leaves(dots))
        like = lambda a: jnp.broadcast_to(total, a.shape).astype(a.dtype)
        return refused(jtu.tree_map(like, out), True)

    return connected(tangents, (chain, x0), rest, None)


def _refuse(*args):
    raise NotImplementedError(
        "With `adjoint=dp.NoAdjoint()` a solution has no derivatives: leave it out for "
        "those of `dp.ImplicitAdjoint()`, or wrap x0 and the numbers of the problem in "
        "`jax.lax.stop_gradient`."
    )


def refused(tree: PyTree, when: Any) -> PyTree:
    """The tree, or NaN in it, and in what is transposed through it.

    A factor of NaN would do the same to what is not asked for.
    """
    vector, unravel = ravel_pytree(tree)
    solve = lambda _, b: jnp.where(when, jnp.nan, b)
    found = lax.custom_linear_solve(lambda b: b, vector, solve, symmetric=True)
    return unravel(found)
