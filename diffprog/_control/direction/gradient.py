from typing import ClassVar

import jax.numpy as jnp

from ..._common.tree import norm
from ..lqr import Sweep
from .base import AbstractDirection, feedforward, gradients
from .rollouts import AbstractRollout, Feedback


class Gradient(AbstractDirection):
    r"""Steepest descent: $v = -\nabla J / \nu$, minus the gradient without damping.

    The linear model of dynamics and costs with the penalty $\frac\nu2 \|v\|^2$; the
    backward pass is the adjoint recursion. O(T n (n + m)) per iteration.

    There is no second-order model to judge convergence by, so $\frac12 \|\nabla J\|^2$
    takes the place of the predicted decrease: it depends on the units of the controls.

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    rollout: ClassVar[AbstractRollout] = Feedback()

    def expand(self, chain, trajectory):
        return gradients(chain, trajectory)

    def backward(self, chain, trajectory, model, damping):
        penalty = jnp.where(damping > 0, damping, 1)
        gradient = norm(model)
        slope = -(gradient**2) / penalty
        return Sweep(
            feedforward(trajectory, tuple(-g / penalty for g in model)),
            slope,
            -slope,  # the penalty's, penalty k'k
            gradient**2 / 2,
            gradient,
            jnp.isfinite(gradient),
        )
