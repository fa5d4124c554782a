from typing import ClassVar

from ..lqr import Riccati
from .base import AbstractDirection, linear_quadratic
from .rollouts import AbstractRollout, Feedback


class DDP(AbstractDirection):
    r"""Differential dynamic programming with second-order dynamics.

    The stage Hessians are those of $h_t + p_{t+1}^\top f_t$, with p the gradient of the
    cost-to-go of the same backward pass; gains rolled out on the true dynamics.
    Quadratic convergence near a strict minimum. O(T n (n + m)^2) time and memory per
    iteration for the second derivatives, O(T (n + m)^3) time for each backward pass.
    That pass is always sequential: the weights p of its Hessians come out of itself.

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    rollout: ClassVar[AbstractRollout] = Feedback()

    def expand(self, chain, trajectory):
        return linear_quadratic(chain, trajectory, second_order=True)

    def backward(self, chain, trajectory, model, damping):
        return Riccati().backward(chain, trajectory, model, damping)
