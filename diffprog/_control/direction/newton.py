from typing import ClassVar

from ..._common.types import check_kind
from ..lqr import AbstractRiccati, Riccati
from ..lqr.expand import adjoints
from .base import AbstractDirection, linear_quadratic
from .rollouts import AbstractRollout, LinearRollout


class Newton(AbstractDirection):
    r"""Newton: $v = -(\nabla^2 J + \nu I)^{-1} \nabla J$.

    The stage Hessians are those of $h_t + \lambda_{t+1}^\top f_t$, with the costates
    $\lambda$ of the adjoint pass; gains rolled out on the linear model. Quadratic
    convergence near a strict minimum. O(T (n + m)^3) per iteration.

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
        _, lams, _ = adjoints(chain, trajectory)
        return linear_quadratic(chain, trajectory, weights=lams)

    def backward(self, chain, trajectory, model, damping):
        return self.riccati.backward(chain, trajectory, model, damping)
