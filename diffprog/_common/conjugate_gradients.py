from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .loops import repeat
from .tree import add, vdot


class CGState(NamedTuple):
    """Where conjugate gradients are."""

    x: PyTree
    r: PyTree  # b - A x
    p: PyTree  # the next direction
    rr: Float[Array, ""]  # the square of r
    steps: Int[Array, ""]
    bad: Bool[Array, ""]  # whether a curvature p'Ap was not positive


def conjugate_gradients(
    product: Callable,
    x: PyTree,
    r: PyTree,
    target: Array,
    limit: Any,
    unroll: bool = False,
    *,
    inner: Callable = vdot,
    measure: Callable = lambda r: (r, vdot(r, r)),
) -> CGState:
    """Solves A x = b from x, where r = b - A x, until the square of r is `target`.

    `product(p)` is A p. For other inner products than the Euclidean one `inner(p, Ap)`
    is p'Ap, and `measure(r)` is r as x has it, and its square. x is NaN where that is
    not finite.
    """

    def step(at: CGState) -> CGState:
        Ap = product(at.p)
        curvature = inner(at.p, Ap)
        bad = curvature <= 0
        a = jnp.where(bad, 0, _ratio(at.rr, curvature))
        x, r = add(at.x, at.p, a), add(at.r, Ap, -a)
        z, rr = measure(r)
        p = add(z, at.p, _ratio(rr, at.rr))
        return CGState(x, r, p, rr, at.steps + 1, bad)

    p, rr = measure(r)
    x = jtu.tree_map(lambda a: jnp.where(jnp.isfinite(rr), a, jnp.nan), x)
    # A product that is no inner product may have negative squares.
    start = CGState(x, r, p, rr, jnp.zeros((), jnp.int32), rr < 0)
    go_on = lambda at: (at.rr > target) & ~at.bad  # not where it is NaN
    return repeat(step, start, limit, go_on=go_on, unroll=unroll)


def solve_cg(
    product: Callable, b: PyTree, limit: Any, rtol: Any, unroll: bool = False
) -> PyTree:
    """x from 0 until |b - A x| <= rtol |b|; NaN where a curvature is not positive."""
    zero, bb = jtu.tree_map(jnp.zeros_like, b), vdot(b, b)
    target = (rtol**2 * bb).astype(bb.dtype)
    found = conjugate_gradients(product, zero, b, target, limit, unroll)
    return jtu.tree_map(lambda x: jnp.where(found.bad, jnp.nan, x), found.x)


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
