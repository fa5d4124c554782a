"""The augmented Lagrangian with full inner minimizations, as one compiled loop."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PyTree

from .._common.door import door
from .._common.multipliers import violation
from .._common.result import explain, RESULTS, throw_unless_successful
from .._common.tree import working_dtype
from .._common.types import (
    came,
    check_count,
    check_kind,
    check_number,
    Number,
    with_other_names,
)
from ._bfgs import bfgs
from ._constraint import Constraint
from ._dual import AbstractDual
from ._duals import Augmented, Penalty
from ._evaluation import trained
from ._growth import Growth
from ._lagrangian import Duals, Lagrangian, Report
from ._outer import PROGRESS, run


EXAMPLE = "dp.constrained.Lagrangian(measure, dp.constrained.Augmented(10.0))"
FACTOR = 10.0  # of penalties, where violations fell too little
ADVICE = dict(
    max_steps_reached="Raise `max_outer`, `max_inner` where the stationarity is large, "
    "or `tol` where rounding is: in float32 below 1e-4.",
    infeasible="Give them other limits, or let them give way: `Penalty(strength)` in "
    "place of `Augmented`, or in single steps `Relaxed(strength, step)`.",
    nonfinite_rollout="Look for NaN in `params` and the arguments of `measure`, and "
    "for log and sqrt of what may be negative.",
)


class Solution(eqx.Module):
    """What [`diffprog.constrained.minimize`][] found.

    - `params`: the best parameters.
    - `loss`: their loss.
    - `multipliers`: by name, those at which the gradient of the Lagrangian vanishes.
    - `result`: `successful`, or why it stopped.
    - `report`: of the best parameters; its `stationarity` is of the Lagrangian at
        `multipliers`.
    - `stats`: `num_outer`, the number of inner minimizations, and `num_inner`, that of
        their steps.
    - `history`: by name, one number for each outer iteration, NaN after the last:
        `loss`, `feasibility`, `stationarity`, `penalty`, `num_inner`.
    - `duals`: the state to start another call with, by `duals=`.
    - `tol`: what violations were compared with.
    """

    params: PyTree
    loss: Float[Array, ""]
    multipliers: dict[str, Array]
    result: RESULTS
    report: Report
    stats: dict[str, Array]
    history: dict[str, Array]
    duals: Duals
    tol: Float[Array, ""]

    @property
    def success(self) -> Array:
        """Whether the result is `successful`."""
        return self.result == RESULTS.successful

    def violated(self) -> dict[str, list]:
        """By name, the entries of constraints that are violated by more than `tol`."""
        found = {}
        for name, error in self.report.violations.items():
            size = violation(error, self.duals[name].equal)
            rows = np.argwhere(np.asarray(size > self.tol)).tolist()
            if rows:
                found[name] = [row[0] if len(row) == 1 else tuple(row) for row in rows]
        return found


_NOT_IN_MINIMIZE = dict.fromkeys(
    ("maxiter", "max_steps"),
    "`max_outer` and `max_inner` are the most updates of multipliers and the most "
    "steps between two",
) | dict(
    bounds="a bound is one more constraint, `at_most(params, hi)`; exact ones are "
    "`control_bounds` of a `dp.ControlProblem` of one stage",
    method="`inner` is the method",
)


@with_other_names(_NOT_IN_MINIMIZE)
def minimize(
    lagrangian: Lagrangian,
    params: PyTree,
    *args: Any,
    inner: Any = None,
    max_inner: int = 256,
    max_outer: int = 50,
    tol: Number | None = None,
    duals: Duals | None = None,
    throw: bool = True,
) -> Solution:
    r"""Minimizes a loss under its constraints, by the method of multipliers.

    The augmented Lagrangian is minimized in the parameters, then multipliers become
    $\mu + c h$ and $[\lambda + c g]_+$, and the penalty of every entry whose violation
    did not fall to a quarter grows tenfold, until all residuals are at most `tol`:

    $$\|\nabla f + J^\top m\|_\infty, \quad \|h\|_\infty, \quad \|[g]_+\|_\infty,
    \quad \|\min(\lambda, -g)\|_\infty.$$

    Where no `tol` is given, iterations go on as long as they cut the largest of these
    to a quarter, down to a hundredth of the default.

    For full batches of data. It runs as one compiled loop.

    **Arguments:**

    - `lagrangian`: its duals are [`diffprog.constrained.Augmented`][], whose penalties
        are the first, such as 10, with a schedule of their own or that above, whose
        largest penalty is 1e8, in float32 1e5; or [`diffprog.constrained.Penalty`][],
        for limits that give way if it has no schedule.
    - `params`: the first guess.
    - `args`: what `measure` is given besides.
    - `inner`: an optimistix minimizer, or a transformation of optax; `None` is
        `optimistix.BFGS`, which keeps a matrix of the size of the parameters squared:
        for many take `optimistix.LBFGS` or an optimizer.
    - `max_inner`: the most steps of an inner minimization; with optax its steps.
    - `max_outer`: the most inner minimizations.
    - `tol`: at most this is a solution; `None` is 1e-8, in float32 1e-4.
    - `duals`: those of an earlier solution, or of steps.
    - `throw`: whether to raise [`diffprog.SolveError`][], which carries the solution,
        for a result that is not successful.

    **Returns:** a [`diffprog.constrained.Solution`][] with the best parameters: of
    those that keep their limits to `tol` the least loss, else the least violation.

    **Fails:** `infeasible` where violations do not fall at the largest penalty, which
    bounds the multipliers; `max_steps_reached`; `nonfinite_rollout` where the loss, a
    constraint or a derivative is not finite at every trial. `strict=` and `axis_name`
    are for single steps alone.

    It has no derivatives, and says so when they are asked for: for those of a solution
    write the problem as one stage of [`diffprog.ControlProblem`][], see
    [Gradients](../gradients.md).

    Costs `num_inner` gradients. Source: as of [`diffprog.AugmentedLagrangian`][].
    """
    check_kind("lagrangian", lagrangian, Lagrangian, EXAMPLE)
    check_count("max_inner", max_inner)
    check_count("max_outer", max_outer)
    if lagrangian.axis_name is not None:
        raise ValueError("`minimize` runs on one device: leave `axis_name` out.")
    found, rest = trained(params)
    dtype = working_dtype(found)
    double = dtype == jnp.float64
    goal = tol
    if tol is None:
        tol = 1e-8 if double else 1e-4
        goal = tol / 100
    check_number("tol", tol, "a number > 0", lambda value: value > 0)
    if inner is None:
        inner = bfgs(1e-12 if double else 1e-6)
    _check_inner(inner)
    growth = Growth(FACTOR, 0.0, tol, PROGRESS, 1e8 if double else 1e5)
    whole = _prepared(lagrangian, growth)
    numbers = whole, found, rest, duals, args, inner, tol, goal
    at, loop = _run(*numbers, max_inner, max_outer)
    solution = Solution(
        params=eqx.combine(at.params, rest),
        loss=at.loss,
        multipliers=at.report.multipliers,
        result=loop.result,
        report=at.report,
        stats=dict(num_outer=loop.num_outer, num_inner=loop.num_inner),
        history=loop.history,
        duals=at.duals,
        tol=jnp.asarray(tol, dtype),
    )
    return throw_unless_successful(solution.result, solution, throw, _explained)


_run = door(run)


class Smooth(eqx.Module):
    """A measure all of whose constraints are what their gradients are of."""

    measure: Callable

    def __call__(self, params: PyTree, *args: Any) -> Any:
        out = self.measure(params, *args)
        found = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        for name, constraint in found.items() if isinstance(found, dict) else ():
            if isinstance(constraint, Constraint) and constraint.strict is not None:
                raise ValueError(
                    f"Constraint `{name}` has a strict measure, which `minimize` does "
                    "not take: call `step`, and keep the best parameters with `Best`."
                )
        return out


def _check_inner(inner: Any):
    if not isinstance(inner, optx.AbstractMinimiser) and not hasattr(inner, "update"):
        raise TypeError(
            f"`inner` is {came(inner)}; a minimizer of optimistix is expected, such as "
            "`optimistix.LBFGS(1e-8, 1e-8)`, or a transformation of optax."
        )


def _prepared(lagrangian: Lagrangian, growth: Growth) -> Lagrangian:
    """The Lagrangian with schedules, and the order of the method of multipliers."""

    def scheduled(name: str, dual: AbstractDual) -> AbstractDual:
        if isinstance(dual, Augmented):
            return replace(dual, schedule=dual.schedule or growth)
        if isinstance(dual, Penalty):
            return dual
        raise TypeError(
            f"`{name}` is {came(dual)}; `minimize` takes `Augmented(10.0)`, or "
            "`Penalty(strength)` for limits that give way. Other duals are for single "
            "steps."
        )

    dual: Any = lagrangian.dual
    if isinstance(dual, Mapping):
        dual = {name: scheduled(f"dual[{name!r}]", d) for name, d in dual.items()}
    else:
        dual = scheduled("dual", dual)
    return Lagrangian(Smooth(lagrangian.measure), dual, order="simultaneous")


def _explained(solution: Solution) -> str:
    where_ = "; ".join(
        f"`{name}`" + ("" if rows == [()] else f" in rows {str(rows)[1:-1]:.80}")
        for name, rows in solution.violated().items()
    )
    size = float(solution.report.feasibility)
    place = f"Violated by up to {size:.1e}: {where_}." if where_ else ""
    return explain(solution.result, ADVICE, place)
