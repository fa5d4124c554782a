import math
from dataclasses import replace
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from ..._common.result import RESULTS
from ..._common.tree import where
from ..._common.types import Number, number
from .base import (
    AbstractSearch,
    check_ranges,
    FACTOR,
    GROWTH,
    POSITIVE,
    SearchState,
    Verdict,
)


class Backtracking(AbstractSearch):
    r"""Armijo backtracking along one direction.

    Accepts the step size s when
    $J(\text{trial}) - J \le \text{slope\_fraction} \cdot s \cdot \text{slope}$, else
    multiplies it by `decrease`. The first trial of an iteration is `increase` times the
    last accepted step size, at most 1. When `max_trials` run out, or the factorization
    fails, the damping rises and the direction is computed anew; accepted steps after
    which the next trial is a full one lower it again, below `min_damping` to 0. In a
    row of rises, or of falls, the factor itself grows each time by `damping_factor`.

    Source of the rule of the damping: Tassa, Erez, Todorov, "Synthesis and
    Stabilization of Complex Behaviors through Online Trajectory Optimization", 2012.
    """

    slope_fraction: Number = number(1e-4)
    decrease: Number = number(0.5)
    increase: Number = number(4.0)
    max_trials: int = eqx.field(static=True, default=20)
    damping_factor: Number = number(2.35)
    min_damping: Number = number(1e-6)
    max_damping: Number = number(1e10)

    monotone: ClassVar[bool] = True
    exhausted: ClassVar[RESULTS] = RESULTS.no_descent
    no_minimum: ClassVar[RESULTS] = RESULTS.damping_limit

    def __check_init__(self):
        check_ranges(
            self,
            slope_fraction=(lambda value: 0 <= value < 1, "a number in [0, 1)"),
            decrease=FACTOR,
            increase=GROWTH,
            max_trials=GROWTH,
            damping_factor=(lambda value: 1 < value < math.inf, "a number > 1"),
            min_damping=POSITIVE,
            max_damping=POSITIVE,
        )

    def init(self, dtype):
        return SearchState.first(dtype, scale=1.0)

    def begin(self, state, cost_gradient):
        stepsize = jnp.minimum(self.increase * state.stepsize, 1)
        zero = jnp.zeros_like(state.trials)
        return replace(state, stepsize=stepsize, trials=zero)

    def step(self, state, trial):
        s = state.stepsize
        accept = trial.decreases(self.slope_fraction * s * trial.slope)
        state = replace(state, trials=state.trials + 1)
        scale = jnp.minimum(state.scale, 1) / self.damping_factor
        lower = scale * state.damping
        lower = jnp.where(lower < self.min_damping, 0, lower)
        lowered = replace(state, damping=lower, scale=scale)
        accepted = where(self.increase * s < 1, state, lowered)
        shorter = replace(state, stepsize=s * self.decrease)
        exhausted = ~accept & (state.trials % self.max_trials == 0)
        raised, verdict = self.reject(shorter)
        state = where(accept, accepted, where(exhausted, raised, shorter))
        again, fail = exhausted & verdict.refresh, exhausted & verdict.fail
        return state, Verdict(accept, again, fail)

    def reject(self, state):
        scale = self.damping_factor * jnp.maximum(state.scale, 1)
        raised = scale * state.damping
        damping = jnp.clip(raised, self.min_damping, self.max_damping)
        fail = ~(damping > state.damping)  # also for NaN: the solve must end
        one = jnp.ones_like(state.stepsize)
        verdict = Verdict(jnp.zeros_like(fail), ~fail, fail)
        return replace(state, stepsize=one, damping=damping, scale=scale), verdict


Backtracking.__init__.__doc__ = """**Arguments:**

- `slope_fraction`: how much of the decrease that the slope promises is asked for.
- `decrease`: factor of the step size after a rejected trial, in (0, 1).
- `increase`: factor of the last accepted step size at the next iterate; `jnp.inf`
    starts every iteration at 1.
- `max_trials`: roll-outs along one direction; a Python int.
- `damping_factor`: factor of the first rise or fall of the damping in a row.
- `min_damping`: the first damping above 0; a lower one counts as 0.
- `max_damping`: above it the search gives up.
"""
