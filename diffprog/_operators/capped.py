"""The f-softargmax with a largest probability: superquantiles without sorting."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from .._common.loops import while_loop
from .._common.types import check_number, is_known
from .bracket import bracketed_root
from .call import Axis, Call, check, Divergence, operator, per_row, Reference
from .divergence import AbstractDivergence, drift, has_numbers
from .root import below, ratio, row_sum


FAR = 64  # scores further apart lose digits to each other


@jax.custom_jvp
def offset(f: AbstractDivergence, scores: Array, q: Array, cap: Array):
    """The s and m of every row with sum_j min(q_j u(s + theta_j - m), cap) = 1.

    A score is -inf where a class is excluded. Where all are at the cap s can be
    anything above. m is constant: the largest score, or, where some are at the cap and
    far above all others, the largest of these, whose digits it would swallow.
    """
    present, eps = scores != -jnp.inf, jnp.finfo(scores.dtype).eps
    top = f.link(cap / jnp.where(present, q, 1)) + 0 * row_sum(cap)
    left = lambda bound: 1 - cap * row_sum((scores > bound).astype(scores.dtype))
    most = lambda a: jnp.max(a, -1, keepdims=True)

    def improve(carry):
        old, new, *_ = carry
        # What is above the bound is at the cap. Something is left for the others.
        accepted = left(new) > 100 * eps
        bound = jnp.where(accepted, new, old)
        others = jnp.where(scores > bound, -jnp.inf, scores)
        m = most(others)
        m = jnp.where(m == -jnp.inf, 0, m)
        y = below(others, m)
        s = below_cap(f, y, q, cap, top, left(bound))
        next = most(jnp.where(s + y < top, others, -jnp.inf))
        far = accepted & (next > -jnp.inf) & (next < m - FAR)
        return bound, jnp.where(far, next + FAR, new), s, m, jnp.any(far)

    none = jnp.full_like(cap, jnp.inf) + 0 * top[..., :1]
    zero = jnp.zeros_like(none)
    start = none, none, zero, zero, jnp.any(cap > 0)
    return while_loop(lambda carry: carry[-1], improve, start)[2:4]


def below_cap(f, y, q, cap, top, mass) -> Array:
    """The s with sum_j min(q_j u(s + y_j), cap) = mass, for y <= 0."""
    present = y != -jnp.inf
    Q = row_sum(jnp.where(present, q, 0)) / mass

    def sums(s):
        free = s + y < top
        u, curvature = f.pair(jnp.where(free, s + y, top))
        S = row_sum(jnp.where(present, jnp.where(free, q * u, cap), 0)) / mass
        return S, row_sum(jnp.where(present & free, q * curvature, 0)) / mass

    # All classes alike and no cap, or all at the cap.
    low = f.link(1 / jnp.where(Q > 0, Q, 1))
    high = jnp.max(jnp.where(present, top - y, low), -1, keepdims=True)
    return bracketed_root(sums, lambda S: f.mean_step(S, Q), low, high, low)


@offset.defjvp
def _(primals, tangents):
    (f, scores, q, cap), (df, dscores, dq, dcap) = primals, tangents
    s, m = offset(f, scores, q, cap)
    u, free, present = _ratios(f, s, below(scores, m), q, cap)
    capped, free = present & ~free, present & free
    weights = jnp.where(free, q * f.curvature(u), 0)
    change = weights * dscores + jnp.where(free, u * dq, 0)
    change = change + jnp.where(capped, dcap, 0)
    if has_numbers(f):
        change = change + jnp.where(free, q * drift(f, df, u), 0)
    W = row_sum(weights)
    return (s, m), (-row_sum(change) / jnp.where(W > 0, W, 1), jnp.zeros_like(m))


def _ratios(f, s, y, q, cap):
    """u, which classes are below the cap, and which are not excluded."""
    present = y != -jnp.inf
    top = lax.stop_gradient(f.link(cap / jnp.where(present, q, 1)))
    free = ~(s + y >= top)  # NaN is not at the cap
    return ratio(f, jnp.where(free & present, s + y, top)), free, present


@operator
def capped_f_softargmax(
    scores: Float[Array, "..."],
    f: Divergence,
    reference: Reference = None,
    *,
    cap: int | float | Float[Array, "..."],
    axis: Axis = -1,
    where=None,
    temperature=1.0,
) -> Float[Array, "..."]:
    r"""The f-softargmax whose probabilities are at most `cap`.

    $$\operatorname{argmax}_{p \in \Delta,\ p \le c} \langle p, \theta \rangle
    - \beta D_f(p, q), \quad p_j = \min(q_j\, (f^*)'(\theta_j / \beta - \tau),\ c).$$

    With `"uniform"` and $c = 1 / (n (1 - q_0))$ these are the smoothed weights of the
    superquantile at $q_0$ of n losses, with $\beta = \nu$, and no sort:
    [`diffprog.losses.spectral_weights`][] gives the same.

    **Arguments:**

    - `scores`, `f`, `reference`, `axis`, `where`, `temperature`: those of
        [`diffprog.losses.f_softargmax`][].
    - `cap`: c, a number or one per row, with c k >= 1 for k classes that are not
        excluded. Where that fails all are at the cap, and their sum is below 1.

    **Returns:** p, with the shape and dtype of `scores`. Differentiable in `scores`,
    `reference`, `cap`, `temperature` and a traced alpha.

    **Raises:** `ValueError` if c k < 1, where that is known; otherwise as
    [`diffprog.losses.f_softargmax`][].

    Takes about ten passes over the scores, and two numbers of memory per row.
    """
    call = check(scores, f, reference, axis, where, temperature, None)
    if not isinstance(cap, list):
        check_number("cap", cap, "a number > 0")
    cap = per_row("cap", cap, call.scores.shape, call.axes)
    _check_cap(cap, call.classes)
    return _capped(call, cap)


@jax.jit
def _capped(call: Call, cap: Array) -> Array:
    s = call.set_up()
    scores = s.problem.scores
    q = jnp.broadcast_to(s.problem.q, scores.shape)
    cap = jnp.broadcast_to(cap.astype(scores.dtype), (*scores.shape[:-1], 1))
    shift, m = offset(s.f, scores, q, cap)
    u, free, present = _ratios(s.f, shift, below(scores, m), q, cap)
    p = jnp.where(present, jnp.where(free, q * u, cap), 0)
    return call.rows(jnp.where(cap > 0, p, jnp.nan))


def _check_cap(cap: Array, k: int):
    if is_known(cap):
        least = float(np.min(np.asarray(cap)))
        if not least * k >= 1 - 1e-6:
            raise ValueError(
                f"`cap` is {least:g}; for {k} classes at least 1 / {k} is expected, or "
                "the probabilities cannot sum up to 1."
            )
