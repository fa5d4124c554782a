from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx

from .._common.tree import add


SLOPE, DECREASE = 0.1, 0.5
ROUNDING = 10  # of the value, in units of its last digit


class RoundedArmijo(optx.AbstractSearch):
    """Backtracking for values that are rounded.

    Near a minimum steps change the value by less than its rounding, and a search that
    compares them as they are stops at a gradient of about sqrt(eps).
    """

    def init(self, y, f_info_struct):
        return jnp.ones((), jtu.tree_leaves(y)[0].dtype)

    def step(self, first_step, y, y_eval, f_info, f_eval_info, state):
        slope = f_info.compute_grad_dot(add(y_eval, y, -1))
        value, trial = f_info.as_min(), f_eval_info.as_min()
        slack = ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(value)
        accept = first_step | ((trial <= value + SLOPE * slope + slack) & (slope <= 0))
        stepsize = jnp.where(accept, 1, DECREASE * state)
        return stepsize, accept, optx.RESULTS.successful, stepsize


def bfgs(tol: float) -> Any:
    """BFGS to a tolerance relative to the parameters and the value."""
    solver = optx.BFGS(rtol=tol, atol=tol)
    return eqx.tree_at(lambda solver: solver.search, solver, RoundedArmijo())
