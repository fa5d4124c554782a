"""Other second derivatives for the loss of a network: metrics.

Around the outputs z of the current parameters a loss l is replaced by

    m(z') = l(z) + l'(z) (z' - z) + D(z, z') - D(z, z) - d/dz' D(z, z) (z' - z),

whose value and gradient are those of the loss and whose Hessian is that of D.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._common.reduction import AbstractCounted
from .._common.tree import vdot
from .._common.types import check_callable, noted


class StageMetric(eqx.Module):
    r"""The metric that a divergence between the outputs of a stage gives a network.

    With the Jacobian $J_j$ of the outputs of stage j in all parameters, it is
    $C = J_j^\top \, \nabla^2 D \, J_j$. Parameters of later stages do not move these
    outputs, and have no curvature but the damping.

    - `stage`: j; stages count from 0, as in `net.params`, where each of several equal
        ones counts.
    - `divergence`: a function `D(reference, outputs)` of the outputs of that stage for
        the batch, with one number per example; or a loss such as
        [`diffprog.losses.Squared`][], whose targets are the reference.
    """

    stage: int = eqx.field(static=True)
    divergence: Callable

    def __check_init__(self):
        if isinstance(self.stage, bool) or not isinstance(self.stage, int):
            raise TypeError(
                f"`stage` is {self.stage!r:.100}; the index of a stage, a Python int, "
                "is expected."
            )
        if self.stage < 0:
            raise ValueError(
                f"`stage` is {self.stage}; stages count from 0, the first."
            )
        expected = "a function `D(reference, outputs)` with one number per example"
        check_callable("divergence", self.divergence, expected)


def of_stage(metric: StageMetric) -> Callable:
    """D(reference, outputs) of a stage."""
    given = metric.divergence
    turned = lambda reference, outputs: given(outputs, reference)
    return turned if isinstance(given, AbstractCounted) else given


def of_outputs(metric: Callable, targets: PyTree) -> Callable:
    """D(reference, outputs) of the outputs of the network."""
    loss = lambda reference, outputs: metric(outputs, targets)
    return loss if isinstance(metric, AbstractCounted) else metric


def per_example(divergence: Callable, reference: PyTree, outputs: PyTree) -> Array:
    """What a divergence returns, checked."""
    examples = jnp.shape(jtu.tree_leaves(outputs)[0])[:1]
    with noted(lambda: "Raised in the metric of the network."):
        values = divergence(reference, outputs)
        if jnp.shape(values) != examples:
            raise ValueError(
                f"The metric returned shape {jnp.shape(values)}; one number per "
                f"example, shape {examples}, is expected: sum up over all axes but the "
                "first, and leave the mean over the examples out."
            )
        return values


def tangent(fn: Callable, x: PyTree) -> Array:
    """fn(x), with its gradient, and no second derivatives."""
    at = lax.stop_gradient(x)
    value, gradient = jax.value_and_grad(fn)(at)
    return value + vdot(gradient, _minus(x, at))


def curvature(fn: Callable, x: PyTree) -> Array:
    """0 with gradient 0, and the second derivatives of fn."""
    return fn(x) - tangent(fn, x)


def _minus(x: PyTree, y: Any) -> PyTree:
    return jtu.tree_map(jnp.subtract, x, y)
