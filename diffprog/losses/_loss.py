"""What the directions for networks need of a loss.

The first axis of the outputs counts examples; all else of an example are its k outputs.
For losses of classes these are on the last axis, and what is summed over the others,
tokens say.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._factor import AbstractFactor


class AbstractLoss(eqx.Module):
    r"""A loss of the outputs of a model: `loss(outputs, targets)`, one per example.

    - `smooth`: whether the gradient is continuous and the Hessian tells how it changes.
        Where it is not, a Gauss-Newton step is a gradient step in some directions, or
        in all.

    To use a function of one's own: [`diffprog.losses.as_loss`][].
    """

    smooth: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def __call__(
        self, outputs: Float[Array, "examples ..."], targets: Array
    ) -> Float[Array, " examples"]:
        """The loss of every example."""

    @abc.abstractmethod
    def gradient(
        self, outputs: Float[Array, "examples ..."], targets: Array
    ) -> Float[Array, "examples ..."]:
        """The gradient of every example's loss in its outputs; at a kink a subgradient.

        **Returns:** g, of the shape of `outputs`.
        """

    @abc.abstractmethod
    def hessian_mv(
        self,
        outputs: Float[Array, "examples ..."],
        targets: Array,
        vector: Float[Array, "examples ..."],
    ) -> Float[Array, "examples ..."]:
        """The Hessian of every example's loss, times `vector`, in O(k).

        **Returns:** H v, of the shape of `outputs`.
        """

    @abc.abstractmethod
    def factor(
        self, outputs: Float[Array, "examples ..."], targets: Array
    ) -> AbstractFactor:
        r"""A square root of every Hessian, and the gradient by it.

        **Returns:** a [`diffprog.losses.AbstractFactor`][]: products with R and R',
        where $H = R R^\top$ and $g = R \rho + e$.
        """


def total(losses: Array) -> Float[Array, " examples"]:
    """The sum over all but the first axis."""
    return jnp.sum(losses.reshape(losses.shape[0], -1), 1)


def like(outputs: Array, targets: Array) -> Array:
    """Targets of the shape of the outputs, in their dtype."""
    if jnp.shape(outputs) != jnp.shape(targets):
        raise ValueError(
            f"`targets` has shape {jnp.shape(targets)}; that of `outputs`, "
            f"{jnp.shape(outputs)}, is expected."
        )
    return jnp.asarray(targets, outputs.dtype)
