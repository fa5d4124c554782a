"""The stationary point of a network's quadratic model, layer by layer.

A direction needs a minimum of each stage; here a pivot may have any signs, and what the
pivots tell of the whole matrix, its determinant and inertia, is kept.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ..._chain.vector import VectorChain, VectorTrajectory
from ..._chain.vectorize import Vectorized
from ..._common.linalg import matmul, symmetrize
from ..._common.result import RESULTS
from ..._common.tree import all_finite, where
from ..._common.types import Rows, Stacks


class LayerwiseLQR(eqx.Module):
    r"""The stationary point of $g^\top d + \frac12 d^\top (C + \rho I) d$.

    - `step`: $d = -(C + \rho I)^{-1} g$, like the parameters.
    - `value`: $\frac12 g^\top d$, that of the model there: the least one, if no
        eigenvalue is negative.
    - `logabsdet`: $\ln |\det(C + \rho I)|$.
    - `num_negative`: how many eigenvalues of $C + \rho I$ are negative.
    - `pivots`: the eigenvalues of the pivot of every stage, in ascending order: a tuple
        with one array `(parameters,)` for each stage, or `(stages, parameters)` for
        equal ones, as in `net.params`. As many are negative as of $C + \rho I$, and
        their product is its determinant.
    - `result`: a [`diffprog.RESULTS`][] code: `successful` if all are positive, else
        `factorization_failed`; `nonfinite_rollout` or `nonfinite_derivative` where the
        model is not finite.

    Where a pivot is singular to rounding there is no single stationary point: step,
    value and determinant are NaN, and `num_negative` counts the pivots from the last
    stage to that one. They are NaN, too, where the model is not finite.
    """

    step: PyTree
    value: Float[Array, "*batch"]
    logabsdet: Float[Array, "*batch"]
    num_negative: Int[Array, "*batch"]
    pivots: tuple[Float[Array, "..."], ...]
    result: RESULTS


class Model(eqx.Module):
    """The blocks of `expand`, in the parameters or in some that stand for them.

    - `F`, `W`, `V`: of every stage and of the last state; W is symmetric.
    - `rows`: any of the size of the controls.
    - `step`: the parameters from the controls.
    - `fixed`: how many more parameters a stage has, with the damping alone.
    """

    F: Stacks
    W: Stacks
    V: Float[Array, "_ _"]
    rows: Rows
    step: Callable
    fixed: tuple[int, ...]


class Pivots(eqx.Module):
    """What a backward pass leaves behind, of every stage.

    - `gains`: [k K].
    - `lu`, `order`: the pivot, factored.
    - `values`, `logs`, `negative`: its eigenvalues, log |det|, and how many of them are
        negative.
    """

    gains: Stacks
    lu: Stacks
    order: tuple[Int[Array, "_ _"], ...]
    values: Rows
    logs: tuple[Float[Array, " _"], ...]
    negative: tuple[Int[Array, " _"], ...]


def pivoted(F: Array, W: Array, V: Array, m: int, damping: Array):
    """One stage of the backward pass, whatever its signs.

    The stationary point in u of (1, x, u)' (W + F' V F) (1, x, u) / 2 + damping u'u / 2
    is u = [k K] (1, x). Returns V before the stage, and a row of `Pivots`. Where the
    pivot S is singular to rounding [k K] is NaN.
    """
    Z = symmetrize(W + matmul(F.T, matmul(V, F)))
    u = Z.shape[0] - m
    H = Z[u:, :u]  # [h H]: h = r + B'p, H = B'PA + M'
    S = Z[u:, u:] + damping * jnp.eye(m, dtype=Z.dtype)  # R + B'PB + damping I
    values = jnp.linalg.eigvalsh(S)
    sizes = jnp.abs(values)
    rounding = 4 * m**0.5 * jnp.finfo(Z.dtype).eps * jnp.max(sizes)
    lu, order = jsl.lu_factor(S)
    singular = jnp.min(sizes) <= rounding
    gains = jnp.where(singular, jnp.nan, jsl.lu_solve((lu, order), -H))
    V = symmetrize(Z[:u, :u] + matmul(H.T, gains))
    log = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(lu))))
    negative = jnp.sum(values < -rounding, dtype=jnp.int32)
    return V, (gains, lu, order, values, log, negative)


def backward(chain: VectorChain, model: Model, damping: Array) -> Pivots:
    """The pivots from the last stage to the first."""
    stage = lambda _, V, u, F, W: pivoted(F, W, V, len(u), damping)
    data = model.rows, model.F, model.W
    _, rows = chain.scan(stage, symmetrize(model.V), *data, reverse=True)
    gains, lu, order, values, logs, negative = zip(*rows, strict=True)
    return Pivots(gains, lu, order, values, logs, negative)


def controls(chain: VectorChain, model: Model, pivots: Pivots, ks: Rows) -> Rows:
    """v = k + K y along y' = A y + B v from y = 0."""

    def stage(_, y, k, gains, F):
        v = k + matmul(gains[:, 1:], y)
        return matmul(F[1:, 1:], jnp.concatenate([y, v])), v

    y = jnp.zeros_like(pivots.gains[0][0, 0, 1:])
    return chain.scan(stage, y, ks, pivots.gains, model.F)[1]


