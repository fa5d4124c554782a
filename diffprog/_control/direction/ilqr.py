from typing import ClassVar

from ..._common.types import check_kind
from ..lqr import AbstractRiccati, Riccati
from .base import AbstractDirection, linear_quadratic
from .rollouts import AbstractRollout, Feedback


class ILQR(AbstractDirection):
    """Iterative LQR: the gains of Gauss-Newton, rolled out on the true dynamics.

    Also known as DDP with linear-quadratic approximations. The feedback keeps the
    trial near the trajectory that was linearized, so steps are longer than those of
    [`diffprog.GaussNewton`][] on unstable systems. O(T (n + m)^3) per iteration.

    - `riccati`: how the backward pass runs: [`diffprog.Riccati`][], the default, or
        [`diffprog.ParallelRiccati`][].

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    riccati: AbstractRiccati = Riccati()

    rollout: ClassVar[AbstractRollout] = Feedback()

    def __check_init__(self):
        check_kind("riccati", self.riccati, AbstractRiccati, "dp.ParallelRiccati()")

    def expand(self, chain, trajectory):
        return linear_quadratic(chain, trajectory)

    def backward(self, chain, trajectory, model, damping):
        return self.riccati.backward(chain, trajectory, model, damping)
