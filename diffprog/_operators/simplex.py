r"""The proximal operator of an f-divergence on the simplex.

$$\operatorname{argmin}_{p \in \Delta} \tau D_f(p, q) + \tfrac12 \|p - x\|^2.$$

With ratios u = p / q it has, for every class, tau f'(u_j) + q_j u_j = x_j - nu: the
equation of the f-softargmax for the generators tau f(u) + q_j u^2 / 2, which share the
number nu. In p itself both ends of tau are benign: the projection on the simplex, and
the f-softargmax of x / tau. An iteration in scores would lose all digits at the first,
where scores are x / tau.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._common.loops import while_loop
from .bracket import bracketed_root
from .divergence import AbstractDivergence
from .root import below


MAX_STEPS = 100


@jax.jit
def proximal(
    f: AbstractDivergence,
    q: Float[Array, "*batch classes"],
    present: Array,
    x: Float[Array, "*batch classes"],
    tau: Array,
) -> Float[Array, "*batch classes"]:
    """The minimizer of every row; `present` is false where a class is excluded.

    So are classes with x = -inf, and all others where x is infinite.
    tau has one number per row, and an axis of length 1 for the classes.
    """
    total = lambda a: jnp.sum(jnp.where(present, a, 0), -1, keepdims=True)
    m = jnp.max(jnp.where(present, x, -jnp.inf), -1, keepdims=True)
    y = below(x, m)
    present = present & (y != -jnp.inf)
    q, y = jnp.where(present, q, 1), jnp.where(present, y, 0)
    tau = jnp.broadcast_to(tau, m.shape)
    Q = total(q)
    Q = jnp.where(Q > 0, Q, 1)
    typical = total(q * q) / Q

    def shares(sigma):
        p, slope = one_class(f, q, sigma + y, tau)
        return jnp.where(present, p, 0), slope

    def sums(sigma):
        p, slope = shares(sigma)
        return total(p), total(slope)

    def step(S):
        # As for f alone where tau is large, Newton's where it is small.
        curvature = typical * f.curvature(S / Q)
        return (tau * f.mean_step(S, Q) + (S - 1) * curvature) / (tau + curvature)

    least = lambda a: jnp.min(jnp.where(present, a, jnp.inf), -1, keepdims=True)
    finite = lambda a: jnp.where(jnp.isfinite(a), a, 0)
    # No ratio is above 1 / Q, or one class has all.
    low = finite(tau * f.link(1 / Q) + least(q / Q - y))
    high = finite(least(tau * f.link(1 / q) + 1 - y))
    p, _ = shares(bracketed_root(sums, step, low, high, high))
    S = total(p)
    return p / jnp.where(S > 0, S, 1)


def one_class(f: AbstractDivergence, q: Array, s: Array, tau: Array):
    """p = q u with tau w + q u = s, where w = f'(u) - origin; and dp/ds. For p <= 1."""
    if f.closed_share is not None:
        return f.closed_share(q, s, tau)
    u = one_ratio(f, q, s, tau)
    curvature = q * f.curvature(u)
    return q * u, curvature / (tau + curvature)


def one_ratio(f: AbstractDivergence, q: Array, s: Array, tau: Array) -> Array:
    """The u <= 1 / q with tau w + q u = s, where w = f'(u) - origin.

    Newton's method, in u where q u has the larger slope, else in w. Where f''' <= 0 the
    first is never above the root and the second never below.
    """
    shape = jnp.broadcast_shapes(q.shape, s.shape, tau.shape)
    q, s, tau = (jnp.broadcast_to(a, shape) for a in (q, s, tau))
    eps = jnp.finfo(s.dtype).eps
    top = f.link(1 / q)
    low = jnp.clip((s - tau * top) / q, 0, 1 / q)
    high = jnp.minimum(f.pair(jnp.minimum(s / tau, top))[0], 1 / q)
    low = jnp.minimum(low, high)

    def unfinished(carry):
        i, *_, done = carry
        return (i < MAX_STEPS) & ~jnp.all(done)

    def improve(carry):
        i, u, low, high, done = carry
        w, curvature = f.link(u), f.curvature(u)
        error, slope = tau * w + q * u - s, tau + q * curvature
        low, high = jnp.where(error <= 0, u, low), jnp.where(error >= 0, u, high)
        by_u = u - error * curvature / slope
        by_w, _ = f.pair(jnp.minimum(w - error / slope, top))
        inside = lambda a: (a >= low) & (a <= high) & (a > 0)
        first = q * curvature > tau
        a, b = jnp.where(first, by_u, by_w), jnp.where(first, by_w, by_u)
        new = jnp.where(inside(b), b, low + (high - low) / 2)
        new = jnp.where(inside(a), a, new)
        done = done | (jnp.abs(new - u) <= 4 * eps * u)
        return i + 1, jnp.where(done & (new <= 0), u, new), low, high, done

    zero = high == 0
    start = jnp.where(low > 0, low, high)
    start = jnp.where(zero, 1 / q, start)
    begin = jnp.zeros((), jnp.int32), start, low, high, zero
    u = while_loop(unfinished, improve, begin)[1]
    return jnp.where(zero, 0, u)
