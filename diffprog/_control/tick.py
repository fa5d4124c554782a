"""One tick of a receding horizon, on vectors: a fixed number of iterations."""

import functools as ft
from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._chain.constraints import Duals
from .._chain.limits import between, moved
from .._chain.vector import run, simulate, through, VectorChain, VectorTrajectory
from .._common.linalg import matmul
from .._common.loops import repeat, while_loop
from .._common.result import RESULTS
from .._common.tree import all_finite, no, where
from .loop import Solver
from .outer.base import measure
from .records import Loop, ROUNDINGS
from .solve import solver_of


def awaiting(chain: VectorChain) -> VectorChain:
    """The chain without those rows of now that no control changes: x is given."""
    (segment,) = chain.segments
    rows = segment.rows
    if rows is None or all(rows.free):
        return chain
    values, given = rows.values, ~np.array(rows.free)
    satisfied = np.where(rows.equal, 0, -1)

    def of_the_future(x, u, t):
        found = values(x, u, t)
        return jnp.where(given & (t == 0), satisfied.astype(found.dtype), found)

    rows = replace(rows, values=of_the_future)
    return replace(chain, segments=(replace(segment, rows=rows),))


def ended(chain: VectorChain, xs: Array, us: Array) -> Array:
    """The controls, with one at rest in the place of the last if that costs less.

    The last control of a plan often makes the most of the end; repeated it may lead out
    of the domain of the model.
    """
    (segment,), x, t = chain.segments, xs[-2], chain.ts[0][-1]

    def cost(u):
        new = segment.dynamics(x, u, t)
        return segment.cost(x, u, t) + chain.terminal_cost(new)

    rest = resting(chain, us)[-1]
    kept, other = cost(us[-1]), cost(rest)
    worse = (other < kept) | (jnp.isnan(kept) & jnp.isfinite(other))
    return us.at[-1].set(jnp.where(worse, rest, us[-1]))


def resting(chain: VectorChain, us: Array) -> Array:
    """Controls in the middle between their limits, 0 where there is none."""
    return between(*(side for (side,) in chain.limits)) if chain.limits else 0 * us


def followed(chain: VectorChain, x0: Array, plan: tuple) -> VectorTrajectory:
    """A plan from another first state: with its feedback, or without if that is better.

    It consists of states, controls and feedback gains of the stages. Where neither is
    finite the controls are those at rest.
    """

    def control(segment, x, _, reference, u, K, *limits):
        v = matmul(K, segment.difference(x, reference))
        return moved(u, v, *limits)[0], None, None

    closed, _ = simulate(chain, control, x0, None, *plan, *chain.limits)
    alone = run(chain, x0, plan[1])
    finite = lambda trajectory: trajectory.first_nonfinite > chain.horizon
    worse = ~finite(closed) | (finite(alone) & (alone.cost < closed.cost))
    found = where(worse, alone, closed)
    rest = resting(chain, plan[1][0])
    anew = lambda at: (run(chain, x0, (rest,)), no(at[1]))
    start = found, ~finite(found)
    return while_loop(lambda at: at[1], anew, start, like=rest)[0]


def _improved(solver: Solver, loop: Loop) -> Loop:
    """The loop after an iteration; gains stay where no pass found others."""
    false = no(loop.done)
    new = solver.step(replace(loop, stopping=false), false)
    found = ~jnp.isnan(new.known.slope) & all_finite(new.known.gains)
    gains = where(found, new.known.gains, loop.known.gains)
    return replace(new, known=replace(new.known, gains=gains))


class Outcome(eqx.Module):
    """What the iterations of a tick leave behind.

    - `loop`: with the plan, its cost, gains, and the memory of the search.
    - `duals`, `violation`: of constraints.
    - `usable`: whether the plan is finite.
    """

    loop: Loop
    duals: Duals | None
    violation: Float[Array, ""] | None
    result: RESULTS
    usable: Bool[Array, ""]


def iterate(
    chain: VectorChain, rules: tuple, x0: Array, plan: tuple, memory: tuple
) -> Outcome:
    """The iterations of a tick.

    Their `rules` are direction, search, outer method and number; the `plan` of before
    has states, controls and gains; the `memory` is that of the search, multipliers, and
    whether states may have gaps.
    """
    (method, search, outer, iterations), (xs, us, K) = rules, plan
    remembered, duals, has_gaps = memory
    chain, begun = awaiting(chain), duals and outer.init(duals)
    priced = chain.priced(begun.duals) if begun else chain
    (us,) = chain.within((us,))
    us = ended(priced, xs, us)
    if has_gaps:
        first = jnp.concatenate([x0[None], xs[1:-1]])
        trajectory = through(priced, (first,), xs[-1], (us,))
    else:
        trajectory = followed(priced, x0, ((xs[:-1],), (us,), (K,)))
    rtol = ROUNDINGS * jnp.finfo(chain.dtype).eps
    solver = solver_of(priced, method, search, rtol, 0.0, 0, False)
    solver = replace(solver, tests=False)
    start = solver.start(trajectory, remembered)
    gains = jnp.concatenate([jnp.zeros_like(us)[:, :, None], K], 2)
    loop = replace(start, known=replace(start.known, gains=(gains,)))
    loop = repeat(ft.partial(_improved, solver), loop, iterations)
    result, violation = loop.result, None
    if begun:
        found = measure(chain, loop.trajectory, begun.duals)
        solved = loop.known.gradient <= outer.omega(begun)
        updated, in_vain = outer.update(begun, found, solved)
        duals, violation = updated.duals, jnp.max(found.violation)
        result = RESULTS.where(in_vain, RESULTS.infeasible, result)
        loop = replace(loop, trajectory=replace(loop.trajectory, cost=found.cost))
    usable = loop.trajectory.first_nonfinite > chain.horizon
    result = RESULTS.where(usable, result, start.result)
    return Outcome(loop, duals, violation, result, usable)
