"""A function of the user as a loss."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._common.types import check_callable, check_takes_two
from .._operators.targets import check_floats
from ._factor import batched_mv, DenseFactor
from ._loss import AbstractLoss


class Custom(AbstractLoss):
    """A loss given as a function: see [`diffprog.losses.as_loss`][]."""

    fn: Callable
    smooth: ClassVar[bool] = True

    def __call__(self, outputs: Array, targets: Any):
        check_floats(outputs)
        losses = self.fn(outputs, targets)
        if jnp.shape(losses) != outputs.shape[:1]:
            raise ValueError(
                f"The loss function returned shape {jnp.shape(losses)}; one loss per "
                f"example, shape {outputs.shape[:1]}, is expected: sum up over all "
                "axes but the first, and leave the mean over the examples out."
            )
        return losses

    def count(self, outputs: Array, targets: Any):
        return outputs.shape[0]

    def gradient(self, outputs: Array, targets: Any):
        return jax.grad(lambda u: jnp.sum(self(u, targets)))(outputs)

    def hessian_mv(self, outputs: Array, targets: Any, vector: Array):
        gradient = lambda u: self.gradient(u, targets)
        return jax.jvp(gradient, (outputs,), (vector,))[1]

    def factor(self, outputs: Array, targets: Any):
        gradient, product = jax.linearize(lambda u: self.gradient(u, targets), outputs)
        n, k = outputs.shape[0], math.prod(outputs.shape[1:])
        basis = jnp.broadcast_to(jnp.eye(k, dtype=outputs.dtype)[:, None], (k, n, k))
        H = jax.vmap(product)(basis.reshape(k, *outputs.shape)).reshape(k, n, k)
        H = jnp.moveaxis(H, 1, 0)
        values, V = jnp.linalg.eigh((H + jnp.matrix_transpose(H)) / 2)
        noise = 8 * k * jnp.finfo(H.dtype).eps * jnp.max(jnp.abs(values), 1)
        curved = values > noise[:, None]
        root = jnp.sqrt(jnp.where(curved, values, 0))
        flat = gradient.reshape(n, k)
        along = jnp.einsum("ijk,ij->ik", V, flat, precision="highest")
        # As for losses of classes: no rho that is out of all proportion.
        largest = jnp.max(values, 1, keepdims=True)
        least = jnp.finfo(H.dtype).eps * jnp.abs(along) * largest
        inside = curved & (values >= least)
        rho = jnp.where(inside, along / jnp.where(inside, root, 1), 0)
        remainder = batched_mv(V, jnp.where(inside, 0, along))
        rho, remainder = (a.reshape(outputs.shape) for a in (rho, remainder))
        return DenseFactor(rho, remainder, values[:, 0] < -noise, V * root[:, None])


def as_loss(loss: AbstractLoss | Callable) -> AbstractLoss:
    r"""A loss as it is, or a function `loss(outputs, targets)` as a loss.

    The gradient of a function and the products with its Hessian are found by automatic
    differentiation; its factor by k of these and an eigendecomposition, in O(k^3) per
    example. It has no conjugate.

    **Arguments:**

    - `loss`: an instance of [`diffprog.losses.AbstractLoss`][], or a function of the
        outputs, shape `(examples, ...)`, and the targets that returns one number per
        example, shape `(examples,)`, which depends on the outputs of that example
        alone.

    **Returns:** a loss. Where it is not convex its factor says so, by
    `negative_curvature`.

    **Raises:** `TypeError` for what is neither, `ValueError` when it is called if the
    function does not return one number per example.
    """
    if isinstance(loss, AbstractLoss):
        return loss
    check_callable(
        "loss",
        loss,
        "a loss such as `dp.losses.Squared()`, or a function of outputs and targets "
        "that returns one number per example,",
    )
    check_takes_two("loss", loss, "loss(outputs, targets)")
    return Custom(loss)
