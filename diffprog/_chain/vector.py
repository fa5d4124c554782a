"""Chains of vectors, traced once: what every recursion of the library runs on."""

import functools as ft
from collections.abc import Callable
from dataclasses import replace
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
from .constraints import Duals
from .limits import can_be_kept, cut_off
from .segment import End, judge, Segment


class VectorChain(eqx.Module):
    """A chain whose states and controls are vectors: what the recursions run on.

    Data that have a row per stage are tuples with one stacked array per segment.
    `scan` and `map` are the only loops over its stages. `limits` are the lower and the
    upper ones of the controls; empty if there are none. In local coordinates
    `references` are the states, and those after them.
    """

    segments: tuple[Segment, ...]
    end: End
    dtype: Any = eqx.field(static=True)
    limits: tuple[Rows, ...] = ()
    names: tuple[str, ...] = eqx.field(static=True, default=())  # of the constraints
    duals: Duals | None = None
    penalties: tuple[Array, ...] = ()  # of the entries of every segment, and of the end
    references: tuple[Rows, ...] = ()
    loops: Loops = eqx.field(static=True, default="plain")

    def priced(self, duals: Duals) -> "VectorChain":
        """The chain whose costs are augmented Lagrangians."""
        return replace(self, duals=duals, penalties=duals.penalties)

    def around(
        self, trajectory: "VectorTrajectory", gaps: bool | None = None
    ) -> "tuple[VectorChain, VectorTrajectory]":
        """In local coordinates: states are differences from those of the trajectory.

        Where states are vectors without gaps the chain is as good as it is. Whether
        there may be `gaps` the trajectory knows unless they are given.
        """
        gaps = trajectory.gaps is not None if gaps is None else gaps
        charts = [*(segment.chart for segment in self.segments), self.end.chart]
        if all(chart.is_flat for chart in charts) and not gaps:
            return self, trajectory
        zero = lambda x, chart: jnp.zeros((*x.shape[:-1], chart.size), x.dtype)
        xs, final = trajectory.xs, trajectory.final
        *zeros, last = vary(tuple(map(zero, (*xs, final), charts)), like=trajectory)
        chain = replace(
            self,
            segments=tuple(replace(s, has_gaps=gaps) for s in self.segments),
            end=self.end.around(final),
            references=(xs, following(xs, final)),
        )
        return chain, replace(trajectory, xs=tuple(zeros), final=last)

    @property
    def has_gaps(self) -> bool:
        """Whether a state may differ from what the dynamics give."""
        return self.segments[0].has_gaps

    @property
    def _end(self) -> End:
        if self.duals is None:
            return self.end
        return self.end.priced(self.duals.terminal, self.penalties[-1])

    @property
    def terminal_cost(self) -> Callable:
        """(x) -> scalar."""
        return self._end.cost

    def terminal_cost_near(self, x: Array) -> Callable:
        """The same as `cost_near` of a segment at the last state."""
        return self._end.cost_near(x)

    @property
    def no_duals(self) -> Duals:
        """Multipliers of 0, and no penalties."""
        zeros = lambda *shape: jnp.zeros(shape, self.dtype)
        rows = [part.rows for part in (*self.segments, self.end)]
        groups = tuple(r.groups if r else () for r in rows)
        stages = tuple(
            zeros(s.horizon, len(s.rows.groups)) if s.rows else None
            for s in self.segments
        )
        last = zeros(len(groups[-1])) if groups[-1] else None
        penalty = jnp.full(len(self.names), jnp.nan, self.dtype)
        return Duals(stages, last, penalty, groups)

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

        def stage(segment, carry, own, *row):
            return fn(seen(segment, *own), carry, *row)

        seen = self._seen
        return chained(run, self.segments, carry, (self._own, *data), reverse)

    def map(self, fn: Callable, *data: tuple) -> tuple:
        """`out = fn(segment, *row)` at every stage: all at once, or one by one."""
        if self.loops == "fused":
            step = lambda segment, carry, *row: (carry, fn(segment, *row))
            return self.scan(step, None, *data)[1]

        def stage(segment, own, *row):
            return fn(seen(segment, *own), *row)

        seen = self._seen
        return tuple(
            jax.vmap(ft.partial(stage, segment))(*rows)
            for segment, *rows in zip(self.segments, self._own, *data, strict=True)
        )

    @property
    def _own(self) -> tuple:
        """The rows of the chain itself, which `_seen` takes."""
        duals = self.duals.stages if self.duals else (None,) * len(self.segments)
        return tuple(zip(duals, *self.references, strict=True))

    @property
    def _seen(self) -> Callable:
        """Of a segment and its own row: what the recursions see at a stage."""
        starts = (segment.start for segment in self.segments)
        of = dict(zip(starts, self.penalties, strict=False))

        def seen(segment: Segment, dual: Array | None, *references: Array) -> Segment:
            if references:
                segment = segment.between(*references)
            return segment.priced(dual, of.get(segment.start))

        return seen

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
    """States, controls and cost of a roll-out of a `VectorChain`.

    `gaps` are known where it began with states that were given.
    """

    xs: Rows
    final: Float[Array, " _"]
    us: Rows
    cost: Float[Array, ""]
    first_nonfinite: Int[Array, ""]
    gaps: "Gaps | None" = None

    def left(self, chain: VectorChain, stepsize: Array) -> "Gaps | None":
        """The gaps after a step, if there were some."""
        gaps, keep = self.gaps, 1 - stepsize
        if gaps is None:
            return None
        rows = chain.map(lambda _, gap: keep * gap, gaps.rows)
        return Gaps(rows, keep * gaps.largest, keep * gaps.total)


