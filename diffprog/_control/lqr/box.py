"""The stage of a backward pass whose controls have limits."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._common.linalg import matmul, solve_positive
from ..._common.loops import while_loop
from ..._common.tree import where


ARMIJO = 0.1  # the part of the promised decrease that a step has to keep
MAX_STEPS = 40  # one or two are taken; shorter steps count as well


class _State(NamedTuple):
    k: Float[Array, " m"]
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
    h, m = hH[:, 0], len(G)
    clip = lambda k: jnp.clip(k, lower, upper)
    eye = jnp.eye(m, dtype=G.dtype)

    def held(k):
        """Which controls are at a limit that they push against."""
        g = matmul(G, k) + h
        pushes = ((k <= lower) & (g > 0)) | ((k >= upper) & (g < 0))
        return pushes | (lower == upper)

    def over_free(at_limit, rhs):
        """The solution of G z = rhs in the free controls, with 0 for the others."""
        both = at_limit[:, None] | at_limit[None, :]
        rhs = jnp.where(at_limit[:, None], 0, rhs)
        return solve_positive(jnp.where(both, eye, G), rhs)[0]

    def step(state: _State) -> _State:
        k, at_limit = state.k, held(state.k)
        g = matmul(G, k) + h
        whole = k + over_free(at_limit, -g[:, None])[:, 0]
        new = clip(k + state.stepsize * (whole - k))
        v = new - k
        descends = matmul(v, matmul(G, v)) / 2 <= (1 - ARMIJO) * -matmul(g, v)
        exact = descends & jnp.all(new == whole) & jnp.all(held(new) == at_limit)
        stepsize = jnp.where(descends, 1, state.stepsize / 2)
        return _State(where(descends, new, k), stepsize, exact, state.steps + 1)

    without, positive = solve_positive(G, -hH[:, :1], valid)
    w = without[:, 0]
    k = clip(w)
    if m > 1:  # one control is at its minimum
        inside = jnp.all(k == w) | ~positive
        start = _State(k, jnp.ones_like(h[0]), inside, inside.astype(jnp.int32) * 0)
        unfinished = lambda state: ~state.done & (state.steps < MAX_STEPS)
        k = while_loop(unfinished, step, start, (G, hH, lower, upper)).k
    at_limit = held(k)
    fixed = jnp.where(at_limit, k, 0)
    moving = jnp.concatenate([(h + matmul(G, fixed))[:, None], hH[:, 1:]], 1)
    gains = over_free(at_limit, -moving)
    gains = gains.at[:, 0].set(clip(fixed + gains[:, 0]))
    # A way down that is closed in one sense may be open in the other.
    down = jnp.where(jnp.any(k != 0), k, clip(-w))
    nowhere = jnp.zeros_like(gains[:, 1:])
    fallback = jnp.concatenate([down[:, None], nowhere], 1)
    return jnp.where(positive, gains, fallback), positive
