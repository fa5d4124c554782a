import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer


class RESULTS(eqx.Enumeration):
    """Why a solver stopped. `RESULTS[code]` is the message, which ends in advice."""

    successful = "The solution is finite and stationary to tolerance."
    max_steps_reached = (
        "The step limit was reached before the tolerance. Raise `max_steps`, loosen "
        "`rtol` and `atol`, or continue from `solution.us` with `state=solution.state`."
    )
    no_descent = (
        "No step size decreased the cost, at any damping. The derivatives may not "
        "belong to the cost (non-smooth functions, gradients cut inside); check them, "
        "scale the problem, use float64, or loosen the tolerances."
    )
    damping_limit = (
        "The damping rose to its limit without an acceptable step. The model of the "
        "problem is not convex or not accurate enough here: start from better `us`, "
        "scale the controls, use `dp.ILQR()`, or raise `max_damping`."
    )
    nonfinite_rollout = (
        "The roll-out is not finite; `stats['first_nonfinite']` is the first bad "
        "stage. Start from `us` that keep the system bounded, shorten the horizon, or "
        "use a search that shortens steps."
    )
    nonfinite_derivative = (
        "A derivative of the dynamics or of the cost is not finite at a finite "
        "trajectory; `stats['first_nonfinite']` is its stage. Look there for sqrt(0), "
        "norms at 0, 0/0 under `jnp.where`, or arctan2(0, 0)."
    )
    factorization_failed = (
        "The second derivative with respect to the controls is not positive definite. "
        "Give a positive `damping`, use a search that raises it, or add a control cost."
    )


# The members by value.
NAMES = (
    "successful",
    "max_steps_reached",
    "no_descent",
    "damping_limit",
    "nonfinite_rollout",
    "nonfinite_derivative",
    "factorization_failed",
)


class SolveError(RuntimeError):
    """Raised for a result that is not successful; carries the best `solution` found."""

    def __init__(self, message: str, solution):
        super().__init__(message)
        self.solution = solution


def throw_unless_successful(solution, throw: bool):
    """Raises for a known result that is not successful."""
    code = solution.result
    if not throw or isinstance(code._value, Tracer) or jnp.ndim(code._value):
        return solution
    if int(code._value) == int(RESULTS.successful._value):
        return solution
    raise SolveError(RESULTS[code], solution)
