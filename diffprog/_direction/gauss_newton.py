from typing import ClassVar

from .._expand import linearized, quadratized
from .._lqr import riccati
from .base import AbstractDirection, linear_quadratic


class GaussNewton(AbstractDirection):
    r"""Gauss-Newton: $v = -(G^\top H G + \nu I)^{-1} \nabla J$.

    G is the derivative of the trajectory in the controls, H the Hessian of the costs:
    linear dynamics, quadratic costs, gains rolled out on the linear model.
    O(T (n + m)^3) per iteration.

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    follows_dynamics: ClassVar[bool] = False

    def expand(self, chain, trajectory):
        F, (W, V) = linearized(chain, trajectory), quadratized(chain, trajectory)
        return linear_quadratic(chain, F, W, V)

    def backward(self, chain, trajectory, model, damping):
        return riccati(chain, trajectory, model, damping)
