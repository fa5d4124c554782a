"""Steps that close gaps between states: what they are judged by."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._chain.vector import VectorTrajectory
from .lqr import Sweep


# At least this part of what a step gains by smaller gaps is left after its costs.
LEFT = 0.5


class Price(eqx.Module):
    """What gaps cost in the merit J + weight * size, with the size their 1-norm.

    - `weight`: so large that closing the gaps pays; it never falls.
    - `size`: that at the iterate.
    """

    weight: Float[Array, ""]
    size: Float[Array, ""]

    def raised(self, sweep: Sweep) -> "Price":
        r"""With a weight at which the step of a sweep descends.

        $$J' + \tfrac12 J'' \le (1 - \text{LEFT}) \, \text{weight} \, \text{size}$$

        for the model of J along the step. Along a minimizing step the left side is at
        most the largest costate times the size.

        Source: Nocedal, Wright, "Numerical Optimization", 2006, eq. 18.36.
        """
        cost = sweep.slope + jnp.maximum(sweep.curvature, 0) / 2
        size = jnp.where(self.is_open, self.size, 1)
        needed = jnp.where(self.is_open, cost / ((1 - LEFT) * size), 0)
        finite = jnp.isfinite(needed) & sweep.positive
        weight = jnp.where(finite, jnp.maximum(self.weight, needed), self.weight)
        return replace(self, weight=weight)

    @property
    def is_open(self) -> Bool[Array, ""]:
        """Whether there are gaps."""
        return self.size > 0

    @property
    def value(self) -> Float[Array, ""]:
        return self.weight * self.size

    def merits(self, cost: Array, trial_cost: Array, stepsize: Any):
        """Those of the iterate and of a trial at a step size."""
        return cost + self.value, trial_cost + (1 - stepsize) * self.value

    def along(self, sweep: Sweep) -> Sweep:
        """The sweep for the merit; nothing has converged where there are gaps."""
        decrement = jnp.where(self.is_open, jnp.inf, sweep.decrement)
        return replace(sweep, slope=sweep.slope - self.value, decrement=decrement)


def price_of(trajectory: VectorTrajectory, weight: Array | None) -> Price | None:
    """The price of the gaps of a trajectory, which may have none."""
    if trajectory.gaps is None or weight is None:
        return None
    return Price(weight, trajectory.gaps.total)


def is_better(a: VectorTrajectory, b: VectorTrajectory) -> Bool[Array, ""]:
    """Whether a has a lower cost than b; smaller gaps count first."""
    lower = a.cost < b.cost
    if a.gaps is None or b.gaps is None:
        return lower
    size, other = a.gaps.total, b.gaps.total
    return (size < other) | ((size == other) & lower)
