import abc
from typing import Any, TypeAlias

import equinox as eqx
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

import diffprog as dp


# A number of a model: a Python float follows the dtype of the state.
Scalar: TypeAlias = float | Float[Array, ""]
Time: TypeAlias = float | Float[Array, ""]
Stage: TypeAlias = int | Int[Array, ""]
ControlBounds: TypeAlias = tuple[Float[Array, " m"], Float[Array, " m"]] | None


def check_step(system: Any):
    """Raises for a `dt` or a `method` that no stage can be stepped by."""
    if not isinstance(system.dt, Tracer) and not np.all(system.dt > 0):
        raise ValueError(f"`dt` is {system.dt}; positive seconds are expected.")
    dp.discretize(system.vector_field, 1.0, system.method)  # raises for others


class AbstractSystem(eqx.Module):
    """A vector field that is stepped over `dt` by `method`, and costs.

    Every system has fields of these names; declared here, they would come first for
    type checkers.
    """

    __check_init__ = check_step  # Equinox calls that of a class too

    @abc.abstractmethod
    def vector_field(
        self, x: Float[Array, " n"], u: Float[Array, " m"], t: Time
    ) -> Float[Array, " n"]:
        """The time derivative of the state."""

    def dynamics(
        self, x: Float[Array, " n"], u: Float[Array, " m"], t: Stage
    ) -> Float[Array, " n"]:
        """The state `dt` later."""
        system: Any = self
        return dp.discretize(self.vector_field, system.dt, system.method)(x, u, t)

    @abc.abstractmethod
    def cost(
        self, x: Float[Array, " n"], u: Float[Array, " m"], t: Stage
    ) -> Float[Array, ""]:
        """The cost of a stage."""

    @abc.abstractmethod
    def terminal_cost(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """The cost of the last state."""
