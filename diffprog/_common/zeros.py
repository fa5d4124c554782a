"""Which entries of a Jacobian are 0 everywhere, as a program itself says."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array

from .primitives import BY_ENTRY


# Programs that are as if written out. Those with a derivative of their own are not.
INNER = dict(jit="jaxpr", pjit="jaxpr", closed_call="call_jaxpr")


def jacobian(fn: Callable, z: Array, least: int) -> Callable:
    """`jax.jacfwd(fn, has_aux=True)` of a vector z, with fewer products.

    Columns that have no row in common are found together: a diagonal by one product.
    That is done for vectors longer than `least` where it halves their number. XLA finds
    a Jacobian that is constant by itself.
    """
    plain = jax.jacfwd(fn, has_aux=True)
    if len(z) <= least:
        return plain
    pattern = nonzeros(lambda z: fn(z)[0], z)
    colors = _colors(pattern)
    count = max(colors) + 1
    along = lambda z: jax.jvp(lambda z: fn(z)[0], (z,), (jnp.ones_like(z),))[1]
    if 2 * count > len(z) or not nonzeros(along, z).any():
        return plain

    def call(z):
        seeds = jnp.asarray(np.arange(count)[:, None] == colors, z.dtype)
        push = lambda seed: jax.jvp(fn, (z,), (seed,), has_aux=True)[1:]
        rows, aux = jax.vmap(push, out_axes=(0, None))(seeds)
        found = jnp.concatenate([rows[color : color + 1] for color in colors])
        return jnp.where(pattern.T, found, 0).T, aux

    return call


def _colors(pattern: np.ndarray) -> list[int]:
    """A number for every column; those of one number have no row in common."""
    used: list[np.ndarray] = []
    colors = []
    for column in pattern.T:
        free = (i for i, rows in enumerate(used) if not (rows & column).any())
        color = next(free, len(used))
        if color == len(used):
            used.append(column)
        else:
            used[color] = used[color] | column
        colors.append(color)
    return colors


def nonzeros(fn: Callable, z: Array) -> np.ndarray:
    """False where the derivative of `fn(z)[i]` by `z[j]` is 0 for every z."""
    closed = jax.make_jaxpr(fn)(z)
    (found,) = _run(closed.jaxpr, [np.eye(len(z), dtype=bool)], len(z))
    return found


def _run(jaxpr: Jaxpr, inputs: list[np.ndarray], size: int) -> list[np.ndarray]:
    """For every entry of the outputs: the entries of z it is computed from."""
    known: dict[Any, np.ndarray] = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(v: Any) -> np.ndarray:
        aval, found = v.aval, None if type(v) is Literal else known.get(v)
        return np.zeros((*aval.shape, size), bool) if found is None else found

    for eqn in jaxpr.eqns:
        ins = [of(v) for v in eqn.invars]
        known |= zip(eqn.outvars, _apply(eqn, ins, size), strict=True)
    return [of(v) for v in jaxpr.outvars]


def _apply(eqn: Any, ins: list[np.ndarray], size: int) -> list[np.ndarray]:
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.outvars]
    if not any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars):
        return [np.zeros((*shape, size), bool) for shape in shapes]  # no derivative
    if name in INNER:
        return _run(params[INNER[name]].jaxpr, ins, size)
    if name in BY_ENTRY:
        start = np.zeros((*shapes[0], size), bool)
        return [ft.reduce(np.bitwise_or, ins, start)]
    if name in MOVES:
        return MOVES[name](ins, params, shapes)
    # Each number may be made from all.
    every = [a.reshape(-1, size).any(0) for a in ins]
    any_of = ft.reduce(np.bitwise_or, every, np.zeros(size, bool))
    return [np.broadcast_to(any_of, (*shape, size)) for shape in shapes]


def _broadcast(ins, params, shapes):
    (a,), (shape,), dims = ins, shapes, params["broadcast_dimensions"]
    lengths = dict(zip(dims, a.shape[:-1], strict=True))
    a = a.reshape(*(lengths.get(i, 1) for i in range(len(shape))), a.shape[-1])
    return [np.broadcast_to(a, (*shape, a.shape[-1]))]


def _slice(ins, params, _):
    steps = params["strides"] or (1,) * len(params["start_indices"])
    limits = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return [ins[0][tuple(slice(*limit) for limit in limits)]]


def _pad(ins, params, shapes):
    (a, value), (shape,) = ins, shapes
    out = np.broadcast_to(value, (*shape, value.shape[-1])).copy()
    places = []
    for axis, (low, _, between) in enumerate(params["padding_config"]):
        at = low + (between + 1) * np.arange(a.shape[axis])
        kept = (at >= 0) & (at < shape[axis])  # padding may be negative
        a = np.compress(kept, a, axis)
        places.append(at[kept])
    out[np.ix_(*places)] = a
    return [out]


def _reshape(ins, _, shapes):
    return [ins[0].reshape(*shapes[0], ins[0].shape[-1])]


def _split(ins, params, _):
    return np.split(ins[0], np.cumsum(params["sizes"])[:-1], params["axis"])


def _transpose(ins, params, _):
    return [ins[0].transpose(*params["permutation"], ins[0].ndim - 1)]


# What moves numbers, or adds them up: (inputs, parameters, shapes) -> outputs.
MOVES: dict[str, Callable] = dict(
    broadcast_in_dim=_broadcast,
    concatenate=lambda ins, params, _: [np.concatenate(ins, params["dimension"])],
    pad=_pad,
    reduce_sum=lambda ins, params, _: [ins[0].any(tuple(params["axes"]))],
    reshape=_reshape,
    rev=lambda ins, params, _: [np.flip(ins[0], params["dimensions"])],
    slice=_slice,
    split=_split,
    squeeze=_reshape,
    stack=lambda ins, params, _: [np.stack(ins, params["axis"])],
    transpose=_transpose,
    unstack=lambda ins, params, _: [*np.moveaxis(ins[0], params["axis"], 0)],
)
