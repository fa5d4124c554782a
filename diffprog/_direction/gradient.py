from typing import ClassVar

import jax
import jax.numpy as jnp

from .._expand import adjoints
from .._lqr import Sweep
from .._tree import all_finite, norm
from .base import AbstractDirection, Expansion


class Gradient(AbstractDirection):
    r"""Steepest descent: $v = -\nabla J / \nu$, minus the gradient without damping.

    The linear model of dynamics and costs with the penalty $\frac\nu2 \|v\|^2$; the
    backward pass is the adjoint recursion. O(T n (n + m)) per iteration.

    There is no second-order model to judge convergence by, so $\frac12 \|\nabla J\|^2$
    takes the place of the predicted decrease: it depends on the units of the controls.

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    follows_dynamics: ClassVar[bool] = True

    def expand(self, chain, trajectory):
        _, lams, gradients = adjoints(chain, trajectory)
        of_stage = lambda s, x, u, t: norm(jax.grad(s.cost, (0, 1))(x, u, t))
        costs = chain.map(of_stage, trajectory.xs, trajectory.us, chain.ts)
        last = jax.grad(chain.terminal_cost)(trajectory.final)
        # What is not finite travels down from its stage: the last one is the source.
        late = lambda _, t, *row: jnp.where(all_finite(row), -1, t)
        stages = jnp.concatenate(chain.map(late, chain.ts, lams, gradients))
        source, T = jnp.max(stages), chain.horizon
        first = jnp.where(source < 0, T + 1, source).astype(jnp.int32)
        return Expansion(gradients, norm(costs, last), first)

    def backward(self, chain, trajectory, model, damping):
        penalty = jnp.where(damping > 0, damping, 1)
        k = [-g / penalty for g in model]
        K = [jnp.zeros((*u.shape, x.shape[1]), x.dtype)
             for u, x in zip(k, trajectory.xs, strict=True)]  # fmt: skip
        gains = [jnp.concatenate([a[:, :, None], b], 2) for a, b in zip(k, K)]
        gradient = norm(model)
        slope = -(gradient**2) / penalty
        return Sweep(
            tuple(gains),
            slope,
            -slope,
            gradient**2 / 2,
            gradient,
            jnp.isfinite(gradient),
        )
