"""The conditions of optimality of a chain, as one gradient.

With costates lam, multipliers y of the rows that are active, and the controls that are
at a limit put there, a solution is a stationary point of

    L = sum h_t + y_t' c_t + lam_{t+1}' (f_t(x_t, u_t) - x_{t+1})
        + h_T + y_T' c_T + lam_0' (x0 - x_0)

in states, controls, costates and multipliers together. All derivatives of a solution
are those of this gradient. States are local coordinates at those of the solution.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float

from ..._chain.constraints import Duals
from ..._chain.vector import following, VectorChain, VectorTrajectory
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
    rows: tuple[Array | None, ...]
    end: Array | None

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
    rows: tuple[Array | None, ...]
    end: Array | None
    weak: Float[Array, ""]

    def held(self, chain: VectorChain, z: Point) -> Point:
        """Controls at their limits put there; no multipliers of inactive rows."""
        us = z.us
        if self.lower:
            sides = zip(us, *chain.limits, self.lower, self.upper, strict=True)
            at = lambda u, low, high, lower, upper: jnp.where(
                lower, low, jnp.where(upper, high, u)
            )
            us = tuple(at(*side) for side in sides)
        of = lambda y, active: None if y is None else jnp.where(active, y, 0)
        rows = tuple(map(of, z.rows, self.rows))
        return replace(z, us=us, rows=rows, end=of(z.end, self.end))

    def fixed(self, z: Point) -> Point:
        """The entries that the Lagrangian does not depend on, and 0 elsewhere."""
        zero = jtu.tree_map(jnp.zeros_like, z)
        us = zero.us
        if self.lower:
            pairs = zip(z.us, self.lower, self.upper, strict=True)
            us = tuple(jnp.where(a | b, u, 0) for u, a, b in pairs)
        of = lambda y, active: None if y is None else jnp.where(active, 0, y)
        rows = tuple(map(of, z.rows, self.rows))
        return replace(zero, us=us, rows=rows, end=of(z.end, self.end))


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


def lagrangian(
    chain: VectorChain, x0: Array, at: Point, active: Active, z: Point
) -> Float[Array, ""]:
    """L at z, in local coordinates at a point."""
    z = active.held(chain, z)
    local, _ = localized(chain, replace(at, rows=z.rows, end=z.end))

    def stage(segment, v, u, t, lam, v_next):
        gap = segment.dynamics(v, u, t) - v_next
        return segment.cost(v, u, t) + matmul(lam, gap)

    data = z.xs, z.us, local.ts, z.lams, following(z.xs, z.final)
    total = sum(map(jnp.sum, local.map(stage, *data)), local.terminal_cost(z.final))
    start = chain.segments[0].difference(x0, at.xs[0][0]) - z.xs[0][0]
    return total + matmul(z.first, start)


def gradient(chain: VectorChain, x0: Array, at: Point, active: Active) -> Point:
    """That of L at the point itself."""
    _, here = localized(chain, at)
    return jax.grad(lambda z: lagrangian(chain, x0, at, active, z))(here)


def moved(chain: VectorChain, at: Point, change: Point) -> Point:
    """The point after a change; costates are those in local coordinates there."""

    def back(chart, x, v, lam):
        new = chart.retract(x, v)
        if chart.is_flat:
            return new, lam
        # A covector in the coordinates at x, in those at the new state.
        to = lambda w: chart.difference(chart.retract(new, w), x)
        return new, jax.vjp(to, jnp.zeros_like(v))[1](lam)[0]

    sums = jtu.tree_map(jnp.add, at, replace(change, xs=at.xs, final=at.final))
    starts = [sums.first, *(rows[-1] for rows in sums.lams)]
    before = lambda a, rows: jnp.concatenate([a[None], rows[:-1]][: len(rows)])
    lams = tuple(map(before, starts, sums.lams))
    charts = [segment.chart for segment in chain.segments]
    pairs = [
        jax.vmap(lambda x, v, lam, chart=chart: back(chart, x, v, lam))(*rows)
        for chart, *rows in zip(charts, at.xs, change.xs, lams, strict=True)
    ]
    xs, lams = zip(*pairs, strict=True)
    final, last = back(chain.end.chart, at.final, change.final, sums.lams[-1][-1])
    after = following(lams, last)
    return replace(sums, xs=xs, final=final, first=lams[0][0], lams=after)


def point_of(
    chain: VectorChain, trajectory: VectorTrajectory, duals: Duals | None
) -> tuple[Point, Rows]:
    """A solution with its costates, and the gradient in the controls."""
    none = (None,) * len(chain.segments)
    rows, end = (duals.stages, duals.terminal) if duals else (none, None)
    xs, final, us = trajectory.xs, trajectory.final, trajectory.us
    guess = Point(xs, final, us, final, us, rows, end)
    local, here = localized(chain, guess)
    first, lams, gradients = adjoints(local, here.trajectory)
    return replace(guess, first=first, lams=lams), gradients


def active_at(chain: VectorChain, at: Point, gradients: Rows) -> Active:
    """What is active at a solution.

    A multiplier or a distance counts as 0 up to the square root of the rounding.
    """
    sizes = [jnp.max(jnp.abs(leaf)) for leaf in jtu.tree_leaves((at.first, at.lams))]
    small = jnp.sqrt(jnp.finfo(chain.dtype).eps)
    tol = small * (1 + jnp.max(jnp.stack(sizes)))
    lower, upper, weak = [], [], jnp.zeros((), chain.dtype)
    count = lambda flags: jnp.sum(flags.astype(chain.dtype))
    limited = zip(at.us, gradients, *chain.limits) if chain.limits else ()
    for u, gradient, low, high in limited:
        fixed = low == high
        lower.append(((u <= low) & (gradient > tol)) | fixed)
        upper.append((u >= high) & (gradient < -tol) & ~fixed)
        near = jnp.minimum(u - low, high - u) <= small * (1 + jnp.abs(u))
        weak += count(near & (jnp.abs(gradient) <= tol) & ~fixed)

    def of(rows, y, values):
        nonlocal weak
        if rows is None:
            return None
        equal = jnp.broadcast_to(np.array(rows.equal), y.shape)
        touched = values >= -small * (1 + jnp.abs(y))
        weak += count(touched & (y <= tol) & ~equal)
        return equal | (y > tol)

    stage = lambda segment, *at: segment.rows and segment.rows.values(*at)
    values = chain.map(stage, at.xs, at.us, chain.ts)
    parts = [segment.rows for segment in chain.segments]
    rows = tuple(map(of, parts, at.rows, values))
    last = chain.end.rows
    end = of(last, at.end, last and last.values(at.final))
    return Active(tuple(lower), tuple(upper), rows, end, weak)
