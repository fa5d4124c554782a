import functools as ft

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float


# float32 products of some accelerators drop to 10 bits unless told otherwise.
matmul = ft.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

# Up to this size a Cholesky factorization is written out as scalar operations, which
# XLA fuses into the loop around it; a LAPACK call would cost more than the arithmetic.
UNROLLED = 7


def symmetrize(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The symmetric part, which is all that x' matrix x sees."""
    return 0.5 * (matrix + matrix.mT)


def solve_positive(
    matrix: Float[Array, "m m"], rhs: Float[Array, "m k"]
) -> tuple[Float[Array, "m k"], Bool[Array, ""]]:
    """Solves `matrix @ x = rhs` by Cholesky; also says whether `matrix` is positive.

    Where it is not, `x` means nothing.
    """
    m = matrix.shape[0]
    if m > UNROLLED:
        factor = jnp.linalg.cholesky(matrix)
        positive = jnp.all(jnp.diagonal(factor) > 0)
        return jsl.cho_solve((factor, True), rhs), positive
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
    return jnp.stack([x[i] for i in range(m)]), jnp.all(jnp.stack(pivots) > 0)
