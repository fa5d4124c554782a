"""A row of the solver as one GPU program, in Pallas. Off unless `MODE` says otherwise.

The other path reads the scores once for every sum over them. Here a program loads its
row once, keeps it in registers while Newton's method runs, and stores sigma or the
probabilities. It applies to rows that lie whole on one device, in float32, with a
reference of one number per row and a generator of `FAMILIES` with f''' <= 0.

A row is padded with -inf to a power of two, as Triton demands. At most 1024 threads
share the 65 536 registers of a multiprocessor: 64 for each, of which 32 hold the row
where it has `LIMIT` classes. A longer one would be spilled to memory.

A kernel is opaque to the partitioner of `jax.jit`: rows that it has split over devices
would be gathered first. Inside `shard_map(..., check_vma=False)` they are not. That
and missing measurements are why it is off: `benchmarks/gpu.py` compares both paths.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._alpha import Power
from ._divergence import (
    AbstractDivergence,
    ChiSquare,
    Jeffreys,
    JensenShannon,
    KL,
    LeCam,
    Neyman,
    ReverseKL,
    SquaredHellinger,
)


Mode = Literal["auto", "interpret", "off"]

MODE: Mode = "off"  # "auto": on CUDA; "interpret": everywhere, slowly, for tests
LIMIT = 32_768
MAX_UPDATES = 24  # 15 or fewer brought all that could be solved to 4 sqrt(eps)
PER_THREAD = 16  # numbers, where there are threads enough
MAX_WARPS = 32

# Those whose functions have a lowering to Triton: all with f''' <= 0.
FAMILIES = (
    ChiSquare,
    Jeffreys,
    JensenShannon,
    KL,
    LeCam,
    Neyman,
    Power,
    ReverseKL,
    SquaredHellinger,
)


def mode() -> Mode:
    """What calls use from now on."""
    return MODE


def applies(mode: Mode, f: AbstractDivergence, scores: Array, q: Array) -> bool:
    """Whether rows of these shapes and types are for the kernel."""
    if mode == "off" or not isinstance(f, FAMILIES) or f.convex_ratio is not True:
        return False
    known = scores.dtype == q.dtype == jnp.float32 and on_one_device(scores)
    return (
        known
        and (q.ndim == 0 or q.shape[-1] == 1)
        and scores.shape[-1] <= LIMIT
        and scores.size > 0
    )


def on_one_device(a: Array) -> bool:
    """Whether `a` is not split over devices, as far as its type says."""
    kind: Any = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # the name in newer versions
    varying = kind.vma if manual is None else manual.varying
    return not varying and all(axis is None for axis in kind.sharding.spec)


def choose(mode: Mode, kernel: Callable, default: Callable, *arrays: Array) -> Array:
    """`kernel` where there is CUDA, `default` elsewhere."""
    if mode == "interpret":
        return kernel(*arrays, interpret=True)
    return lax.platform_dependent(*arrays, cuda=kernel, default=default)


def descend(f: AbstractDivergence, y: Array, q: Array, Q: Array) -> tuple[Array, Array]:
    """The sigma of one row with the scores y <= 0, and the number of updates.

    From the top of the bracket, whose lower end only rounding could pass. One more
    sum is cheap here: the last step is taken from nearer than on the other path.
    """
    close = math.sqrt(jnp.finfo(y.dtype).eps) / 4
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
    i, sigma, _ = lax.while_loop(unfinished, update, start)
    return sigma, i


def solve_row(f: AbstractDivergence, scores: Array, q: Array) -> tuple[Array, Array]:
    """The sigma of one row, and theta - m."""
    one, zero = jnp.ones_like(scores), jnp.zeros_like(scores)
    m = jnp.max(scores)
    m = jnp.where(m == -jnp.inf, jnp.zeros_like(m), m)
    y = jnp.where(scores == m, zero, scores - m)
    # The largest of some numbers and NaN differs between devices.
    spoiled = jnp.sum(jnp.where(scores == scores, zero, one)) > 0
    count = jnp.sum(jnp.where(scores > -jnp.inf, one, zero))
    sigma, _ = descend(f, y, q, q * count)
    return jnp.where(spoiled, jnp.full_like(sigma, jnp.nan), sigma), y


def sigmas(
    f: AbstractDivergence, scores: Array, q: Array, interpret: bool = False
) -> Float[Array, "*batch 1"]:
    """The sigma of every row."""
    return _run(f, False, scores, q, interpret)


def shares(
    f: AbstractDivergence, scores: Array, q: Array, interpret: bool = False
) -> Float[Array, "*batch classes"]:
    """The probabilities: one read of the scores, and one write."""
    return _run(f, True, scores, q, interpret)


def _run(f, whole: bool, scores: Array, q: Array, interpret: bool) -> Array:
    # Here, because they are experimental and few calls need them.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    k = scores.shape[-1]
    padded = pl.next_power_of_2(k)

    def kernel(scores_ref, q_ref, out_ref):
        row, column = pl.program_id(0), lax.iota(jnp.int32, padded)
        place, inside = (row, column), column < k
        theta = triton.load(scores_ref.at[place], mask=inside, other=-jnp.inf)
        sigma, y = solve_row(f, theta, q_ref[row])
        if whole:
            u, _ = f.pair(sigma + y)
            p = jnp.where(sigma == sigma, q_ref[row] * u, jnp.full_like(u, jnp.nan))
            triton.store(out_ref.at[place], p, mask=inside)
        else:
            out_ref[row] = sigma

    rows = scores.reshape(-1, k)
    number = rows.shape[0]
    per_row = jnp.broadcast_to(q, (*scores.shape[:-1], 1)).reshape(number)
    warps = min(max(padded // (32 * PER_THREAD), 1), MAX_WARPS)
    out = pl.pallas_call(
        kernel,
        grid=(number,),
        out_shape=jax.ShapeDtypeStruct(rows.shape if whole else (number,), rows.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="f_softargmax" if whole else "f_softargmax_tau",
    )(rows, per_row)
    return out.reshape(*scores.shape[:-1], k if whole else 1)
