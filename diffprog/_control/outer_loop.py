"""What comes before and after the iterations where there are constraints.

| after an iteration                         | next                                  |
| ------------------------------------------ | ------------------------------------- |
| all conditions hold                        | the policy, `successful`              |
| gains were too small to be seen for long   | the policy, `successful` if all else  |
| no step is found, so often                 | holds; else with the code of the last |
| the gradient is small, or no step is found | new multipliers and penalties         |
| penalties have risen in vain               | the first guess, or `infeasible`      |
| too many iterations since the last update  | new multipliers                       |
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._chain.vector import VectorTrajectory
from .._common.multipliers import violation
from .._common.result import RESULTS
from .._common.tree import no, where
from .outer.base import measure, OuterState, Residuals
from .records import Constrained, Loop, rounding
from .search.base import SearchState


MAX_IDLE, MAX_UNSEEN = 3, 30


def before_steps(
    solver: Any, state: OuterState, trajectory: VectorTrajectory, search: SearchState
) -> tuple[Constrained, Any]:
    """The first guess, and whether the first state violates what no control changes."""
    chain, none = solver.chain, jnp.zeros_like(state.duals.penalty)
    stage, zero = none.astype(jnp.int32), jnp.zeros_like(trajectory.cost)
    start = Residuals(zero, zero, none, none, none, stage, state.duals)
    rows, hopeless = chain.segments[0].rows, no(zero)
    if rows is not None and not all(rows.free):
        first = trajectory.xs[0][0], trajectory.us[0][0], chain.ts[0][0]
        size = violation(rows.values(*first), np.array(rows.equal))
        fixed, groups = ~np.array(rows.free), np.array(rows.groups)
        of = lambda group: jnp.max(jnp.where(fixed & (groups == group), size, 0))
        worst = jnp.stack([of(group) for group in range(len(chain.names))])
        start = replace(start, violation=worst, residual=worst)
        hopeless = ~solver.outer.finished(state, start, zero)
    return Constrained(state, start, trajectory, search, no(zero)), hopeless


def before_step(solver: Any, loop: Loop, stop) -> Loop:
    """The loop with what is known of the constraints at its iterate."""
    at: Any = loop.constrained
    now = loop.trajectory
    if not solver.search.monotone:
        now = where(stop, loop.best, now)
    found = measure(solver.chain, now, at.state.duals)
    cost = jnp.where(at.changed, found.merit, now.cost)
    now = eqx.tree_at(lambda t: t.cost, now, cost)
    best = now if solver.search.monotone else where(stop, now, loop.best)
    constrained = replace(at, found=found)
    return replace(loop, trajectory=now, best=best, constrained=constrained)


def is_hidden(before: Loop, loop: Loop) -> Any:
    """Whether the merit is too coarse to show what an iteration gains."""
    merit = before.trajectory.cost
    small = loop.known.decrement <= jnp.finfo(merit.dtype).eps * jnp.abs(merit)
    same = merit - loop.trajectory.cost <= rounding(merit)
    return small & same & (before.search.damping == 0)


def after_step(solver: Any, before: Loop, loop: Loop, stop) -> Loop:
    """The loop after an iteration, with multipliers, penalties and codes of its own."""
    at: Any = before.constrained
    outer, state, found = solver.outer, at.state, at.found

    # What the iteration says: a row of the table.
    broken = loop.result == RESULTS.nonfinite_derivative
    usable = ~stop & ~broken & ~(loop.result == RESULTS.cost_unbounded)
    solved = usable & (loop.done | loop.stopping)
    late = usable & (loop.counts.steps - state.started >= outer.max_inner)
    gaps = before.trajectory.gaps
    closed = True if gaps is None else gaps.total == 0
    finished = solved & closed & outer.finished(state, found, loop.known.largest)
    stepped = loop.counts.steps > before.counts.steps
    idle = jnp.where(stepped, 0, state.idle + loop.stopping.astype(jnp.int32))
    stuck = solved & ~finished & (idle >= MAX_IDLE)
    unseen = jnp.where(is_hidden(before, loop), state.unseen + 1, 0)
    quiet = stuck & (loop.result == RESULTS.successful)
    quiet |= usable & ~finished & (unseen >= MAX_UNSEEN)
    quiet &= closed & outer.finished(state, found, jnp.zeros_like(found.cost))
    finished |= quiet
    stuck &= ~quiet
    unmet = stuck & (loop.result == RESULTS.successful)
    go_on = (solved | late) & ~finished & ~stuck
    updated, in_vain = outer.update(state, found, solved)
    second, is_left = outer.again(state)
    again, infeasible = go_on & in_vain & is_left, go_on & in_vain & ~is_left
    changed, ending = go_on & ~infeasible, finished | infeasible | stuck

    updated = replace(updated, started=loop.counts.steps)
    state = where(changed, where(again, second, updated), state)
    state = replace(state, idle=jnp.where(again, 0, idle), unseen=unseen)

    trajectory = where(finished, before.trajectory, loop.trajectory)  # that of `found`
    trajectory = best = where(again, at.first, trajectory)
    if not solver.search.monotone:  # what was best before the costs changed is not now
        unknown = jnp.full_like(found.cost, jnp.inf)
        best = eqx.tree_at(lambda t: t.cost, trajectory, unknown)
        best = where(changed, best, loop.best)
    result = RESULTS.where(stop, before.result, loop.result)
    for applies, code in (
        (changed, RESULTS.max_steps_reached),
        (unmet, RESULTS.no_descent),
        (finished, RESULTS.successful),
        (infeasible, RESULTS.infeasible),
    ):
        result = RESULTS.where(applies, code, result)
    return replace(
        loop,
        trajectory=trajectory,
        best=best,
        search=where(changed, at.search, loop.search),
        counts=replace(loop.counts, steps=jnp.where(again, 0, loop.counts.steps)),
        result=result,
        stopping=jnp.where(changed, no(stop), loop.stopping | ending),
        done=jnp.where(changed | ending, no(stop), loop.done),
        history=jnp.where(again, jnp.nan, loop.history),
        constrained=replace(at, state=state, changed=changed),
    )
