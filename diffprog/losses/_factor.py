r"""Square roots of the Hessians of a batch of losses.

With the Hessian $H = R R^\top$ of every example, a Gauss-Newton step solves a system
with the matrix $S = R^\top K R + c I$, $K = J J^\top$. For a gradient $g = R \rho + e$
the step is

$$d = -J^\top \left( R x + \tfrac1c e \right), \quad
S x = \rho - \tfrac1c R^\top K e.$$

Any e is right in exact arithmetic; where c is small, digits are lost to the difference
of $R x$ and $e / c$ wherever $R R^\top$ is large against c in the direction of e. So e
has what the curvature cannot reach, and what it reaches by rounding only.
"""

import abc
import math

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from .._common.types import AbstractPart


Outputs = Float[Array, "examples ..."]
PerExample = Float[Array, " examples"]


class AbstractFactor(AbstractPart):
    r"""The Hessian $H = R R^\top$ and the gradient $g = R \rho + e$ of every example.

    - `rho`: shape of the outputs.
    - `remainder`: e, of the shape of the outputs; `None` where it is 0 for all outputs.
        It is what the gradient has beyond the range of H: a label whose class has no
        probability, or one so small that $\rho$ would lose all other digits.
    - `negative_curvature`: shape `(examples,)`, true where H is not positive
        semidefinite. Then $R R^\top$ is its positive part.
    """

    rho: eqx.AbstractVar[Outputs]
    remainder: eqx.AbstractVar[Outputs | None]
    negative_curvature: eqx.AbstractVar[Bool[Array, " examples"]]

    @abc.abstractmethod
    def mv(self, vector: Outputs) -> Outputs:
        """R s, for s of the shape of the outputs."""

    @abc.abstractmethod
    def transpose_mv(self, vector: Outputs) -> Outputs:
        """R' v, of the shape of the outputs."""


class ScaledFactor(AbstractFactor):
    """R = diag(scale) (I - s s'), for unit vectors s; without s it is diagonal.

    - `rho`, `remainder`, `negative_curvature`: those of every factor.
    - `scale`, `s`: of the shape of the outputs.
    - `by_rows`: whether the s are unit vectors along the last axis, else of an example.
    """

    rho: Outputs
    remainder: Outputs | None
    negative_curvature: Bool[Array, " examples"]
    scale: Outputs
    s: Outputs | None = None
    by_rows: bool = eqx.field(static=True, default=True)

    def _project(self, vector):
        if self.s is None:
            return vector
        dot = row_dot if self.by_rows else example_dot
        return vector - self.s * dot(self.s, vector)

    def mv(self, vector):
        return self.scale * self._project(vector)

    def transpose_mv(self, vector):
        return self._project(self.scale * vector)


class DenseFactor(AbstractFactor):
    """R as a matrix for every example."""

    rho: Outputs
    remainder: Outputs | None
    negative_curvature: Bool[Array, " examples"]
    R: Float[Array, "examples k k"]

    def mv(self, vector):
        return batched_mv(self.R, vector)

    def transpose_mv(self, vector):
        return batched_mv(jnp.matrix_transpose(self.R), vector)


def row_dot(a: Array, b: Array) -> Array:
    """The inner product over the last axis, which stays with length 1.

    Not a sum of products: on the CPU XLA of jaxlib 0.10.2 gets s sum(s v) wrong in
    float32 where one of both has another axis, as under `vmap`, and rows are many.
    """
    precision = lax.Precision.HIGHEST
    return jnp.einsum("...j,...j->...", a, b, precision=precision)[..., None]


def example_dot(a: Array, b: Array) -> Array:
    """The inner product over all but the first axis, which stay with length 1."""
    flat = lambda a: a.reshape(a.shape[0], math.prod(a.shape[1:]))
    return row_dot(flat(a), flat(b)).reshape(-1, *(1,) * (a.ndim - 1))


def batched_mv(matrix: Float[Array, "examples k k"], vector: Array) -> Array:
    """The product of every example, whose outputs may have any shape."""
    flat = vector.reshape(matrix.shape[:2])
    product = jnp.einsum("ijk,ik->ij", matrix, flat, precision="highest")
    return product.reshape(vector.shape)


def never(outputs: Array) -> Bool[Array, " examples"]:
    return jnp.zeros(outputs.shape[0], bool)


def flat_factor(gradient: Array) -> ScaledFactor:
    """Of a loss without curvature."""
    zero = jnp.zeros_like(gradient)
    return ScaledFactor(zero, gradient, never(gradient), zero)


def diagonal_factor(gradient: Array, weights: Array, least: Array) -> ScaledFactor:
    """Of H = diag(weights); `remainder` has the entries whose weight is below `least`.

    What has no weight at all is among these.
    """
    inside = (weights > 0) & (weights >= least)
    scale = jnp.sqrt(weights)
    divisor = jnp.where(inside & (weights < jnp.inf), scale, 1)
    rho = jnp.where(inside, gradient / divisor, 0)
    remainder = jnp.where(inside, 0, gradient)
    return ScaledFactor(rho, remainder, never(gradient), scale)


def class_hessian_mv(w: Array, vector: Array) -> Array:
    """(diag(w) - w w' / W) v, with classes on the last axis."""
    W = jnp.sum(w, -1, keepdims=True)
    return w * (vector - row_dot(w, vector) / jnp.where(W > 0, W, 1))


def class_factor(gradient: Array, w: Array) -> ScaledFactor:
    r"""Of $H = \operatorname{diag}(w) - w w^\top / W$, with classes on the last axis.

    R = diag(sqrt w) (I - s s') with s = sqrt(w / W), as in
    [`diffprog.losses.SoftargmaxJacobian`][]. A class whose weight is next to nothing
    beside its gradient is left to the remainder, and with it as much on the other
    classes as makes the sum of both parts 0.
    """
    total = lambda a: jnp.sum(a, -1, keepdims=True)
    positive = lambda a: jnp.where(a > 0, a, 1)
    eps = jnp.finfo(w.dtype).eps
    least = eps * jnp.abs(gradient) * jnp.max(w, -1, keepdims=True)
    inside = (w > 0) & (w >= least)
    kept = jnp.where(inside, w, 0)
    left = jnp.where(inside, 0, gradient)
    excess = total(jnp.where(inside, gradient, 0))
    # Without a class left out the sum is 0, but for rounding and odd targets.
    rounding = (total(jnp.abs(left)) == 0) & (jnp.abs(excess) <= 100 * eps)
    share = kept * (jnp.where(rounding, 0, excess) / positive(total(kept)))
    # sqrt(w) rho = gradient - w excess / W, so that rho is orthogonal to s.
    numerator = jnp.where(inside, gradient - kept * (excess / positive(total(kept))), 0)
    rho = numerator / jnp.sqrt(positive(kept))
    s = jnp.sqrt(w / positive(total(w)))
    return ScaledFactor(rho, left + share, never(gradient), jnp.sqrt(w), s)
