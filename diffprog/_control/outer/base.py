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

    - `cost`: the objective, without them.
    - `violation`, `residual`, `complementarity`: see `_common/multipliers.py`.
    - `stage`: where the violation is largest.
    - `duals`: the multipliers of the next update, with the same penalties.
    """

    cost: Float[Array, ""]
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
    - `idle`: how often in a row a step, or none, left the merit as it was.
    - `num_outer`, `attempt`: updates, and starts from the first guess.
    """

    duals: Duals
    eta: Float[Array, " _"]
    omega: Float[Array, ""]
    worst: Float[Array, ""]
    rises: Int[Array, ""]
    started: Int[Array, ""]
    idle: Int[Array, ""]
    num_outer: Int[Array, ""]
    attempt: Int[Array, ""]


def measure(
    chain: VectorChain, trajectory: VectorTrajectory, duals: Duals
) -> Residuals:
    """Of a chain whose costs are not priced."""

    def entries(rows: Rows, values, dual):
        penalties, equal = rows.penalties(duals.penalty), np.array(rows.equal)
        new = multiplier(values, dual, penalties, equal)
        told = (
            violation(values, equal),
            residual(values, dual, penalties, equal),
            complementarity(values, new, equal),
        )
        return jnp.stack(told), new

    def stage(segment, x, u, t, dual):
        cost = segment.cost(x, u, t)
        if segment.rows is None:
            return cost, None, None
        return cost, *entries(segment.rows, segment.rows.values(x, u, t), dual)

    data = trajectory.xs, trajectory.us, chain.ts, duals.stages
    costs, told, stages = zip(*chain.map(stage, *data), strict=True)
    cost = sum(map(jnp.sum, costs)) + chain.terminal_cost(trajectory.final)
    ends, last, final = chain.terminal_rows, None, None
    if ends is not None:
        last, final = entries(ends, ends.values(trajectory.final), duals.terminal)
    # Per constraint: the largest of its entries, and the stage of the largest.
    parts = [(s.rows, rows, s.start) for s, rows in zip(chain.segments, told)]
    parts.append((ends, None if last is None else last[None], chain.horizon))
    found = []
    for group in range(len(chain.names)):
        numbers, places = [], []
        for rows, values, start in parts:
            own = [i for i, g in enumerate(rows.groups if rows else ()) if g == group]
            for i in own:
                numbers.append(jnp.max(values[:, :, i], 0))
                worst = jnp.argmax(values[:, 0, i]).astype(jnp.int32) + start
                places.append(jnp.where(numbers[-1][0] > 0, worst, start))
        table = jnp.stack(numbers)
        first = jnp.argmax(table[:, 0])
        found.append((jnp.max(table, 0), jnp.stack(places)[first]))
    table, where = jnp.stack([row for row, _ in found]), [place for _, place in found]
    new = Duals(stages, final, duals.penalty, duals.groups)
    violations, residuals, slack = table.T
    return Residuals(cost, violations, residuals, slack, jnp.stack(where), new)


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
