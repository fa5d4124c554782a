"""What surrounds the iterations where there are constraints."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..._chain.constraints import Duals, Rows
from ..._chain.vector import VectorChain, VectorTrajectory
from ..._common.multipliers import complementarity, multiplier, residual, violation
from ..._common.types import AbstractPart


class Residuals(eqx.Module):
    """What is known of the constraints at an iterate; numbers for each constraint.

    - `cost`, `merit`: the objective, and the augmented Lagrangian.
    - `violation`, `residual`, `complementarity`: see `_common/multipliers.py`.
    - `stage`: where the violation is largest.
    - `duals`: the multipliers of the next update, with the same penalties.
    """

    cost: Float[Array, ""]
    merit: Float[Array, ""]
    violation: Float[Array, " _"]
    residual: Float[Array, " _"]
    complementarity: Float[Array, " _"]
    stage: Int[Array, " _"]
    duals: Duals


class OuterState(eqx.Module):
    """Multipliers and penalties, and what an outer method knows of them.

    - `duals`: as they are during the iterations.
    - `eta`: the residual below which multipliers are updated, of each constraint.
    - `omega`: the norm of the gradient at which the iterations are far enough.
    - `worst`: the largest residual at the last rise of a penalty.
    - `rises`: how often in a row a rise did not help.
    - `started`: the number of accepted iterations at the last update.
    - `idle`: how often in a row the iterations made no step.
    - `unseen`: how often in a row they gained no more than roundings.
    - `num_outer`, `attempt`: updates, and starts from the first guess.
    """

    duals: Duals
    eta: Float[Array, " _"]
    omega: Float[Array, ""]
    worst: Float[Array, ""]
    rises: Int[Array, ""]
    started: Int[Array, ""]
    idle: Int[Array, ""]
    unseen: Int[Array, ""]
    num_outer: Int[Array, ""]
    attempt: Int[Array, ""]


def measure(
    chain: VectorChain, trajectory: VectorTrajectory, duals: Duals
) -> Residuals:
    """Of a chain whose costs are not priced."""

    def entries(rows: Rows, values, dual, penalties):
        equal = np.array(rows.equal)
        new = multiplier(values, dual, penalties, equal)
        told = (
            violation(values, equal),
            residual(values, dual, penalties, equal),
            complementarity(values, new, equal),
        )
        return rows.merit(values, dual, penalties), jnp.stack(told), new

    def stage(segment, x, u, t, dual):
        cost, rows = segment.cost(x, u, t), segment.rows
        if rows is None:
            return cost, None
        return cost, entries(rows, rows.values(x, u, t), dual, own[segment.start])

    *penalties, last = duals.penalties
    own = {segment.start: c for segment, c in zip(chain.segments, penalties)}
    data = trajectory.xs, trajectory.us, chain.ts, duals.stages
    costs, parts = zip(*chain.map(stage, *data), strict=True)
    cost = sum(map(jnp.sum, costs)) + chain.terminal_cost(trajectory.final)
    ends, final = chain.end.rows, None
    if ends is not None:
        final = entries(ends, ends.values(trajectory.final), duals.terminal, last)
    # Of every entry the worst stage. The entries of a constraint stand side by side.
    starts = [segment.start for segment in chain.segments]
    known = [(*part, start) for part, start in zip(parts, starts) if part is not None]
    if final is not None:
        merit, told, new = final
        known.append((merit, told[None], new, chain.horizon))
    worst = lambda told, start: jnp.argmax(told[:, 0], 0).astype(jnp.int32) + start
    merits, tables, _, firsts = zip(*known, strict=True)
    table = jnp.concatenate([jnp.max(told, 0) for told in tables], 1)
    places = jnp.concatenate([*map(worst, tables, firsts)])
    ends_of = np.cumsum(np.bincount([g for groups in duals.groups for g in groups]))
    own = [slice(a, b) for a, b in zip([0, *ends_of], ends_of)]
    stages = tuple(part and part[2] for part in parts)
    return Residuals(
        cost,
        cost + sum(map(jnp.sum, merits)),
        *jnp.stack([jnp.max(table[:, i], 1) for i in own], 1),
        stage=jnp.stack([places[i][jnp.argmax(table[0, i])] for i in own]),
        duals=Duals(stages, final and final[2], duals.penalty, duals.groups),
    )


class AbstractOuter(AbstractPart):
    """Turns a problem with constraints into a sequence of problems without."""

    @abc.abstractmethod
    def init(self, duals: Duals) -> OuterState:
        """The state before the first iteration, from multipliers of 0 or known ones.

        A penalty of NaN is not known.
        """

    @abc.abstractmethod
    def omega(self, state: OuterState) -> Float[Array, ""]:
        """The norm of the gradient at which the iterations are far enough."""

    @abc.abstractmethod
    def finished(
        self, state: OuterState, found: Residuals, gradient: Float[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether the iterate satisfies all conditions to tolerance."""

    @abc.abstractmethod
    def update(
        self, state: OuterState, found: Residuals, solved: Bool[Array, ""]
    ) -> tuple[OuterState, Bool[Array, ""]]:
        """The next problem, and whether the method has given up.

        Called when the iterations have `solved` the last one, or went on for too long.
        """

    @abc.abstractmethod
    def left(
        self, state: OuterState, found: Residuals, successful: Bool[Array, ""]
    ) -> Duals:
        """The multipliers and penalties that the next solve starts from."""

    @abc.abstractmethod
    def again(self, state: OuterState) -> tuple[OuterState, Bool[Array, ""]]:
        """The state for another attempt from the first guess, if there is one."""
