"""States that are no vectors: how two of them differ, in local coordinates."""

import abc
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common.door import door
from .._common.types import (
    AbstractPart,
    came,
    check_function,
    check_kind,
    is_known,
    noted,
    shapes,
)
from .calls import check_dtype


STEP = 0.1  # of the coordinates that functions are checked at

# What JAX raises where a shape, or a branch of Python, depends on traced numbers.
_ASKED = jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError


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

    def near(self) -> "AbstractManifold | None":
        """A cheaper one for derivatives, or none.

        Its maps have the same first and second derivatives as these where v is 0.
        """


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


def as_manifold(manifold: Any) -> AbstractManifold | None:
    """A manifold or none; raises for anything else."""
    if isinstance(manifold, tuple | list | dict):
        raise TypeError(
            f"`manifold` is {came(manifold)}; one manifold is expected, for the states "
            "of all phases. That of a tree is `dp.manifolds.Product(parts)`, and where "
            "phases have states of other shapes a `dp.Manifold(difference, retract)` "
            "may look at them."
        )
    if manifold is not None:
        check_kind("manifold", manifold, AbstractManifold, "dp.Manifold(...)")
    return manifold


def local_difference(manifold: AbstractManifold, x: PyTree, y: PyTree) -> PyTree[Array]:
    """x minus y, checked."""

    def note():
        given = f"`difference` was given two states of shape {shapes(x):.200}."
        if isinstance(sys.exception(), _ASKED):
            given += (
                " It is traced: the shape of what it returns may depend on that of the "
                "states, not on their numbers; `jnp.where` chooses between values."
            )
        return given

    with noted(note):
        v = manifold.difference(x, y)
    _check_floats("difference", manifold.difference, v, x)
    most, found = (sum(map(jnp.size, jtu.tree_leaves(tree))) for tree in (x, v))
    if not 1 <= found <= most:
        raise ValueError(
            f"`difference` returned {shapes(v):.200}, {found} local coordinates of a "
            f"state with the shapes {shapes(x):.200}; 1 to {most} are expected, as "
            "many as the state has dimensions."
        )
    return v


def local_retraction(manifold: AbstractManifold, y: PyTree, v: PyTree) -> PyTree:
    """The state at local coordinates v of y, checked."""
    given = f"a state of shape {shapes(y):.200} and coordinates of {shapes(v):.200}"
    with noted(lambda: f"`retract` was given {given}, as `difference` returned them."):
        x = manifold.retract(y, v)
    if shapes(x) != shapes(y):
        raise ValueError(
            f"`retract` returned {shapes(x):.200}; a state, {shapes(y):.200}, is "
            "expected."
        )
    _check_floats("retract", manifold.retract, x, y)
    return x


def _check_floats(name: str, fn: Callable, tree: PyTree, state: PyTree):
    if not jtu.tree_leaves(tree):
        raise ValueError(
            f"`{name}` returned {came(tree)}; a tree of floating arrays is expected."
        )
    check_dtype(name, fn, tree, jnp.asarray(jtu.tree_leaves(state)[0]).dtype)


def check_state(manifold: AbstractManifold, x0: PyTree):
    """Raises for functions that are not inverse to each other at a known state."""
    if not all(map(is_known, jtu.tree_leaves(x0))):
        return
    manifold.check("x0", x0)
    same, back = map(float, _errors(manifold, x0))
    tol = STEP * jnp.finfo(jtu.tree_leaves(x0)[0].dtype).eps ** 0.5
    if not same <= tol:
        raise ValueError(
            f"`difference(x, x)` of the manifold is {same:.1e} at `x0`; 0 is expected: "
            "it is x minus y in local coordinates at y."
        )
    if not back <= tol:
        raise ValueError(
            "`retract` of the manifold is not the inverse of `difference`: at `x0` "
            f"`difference(retract(x0, v), x0)` differs from v by {back:.1e}, where the "
            f"entries of v are {STEP} and -{STEP}. `retract(y, v)` is the state x "
            "whose difference from y is v."
        )


@door
def _errors(manifold: AbstractManifold, x0: PyTree) -> tuple[Array, Array]:
    """How large difference(x, x) is, and how far retract is from its inverse."""
    same = local_difference(manifold, x0, x0)
    leaves, tree = jtu.tree_flatten(same)
    signs = [jnp.where(jnp.arange(a.size) % 2, -STEP, STEP) for a in leaves]
    pairs = zip(signs, leaves, strict=True)
    v = tree.unflatten([s.reshape(a.shape).astype(a.dtype) for s, a in pairs])
    back = local_difference(manifold, local_retraction(manifold, x0, v), x0)
    size = lambda *trees: jnp.max(
        jnp.concatenate([jnp.ravel(jnp.abs(a)) for a in jtu.tree_leaves(trees)])
    )
    return size(same), size(jtu.tree_map(jnp.subtract, back, v))


class Chart(eqx.Module):
    """Differences of states that are vectors, traced once.

    - `size`: that of the local coordinates.
    - `near`: for derivatives, if there is a cheaper one.
    - `is_flat`: whether it is ordinary subtraction.
    """

    size: int
    difference: Callable[[Array, Array], Array]  # (x, y) -> v
    retract: Callable[[Array, Array], Array]  # (y, v) -> x
    near: "Chart | None" = None
    is_flat: bool = False

    @property
    def for_derivatives(self) -> "Chart":
        """Where v is 0."""
        return self.near or self

    @staticmethod
    def flat(size: int) -> "Chart":
        """That of vectors."""
        return Chart(size, jnp.subtract, jnp.add, is_flat=True)
