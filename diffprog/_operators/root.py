"""The one equation behind all operators: sum_j q_j u(theta_j - tau) = 1.

With m the largest score and v = theta - tau = origin + w the unknown is sigma, the w of
the largest score: w_j = sigma + theta_j - m. Classes lie on the last axis; what has one
number per row keeps that axis with length 1. A score of -inf excludes its class.

Newton's method runs on f'(S / Q) = f'(1 / Q), where S(sigma) = sum_j q_j u(w_j) is the
mass and Q = sum_j q_j: exact in one step for KL and for equal scores. Where f''' <= 0
both sides are such that it falls to the root from above and never beyond.
"""

import functools as ft
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._common.loops import while_loop
from .divergence import AbstractDivergence, drift, has_numbers


Rows = Float[Array, "*batch classes"]
Row = Float[Array, "*batch 1"]

MAX_EVALUATIONS = 16  # 9 are the most that were ever seen where f''' <= 0
MAX_SAFEGUARDED = 128


def row_sum(rows: Array) -> Array:
    return jnp.sum(rows, -1, keepdims=True)


class Evaluation(NamedTuple):
    """How sums over the classes of a row are taken, and where the solver begins."""

    axis_name: str | None = None  # of a mesh over whose devices the classes are split
    sparse: bool = False  # few have any mass: it begins from the largest scores alone

    def sum(self, rows: Array) -> Array:
        total = row_sum(rows)
        return lax.psum(total, self.axis_name) if self.axis_name else total

    def max(self, rows: Array) -> Array:
        largest = jnp.max(rows, -1, keepdims=True)
        return lax.pmax(largest, self.axis_name) if self.axis_name else largest


class Problem(NamedTuple):
    """What a row is solved for. `m` is constant, and so is Q where q is."""

    scores: Rows  # -inf where a class is excluded
    q: Rows | Row  # the reference measure, 0 or any number where a class is excluded
    Q: Row  # its mass
    m: Row  # the largest score


