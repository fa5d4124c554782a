"""Kronecker factors of the curvature of dense layers, and their inverses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg as jsl
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._chain.network import parametrized
from .._common.linalg import matmul, symmetrize
from .._common.tree import add, scale, vary
from .._common.types import Stacks
from ..losses import AbstractLoss, as_loss
from ..losses._factor import AbstractFactor
from ..losses._loss import factor_of
from ..oracles._gram import columns, sensitivities
from ._curvature import Batch


def factors_of(at: Batch, form: str, key: PRNGKeyArray) -> tuple[Stacks, Stacks]:
    """A and G of a batch, over all devices."""
    net, recipe = at.build(at.params), at.recipe
    found, c = at.linearize()
    outputs, targets = found.outputs, found.targets
    factor = _factor(recipe, outputs, targets)
    if form == "exact":
        cotangents = columns(factor)
    else:
        for axis in at.axes:
            key = jr.fold_in(key, lax.axis_index(axis))
        signs = jr.rademacher(key, outputs.shape, outputs.dtype)
        cotangents = factor.mv(at.vary(signs))[None]
    counts = at.vary(_counts(recipe.loss, outputs, targets))

    def sums(inputs, cotangents, counts):
        """The sums of count a a', and of S' H S, over some examples."""
        layers = sensitivities(net, inputs, jnp.swapaxes(cotangents, 0, 1))
        A, G = [], []
        for layer, (S, a) in zip(parametrized(net), layers, strict=True):
            if layer.bias is not None:
                a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)
            S = S.reshape(S.shape[0], -1, S.shape[-1])
            A.append(matmul(a.mT * counts[None, None], a))
            G.append(matmul(S.mT, S))
        return tuple(A), tuple(G)

    rows = at.inputs, jnp.swapaxes(cotangents, 0, 1), counts
    A, G = _in_pieces(sums, rows, recipe.batch_size)
    A, G, total = at.join((A, scale(recipe.factor * c, G), jnp.sum(counts)))
    return scale(1 / jnp.maximum(total, 1), A), G


def _in_pieces(sums: Callable, rows: PyTree, size: int | None) -> PyTree:
    """Sums over all rows, of so many at a time. The last piece is filled up."""
    m = rows[-1].shape[0]
    if size is None or size >= m:
        return sums(*rows)
    number = -(-m // size)

    def split(a, mode):
        a = jnp.pad(a, [(0, number * size - m)] + [(0, 0)] * (a.ndim - 1), mode)
        return a.reshape(number, size, *a.shape[1:])

    inputs = jtu.tree_map(lambda a: split(a, "edge"), rows[0])
    pieces = inputs, *(split(a, "constant") for a in rows[1:])
    first = jtu.tree_map(lambda a: a[0], pieces)
    zero = lambda a: vary(jnp.zeros(a.shape, a.dtype), like=rows)
    zeros = jtu.tree_map(zero, jax.eval_shape(sums, *first))
    step = lambda total, piece: (add(total, sums(*piece)), None)
    return lax.scan(step, zeros, pieces)[0]


def _factor(recipe: Any, outputs: Array, targets: PyTree) -> AbstractFactor:
    """R with R R' = H: that of the loss, or of the metric in its place."""
    metric = recipe.products.metric
    metric = recipe.loss if metric is None else metric
    if isinstance(metric, AbstractLoss):
        return factor_of(metric, outputs, targets)
    distance = as_loss(lambda outputs, reference: metric(reference, outputs))
    return factor_of(distance, outputs, outputs)


def _counts(loss: AbstractLoss, outputs: Array, targets: PyTree) -> Array:
    """1 for every example that the loss counts, and 0 for one that it ignores."""
    m, number = outputs.shape[0], loss.count(outputs, targets)
    if isinstance(number, int) and number == m:
        return jnp.ones(m, outputs.dtype)
    one = lambda *row: loss.count(*jtu.tree_map(lambda a: a[None], row))
    return jnp.asarray(jax.vmap(one)(outputs, targets), outputs.dtype)


def inverses(A: Array, G: Array, damping: Any) -> tuple[Array, Array]:
    """Those of A + pi sqrt(rho) I and G + sqrt(rho) / pi I; NaN where there is none."""
    size = lambda M: jnp.trace(M, axis1=-2, axis2=-1) / M.shape[-1]
    a, g = size(A), size(G)
    both = (a > 0) & (g > 0)
    pi = jnp.sqrt(jnp.where(both, a, 1) / jnp.where(both, g, 1))
    root = jnp.sqrt(jnp.asarray(damping, A.dtype))

    def inverse(M, shift):
        unit = jnp.eye(M.shape[-1], dtype=M.dtype)
        factor = jnp.linalg.cholesky(symmetrize(M) + shift * unit)
        return symmetrize(jsl.cho_solve((factor, True), unit))

    of_all = jax.vmap(inverse)
    return of_all(A, pi * root), of_all(G, root / pi)
