"""Isotonic regression behind spectral risks: blocks of losses, and their offsets.

For losses l_1 <= ... <= l_n, z = l / nu and weights sigma_1 <= ... <= sigma_n the
problem is

    min over v_1 <= ... <= v_n of  sum_i sigma_i v_i + (1/n) f*(z_i - v_i).

Its solution is constant on blocks of neighbors, and the weights (1/n) u(z_i - v_i) of
a block B sum up to sigma(B). With m the largest loss of the block, y = (l - m) / nu and
z_i - v_i = origin + s + y_i, the offset s is the root of

    sum_{i in B} q u(s + y_i) = 1,   q = 1 / (n sigma(B)),

the equation of the f-softargmax. All arrays have length n; what has one number per
block repeats it on every member.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._common.loops import for_each, while_loop
from .._operators.bracket import bracketed_root
from .._operators.divergence import AbstractDivergence, drift, has_numbers
from .._operators.root import below, ratio


Vector = Float[Array, " n"]
Flags = Bool[Array, " n"]
Ids = Int[Array, " n"]


def numbers(first: Flags) -> Ids:
    """The number of the block of every member, from where blocks begin."""
    return jnp.cumsum(first.astype(jnp.int32)) - 1


def totals(values: Vector, ids: Ids) -> Vector:
    """The sum over the block of every member."""
    n = values.shape[0]
    sums = jax.ops.segment_sum(values, ids, n, indices_are_sorted=True)
    return sums[ids]


def maxima(values: Vector, ids: Ids) -> Vector:
    """The largest value in the block of every member."""
    n = values.shape[0]
    return jax.ops.segment_max(values, ids, n, indices_are_sorted=True)[ids]


def before(values: Vector) -> Vector:
    """The sum of all earlier values."""
    return jnp.concatenate([jnp.zeros_like(values[:1]), jnp.cumsum(values)[:-1]])


# The offsets of given blocks ------------------------------------------------------


@jax.custom_jvp
def offsets(f: AbstractDivergence, y: Vector, q: Vector, ids: Ids) -> Vector:
    """The s of every block with sum q u(s + y) = 1."""
    if f.closed_root is not None:
        return f.closed_root(lambda a: totals(a, ids), q, y)
    Q = totals(q, ids)

    def sums(s):
        u, curvature = f.pair(s + y)
        return totals(q * u, ids), totals(q * curvature, ids)

    # All members alike, or the largest alone.
    low, high = f.link(1 / Q), f.link(1 / q)
    return bracketed_root(sums, lambda S: f.mean_step(S, Q), low, high, high)


@offsets.defjvp
def _(primals, tangents):
    (f, y, q, ids), (df, dy, dq, _) = primals, tangents
    s = offsets(f, y, q, ids)
    u = ratio(f, s + y)
    weights = q * f.curvature(u)
    change = weights * dy + u * dq
    if has_numbers(f):
        change = change + q * drift(f, df, u)
    W = totals(weights, ids)
    return s, -totals(change, ids) / jnp.where(W > 0, W, 1)


def block_ratios(f, losses: Vector, sigma: Vector, nu, ids: Ids):
    """The ratios n q_i of given blocks, and nu v_i + nu origin. Differentiable."""
    m = lax.stop_gradient(maxima(losses, ids))
    y = below(losses, m) / nu
    q = 1 / (losses.shape[0] * totals(sigma, ids))
    s = offsets(f, y, q, ids)
    return ratio(f, s + y), m - nu * s


# The blocks -----------------------------------------------------------------------


def blocks(f: AbstractDivergence, losses: Vector, sigma: Vector, nu) -> Ids:
    """The block of every loss; losses and sigma grow. No block has sigma(B) = 0."""
    if f.closed_blocks is not None:
        first = pool(*f.closed_blocks(below(losses, losses[-1]) / nu, sigma))
    else:
        first = split_blocks(f, losses, sigma, nu)
    # Members whose sigma is 0 may join the first ones whose sigma is not: v stays.
    return numbers((first & (before(sigma) > 0)).at[0].set(True))


def pool(level, add, parts: tuple[Vector, Vector]) -> Flags:
    """Pool-adjacent-violators: where the blocks begin.

    A block is a pair (a, b) of level v(a, b); two in a row are one with `add` of their
    a and the sum of their b. Each of 2 n - 1 steps pushes a point on a stack of blocks,
    or merges the last two, where the level falls; points of one level stay apart.
    """
    a, b = parts
    n = a.shape[0]
    index = jnp.arange(n)

    def step(_, carry):
        i, top, starts, A, B = carry
        below = jnp.maximum(top - 1, 0)
        (a0, b0), (a1, b1) = (A[below], B[below]), (A[top], B[top])
        falls = (top > 0) & (level(a0, b0) > level(a1, b1))
        push = ~falls & (i < n)
        new = jnp.minimum(i, n - 1)
        choose = lambda merged, pushed, same: jnp.where(
            falls, merged, jnp.where(push, pushed, same)
        )
        place = choose(below, top + 1, top)
        A = A.at[place].set(choose(add(a0, a1), a[new], a1))
        B = B.at[place].set(choose(b0 + b1, b[new], b1))
        starts = starts.at[place].set(choose(starts[below], new, starts[top]))
        return jnp.where(push, i + 1, i), place, starts, A, B

    one = jnp.ones((), index.dtype)
    carry = one, one - 1, jnp.zeros_like(index), a, b
    _, top, starts, _, _ = for_each(2 * n - 1, step, carry)
    starts = jnp.where(index <= top, starts, n)
    return jnp.zeros(n, bool).at[starts].set(True, mode="drop")


def split_blocks(f: AbstractDivergence, losses: Vector, sigma: Vector, nu) -> Flags:
    """Where the blocks begin, from one block that is split until nothing is left.

    With the offset of a block, sigma less q summed up over its first k members must not
    be positive. It is split after the k where this is largest: no better solution has
    v_k and v_{k+1} in one block. All blocks are treated at once.
    """
    n, eps = losses.shape[0], jnp.finfo(losses.dtype).eps
    index = jnp.arange(n)
    may_begin = before(sigma) > 0

    def refine(carry):
        first, _ = carry
        ids = numbers(first)
        u, _ = block_ratios(f, losses, sigma, nu, ids)
        sums = before(sigma - u / n)
        # What was summed up before every member of a block that may begin one.
        start = lax.cummax(jnp.where(first, index, 0))
        excess = jnp.where(may_begin & ~first, sums - sums[start], -jnp.inf)
        noise = 8 * eps * (totals(sigma, ids) + jnp.max(jnp.abs(sums)))
        cut = excess >= jnp.maximum(maxima(excess, ids), 0) - noise
        return first | cut, jnp.any(cut)

    start = index == 0, jnp.asarray(n > 1)
    return while_loop(lambda carry: carry[1], refine, start)[0]