class Gaps(eqx.Module):
    """How far the dynamics are from the next state, in local coordinates there.

    - `rows`: f - x of every stage.
    - `largest`, `total`: the largest absolute entry, and the sum of all.
    """

    rows: Rows
    largest: Float[Array, ""]
    total: Float[Array, ""]


def following(xs: Rows, final: Array) -> Rows:
    """The state after that of every stage."""
    firsts = [*(rows[0] for rows in xs[1:]), final]
    # A segment of one stage may change the shape of the state.
    after = lambda rows, last: jnp.concatenate([rows, last[None]])
    pairs = zip(xs, firsts, strict=True)
    return tuple(after(x[1:], a) if len(x) > 1 else a[None] for x, a in pairs)


def preceding(first: Array, after: Rows) -> Rows:
    """What belongs to the state of every stage, given what belongs to the next ones."""
    starts = [first, *(rows[-1] for rows in after)]
    before = lambda a, rows: jnp.concatenate([a[None], rows[:-1]][: len(rows)])
    return tuple(map(before, starts, after))


def simulate(
    chain: VectorChain,
    control: Callable,
    x0: Array,
    memory: PyTree,
    *data: tuple,
    gaps: Gaps | None = None,
):
    """x_{t+1} = f_t(x_t, u_t) from x0 and its cost: the trajectory, and the `out`s.

    `u, memory, out = control(segment, x, memory, *row)`, with a row of `data` for every
    stage. Where there are `gaps`, each next state is that much less.
    """
    fused = chain.loops == "fused"

    def stage(segment, carry, t, gap, *row):
        x, memory, total = carry
        u, memory, out = control(segment, x, memory, *row)
        if fused:  # one loop; else the costs of all stages at once
            h, finite = judge(segment, x, u, t)
            cost, first = total
            total = cost + h, jnp.where(finite, first, jnp.minimum(first, t))
        new = segment.dynamics(x, u, t)
        if gaps is not None:
            new = segment.next_chart.retract(new, -gap)
        return (new, memory, total), (x, u, out)

    T, total = chain.horizon, None
    if fused:
        total = jnp.zeros_like(x0[0]), jnp.full_like(chain.ts[0][0], T + 1)
    start = vary((x0, memory, total), like=(x0, data))
    left = gaps.rows if gaps else (None,) * len(chain.segments)
    (final, _, total), rows = chain.scan(stage, start, chain.ts, left, *data)
    xs, us, outs = zip(*rows, strict=True)
    if not fused:
        costs, finite = zip(*chain.map(judge, xs, us, chain.ts), strict=True)
        total = sum(map(jnp.sum, costs)), first_false(chain, finite, True)
    cost, first = total
    last = chain.terminal_cost(final)
    end = jnp.where(all_finite(final, last), first, jnp.minimum(first, T))
    return VectorTrajectory(xs, final, us, cost + last, end, gaps), outs


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


def through(chain: VectorChain, xs: Rows, final: Array, us: Rows) -> VectorTrajectory:
    """Given states and controls, and gaps where the dynamics say another state."""

    def stage(segment, x, u, t, x_next):
        new = segment.dynamics(x, u, t)
        h, finite = judge(segment, x, u, t)
        gap = -segment.next_chart.difference(x_next, new)
        sizes = jnp.max(jnp.abs(gap)), jnp.sum(jnp.abs(gap))
        return h, finite & all_finite(gap), gap, *sizes

    found = chain.map(stage, xs, us, chain.ts, following(xs, final))
    costs, finite, gaps, largest, totals = zip(*found, strict=True)
    last = chain.terminal_cost(final)
    cost = sum(map(jnp.sum, costs)) + last
    first = first_false(chain, finite, all_finite(final, last))
    sizes = jnp.max(jnp.concatenate(largest)), jnp.sum(jnp.concatenate(totals))
    known = Gaps(gaps, *sizes)
    return VectorTrajectory(xs, final, us, cost, first, known)
