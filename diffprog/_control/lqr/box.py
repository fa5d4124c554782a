"""The stage of a backward pass whose controls have limits."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._common.linalg import matmul, solve_positive
from ..._common.loops import while_loop
from ..._common.tree import where


ARMIJO = 0.1  # the part of the promised decrease that a step has to keep
MAX_STEPS = 40  # one or two are taken; shorter steps count as well


class _Point(NamedTuple):
    k: Float[Array, " m"]
    g: Float[Array, " m"]  # the gradient there
    held: Bool[Array, " m"]  # at a limit, and pushed against it


class _State(NamedTuple):
    point: _Point
    stepsize: Float[Array, ""]
    done: Bool[Array, ""]
    steps: Int[Array, ""]


def solve_in_box(
    G: Float[Array, "m m"],
    hH: Float[Array, "m k"],
    lower: Float[Array, " m"],
    upper: Float[Array, " m"],
    valid: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "m k"], Bool[Array, ""]]:
    """[k K] of u = k + K x: k minimizes k'Gk / 2 + h'k for lower <= k <= upper.

    The rows of K are those of the minimum over the controls that are free, and 0 at a
    limit. Also says whether G is positive definite; where it is not, k has negative
    curvature without limits, and K is 0.

    Projected Newton: a step to the minimum over the free controls, cut off at the
    limits and shortened until it descends. D. Bertsekas, "Projected Newton Methods for
    Optimization Problems with Simple Constraints", 1982; Y. Tassa, N. Mansard, E.
    Todorov, "Control-Limited Differential Dynamic Programming", 2014.
    """
    h, H, m = hH[:, 0], hH[:, 1:], len(G)
    clip = lambda k: jnp.clip(k, lower, upper)

    def at(k):
        g = matmul(G, k) + h
        pushes = ((k <= lower) & (g > 0)) | ((k >= upper) & (g < 0))
        return _Point(k, g, pushes | (lower == upper))

    def over_free(held, rhs):
        """The solution of G z = rhs in the free controls, with 0 for the others."""
        both = held[:, None] | held[None, :]
        rhs = jnp.where(held[:, None], 0, rhs)
        free = jnp.where(both, jnp.eye(m, dtype=G.dtype), G)
        return solve_positive(free, rhs)[0]

    def step(state: _State) -> _State:
        k, g, held = state.point
        whole = k + over_free(held, -g[:, None])[:, 0]
        new = at(clip(k + state.stepsize * (whole - k)))
        v = new.k - k
        descends = matmul(v, (g + new.g) / 2) <= ARMIJO * matmul(v, g)
        exact = descends & jnp.all(new.k == whole) & jnp.all(new.held == held)
        stepsize = jnp.where(descends, 1, state.stepsize / 2)
        point = where(descends, new, state.point)
        return _State(point, stepsize, exact, state.steps + 1)

    if m == 1:  # which is at its minimum where it is cut off
        gains, positive = solve_positive(G, -hH, valid)
        w = gains[:, 0]
        found = at(clip(w))
        K = jnp.where(found.held[:, None], 0, gains[:, 1:])
    else:
        without, positive = solve_positive(G, -hH[:, :1], valid)
        w = without[:, 0]
        first = at(clip(w))
        inside = jnp.all(first.k == w) | ~positive
        one, zero = jnp.ones_like(h[0]), inside.astype(jnp.int32) * 0
        start = _State(first, one, inside, zero)
        unfinished = lambda state: ~state.done & (state.steps < MAX_STEPS)
        found = while_loop(unfinished, step, start, (G, hH, lower, upper)).point
        K = over_free(found.held, -H)
    # A way down that is closed in one sense may be open in the other.
    k = jnp.where(positive | jnp.any(found.k != 0), found.k, clip(-w))
    return jnp.concatenate([k[:, None], jnp.where(positive, K, 0)], 1), positive
