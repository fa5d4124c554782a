"""The Lagrangian of a loss and its constraints, in steps for any optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common.types import came, check_callable, check_kind
from ._dual import AbstractDual, DualState, prices, start, updated
from ._evaluation import (
    called,
    effective,
    Measured,
    Prices,
    pullback,
    residuals,
    total,
)


Duals = dict[str, DualState]
ORDERS = "dual_first", "simultaneous"


class Report(eqx.Module):
    """What a call found, at the parameters that it was given.

    - `violations`: by name, g or h of every entry, of the strict measure where there is
        one; negative where an inequality is strictly satisfied, 0 where an entry does
        not count.
    - `multipliers`: by name, the effective multipliers m, by which constraints entered
        the gradient; 0 where an entry does not count.
    - `penalties`: by name, the penalties c.
    - `feasibility`: the largest violation, |h| or $[g]_+$.
    - `complementarity`: the largest |min(m, -g)| of the inequalities.
    - `dual_sign`: the largest $[-m]_+$ of the inequalities.
    - `finite`: whether all violations are finite. Multipliers of those that are not
        keep their values.
    - `stationarity`: the largest entry of the gradient, |grad f + J'm|; `None` of
        `update`, which has no gradient.
    - `aux`: what else `measure` returned.
    """

    violations: dict[str, Array]
    multipliers: dict[str, Array]
    penalties: dict[str, Array]
    feasibility: Array
    complementarity: Array
    dual_sign: Array
    finite: Array
    stationarity: Any
    aux: Any


class Lagrangian(eqx.Module):
    r"""A loss with constraints, as one object that any optimizer takes.

    Constraints enter the gradient by their effective multipliers m,

    $$\nabla f(x) + \sum_i m_i \nabla g_i(x),$$

    and how m follows from the violations is the matter of a dual. All methods are pure
    functions for `jit`, `scan`, `vmap` and `shard_map`; compile the loop or the step
    that calls them.

    - `measure`: `measure(params, *args) -> (loss, {name: constraint})`, or with a third
        part `aux`: see [`diffprog.constrained.at_most`][]. A call may return some of
        the constraints only; the others keep their state.
    - `dual`: one [`diffprog.constrained.AbstractDual`][] for all constraints, or a dict
        of them by name.
    - `order`: what `step` takes the gradient with: `"dual_first"`, the multipliers
        after their update; or `"simultaneous"`, those before. For the parameters first,
        call `grad`, step, and call `update`.
    - `axis_name`: the axis of `jax.shard_map` over which a batch is split, and the loss
        and the violations are averaged. Rows with an `index` are not averaged: their
        multipliers are split like their data.

    **Fails:** `TypeError` or `ValueError` at once, with the name of the constraint.

    Source: the parts of a primal-dual method as in Gallego-Posada and others, "Cooper:
    A Library for Constrained Optimization in Deep Learning", 2025, arXiv 2504.01212.
    """

    measure: Callable
    dual: AbstractDual | dict[str, AbstractDual]
    order: Literal["dual_first", "simultaneous"] = eqx.field(static=True)
    axis_name: str | None = eqx.field(static=True)

    def __init__(
        self,
        measure: Callable,
        dual: AbstractDual | Mapping[str, AbstractDual],
        *,
        order: Literal["dual_first", "simultaneous"] = "dual_first",
        axis_name: str | None = None,
    ):
        expected = "a function `measure(params, *args) -> (loss, {name: constraint})`"
        check_callable("measure", measure, expected)
        for name, one in dual.items() if isinstance(dual, Mapping) else [("", dual)]:
            label = f"dual[{name!r}]" if name else "dual"
            check_kind(label, one, AbstractDual, "dp.constrained.PI(0.5, gain=5.0)")
        if order not in ORDERS:
            first = (
                "For the parameters first call `grad`, step them, and call `update`."
            )
            raise ValueError(
                f'`order` is {order!r}; "dual_first" or "simultaneous" is expected. '
                f"{first}"
            )
        self.measure = measure
        self.dual = dict(dual) if isinstance(dual, Mapping) else dual
        self.order, self.axis_name = order, axis_name

    def init(self, params: PyTree, *args: Any) -> Duals:
        """The multipliers before the first step, all 0, by name.

        Nothing is computed: `measure` is traced for the shapes of its constraints, so
        arguments may be `jax.ShapeDtypeStruct`s. All constraints have to be returned.
        """
        found = lambda *given: pullback(self.measure, None, *given)[0].constraints
        measured = eqx.filter_eval_shape(found, params, args)
        if isinstance(self.dual, Mapping):
            unused = [name for name in self.dual if name not in measured]
            if unused:
                raise ValueError(
                    f"`dual` has {_listed(unused)}, which `measure` does not return; "
                    f"it returns {_listed(measured)}."
                )
        return {name: start(self.dual_of(name), c) for name, c in measured.items()}

    def step(
        self, params: PyTree, duals: Duals, *args: Any
    ) -> tuple[tuple[Array, Report], PyTree, Duals]:
        """`(loss, report), grads, duals`: one forward pass, and one back.

        **Arguments:**

        - `params`: any pytree, such as a model of Equinox or parameters of Flax.
        - `duals`: those of `init`, or of the step before.
        - `args`: what `measure` is given besides, such as a batch.

        **Returns:** the loss and a [`diffprog.constrained.Report`][]; the gradient of
        the Lagrangian, like `params`, with `None` for what is no floating array; and
        the new multipliers. Costs what the gradient of the loss costs.
        """
        at, pull = pullback(self.measure, self.axis_name, params, args)
        new = self._updated(duals, at)
        used = new if self.order == "dual_first" else duals
        return *self._pulled(at, pull, self._prices(used, at)), new

    def grad(
        self, params: PyTree, duals: Duals, *args: Any
    ) -> tuple[tuple[Array, Report], PyTree]:
        """`(loss, report), grads` of `step`, with the multipliers as they are.

        `grads` is the gradient of the value of `lagrangian(params, duals, *args)`.
        """
        at, pull = pullback(self.measure, self.axis_name, params, args)
        return self._pulled(at, pull, self._prices(duals, at))

    def update(self, params: PyTree, duals: Duals, *args: Any) -> tuple[Report, Duals]:
        """`report, duals`: new multipliers without a gradient, by one forward pass."""
        at = called(self.measure, self.axis_name)(params, *args)
        new = self._updated(duals, at)
        priced = self._prices(new, at)
        return self._report(at, priced, effective(at, priced), None), new

    def __call__(self, params: PyTree, duals: Duals, *args: Any) -> Array:
        """The value of the Lagrangian, which may be differentiated in anything."""
        at = called(self.measure, self.axis_name)(params, *args)
        return total(at, self._prices(duals, at))

    def dual_of(self, name: str) -> AbstractDual:
        """The dual of the constraint of this name."""
        if not isinstance(self.dual, Mapping):
            return self.dual
        if name not in self.dual:
            raise ValueError(
                f"`dual` has no entry for constraint `{name}`; it has "
                f"{_listed(self.dual)}."
            )
        return self.dual[name]

    # Parts ------------------------------------------------------------------------

    def _pulled(self, at: Measured, pull: Callable, priced: Prices):
        m = effective(at, priced)
        grads = pull(jnp.ones_like(at.loss), m)
        sizes = [jnp.max(jnp.abs(g), initial=0) for g in jtu.tree_leaves(grads)]
        dtype = jnp.result_type(at.loss)
        largest = jnp.max(jnp.stack([size.astype(dtype) for size in sizes]))
        return (at.loss, self._report(at, priced, m, largest)), grads

    def _states(self, duals: Duals, at: Measured):
        """The name, the dual, its state and what was measured."""
        if not isinstance(duals, dict):
            raise TypeError(
                f"`duals` are {came(duals)}; start with `lagrangian.init(params, "
                "*args)`."
            )
        for name, constraint in at.constraints.items():
            if name not in duals:
                raise ValueError(
                    f"`duals` have no constraint `{name}`, only {_listed(duals)}: call "
                    "`init` with arguments for which `measure` returns all of them."
                )
            state = duals[name]
            if (state.equal, state.value.shape) != (constraint.equal, constraint.shape):
                kind = lambda equal: "an equality" if equal else "an inequality"
                raise ValueError(
                    f"Constraint `{name}` is {kind(constraint.equal)} with multipliers "
                    f"of shape {constraint.shape}; when `init` was called it was "
                    f"{kind(state.equal)} of shape {state.value.shape}."
                )
            yield name, self.dual_of(name), state, constraint

    def _updated(self, duals: Duals, at: Measured) -> Duals:
        new = dict(duals) if isinstance(duals, dict) else {}
        for name, dual, state, constraint in self._states(duals, at):
            new[name] = updated(dual, state, constraint, at.errors[name])
        return new

    def _prices(self, duals: Duals, at: Measured) -> Prices:
        return {
            name: prices(dual, state, constraint)
            for name, dual, state, constraint in self._states(duals, at)
        }

    def _report(self, at: Measured, priced: Prices, m, stationarity: Any) -> Report:
        penalties = {name: c for name, (_, c) in priced.items()}
        found = residuals(at, m, self.axis_name)
        return Report(at.errors, m, penalties, *found, stationarity, at.aux)


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
