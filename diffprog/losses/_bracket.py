"""A root of S(s) = 1 between bounds: Newton's method, and halving where it fails."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


MAX_EVALUATIONS = 128


def bracketed_root(
    sums: Callable[[Array], tuple[Array, Array]],
    step: Callable[[Array], Array],
    low: Array,
    high: Array,
    start: Array,
) -> Array:
    """The s of every entry with S(s) = 1, where S grows: S(low) <= 1 <= S(high).

    `sums(s)` is S and dS/ds. `step(S)` / (dS/ds) is the step, S - 1 for Newton's
    method. A step that leaves the bounds is replaced by their middle, as is every other
    one after eight. It ends where rounding is all that is left.
    """
    eps = jnp.finfo(low.dtype).eps

    def unfinished(carry):
        i, *_, done = carry
        return (i < MAX_EVALUATIONS) & ~jnp.all(done)

    def improve(carry):
        i, s, low, high, previous, done = carry
        S, slope = sums(s)
        error = jnp.abs(S - 1)
        low, high = jnp.where(S <= 1, s, low), jnp.where(S >= 1, s, high)
        middle = low + (high - low) / 2
        new = s - step(S) / slope
        inside = (new >= low) & (new <= high) & ((i < 8) | (i % 2 == 0))
        new = jnp.where(inside, new, middle)
        stalls = (error <= 64 * eps) & (error > previous / 2)
        narrow = (middle <= low) | (middle >= high)
        done = done | (error <= 4 * eps) | stalls | narrow | (new == s)
        return i + 1, jnp.where(done, s, new), low, high, error, done

    far = jnp.full_like(start, jnp.inf)
    begin = jnp.zeros((), jnp.int32), start, low, high, far, start != start
    return lax.while_loop(unfinished, improve, begin)[1]
