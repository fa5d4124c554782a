"""The f-softargmax with a largest probability: superquantiles without sorting."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._alpha import TracedAlpha
from ._bracket import bracketed_root
from ._call import Call, check, Divergence, is_known, operator, per_row, Reference
from ._divergence import AbstractDivergence
from ._root import ratio


def total(rows: Array) -> Array:
    return jnp.sum(rows, -1, keepdims=True)


@jax.custom_jvp
def offset(f: AbstractDivergence, y: Array, q: Array, cap: Array) -> Array:
    """The s of every row with sum_j min(q_j u(s + y_j), cap) = 1.

    y is -inf where a class is excluded. Where all are at the cap s can be anything
    above.
    """
    present = y > -jnp.inf
    top = f.link(cap / jnp.where(present, q, 1)) + 0 * total(cap)
    Q = total(jnp.where(present, q, 0))

    def sums(s):
        below = s + y < top
        u, curvature = f.pair(jnp.where(below, s + y, top))
        S = total(jnp.where(present, jnp.where(below, q * u, cap), 0))
        return S, total(jnp.where(present & below, q * curvature, 0))

    # All classes alike and no cap, or all at the cap.
    low = f.link(1 / jnp.where(Q > 0, Q, 1))
    high = jnp.max(jnp.where(present, top - y, low), -1, keepdims=True)
    return bracketed_root(sums, lambda S: f.mean_step(S, Q), low, high, low)


@offset.defjvp
def _(primals, tangents):
    (f, y, q, cap), (df, dy, dq, dcap) = primals, tangents
    s = offset(f, y, q, cap)
    u, below, present = _ratios(f, s, y, q, cap)
    free = below & present
    weights = jnp.where(free, q * f.curvature(u), 0)
    change = weights * dy + jnp.where(free, u * dq, 0)
    change = change + jnp.where(below, 0, dcap)
    if isinstance(f, TracedAlpha):
        change = change + jnp.where(free, q * f.drift(u) * df.alpha, 0)
    W = total(weights)
    return s, -total(change) / jnp.where(W > 0, W, 1)


def _ratios(f, s, y, q, cap):
    """u, which classes are below the cap, and which are not excluded."""
    present = y > -jnp.inf
    top = jax.lax.stop_gradient(f.link(cap / jnp.where(present, q, 1)))
    below = s + y < top
    return ratio(f, jnp.where(below & present, s + y, top)), below, present


@operator
def capped_f_softargmax(
    scores: Float[Array, "..."],
    f: Divergence,
    reference: Reference = None,
    *,
    cap: int | float | Float[Array, "..."],
    axis: int = -1,
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
    cap = per_row("cap", cap, call.scores.shape, axis)
    _check_cap(cap, call.scores.shape[axis])
    return _capped(call, cap)


@jax.jit
def _capped(call: Call, cap: Array) -> Array:
    s = call.set_up()
    cap = cap.astype(s.problem.scores.dtype)
    y, q = s.problem.scores - s.problem.m, s.problem.q
    q = jnp.broadcast_to(q, y.shape)
    cap = jnp.broadcast_to(cap, (*y.shape[:-1], 1))
    u, below, present = _ratios(s.f, offset(s.f, y, q, cap), y, q, cap)
    return call.rows(jnp.where(present, jnp.where(below, q * u, cap), 0))


def _check_cap(cap: Array, k: int):
    if is_known(cap):
        least = float(np.min(np.asarray(cap)))
        if not least * k >= 1 - 1e-6:
            raise ValueError(
                f"`cap` is {least:g}; for {k} classes at least 1 / {k} is expected, or "
                "the probabilities cannot sum up to 1."
            )
