"""Generators of the well-known f-divergences."""

import abc
import functools as ft
import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array

from .._common.loops import repeat
from .divergence import AbstractDivergence


def positive_power(u: Array, exponent: Any) -> Array:
    """u^exponent for u > 0, else 0, with a derivative that is 0 there too."""
    zero = u <= 0  # NaN is not
    return jnp.where(zero, 0, jnp.where(zero, 1, u) ** exponent)


def expm1_over(z: Array) -> Array:
    """(e^z - 1) / z, which is 1 at 0; differentiable there."""
    small = jnp.abs(z) < 1e-3
    safe = jnp.where(small, 1, z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return jnp.where(small, series, jnp.expm1(safe) / safe)


class AbstractWellKnown(AbstractDivergence):
    """A generator without numbers, whose f''' <= 0."""

    sparse: ClassVar[bool] = False
    convex_ratio: ClassVar[bool] = True
    at_zero: ClassVar[float] = math.inf
    lift: ClassVar[float] = 0.0

    @abc.abstractmethod
    def _inverse(self, w: Array) -> Array:
        """The first of `pair`."""

    def pair(self, w):
        u = self._inverse(w)
        return u, self.curvature(u)


class KL(AbstractWellKnown):
    r"""Kullback-Leibler: $f(u) = u \ln u - u + 1$. Its operator is the softmax."""

    origin: ClassVar[float] = 0.0
    at_zero: ClassVar[float] = 1.0
    lift: ClassVar[float] = 1.0
    scale_free: ClassVar[bool] = True

    def value(self, u):
        return xlogy(u, u) - u + 1

    def link(self, u):
        return jnp.log(u)

    def _inverse(self, w):
        return jnp.exp(w)

    def curvature(self, u):
        return u

    def conjugate(self, w):
        return jnp.exp(w)

    def mean_step(self, S, Q):
        return S * jnp.log(S)

    def closed_root(self, total, q, y):
        return -jnp.log(total(q * jnp.exp(y)))

    def closed_share(self, q, s, tau):
        p = scaled_omega(s, tau, q)
        return p, p / (p + tau)

    def closed_blocks(self, z, sigma):
        # v = ln sum_B e^z - ln sigma(B) - ln n, which is infinite where sigma is 0.
        return lambda a, b: a - jnp.log(b), jnp.logaddexp, (z, sigma)


class ReverseKL(AbstractWellKnown):
    r"""Reverse Kullback-Leibler: $f(u) = -\ln u + u - 1$."""

    origin: ClassVar[float] = 1.0

    def value(self, u):
        return -jnp.log(u) + u - 1

    def link(self, u):
        return -1 / u

    def _inverse(self, w):
        return -1 / w

    def curvature(self, u):
        return u * u

    def conjugate(self, w):
        return -jnp.log(-w)

    def mean_step(self, S, Q):
        return S * (S - 1)


class ChiSquare(AbstractWellKnown):
    r"""Pearson's chi-square: $f(u) = (u - 1)^2 / 2$. Its operator is sparsemax."""

    sparse: ClassVar[bool] = True
    origin: ClassVar[float] = -1.0
    at_zero: ClassVar[float] = 0.5
    lift: ClassVar[float] = 0.5

    def value(self, u):
        return (u - 1) ** 2 / 2

    def link(self, u):
        return u

    def _inverse(self, w):
        return jnp.maximum(w, 0)

    def curvature(self, u):
        return jnp.sign(u)

    def conjugate(self, w):
        return jnp.maximum(w, 0) ** 2 / 2

    def mean_step(self, S, Q):
        return S - 1

    def closed_share(self, q, s, tau):
        share = q / (tau + q)
        return share * jnp.maximum(s, 0), jnp.where(s > 0, share, 0)

    def closed_blocks(self, z, sigma):
        # v = mean of z + 1 - n sigma over B
        parts = z - z.shape[0] * sigma, jnp.ones_like(sigma)
        return lambda a, b: a / b, jnp.add, parts


class Neyman(AbstractWellKnown):
    r"""Neyman's chi-square: $f(u) = (u - 1)^2 / (2u)$."""

    origin: ClassVar[float] = 0.5

    def value(self, u):
        return (u - 1) ** 2 / (2 * u)

    def link(self, u):
        return -0.5 / (u * u)

    def _inverse(self, w):
        return math.sqrt(0.5) / jnp.sqrt(-w)  # -2 w may overflow

    def curvature(self, u):
        return u * u * u

    def conjugate(self, w):
        return 1 - math.sqrt(2) * jnp.sqrt(-w)  # -2 w may overflow

    def mean_step(self, S, Q):
        return S * (S * S - 1) / 2


class SquaredHellinger(AbstractWellKnown):
    r"""Squared Hellinger distance: $f(u) = (\sqrt u - 1)^2$."""

    origin: ClassVar[float] = 1.0
    at_zero: ClassVar[float] = 1.0
    lift: ClassVar[float] = 1.0

    def value(self, u):
        return (positive_power(u, 0.5) - 1) ** 2

    def link(self, u):
        return -1 / jnp.sqrt(u)

    def _inverse(self, w):
        return 1 / (w * w)

    def curvature(self, u):
        return 2 * u * positive_power(u, 0.5)

    def conjugate(self, w):
        return -1 / w

    def mean_step(self, S, Q):
        root = jnp.sqrt(S)
        return 2 * S * (S - 1) / (root + 1)


class JensenShannon(AbstractWellKnown):
    r"""Jensen-Shannon, twice the textbook's: $f(u) = u \ln u - (u+1) \ln\frac{u+1}2$.

    The divergence is KL(p || m) + KL(q || m) with m = (p + q) / 2.
    """

    origin: ClassVar[float] = 0.6931471805599453  # ln 2
    at_zero: ClassVar[float] = 0.6931471805599453
    lift: ClassVar[float] = 0.6931471805599453

    def value(self, u):
        return xlogy(u, u) - (u + 1) * jnp.log1p((u - 1) / 2)

    def link(self, u):
        return -jnp.log1p(1 / u)

    def _inverse(self, w):
        return 1 / expm1_positive(-w)

    def curvature(self, u):
        return u * (1 + u)

    def conjugate(self, w):
        return -jnp.log(-jnp.expm1(w))

    def mean_step(self, S, Q):
        return S * (1 + S / Q) * jnp.log1p(Q * (S - 1) / (S + Q))


class Jeffreys(AbstractWellKnown):
    r"""Jeffreys' divergence, KL + reverse KL: $f(u) = (u - 1) \ln u$.

    - `at_most_one`: whether all ratios are; the operators set it.
    """

    at_most_one: bool = eqx.field(static=True, default=False, repr=False)
    origin: ClassVar[float] = 0.0

    def value(self, u):
        return (u - 1) * jnp.log(u)

    def link(self, u):
        return jnp.log(u) + 1 - 1 / u

    def _inverse(self, w):
        omega = wright_omega(1 - w, self.at_most_one)
        return jnp.where(w == -jnp.inf, 0, 1 / omega)

    def curvature(self, u):
        return u * u / (1 + u)

    def conjugate(self, w):
        omega = wright_omega(1 - w, self.at_most_one)
        return 1 / omega - jnp.log(omega) - 1

    def mean_step(self, S, Q):
        difference = jnp.log(S) + Q * (S - 1) / S
        return S * S / (Q + S) * difference

    def for_ratios(self, at_most_one):
        return Jeffreys(at_most_one)


class LeCam(AbstractWellKnown):
    r"""Le Cam's (triangular) divergence: $f(u) = (u - 1)^2 / (u + 1)$.

    - `at_most_one`: whether all ratios are; the operators set it.
    """

    # It has a pole and an edge of its support, 4 apart: v is counted from the one that
    # the ratios are nearer to.
    at_most_one: bool = eqx.field(static=True, default=False, repr=False)
    sparse: ClassVar[bool] = True
    at_zero: ClassVar[float] = 1.0
    lift: ClassVar[float] = 1.0

    @property
    def origin(self):
        return -3.0 if self.at_most_one else 1.0

    def value(self, u):
        return (u - 1) ** 2 / (u + 1)

    def link(self, u):
        if self.at_most_one:
            return 4 * u * (2 + u) / (1 + u) ** 2
        return -4 / (1 + u) ** 2

    def _inverse(self, w):
        if self.at_most_one:
            w = jnp.clip(w, 0, 4)
            root = jnp.sqrt(4 - w)
            return w / ((2 + root) * root)  # 2 / root - 1
        return jnp.maximum(2 / jnp.sqrt(-w) - 1, 0)

    def curvature(self, u):
        return jnp.where(u <= 0, 0, (u + 1) ** 3 / 8)

    def conjugate(self, w):
        if self.at_most_one:
            w = jnp.clip(w, 0, 4)
            return (w / (2 + jnp.sqrt(4 - w))) ** 2
        return jnp.maximum(2 - jnp.sqrt(-w), 0) ** 2

    def mean_step(self, S, Q):
        # 4 / (1 + 1/Q)^2 - 4 / (1 + S/Q)^2 over f''(S/Q) = 8 / (1 + S/Q)^3
        return (S - 1) * (2 * Q + S + 1) * (Q + S) / (2 * (Q + 1) ** 2)

    def for_ratios(self, at_most_one):
        return LeCam(at_most_one)  # pyright: ignore


@ft.partial(jax.jit, static_argnames="at_least_one")
def wright_omega(x: Array, at_least_one: bool = False) -> Array:
    """The w > 0 with w + ln w = x; in about half the time if no x is below 1.

    From a first value that is right to 7 percent (1 percent where x >= 1), one or two
    steps of the iteration of fourth order of Fritsch, Shafer and Crowley, "Algorithm
    443: Solution of the transcendental equation w e^w = x", 1973.
    """

    def improve(w):
        r = x - w - jnp.log(w)
        b = 2 * (1 + w) * (1 + w + 2 / 3 * r)
        return w + w * r * (b - r) / ((1 + w) * (b - 2 * r))

    # Beyond, w grows like x to rounding, and its powers would overflow.
    limit = 100 / jnp.finfo(x.dtype).eps
    beyond, x = jnp.maximum(x - limit, 0), jnp.minimum(x, limit)
    if at_least_one:
        w = improve(x - 4.2 * (x - 1) / (x + 7.5))
        return beyond + (w if x.dtype == jnp.float32 else improve(w))
    z = jnp.exp(jnp.minimum(x, 1))
    low = z * (1 + 4 / 3 * z) / (1 + 7 / 3 * z + 5 / 6 * z * z)
    w = jnp.where(x > 1, x - 4.2 * (x - 1) / (jnp.maximum(x, 1) + 7.5), low)
    # A loop, because XLA on the CPU would compute w anew for each of its uses.
    return beyond + repeat(improve, w, 2)


@jax.jit
def scaled_omega(s: Array, tau: Array, q: Array) -> Array:
    """The p with tau ln(p / q) + p = s."""
    t = s / tau + jnp.log(q / tau)
    least = jnp.log(jnp.finfo(s.dtype).tiny)
    p = tau * jnp.where(t > least, wright_omega(jnp.maximum(t, least)), 0)
    # What was lost in t.
    inside = p > 0
    safe = jnp.where(inside, p, 1)
    error = tau * jnp.log(safe / q) + safe - s
    return jnp.where(inside, jnp.maximum(p - p * error / (p + tau), 0), 0)


def expm1_positive(b: Array) -> Array:
    """e^b - 1 for b >= 0; faster on the CPU than `expm1`."""
    small, series = jnp.minimum(b, 0.35), 1.0
    for n in range(7 if b.dtype == jnp.float32 else 13, 1, -1):
        series = 1 + small / n * series
    return jnp.where(b < 0.35, small * series, jnp.exp(b) - 1)
