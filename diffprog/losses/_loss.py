"""What the directions for networks need of a loss.

The first axis of the outputs counts examples; all else of an example are its k outputs.
For losses of classes these are on the last axis, and what is summed over the others,
tokens say.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .._common.reduction import AbstractCounted
from .._common.types import came, check_answer, is_known
from ._factor import AbstractFactor, Outputs, PerExample


class AbstractLoss(AbstractCounted):
    r"""A loss of the outputs of a model: `loss(outputs, targets)`, one per example.

    - `smooth`: whether the gradient is continuous and the Hessian tells how it changes.
        Of these Huber's and sparse losses have a Hessian that jumps. Where it is false,
        a Gauss-Newton step is a gradient step in some directions, or in all.

    To use a function of one's own: [`diffprog.losses.as_loss`][].
    """

    smooth: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def __call__(self, outputs: Outputs, targets: Array) -> PerExample:
        """The loss of every example.

        One rule for targets that are outside of the domain of the loss, such as labels
        out of range: `ValueError` where they are known. Where they are traced the loss
        of their example is NaN, with derivatives NaN; but traced probabilities are
        taken as they are.
        """

    @abc.abstractmethod
    def gradient(self, outputs: Outputs, targets: Array) -> Outputs:
        """The gradient of every example's loss in its outputs; at a kink a subgradient.

        **Returns:** g, of the shape of `outputs`.
        """

    @abc.abstractmethod
    def hessian_mv(self, outputs: Outputs, targets: Array, vector: Outputs) -> Outputs:
        """The Hessian of every example's loss, times `vector`, in O(k).

        **Returns:** H v, of the shape of `outputs`.
        """

    @abc.abstractmethod
    def factor(self, outputs: Outputs, targets: Array) -> AbstractFactor:
        r"""A square root of every Hessian, and the gradient by it.

        **Returns:** a [`diffprog.losses.AbstractFactor`][]: products with R and R',
        where $H = R R^\top$ and $g = R \rho + e$.
        """


class AbstractDualLoss(AbstractLoss):
    r"""A convex loss whose conjugate is known, as far as the dual solvers ask for it.

    $$l^*(\alpha) = \sup_u \langle \alpha, u \rangle - l(u),$$

    with one vector alpha of the shape of the outputs for every example.
    """

    @abc.abstractmethod
    def conjugate(self, alpha: Outputs, targets: Array) -> PerExample:
        """The conjugate of every example's loss, infinite outside of its domain.

        What is outside by rounding, 100 eps times the size of the domain, counts as
        inside.
        """

    @abc.abstractmethod
    def dual_projection(self, alpha: Outputs, targets: Array) -> Outputs:
        """The nearest point of the closure of the domain of the conjugate."""

    @abc.abstractmethod
    def conjugate_prox(
        self, vector: Outputs, tau: ArrayLike, targets: Array
    ) -> Outputs:
        r"""The proximal operator of the conjugate.

        $$\operatorname{argmin}_a \tau l^*(a) + \tfrac12 \|a - v\|^2.$$

        **Arguments:**

        - `vector`: v, of the shape of the outputs.
        - `tau`: a positive number, or one per example, shape `(examples,)`.
        - `targets`: as for the loss.

        **Returns:** a, of the shape of v. It is feasible to rounding, and a gradient of
        the loss at (v - a) / tau. Where it is found by iteration, 1e-6 <= tau <= 1e6
        has been tested, in float32 too; it has no derivatives in reverse mode there.
        """

    @abc.abstractmethod
    def block_update(
        self,
        alpha: Outputs,
        z: Outputs,
        K: Float[Array, "examples k k"],
        c: ArrayLike,
        targets: Array,
    ) -> Outputs:
        r"""A step of dual coordinate ascent, in all variables of an example at once.

        $$\operatorname{argmin}_a l^*(a) - \langle a, z \rangle
        + \frac1{2c} (a - \alpha)^\top K (a - \alpha).$$

        It is exact for one output per example, and, up to the tolerance of a Newton
        method with k x k systems, where `smooth` holds. Else K is replaced by a
        multiple of the identity that is larger; the objective never grows by that.

        **Arguments:**

        - `alpha`: the dual variables, feasible.
        - `z`: the linearized outputs at alpha.
        - `K`: $J_i J_i^\top$, positive semidefinite.
        - `c`: damping times the number of examples, or one number per example.
        - `targets`: as for the loss.

        **Returns:** a, of the shape of alpha. Examples do not know of each other: to
        update several at once, K must bound what they share.

        **Raises:** `ValueError` for a K that does not fit.

        Source: Shalev-Shwartz and Zhang, "Stochastic Dual Coordinate Ascent Methods for
        Regularized Loss Minimization", 2013, arXiv 1209.1873.
        """

    def prox(self, vector: Outputs, tau: ArrayLike, targets: Array) -> Outputs:
        r"""The proximal operator of the loss, by Moreau's identity.

        $$\operatorname{argmin}_u \tau l(u) + \tfrac12 \|u - v\|^2
        = v - \tau \operatorname{prox}_{l^* / \tau}(v / \tau).$$

        **Arguments:** those of `conjugate_prox`.

        **Returns:** u, of the shape of v.
        """
        tau = per_example("tau", tau, vector)
        alpha = self.conjugate_prox(vector / tau, 1 / tau.ravel(), targets)
        return jnp.where(jnp.isinf(vector), vector, vector - tau * alpha)


def answered(loss: AbstractLoss, method: str, found: Any, shape: tuple) -> Array:
    """What a method of a loss returned. Raises for what is no array of this shape."""
    if not eqx.is_array(found) or found.shape != shape:
        raise ValueError(
            f"`{type(loss).__name__}.{method}` returned {came(found)}; an array of "
            f"shape {shape} is expected."
        )
    return found


def factor_of(loss: AbstractLoss, outputs: Array, targets: Any) -> AbstractFactor:
    """The factor of a loss. Raises where it returned something else."""
    found = loss.factor(outputs, targets)
    check_answer(loss, "factor", found, AbstractFactor)
    return found


def spread(numbers: Array, outputs: Array) -> Array:
    """Numbers per example with the axes of the outputs."""
    return numbers.reshape(-1, *(1,) * (outputs.ndim - 1))


def per_example(name: str, value: ArrayLike, outputs: Array) -> Array:
    """A positive number or one per example, with the axes of the outputs."""
    value = jnp.asarray(value, outputs.dtype)
    if value.shape not in ((), (1,), outputs.shape[:1]):
        raise ValueError(
            f"`{name}` has shape {value.shape}; a number, or one per example, shape "
            f"{outputs.shape[:1]}, is expected."
        )
    if is_known(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"`{name}` is {value}; positive numbers are expected.")
    return spread(value, outputs)


def total(losses: Array) -> PerExample:
    """The sum over all but the first axis."""
    return jnp.sum(losses, tuple(range(1, losses.ndim)))


def where_inside(excess: Array, size: Array | float, values: Array) -> Array:
    """The values where an excess over a domain is rounding, else infinity, or NaN."""
    rounding = 100 * jnp.finfo(values.dtype).eps * size
    beyond = jnp.inf + lax.stop_gradient(excess)  # NaN stays NaN
    return jnp.where(excess <= rounding, values, beyond)
