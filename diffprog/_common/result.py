from collections.abc import Callable, Mapping
from typing import TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import PyTree


T = TypeVar("T")


class RESULTS(eqx.Enumeration):
    """Why a computation stopped; `RESULTS[code]` says it in a sentence.

    What to do about it depends on what was called: [`diffprog.SolveError`][] and the
    printed [`diffprog.Solution`][] add the place and the advice.
    """

    successful = "The result is finite and stationary to tolerance."
    max_steps_reached = "The step limit was reached before the tolerance."
    no_descent = "No step decreased the objective, at any damping."
    damping_limit = "The damping rose to its limit without an acceptable step."
    nonfinite_rollout = "The value is not finite."
    nonfinite_derivative = "A derivative is not finite where the value is."
    factorization_failed = "A matrix of second derivatives is not positive definite."
    cost_unbounded = "The objective falls without bound."
    infeasible = "No point that satisfies the constraints was found."
    gradient_unreliable = "Derivatives of the solution may be wrong."


# The members by value.
NAMES = (
    "successful",
    "max_steps_reached",
    "no_descent",
    "damping_limit",
    "nonfinite_rollout",
    "nonfinite_derivative",
    "factorization_failed",
    "cost_unbounded",
    "infeasible",
    "gradient_unreliable",
)


class SolveError(RuntimeError):
    """Raised for a result that is not successful; carries the best `solution` found."""

    def __init__(self, message: str, solution):
        super().__init__(message)
        self.solution = solution


def explain(result: RESULTS, advice: Mapping[str, str], where: str = "") -> str:
    """The sentence of a known result, the place, and what the caller can do."""
    parts = RESULTS[result], where, advice.get(NAMES[int(result._value)], "")
    return " ".join(part for part in parts if part)


def is_traced(tree: PyTree) -> bool:
    """Whether some of its numbers belong to a transformation."""
    return any(isinstance(leaf, Tracer) for leaf in jtu.tree_leaves(tree))


def throw_unless_successful(
    result: RESULTS, solution: T, throw: bool, explain: Callable[[T], str]
) -> T:
    """Raises for a known result that is not successful, with its explanation.

    Without `jit` derivatives trace the solution and leave its result known.
    """
    if not throw:
        return solution
    code = result._value
    if isinstance(code, Tracer) or jnp.ndim(code):
        return solution
    if int(code) == int(RESULTS.successful._value) or is_traced(solution):
        return solution
    raise SolveError(explain(solution), solution)
