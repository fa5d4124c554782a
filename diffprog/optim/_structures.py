r"""Structures of a learned preconditioner: which matrices U a parameter may have.

A parameter X is preconditioned as U X. A structure says which numbers make up U, such
as the two factors A and B of $X \mapsto A X B^\top$, and is itself no more than a name:
it can be hashed, and holds no array.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._common.linalg import matmul
from .._common.types import AbstractPart, checked, component, positive_int


Groups = Literal["leaf", "layer", "all"]
Leaf = Float[Array, "..."]
# A side of a matrix beyond which its factor would be too large.
MAX_SIDE = 8192


class AbstractStructure(AbstractPart):
    """Which matrices U the structure allows, for one array of parameters.

    What it is made of is static: integers and strings.

    - `linear`: whether U X is linear in the numbers that make up U.
    """

    linear: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def init(self, shape: tuple[int, ...], dtype: Any) -> PyTree:
        """The numbers of U = I; `ValueError` where no leaf of this shape fits."""

    @abc.abstractmethod
    def apply(self, U: PyTree, X: Leaf) -> Leaf:
        """U X, with the shape of X."""

    @abc.abstractmethod
    def diagonal(self, U: PyTree) -> Array:
        """The entries on the diagonal of U, each one once."""

    @abc.abstractmethod
    def floored(self, U: PyTree, floor: Any) -> PyTree:
        """U with its eigenvalues at least this where they are written down."""


def check_groups(name: str, value: Any):
    """Raises for what is no choice of leaves that share a number."""
    if value not in ("leaf", "layer", "all"):
        raise ValueError(
            f'`{name}` is {value!r}; "leaf", "layer" or "all" is expected.'
        )


class AbstractEntrywise(AbstractStructure):
    """Numbers that the entries of X are multiplied with."""

    linear: ClassVar[bool] = True

    def apply(self, U, X):
        return U * X

    def diagonal(self, U):
        return U

    def floored(self, U, floor):
        return jnp.maximum(U, floor)


class Scalar(AbstractEntrywise):
    r"""$U X = s X$ with one number s for a leaf, for a layer, or for all.

    - `groups`: `"leaf"`, `"layer"`: the leaves of one module, list or dict, such as a
        weight and its bias; or `"all"` that have this structure.
    """

    groups: Groups = checked(check_groups, static=True, default="leaf")

    def init(self, shape, dtype):
        return jnp.ones((), dtype)


class Diagonal(AbstractEntrywise):
    r"""$U X = d \odot X$ with a number for every entry."""

    def init(self, shape, dtype):
        return jnp.ones(shape, dtype)


class DiagonalKronecker(AbstractStructure):
    r"""$U X = \operatorname{diag}(a) X \operatorname{diag}(b)$; U is `(a, b)`.

    - `rows`: so many axes of the leaf are the rows of X, the others its columns.
    """

    rows: int = positive_int(1)

    linear: ClassVar[bool] = False

    def init(self, shape, dtype):
        m, n = sides(self, shape)
        return jnp.ones(m, dtype), jnp.ones(n, dtype)

    def apply(self, U, X):
        a, b = U
        return on_matrix(self, X, lambda X: a[:, None] * X * b[None])

    def diagonal(self, U):
        return U[0][:, None] * U[1][None]

    def floored(self, U, floor):
        return jtu.tree_map(lambda a: jnp.maximum(a, floor), U)


class Kronecker(AbstractStructure):
    r"""$U X = A X B^\top$; U is `(A, B)`, neither symmetric nor positive.

    - `rows`: so many axes of the leaf are the rows of X, the others its columns.
        Weights `(out, in, height, width)` have 1, and `(height, width, in, out)` 3.
    """

    rows: int = positive_int(1)

    linear: ClassVar[bool] = False

    def init(self, shape, dtype):
        return unit_factors(self, shape, dtype)

    def apply(self, U, X):
        A, B = U
        return on_matrix(self, X, lambda X: matmul(A, matmul(X, B.T)))

    def diagonal(self, U):
        return jnp.diagonal(U[0])[:, None] * jnp.diagonal(U[1])[None]

    def floored(self, U, floor):
        return U


class PSDKronecker(AbstractStructure):
    r"""$U X = K K^\top X L L^\top$ with triangular K and L: positive semidefinite.

    U is `(K, L)`, of which what is below the diagonal and on it counts.

    - `rows`: so many axes of the leaf are the rows of X, the others its columns.
    """

    rows: int = positive_int(1)

    linear: ClassVar[bool] = False

    def init(self, shape, dtype):
        return unit_factors(self, shape, dtype)

    def apply(self, U, X):
        K, L = map(jnp.tril, U)
        right = lambda X: matmul(matmul(X, L), L.T)
        return on_matrix(self, X, lambda X: matmul(K, matmul(K.T, right(X))))

    def diagonal(self, U):
        a, b = (jnp.sum(jnp.tril(factor) ** 2, -1) for factor in U)
        return a[:, None] * b[None]

    def floored(self, U, floor):
        return U


class EigenKronecker(AbstractStructure):
    r"""$U X = Q \left(D \odot (Q^\top X R)\right) R^\top$: symmetric; U is `(Q, R, D)`.

    Q and R start as identities and are learned freely: they do not stay orthogonal, and
    the entries of D are the eigenvalues of U only at the start.

    - `rows`: so many axes of the leaf are the rows of X, the others its columns.
    """

    rows: int = positive_int(1)

    linear: ClassVar[bool] = False

    def init(self, shape, dtype):
        ones = jnp.ones(sides(self, shape), dtype)
        return *unit_factors(self, shape, dtype), ones

    def apply(self, U, X):
        Q, R, D = U
        inside = lambda X: D * matmul(Q.T, matmul(X, R))
        return on_matrix(self, X, lambda X: matmul(Q, matmul(inside(X), R.T)))

    def diagonal(self, U):
        Q, R, D = U
        return matmul(Q**2, matmul(D, (R**2).T))

    def floored(self, U, floor):
        return U[0], U[1], jnp.maximum(U[2], floor)


class Dense(AbstractStructure):
    r"""$U \operatorname{vec}(X)$ with any matrix, of as many rows as X has entries."""

    linear: ClassVar[bool] = True

    def init(self, shape, dtype):
        return jnp.eye(int(np.prod(shape, dtype=int)), dtype=dtype)

    def apply(self, U, X):
        return matmul(U, X.ravel()).reshape(X.shape)

    def diagonal(self, U):
        return jnp.diagonal(U)

    def floored(self, U, floor):
        return U


class Stacked(AbstractStructure):
    """A structure of its own for every entry of the first axes of a leaf.

    For layers whose parameters are stored one behind the other and run in a loop. Those
    of a [`diffprog.Network`][] are found without it.

    - `structure`: that of one of them.
    - `axes`: so many axes of the leaf count them.
    - `linear`: as that structure.
    """

    structure: AbstractStructure = component(Diagonal(), "Kronecker()")
    axes: int = positive_int(1)
    linear: bool = eqx.field(static=True, default=False)

    def __init__(self, structure: AbstractStructure, axes: int = 1):
        self.structure, self.axes = structure, axes
        self.linear = getattr(structure, "linear", False)

    def init(self, shape, dtype):
        if len(shape) < self.axes:
            raise ValueError(
                f"a leaf of shape {shape} has no {self.axes} axes that could count "
                "layers"
            )
        U = self.structure.init(shape[self.axes :], dtype)
        stack = lambda a: jnp.broadcast_to(a, (*shape[: self.axes], *a.shape))
        return jtu.tree_map(stack, U)

    def apply(self, U, X):
        return self._each(self.structure.apply)(U, X)

    def diagonal(self, U):
        return self._each(self.structure.diagonal)(U)

    def floored(self, U, floor):
        return self._each(lambda U: self.structure.floored(U, floor))(U)

    def _each(self, fn: Callable) -> Callable:
        for _ in range(self.axes):
            fn = jax.vmap(fn)
        return fn


def sides(structure: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a leaf as a matrix."""
    rows = structure.rows
    if len(shape) <= rows:
        raise ValueError(
            f"a leaf of shape {shape} is no matrix whose rows are {rows} of its axes; "
            "give `Diagonal()` for it"
        )
    count = lambda part: int(np.prod(part, dtype=int))
    return count(shape[:rows]), count(shape[rows:])


