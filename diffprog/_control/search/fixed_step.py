from typing import ClassVar

import jax.numpy as jnp

from ..._common.result import RESULTS
from ..._common.types import Number, number
from .base import (
    AbstractSearch,
    check_ranges,
    NOT_NEGATIVE,
    POSITIVE,
    SearchState,
    Verdict,
)


class FixedStep(AbstractSearch):
    """Takes every step with the same step size and damping, whatever the cost.

    For model predictive control at a fixed rate, and for studies. The cost may rise on
    the way: what is returned is the iterate with the lowest cost, which may be the
    first guess. A step that is not finite ends the solve.
    """

    stepsize: Number = number(1.0)
    damping: Number = number(0.0)

    monotone: ClassVar[bool] = False
    exhausted: ClassVar[RESULTS] = RESULTS.nonfinite_rollout
    no_minimum: ClassVar[RESULTS] = RESULTS.factorization_failed

    def __check_init__(self):
        check_ranges(self, stepsize=POSITIVE, damping=NOT_NEGATIVE)

    def init(self, dtype):
        scalar = lambda value: jnp.asarray(value, dtype)
        zero = jnp.zeros((), jnp.int32)
        return SearchState(
            scalar(self.stepsize), scalar(self.damping), scalar(0.0), zero
        )

    def begin(self, state, cost_gradient):
        return self.init(state.stepsize.dtype)

    def step(self, state, trial):
        finite = jnp.isfinite(trial.trial_cost)
        return state, Verdict(finite, jnp.zeros_like(finite), ~finite)

    def reject(self, state):
        fail = jnp.ones_like(state.damping, bool)
        return state, Verdict(~fail, ~fail, fail)


FixedStep.__init__.__doc__ = """**Arguments:**

- `stepsize`: the step size of every step.
- `damping`: the damping of every backward pass.
"""
