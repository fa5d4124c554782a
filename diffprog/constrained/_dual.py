"""What a dual is, and how the rows that a call measured reach it."""

import abc
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common.types import AbstractPart
from ._constraint import Constraint


class DualState(eqx.Module):
    """The multipliers of one constraint, and what their dual remembers.

    - `value`: what the dual accumulates, one number for each multiplier.
    - `memory`: what it keeps besides.
    - `equal`: whether the constraint is an equality.
    """

    value: Array
    memory: PyTree
    equal: bool = eqx.field(static=True)


class AbstractDual(AbstractPart):
    """How multipliers follow from the errors of a constraint.

    Everything is entry by entry: a state has the shape of the errors, which is that of
    the constraint, or of the rows of a table that a call saw. Leaves of a memory that
    have another shape, such as counts, are shared by all rows.
    """

    @abc.abstractmethod
    def init(self, value: Array, equal: bool) -> PyTree:
        """The first memory, for these multipliers of 0."""

    @abc.abstractmethod
    def update(self, state: DualState, error: Array) -> DualState:
        """The state after an error, g or h, of its shape."""

    @abc.abstractmethod
    def price(self, state: DualState) -> tuple[Array, Array]:
        """y and c: the effective multiplier is y + c h, or [y + c g]_+."""


def spread(number: Any, like: Array) -> Array:
    """A number of a dual, for every entry, in the dtype of the multipliers."""
    return jnp.broadcast_to(jnp.asarray(number).astype(like.dtype), like.shape)


def start(dual: AbstractDual, constraint: Constraint) -> DualState:
    """The state before the first error."""
    value = jnp.zeros(constraint.shape, constraint.dtype)
    memory = dual.init(value, constraint.equal)
    own = lambda leaf: jnp.array(leaf, copy=True)  # so that all can be donated
    return DualState(value, jtu.tree_map(own, memory), constraint.equal)


def prices(
    dual: AbstractDual, state: DualState, constraint: Constraint
) -> tuple[Array, Array]:
    """y and c of the entries that were measured."""
    if constraint.index is not None:
        state = _taken(state, constraint.places())
    y, c = dual.price(state)
    return spread(y, state.value), spread(c, state.value)


def updated(
    dual: AbstractDual, state: DualState, constraint: Constraint, error: Array
) -> DualState:
    """The state after these errors; what did not count, or is not finite, stays."""
    counted: Any = constraint.counted()
    if constraint.index is None:
        return _chosen(counted, error, dual.update(state, error), state)
    size, rows = error.shape[0], constraint.rows
    places, own = jnp.unique(
        constraint.places(), size=size, fill_value=rows, return_inverse=True
    )
    add = lambda a: jax.ops.segment_sum(a, own, size)
    number = add(counted.astype(error.dtype))
    mean = add(jnp.where(counted, error, 0)) / jnp.maximum(number, 1)
    old = _taken(state, places)
    new = _chosen(number > 0, mean, dual.update(old, mean), old)
    return _put(state, places, new)


def _chosen(
    counted: Array | None, error: Array, new: DualState, old: DualState
) -> DualState:
    """The new state where a row was seen; what rows share is new if any was."""
    seen = jnp.isfinite(error) & jnp.isfinite(new.value)
    seen = seen if counted is None else seen & counted

    def choose(new, old):
        which = seen if new.shape == seen.shape else jnp.any(seen)
        return jnp.where(which, new, old)

    return jtu.tree_map(choose, new, old)


def _taken(state: DualState, places: Array) -> DualState:
    """The rows at these places of a table."""
    rows = state.value.shape[:1]
    take = lambda a: a.at[places].get(mode="clip") if a.shape[:1] == rows else a
    return jtu.tree_map(take, state)


def _put(state: DualState, places: Array, new: DualState) -> DualState:
    """The table with new rows at these places, each of which stands there once."""
    rows = state.value.shape[:1]

    def put(old, new):
        return old.at[places].set(new, mode="drop") if old.shape[:1] == rows else new

    return jtu.tree_map(put, state, new)


def remembering(state: DualState, value: Array, **memory: Array) -> DualState:
    """The state with another value, and other entries of its memory."""
    return replace(state, value=value, memory={**state.memory, **memory})
