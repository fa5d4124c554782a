"""What the loop of a solve carries along."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._chain.vector import VectorTrajectory
from .._common.result import RESULTS
from .._common.types import Stacks
from .gaps import Price
from .outer.base import OuterState, Residuals
from .report import columns, report
from .search.base import SearchState, Verdict


# A predicted decrease below this many roundings of the cost cannot be seen in it.
ROUNDINGS = 64


def rounding(cost: Float[Array, ""]) -> Float[Array, ""]:
    """The change of a cost that cannot be seen in it."""
    return ROUNDINGS * jnp.finfo(cost.dtype).eps * jnp.abs(cost)


class Purpose(eqx.Enumeration):
    """What a backward pass is for."""

    search = "A direction to search along."
    test = "Without damping: the convergence that a damped pass suspects."
    policy = "Without damping: the policy at the end."
    fallback = "The policy, with the last damping that had a minimum."
    end = "No pass is left."


class Counts(eqx.Module):
    """What was done so far."""

    steps: Int[Array, ""]
    rollouts: Int[Array, ""]
    backwards: Int[Array, ""]


class Known(eqx.Module):
    """What the passes found out about an iterate."""

    gains: Stacks
    feasible_damping: Float[Array, ""]  # the last that a search had a minimum with
    slope: Float[Array, ""]
    gradient: Float[Array, ""]
    decrement: Float[Array, ""]
    minimum: Bool[Array, ""]  # of the model without damping, at every stage
    largest: Float[Array, ""] | None = None  # entry of the gradient, for constraints


class Trouble(eqx.Module):
    """The latest number that was not finite."""

    stage: Int[Array, ""]  # T + 1 if there was none
    step: Int[Array, ""]


class Constrained(eqx.Module):
    """What a solve with constraints carries along."""

    state: OuterState
    found: Residuals  # at the iterate
    first: VectorTrajectory  # the first guess
    search: SearchState  # before the first iteration
    changed: Bool[Array, ""]  # other multipliers than in the iteration before


class Loop(eqx.Module):
    """The state of the outer loop."""

    trajectory: VectorTrajectory
    best: VectorTrajectory
    search: SearchState
    known: Known
    counts: Counts
    trouble: Trouble
    result: RESULTS
    stopping: Bool[Array, ""]  # only the backward pass for the policy is left
    done: Bool[Array, ""]
    first_cost: Float[Array, ""]
    history: Float[Array, "rows columns"]
    constrained: Constrained | None  # where there are constraints
    weight: Float[Array, ""] | None = None  # of gaps, where states were given


class Trials(eqx.Module):
    """The trials along a direction, and what the search says of the last one."""

    search: SearchState
    last: VectorTrajectory
    verdict: Verdict
    rollouts: Int[Array, ""]
    first_nonfinite: Int[Array, ""]  # the first stage of any that is not finite


class Passes(eqx.Module):
    """The state of the loop over backward passes at one iterate."""

    purpose: Purpose
    known: Known
    trials: Trials
    damping: Float[Array, ""]
    positive: Bool[Array, ""]
    promised: Float[Array, ""]  # largest decrement at the iterate, NaN if there is none
    converged: Bool[Array, ""]
    refuted: Bool[Array, ""]  # a test denied the convergence
    first_nonfinite: Int[Array, ""]  # stage of a derivative that the pass takes
    backwards: Int[Array, ""]
    price: Price | None  # of gaps, where states were given


def recorded(loop: Loop, before: VectorTrajectory, passes: Passes, stop, verbose: Any):
    """The history with a row about the iterate and the step from it."""
    state, step = passes.trials.search, loop.counts.steps
    at, cost, more = loop.constrained, before.cost, ()
    if at is not None:
        cost = at.found.cost
        more = jnp.max(at.found.violation), jnp.max(at.state.duals.penalty)
    if before.gaps is not None:
        more = *more, before.gaps.largest
    row = jnp.stack([
        cost,
        jnp.where(passes.trials.verdict.accept, state.stepsize, jnp.nan),
        passes.damping,
        passes.known.slope,
        jnp.where(stop, 0, state.trials).astype(before.cost.dtype),
        passes.known.gradient,
        *more,
    ])  # fmt: skip
    names = columns(at is not None, before.gaps)
    if verbose:
        report(verbose, step, names, row)
    if not loop.history.shape[0]:
        return loop.history
    # The row of a search that failed stays; the gradient is known from the last pass.
    written = loop.history[step]
    kept = ~jnp.isnan(written[0])
    if at is not None:  # an update takes no step, and the next row is a new one
        kept = kept & stop
    others = np.array([name != "gradient" for name in names])
    row = jnp.where(kept & ((written[0] != cost) | others), written, row)
    return lax.dynamic_update_index_in_dim(loop.history, row, step, 0)
