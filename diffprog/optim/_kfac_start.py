"""Preconditioners that start from Kronecker factors of the curvature."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._common.linalg import matmul
from .._common.types import check_kind
from ._kfac import KFACState
from ._llqr_state import Place, Plan
from ._structures import (
    Dense,
    Diagonal,
    DiagonalKronecker,
    EigenKronecker,
    Kronecker,
    PSDKronecker,
    Scalar,
    Stacked,
)


def _eigen(A: Array, B: Array) -> tuple[Array, Array, Array]:
    (a, Q), (b, R) = jnp.linalg.eigh(A), jnp.linalg.eigh(B)
    return Q, R, a[:, None] * b[None]


def _diagonals(A: Array, B: Array) -> tuple[Array, Array]:
    return jnp.diagonal(A), jnp.diagonal(B)


def _outer(A: Array, B: Array) -> Array:
    a, b = _diagonals(A, B)
    return a[:, None] * b[None]


# The numbers of U near X -> A X B', for positive definite A and B.
NEAR: dict[type, Callable] = {
    Kronecker: lambda A, B: (A, B),
    PSDKronecker: lambda A, B: (jnp.linalg.cholesky(A), jnp.linalg.cholesky(B)),
    EigenKronecker: _eigen,
    DiagonalKronecker: _diagonals,
    Diagonal: _outer,
    Dense: jnp.kron,
    Scalar: lambda A, B: jnp.mean(_outer(A, B)),
}


def from_factors(plan: Plan, factors: Any) -> tuple:
    """The numbers of the preconditioner nearest to that of K-FAC.

    K-FAC couples a weight and its bias, and U does not: of each it has the inverse of
    the damped block.
    """
    check_kind("start", factors, KFACState, "a `dp.optim.KFACState`")
    pairs = zip(factors.A_inverse, factors.G_inverse, strict=True)
    rest, found = list(plan.known), {}
    for A, G in pairs:
        sides = G.shape[-1], A.shape[-1]
        fits = [place.shape[-2:] for place in rest[:1]]
        for block in _blocks(A, G, has_bias=fits != [sides]):
            place = rest.pop(0) if rest else None
            if place is None or _size(place) != block[0].shape[-1] * block[1].shape[-1]:
                _refuse(plan, factors)
            found.setdefault(place.group, []).append(_near(place, *block, plan.dtype))
    if rest or len(plan.known) != len(plan.places):
        _refuse(plan, factors)
    mean = lambda *parts: sum(parts) / len(parts)
    return tuple(jtu.tree_map(mean, *found[group]) for group in range(plan.size))


def _refuse(plan: Plan, factors: KFACState) -> NoReturn:
    sides = zip(factors.G_inverse, factors.A_inverse, strict=True)
    known = [(G.shape[-1], A.shape[-1]) for G, A in sides]
    raise ValueError(
        f"`start` has factors of layers of {known} outputs and inputs, biases among "
        f"these, which are not those of {[place.path for place in plan.known]}: give "
        "the state of a `dp.optim.kfac` of the same parameters, none of them masked."
    )


def _shape(place: Place) -> tuple[int, ...]:
    stacked = isinstance(place.structure, Stacked)
    return place.shape[1:] if stacked else place.shape


def _size(place: Place) -> int:
    return int(np.prod(_shape(place), dtype=int))


def _blocks(A: Array, G: Array, has_bias: bool) -> list[tuple[Array, Array]]:
    """(U of outputs, U of inputs) for a weight and, where it has one, its bias."""
    if not has_bias:
        return [(G, A)]
    inner, cross, last = A[:, :-1, :-1], A[:, :-1, -1:], A[:, -1:, -1:]
    # The inverse of a block of M, from the blocks of the inverse of M.
    row = jnp.swapaxes(cross, 1, 2)
    weight = inner - matmul(cross, row) / last
    bias = last - matmul(row, jax.vmap(jnp.linalg.solve)(inner, cross))
    return [(G, weight), (G * bias, jnp.ones_like(last))]


def _near(place: Place, A: Array, B: Array, dtype: Any) -> PyTree:
    structure, stacked = place.structure, isinstance(place.structure, Stacked)
    kind = type(structure.structure if stacked else structure)  # pyright: ignore
    if kind not in NEAR:
        raise ValueError(
            f"`params{place.path}` has the structure {structure}, which cannot start "
            "from factors of K-FAC; those of `dp.optim` can."
        )

    def one(A, B):
        U = NEAR[kind](A, B)
        return U.reshape(_shape(place)) if kind is Diagonal else U

    U = jax.vmap(one)(A, B) if stacked else one(A[0], B[0])
    return jtu.tree_map(lambda a: a.astype(dtype), U)
