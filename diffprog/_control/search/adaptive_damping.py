from typing import ClassVar

import jax.numpy as jnp

from ..._common.result import RESULTS
from ..._common.tree import where
from ..._common.types import Number, number
from .base import (
    AbstractSearch,
    check_ranges,
    FACTOR,
    GROWTH,
    NOT_NEGATIVE,
    POSITIVE,
    SearchState,
    Verdict,
)


class AdaptiveDamping(AbstractSearch):
    r"""Full steps of a regularized model; a rejected step raises the damping.

    Accepts when $J(\text{trial}) - J \le \text{slope} + \frac12 \text{curvature}$, the
    least value of the damped model; else multiplies $1/\nu$ by `decrease`. An accepted
    damping is remembered relative to the norm of the costs' gradient,
    $\nu = \text{scale} \cdot \|\nabla h\|$, and divided by `increase` for the next
    iteration: the scaling for which global and local rates are known. A damping below
    `min_damping` counts as 0, one above `max_damping` ends the solve. Every trial costs
    a backward pass.

    Source: "Complexity Bounds of Iterative Linear Quadratic Optimization Algorithms for
    Discrete Time Nonlinear Control", 2022, arXiv 2204.02322.
    """

    scale: Number = number(1e-2)
    increase: Number = number(8.0)
    decrease: Number = number(0.5)
    min_damping: Number = number(1e-9)
    max_damping: Number = number(1e10)

    monotone: ClassVar[bool] = True
    exhausted: ClassVar[RESULTS] = RESULTS.damping_limit
    no_minimum: ClassVar[RESULTS] = RESULTS.damping_limit

    def __check_init__(self):
        check_ranges(
            self,
            scale=NOT_NEGATIVE,
            increase=GROWTH,
            decrease=FACTOR,
            min_damping=POSITIVE,
            max_damping=POSITIVE,
        )

    def init(self, dtype):
        scalar = lambda value: jnp.asarray(value, dtype)
        zero = jnp.zeros((), jnp.int32)
        return SearchState(scalar(1.0), scalar(0.0), scalar(self.scale), zero)

    def begin(self, state, cost_gradient):
        damping = state.scale / self.increase * cost_gradient
        damping = jnp.where(damping < self.min_damping, 0, damping)
        one, zero = jnp.ones_like(state.stepsize), jnp.zeros_like(state.trials)
        return SearchState(one, damping, state.scale, zero)

    def step(self, state, trial):
        accept = trial.decreases(trial.change(state.stepsize))
        trials, flat = state.trials + 1, trial.cost_gradient == 0
        scale = state.damping / jnp.where(flat, 1, trial.cost_gradient)
        accepted = SearchState(state.stepsize, state.damping, scale, trials)
        raised, verdict = self.reject(
            SearchState(state.stepsize, state.damping, state.scale, trials)
        )
        return where(accept, accepted, raised), Verdict(
            accept, ~accept & verdict.refresh, ~accept & verdict.fail
        )

    def reject(self, state):
        damping = jnp.maximum(state.damping / self.decrease, self.min_damping)
        # Also for numbers that are NaN or do not grow: the solve must end.
        fail = ~(damping <= self.max_damping) | ~(damping > state.damping)
        state = SearchState(state.stepsize, damping, state.scale, state.trials)
        return state, Verdict(jnp.zeros_like(fail), ~fail, fail)


AdaptiveDamping.__init__.__doc__ = """**Arguments:**

- `scale`: the first damping is this times the norm of the costs' gradient, divided by
    `increase`.
- `increase`: factor of the inverse damping from one iterate to the next.
- `decrease`: factor of the inverse damping after a rejected trial, in (0, 1).
- `min_damping`: the first damping above 0; a lower one counts as 0.
- `max_damping`: above it the search gives up.
"""
