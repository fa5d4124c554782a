from typing import ClassVar

import jax.numpy as jnp

from ..._common.inner import AbstractInner, InnerNewton, Subproblem
from ..._common.tree import all_finite, norm, vdot
from ..._common.types import check_kind, check_positive, Number, number
from ..lqr import Sweep
from .base import AbstractDirection, feedforward, gradients
from .rollouts import AbstractRollout, Feedback


class MoreauGradient(AbstractDirection):
    r"""The gradient descent of Moreau envelopes, stage by stage.

    The adjoint recursion of [`diffprog.Gradient`][], with small minimizations in place
    of the products with Jacobians:

    $$\mu_t = -\operatorname{argmin}_y \; \langle \mu_{t+1}, f_t(x_t + y, u_t) \rangle
    + \alpha h_t(x_t + y, u_t) + \tfrac12 \|y\|^2,$$

    from $\mu_T = \nabla \operatorname{env}(\alpha h_T)(x_T)$, and the step $v_t$ is the
    minimizer of the same in $u_t$. For small $\alpha$ it is $-\alpha \nabla J$. The
    damping $\nu$ adds to $1 / \alpha$, so that searches can shorten the envelope.

    - `alpha`: the step size inside the envelopes.
    - `solver`: of the small problems: [`diffprog.oracles.InnerNewton`][], three unless
        given, or [`diffprog.oracles.InnerGradient`][]. Where Newton meets a problem
        that is not convex, the pass fails, and the search raises the damping.

    Only with small alpha is it always a direction of descent: `slope` is the derivative
    of the cost along the step, or 0 where that is positive. Where stages have costs,
    the step is not 0 at an optimum: the search has to raise the damping to come close,
    and [`diffprog.Gradient`][] or a method of second order to finish. Convergence is
    judged as for [`diffprog.Gradient`][]. O(T (n^3 + m^3)) per iteration with Newton.

    Source: Roulet, Harchaoui, "Differentiable Programming a la Moreau", 2020, arXiv
    2012.15458; the costs of the stages are ours.
    """

    alpha: Number = number(1.0)
    solver: AbstractInner = InnerNewton()

    rollout: ClassVar[AbstractRollout] = Feedback()

    def __check_init__(self):
        check_positive("alpha", self.alpha)
        check_kind("solver", self.solver, AbstractInner, "dp.oracles.InnerNewton()")

    def expand(self, chain, trajectory):
        return gradients(chain, trajectory)

    def backward(self, chain, trajectory, model, damping):
        if chain.names:
            raise ValueError(
                "`MoreauGradient` takes no constraints: its steps are not 0 at an "
                "optimum, where multipliers are updated. `dp.DDP()` takes them."
            )
        if chain.references:
            raise ValueError(
                "`MoreauGradient` takes no `xs` and no `manifold`: its envelopes move "
                "each state on its own, as a vector. `dp.Gradient()` and `dp.ILQR()` "
                "take them."
            )
        if chain.limits:
            raise ValueError(
                "`MoreauGradient` takes no `control_bounds`: its envelopes minimize "
                "over all controls. `dp.Gradient()` and `dp.ILQR()` keep limits."
            )
        alpha = jnp.asarray(1 / (1 / self.alpha + damping)).astype(chain.dtype)

        def stage(segment, mu, x, u, t):
            both = lambda x, u: (segment.dynamics(x, u, t), segment.cost(x, u, t))
            pull = lambda fn, z: self.solver.solve(Subproblem(fn, z, (mu, alpha)))
            return pull(lambda x: both(x, u), x), -pull(lambda u: both(x, u), u)

        last = Subproblem(chain.terminal_cost, trajectory.final, alpha)
        data = (trajectory.xs, trajectory.us, chain.ts)
        _, k = chain.scan(stage, self.solver.solve(last), *data, reverse=True)
        gradient = norm(model)
        slope = jnp.minimum(vdot(model, k), 0)
        known = gradient**2 / 2, gradient, all_finite(k, gradient)
        return Sweep(feedforward(trajectory, k), slope, -slope, *known)
