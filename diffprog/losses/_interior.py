r"""Domains of conjugates, and steps in their interior.

With $l^* = \varphi$ on a domain of all alpha with $h_j(\alpha) \ge 0$, alpha is a
gradient of l at z where multipliers $x_j \ge 0$ have

$$\varphi'(\alpha) - \sum_j x_j h_j'(\alpha) = z, \quad x_j h_j(\alpha) = t$$

with t = 0. An interior method takes t > 0 to 0 by steps of Newton's method in both. The
multipliers are eliminated: a change of z by u changes alpha by $W (u + g)$, where
$W = R R^\top$ tends to the Hessian of l.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._factor import example_dot, Outputs, row_dot
from ._loss import AbstractDualLoss


class Inside(NamedTuple):
    """A point in the interior of a domain with its multipliers, or a change of both."""

    alpha: Array
    x: tuple[Array, ...]


class Missing(NamedTuple):
    """By how much the two equations fail."""

    z: Array  # phi'(alpha) - sum_j x_j h_j'(alpha) - z
    products: tuple[Array, ...]  # x_j h_j(alpha)


class Root(NamedTuple):
    """Products with R and R'."""

    mv: Callable[[Array], Array]
    transpose_mv: Callable[[Array], Array]


class AbstractDomain(eqx.Module):
    """The domain of the conjugates of a batch of losses, and what they are inside."""

    @abc.abstractmethod
    def start(self, z: Array) -> Inside:
        """A point well inside, whose multipliers fit z."""

    @abc.abstractmethod
    def missing(self, at: Inside, z: Array) -> Missing:
        """What the equations with t = 0 lack."""

    @abc.abstractmethod
    def mean(self, products: tuple[Array, ...]) -> Float[Array, ""]:
        """The mean of all products x_j h_j."""

    @abc.abstractmethod
    def root(self, at: Inside) -> Root:
        """R, where W = R R'."""

    @abc.abstractmethod
    def pull(self, at: Inside, lack: Missing) -> Array:
        """g, so that Newton's step in alpha is W (u + g) for a change u of z."""

    @abc.abstractmethod
    def push(self, at: Inside, change: Array, lack: Missing) -> Inside:
        """Newton's whole step, where that in alpha is known."""

    @abc.abstractmethod
    def longest(self, at: Inside, step: Inside) -> Float[Array, ""]:
        """The largest multiple of a step that does not leave the domain."""


class AbstractBoundedLoss(AbstractDualLoss):
    """A loss with kinks, in itself or in its gradient, whose gradients are bounded.

    They fill the domain of the conjugate, whose interior
    [`diffprog.oracles.InteriorPoint`][] crosses.
    """

    @abc.abstractmethod
    def domain(self, outputs: Outputs, targets: Array) -> AbstractDomain | None:
        """The domain of the conjugate; `None` where that is steep at its boundary.

        So it is for losses of entropies, which have no kinks.
        """


class Box(AbstractDomain):
    """Bounds for every alpha, and with `row_sums` a fixed sum over the last axis.

    - `lower`, `upper`: the bounds.
    - `center`: a point between them.
    - `slope`, `curvature`: phi' and phi'' of the separable phi.
    - `free`: false where alpha is known and stays.
    """

    lower: Array
    upper: Array
    center: Array
    slope: Callable
    curvature: Callable
    free: Array
    row_sums: bool = eqx.field(static=True, default=False)

    def _slacks(self, alpha: Array) -> tuple[Array, Array]:
        least = jnp.finfo(alpha.dtype).eps * (self.upper - self.lower)
        below, above = alpha - self.lower, self.upper - alpha
        return jnp.maximum(below, least), jnp.maximum(above, least)

    def start(self, z):
        z = jnp.where(self.free, z, 0)
        v = jnp.where(self.free, z - self.slope(self.center), 0)
        if self.row_sums:
            # The equation holds up to a number per row, the multiplier of the sum.
            v = v - jnp.max(jnp.where(self.free, v, -jnp.inf), -1, keepdims=True)
            v = jnp.where(self.free, v, 0)
        t = typical(v, jnp.sum(self.free, dtype=z.dtype), z)
        root = jnp.sqrt(v**2 + 4 * t**2)
        # Of both roots of x^2 - v x - t^2 the one without cancellation.
        large = (jnp.abs(v) + root) / 2
        small = t**2 / large
        x = jnp.where(v > 0, small, large), jnp.where(v > 0, large, small)
        return Inside(self.center, x)

    def missing(self, at, z):
        low, high = at.x
        below, above = self._slacks(at.alpha)
        lack = self.slope(at.alpha) - low + high - z
        inside = lambda a: jnp.where(self.free, a, 0)
        return Missing(inside(lack), (inside(low * below), inside(high * above)))

    def mean(self, products):
        low, high = products
        count = jnp.sum(self.free, dtype=low.dtype)
        return jnp.sum(low + high) / (2 * jnp.maximum(count, 1))

    def root(self, at):
        (low, high), (below, above) = at.x, self._slacks(at.alpha)
        D = self.curvature(at.alpha) + low / below + high / above
        w = jnp.where(self.free, 1 / D, 0)
        if not self.row_sums:
            scale = jnp.sqrt(w)
            return Root(lambda u: scale * u, lambda v: scale * v)
        # W = diag(w) - w w' / sum(w) takes differences only: those to the entry of the
        # largest weight, and minus the sum of the others for that.
        total = lambda a: jnp.sum(a, -1, keepdims=True)
        first = jax.nn.one_hot(jnp.argmax(w, -1), w.shape[-1], dtype=bool)
        rest, W = jnp.where(first, 0, w), total(w)
        others = total(rest)
        scale, s = jnp.sqrt(rest), jnp.sqrt(rest / jnp.where(others > 0, others, 1))
        s = s * jnp.sqrt(1 - jnp.sqrt(1 - others / jnp.where(W > 0, W, 1)))
        project = lambda v: v - s * row_dot(s, v)

        def mv(u):
            change = scale * project(u)
            return jnp.where(first, -total(change), change)

        pulled = lambda v: v - total(jnp.where(first, v, 0))
        return Root(mv, lambda v: project(scale * pulled(v)))

    def pull(self, at, lack):
        (below, above), (low, high) = self._slacks(at.alpha), lack.products
        return high / above - low / below - lack.z

    def push(self, at, change, lack):
        (below, above), (low, high) = self._slacks(at.alpha), lack.products
        dlow = -(low + at.x[0] * change) / below
        dhigh = (at.x[1] * change - high) / above
        inside = lambda a: jnp.where(self.free, a, 0)
        return Inside(change, (inside(dlow), inside(dhigh)))

    def longest(self, at, step):
        below, above = self._slacks(at.alpha)
        positive = (below, step.alpha), (above, -step.alpha), *zip(at.x, step.x)
        return jnp.min(jnp.stack([largest_multiple(a, b) for a, b in positive]))


