"""A root of S(s) = 1 between bounds: Newton's method, and halving where it fails."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from .._common.loops import while_loop


MAX_BRACKETED = 128
WIDE = 2.0**10


def bracketed_root(
    sums: Callable[[Array], tuple[Array, Array]],
    step: Callable[[Array], Array],
    low: Array,
    high: Array,
    start: Array,
) -> Array:
    """The s of every entry with S(s) = 1, where S grows: S(low) <= 1 <= S(high).

    `sums(s)` is S and dS/ds. `step(S)` / (dS/ds) is the step, S - 1 for Newton's
    method. A step that leaves the bounds is replaced by what is between them, as is
    every other one after eight. It ends where rounding is all that is left.
    """
    eps = jnp.finfo(low.dtype).eps

    def unfinished(carry):
        i, *_, done = carry
        return (i < MAX_BRACKETED) & ~jnp.all(done)

    def improve(carry):
        i, s, low, high, previous, done = carry
        S, slope = sums(s)
        error = jnp.abs(S - 1)
        low, high = jnp.where(S <= 1, s, low), jnp.where(S >= 1, s, high)
        middle = between(low, high)
        new = s - step(S) / slope
        inside = (new >= low) & (new <= high) & ((i < 8) | (i % 2 == 0))
        new = jnp.where(inside, new, middle)
        stalls = (error <= 64 * eps) & (error > previous / 2)
        narrow = (middle <= low) | (middle >= high)
        done = done | (error <= 4 * eps) | stalls | narrow | (new == s)
        return i + 1, jnp.where(done, s, new), low, high, error, done

    far = jnp.full_like(start, jnp.inf)
    begin = jnp.zeros((), jnp.int32), start, low, high, far, jnp.isnan(start)
    return while_loop(unfinished, improve, begin)[1]


def between(low: Array, high: Array) -> Array:
    """The middle; where one bound is larger by orders of magnitude, that of these."""
    a, b = jnp.maximum(low, 1), jnp.maximum(-high, 1)
    middle = low + (high - low) / 2
    above = jnp.where(high > 0, high, 1)
    below = jnp.where(low < 0, -low, 1)
    up, down = high > WIDE * jnp.maximum(-low, a), -low > WIDE * jnp.maximum(high, b)
    middle = jnp.where(up, jnp.sqrt(a) * jnp.sqrt(above), middle)
    return jnp.where(down, -jnp.sqrt(b) * jnp.sqrt(below), middle)
