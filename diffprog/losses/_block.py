r"""Steps in the dual variables of one example, the others being fixed.

$$\min_a\; l^*(a) - \langle a, z \rangle
+ \frac1{2c} (a - \alpha)^\top K (a - \alpha).$$

At the solution a is the gradient of l at $u = z - K (a - \alpha) / c$.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jaxtyping import Array, ArrayLike, Float

from .._common.door import door
from .._common.linalg import matmul
from .._common.loops import while_loop
from ._factor import batched_mv, PerExample
from ._loss import AbstractDualLoss, per_example, spread, total


MAX_NEWTON = 50
MAX_HALVINGS = 30
Matrices = Float[Array, "examples k k"]


def checked(alpha: Array, K: Array, c: ArrayLike) -> PerExample:
    """c, one number per example. Raises for a K that does not fit."""
    n, k = alpha.shape[0], math.prod(alpha.shape[1:])
    if jnp.shape(K) != (n, k, k):
        raise ValueError(
            f"`K` has shape {jnp.shape(K)}; one matrix of the size of its outputs for "
            f"every example, {(n, k, k)}, is expected."
        )
    return jnp.broadcast_to(per_example("c", c, alpha).ravel(), n)


def largest_eigenvalue(K: Matrices) -> PerExample:
    """A bound from above: the smaller one of two norms; exact for k = 1."""
    size = jnp.abs(K)
    m = jnp.max(size, (1, 2), keepdims=True)
    m = jnp.where(m > 0, m, 1)
    frobenius = m[:, 0, 0] * jnp.sqrt(jnp.sum((size / m) ** 2, (1, 2)))
    rows = jnp.max(jnp.sum(size, 2), 1)
    return rows if K.shape[1] == 1 else jnp.minimum(frobenius, rows)


def majorized_block(self: AbstractDualLoss, alpha, z, K, c, targets) -> Array:
    """The step where K is replaced by a larger multiple of the identity.

    Like `newton_block` a method of losses: `block_update = majorized_block`.
    """
    c = checked(alpha, K, c)
    # Where K is next to nothing: a larger multiple still, to divide by.
    t = c / jnp.maximum(largest_eigenvalue(K), jnp.finfo(c.dtype).eps * c)
    return self.conjugate_prox(alpha + spread(t, alpha) * z, t, targets)


class BlockProblem(NamedTuple):
    """The convex l(u) - <alpha, u> + s' K s / (2 c), u = z - K s / c, in s = a - alpha.

    c has one number per example.
    """

    loss: AbstractDualLoss
    alpha: Array
    z: Array
    K: Matrices
    c: Array
    targets: Array

    def outputs(self, s: Array) -> Array:
        return self.z - batched_mv(self.K, s) / spread(self.c, self.alpha)

    def quadratic(self, s: Array) -> Array:
        return total(s * batched_mv(self.K, s)) / (2 * self.c)

    def value(self, s: Array) -> Array:
        u = self.outputs(s)
        return self.loss(u, self.targets) - total(self.alpha * u) + self.quadratic(s)

    def dual(self, a: Array) -> Array:
        """What `block_update` makes small."""
        value = self.loss.conjugate(a, self.targets) - total(a * self.z)
        return value + self.quadratic(a - self.alpha)

    def direction(self, s: Array) -> tuple[Array, Array]:
        """Newton's (I + H K / c)^-1 r, r = g - alpha - s, and how much it promises."""
        u = self.outputs(s)
        factor = self.loss.factor(u, self.targets)
        n, k = self.K.shape[:2]
        basis = jnp.broadcast_to(jnp.eye(k, dtype=s.dtype)[:, None], (k, n, k))
        columns = jax.vmap(factor.mv)(basis.reshape(k, *s.shape))
        R = jnp.moveaxis(columns.reshape(k, n, k), 0, 2)
        KR = matmul(self.K, R)
        S = shifted(matmul(jnp.matrix_transpose(R), KR), self.c)
        g = factor.mv(factor.rho)
        g = g if factor.remainder is None else g + factor.remainder
        r = g - self.alpha - s
        x = solve_all(S, batched_mv(jnp.matrix_transpose(KR), r))
        ds = r - batched_mv(R, x)
        return ds, total(r * batched_mv(self.K, ds)) / self.c


