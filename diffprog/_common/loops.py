"""Loops that also run inside `shard_map`, whatever their carries start from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from .tree import vary, where


def chained(
    run: Callable, parts: Sequence, carry: PyTree, data: tuple, reverse: bool
) -> tuple[PyTree, tuple]:
    """`carry, out = run(part, carry, *row)` from part to part of a chain."""
    outs: list[Any] = [None] * len(parts)
    for i in reversed(range(len(parts))) if reverse else range(len(parts)):
        carry, outs[i] = run(parts[i], carry, *(column[i] for column in data))
    return carry, tuple(outs)


def scan(fn: Callable, carry: PyTree, rows: PyTree = None, **options: Any):
    """`lax.scan`."""
    return lax.scan(fn, vary(carry, like=(carry, rows)), rows, **options)


def while_loop(
    unfinished: Callable,
    step: Callable,
    carry: PyTree,
    like: PyTree = None,
    limit: Any = 2**31 - 1,
) -> PyTree:
    """`lax.while_loop` of at most `limit` rounds; `like` is what the functions capture.

    Where a condition reads one part of the carry alone, such as `done`, XLA takes that
    for a counter, and clones all that it is computed from, often the whole body, again
    and again, to find out how it counts: half of the time to compile DDP for an arm.
    So every condition reads the count of rounds as well.
    """
    counted = vary((jnp.zeros((), jnp.int32), carry), like=(carry, like))
    on = lambda counted: (counted[0] < limit) & unfinished(counted[1])
    return lax.while_loop(on, lambda c: (c[0] + 1, step(c[1])), counted)[1]


def for_each(number: int, step: Callable, carry: PyTree, like: PyTree = None) -> PyTree:
    """`carry = step(i, carry)` for every i below this number."""
    return lax.fori_loop(0, number, step, vary(carry, like=(carry, like)))


def repeat(
    step: Callable,
    carry: PyTree,
    limit: Any,
    *,
    go_on: Callable | None = None,
    unroll: bool = False,
) -> PyTree:
    """`carry = step(carry)`, `limit` times; less often where `go_on(carry)` is false.

    Unrolled it is written out: convolutions in loops are slow on the CPU.
    """
    if go_on is None and not unroll and limit > 1:
        return for_each(limit, lambda _, carry: step(carry), carry)
    if go_on is None or unroll:
        for _ in range(limit):
            new = step(carry)
            carry = new if go_on is None else where(go_on(carry), new, carry)
        return carry
    return while_loop(go_on, step, carry, limit=limit)
