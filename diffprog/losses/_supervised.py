"""Losses of supervised learning that compare each output with its own target."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import xlog1py, xlogy
from jaxtyping import Array

from .._common.loops import repeat
from .._common.types import check_positive, Number, number
from .._operators.families import scaled_omega
from .._operators.root import weighted
from .._operators.targets import check_alike, check_within, COUNTS, like, SIGNS, within
from ._block import majorized_block, newton_block, squared_block
from ._factor import diagonal_factor, example_dot, flat_factor, never, ScaledFactor
from ._interior import AbstractBoundedLoss, Ball, interval
from ._loss import AbstractDualLoss, per_example, total, where_inside


def _least(gradient):
    """The least weight of a curvature that is used: next to nothing beside g."""
    return jnp.finfo(gradient.dtype).eps * jnp.abs(gradient)


# All examples, where every output has a number for a target.
def _count(self: AbstractDualLoss, outputs, targets) -> int:
    check_alike(outputs, targets)
    return outputs.shape[0]


class Squared(AbstractDualLoss):
    r"""$\frac12 \|u - y\|^2$."""

    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        return total((outputs - like(outputs, targets)) ** 2 / 2)

    count = _count

    def gradient(self, outputs, targets):
        return outputs - like(outputs, targets)

    def hessian_mv(self, outputs, targets, vector):
        return vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        return ScaledFactor(g, None, never(g), jnp.ones_like(g))

    def conjugate(self, alpha, targets):
        return total(alpha * (alpha / 2 + like(alpha, targets)))

    def dual_projection(self, alpha, targets):
        return alpha

    def conjugate_prox(self, vector, tau, targets):
        tau = per_example("tau", tau, vector)
        return (vector - tau * like(vector, targets)) / (1 + tau)

    def block_update(self, alpha, z, K, c, targets):
        return squared_block(alpha, z, K, c, like(alpha, targets))


@jax.custom_jvp
def _softplus(x: Array) -> Array:
    """ln(1 + e^x), whose derivative costs a third of what `jax.nn.softplus` takes."""
    return jax.nn.softplus(x)


_softplus.defjvps(lambda dx, _, x: jax.nn.sigmoid(x) * dx)


class Logistic(AbstractDualLoss):
    r"""$\ln(1 + e^{-y u})$ for targets y = 1 or -1, summed over the outputs."""

    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        y, one = within(SIGNS, outputs, targets)
        return total(one * _softplus(-weighted(y, outputs)))

    def count(self, outputs, targets):
        check_within(SIGNS, outputs, targets)
        return outputs.shape[0]

    def gradient(self, outputs, targets):
        y, one = within(SIGNS, outputs, targets)
        return one * -y * jax.nn.sigmoid(-y * outputs)

    def _curvature(self, outputs):
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)

    def hessian_mv(self, outputs, targets, vector):
        return self._curvature(outputs) * vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        return diagonal_factor(g, self._curvature(outputs), _least(g))

    def conjugate(self, alpha, targets):
        b = -like(alpha, targets) * alpha
        inner = jnp.clip(b, 0, 1)
        values = xlogy(inner, inner) + xlog1py(1 - inner, -inner)
        return total(where_inside(jnp.abs(b - inner), 1.0, values))

    def dual_projection(self, alpha, targets):
        y = like(alpha, targets)
        return -y * jnp.clip(-y * alpha, 0, 1)

    def conjugate_prox(self, vector, tau, targets):
        y, tau = like(vector, targets), per_example("tau", tau, vector)
        x = -y * vector
        # b is 1 - b for 1 - x: the smaller of the two has its digits.
        b = _binary_prox(jnp.minimum(x, 1 - x), tau)
        return -y * jnp.where(x > 0.5, 1 - b, b)

    block_update = newton_block


class Huber(AbstractBoundedLoss):
    r"""$\frac12 r^2$ for $|r| \le \delta$, else $\delta (|r| - \delta / 2)$; r = u - y.

    - `delta`: the residual from which on the loss grows linearly.
    """

    smooth: ClassVar[bool] = True
    delta: Number = number(1.0)

    def __check_init__(self):
        check_positive("delta", self.delta)

    def __call__(self, outputs, targets):
        size = jnp.abs(outputs - like(outputs, targets))
        inner = jnp.minimum(size, self.delta)
        return total(inner**2 / 2 + self.delta * (size - inner))

    count = _count

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

    def conjugate(self, alpha, targets):
        values = alpha * (alpha / 2 + like(alpha, targets))
        return total(where_inside(jnp.abs(alpha) - self.delta, self.delta, values))

    def dual_projection(self, alpha, targets):
        return jnp.clip(alpha, -self.delta, self.delta)

    def conjugate_prox(self, vector, tau, targets):
        tau = per_example("tau", tau, vector)
        free = (vector - tau * like(vector, targets)) / (1 + tau)
        return jnp.clip(free, -self.delta, self.delta)

    def domain(self, outputs, targets):
        y = like(outputs, targets)
        bound = jnp.full_like(y, self.delta)
        return interval(-bound, bound, y, 1.0)

    block_update = newton_block


class Absolute(AbstractBoundedLoss):
    r"""$\sum_j |u_j - y_j|$. Its gradient is 0 where $u_j = y_j$."""

    smooth: ClassVar[bool] = False

    def __call__(self, outputs, targets):
        return total(jnp.abs(outputs - like(outputs, targets)))

    count = _count

    def gradient(self, outputs, targets):
        return jnp.sign(outputs - like(outputs, targets))

    def hessian_mv(self, outputs, targets, vector):
        return jnp.zeros_like(vector)

    def factor(self, outputs, targets):
        return flat_factor(self.gradient(outputs, targets))

    def conjugate(self, alpha, targets):
        values = alpha * like(alpha, targets)
        return total(where_inside(jnp.abs(alpha) - 1, 1.0, values))

    def dual_projection(self, alpha, targets):
        return jnp.clip(alpha, -1, 1)

    def conjugate_prox(self, vector, tau, targets):
        tau = per_example("tau", tau, vector)
        return jnp.clip(vector - tau * like(vector, targets), -1, 1)

    def domain(self, outputs, targets):
        y = like(outputs, targets)
        return interval(-jnp.ones_like(y), jnp.ones_like(y), y)

    block_update = majorized_block


def _unit(vector: Array) -> tuple[Array, Array]:
    """r / |r|, and 1 / |r|, over the outputs of every example; 0 where r is.

    The direction is that of infinite entries, where there are any.
    """
    axes = tuple(range(1, vector.ndim))
    limits = jnp.finfo(vector.dtype)
    size = lax.stop_gradient(jnp.max(jnp.abs(vector), axes, keepdims=True))
    # XLA multiplies by 1 / scale, which must not be rounded to 0.
    scale = jnp.clip(size, limits.tiny, limits.max / 8)
    scaled = jnp.clip(vector, limits.min, limits.max) / scale
    square = jnp.sum(scaled**2, axes, keepdims=True)
    inverse = jnp.where(square > 0, 1 / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return scaled * inverse, inverse / scale


@jax.custom_jvp
def _length(vector: Array) -> Array:
    """The Euclidean norm over the outputs of every example, with their axes."""
    return example_dot(_unit(vector)[0], vector)


@_length.defjvp
def _(primals, tangents):
    (vector,), (dvector,) = primals, tangents
    return _length(vector), example_dot(_unit(vector)[0], dvector)


class Euclidean(AbstractBoundedLoss):
    r"""$\|u - y\|_2$ over all outputs of an example. Its gradient is 0 at u = y."""

    smooth: ClassVar[bool] = False

    def __call__(self, outputs, targets):
        return total(_length(outputs - like(outputs, targets)))

    count = _count

    def gradient(self, outputs, targets):
        return _unit(outputs - like(outputs, targets))[0]

    def hessian_mv(self, outputs, targets, vector):
        s, inverse = _unit(outputs - like(outputs, targets))
        return inverse * (vector - s * example_dot(s, vector))

    def factor(self, outputs, targets):
        s, inverse = _unit(outputs - like(outputs, targets))
        zero, scale = jnp.zeros_like(s), jnp.sqrt(inverse)
        return ScaledFactor(zero, s, never(s), scale, s, by_rows=False)

    def conjugate(self, alpha, targets):
        excess = total(_length(alpha)) - 1
        return where_inside(excess, 1.0, total(alpha * like(alpha, targets)))

    def dual_projection(self, alpha, targets):
        return jnp.where(_length(alpha) > 1, _unit(alpha)[0], alpha)

    def conjugate_prox(self, vector, tau, targets):
        tau = per_example("tau", tau, vector)
        return self.dual_projection(vector - tau * like(vector, targets), targets)

    def domain(self, outputs, targets):
        return Ball(like(outputs, targets))

    block_update = majorized_block


class Poisson(AbstractDualLoss):
    r"""$e^u - y u$ for counts $y \ge 0$, summed over the outputs: u is a log-rate.

    The negative log-likelihood without the constant $\ln y!$.
    """

    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        y, one = within(COUNTS, outputs, targets)
        rate, counts = jnp.exp(outputs), weighted(y, outputs)
        return total(one * jnp.where(rate < jnp.inf, rate - counts, rate))

    def count(self, outputs, targets):
        check_within(COUNTS, outputs, targets)
        return outputs.shape[0]

    def gradient(self, outputs, targets):
        y, one = within(COUNTS, outputs, targets)
        return one * (jnp.exp(outputs) - y)

    def hessian_mv(self, outputs, targets, vector):
        return jnp.exp(outputs) * vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        return diagonal_factor(g, jnp.exp(outputs), _least(g))

    def conjugate(self, alpha, targets):
        y = like(alpha, targets)
        b = jnp.maximum(alpha + y, 0)
        return total(where_inside(-(alpha + y), 1 + y, xlogy(b, b) - b))

    def dual_projection(self, alpha, targets):
        return jnp.maximum(alpha, -like(alpha, targets))

    def conjugate_prox(self, vector, tau, targets):
        y, tau = like(vector, targets), per_example("tau", tau, vector)
        return scaled_omega(vector + y, tau, jnp.ones_like(tau)) - y

    block_update = newton_block


@jax.jit
def _binary_prox(x: Array, tau: Array) -> Array:
    """The b <= 1/2 with tau ln(b / (1 - b)) + b = x, for x <= 1/2.

    In theta, the logit, b is between e^theta / 2 and e^theta: Newton's method from the
    root with the former falls to that of a convex function.
    """
    half = scaled_omega(x, tau, jnp.full_like(tau, 0.5))
    # half is e^theta / 2.
    positive = half > 0
    log = jnp.log(2 * jnp.where(positive, half, 1))
    theta = jnp.minimum(jnp.where(positive, log, x / tau), 0)

    def improve(theta):
        b = jax.nn.sigmoid(theta)
        return theta - (tau * theta + b - x) / (tau + b * (1 - b))

    theta = repeat(improve, theta, 6)
    b = jax.nn.sigmoid(theta)
    # What was lost in theta.
    safe = jnp.where(b > 0, b, 0.5)
    error = tau * (jnp.log(safe) - jnp.log1p(-safe)) + safe - x
    weight = safe * (1 - safe)
    better = jnp.maximum(b - weight * error / (tau + weight), 0)
    return jnp.where(b > 0, better, 0)