def value_and_gradient(chain: VectorChain, model: Model, vs: Rows, damping: Array):
    """Those of the model, g'v + v'(C + damping I)v / 2, in the controls."""

    def forward(_, z, v, F, W):
        z = jnp.concatenate([z, v])
        Wz = matmul(W, z)
        return matmul(F, z), (Wz, matmul(z, Wz) + damping * matmul(v, v))

    def adjoint(_, lam, v, F, rows):
        # (lam, gradient) = W (1, y, v) + F' lam', without the constant.
        new, r = jnp.split(rows[0] + matmul(F.T, lam), [len(F.T) - len(v)])
        return new.at[0].set(0), r + damping * v

    first = model.F[0].shape[2] - vs[0].shape[1]
    start = jnp.zeros_like(model.V, shape=first).at[0].set(1)
    last, rows = chain.scan(forward, start, vs, model.F, model.W)
    lam = matmul(model.V, last)
    total = matmul(last, lam) + sum(jnp.sum(costs) for _, costs in rows)
    lam = lam.at[0].set(0)
    rs = chain.scan(adjoint, lam, vs, model.F, rows, reverse=True)[1]
    return total / 2, rs


def correction(chain: VectorChain, model: Model, pivots: Pivots, rs: Rows) -> Rows:
    """The controls -(C + damping I)^-1 r, by pivots that are known."""

    def stage(_, lam, r, gains, lu, order, F):
        A, B = jnp.split(F[1:, 1:], [gains.shape[1] - 1], 1)
        b = r + matmul(B.T, lam)
        K = gains[:, 1:]
        return matmul(A.T, lam) + matmul(K.T, b), -jsl.lu_solve((lu, order), b)

    data = rs, pivots.gains, pivots.lu, pivots.order, model.F
    _, ks = chain.scan(stage, jnp.zeros_like(model.V[0, 1:]), *data, reverse=True)
    return controls(chain, model, pivots, ks)


def stationary(
    at: Vectorized, trajectory: VectorTrajectory, model: Model, damping: Array
) -> LayerwiseLQR:
    """The stationary point of a model, and what its pivots tell."""
    chain, pivots = at.chain, backward(at.chain, model, damping)
    ks = tuple(gains[:, :, 0] for gains in pivots.gains)
    vs = controls(chain, model, pivots, ks)
    # Between the blocks there is no pivoting, so that digits are lost: here they are
    # found again. The value has lost none: it is stationary.
    value, rs = value_and_gradient(chain, model, vs, damping)
    vs = jtu.tree_map(jnp.add, vs, correction(chain, model, pivots, rs))
    logabsdet, spectra = sum(map(jnp.sum, pivots.logs)), []
    for values, fixed in zip(pivots.values, model.fixed, strict=True):
        rest = jnp.full((len(values), fixed), damping)
        logabsdet = logabsdet + jnp.sum(jnp.log(rest))
        spectra.append(jnp.sort(jnp.concatenate([values, rest], 1)))
    num_negative: Any = sum(map(jnp.sum, pivots.negative))
    num_negative = num_negative.astype(jnp.int32)
    numbers = model.step(vs), value, logabsdet
    usable, known = all_finite(numbers), all_finite(model.F, model.W, model.V)
    ran = trajectory.first_nonfinite > chain.horizon
    failed, unknown = RESULTS.factorization_failed, RESULTS.nonfinite_derivative
    ok = usable & (num_negative == 0)
    result = RESULTS.where(ok, RESULTS.successful, failed)
    result = RESULTS.where(known, result, unknown)
    result = RESULTS.where(ran, result, RESULTS.nonfinite_rollout)
    nan = jtu.tree_map(lambda a: jnp.full_like(a, jnp.nan), numbers)
    step, value, logabsdet = where(usable & known & ran, numbers, nan)
    spectra: Any = at.problem.join_controls(tuple(spectra))
    return LayerwiseLQR(step, value, logabsdet, num_negative, spectra, result)
