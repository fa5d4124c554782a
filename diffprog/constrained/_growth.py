import jax.numpy as jnp
from jaxtyping import Array

from .._common.multipliers import violation
from .._common.types import (
    AbstractPart,
    check_not_negative,
    check_positive,
    Number,
    number,
)


class Growth(AbstractPart):
    r"""A schedule of penalties: $c \leftarrow \min(f c + a, c_{\max})$ where a
    constraint is violated, entry by entry.

    It grows where the violation, |h| or $[g]_+$, is above `tol`, and above `progress`
    times that of the update before. Too large a penalty makes the steps of the
    parameters unstable: gradient descent with a rate r needs $r (q + \sigma^2 c) < 2$,
    with q the largest curvature of the loss and sigma the largest singular value of
    the Jacobian of the constraints. So there is a cap.

    - `factor`: f >= 0.
    - `increment`: a >= 0.
    - `tol`: violations up to here are none.
    - `progress`: a number >= 0; 0.25 leaves a penalty that cut the violation to a
        quarter.
    - `max_penalty`: the cap.
    """

    factor: Number = number(1.01, check_positive)
    increment: Number = number(0.0, check_not_negative)
    tol: Number = number(1e-4, check_not_negative)
    progress: Number = number(0.0, check_not_negative)
    max_penalty: Number = number(1e4, check_positive)

    def grow(self, penalty: Array, error: Array, before: Array, equal: bool) -> Array:
        """The penalties after an error, and the one before it."""
        number = lambda value: jnp.asarray(value).astype(penalty.dtype)
        grown = number(self.factor) * penalty + number(self.increment)
        grown = jnp.maximum(penalty, jnp.minimum(grown, number(self.max_penalty)))
        return jnp.where(self.is_poor(error, before, equal), grown, penalty)

    def is_poor(self, error: Array, before: Array, equal: bool) -> Array:
        """Whether a violation calls for a larger penalty."""
        size, old = violation(error, equal), violation(before, equal)
        number = lambda value: jnp.asarray(value).astype(error.dtype)
        return (size > number(self.tol)) & (size > number(self.progress) * old)

    def is_largest(self, penalty: Array) -> Array:
        """Whether a penalty grows no further."""
        return penalty >= jnp.asarray(self.max_penalty).astype(penalty.dtype)
