"""Losses of supervised learning that compare each output with its own target."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from .._types import Number, number
from ._factor import diagonal_factor, flat_factor, never, ScaledFactor
from ._loss import AbstractLoss, like, total


def _least(gradient):
    """The least weight of a curvature that is used: next to nothing beside g."""
    return jnp.finfo(gradient.dtype).eps * jnp.abs(gradient)


class Squared(AbstractLoss):
    r"""$\frac12 \|u - y\|^2$."""

    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        return total((outputs - like(outputs, targets)) ** 2 / 2)

    def gradient(self, outputs, targets):
        return outputs - like(outputs, targets)

    def hessian_mv(self, outputs, targets, vector):
        return vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        return ScaledFactor(g, None, never(g), jnp.ones_like(g), None, ())


class Logistic(AbstractLoss):
    r"""$\ln(1 + e^{-y u})$ for targets y = 1 or -1, summed over the outputs."""

    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        return total(jax.nn.softplus(-like(outputs, targets) * outputs))

    def gradient(self, outputs, targets):
        y = like(outputs, targets)
        return -y * jax.nn.sigmoid(-y * outputs)

    def _curvature(self, outputs):
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)

    def hessian_mv(self, outputs, targets, vector):
        return self._curvature(outputs) * vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        return diagonal_factor(g, self._curvature(outputs), _least(g))


class Huber(AbstractLoss):
    r"""$\frac12 r^2$ for $|r| \le \delta$, else $\delta (|r| - \delta / 2)$; r = u - y.

    - `delta`: the residual from which on the loss grows linearly.
    """

    smooth: ClassVar[bool] = True
    delta: Number = number(1.0)

    def __call__(self, outputs, targets):
        size = jnp.abs(outputs - like(outputs, targets))
        inner = jnp.minimum(size, self.delta)
        return total(inner * (size - inner / 2))

    def gradient(self, outputs, targets):
        return jnp.clip(outputs - like(outputs, targets), -self.delta, self.delta)

    def _curvature(self, outputs, targets):
        inside = jnp.abs(outputs - like(outputs, targets)) <= self.delta
        return inside.astype(outputs.dtype)

    def hessian_mv(self, outputs, targets, vector):
        return self._curvature(outputs, targets) * vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        return diagonal_factor(g, self._curvature(outputs, targets), jnp.zeros_like(g))


class Absolute(AbstractLoss):
    r"""$\sum_j |u_j - y_j|$. Its gradient is 0 where $u_j = y_j$."""

    smooth: ClassVar[bool] = False

    def __call__(self, outputs, targets):
        return total(jnp.abs(outputs - like(outputs, targets)))

    def gradient(self, outputs, targets):
        return jnp.sign(outputs - like(outputs, targets))

    def hessian_mv(self, outputs, targets, vector):
        return jnp.zeros_like(vector)

    def factor(self, outputs, targets):
        return flat_factor(self.gradient(outputs, targets))
