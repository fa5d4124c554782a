import math
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
    fails, the damping rises by `damping_factor` and the direction is computed anew;
    full steps lower it again, below `min_damping` to 0.
    """

    slope_fraction: Number = number(1e-4)
    decrease: Number = number(0.5)
    increase: Number = number(4.0)
    max_trials: int = eqx.field(static=True, default=20)
    damping_factor: Number = number(10.0)
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
        scalar = lambda value: jnp.asarray(value, dtype)
        zero = jnp.zeros((), jnp.int32)
        return SearchState(scalar(1.0), scalar(0.0), scalar(0.0), zero)

    def begin(self, state, cost_gradient):
        stepsize = jnp.minimum(self.increase * state.stepsize, 1)
        return SearchState(
            stepsize, state.damping, state.scale, jnp.zeros_like(state.trials)
        )

    def step(self, state, trial):
        s = state.stepsize
        accept = trial.decreases(self.slope_fraction * s * trial.slope)
        trials = state.trials + 1
        lower = state.damping / self.damping_factor
        lower = jnp.where(lower < self.min_damping, 0, lower)
        accepted = SearchState(
            s, jnp.where(s < 1, state.damping, lower), state.scale, trials
        )
        shorter = SearchState(s * self.decrease, state.damping, state.scale, trials)
        exhausted = ~accept & (trials % self.max_trials == 0)
        raised, verdict = self.reject(shorter)
        state = where(accept, accepted, where(exhausted, raised, shorter))
        return state, Verdict(
            accept, exhausted & verdict.refresh, exhausted & verdict.fail
        )

    def reject(self, state):
        damping = jnp.maximum(state.damping * self.damping_factor, self.min_damping)
        # Also for numbers that are NaN or do not grow: the solve must end.
        fail = ~(damping <= self.max_damping) | ~(damping > state.damping)
        one = jnp.ones_like(state.stepsize)
        state = SearchState(one, damping, state.scale, state.trials)
        return state, Verdict(jnp.zeros_like(fail), ~fail, fail)


Backtracking.__init__.__doc__ = """**Arguments:**

- `slope_fraction`: how much of the decrease that the slope promises is asked for.
- `decrease`: factor of the step size after a rejected trial, in (0, 1).
- `increase`: factor of the last accepted step size at the next iterate; `jnp.inf`
    starts every iteration at 1.
- `max_trials`: roll-outs along one direction; a Python int.
- `damping_factor`: factor by which the damping rises and falls.
- `min_damping`: the first damping above 0; a lower one counts as 0.
- `max_damping`: above it the search gives up.
"""