class Ball(AbstractDomain):
    """The vectors of length at most 1; phi is <alpha, y>.

    The only multiplier of an example is the distance of z to y.
    """

    y: Array

    def _slack(self, alpha: Array) -> Array:
        least = jnp.finfo(alpha.dtype).eps
        return jnp.maximum((1 - example_dot(alpha, alpha)) / 2, least)

    def start(self, z):
        r = z - self.y
        size = jnp.sqrt(example_dot(r, r))
        t = typical(size, size.size, z)
        x = jnp.sqrt(size**2 + t**2)
        return Inside(r / x, (x,))

    def missing(self, at, z):
        x = at.x[0]
        return Missing(self.y + x * at.alpha - z, (x * self._slack(at.alpha),))

    def mean(self, products):
        return jnp.mean(products[0])

    def root(self, at):
        # x (I + 2 a a' / (1 - |a|^2)) inverted is (I - 2 a a' / (1 + |a|^2)) / x, and
        # the root of that is I - rho a a' / |a|^2 over the root of x.
        size = example_dot(at.alpha, at.alpha)
        rho = 1 - jnp.sqrt(2 * self._slack(at.alpha) / (1 + size))
        s = at.alpha * jnp.sqrt(rho / jnp.where(size > 0, size, 1))
        mv = lambda v: (v - s * example_dot(s, v)) / jnp.sqrt(at.x[0])
        return Root(mv, mv)

    def pull(self, at, lack):
        return at.alpha * (lack.products[0] / self._slack(at.alpha)) - lack.z

    def push(self, at, change, lack):
        along = at.x[0] * example_dot(at.alpha, change) - lack.products[0]
        return Inside(change, (along / self._slack(at.alpha),))

    def longest(self, at, step):
        # The root of |alpha + a change|^2 = 1, in two forms without cancellation.
        b = example_dot(at.alpha, step.alpha)
        square, left = example_dot(step.alpha, step.alpha), 2 * self._slack(at.alpha)
        root = jnp.sqrt(b**2 + square * left)
        away = jnp.where(square > 0, square, 1)
        a = jnp.where(b > 0, left / jnp.where(b > 0, b + root, 1), (root - b) / away)
        a = jnp.where(square > 0, a, jnp.inf)
        return jnp.minimum(jnp.min(a), jnp.min(largest_multiple(at.x[0], step.x[0])))


def largest_multiple(a: Array, b: Array) -> Array:
    """The largest multiple of b that keeps a >= 0."""
    return jnp.where(b < 0, a / jnp.where(b < 0, -b, 1), jnp.inf)


def typical(v: Array, count, z: Array) -> Array:
    """The size of v, and rounding of z where all v are 0."""
    mean = jnp.sum(jnp.abs(v)) / jnp.maximum(count, 1)
    largest = jnp.max(jnp.where(jnp.isfinite(z), jnp.abs(z), 0))
    least = jnp.finfo(z.dtype).eps * (1 + largest)
    return jnp.maximum(mean, least)


def within_reach(z: Array) -> Array:
    """False for classes so far below the largest that rounding hides every step.

    So are those of a mask such as the lowest float, or -inf.
    """
    m = jnp.minimum(jnp.max(z, -1, keepdims=True), jnp.finfo(z.dtype).max)
    return z - m > -1 / jnp.finfo(z.dtype).eps


def interval(lower: Array, upper: Array, slope: Array, curvature: float = 0.0) -> Box:
    """Every alpha between two bounds; phi' = slope + curvature alpha."""
    first = lambda a: slope + curvature * a
    second = lambda a: jnp.full_like(a, curvature)
    free = jnp.ones_like(lower, bool)
    return Box(lower, upper, (lower + upper) / 2, first, second, free)


def simplex(
    y: Array, center: Array, present: Array, slope: Callable, curvature: Callable
) -> Box:
    """alpha + y on the simplex; `slope` and `curvature` are those in p = alpha + y."""
    free = jnp.broadcast_to(present, y.shape)
    p = jnp.where(free, center, 1)
    tiny = jnp.finfo(y.dtype).tiny
    at = lambda fn: lambda a: fn(jnp.where(free, jnp.maximum(a + y, tiny), p))
    # No p reaches 2: that bound is there for the form.
    low, high = jnp.where(free, 0, -1) - y, jnp.where(free, 2, 1) - y
    start = jnp.where(free, center, 0) - y
    return Box(low, high, start, at(slope), at(curvature), free, row_sums=True)
