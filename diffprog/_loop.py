"""The solver: an outer loop over accepted iterations, an inner one over trials."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ._direction import AbstractDirection
from ._direction.base import expanded, swept
from ._lqr import Sweep
from ._report import HISTORY, report
from ._result import RESULTS
from ._rollout import run, VectorChain, VectorTrajectory
from ._search import AbstractSearch
from ._search.base import check_judged, check_memory, SearchState, Trial, Verdict
from ._tree import no, vary, where
from ._types import Stacks


# A predicted decrease below this many roundings of the cost cannot be seen in it.
ROUNDINGS = 64

# A cost that fell below minus this many times its first size has no bound.
UNBOUNDED = 1e15

# Steps along negative curvature away from a stationary point: each so many times the
# one before, down to the least.
LEAVE, LEAST = 1 / 8, 1e-5

# What a backward pass is for: a direction to search along; a test of the convergence
# that a damped pass suspects; the policy at the end, without damping; the policy where
# that has no minimum.
SEARCH, TEST, POLICY, FALLBACK, END = range(5)


def promised_by(sweep: Sweep) -> Float[Array, ""]:
    """The decrement of a sweep; infinite, so that nothing has converged, where it says
    that the step ascends, or promises nothing although there is a gradient.
    """
    limits = jnp.finfo(sweep.decrement.dtype)
    none = (sweep.decrement == 0) & (sweep.gradient**2 > limits.tiny / limits.eps)
    return jnp.where(
        none | (sweep.slope > 0) | (sweep.decrement < 0), jnp.inf, sweep.decrement
    )


class Loop(eqx.Module):
    """The state of the outer loop."""

    trajectory: VectorTrajectory
    best: VectorTrajectory
    gains: Stacks
    search: SearchState
    feasible_damping: Float[Array, ""]
    result: RESULTS
    stopping: Bool[Array, ""]  # only the backward pass for the policy is left
    done: Bool[Array, ""]
    num_steps: Int[Array, ""]
    num_rollouts: Int[Array, ""]
    num_backwards: Int[Array, ""]
    first_nonfinite: Int[Array, ""]  # of the latest iteration that saw one
    nonfinite_step: Int[Array, ""]  # that iteration
    first_cost: Float[Array, ""]
    gradient: Float[Array, ""]
    decrement: Float[Array, ""]
    minimum: Bool[Array, ""]  # of the model without damping, at every stage
    history: Float[Array, "rows columns"]


class Passes(eqx.Module):
    """The state of the loop over backward passes at one iterate."""

    purpose: Int[Array, ""]
    search: SearchState
    gains: Stacks
    damping: Float[Array, ""]
    feasible_damping: Float[Array, ""]
    slope: Float[Array, ""]
    gradient: Float[Array, ""]
    decrement: Float[Array, ""]
    promised: Float[Array, ""]  # largest decrement at the iterate, NaN if there is none
    positive: Bool[Array, ""]
    minimum: Bool[Array, ""]  # positive without damping
    converged: Bool[Array, ""]
    refuted: Bool[Array, ""]  # a test denied the convergence
    trials_nonfinite: Int[Array, ""]  # the first stage of a trial that is not finite
    first_nonfinite: Int[Array, ""]  # stage of a derivative that the pass takes
    trial: VectorTrajectory
    verdict: Verdict
    num_rollouts: Int[Array, ""]
    num_backwards: Int[Array, ""]


class Solver(eqx.Module):
    """What stays the same during a solve."""

    chain: VectorChain
    method: AbstractDirection
    search: AbstractSearch
    rtol: Any
    atol: Any
    max_steps: int = eqx.field(static=True)
    verbose: bool | Callable = eqx.field(static=True)

    def init(self, x0, us, state: SearchState, history: bool) -> Loop:
        chain, dtype = self.chain, self.chain.dtype
        number = lambda value: jnp.asarray(value, dtype)
        count = lambda value: jnp.asarray(value, jnp.int32)
        trajectory = run(chain, x0, us)
        finite = trajectory.first_nonfinite > chain.horizon
        cost = jnp.where(finite, trajectory.cost, jnp.inf)
        trajectory = eqx.tree_at(lambda t: t.cost, trajectory, cost)
        memory = check_memory(self.search, "init", self.search.init(dtype), dtype)
        given = jtu.tree_map(
            lambda old, new: jnp.asarray(old, new.dtype), state, memory
        )
        widths = [1 + x.shape[1] for x in trajectory.xs]
        loop = Loop(
            trajectory=trajectory,
            best=trajectory,
            gains=tuple(jnp.zeros((*u.shape, w), dtype) for u, w in zip(us, widths)),
            search=where(jnp.isnan(given.stepsize), memory, given),
            feasible_damping=number(0.0),
            result=RESULTS.where(
                finite, RESULTS.max_steps_reached, RESULTS.nonfinite_rollout
            ),
            stopping=~finite,
            done=~finite,
            num_steps=count(0),
            num_rollouts=count(1),
            num_backwards=count(0),
            first_nonfinite=trajectory.first_nonfinite,
            nonfinite_step=jnp.where(finite, count(self.max_steps + 1), 0),
            first_cost=cost,
            gradient=number(jnp.nan),
            decrement=number(jnp.inf),
            minimum=no(finite),
            history=jnp.full(
                ((self.max_steps + 1) * history, len(HISTORY)), jnp.nan, dtype
            ),
        )
        return vary(loop, like=x0)

    def run(self, loop: Loop) -> Loop:
        """Iterates until something stops the solve."""
        return lax.while_loop(
            lambda loop: ~loop.done,
            lambda loop: self.step(loop, loop.num_steps >= self.max_steps),
            loop,
        )

    def step(self, loop: Loop, stop) -> Loop:
        """One accepted iteration; with `stop`, only the pass that gives the policy."""
        stop = stop | loop.stopping
        before = loop.trajectory
        if not self.search.monotone:
            before = where(stop, loop.best, before)
        expansion = expanded(self.method, self.chain, before)
        usable = expansion.first_nonfinite > self.chain.horizon
        passes = self._passes(loop, before, expansion, stop, usable)
        usable = passes.first_nonfinite > self.chain.horizon

        accepted, failed = passes.verdict.accept, passes.verdict.fail
        after = where(accepted, passes.trial, before)
        noise = ROUNDINGS * jnp.finfo(before.cost.dtype).eps * jnp.abs(before.cost)
        quiet = passes.promised <= noise
        stalled = (accepted | failed) & ~(after.cost < before.cost) & quiet
        diverged = failed & ~(passes.trial.first_nonfinite > self.chain.horizon)
        diverged = diverged & passes.positive
        # Only a search that is not monotone leaves a better iterate behind.
        ended = passes.converged | ~usable
        worse = ended & ~stop & (loop.best.cost < before.cost)
        well = stalled | passes.converged
        unbounded = after.cost < -UNBOUNDED * (1 + jnp.abs(loop.first_cost))
        denied = stop & (loop.result == RESULTS.successful) & ~quiet

        result = RESULTS.max_steps_reached
        for applies, code in (  # the last one that applies counts
            (stop, loop.result),
            (denied, RESULTS.no_descent),
            (failed, self.search.exhausted),
            (failed & ~passes.positive, self.search.no_minimum),
            (diverged, RESULTS.nonfinite_rollout),
            (unbounded, RESULTS.cost_unbounded),
            (well, RESULTS.successful),
            (worse, RESULTS.no_descent),
            (~usable, RESULTS.nonfinite_derivative),
        ):
            result = RESULTS.where(applies, code, result)
        first = jnp.where(usable, passes.trials_nonfinite, passes.first_nonfinite)
        seen = first <= self.chain.horizon

        best = after
        if not self.search.monotone:
            best = where(after.cost < loop.best.cost, after, loop.best)
        return Loop(
            trajectory=after,
            best=best,
            gains=passes.gains,
            search=where(failed, loop.search, passes.search),
            feasible_damping=passes.feasible_damping,
            result=result,
            stopping=failed | stalled | worse | unbounded,
            done=stop | (ended & ~worse),
            num_steps=loop.num_steps + accepted.astype(jnp.int32),
            num_rollouts=passes.num_rollouts,
            num_backwards=passes.num_backwards,
            first_nonfinite=jnp.where(seen, first, loop.first_nonfinite),
            nonfinite_step=jnp.where(seen, loop.num_steps, loop.nonfinite_step),
            first_cost=loop.first_cost,
            gradient=passes.gradient,
            decrement=passes.decrement,
            minimum=passes.minimum,
            history=self._record(loop, before, passes, stop),
        )

    def _record(self, loop: Loop, before: VectorTrajectory, passes: Passes, stop):
        """The history with a row about the iterate and the step from it."""
        row = jnp.stack([
            before.cost,
            jnp.where(passes.verdict.accept, passes.search.stepsize, jnp.nan),
            passes.damping,
            passes.slope,
            jnp.where(stop, 0, passes.search.trials).astype(before.cost.dtype),
            passes.gradient,
        ])  # fmt: skip
        if self.verbose:
            report(self.verbose, loop.num_steps, row)
        if not loop.history.shape[0]:
            return loop.history
        # The row of a search that failed stays.
        written = loop.history[loop.num_steps]
        row = jnp.where(jnp.isnan(written[0]), row, written)
        return lax.dynamic_update_index_in_dim(loop.history, row, loop.num_steps, 0)

    def _passes(self, loop, before, expansion, stop, usable) -> Passes:
        """Backward passes, each with its trials, until one trial is accepted.

        The last ones at a final iterate have no trials: without damping, and if there
        is no minimum, with the last damping that had one.
        """
        false, T = jnp.zeros_like(stop), self.chain.horizon
        begun = self.search.begin(loop.search, expansion.cost_gradient)
        check_memory(self.search, "begin", begun, self.chain.dtype)
        start = jnp.where(stop, POLICY, SEARCH)
        nan = jnp.full_like(before.cost, jnp.nan)
        passes = Passes(
            purpose=jnp.where(usable, start, END).astype(jnp.int32),
            search=where(stop, loop.search, begun),
            gains=jtu.tree_map(jnp.zeros_like, loop.gains),
            damping=jnp.zeros_like(nan),
            feasible_damping=loop.feasible_damping,
            slope=nan,
            gradient=nan,
            decrement=jnp.full_like(nan, jnp.inf),
            promised=nan,
            positive=false,
            minimum=false,
            converged=false,
            refuted=false,
            trials_nonfinite=jnp.full_like(before.first_nonfinite, T + 1),
            first_nonfinite=expansion.first_nonfinite,
            trial=before,
            verdict=Verdict(false, false, false),
            num_rollouts=loop.num_rollouts,
            num_backwards=loop.num_backwards,
        )
        return lax.while_loop(
            lambda p: p.purpose != END,
            lambda p: self._pass(p, before, expansion),
            passes,
        )

    def _pass(self, p: Passes, before: VectorTrajectory, expansion) -> Passes:
        """One backward pass, its trials, and what comes next."""
        tolerance = self.atol + self.rtol * jnp.abs(before.cost)
        searching = p.purpose == SEARCH
        damping = jnp.where(p.purpose == FALLBACK, p.feasible_damping, 0)
        damping = jnp.where(searching, p.search.damping, damping)
        sweep = swept(self.method, self.chain, before, expansion.model, damping)
        positive, promised = sweep.positive, promised_by(sweep)
        small = positive & (promised <= tolerance)
        suspected = searching & small & ~(p.refuted & (damping > 0))
        # Where the model has no minimum the iterate may be a maximum or a saddle.
        testing = p.purpose == TEST
        leaving = testing & ~positive
        trying = leaving | (searching & positive & ~suspected)
        state, verdict, trial, num_rollouts, nonfinite = self._trials(
            p, before, expansion, sweep, trying, leaving, tolerance
        )
        state = where(leaving & ~verdict.accept, p.search, state)
        rejected = self.search.reject(state)
        check_judged(self.search, "reject", rejected, self.chain.dtype)
        state, verdict = where(searching & ~positive, rejected, (state, verdict))
        # Where there is a minimum without damping, it alone decides.
        refuted = testing & positive & ~small
        confirmed = testing & ~refuted & ~verdict.accept
        settled = (p.purpose == POLICY) | (p.purpose == FALLBACK)
        converged = jnp.where(settled, small, confirmed | (suspected & (damping == 0)))
        purpose = jnp.select(
            [
                suspected & (damping > 0),
                searching & verdict.refresh,
                refuted,
                testing & verdict.accept,
                (testing | (p.purpose == POLICY)) & ~positive,
            ],
            [TEST, SEARCH, SEARCH, END, FALLBACK],
            END,
        )
        first = jnp.minimum(p.first_nonfinite, sweep.first_nonfinite)
        purpose = jnp.where(first > self.chain.horizon, purpose, END)
        decrement = jnp.where(positive, promised, p.decrement)
        return Passes(
            purpose=purpose.astype(jnp.int32),
            search=state,
            gains=where(positive, sweep.gains, p.gains),
            damping=damping,
            feasible_damping=jnp.where(
                searching & positive, damping, p.feasible_damping
            ),
            slope=jnp.where(positive, sweep.slope, p.slope),
            gradient=sweep.gradient,
            decrement=decrement,
            promised=jnp.where(positive, jnp.fmax(p.promised, decrement), p.promised),
            positive=positive,
            minimum=jnp.where(damping == 0, positive, p.minimum),
            converged=p.converged | converged,
            refuted=p.refuted | refuted,
            trials_nonfinite=nonfinite,
            first_nonfinite=first,
            trial=trial,
            verdict=verdict,
            num_rollouts=num_rollouts,
            num_backwards=p.num_backwards + 1,
        )

    def _trials(
        self, passes, before, expansion, sweep: Sweep, trying, leaving, tolerance
    ):
        """Roll-outs along one direction until the search has a verdict.

        When `leaving` a stationary point, until the cost falls beyond the tolerance.
        """

        def decided(verdict: Verdict):
            return verdict.accept | verdict.refresh | verdict.fail

        def body(carry):
            state, _, _, num_rollouts, nonfinite = carry
            trial, _ = self.method.forward(
                self.chain, before, expansion.model, sweep, state.stepsize
            )
            finite = trial.first_nonfinite > self.chain.horizon
            cost = jnp.where(finite, trial.cost, jnp.inf)
            judged = self.search.step(
                state,
                Trial(
                    before.cost,
                    cost,
                    sweep.slope,
                    sweep.curvature,
                    expansion.cost_gradient,
                ),
            )
            check_judged(self.search, "step", judged, self.chain.dtype)
            falls = cost < before.cost - tolerance
            shorter = eqx.tree_at(
                lambda state: (state.stepsize, state.trials),
                state,
                (jnp.where(falls, 1, LEAVE) * state.stepsize, state.trials + 1),
            )
            left = Verdict(falls, no(falls), ~falls & (shorter.stepsize < LEAST))
            state, verdict = where(leaving, (shorter, left), judged)
            nonfinite = jnp.minimum(nonfinite, trial.first_nonfinite)
            return state, verdict, trial, num_rollouts + 1, nonfinite

        false = jnp.zeros_like(trying)
        whole = jnp.where(leaving, 1, passes.search.stepsize)
        carry = (
            eqx.tree_at(lambda state: state.stepsize, passes.search, whole),
            Verdict(false, false, false),
            passes.trial,
            passes.num_rollouts,
            passes.trials_nonfinite,
        )
        return lax.while_loop(lambda c: trying & ~decided(c[1]), body, carry)
