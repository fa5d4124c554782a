"""One number of the losses of a batch: their mean or their sum."""

import abc
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .types import AbstractPart, check_one_number


Reduction = Literal["mean", "sum"]


class AbstractCounted(AbstractPart):
    """A loss that says how many examples its mean is over."""

    @abc.abstractmethod
    def count(
        self, outputs: Float[Array, "examples ..."], targets: Array
    ) -> int | Int[Array, ""]:
        """The number of examples that have a loss, by which a mean divides.

        All of them, but for those whose labels are all to be ignored.

        **Raises:** `ValueError` for known targets that the loss does not accept. Of the
        outputs only shape and dtype are looked at.
        """


def weight(
    loss: AbstractCounted, outputs: Array, targets: Any, reduction: str
) -> float | Array:
    """That of a loss in the mean, one over how many count, or in the sum."""
    if reduction == "sum":
        return 1.0
    number = loss.count(outputs, targets)
    check_one_number(f"{type(loss).__name__}.count", number)
    if isinstance(number, int):
        return 1 / max(number, 1)
    return 1 / jnp.maximum(number, 1).astype(outputs.dtype)


def check_reduction(reduction: Any):
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f'`reduction` is {reduction!r}; "mean" or "sum" over the examples is '
            "expected."
        )