def chunks(scores: Rows) -> tuple[Array, Array] | None:
    """The classes in chunks of equal length, and the rest; None for a few classes."""
    k = scores.shape[-1]
    if k < 64:
        return None
    root = math.isqrt(k)
    divisors = (n for n in range(root, root // 2, -1) if k % n == 0)
    length = 128 if k >= 4096 else next(divisors, root)
    whole = k // length * length
    head, tail = scores[..., :whole], scores[..., whole:]
    return head.reshape(*scores.shape[:-1], -1, length), tail


def tops(scores: Rows) -> Array:
    """The largest score of every chunk."""
    parts = chunks(scores)
    if parts is None:
        return scores
    head, tail = parts
    if tail.shape[-1] == 0:
        return jnp.max(head, -1)
    return jnp.concatenate([jnp.max(head, -1), jnp.max(tail, -1, keepdims=True)], -1)


def largest(scores: Rows, classes: Evaluation) -> Row:
    """The largest score of each row; 0 where all classes are excluded. Constant."""
    # The warm start needs the largest of every chunk too: one pass for both.
    m = classes.max(tops(lax.stop_gradient(scores)))
    return jnp.where(m == -jnp.inf, 0, m)


@jax.custom_jvp
def below(scores: Array, m: Array) -> Array:
    """scores - m for m >= scores, where an infinite m is the largest finite number."""
    finite = jnp.finfo(scores.dtype).max
    return jnp.minimum(scores, finite) - jnp.minimum(m, finite)


@jax.custom_jvp
def difference(a: Array, b: Array) -> Array:
    """a - b, and 0 where both are the same infinity."""
    return jnp.where(a == b, 0, a - b)


for _minus in (below, difference):
    _minus.defjvp(lambda ab, dab, minus=_minus: (minus(*ab), dab[0] - dab[1]))


@jax.custom_jvp
def weighted(y: Array, scores: Array) -> Array:
    """y scores, and 0 where y is 0 though the score may be infinite.

    An infinite derivative in y is 0: else no change of y would be NaN.
    """
    return jnp.where(y == 0, 0, y * scores)


@weighted.defjvp
def _(primals, tangents):
    (y, scores), (dy, dscores) = primals, tangents
    change = jnp.where(jnp.isinf(scores), 0, scores) * dy + y * dscores
    return weighted(y, scores), change


def same_for_all(q: Array) -> bool:
    """Whether q has one number per row, or one for all."""
    return q.ndim == 0 or q.shape[-1] == 1


# Differentiable pieces ------------------------------------------------------------


@jax.custom_jvp
def ratio(f: AbstractDivergence, w: Array) -> Array:
    """u with f'(u) = origin + w."""
    return f.pair(w)[0]


@ratio.defjvp
def _(primals, tangents):
    (f, w), (df, dw) = primals, tangents
    u = ratio(f, w)
    du = f.curvature(u) * dw
    if has_numbers(f):
        du = du + drift(f, df, u)
    return u, du


@jax.custom_jvp
def conjugate(f: AbstractDivergence, w: Array) -> Array:
    """f*(origin + w) + lift."""
    return f.conjugate(w)


@conjugate.defjvp
def _(primals, tangents):
    (f, w), (df, dw) = primals, tangents
    u = ratio(f, w)
    change = u * dw
    if has_numbers(f):
        _, dorigin = jax.jvp(lambda f: f.origin, (f,), (df,))
        change = change + u * dorigin - lowered_change(f, df, u)
    return conjugate(f, w), change


def lowered_change(f: AbstractDivergence, df: AbstractDivergence, u: Array) -> Array:
    """The change of f(u) - lift with the fields of f: 0 where both are f(0)."""
    return jax.jvp(lambda f: f.value(u) - f.lift, (f,), (df,))[1]


@jax.custom_jvp
def cost(f: AbstractDivergence, u: Array) -> Array:
    """f(u). Where f'(0) is infinite the derivative at u = 0 is 0."""
    return f.value(u)


@cost.defjvp
def _(primals, tangents):
    (f, u), (df, du) = primals, tangents
    finite = jnp.isfinite(f.link(u))
    slope = f.link(jnp.where(finite, u, 1)) + f.origin
    change = jnp.where(finite, slope, 0) * du
    if has_numbers(f):
        change = change + jax.jvp(lambda f: f.value(u), (f,), (df,))[1]
    return cost(f, u), change


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def root(classes: Evaluation, f: AbstractDivergence, problem: Problem) -> Row:
    """The sigma of every row."""
    sigma, _ = root_and_count(classes, f, problem)
    if f.convex_ratio is True:
        return sigma
    up = 2 * jnp.finfo(sigma.dtype).eps * jnp.abs(sigma)
    return sigma + jnp.where(f.convex_ratio, 0, up)  # S >= 1: see `settled`


@root.defjvp
def _(classes, primals, tangents):
    (f, problem), (df, d) = primals, tangents
    sigma = root(classes, f, problem)
    u = ratio(f, sigma + below(problem.scores, problem.m))
    weights = problem.q * f.curvature(u)
    change = weights * d.scores + u * d.q
    if has_numbers(f):
        change = change + problem.q * drift(f, df, u)
    W = classes.sum(weights)
    return sigma, -classes.sum(change) / jnp.where(W > 0, W, 1)


def settled(classes: Evaluation, f: AbstractDivergence, problem: Problem, sigma: Row):
    """q u(theta - tau), corrected where it may rise steeply at the edge of its support.

    There one class is right to eps^(1/(alpha-1)) only, and with it the mass S. From a
    sigma with S >= 1 what is too much is taken from all by their slopes, which is from
    that one: then it has what the others leave.
    """
    w = sigma + below(problem.scores, problem.m)
    p = problem.q * ratio(f, w)
    if f.convex_ratio is True:
        return p
    rough, slopes = (problem.q * a for a in f.pair(w))
    S, W = classes.sum(rough), classes.sum(slopes)
    better = jnp.maximum(rough - slopes * ((S - 1) / jnp.where(W > 0, W, 1)), 0)
    S = classes.sum(better)
    better = better / jnp.where(S > 0, S, 1)
    return p + lax.stop_gradient(jnp.where(W > 0, better - rough, 0))


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def height(classes: Evaluation, f: AbstractDivergence, problem: Problem) -> Row:
    """softmax_f - m + lift Q: tau - m + sum_j q_j (f*(theta_j - tau) + lift).

    The error of tau enters by its square only.
    """
    sigma = root(classes, f, problem)
    w = sigma + below(problem.scores, problem.m)
    terms = jnp.where(w > -jnp.inf, problem.q * conjugate(f, w), 0)
    return classes.sum(terms) - f.origin - sigma


@height.defjvp
def _(classes, primals, tangents):
    # By the envelope theorem tau stays. The m that was subtracted is a constant.
    (f, problem), (df, d) = primals, tangents
    sigma = root(classes, f, problem)
    w = sigma + below(problem.scores, problem.m)
    u, inside = ratio(f, w), w > -jnp.inf
    p = settled(classes, f, problem, sigma)
    change = p * d.scores + jnp.where(inside, conjugate(f, w) * d.q, 0)
    if has_numbers(f):
        lowered = jnp.where(inside, lowered_change(f, df, u), 0)
        change = change - problem.q * lowered
    return height(classes, f, problem), classes.sum(change)


# The solver -----------------------------------------------------------------------


def sums(classes: Evaluation, f: AbstractDivergence, w: Rows, q) -> tuple[Row, Row]:
    """S and dS/dsigma."""
    if f.both is not None:
        # Of two sums XLA would store the powers in between.
        q = jnp.expand_dims(q, -2) if jnp.ndim(q) else q
        both = classes.sum(q * f.both(w))
        return both[..., 0, :], both[..., 1, :]
    u, curvature = f.pair(w)
    return classes.sum(q * u), classes.sum(q * curvature)


def root_and_count(classes: Evaluation, f: AbstractDivergence, problem: Problem):
    """The sigma of every row, and how often the sums over its classes were taken."""
    scores, q, Q, m = problem
    y = below(scores, m)  # -inf .. 0
    if f.closed_root is not None:
        sigma = f.closed_root(classes.sum, q, y)
        count = jnp.ones((), jnp.int32)
    else:
        low, high = bracket(classes, f, problem)
        start = jnp.fmin(warm_start(classes, f, problem, high), high)
        start = start if f.convex_ratio is True else jnp.fmax(start, low)
        sigma, count = newton(classes, f, y, q, Q, (low, high), start)
    # Rows whose classes are all excluded have no root.
    return jnp.where(jnp.isinf(sigma) & (m == 0), 0, sigma), count


def bracket(classes: Evaluation, f: AbstractDivergence, problem: Problem):
    """A sigma where S <= 1, and one where S >= 1."""
    scores, q, Q, m = problem
    if same_for_all(q):
        high = f.link(1 / q)
    else:
        excluded = (q <= 0) | (scores == -jnp.inf)
        reach = below(scores, m) - f.link(1 / jnp.where(excluded, 1, q))
        high = -classes.max(jnp.where(excluded, -jnp.inf, reach))
    # Numbers that vary with the data, for `shard_map`.
    return f.link(1 / jnp.where(Q > 0, Q, 1)), high + 0 * Q


def newton(classes, f, y, q, Q, bounds, sigma) -> tuple[Row, Array]:
    """Newton's method from `sigma`, for all rows together.

    Once the mass is right to `close`, the next step makes it right to rounding. Where
    f''' <= 0 does not hold, S <= 1 and S >= 1 bound the root, and a step that leaves
    these bounds is replaced by their middle, as is every other one after eight.
    """
    safe, eps = f.convex_ratio is True, jnp.finfo(y.dtype).eps
    close = jnp.where(f.convex_ratio, 4 * jnp.sqrt(eps), 8 * eps)
    limit = MAX_EVALUATIONS if safe else MAX_SAFEGUARDED

    def unfinished(carry):
        i, _, _, done = carry
        return (i < limit) & ~jnp.all(done)

    def step(carry):
        i, sigma, bounds, _ = carry
        S, W = sums(classes, f, sigma + y, q)
        new = sigma - f.mean_step(S, Q) / W
        done = jnp.abs(S - 1) <= close
        if not safe:
            low, high = bounds
            low, high = jnp.where(S < 1, sigma, low), jnp.where(S < 1, high, sigma)
            middle = (low + high) / 2
            inside = (new > low) & (new < high) & ((i < 8) | (i % 2 == 0))
            new = jnp.where(inside | done | f.convex_ratio, new, middle)
            bounds = low, high
        done = done | (new == sigma)
        stuck = ~jnp.isfinite(new)
        return i + 1, jnp.where(stuck, sigma, new), bounds, done | stuck

    start = jnp.zeros((), jnp.int32), sigma, None if safe else bounds, jnp.isnan(sigma)
    count, sigma, _, _ = while_loop(unfinished, step, start)
    return sigma, count


def warm_start(classes, f, problem: Problem, high: Row) -> Row:
    """The root of a smaller problem, which is at least sigma where f''' <= 0.

    There every chunk is replaced by its largest score and by the mean of the others,
    with their weight (Jensen's inequality). Where few classes have any mass, the
    largest do.
    """
    scores, q, _, m = problem
    parts = chunks(scores)
    if parts is None or not same_for_all(q):
        return high
    top = below(tops(scores), m)
    if classes.sparse:
        few, weights = top, q
    else:
        head, _ = parts
        number, length = head.shape[-2:]
        others = jnp.sum(head, -1) - m * length - top[..., :number]
        means = jnp.where(jnp.isnan(others), -jnp.inf, others / (length - 1))
        few = jnp.concatenate([top, means], -1)
        counts = np.repeat([1.0, length - 1], [top.shape[-1], number])
        weights = q * jnp.broadcast_to(jnp.asarray(counts, q.dtype), few.shape)
    mass = classes.sum(jnp.where(few > -jnp.inf, weights, 0))
    low = f.link(1 / jnp.where(mass > 0, mass, 1))
    return newton(classes, f, few, weights, mass, (low, high), high)[0]
