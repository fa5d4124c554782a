"""Directions of Newton's kind: a Riccati recursion minimizes a quadratic model."""

from typing import Any, ClassVar

from ..._common.types import came, check_kind
from ..lqr import AbstractRiccati, Riccati
from ..lqr.expand import adjoints
from .base import AbstractDirection, linear_quadratic
from .rollouts import AbstractRollout, Feedback, LinearRollout


class AbstractNewton(AbstractDirection):
    """A direction that leaves the choice of its recursion.

    - `riccati`: how the backward pass runs.
    """

    riccati: AbstractRiccati = Riccati()

    def __check_init__(self):
        given: Any = self.riccati
        if callable(given) and not isinstance(given, AbstractRiccati | type):
            raise TypeError(
                f"`riccati` is {came(given)}; a direction takes no function: residuals "
                "are the last state of a `dp.ControlProblem` of one stage, see Least "
                "squares."
            )
        check_kind("riccati", self.riccati, AbstractRiccati, "dp.ParallelRiccati()")

    def backward(self, chain, trajectory, model, damping):
        return self.riccati.backward(chain, trajectory, model, damping)


class GaussNewton(AbstractNewton):
    r"""Gauss-Newton: $v = -(G^\top H G + \nu I)^{-1} \nabla J$.

    G is the derivative of the trajectory in the controls, H the Hessian of the costs:
    linear dynamics, quadratic costs, gains rolled out on the linear model.
    O(T (n + m)^3) per iteration.

    - `riccati`: how the backward pass runs: [`diffprog.Riccati`][], the default, or
        [`diffprog.ParallelRiccati`][].

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    rollout: ClassVar[AbstractRollout] = LinearRollout()

    def expand(self, chain, trajectory):
        return linear_quadratic(chain, trajectory, stored=True)  # trials read F


class Newton(AbstractNewton):
    r"""Newton: $v = -(\nabla^2 J + \nu I)^{-1} \nabla J$.

    The stage Hessians are those of $h_t + \lambda_{t+1}^\top f_t$, with the costates
    $\lambda$ of the adjoint pass; gains rolled out on the linear model. Quadratic
    convergence near a strict minimum. O(T (n + m)^3) per iteration.

    - `riccati`: how the backward pass runs: [`diffprog.Riccati`][], the default, or
        [`diffprog.ParallelRiccati`][].

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    rollout: ClassVar[AbstractRollout] = LinearRollout()

    def expand(self, chain, trajectory):
        _, lams, _ = adjoints(chain, trajectory)
        return linear_quadratic(chain, trajectory, weights=lams)


class ILQR(AbstractNewton):
    """Iterative LQR: the gains of Gauss-Newton, rolled out on the true dynamics.

    Also known as DDP with linear-quadratic approximations. The feedback keeps the
    trial near the trajectory that was linearized, so steps are longer than those of
    [`diffprog.GaussNewton`][] on unstable systems. O(T (n + m)^3) per iteration.

    - `riccati`: how the backward pass runs: [`diffprog.Riccati`][], the default, or
        [`diffprog.ParallelRiccati`][].

    Source: "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
    arXiv 2207.06362.
    """

    rollout: ClassVar[AbstractRollout] = Feedback()

    def expand(self, chain, trajectory):
        return linear_quadratic(chain, trajectory)


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
