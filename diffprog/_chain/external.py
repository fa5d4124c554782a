"""Dynamics outside of JAX: a simulator that computes with NumPy."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._common.changes import Same
from .._common.tree import Layout
from .._common.types import check_function
from .derivatives import check_jacobian, Differentiated, FiniteDifferences


class Outside(eqx.Module):
    """A function that runs outside of the compiled program, one or many rows at once.

    - `fn`: it, looked at no further: what it captures is read at each call.
    - `vectorized`: whether it takes arrays with a row for each call.
    - `is_jacobian`: whether it returns `(A, B)`, and not the next state.
    """

    fn: Same = eqx.field(static=True)
    vectorized: bool = eqx.field(static=True)
    is_jacobian: bool = eqx.field(static=True)

    def __call__(self, x: PyTree, u: PyTree, t: int | Int[Array, ""]) -> PyTree:
        dtype = jtu.tree_leaves(x)[0].dtype
        layouts = tuple(Layout.of(tree, dtype) for tree in (x, u))
        out, (n, m) = layouts[0], (layout.size for layout in layouts)
        if self.is_jacobian:
            zeros = jnp.zeros((n, n)), jnp.zeros((n, m))
            out = Layout.of(zeros, dtype)
        z = jnp.concatenate([layouts[0].ravel(x), layouts[1].ravel(u)])
        host = ft.partial(_host, self, layouts, out)
        shape = jax.ShapeDtypeStruct((out.size,), dtype)
        new = jax.pure_callback(host, shape, z, t, vmap_method="broadcast_all")
        return out.unravel(new)


def _host(outside: Outside, layouts: tuple, out: Layout, z: Any, t: Any) -> np.ndarray:
    """Calls the function for all rows that are finite; the others are NaN."""
    z, t = np.asarray(z), np.asarray(t)
    zs, ts = z.reshape(-1, z.shape[-1]), t.reshape(-1)
    good = np.isfinite(zs).all(1)
    results = np.full((len(zs), out.size), np.nan, z.dtype)
    if outside.vectorized and good.any():
        results[good] = _called(outside, layouts, out, zs[good], ts[good])
    elif not outside.vectorized:
        for i in np.flatnonzero(good):
            results[i] = _called(outside, layouts, out, zs[i], int(ts[i]))
    return results.reshape((*z.shape[:-1], out.size))


def _called(outside: Outside, layouts: tuple, out: Layout, z: np.ndarray, t: Any):
    """What the function returns, raveled; an error says what it was given."""
    fn, lead, n = outside.fn.value, z.shape[:-1], layouts[0].size
    name = getattr(fn, "__qualname__", type(fn).__name__)
    parts = lambda: (_tree(layouts[0], z[..., :n]), _tree(layouts[1], z[..., n:]), t)
    given = parts()
    try:
        found = fn(*given)
    except Exception as error:
        raise RuntimeError(
            f"`{name}`, of `dp.external`, raised {type(error).__name__}: {error}. It "
            f"was given (x, u, t) = {parts()!r:.500}."
        ) from error
    if outside.is_jacobian and isinstance(found, list):
        found = tuple(found)
    leaves, treedef = jtu.tree_flatten(found)
    leaves = [*map(np.asarray, leaves)]
    shapes = tuple(leaf.shape for leaf in leaves)
    if treedef != out.treedef or shapes != tuple((*lead, *s) for s in out.shapes):
        wanted = out.treedef.unflatten([(*lead, *shape) for shape in out.shapes])
        kind = "(A, B)" if outside.is_jacobian else "the next state"
        raise ValueError(
            f"`{name}`, of `dp.external`, returned the shapes "
            f"{treedef.unflatten(shapes)}; {wanted} is expected, that of {kind}"
            + " for each row" * bool(lead)
            + "."
        )
    for leaf in leaves:
        if leaf.dtype.kind not in "fiu":
            raise TypeError(
                f"`{name}`, of `dp.external`, returned an array of dtype {leaf.dtype}; "
                "real numbers are expected."
            )
    return np.concatenate([leaf.reshape((*lead, -1)) for leaf in leaves], axis=-1)


def _tree(layout: Layout, rows: np.ndarray) -> PyTree:
    """A state or control, or rows of them, in arrays that the function may change."""
    leaves, start = [], 0
    for shape in layout.shapes:
        stop = start + math.prod(shape)
        part = rows[..., start:stop].copy()
        leaves.append(part.reshape((*rows.shape[:-1], *shape)))
        start = stop
    return jtu.tree_unflatten(layout.treedef, leaves)


def external(
    fn: Callable,
    jacobian: FiniteDifferences | Callable = FiniteDifferences(),
    *,
    vectorized: bool = False,
) -> Callable:
    r"""Dynamics that are no program of JAX: a simulator, called with NumPy's arrays.

    A solve, a batch or a roll-out leaves the compiled program for each call, by
    `jax.pure_callback`. That costs about 0.3 ms besides what the function takes, and
    loops that contain it are ordinary ones: see `fast_loops` of [`diffprog.solve`][].

    **Arguments:**

    - `fn`: `(x, u, t) -> x`, with arrays of NumPy (or pytrees of them) like x0 and like
        one row of `us`, and t a Python int. The next state depends on these alone: a
        simulator with a memory is set to x at each call. It may be called in any
        order, and more or less often than a solve has stages. Only finite x and u
        reach it; the next state of others is NaN, and trials that come there are
        rejected.
    - `jacobian`: a [`diffprog.FiniteDifferences`][], by 2 (n + m) calls of `fn` for a
        stage, or a function `(x, u, t) -> (A, B)` of NumPy's arrays, shapes `(n, n)`
        and `(n, m)`, raveled where states or controls are pytrees.
    - `vectorized`: whether `fn`, and `jacobian` where it is a function, take many calls
        at once: all arrays, t too, with a row for each call in front, one row at
        least. All stages, finite differences and problems of a batch then come in one
        call, but for roll-outs, which go stage by stage.

    **Returns:** a module, to be called as `dynamics(x, u, t)`; numbers of `fn` are
    brought to the dtype of x. Unlike numbers that functions of JAX capture, those of
    `fn` are read when it runs; a new function compiles again.

    **Raises:** `TypeError` and `ValueError` for other arguments. What `fn` raises, and
    results of another shape, end the solve with a `jax.errors.JaxRuntimeError` whose
    message ends in what came and with which x, u and t. Second derivatives are not
    known: [`diffprog.DDP`][] and [`diffprog.Newton`][] raise `TypeError`.
    """
    check_function("fn", fn, "(x, u, t) -> x")
    check_jacobian(jacobian, ())
    if not isinstance(vectorized, bool):
        raise TypeError(f"`vectorized` is {vectorized!r}; True or False is expected.")
    if not isinstance(jacobian, FiniteDifferences):
        jacobian = Outside(Same(jacobian), vectorized, True)
    return Differentiated(Outside(Same(fn), vectorized, False), jacobian, None)
