"""How far to go along directions, from a quadratic model of the loss."""

import abc

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._common.linalg import matmul, solve_positive, symmetrize
from .._common.tree import norm
from .._common.types import AbstractPart, check_not_negative, Number, number


class AbstractRule(AbstractPart):
    r"""Coefficients of directions of length 1 in which the loss has a quadratic model.

    $$J(D a) = -b^\top a + \\tfrac12 a^\top S a, \\quad b = -D^\top g, \\;
    S = D^\top C D.$$
    """

    @abc.abstractmethod
    def coefficients(
        self, S: Float[Array, "K K"], b: Float[Array, " K"]
    ) -> Float[Array, " K"]:
        """a; NaN where the rule has no answer, such as for a model without minimum."""


class Minimize(AbstractRule):
    r"""The minimum of the model: $(S + \rho I) a = b$.

    It is solved with the correlations of the directions, whose diagonal is raised by
    `jitter`: two directions that are nearly parallel share what they have in common.

    - `damping`: rho >= 0, in the units of C.
    - `jitter`: a number >= 0, relative.

    No answer where S + rho I is not positive definite, as with a Hessian: take
    [`diffprog.optim.Absolute`][] there, or a Gauss-Newton matrix.
    """

    damping: Number = number(1e-3, check_not_negative)
    jitter: Number = number(1e-4, check_not_negative)

    def coefficients(self, S, b):
        damped = S + self.damping * jnp.eye(len(b), dtype=S.dtype)
        # A direction of length 0 has neither curvature nor slope.
        empty = (jnp.diagonal(S) == 0) & (b == 0)
        diagonal = jnp.where(empty, 1, jnp.diagonal(damped))
        r = 1 / jnp.sqrt(diagonal)  # NaN where negative
        raised = jnp.where(empty, 1.0, self.jitter).astype(S.dtype)
        correlation = symmetrize(jnp.outer(r, r) * damped) + jnp.diag(raised)
        a, positive = solve_positive(correlation, (r * b)[:, None])
        return jnp.where(positive, r * a[:, 0], jnp.nan)


class Absolute(AbstractRule):
    r"""Steps away from saddles: $(|S| + \rho I) a = b$, by the eigenvalues of S.

    - `damping`: rho >= 0.

    Source: Dauphin and others, "Identifying and attacking the saddle point problem in
    high-dimensional non-convex optimization", 2014, arXiv 1406.2572.
    """

    damping: Number = number(1e-3, check_not_negative)

    def coefficients(self, S, b):
        values, vectors = jnp.linalg.eigh(symmetrize(S))
        return matmul(vectors, _divided(matmul(vectors.T, b), values, self.damping))


class Cauchy(AbstractRule):
    r"""Each direction on its own: $a_k = b_k / (|S_{kk}| + \rho)$.

    With the Hessian, one direction, a `scale` from 1 to 2 and an EMA of 0.9 it is the
    method CDAT: at 2 a step on a quadratic leaves the loss as it is, on the edge of
    stability.

    - `damping`: rho >= 0.

    Source: Roulet and others, "Stepping on the Edge: Curvature Aware Learning Rate
    Tuners", 2024, arXiv 2407.06183.
    """

    damping: Number = number(1e-3, check_not_negative)

    def coefficients(self, S, b):
        return _divided(b, jnp.diagonal(S), self.damping)


def _divided(b: Array, curvature: Array, damping) -> Array:
    """b / (|curvature| + damping), and 0 for nothing over nothing."""
    size = jnp.abs(curvature) + damping
    return jnp.where(b == 0, 0, b / jnp.where(b == 0, 1, size))


# The weight of the past in the mean of the lengths.
PAST = 0.9


def held(a: Array, mean: Array, growth: Number) -> tuple[Array, Array]:
    """a, at most `growth` times as long as the mean of those before; the new mean."""
    length = norm(a)
    limit = jnp.where(mean > 0, growth * mean, jnp.inf)  # 0 before the first
    long = length > limit
    a = jnp.where(long, limit / jnp.where(long, length, 1), 1) * a
    length = jnp.minimum(length, limit)
    mixed = jnp.where(mean > 0, PAST * mean + (1 - PAST) * length, length)
    return a.astype(mean.dtype), jnp.where(length > 0, mixed, mean).astype(mean.dtype)
