"""The loop of `minimize`."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optimistix as optx
from jax import lax
from jaxtyping import Array, PyTree

from .._common.door import undifferentiated
from .._common.multipliers import complementarity, violation
from .._common.result import RESULTS
from .._common.tree import all_finite, where, working_dtype
from ._best import Best
from ._duals import Penalty
from ._lagrangian import Duals, Lagrangian, Report


COLUMNS = "loss", "feasibility", "stationarity", "penalty", "num_inner"
UNDIFFERENTIATED = (
    "`minimize` has no derivatives. For those of a solution write the problem as one "
    "stage of `dp.ControlProblem`, see Gradients; or wrap the arguments in "
    "`jax.lax.stop_gradient`."
)
PROGRESS = 0.25  # what is left of violations by an outer iteration that helps


class Iterate(eqx.Module):
    """Parameters that an inner minimization found, and what is known of them.

    `duals` are those after their update.
    """

    params: PyTree
    loss: Array
    report: Report
    duals: Duals


class Loop(eqx.Module):
    """What is carried from one outer iteration to the next.

    Once `result` is successful, `residual` is that of `at`.
    """

    at: Iterate
    residual: Array
    best: Best
    num_outer: Array
    num_inner: Array
    result: RESULTS
    done: Array
    history: dict[str, Array]


class Outer(eqx.Module):
    """Outer iterations: an inner minimization, then new multipliers and penalties.

    Residuals up to `tol` are a solution; from there on multipliers are updated while
    that helps, down to `goal`.
    """

    lagrangian: Lagrangian
    evaluate: Any  # (params, duals, args) -> (loss, report), grads, duals
    value: Any  # (params, duals, args) -> scalar
    args: tuple
    inner: Any
    tol: Array
    goal: Array
    equal: dict[str, bool]
    max_inner: int = eqx.field(static=True)

    def first(self, params: PyTree, duals: Duals, max_outer: int) -> Loop:
        """Before the first iteration."""
        (loss, report), _, _ = eqx.filter_eval_shape(
            self.evaluate, params, duals, self.args
        )
        nothing = lambda a: jnp.zeros(a.shape, a.dtype)
        loss, report = jtu.tree_map(nothing, (loss, report))
        at = Iterate(params, loss, report, duals)
        zero = jnp.zeros((), jnp.int32)
        column = jnp.full(max_outer, jnp.nan, loss.dtype)
        return Loop(
            at=at,
            residual=jnp.full((), jnp.inf, self.tol.dtype),
            best=Best(at, tol=self.tol),
            num_outer=zero,
            num_inner=zero,
            result=RESULTS.max_steps_reached,
            done=zero > 0,
            history={name: column for name in COLUMNS},
        )

    def step(self, loop: Loop) -> Loop:
        """One outer iteration."""
        duals = loop.at.duals
        params, count = self.minimized(loop.at.params, duals)
        (loss, report), grads, new = self.evaluate(params, duals, self.args)
        good = report.finite & all_finite(loss, grads)
        residual, already = self.residual(report), loop.result == RESULTS.successful
        kept = good & (~already | (residual < loop.residual))
        at = where(kept, Iterate(params, loss, report, new), loop.at)
        solved = good & (residual <= self.tol) & ~already
        hopeless = good & ~solved & ~already & self.in_vain(duals, new)
        penalties = [jnp.max(c, initial=0) for c in report.penalties.values()]
        penalty = jnp.max(jnp.stack([c.astype(loss.dtype) for c in penalties]))
        row = loss, report.feasibility, report.stationarity, penalty, count
        history = {
            name: loop.history[name].at[loop.num_outer].set(number.astype(loss.dtype))
            for name, number in zip(COLUMNS, row)
        }
        best = loop.best.update(at, jnp.where(kept, loss, jnp.nan), report)
        result = loop.result
        for applies, code in (
            (solved, RESULTS.successful),
            (hopeless, RESULTS.infeasible),
            (~good & ~already, RESULTS.nonfinite_rollout),
        ):
            result = RESULTS.where(applies, code, result)
        slow = already & ~(residual <= PROGRESS * loop.residual)
        return Loop(
            at=at,
            residual=jnp.where(kept, residual, loop.residual),
            best=best,
            num_outer=loop.num_outer + 1,
            num_inner=loop.num_inner + count,
            result=result,
            done=hopeless | ~good | slow | (residual <= self.goal),
            history=history,
        )

    def minimized(self, params: PyTree, duals: Duals) -> tuple[PyTree, Array]:
        """A minimum of the augmented Lagrangian, and the number of steps."""
        value = lambda params, given: self.value(params, *given)
        given = duals, self.args
        if isinstance(self.inner, optx.AbstractMinimiser):
            options: dict[str, Any] = dict(max_steps=self.max_inner, throw=False)
            found = optx.minimise(value, self.inner, params, given, **options)
            return found.value, jnp.asarray(found.stats["num_steps"], jnp.int32)
        slope = jax.grad(value)

        def step(_, carry):
            params, state = carry
            updates, state = self.inner.update(slope(params, given), state, params)
            return optax.apply_updates(params, updates), state

        start = params, self.inner.init(params)
        params, _ = lax.fori_loop(0, self.max_inner, step, start)
        return params, jnp.asarray(self.max_inner, jnp.int32)

    def residual(self, report: Report) -> Array:
        """Of the conditions of optimality; limits that give way have none."""
        out = report.stationarity.astype(self.tol.dtype)
        for name, error in report.violations.items():
            dual: Any = self.lagrangian.dual_of(name)
            if isinstance(dual, Penalty) and dual.schedule is None:
                continue
            equal = self.equal[name]
            gap = violation(error, equal)
            if not isinstance(dual, Penalty):
                m = report.multipliers[name]
                gap = jnp.maximum(gap, complementarity(error, m, equal))
            out = jnp.maximum(out, jnp.max(gap, initial=0).astype(out.dtype))
        return out

    def in_vain(self, duals: Duals, new: Duals) -> Array:
        """Whether a violation did not fall although its penalty was the largest."""
        out = jnp.zeros((), bool)
        for name, state in new.items():
            schedule = self.lagrangian.dual_of(name).schedule  # pyright: ignore
            if schedule is None:
                continue
            before, now = duals[name].memory, state.memory
            poor = schedule.is_poor(now["error"], before["error"], state.equal)
            out |= jnp.any(poor & schedule.is_largest(before["penalty"]))
        return out


def first(lagrangian: Lagrangian, duals: Duals | None, *args: Any) -> Duals:
    """The state to begin with: before the first update no violation failed to fall."""
    out = lagrangian.init(*args) if duals is None else dict(duals)
    for name, state in out.items():
        dual: Any = lagrangian.dual_of(name)
        known = duals is not None and "penalty" in state.memory
        if dual.schedule is None or known:
            continue
        memory = dual.init(state.value, state.equal)
        memory["error"] = jnp.full_like(state.value, jnp.inf)
        out[name] = replace(state, memory=memory)
    return out


def run(
    lagrangian: Lagrangian,
    params: PyTree,
    rest: PyTree,
    duals: Duals | None,
    args: tuple,
    inner: Any,
    tol: Any,
    goal: Any,
    max_inner: int,
    max_outer: int,
) -> tuple[Iterate, Loop]:
    """What is returned, and the loop after its last iteration."""

    def whole(fn):
        call = lambda params, duals, args: fn(eqx.combine(params, rest), duals, *args)
        return eqx.filter_closure_convert(call, params, duals, args)  # traced once

    duals = first(lagrangian, duals, eqx.combine(params, rest), *args)
    evaluate, value = whole(lagrangian.step), whole(lagrangian)
    number = lambda value: jnp.asarray(value, working_dtype(params))
    outer = Outer(
        lagrangian,
        evaluate,
        value,
        args,
        inner,
        number(tol),
        number(goal),
        {name: state.equal for name, state in duals.items()},
        max_inner,
    )
    loop = outer.first(params, duals, max_outer)
    dynamic, static = eqx.partition(loop, eqx.is_array)
    go_on = lambda loop: ~loop.done & (loop.num_outer < max_outer)

    def body(dynamic):
        loop = outer.step(eqx.combine(dynamic, static))
        return eqx.filter(loop, eqx.is_array)

    dynamic = lax.while_loop(go_on, body, dynamic)
    loop = eqx.combine(dynamic, static)
    at = where(loop.result == RESULTS.successful, loop.at, loop.best.params)
    return undifferentiated((at, loop), UNDIFFERENTIATED)
