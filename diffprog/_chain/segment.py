"""One phase as functions of vectors, and the last state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._common.linalg import matmul
from .._common.tree import all_finite
from .constraints import Rows as RowSet
from .manifold import Chart


class AbstractCosts(eqx.Module):
    """A cost and constraints, functions of vectors (and of the stage)."""

    cost: eqx.AbstractVar[Callable]  # -> scalar
    rows: eqx.AbstractVar[RowSet | None]  # constraints
    chart: eqx.AbstractVar[Chart]  # of the states
    linear_rows: eqx.AbstractVar[Callable | None]

    def priced(self, dual: Array | None, penalties: Array | None) -> Any:
        """With the augmented Lagrangian of its constraints in the cost."""
        rows = self.rows
        if rows is None or dual is None or penalties is None:
            return self
        merit = lambda values: rows.merit(values, dual, penalties)
        cost = lambda *at: self.cost(*at) + merit(rows.values(*at))

        def linear(*at):
            z, t = at[:2], at[2:]
            near = linearized(lambda *z: rows.values(*z, *t), *z)
            return lambda *z: self.cost(*z, *t) + merit(near(*z))

        return replace(self, cost=cost, linear_rows=linear)

    def cost_near(self, *at: Array) -> Callable:
        """The cost with constraints linearized at a point: for Gauss-Newton."""
        if self.linear_rows is None:
            return lambda *z: self.cost(*z, *at[2:])
        return self.linear_rows(*at)

    def around(self, x: Array, **changes: Any) -> Any:
        """In local coordinates at a state: for derivatives there."""
        chart, rows = self.chart.for_derivatives, self.rows
        local = lambda fn: lambda v, *rest: fn(chart.retract(x, v), *rest)
        rows = rows and replace(rows, values=local(rows.values))
        changes |= dict(rows=rows, chart=Chart.flat(chart.size))
        return replace(self, cost=local(self.cost), **changes)


class End(AbstractCosts):
    """The last state."""

    cost: Callable  # (x) -> scalar
    rows: RowSet | None
    chart: Chart
    linear_rows: Callable | None = None


class Segment(AbstractCosts):
    """One phase as functions of vectors, traced once."""

    cost: Callable  # (x, u, t) -> scalar
    rows: RowSet | None
    chart: Chart
    dynamics: Callable  # (x, u, t) -> x
    next_chart: Chart
    start: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)
    linear_rows: Callable | None = None
    has_gaps: bool = eqx.field(static=True, default=False)

    def difference(self, x: Array, y: Array) -> Array:
        """x minus y, two states of the segment."""
        return self.chart.difference(x, y)

    def between(self, x: Array, x_next: Array) -> "Segment":
        """In local coordinates at a state and at the one after it."""
        here, there = self.chart.for_derivatives, self.next_chart
        if not self.has_gaps:  # with gaps v is not 0 there
            there = there.for_derivatives

        def dynamics(v, u, t):
            return there.difference(self.dynamics(here.retract(x, v), u, t), x_next)

        flat = Chart.flat(there.size)
        return self.around(x, dynamics=dynamics, next_chart=flat)


def judge(segment: Segment, x: Array, u: Array, t: Array):
    """The cost of a stage, and whether all is finite."""
    h = segment.cost(x, u, t)
    return h, all_finite(x, u, h)


def linearized(fn: Callable, *at: Array) -> Callable:
    """`fn` of vectors, of first order around a point."""
    sizes = np.cumsum([len(x) for x in at])[:-1]
    of = lambda z: fn(*jnp.split(z, sizes))
    z = jnp.concatenate(at)
    value, slope = of(z), jax.jacfwd(of)(z)
    return lambda *args: value + matmul(slope, jnp.concatenate(args) - z)
