from typing import Any

import jax.numpy as jnp

from .._common.tree import scale, vdot
from .._common.types import number
from ._base import AbstractForgetful, Proposal
from ._damping import check_damping


class Gradient(AbstractForgetful):
    r"""Steepest descent: $d = -\nabla h(w) / \lambda$.

    - `damping`: lambda > 0, a number or a rule such as
        [`diffprog.oracles.Threshold`][]; 1, so that the direction is the gradient.
    """

    damping: Any = number(1.0, check_damping)

    def propose(self, at, damping, memory, key):
        step = scale(-1 / damping, at.gradient)
        slope = vdot(at.gradient, step)
        return Proposal(step, -slope, unit=damping, gap=jnp.zeros_like(slope))
