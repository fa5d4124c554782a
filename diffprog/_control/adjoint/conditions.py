"""The conditions of optimality of a chain, as one gradient.

With costates lam, multipliers y of the rows that are active, and the controls that are
at a limit put there, a solution is a stationary point of

    L = sum h_t + y_t' c_t + lam_{t+1}' (f_t(x_t, u_t) - x_{t+1})
        + h_T + y_T' c_T + lam_0' (x0 - x_0)

in states, controls, costates and multipliers together. All derivatives of a solution
are those of this gradient. States are local coordinates at those of the solution.
"""

import functools as ft
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ..._chain.constraints import Duals
from ..._chain.vector import following, preceding, VectorChain, VectorTrajectory
from ..._common.linalg import matmul
from ..._common.types import Rows
from ..lqr.expand import adjoints


class Point(eqx.Module):
    """States, controls and multipliers; or a change of them, in local coordinates.

    - `xs`, `final`, `us`: of the stages, and the last state.
    - `first`, `lams`: the costate of the first state, and of that after each stage.
    - `rows`, `end`: multipliers of the rows of constraints; `None` without.
    """

    xs: Rows
    final: Float[Array, " _"]
    us: Rows
    first: Float[Array, " _"]
    lams: Rows
    rows: tuple[Any, ...]
    end: Any

    @property
    def trajectory(self) -> VectorTrajectory:
        nan = jnp.full((), jnp.nan, self.final.dtype)
        stage = jnp.zeros((), jnp.int32)
        return VectorTrajectory(self.xs, self.final, self.us, nan, stage)


class Active(eqx.Module):
    """Which limits and rows hold with equality, and are pushed against.

    - `lower`, `upper`: of the controls.
    - `rows`, `end`: of the rows of constraints; `None` without.
    - `weak`: how many are met, but not pushed against. They count as inactive.
    """

    lower: tuple[Bool[Array, "_ _"], ...]
    upper: tuple[Bool[Array, "_ _"], ...]
    rows: tuple[Any, ...]
    end: Any
    weak: Float[Array, ""]

    @property
    def held(self) -> tuple[Any, ...]:
        """Whether a control is at a limit; `None` without limits."""
        if not self.lower:
            return (None,) * len(self.rows)
        return tuple(map(jnp.logical_or, self.lower, self.upper))

    def limits(self, chain: VectorChain) -> tuple[Any, ...]:
        """The limits of every stage, and which of them hold; empty without."""
        return (*chain.limits, self.lower, self.upper) if self.lower else ()

    def keep(self, chain: VectorChain, z: Point) -> Point:
        """Controls at their limits put there; no multipliers of inactive rows."""
        if not (self.lower or chain.names):
            return z
        data = z.us, z.rows, self.rows, *self.limits(chain)
        found = chain.map(lambda _, *row: kept(*row), *data)
        us, rows = zip(*found, strict=True)
        return replace(z, us=us, rows=rows, end=masked(z.end, self.end))


def kept(u, y, on, *limits):
    """A control, at its limit where it is held there, and the multipliers of rows."""
    if limits:
        low, high, lower, upper = limits
        u = jnp.where(lower, low, jnp.where(upper, high, u))
    return u, masked(y, on)


def masked(values: Any, on: Any) -> Any:
    """The entries that are on, and 0."""
    return None if values is None else jnp.where(on, values, 0)


def combined(chain: VectorChain, fn: Callable, *points: Point) -> Point:
    """`fn` of all numbers of points, stage after stage."""
    of = lambda p: tuple(zip(p.xs, p.us, p.lams, p.rows, strict=True))
    ends = lambda p: (p.final, p.first, p.end)
    each = lambda *trees: jtu.tree_map(fn, *trees)
    found = chain.map(lambda _, *rows: each(*rows), *map(of, points))
    xs, us, lams, rows = zip(*found, strict=True)
    final, first, end = each(*map(ends, points))
    return Point(xs, final, us, first, lams, rows, end)


def size_of(tree: PyTree) -> Float[Array, ""]:
    """The largest absolute value."""
    leaves = [jnp.ravel(jnp.abs(leaf)) for leaf in jtu.tree_leaves(tree)]
    return jnp.max(jnp.concatenate(leaves))


def localized(chain: VectorChain, at: Point) -> tuple[VectorChain, Point]:
    """The chain in local coordinates at a point whose multipliers price the rows."""
    if chain.names:
        groups = tuple(
            () if part.rows is None else part.rows.groups
            for part in (*chain.segments, chain.end)
        )
        none = jnp.zeros(len(chain.names), chain.dtype)
        chain = chain.priced(Duals(at.rows, at.end, none, groups))
    local, here = chain.around(at.trajectory, gaps=True)
    return local, replace(at, xs=here.xs, final=here.final)


class Conditions(eqx.Module):
    """L, and what is left of the conditions: minus its gradient.

    - `us`: the gradient in all controls, as if none were held.
    """

    value: Float[Array, ""]
    left: Point
    us: Rows


