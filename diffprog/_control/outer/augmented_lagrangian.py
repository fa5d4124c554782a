from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu

from ..._chain.constraints import Duals
from ..._common.types import (
    check_positive,
    Number,
    number,
    number_or_none,
    positive_int,
)
from .base import AbstractOuter, OuterState


GROWTH = 10.0  # of a penalty
RISES = 3  # in a row without use end an attempt


class AugmentedLagrangian(AbstractOuter):
    r"""Multipliers and penalties around the same iterations.

    $$J + \sum_h \left(y h + \tfrac c2 h^2\right)
    + \sum_g \tfrac{1}{2c} \left([y + c g]_+^2 - y^2\right)$$

    is minimized until its gradient is small enough for the present multipliers y. Where
    the constraint is satisfied well enough by then, they become $y + c h$ and
    $[y + c g]_+$; else the penalty c rises tenfold, and both happen where it is nearly
    satisfied. Each constraint has its own. Above tol / (2 eps), 2e7 in float64 and 400
    in float32, roundings of c h may exceed tol, and penalties rise only where new
    multipliers alone do not help. Where penalties rise in vain, or the gradient never
    gets small, the solve starts once more from the first guess, with `second_penalty`,
    before it is `infeasible`. A first penalty that is too small lets the first
    iterations run into a place where the constraints cannot be met, one that is too
    large holds them at the first guess.

    Source: A. Conn, N. Gould, P. Toint, "A Globally Convergent Augmented Lagrangian
    Algorithm for Optimization with General Constraints and Simple Bounds", 1991.
    """

    penalty: Number = number(10.0, check_positive)
    second_penalty: Number = number(1e3, check_positive)
    max_penalty: Number | None = number_or_none()
    tol: Number | None = number_or_none()
    max_inner: int = positive_int(50)

    def _limits(self, dtype: Any):
        double = dtype == jnp.float64
        cap, tol = self.max_penalty, self.tol
        cap = (1e8 if double else 1e5) if cap is None else cap
        tol = (1e-8 if double else 1e-4) if tol is None else tol
        return jnp.asarray(cap, dtype), jnp.asarray(tol, dtype)

    def init(self, duals):
        given = duals.penalty
        return self._start(duals, jnp.where(jnp.isnan(given), self.penalty, given), 1)

    def _start(self, duals: Duals, penalty: Any, attempt: int) -> OuterState:
        like = duals.penalty
        zero = jnp.zeros((), jnp.int32)
        number = lambda value: jnp.asarray(value, like.dtype)
        return OuterState(
            duals=replace(duals, penalty=jnp.broadcast_to(number(penalty), like.shape)),
            eta=jnp.full_like(like, 0.1),
            omega=number(0.1),
            worst=number(jnp.inf),
            rises=zero,
            started=zero,
            idle=zero,
            unseen=zero,
            num_outer=zero,
            attempt=zero + attempt,
        )

    def omega(self, state):
        return jnp.maximum(state.omega, self._limits(state.omega.dtype)[1])

    def finished(self, state, found, gradient):
        _, tol = self._limits(gradient.dtype)
        return (gradient <= tol) & jnp.all(found.residual <= tol)

    def update(self, state, found, solved):
        c = state.duals.penalty
        cap, tol = self._limits(c.dtype)
        good = found.residual <= jnp.maximum(state.eta, tol)
        near = solved & (found.residual <= tol**0.25)
        worst = jnp.max(found.residual)
        helped = worst <= state.worst / 4  # since the last update that was in vain
        # The rounding of c h is a part of the gradient. Where it may exceed tol, a
        # penalty rises only if multipliers alone do not help.
        fine = tol / (2 * jnp.finfo(c.dtype).eps)
        highest = jnp.where(helped, jnp.minimum(fine, cap), cap)
        raised = jnp.maximum(c, jnp.minimum(GROWTH * c, highest))
        penalty = jnp.where(good | ~solved, c, raised)
        duals = found.duals.chosen(good | near, state.duals)
        base = jnp.maximum(c, 10)
        largest = jnp.maximum(jnp.max(penalty), 10)
        looser = jnp.where(near, state.eta, 0.1 / penalty**0.1)
        every = jnp.all(good)
        vain = ~helped & (worst > jnp.sqrt(tol))
        rises = jnp.where(vain, state.rises + 1, 0)
        rises = jnp.where(every, state.rises, rises)
        gave_up = (solved & jnp.any(~good & (c >= cap))) | (rises >= RISES)
        new = replace(
            state,
            duals=replace(duals, penalty=penalty),
            eta=jnp.where(good, state.eta / base**0.9, looser),
            omega=jnp.where(every, state.omega / largest, 0.1 / largest**0.5),
            worst=jnp.where(every, state.worst, worst),
            rises=rises,
            num_outer=state.num_outer + 1,
        )
        return new, gave_up

    def left(self, state, found, successful):
        # Good multipliers need no high penalties. At the same point the gradient is
        # the same: y + c h = new, and z + d h is as well for z = new + d / c (y - new).
        c = state.duals.penalty
        lower = jnp.minimum(c, GROWTH * self.penalty)
        lower = jnp.where(successful, lower, c)
        duals = found.duals.mixed(lower / c, state.duals)
        return replace(duals, penalty=lower)

    def again(self, state):
        zeros = jtu.tree_map(jnp.zeros_like, state.duals)
        new = self._start(zeros, self.second_penalty, 2)
        new = replace(new, num_outer=state.num_outer)
        return new, (state.attempt < 2) & (self.second_penalty > self.penalty)


AugmentedLagrangian.__init__.__doc__ = """**Arguments:**

- `penalty`: the first one, of every constraint.
- `second_penalty`: that of the second attempt; there is none if it is not larger.
- `max_penalty`: penalties rise no further; 1e8 in float64 and 1e5 in float32 unless
    given.
- `tol`: the largest gradient and the largest residual of a constraint of what is called
    `successful`; 1e-8 in float64 and 1e-4 in float32 unless given. Where steps change
    the cost by no more than its rounding, the gradient may be larger.
- `max_inner`: after so many iterations multipliers are updated, however large the
    gradient.
"""
