"""The largest score smoothed so that a sure choice costs nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .call import Call, check
from .divergence import AbstractDivergence
from .root import height


def entropy_shift(f: AbstractDivergence, Q: Array) -> Array:
    """f(0) (Q - 1) - lift Q; where f(0) is infinite, without its first term."""
    at_zero = jnp.asarray(f.at_zero, Q.dtype)
    at_zero = jnp.where(jnp.isfinite(at_zero), at_zero, 0)
    # In this order nothing of the size of Q is left where lift is f(0).
    return (at_zero - f.lift) * (Q - 1) - f.lift


def smooth_max(scores, f, reference=None, *, where=None, temperature=1.0) -> Array:
    r"""softmax_f + beta f(0) (Q - 1): the largest of <p, scores> + beta H(p).

    H(p) = f(0) (Q - 1) - D_f(p, q) with the reference "unit" is the entropy of f, 0
    where one p_j is 1; that of KL is Shannon's. For KL this is log sum_j q_j e^theta_j.
    """
    return _smooth_max(check(scores, f, reference, -1, where, temperature, None))


@jax.jit
def _smooth_max(call: Call) -> Array:
    s = call.set_up()
    Q = s.problem.Q
    value = s.problem.m + height(s.classes, s.f, s.problem) + entropy_shift(s.f, Q)
    return call.row(jnp.where(Q > 0, s.beta * value, -jnp.inf))
