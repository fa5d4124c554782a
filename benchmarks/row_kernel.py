"""An experiment: an f-softargmax whose rows are one GPU program each, in Pallas.

The path of the package reads the scores once for every sum over them. Here a program
loads its row once, keeps it in registers while Newton's method runs, and stores the
probabilities. For rows of float32 whose reference is one number, and generators of the
package with f''' <= 0 whose functions have a lowering to Triton.

A row is padded with -inf to a power of two, as Triton demands. At most 1024 threads
share the 65 536 registers of a multiprocessor: 64 for each, of which 32 hold the row
where it has `LIMIT` classes. A longer one would be spilled to memory.

A kernel is opaque to the partitioner of `jax.jit`: rows that it has split over devices
would be gathered first. Inside `shard_map(..., check_vma=False)` they are not. It has
not been measured: `benchmarks/gpu.py` compares it with the package.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from diffprog.losses import AbstractDivergence


LIMIT = 32_768
MAX_UPDATES = 24  # 15 or fewer brought all that could be solved to 4 sqrt(eps)
PER_THREAD = 16  # numbers, where there are threads enough
MAX_WARPS = 32


def descend(f: AbstractDivergence, y: Array, q: float, Q: Array) -> Array:
    """The sigma of one row with the scores y <= 0.

    From the top of the bracket, whose lower end only rounding could pass. One more
    sum is cheap here: the last step is taken from nearer than in the package.
    """
    close = math.sqrt(jnp.finfo(y.dtype).eps) / 4
    q = jnp.asarray(q, y.dtype)
    low = f.link(1 / jnp.where(Q > 0, Q, 1))

    def update(carry):
        i, sigma, _ = carry
        u, curvature = f.pair(sigma + y)
        S, W = q * jnp.sum(u), q * jnp.sum(curvature)
        step = f.mean_step(S, Q) / W
        stuck = ~(jnp.abs(step) < jnp.inf)
        new = jnp.where(stuck, sigma, jnp.maximum(sigma - step, low))
        return i + 1, new, (jnp.abs(S - 1) <= close) | (new == sigma)

    start = jnp.zeros((), jnp.int32), f.link(1 / q), jnp.zeros((), bool)
    unfinished = lambda carry: (carry[0] < MAX_UPDATES) & ~carry[2]
    return lax.while_loop(unfinished, update, start)[1]


def solve_row(f: AbstractDivergence, scores: Array, q: float) -> Array:
    """The probabilities of one row."""
    one, zero = jnp.ones_like(scores), jnp.zeros_like(scores)
    m = jnp.max(scores)
    m = jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)
    y = jnp.where(scores == m, zero, scores - m)
    # The largest of some numbers and NaN differs between devices.
    spoiled = jnp.sum(jnp.where(scores == scores, zero, one)) > 0
    count = jnp.sum(jnp.where(scores > -jnp.inf, one, zero))
    u, _ = f.pair(descend(f, y, q, q * count) + y)
    return jnp.where(spoiled, jnp.full_like(u, jnp.nan), q * u)


@ft.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def row_softargmax(
    scores: Float[Array, "*batch classes"],
    f: AbstractDivergence,
    q: float = 1.0,
    interpret: bool = False,
) -> Float[Array, "*batch classes"]:
    """The f-softargmax over the last axis: one read of the scores, and one write.

    q is the reference of every class. Where it is 1 `LeCam` and `Jeffreys` are those
    with `at_most_one=True`. `interpret` runs it slowly, on any device.
    """
    k = scores.shape[-1]
    padded = pl.next_power_of_2(k)

    def kernel(scores_ref, out_ref):
        row, column = pl.program_id(0), lax.iota(jnp.int32, padded)
        place, inside = (row, column), column < k
        theta = triton.load(scores_ref.at[place], mask=inside, other=-jnp.inf)
        triton.store(out_ref.at[place], solve_row(f, theta, q), mask=inside)

    rows = scores.reshape(-1, k)
    warps = min(max(padded // (32 * PER_THREAD), 1), MAX_WARPS)
    out = pl.pallas_call(
        kernel,
        grid=(rows.shape[0],),
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="f_softargmax",
    )(rows)
    return out.reshape(scores.shape)


@row_softargmax.defjvp
def _(f, q, interpret, primals, tangents):
    (scores,), (dscores,) = primals, tangents
    p = row_softargmax(scores, f, q, interpret)
    w = q * f.curvature(p / q)
    total = lambda a: jnp.sum(a, -1, keepdims=True)
    W = total(w)
    return p, w * (dscores - total(w * dscores) / jnp.where(W > 0, W, 1))
