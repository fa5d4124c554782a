"""One call of `measure`: its values, how to pull back, and means over devices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._common.model import is_parameter
from .._common.multipliers import complementarity, multiplier, priced, violation
from .._common.tree import varying_axes, working_dtype
from .._common.types import came
from ._constraint import check_constraint, Constraint, SURROGATE


class Measured(NamedTuple):
    """What `measure` returned, by name, in the dtypes of the multipliers.

    `violations` are those of the surrogates, `errors` of the strict measures; both are
    0 where an entry does not count.
    """

    loss: Array
    violations: dict[str, Array]
    errors: dict[str, Array]
    constraints: dict[str, Constraint]
    aux: Any


Prices = dict[str, tuple[Array, Array]]


def trained(params: PyTree) -> tuple[PyTree, PyTree]:
    """The floating arrays of the parameters, and the rest.

    A float in a container is an array, and one in a module a setting.
    """
    number = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf
    is_module = lambda node: isinstance(node, eqx.Module)
    params = jtu.tree_map(number, params, is_leaf=is_module)
    found, rest = eqx.partition(params, is_parameter)
    if not jtu.tree_leaves(found):
        raise TypeError(
            f"`params` are {came(params)}, with no floating array, so there is nothing "
            "to train: convert integers with `.astype(float)`. With Flax linen give "
            "`module.init(...)`, with NNX the state of `nnx.split(model, nnx.Param, "
            "...)`."
        )
    return found, rest


def called(
    measure: Callable, axis_name: str | None, anchor: Array | None = None
) -> Callable[..., Measured]:
    """`measure` with checks, and means over devices.

    A derivative in the `anchor`, a part of the parameters, and in others raises for a
    constraint that depends on none.
    """

    def run(params: PyTree, *args: Any) -> Measured:
        loss, constraints, aux = _outcome(measure(params, *args))
        _check_axis(axis_name, params, loss)
        violations, errors = {}, {}
        for name, constraint in constraints.items():
            check_constraint(name, constraint)
            value = constraint.violation()
            value = value if anchor is None else _dependent(name, value, anchor)
            strict = None if constraint.strict is None else constraint.error()
            if axis_name is not None and constraint.index is None:
                value, strict, constraint = _averaged(
                    value, strict, constraint, axis_name
                )
            value = value.astype(constraint.dtype)
            violations[name] = _counted(constraint, value)
            errors[name] = _counted(constraint, value if strict is None else strict)
            constraints[name] = constraint
        if axis_name is not None:
            loss = lax.pmean(loss, axis_name)
        return Measured(loss, violations, errors, constraints, aux)

    return run


def pullback(
    measure: Callable, axis_name: str | None, params: PyTree, args: tuple
) -> tuple[Measured, Callable]:
    """What was measured, and the gradient for weights of the loss and violations."""
    found, rest = trained(params)

    def run(found):
        anchor = jtu.tree_leaves(found)[0]
        at = called(measure, axis_name, anchor)(eqx.combine(found, rest), *args)
        return (at.loss, at.violations), at

    _, pull, at = jax.vjp(run, found, has_aux=True)
    return at, lambda *weights: pull(weights)[0]


def _outcome(out: Any) -> tuple[Array, dict[str, Constraint], Any]:
    """The loss, the constraints and what else `measure` returned."""
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise TypeError(
            f"`measure` returned {came(out)}; `loss, {{name: constraint}}` is "
            "expected, or `loss, {name: constraint}, aux`."
        )
    loss, constraints, *aux = out
    loss = jnp.asarray(loss)
    if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"`measure` returned a loss of shape {loss.shape} and dtype {loss.dtype}; "
            "one floating number is expected: `jnp.mean(losses)`, or 0.0 where there "
            "are constraints only."
        )
    if not isinstance(constraints, dict) or not constraints:
        raise ValueError(
            f"`measure` returned {came(constraints)} in place of constraints; at least "
            'one is expected: `{"name": dp.constrained.at_most(value, limit)}`.'
        )
    return loss, dict(constraints), aux[0] if aux else None


def _averaged(value: Array, strict: Any, constraint: Constraint, axis_name: str):
    """The mean over devices, of those where an entry counts."""
    mask = constraint.counted()
    if mask is None:
        value, strict = lax.pmean((value, strict), axis_name)
        return value, strict, replace(constraint, value=value)
    number = lax.psum(mask.astype(value.dtype), axis_name)

    def mean(a):
        total = lax.psum(jnp.where(mask, a, 0), axis_name)
        return total / jnp.maximum(number, 1).astype(a.dtype)

    value, strict = mean(value), None if strict is None else mean(strict)
    return value, strict, replace(constraint, value=value, mask=number > 0)


def _check_axis(axis_name: str | None, params: PyTree, loss: Array):
    """Raises where gradients would not be those of means over the devices."""
    if axis_name is None:
        missing = varying_axes(loss) - varying_axes(params)
        if missing:
            raise ValueError(
                f"The loss differs between the devices of {missing}, over which the "
                "parameters are the same: give the Lagrangian "
                f"`axis_name={min(missing)!r}`."
            )
        return
    if axis_name not in varying_axes(lax.axis_index(axis_name)):
        raise ValueError(
            f"`axis_name` is {axis_name!r}, which is no axis of a `jax.shard_map` with "
            "`check_vma=True`: without that check gradients of replicated parameters "
            "are not summed over the devices. Leave the check on."
        )


# Whether a constraint depends on the parameters ------------------------------------


def _dependent(name: str, value: Array, anchor: Array) -> Array:
    """The value, whose derivative raises where it is known to be zero."""
    identity = jax.custom_jvp(lambda value, anchor: value)

    def rule(primals, tangents):
        tangent, _ = tangents
        if isinstance(tangent, jax.custom_derivatives.SymbolicZero):
            raise ValueError(
                f"The value of constraint `{name}` does not depend on the parameters, "
                f"or by a step function only, so its gradient is zero. {SURROGATE}"
            )
        return primals[0], tangent

    identity.defjvp(rule, symbolic_zeros=True)
    return identity(value, anchor)


def _counted(constraint: Constraint, entries: Array) -> Array:
    """The entries, 0 where one does not count."""
    counted = constraint.counted()
    return entries if counted is None else jnp.where(counted, entries, 0)


# What is known of it ---------------------------------------------------------------


def effective(at: Measured, prices: Prices) -> dict[str, Array]:
    """The multipliers m: 0 where an entry does not count, y where it is not finite."""
    out = {}
    for name, (y, c) in prices.items():
        constraint = at.constraints[name]
        m = multiplier(at.violations[name], y, c, constraint.equal)
        m = jnp.where(jnp.isfinite(m), m, y)
        out[name] = _counted(constraint, m)
    return out


def total(at: Measured, prices: Prices) -> Array:
    """The loss and what constraints add to it."""
    dtype = working_dtype(at.loss, at.violations)
    out = at.loss.astype(dtype)
    for name, (y, c) in prices.items():
        constraint = at.constraints[name]
        merit = priced(at.violations[name], y, c, constraint.equal)
        out = out + jnp.sum(_counted(constraint, merit)).astype(dtype)
    return out


def residuals(
    at: Measured, m: dict[str, Array], axis_name: str | None
) -> tuple[Array, Array, Array, Array]:
    """Feasibility, complementarity, dual sign, and whether all errors are finite."""
    sizes, gaps, signs, finite = [], [], [], []
    for name, error in at.errors.items():
        equal = at.constraints[name].equal
        sign = jnp.zeros_like(error) if equal else jnp.maximum(-m[name], 0)
        for found, into in (
            (violation(error, equal), sizes),
            (complementarity(error, m[name], equal), gaps),
            (sign, signs),
        ):
            into.append(jnp.max(found, initial=0))
        finite.append(jnp.all(jnp.isfinite(error)))
    bad = 1 - jnp.min(jnp.stack(finite).astype(jnp.int32))
    found = _largest(sizes), _largest(gaps), _largest(signs), bad
    if axis_name is not None:
        found = lax.pmax(found, axis_name)
    size, gap, sign, bad = found
    return size, gap, sign, bad == 0


def _largest(numbers: list[Array]) -> Array:
    dtype = working_dtype(numbers)
    return jnp.max(jnp.stack([number.astype(dtype) for number in numbers]))
