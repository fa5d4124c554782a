"""Whether the derivatives of a solution can be trusted."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int

from .._chain.problem import AbstractChain
from .._chain.vectorize import vectorize
from .._common.door import door
from .._common.result import RESULTS
from .._common.types import check_kind
from .adjoint import Found, ImplicitAdjoint
from .solution import Solution


class GradientCheck(eqx.Module):
    """What [`diffprog.ImplicitAdjoint`][] thinks of a solution.

    - `result`: `successful`, or `gradient_unreliable`, where derivatives are NaN.
    - `converged`: whether the solve was successful.
    - `residual`: the largest entry of the gradient of the Lagrangian after at most five
        of Newton's steps, over one more than the largest costate; small is below the
        square root of the rounding.
    - `positive`: whether every stage has a minimum; else the solution is a saddle.
    - `weakly_active`: how many limits and rows of constraints are met without being
        pushed against: to one side of these numbers the solution moves otherwise.
    """

    result: RESULTS
    converged: Bool[Array, ""]
    residual: Float[Array, ""]
    positive: Bool[Array, ""]
    weakly_active: Int[Array, ""]

    @property
    def success(self) -> Bool[Array, ""]:
        """Whether `result` is `successful`."""
        return self.result == RESULTS.successful


@door
def _checked(problem, solution: Solution) -> GradientCheck:
    first = jtu.tree_map(lambda a: a[0], problem.split_states(solution.xs)[0])
    vectorized = vectorize(problem, first, solution.us)
    x0, us = vectorized.ravel(first, solution.us)
    xs, final = vectorized.ravel_states(first, solution.xs)
    duals = None
    if vectorized.chain.names:
        penalty = vectorized.chain.no_duals.penalty
        duals = vectorized.duals(solution.multipliers, penalty)
    found = Found(xs, final, us, solution.cost, duals)
    judged = ImplicitAdjoint().settled((vectorized.chain, x0), found).judged
    known = RESULTS.successful, RESULTS.gradient_unreliable
    return GradientCheck(
        result=RESULTS.where(judged.is_good & solution.success, *known),
        converged=solution.success,
        residual=judged.residual,
        positive=judged.positive,
        weakly_active=judged.weak.astype(jnp.int32),
    )


def check_gradient(problem: AbstractChain, solution: Solution) -> GradientCheck:
    """Whether derivatives of a solution can be trusted, and why not.

    The judgement that `adjoint=dp.ImplicitAdjoint()` makes where a solve is
    differentiated, outside of a derivative.

    **Arguments:** the `problem` and its `solution`, of one solve; `jax.vmap` over both
    takes a batch.

    **Returns:** a [`diffprog.GradientCheck`][].
    """
    check_kind("problem", problem, AbstractChain, "dp.ControlProblem(...)")
    check_kind("solution", solution, Solution, "dp.solve(...)")
    if jnp.ndim(solution.cost):
        raise ValueError(
            "`solution` holds a batch; give `solution[i]`, or `jax.vmap` over it."
        )
    return _checked(problem, solution)
