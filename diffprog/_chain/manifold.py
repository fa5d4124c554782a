"""States that are no vectors: how two of them differ, in local coordinates."""

import abc
from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common.types import AbstractPart, check_function


class AbstractManifold(AbstractPart):
    """How states differ where subtraction is not meant: angles, attitudes.

    Local coordinates at a state are any pytree of floating arrays. They may have less
    entries than the state: a rotation has 3, and a unit quaternion 4.
    """

    @abc.abstractmethod
    def difference(self, x: PyTree, y: PyTree) -> PyTree[Array]:
        """x minus y: local coordinates of x at y, 0 where both are the same."""

    @abc.abstractmethod
    def retract(self, y: PyTree, v: PyTree[Array]) -> PyTree:
        """The state x whose `difference(x, y)` is v."""

    def check(self, name: str, x: PyTree):
        """Raises for a known state that does not lie on the manifold."""


class Manifold(AbstractManifold):
    """The manifold of two functions; ready-made ones are in `dp.manifolds`."""

    _difference: Callable
    _retract: Callable

    def __init__(self, difference: Callable, retract: Callable):
        check_function("difference", difference, "(x, y) -> v")
        check_function("retract", retract, "(y, v) -> x")
        self._difference, self._retract = map(_node, (difference, retract))

    def difference(self, x, y):
        return self._difference(x, y)

    def retract(self, y, v):
        return self._retract(y, v)


Manifold.__init__.__doc__ = """**Arguments:**

- `difference`: `(x, y) -> v`, x minus y in local coordinates at y, 0 where x = y: any
    pytree of floating arrays, smooth near x = y.
- `retract`: `(y, v) -> x`, its inverse: `retract(y, difference(x, y))` is x.

**Raises:** `TypeError` for something that is no function.
"""


def _node(function: Any) -> Any:
    """A function that programs may return: part of the structure of a tree."""
    return jtu.Partial(function) if jtu.all_leaves([function]) else function
