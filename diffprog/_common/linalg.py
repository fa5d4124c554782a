import math

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float


def matmul(a: Array, b: Array) -> Array:
    """The product in full precision: that of accelerators drops to 10 bits else."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


# Up to this size a Cholesky factorization is written out as scalar operations, which
# XLA fuses into the loop around it; a LAPACK call would cost more than the arithmetic.
UNROLLED = 7
# In loops that are compiled as one function `eliminate` takes its place between these
# sizes; what calls LAPACK could not be compiled there.
ELIMINATED = range(7, 22)


@jax.jit
def symmetrize(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The symmetric part, which is all that x' matrix x sees.

    Fast loops know this function by its name, and keep it a function.
    """
    return 0.5 * (matrix + matrix.mT)


def solve_positive(
    matrix: Float[Array, "m m"],
    rhs: Float[Array, "m k"],
    valid: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "m k"], Bool[Array, ""]]:
    """Solves `matrix @ x = rhs` by Cholesky; also says whether `matrix` is positive.

    Where it is not, and m is at most `UNROLLED`, the first column of `x` is a vector w
    with w' matrix w <= 0, and the others are 0; above that `x` is 0. What is not
    `valid` is not positive, with w = 0.
    """
    return solve_factorized(matrix, rhs, jnp.asarray(valid))


@jax.jit
def solve_factorized(matrix, rhs, valid):
    """`solve_positive` by Cholesky; fast loops know this function by its name."""
    m = matrix.shape[0]
    if m > UNROLLED:
        factor = jnp.linalg.cholesky(matrix)
        positive = valid & jnp.all(jnp.diagonal(factor) > 0)
        return jnp.where(positive, jsl.cho_solve((factor, True), rhs), 0), positive
    # matrix = L D L', row by row, with ones on the diagonal of L; M = L D.
    L, M, inverse, y, x = {}, {}, {}, {}, {}
    pivots = []
    for i in range(m):
        for j in range(i):
            M[i, j] = matrix[i, j] - sum(M[i, k] * L[j, k] for k in range(j))
            L[i, j] = M[i, j] * inverse[j]
        pivots.append(matrix[i, i] - sum(M[i, k] * L[i, k] for k in range(i)))
        inverse[i] = 1 / jnp.where(pivots[i] == 0, 1, pivots[i])
    for i in range(m):
        y[i] = rhs[i] - sum(L[i, k] * y[k] for k in range(i))
    for i in reversed(range(m)):
        x[i] = y[i] * inverse[i] - sum(L[k, i] * x[k] for k in range(i + 1, m))
    # Before the first pivot that is not positive all are: w = inv(L') e has it for
    # its curvature.
    w, before = {}, valid
    for i in range(m):
        good = before & (pivots[i] > 0)
        w[i], before = (before & ~good).astype(matrix.dtype), good
    for i in reversed(range(m)):
        w[i] = w[i] - sum(L[k, i] * w[k] for k in range(i + 1, m))
    stack = lambda rows: jnp.stack([rows[i] for i in range(m)])
    return _or_way_down(stack(x), stack(w), before), before


def eliminate(matrix, rhs, valid):
    """`solve_positive` by Gauss-Jordan elimination, whose pivots are those of L D L'.

    After j columns the first j rows of [matrix, rhs] are [I, inv(G) g, inv(G) r] where
    G is the leading block, and g, r stood beside it: w = (-inv(G) g, 1, 0) has pivot j
    for its curvature. Columns that are done are dropped.
    """
    m = len(matrix)
    index = jnp.arange(m)

    rows = jnp.concatenate([matrix, rhs], 1)
    w, positive = jnp.zeros_like(matrix[0]), valid
    for j in range(m):
        column, pivot, rows = rows[:, 0], rows[j, 0], rows[:, 1:]
        before, here = positive, index == j
        positive = before & (pivot > 0)
        way_down = jnp.where(index < j, -column, here.astype(w.dtype))
        w = jnp.where(before & ~positive, way_down, w)
        row = rows[j : j + 1] / jnp.where(pivot == 0, 1, pivot)
        rows = jnp.where(here[:, None], row, rows - column[:, None] * row)
    return _or_way_down(rows, w, positive), positive


def _or_way_down(x, w, positive):
    others = jnp.zeros_like(x[:, 1:])
    return jnp.where(positive, x, jnp.concatenate([w[:, None], others], 1))


# How many numbers of a tile are summed at once.
SUMMED = 4


def product(a: Array, b: Array, dimensions) -> Array:
    """`lax.dot_general` as a product and a sum."""
    (a_sum, b_sum), (a_batch, b_batch) = dimensions
    a_free = [i for i in range(a.ndim) if i not in (*a_sum, *a_batch)]
    b_free = [i for i in range(b.ndim) if i not in (*b_sum, *b_batch)]
    # Axes: batch, free of a, free of b, summed.
    a = jnp.transpose(a, (*a_batch, *a_free, *a_sum))
    b = jnp.transpose(b, (*b_batch, *b_free, *b_sum))
    lead, split = len(a_batch), len(a_batch) + len(a_free)
    a = jnp.expand_dims(a, range(split, split + len(b_free)))
    b = jnp.expand_dims(b, range(lead, split))
    return jnp.sum(a * b, axis=range(split + len(b_free), a.ndim))


def tiled_product(a: Array, b: Array, dimensions) -> Array:
    """`lax.dot_general` of matrices, some rows at a time."""
    (a_sum, b_sum), _ = dimensions
    a_free = [i for i in range(a.ndim) if i not in a_sum]
    b_free = [i for i in range(b.ndim) if i not in b_sum]
    shape = tuple(a.shape[i] for i in a_free) + tuple(b.shape[i] for i in b_free)
    a, b = jnp.transpose(a, (*a_free, *a_sum)), jnp.transpose(b, (*b_sum, *b_free))
    summed = math.prod(b.shape[: len(b_sum)])
    a, b = a.reshape(-1, summed), b.reshape(summed, -1)
    # So few rows that sums are no more operations than bytes.
    height = min(len(a), a.dtype.itemsize // 2)
    matrices = (((1,), (0,)), ((), ()))

    def step(i, out):
        first = jnp.minimum(i * height, len(a) - height)
        rows = lax.dynamic_slice_in_dim(a, first, height)
        parts = [slice(k, k + SUMMED) for k in range(0, summed, SUMMED)]
        products = [product(rows[:, k], b[k], matrices) for k in parts]
        return lax.dynamic_update_slice_in_dim(out, sum(products), first, 0)

    out = jnp.zeros((len(a), b.shape[1]), a.dtype)
    return lax.fori_loop(0, -(-len(a) // height), step, out).reshape(shape)