def on_matrix(structure: Any, X: Leaf, fn: Callable) -> Leaf:
    """`fn` of X as a matrix."""
    return fn(X.reshape(sides(structure, X.shape))).reshape(X.shape)


def unit_factors(structure: Any, shape: tuple[int, ...], dtype) -> tuple[Array, Array]:
    m, n = sides(structure, shape)
    return jnp.eye(m, dtype=dtype), jnp.eye(n, dtype=dtype)


def default_structure(path: str, leaf: Any) -> AbstractStructure:
    """The rule that is taken where none is given: Kronecker for matrices.

    A leaf with at most one axis is [`diffprog.optim.Diagonal`][]. Others are
    [`diffprog.optim.Kronecker`][] with the first axis as rows, as Equinox stores dense
    layers and convolutions; or diagonal where the matrix has more than 8192 rows or
    columns, or only one. For layers whose outputs come last, as in Flax, write a rule
    of your own with `Kronecker(rows=leaf.ndim - 1)`.

    **Arguments:**

    - `path`: where the leaf is, such as `".layers[0].weight"`.
    - `leaf`: has `shape`, `ndim` and `dtype`.

    **Returns:** a structure.
    """
    if leaf.ndim <= 1:
        return Diagonal()
    m, n = sides(Kronecker(), leaf.shape)
    return Kronecker() if min(m, n) > 1 and max(m, n) <= MAX_SIDE else Diagonal()


# Structures of a leaf as a matrix, whose `rows` say which.
MATRICES = DiagonalKronecker, Kronecker, PSDKronecker, EigenKronecker
