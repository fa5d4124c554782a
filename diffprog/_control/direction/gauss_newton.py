from typing import ClassVar

from ..._common.types import check_kind
from ..lqr import AbstractRiccati, Riccati
from .base import AbstractDirection, linear_quadratic
from .rollouts import AbstractRollout, LinearRollout


class GaussNewton(AbstractDirection):
    r"""Gauss-Newton: $v = -(G^\top H G + \nu I)^{-1} \nabla J$.

    G is the derivative of the trajectory in the controls, H the Hessian of the costs:
    linear dynamics, quadratic costs, gains rolled out on the linear model.
    O(T (n + m)^3) per iteration.

    - `riccati`: how the backward pass runs: [`diffprog.Riccati`][], the default, or
        [`diffprog.ParallelRiccati`][].

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    riccati: AbstractRiccati = Riccati()

    rollout: ClassVar[AbstractRollout] = LinearRollout()

    def __check_init__(self):
        check_kind("riccati", self.riccati, AbstractRiccati, "dp.ParallelRiccati()")

    def expand(self, chain, trajectory):
        return linear_quadratic(chain, trajectory, stored=True)  # trials read F

    def backward(self, chain, trajectory, model, damping):
        return self.riccati.backward(chain, trajectory, model, damping)