def newton_block(self: AbstractDualLoss, alpha, z, K, c, targets) -> Array:
    """The exact step for a smooth loss, by Newton's method with a line search.

    Of its result and that of `majorized_block` the better one is taken.
    """
    simple = majorized_block(self, alpha, z, K, c, targets)
    if K.shape[1] == 1:
        return simple
    problem = BlockProblem(self, alpha, z, K, checked(alpha, K, c), targets)
    return _newton(problem, simple)


@door
def _newton(problem: BlockProblem, simple: Array) -> Array:
    loss, alpha, _, _, c, targets = problem
    eps = jnp.finfo(alpha.dtype).eps

    def unfinished(carry):
        i, *_, done = carry
        return (i < MAX_NEWTON) & ~jnp.all(done)

    def improve(carry):
        i, s, old, previous, done = carry
        ds, decrement = problem.direction(s)
        t, new = search(problem, s, ds, old, decrement, done)
        good = jnp.isfinite(new) & ~done
        s = jnp.where(spread(good, s), s + spread(t, s) * ds, s)
        small = decrement <= jnp.sqrt(eps) * (1 + jnp.abs(old))
        ends = (t == 1) & (decrement <= eps) | small & (decrement >= previous / 2)
        return i + 1, s, jnp.where(good, new, old), decrement, done | ends | ~good

    s = simple - alpha
    v = problem.value(s)
    s = jnp.where(spread(jnp.isfinite(v), s), s, 0)
    v = jnp.where(jnp.isfinite(v), v, jnp.inf)
    begin = jnp.zeros((), jnp.int32), s, v, jnp.full_like(c, jnp.inf), jnp.isnan(c)
    s = while_loop(unfinished, improve, begin)[1]

    best, least = simple, problem.dual(simple)
    gradient = loss.gradient(problem.outputs(s), targets)
    for a in (gradient, loss.dual_projection(alpha + s, targets)):
        level = problem.dual(a)
        best = jnp.where(spread(level <= least, a), a, best)
        least = jnp.fmin(level, least)
    return best


def search(problem: BlockProblem, s, ds, old, decrement, done) -> tuple[Array, Array]:
    """The first of 1, 1/2, 1/4 ... with enough decrease, and the value there."""
    noise = 8 * jnp.finfo(s.dtype).eps * (1 + jnp.abs(old))
    fails = lambda t, new: ~(new <= old - 1e-4 * t * decrement + noise) & ~done

    def unfinished(carry):
        j, t, new = carry
        return (j < MAX_HALVINGS) & jnp.any(fails(t, new))

    def halve(carry):
        j, t, new = carry
        again = fails(t, new)
        t = jnp.where(again, t / 2, t)
        trial = problem.value(s + spread(t, s) * ds)
        return j + 1, t, jnp.where(again, trial, new)

    # Nothing is less than NaN: the first trial is at 1.
    first = jnp.zeros((), jnp.int32), jnp.full_like(old, 2), jnp.full_like(old, jnp.nan)
    _, t, new = while_loop(unfinished, halve, first)
    return t, jnp.where(fails(t, new), jnp.inf, new)


def squared_block(alpha, z, K, c, targets) -> Array:
    """The exact step of the squared loss: (I + K / c) (a - alpha) = z - y - alpha."""
    c = checked(alpha, K, c)
    right = (z - targets - alpha) * spread(c, alpha)
    return alpha + solve_all(shifted(K, c), right)


def shifted(K: Matrices, c: Array) -> Matrices:
    """K + c I."""
    return K + c[:, None, None] * jnp.eye(K.shape[1], dtype=K.dtype)[None]


def solve_all(S: Matrices, right: Array) -> Array:
    """The solution for every example, by Cholesky."""
    solve = lambda S, b: jsl.cho_solve((jnp.linalg.cholesky(S), True), b)
    return jax.vmap(solve)(S, right.reshape(S.shape[:2])).reshape(right.shape)
