import functools as ft

import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax import lax
from jaxtyping import Array, Bool, Float


# float32 products of some accelerators drop to 10 bits unless told otherwise.
matmul = ft.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

# Up to this size a Cholesky factorization is written out as scalar operations, which
# XLA fuses into the loop around it; a LAPACK call would cost more than the arithmetic.
UNROLLED = 4


def symmetrize(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return 0.5 * (matrix + matrix.T)


def solve_positive(
    matrix: Float[Array, "m m"], rhs: Float[Array, "m k"]
) -> tuple[Float[Array, "m k"], Bool[Array, ""]]:
    """Solves `matrix @ x = rhs` by Cholesky; also says whether `matrix` is positive.

    Where it is not, `x` is NaN or infinite.
    """
    m = matrix.shape[0]
    if m > UNROLLED:
        factor = jnp.linalg.cholesky(matrix)
        positive = jnp.all(jnp.diagonal(factor) > 0)
        return jsl.cho_solve((factor, True), rhs), positive
    # matrix = L L', row by row; then L y = rhs and L' x = y.
    L, y, x = {}, {}, {}
    for i in range(m):
        for j in range(i + 1):
            entry = matrix[i, j] - sum(L[i, k] * L[j, k] for k in range(j))
            L[i, j] = jnp.sqrt(entry) if i == j else entry / L[j, j]
    for i in range(m):
        y[i] = (rhs[i] - sum(L[i, k] * y[k] for k in range(i))) / L[i, i]
    for i in reversed(range(m)):
        x[i] = (y[i] - sum(L[k, i] * x[k] for k in range(i + 1, m))) / L[i, i]
    positive = jnp.all(jnp.stack([L[i, i] for i in range(m)]) > 0)
    return jnp.stack([x[i] for i in range(m)]), positive
