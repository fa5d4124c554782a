"""Chains of vectors, traced once: what every recursion of the library runs on."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._common.fast_loops import Loops, scan
from .._common.loops import chained
from .._common.tree import all_finite, vary
from .._common.types import Rows
from .limits import cut_off


class Segment(eqx.Module):
    """One phase as functions of vectors, traced once."""

    dynamics: Callable = eqx.field(static=True)  # (x, u, t) -> x
    cost: Callable = eqx.field(static=True)  # (x, u, t) -> scalar
    start: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    @staticmethod
    def difference(x: Array, y: Array) -> Array:
        """x minus y, two states of the segment."""
        return x - y


class VectorChain(eqx.Module):
    """A chain whose states and controls are vectors: what the recursions run on.

    Data that have a row per stage are tuples with one stacked array per segment.
    `scan` and `map` are the only loops over its stages. `limits` are the lower and the
    upper ones of the controls; empty if there are none.
    """

    segments: tuple[Segment, ...]
    terminal_cost: Callable = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    limits: tuple[Rows, ...] = ()
    loops: Loops = eqx.field(static=True, default="plain")

    @property
    def recomputes(self) -> bool:
        """Whether finding derivatives again costs no more than reading them."""
        return self.loops == "fused"

    @property
    def horizon(self) -> int:
        return sum(segment.horizon for segment in self.segments)

    @property
    def ts(self) -> tuple[Int[Array, " stages"], ...]:
        """The index of every stage."""
        return tuple(
            jnp.arange(s.start, s.start + s.horizon, dtype=jnp.int32)
            for s in self.segments
        )

    def scan(self, fn: Callable, carry: PyTree, *data: tuple, reverse: bool = False):
        """`carry, out = fn(segment, carry, *row)` from stage to stage.

        A segment of one stage is called directly, so its carry may change shape.
        """

        def run(segment, carry, *rows):
            if segment.horizon > 1:
                body = lambda carry, row: fn(segment, carry, *row)
                return scan(body, carry, rows, reverse, self.loops)
            row = jtu.tree_map(lambda a: a[0], rows)
            carry, out = fn(segment, carry, *row)
            return carry, jtu.tree_map(lambda a: a[None], out)

        return chained(run, self.segments, carry, data, reverse)

    def map(self, fn: Callable, *data: tuple) -> tuple:
        """`out = fn(segment, *row)` at every stage: all at once, or one by one."""
        if self.loops == "fused":
            step = lambda segment, carry, *row: (carry, fn(segment, *row))
            return self.scan(step, None, *data)[1]
        return tuple(
            jax.vmap(lambda *row, segment=segment: fn(segment, *row))(*rows)
            for segment, *rows in zip(self.segments, *data, strict=True)
        )

    def within(self, us: Rows) -> Rows:
        """The controls, cut off at their limits; NaN where these are crossed."""
        if not self.limits:
            return us
        return self.map(lambda _, *row: cut_off(*row), us, *self.limits)

    @property
    def is_crossed(self) -> Bool[Array, ""]:
        """Whether a lower limit is above the upper one, or one of them NaN."""
        crossed = lambda _, lower, upper: ~jnp.all(lower <= upper)
        return jnp.any(jnp.concatenate(self.map(crossed, *self.limits)))


class VectorTrajectory(eqx.Module):
    """States, controls and cost of a roll-out of a `VectorChain`."""

    xs: Rows
    final: Float[Array, " _"]
    us: Rows
    cost: Float[Array, ""]
    first_nonfinite: Int[Array, ""]


def simulate(chain: VectorChain, control: Callable, x0: Array, memory: PyTree, *data):
    """x_{t+1} = f_t(x_t, u_t) from x0 and its cost: the trajectory, and the `out`s.

    `u, memory, out = control(segment, x, memory, *row)`, with a row of `data` for every
    stage.
    """
    fused = chain.loops == "fused"

    def judge(segment, x, u, t):
        h = segment.cost(x, u, t)
        return h, all_finite(x, u, h)

    def stage(segment, carry, t, *row):
        x, memory, total = carry
        u, memory, out = control(segment, x, memory, *row)
        if fused:  # one loop; else the costs of all stages at once
            h, finite = judge(segment, x, u, t)
            cost, first = total
            total = cost + h, jnp.where(finite, first, jnp.minimum(first, t))
        return (segment.dynamics(x, u, t), memory, total), (x, u, out)

    T, total = chain.horizon, None
    if fused:
        total = jnp.zeros_like(x0[0]), jnp.full_like(chain.ts[0][0], T + 1)
    start = vary((x0, memory, total), like=(x0, data))
    (final, _, total), rows = chain.scan(stage, start, chain.ts, *data)
    xs, us, outs = zip(*rows, strict=True)
    if not fused:
        costs, finite = zip(*chain.map(judge, xs, us, chain.ts), strict=True)
        total = sum(map(jnp.sum, costs)), first_false(chain, finite, True)
    cost, first = total
    last = chain.terminal_cost(final)
    end = jnp.where(all_finite(final, last), first, jnp.minimum(first, T))
    return VectorTrajectory(xs, final, us, cost + last, end), outs


def first_false(chain: VectorChain, flags: tuple, last: Array | bool) -> Int[Array, ""]:
    """The first stage whose flag is false; T for `last` only, T + 1 if all are true."""
    T = chain.horizon
    when = lambda flag, t: jnp.min(jnp.where(flag, T + 1, t).astype(jnp.int32))
    stages = [when(flag, t) for flag, t in zip(flags, chain.ts, strict=True)]
    return ft.reduce(jnp.minimum, [*stages, when(last, T)])


def run(chain: VectorChain, x0: Array, us: tuple) -> VectorTrajectory:
    """x_{t+1} = f_t(x_t, u_t) from x0, and the cost."""
    given = lambda segment, x, memory, u: (u, memory, None)
    return simulate(chain, given, x0, None, us)[0]