def conditions(
    chain: VectorChain, x0: Array, at: Point, active: Active, z: Point | None = None
) -> Conditions:
    """Those at z, in local coordinates at a point; at the point itself unless given."""
    z = localized(chain, at)[1] if z is None else z
    z = active.keep(chain, z)
    local, _ = localized(chain, replace(at, rows=z.rows, end=z.end))

    def stage(segment, v, u, t, before, lam, v_next, on, held):
        def hamiltonian(v, u):
            new = segment.dynamics(v, u, t)
            return segment.cost(v, u, t) + matmul(lam, new), new

        both = jax.value_and_grad(hamiltonian, (0, 1), has_aux=True)
        (value, new), (of_x, of_u) = both(v, u)
        rows, free = segment.rows, of_u if held is None else jnp.where(held, 0, of_u)
        left = before - of_x, -free, v_next - new
        rows = masked(rows and -rows.values(v, u, t), on)
        return value - matmul(lam, v_next), of_u, *left, rows

    data = z.xs, z.us, local.ts, preceding(z.first, z.lams), z.lams
    more = following(z.xs, z.final), active.rows, active.held
    found = local.map(stage, *data, *more)
    totals, in_us, xs, us, lams, rows = zip(*found, strict=True)
    last, final = jax.value_and_grad(local.terminal_cost)(z.final)
    start = chain.segments[0].difference(x0, at.xs[0][0]) - z.xs[0][0]
    value = sum(map(jnp.sum, totals)) + last + matmul(z.first, start)
    end = masked(local.end.rows and -local.end.rows.values(z.final), active.end)
    final = z.lams[-1][-1] - final
    return Conditions(value, Point(xs, final, us, -start, lams, rows, end), in_us)


def moved(chain: VectorChain, at: Point, change: Point, active: Active) -> Point:
    """The point after a change; costates are those in local coordinates there."""

    def back(chart, x, v, lam):
        new = chart.retract(x, v)
        if chart.is_flat:
            return new, lam
        # A covector in the coordinates at x, in those at the new state.
        to = lambda w: chart.difference(chart.retract(new, w), x)
        return new, jax.vjp(to, jnp.zeros_like(v))[1](lam)[0]

    def stage(segment, x, v, lam, dlam, u, du, y, dy, *rest):
        y = None if y is None else y + dy
        return *back(segment.chart, x, v, lam + dlam), *kept(u + du, y, *rest)

    lams = [preceding(point.first, point.lams) for point in (at, change)]
    data = at.xs, change.xs, *lams, at.us, change.us, at.rows, change.rows
    found = chain.map(stage, *data, active.rows, *active.limits(chain))
    xs, lams, us, rows = zip(*found, strict=True)
    last = at.lams[-1][-1] + change.lams[-1][-1]
    final, last = back(chain.end.chart, at.final, change.final, last)
    end = None if at.end is None else masked(at.end + change.end, active.end)
    return Point(xs, final, us, lams[0][0], following(lams, last), rows, end)


def start(chain: VectorChain, found: Any) -> tuple[Point, Active, Bool[Array, ""]]:
    """What was found, what is active there, and whether its costates are unknown."""
    none, zero = (None,) * len(chain.segments), jnp.zeros_like(found.final[0])
    duals, (xs, final, us) = found.duals, (found.xs, found.final, found.us)
    rows, end = (duals.stages, duals.terminal) if duals else (none, None)
    guess = Point(xs, final, us, final, us, rows, end)
    local, here = localized(chain, guess)
    if not (chain.limits or chain.names):
        lams = following(here.xs, here.final)
        at = replace(guess, first=here.xs[0][0], lams=lams)
        return at, Active((), (), rows, end, zero), zero == 0
    first, lams, gradients = adjoints(local, here.trajectory)
    at = replace(guess, first=first, lams=lams)
    active = active_at(chain, at, gradients)
    return active.keep(chain, at), active, zero != 0


def active_at(chain: VectorChain, at: Point, gradients: Rows) -> Active:
    """What is active where the costates are known, and the gradient in the controls.

    A multiplier or a distance counts as 0 up to the square root of the rounding.
    """
    small = jnp.sqrt(jnp.finfo(chain.dtype).eps)
    sizes = chain.map(lambda _, lam: size_of(lam), at.lams)
    tol = small * (1 + ft.reduce(jnp.maximum, map(jnp.max, sizes)))
    count = lambda flags: jnp.sum(flags.astype(chain.dtype))

    def of_rows(rows, y, values):
        """Whether they are active, and the number of those that are weakly so."""
        equal = jnp.array(rows.equal)
        touched = values >= -small * (1 + jnp.abs(y))
        return equal | (y > tol), count(touched & (y <= tol) & ~equal)

    def stage(segment, x, u, t, y, gradient, *limits):
        weak, on, sides, rows = jnp.zeros_like(tol), None, (), segment.rows
        if limits:
            low, high = limits
            fixed = low == high
            lower = ((u <= low) & (gradient > tol)) | fixed
            sides = lower, (u >= high) & (gradient < -tol) & ~fixed
            near = jnp.minimum(u - low, high - u) <= small * (1 + jnp.abs(u))
            weak = count(near & (jnp.abs(gradient) <= tol) & ~fixed)
        if rows is not None:
            on, more = of_rows(rows, y, rows.values(x, u, t))
            weak = weak + more
        return weak, on, *sides

    data = at.xs, at.us, chain.ts, at.rows, gradients, *chain.limits
    counts, rows, *sides = zip(*chain.map(stage, *data), strict=True)
    weak, end = jnp.sum(jnp.concatenate(counts)), None
    last = chain.end.rows
    if last is not None:
        end, more = of_rows(last, at.end, last.values(at.final))
        weak = weak + more
    lower, upper = sides or ((), ())
    return Active(lower, upper, rows, end, weak)
