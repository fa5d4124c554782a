from dataclasses import replace
from typing import ClassVar

import jax.numpy as jnp

from ..._chain.limits import moved, projected
from ..._common.linalg import matmul
from ..._common.tree import norm
from ..lqr import Sweep
from ..lqr.expand import adjoints
from .base import AbstractDirection, feedforward, gradients
from .rollouts import AbstractRollout, Feedback


class Gradient(AbstractDirection):
    r"""Steepest descent: $v = -\nabla J / \nu$, minus the gradient without damping.

    The linear model of dynamics and costs with the penalty $\frac\nu2 \|v\|^2$; the
    backward pass is the adjoint recursion. O(T n (n + m)) per iteration.

    There is no second-order model to judge convergence by, so $\frac12 \|\nabla J\|^2$
    takes the place of the predicted decrease: it depends on the units of the controls.
    Where controls have limits, the step is cut off there and the gradient is that of
    the controls as far as they can move.

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    rollout: ClassVar[AbstractRollout] = Feedback()

    def expand(self, chain, trajectory):
        return gradients(chain, trajectory)

    def backward(self, chain, trajectory, model, damping):
        penalty = jnp.where(damping > 0, damping, 1)
        sweep = self._sweep(chain, trajectory, model, penalty)
        if not chain.has_gaps:
            return sweep
        _, lams, _ = adjoints(chain, trajectory)
        gap = lambda segment, lam, x, u, t: matmul(lam, segment.dynamics(x, u, t))
        data = trajectory.xs, trajectory.us, chain.ts
        closed = sum(map(jnp.sum, chain.map(gap, lams, *data)))
        return replace(sweep, slope=sweep.slope + closed)

    def _sweep(self, chain, trajectory, model, penalty) -> Sweep:
        if chain.limits:
            return _within_limits(chain, trajectory, model, penalty)
        gradient = norm(model)
        slope = -(gradient**2) / penalty
        curvature = -slope  # the penalty's, penalty k'k
        gains = feedforward(trajectory, tuple(-g / penalty for g in model))
        known = gradient**2 / 2, gradient, jnp.isfinite(gradient)
        return Sweep(gains, slope, curvature, *known)


def _within_limits(chain, trajectory, model, penalty) -> Sweep:
    """The step cut off at the limits, which is the minimum of the same model there."""

    def stage(segment, u, gradient, *limits):
        _, k = moved(u, -gradient / penalty, *limits)
        change = jnp.stack([matmul(gradient, k), penalty * matmul(k, k)])
        return k, change, projected(gradient, u, *limits)

    found = chain.map(stage, trajectory.us, model, *chain.limits)
    k, change, gradients = zip(*found, strict=True)
    slope, curvature = jnp.sum(jnp.concatenate(change), 0)
    gradient = norm(gradients)
    known = gradient**2 / 2, gradient, jnp.isfinite(norm(model))
    return Sweep(feedforward(trajectory, k), slope, curvature, *known)
