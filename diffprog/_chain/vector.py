"""Chains of vectors, traced once: what every recursion of the library runs on."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._common.fast_loops import Loops, scan
from .._common.linalg import matmul
from .._common.loops import chained
from .._common.tree import all_finite, vary
from .._common.types import Rows
from .constraints import Duals, Rows as RowSet
from .limits import can_be_kept, cut_off


class Segment(eqx.Module):
    """One phase as functions of vectors, traced once."""

    dynamics: Callable = eqx.field(static=True)  # (x, u, t) -> x
    cost: Callable = eqx.field(static=True)  # (x, u, t) -> scalar
    start: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)
    rows: RowSet | None = None  # constraints
    linear_rows: Callable | None = eqx.field(static=True, default=None)

    def priced(self, dual: Array | None, penalties: Array | None) -> "Segment":
        """With the augmented Lagrangian of its constraints in the cost."""
        rows = self.rows
        if rows is None or dual is None or penalties is None:
            return self
        merit = lambda values: rows.merit(values, dual, penalties)

        def cost(x, u, t):
            return self.cost(x, u, t) + merit(rows.values(x, u, t))

        def linear(x, u, t):
            near = linearized(lambda x, u: rows.values(x, u, t), x, u)
            return lambda x, u: self.cost(x, u, t) + merit(near(x, u))

        return dataclasses.replace(self, cost=cost, linear_rows=linear)

    def cost_near(self, x: Array, u: Array, t: Array) -> Callable:
        """The cost with constraints linearized at a point: for Gauss-Newton."""
        if self.linear_rows is None:
            return lambda x, u: self.cost(x, u, t)
        return self.linear_rows(x, u, t)

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
    terminal_rows: RowSet | None = None
    names: tuple[str, ...] = eqx.field(static=True, default=())  # of the constraints
    duals: Duals | None = None
    penalties: tuple[Array, ...] = ()  # of the entries of every segment
    linear_terminal: Callable | None = eqx.field(static=True, default=None)
    loops: Loops = eqx.field(static=True, default="plain")

    def priced(self, duals: Duals) -> "VectorChain":
        """The chain whose costs are augmented Lagrangians; `self` has none."""
        *penalties, last = duals.penalties
        changed: Any = dict(duals=duals, penalties=tuple(penalties))
        rows, dual = self.terminal_rows, duals.terminal
        if rows is not None and dual is not None:
            merit = lambda values: rows.merit(values, dual, last)
            changed["terminal_cost"] = lambda x: (
                self.terminal_cost(x) + merit(rows.values(x))
            )

            def linear(x):
                near = linearized(rows.values, x)
                return lambda x: self.terminal_cost(x) + merit(near(x))

            changed["linear_terminal"] = linear
        return dataclasses.replace(self, **changed)

    @property
    def no_duals(self) -> Duals:
        """Multipliers of 0, and no penalties."""
        zeros = lambda *shape: jnp.zeros(shape, self.dtype)
        rows = [*(segment.rows for segment in self.segments), self.terminal_rows]
        groups = tuple(r.groups if r else () for r in rows)
        stages = tuple(
            zeros(s.horizon, len(s.rows.groups)) if s.rows else None
            for s in self.segments
        )
        last = zeros(len(groups[-1])) if groups[-1] else None
        penalty = jnp.full(len(self.names), jnp.nan, self.dtype)
        return Duals(stages, last, penalty, groups)

    def terminal_cost_near(self, x: Array) -> Callable:
        """The same as `Segment.cost_near` at the last state."""
        if self.linear_terminal is None:
            return self.terminal_cost
        return self.linear_terminal(x)

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
                body = lambda carry, row: stage(segment, carry, *row)
                return scan(body, carry, rows, reverse, self.loops)
            row = jtu.tree_map(lambda a: a[0], rows)
            carry, out = stage(segment, carry, *row)
            return carry, jtu.tree_map(lambda a: a[None], out)

        def stage(segment, carry, dual, *row):
            return fn(segment.priced(dual, own[segment.start]), carry, *row)

        own = self._penalties

        return chained(run, self.segments, carry, (self._dual_rows, *data), reverse)

    def map(self, fn: Callable, *data: tuple) -> tuple:
        """`out = fn(segment, *row)` at every stage: all at once, or one by one."""
        if self.loops == "fused":
            step = lambda segment, carry, *row: (carry, fn(segment, *row))
            return self.scan(step, None, *data)[1]

        def stage(segment, dual, *row):
            return fn(segment.priced(dual, own[segment.start]), *row)

        own = self._penalties

        return tuple(
            jax.vmap(ft.partial(stage, segment))(*rows)
            for segment, *rows in zip(
                self.segments, self._dual_rows, *data, strict=True
            )
        )

    @property
    def _dual_rows(self) -> tuple:
        return self.duals.stages if self.duals else (None,) * len(self.segments)

    @property
    def _penalties(self) -> dict[int, Array | None]:
        none = (None,) * len(self.segments)
        starts = (segment.start for segment in self.segments)
        return dict(zip(starts, self.penalties or none, strict=True))

    def within(self, us: Rows) -> Rows:
        """The controls, cut off at their limits; NaN where these are crossed."""
        if not self.limits:
            return us
        return self.map(lambda _, *row: cut_off(*row), us, *self.limits)

    @property
    def is_crossed(self) -> Bool[Array, ""]:
        """Whether a lower limit is above the upper one, or one that none can keep."""
        crossed = lambda _, lower, upper: ~jnp.all(can_be_kept(lower, upper))
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


def linearized(fn: Callable, *at: Array) -> Callable:
    """`fn` of vectors, of first order around a point."""
    sizes = np.cumsum([len(x) for x in at])[:-1]
    of = lambda z: fn(*jnp.split(z, sizes))
    z = jnp.concatenate(at)
    value, slope = of(z), jax.jacfwd(of)(z)
    return lambda *args: value + matmul(slope, jnp.concatenate(args) - z)


def first_false(chain: VectorChain, flags: tuple, last: Array | bool) -> Int[Array, ""]:
    """The first stage whose flag is false; T for `last` only, T + 1 if all are true."""
    T = chain.horizon
    when = lambda flag, t: jnp.min(jnp.where(flag, T + 1, t).astype(jnp.int32))
    stages = [when(flag, t) for flag, t in zip(flags, chain.ts, strict=True)]
    return ft.reduce(jnp.minimum, [*stages, when(last, T)])


def objective(chain: VectorChain, trajectory: VectorTrajectory) -> Float[Array, ""]:
    """The sum of all costs, priced or not."""
    cost = lambda segment, *row: segment.cost(*row)
    costs = chain.map(cost, trajectory.xs, trajectory.us, chain.ts)
    return sum(map(jnp.sum, costs), chain.terminal_cost(trajectory.final))


def run(chain: VectorChain, x0: Array, us: tuple) -> VectorTrajectory:
    """x_{t+1} = f_t(x_t, u_t) from x0, and the cost."""
    given = lambda segment, x, memory, u: (u, memory, None)
    return simulate(chain, given, x0, None, us)[0]
