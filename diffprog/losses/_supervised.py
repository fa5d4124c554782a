"""Losses of supervised learning: `loss(outputs, targets)`, one number per example.

The first axis of the outputs counts examples; what an example has beyond (tokens,
outputs) is summed.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import Number, number
from ._call import Divergence, Reference
from ._divergence import KL
from ._generated import as_divergence
from ._operators import f_loss


class AbstractLoss(eqx.Module):
    """A loss of the outputs of a model: `loss(outputs, targets)`, one per example."""

    @abc.abstractmethod
    def __call__(
        self, outputs: Float[Array, "examples ..."], targets: Array
    ) -> Float[Array, " examples"]:
        """The loss of every example."""


def _total(losses: Array) -> Array:
    return jnp.sum(losses.reshape(losses.shape[0], -1), 1)


def _check_same(outputs: Array, targets: Array):
    if jnp.shape(outputs) != jnp.shape(targets):
        raise ValueError(
            f"`targets` has shape {jnp.shape(targets)}; that of `outputs`, "
            f"{jnp.shape(outputs)}, is expected."
        )


class FLoss(AbstractLoss):
    """The Fenchel-Young loss of an f-divergence: [`diffprog.losses.f_loss`][].

    - `f`, `reference`, `temperature`, `smoothing`: as there. Classes are on the last
        axis.
    """

    f: Divergence
    reference: Reference = None
    temperature: Number = number(1.0)
    smoothing: float = eqx.field(static=True, default=0.0)

    def __check_init__(self):
        object.__setattr__(self, "f", as_divergence(self.f))

    def __call__(self, outputs, targets):
        losses = f_loss(
            outputs,
            targets,
            self.f,
            self.reference,
            temperature=self.temperature,
            smoothing=self.smoothing,
        )
        return _total(losses)


class SoftmaxCrossEntropy(AbstractLoss):
    r"""$-\sum_j y_j \ln p_j$ of the softmax p, for labels or probabilities y."""

    def __call__(self, outputs, targets):
        if jnp.issubdtype(jnp.asarray(targets).dtype, jnp.integer):
            return _total(f_loss(outputs, targets, KL()))
        _check_same(outputs, targets)
        targets = jnp.asarray(targets, outputs.dtype)
        return _total(-targets * jax.nn.log_softmax(outputs))


class Squared(AbstractLoss):
    r"""$\frac12 \|u - y\|^2$."""

    def __call__(self, outputs, targets):
        _check_same(outputs, targets)
        return _total((outputs - targets) ** 2 / 2)


class Logistic(AbstractLoss):
    r"""$\ln(1 + e^{-y u})$ for targets y = 1 or -1, summed over the outputs."""

    def __call__(self, outputs, targets):
        _check_same(outputs, targets)
        targets = jnp.asarray(targets, outputs.dtype)
        return _total(jax.nn.softplus(-targets * outputs))


class Hinge(AbstractLoss):
    r"""The hinge loss, of binary targets or of labels.

    For targets y = 1 or -1 of the shape of the outputs it is $\max(0, 1 - y u)$, summed
    over the outputs; for labels y, integers, $\max_j u_j - u_y + 1[j \ne y]$.
    """

    def __call__(self, outputs, targets):
        if not jnp.issubdtype(jnp.asarray(targets).dtype, jnp.integer):
            _check_same(outputs, targets)
            return _total(jnp.maximum(1 - targets * outputs, 0))
        if jnp.shape(targets) != outputs.shape[:-1]:
            raise ValueError(
                f"`targets` has shape {jnp.shape(targets)}; labels of the shape "
                f"{outputs.shape[:-1]}, that of `outputs` without the classes, are "
                "expected. Binary targets are floats, 1.0 or -1.0."
            )
        wrong = jax.nn.one_hot(targets, outputs.shape[-1], dtype=outputs.dtype)
        own = jnp.sum(wrong * outputs, -1)
        return _total(jnp.max(outputs + 1 - wrong, -1) - own)


class Huber(AbstractLoss):
    r"""$\frac12 r^2$ for $|r| \le \delta$, else $\delta (|r| - \delta / 2)$; r = u - y.

    - `delta`: the residual from which on the loss grows linearly.
    """

    delta: Number = number(1.0)

    def __call__(self, outputs, targets):
        _check_same(outputs, targets)
        size = jnp.abs(outputs - targets)
        inner = jnp.minimum(size, self.delta)
        return _total(inner * (size - inner / 2))
