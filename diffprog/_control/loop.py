"""The solver: a loop over accepted iterations, inside it one over backward passes.

A pass has a purpose, and what it finds says what is next: the first row that applies.

| purpose | the pass found                | next                | converged |
| ------- | ----------------------------- | ------------------- | --------- |
| search  | a small promise, but damped   | test                |           |
| search  | that more damping is needed   | search              |           |
| test    | a promise that is not small   | search, no new test |           |
| test    | no minimum, and no way down   | fallback            | yes       |
| policy  | no minimum                    | fallback            |           |
| any     | a small promise               | end                 | yes       |
| any     | else, or numbers not finite   | end                 |           |
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._chain.vector import run, through, VectorChain, VectorTrajectory
from .._common.loops import while_loop
from .._common.result import RESULTS
from .._common.tree import no, vary, where, yes
from .direction import AbstractDirection, Expansion
from .direction.base import check_expansion, check_sweep
from .gaps import is_better, Price, price_of
from .lqr import Sweep
from .lqr.expand import Recomputed
from .outer import AbstractOuter
from .outer_loop import after_step, before_step, before_steps
from .records import (
    Counts,
    Known,
    Loop,
    Passes,
    Purpose,
    recorded,
    rounding,
    Trials,
    Trouble,
)
from .report import columns
from .search import AbstractSearch
from .search.base import check_judged, check_memory, SearchState, Trial, Verdict


# A cost that fell below minus this many times its first size has no bound.
UNBOUNDED = 1e15

# Steps along negative curvature away from a stationary point: each so many times the
# one before, down to the least.
LEAVE, LEAST = 1 / 8, 1e-5


PURPOSES = Purpose.search, Purpose.test, Purpose.policy, Purpose.fallback


class Solver(eqx.Module):
    """What stays the same during a solve."""

    chain: VectorChain
    method: AbstractDirection
    search: AbstractSearch
    rtol: Any
    atol: Any
    max_steps: int = eqx.field(static=True)
    verbose: bool | Callable = eqx.field(static=True)
    outer: AbstractOuter | None = None
    omega: Any = None  # the gradient that ends iterations before an update
    tests: bool = eqx.field(static=True, default=True)  # whether a pass may be one

    def init(
        self, x0, us, states: Any, state: SearchState, duals, history: bool
    ) -> Loop:
        """Before the first iteration, from controls and maybe states."""
        chain = self.chain
        outer = self.outer and self.outer.init(duals)
        if outer:
            chain = chain.priced(outer.duals)
        us = chain.within(us)
        given = states and through(chain, states[0], states[1], us)
        return self.start(given or run(chain, x0, us), state, outer, history)

    def start(
        self, trajectory, state: SearchState, outer: Any = None, history: bool = False
    ) -> Loop:
        """Before the first iteration, at a trajectory."""
        chain, dtype, us = self.chain, self.chain.dtype, trajectory.us
        number = lambda value: jnp.asarray(value, dtype)
        count = lambda value: jnp.asarray(value, jnp.int32)
        finite = trajectory.first_nonfinite > chain.horizon
        cost = jnp.where(finite, trajectory.cost, jnp.inf)
        trajectory = eqx.tree_at(lambda t: t.cost, trajectory, cost)
        memory = check_memory(self.search, "init", self.search.init(dtype), dtype)
        cast = lambda old, new: jnp.asarray(old, new.dtype)
        given = jtu.tree_map(cast, state, memory)
        widths = [1 + segment.chart.size for segment in chain.segments]
        gains = tuple(jnp.zeros((*u.shape, w), dtype) for u, w in zip(us, widths))
        nan = number(jnp.nan)
        wrong = RESULTS.nonfinite_rollout
        if chain.limits:
            wrong = RESULTS.where(chain.is_crossed, RESULTS.infeasible, wrong)
        result = RESULTS.where(finite, RESULTS.max_steps_reached, wrong)
        never = jnp.where(finite, count(self.max_steps + 1), 0)
        search = where(jnp.isnan(given.stepsize), memory, given)
        rows = (self.max_steps + 1) * history
        names = columns(bool(outer), trajectory.gaps)
        constrained, ended = None, ~finite
        if outer:
            constrained, hopeless = before_steps(self, outer, trajectory, memory)
            result = RESULTS.where(finite & hopeless, RESULTS.infeasible, result)
            ended |= hopeless
        loop = Loop(
            trajectory=trajectory,
            best=trajectory,
            search=search,
            known=Known(
                gains, number(0.0), nan, nan, number(jnp.inf), no(finite), outer and nan
            ),
            counts=Counts(count(0), count(1), count(0)),
            trouble=Trouble(trajectory.first_nonfinite, never),
            result=result,
            stopping=ended,
            done=ended,
            first_cost=cost,
            history=jnp.full((rows, len(names)), jnp.nan, dtype),
            constrained=constrained,
            weight=number(0.0) if trajectory.gaps else None,
        )
        return vary(loop, like=trajectory)

    def run(self, loop: Loop) -> Loop:
        """Iterates until something stops the solve."""
        return while_loop(
            lambda loop: ~loop.done,
            lambda loop: self.step(loop, loop.counts.steps >= self.max_steps),
            loop,
        )

    def step(self, loop: Loop, stop) -> Loop:
        """One accepted iteration; with `stop`, only the pass that gives the policy."""
        stop = stop | loop.stopping
        at, outer = loop.constrained, self.outer
        if at is None or outer is None:
            return self._step(loop, stop)
        chain = self.chain.priced(at.state.duals)
        inner = replace(self, chain=chain, omega=outer.omega(at.state))
        before = before_step(self, loop, stop)
        return after_step(self, before, inner._step(before, stop), stop)

    def _step(self, loop: Loop, stop) -> Loop:
        before = loop.trajectory
        if not self.search.monotone:
            before = where(stop, loop.best, before)
        local, at = self.chain.around(before)
        expansion = self.method.expand(local, at)
        check_expansion(self.method, expansion)
        passes = while_loop(
            lambda p: p.purpose != Purpose.end,
            lambda p: self._pass(p, before, expansion, (local, at)),
            self._begin(loop, before, expansion, stop),
        )
        accepted = passes.trials.verdict.accept
        after = where(accepted, passes.trials.last, before)
        best = after
        if not self.search.monotone:
            best = where(is_better(after, loop.best), after, loop.best)
        usable = passes.first_nonfinite > self.chain.horizon
        result, stopping, done = self._judge(loop, before, after, passes, stop, usable)
        trials = passes.trials
        first = jnp.where(usable, trials.first_nonfinite, passes.first_nonfinite)
        new = Trouble(first, loop.counts.steps)
        return Loop(
            trajectory=after,
            best=best,
            search=where(trials.verdict.fail, loop.search, trials.search),
            known=passes.known,
            counts=Counts(
                loop.counts.steps + accepted.astype(jnp.int32),
                trials.rollouts,
                passes.backwards,
            ),
            trouble=where(first <= self.chain.horizon, new, loop.trouble),
            result=result,
            stopping=stopping,
            done=done,
            first_cost=loop.first_cost,
            history=recorded(loop, before, passes, stop, self.verbose),
            constrained=loop.constrained,
            weight=passes.price and passes.price.weight,
        )

    def _judge(self, loop, before, after, passes: Passes, stop, usable):
        """The result so far; whether only the policy is left to find; whether none."""
        verdict, horizon = passes.trials.verdict, self.chain.horizon
        quiet = passes.promised <= rounding(before.cost)
        failed = verdict.fail
        stalled = (verdict.accept | failed) & (after.cost >= before.cost) & quiet
        # Where neither controls nor search change, no iteration changes anything.
        search, left = passes.trials.search, loop.search
        same = (search.stepsize == left.stepsize) & (search.damping == left.damping)
        for us, left in zip(after.us, before.us):
            same &= jnp.all(us == left)
        if passes.price:
            same &= ~passes.price.is_open
        stalled |= verdict.accept & same
        diverged = failed & (passes.trials.last.first_nonfinite <= horizon)
        # Only a search that is not monotone leaves a better iterate behind.
        ended = passes.converged | ~usable
        worse = ended & ~stop & (loop.best.cost < before.cost)
        unbounded = after.cost < -UNBOUNDED * (1 + jnp.abs(loop.first_cost))
        denied = stop & (loop.result == RESULTS.successful) & ~quiet
        if self.omega is not None:  # the outer method has judged
            denied = no(stop)

        result = RESULTS.max_steps_reached
        for applies, code in (  # the last one that applies counts
            (stop, loop.result),
            (denied, RESULTS.no_descent),
            (failed, self.search.exhausted),
            (failed & ~passes.positive, self.search.no_minimum),
            (diverged & passes.positive, RESULTS.nonfinite_rollout),
            (unbounded, RESULTS.cost_unbounded),
            (stalled | passes.converged, RESULTS.successful),
            (worse, RESULTS.no_descent),
            (~usable, RESULTS.nonfinite_derivative),
        ):
            result = RESULTS.where(applies, code, result)
        stopping = failed | stalled | worse | unbounded
        return result, stopping, stop | (ended & ~worse)

    def _begin(self, loop: Loop, before, expansion: Expansion, stop) -> Passes:
        """The state before the first pass at an iterate."""
        false, T = no(stop), self.chain.horizon
        nan, inf = (jnp.full_like(before.cost, fill) for fill in (jnp.nan, jnp.inf))
        gains = jtu.tree_map(jnp.zeros_like, loop.known.gains)
        begun = self.search.begin(loop.search, expansion.cost_gradient)
        check_memory(self.search, "begin", begun, self.chain.dtype)
        start = Purpose.where(stop, Purpose.policy, Purpose.search)
        usable = expansion.first_nonfinite > T
        return Passes(
            purpose=Purpose.where(usable, start, Purpose.end),
            known=Known(
                gains,
                loop.known.feasible_damping,
                nan,
                nan,
                inf,
                false,
                None if self.omega is None else nan,
            ),
            trials=Trials(
                where(stop, loop.search, begun),
                before,
                Verdict(false, false, false),
                loop.counts.rollouts,
                jnp.full_like(before.first_nonfinite, T + 1),
            ),
            damping=jnp.zeros_like(nan),
            positive=false,
            promised=nan,
            converged=false,
            refuted=false if self.tests else yes(stop),
            first_nonfinite=expansion.first_nonfinite,
            backwards=loop.counts.backwards,
            price=price_of(before, loop.weight),
        )

    def _pass(self, p: Passes, before: VectorTrajectory, expansion, local) -> Passes:
        """One backward pass, its trials, and what comes next: a row of the table."""
        is_for = lambda purpose: p.purpose == purpose
        searching, testing, policy, fallback = map(is_for, PURPOSES)
        damping = jnp.where(fallback, p.known.feasible_damping, 0)
        damping = jnp.where(searching, p.trials.search.damping, damping)
        sweep, price = self._swept(p.price, local, expansion.model, damping, searching)
        positive, promised, damped = sweep.positive, sweep.promised, damping > 0
        tolerance = self.atol + self.rtol * jnp.abs(before.cost)
        small, doubtful = self._is_small(sweep, promised, tolerance, damped, price)
        suspected, refuted = small & ~(p.refuted & doubtful), positive & ~small
        # Where the model has no minimum the iterate may be a maximum or a saddle.
        leaving = testing & ~positive
        trying = leaving | (searching & positive & ~suspected)
        ways = price, trying, leaving, tolerance
        trials = self._trials(p.trials, before, expansion, sweep, *ways)
        rejected = self.search.reject(trials.search)
        check_judged(self.search, "reject", rejected, self.chain.dtype)
        state, verdict = where(
            searching & ~positive, rejected, (trials.search, trials.verdict)
        )
        state = where(leaving & ~verdict.accept, p.trials.search, state)
        trials = eqx.tree_at(lambda t: (t.search, t.verdict), trials, (state, verdict))
        purpose, converged = Purpose.end, suspected
        for applies, then, confirmed in reversed((
            (searching & suspected & doubtful, Purpose.test, False),
            (searching & verdict.refresh, Purpose.search, False),
            (testing & refuted, Purpose.search, False),
            (testing & ~positive & ~verdict.accept, Purpose.fallback, True),
            (policy & ~positive, Purpose.fallback, False),
        )):  # fmt: skip
            purpose = Purpose.where(applies, then, purpose)
            converged = jnp.where(applies, confirmed, converged)
        first = jnp.minimum(p.first_nonfinite, sweep.first_nonfinite)
        purpose = Purpose.where(first > self.chain.horizon, purpose, Purpose.end)

        latest = lambda new, old: jnp.where(positive, new, old)
        known, seen = p.known, p.promised  # NaN at first
        return Passes(
            purpose=purpose,
            known=Known(
                gains=where(positive, sweep.gains, known.gains),
                feasible_damping=jnp.where(
                    searching & positive, damping, known.feasible_damping
                ),
                slope=latest(sweep.slope, known.slope),
                gradient=sweep.gradient,
                decrement=latest(promised, known.decrement),
                minimum=jnp.where(damped, known.minimum, positive),
                largest=None if self.omega is None else sweep.largest_entry,
            ),
            trials=trials,
            damping=damping,
            positive=positive,
            promised=latest(jnp.where(seen > promised, seen, promised), seen),
            converged=p.converged | converged,
            refuted=p.refuted | (testing & refuted),
            first_nonfinite=first,
            backwards=p.backwards + 1,
            price=price,
        )

    def _swept(
        self, price: Price | None, local, model, damping, searching
    ) -> tuple[Sweep, Price | None]:
        """A backward pass, as that of the merit where there may be gaps."""
        if hasty := isinstance(model, Recomputed) and self.omega is None:
            model = replace(model, gives_up=searching)
        sweep = self.method.backward(local[0], local[1], model, damping)
        check_sweep(self.method, local[1], sweep)
        if hasty:
            found = jnp.where(sweep.positive | ~searching, sweep.gradient, jnp.nan)
            sweep = replace(sweep, gradient=found)
        if price is None:
            return sweep, None
        price = price.raised(sweep)
        return price.along(sweep), price

    def _is_small(self, sweep: Sweep, promised, tolerance, damped, price):
        """Whether the pass finds little to gain; whether only its damping says so."""
        small = sweep.positive & (promised <= tolerance)
        if self.omega is not None:  # a gradient says as much with damping
            small, damped = sweep.largest_entry <= self.omega, no(damped)
        return small if price is None else small & ~price.is_open, damped

    def _trials(
        self, trials: Trials, before, expansion, sweep, price: Price | None, *ways: Any
    ) -> Trials:
        """Roll-outs along one direction until the search has a verdict.

        When `leaving` a stationary point, until the cost falls beyond the tolerance.
        """
        trying, leaving, tolerance = ways

        def body(trials: Trials) -> Trials:
            state = trials.search
            at: Any = (before, expansion.model, sweep, state.stepsize)
            trial, _ = self.method.forward(self.chain, *at)
            finite = trial.first_nonfinite > self.chain.horizon
            cost = jnp.where(finite, trial.cost, jnp.inf)
            costs = before.cost, cost
            if price:
                costs = price.merits(*costs, state.stepsize)
            known: Any = (*costs, sweep.slope, sweep.curvature)
            judged = self.search.step(
                state, Trial(*known, cost_gradient=expansion.cost_gradient)
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
            first = jnp.minimum(trials.first_nonfinite, trial.first_nonfinite)
            return Trials(state, trial, verdict, trials.rollouts + 1, first)

        false = no(trying)
        whole = jnp.where(leaving, 1, trials.search.stepsize)
        start = eqx.tree_at(
            lambda t: (t.search.stepsize, t.verdict),
            trials,
            (whole, Verdict(false, false, false)),
        )
        decided = lambda v: v.accept | v.refresh | v.fail
        return while_loop(lambda t: trying & ~decided(t.verdict), body, start)
