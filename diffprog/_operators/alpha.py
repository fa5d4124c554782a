"""The alpha-divergences: of a fixed number, and of an array."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from .._common.types import came
from .divergence import AbstractDivergence
from .families import ChiSquare, expm1_over, KL, Neyman, positive_power, ReverseKL


def power(y: ArrayLike, exponent: float) -> Array:
    """y^exponent for y >= 0: products and roots where they do, else by logarithms."""
    if exponent == int(exponent):
        return lax.integer_pow(y, int(exponent))
    if 2 * exponent == int(2 * exponent):
        return lax.integer_pow(jnp.sqrt(y), int(2 * exponent))
    return jnp.exp(exponent * jnp.log(y))  # XLA's own power is slower on the CPU


class AbstractAlpha(AbstractDivergence):
    """What is alike for a number and for an array alpha."""

    alpha: eqx.AbstractVar[Any]

    @property
    def convex_ratio(self):
        return self.alpha <= 2

    def value(self, u):
        # Where alpha < 1/2 by f_a(u) = u f_{1-a}(1/u).
        alpha, dual = self.alpha, self.alpha < 0.5
        zero = u <= 0  # NaN is not
        safe = jnp.where(zero, 1, u)
        a, v = jnp.where(dual, 1 - alpha, alpha), jnp.where(dual, 1 / safe, safe)
        log = jnp.log(v)
        value = (v * log * expm1_over((a - 1) * log) - (v - 1)) / a
        value = jnp.where(dual, safe * value, value)
        positive = alpha > 0
        at_zero = jnp.where(positive, 1 / jnp.where(positive, alpha, 1), jnp.inf)
        return jnp.where(zero, at_zero, value)

    def curvature(self, u):
        return positive_power(u, 2 - self.alpha)

    def mean_step(self, S, Q):
        return S * jnp.log(S) * expm1_over((1 - self.alpha) * jnp.log(S))


class Power(AbstractAlpha):
    """The alpha-divergence of a number alpha: see [`diffprog.losses.Alpha`][]."""

    alpha: float = eqx.field(static=True)

    def __repr__(self):
        return f"Alpha({self.alpha:g})"

    @property
    def sparse(self):
        return self.alpha > 1

    @property
    def origin(self):
        return 1 / (1 - self.alpha)

    @property
    def at_zero(self):
        return 1 / self.alpha if self.alpha > 0 else math.inf

    @property
    def lift(self):
        return 1 / self.alpha if self.alpha > 0.1 else 0.0

    def link(self, u):
        e = self.alpha - 1
        at_zero = 0 if self.sparse else -math.inf  # with the derivative 0
        return jnp.where(u > 0, power(jnp.where(u > 0, u, 1), e) / e, at_zero)

    def pair(self, w):
        e = self.alpha - 1
        y = jnp.maximum(e * w, 0) if self.sparse else e * w
        if self.alpha < 1 or 2 / e != int(2 / e):  # else no logarithm is needed
            u = power(y, 1 / e)
            if e < -1:  # y may overflow where u is not negligible
                u = (-e) ** (1 / e) * power(-w, 1 / e)
            zero = u <= 0
            return u, jnp.where(zero, 0, u / jnp.where(zero, 1, y))
        if self.alpha > 2:  # the curvature is infinite at the edge of the support
            zero = y <= 0
            curvature = jnp.where(zero, 0, power(jnp.where(zero, 1, y), 1 / e - 1))
        else:
            curvature = power(y, 1 / e - 1)
        return curvature * y, curvature

    @property
    def both(self):
        # Where 1 < alpha < 2 and u is no product of roots.
        e = self.alpha - 1
        return self._powers if 0 < e < 1 and 2 / e != int(2 / e) else None

    def _powers(self, w):
        e = self.alpha - 1
        shape = (*(w.ndim - 1) * [1], 2, 1)
        exponents = jnp.reshape(jnp.asarray([1 / e, 1 / e - 1], w.dtype), shape)
        return jnp.exp(exponents * jnp.log(jnp.maximum(e * w, 0))[..., None, :])

    def conjugate(self, w):
        e = self.alpha - 1
        if self.lift:
            u, _ = self.pair(w)
            return u * jnp.where(u > 0, e * w, 0) * self.lift
        log = (jnp.log(-w) + math.log(-e)) / e  # ln u
        return log * expm1_over(self.alpha * log)


class TracedAlpha(AbstractAlpha):
    """The alpha-divergence of an array alpha: see [`diffprog.losses.Alpha`][].

    Where alpha is near 1, and v_0 or v_inf far away, v is counted from 0.
    """

    alpha: Float[Array, "..."]
    sparse: ClassVar[bool] = True
    support_known: ClassVar[bool] = False

    def __repr__(self):
        if isinstance(self.alpha, Tracer) or jnp.ndim(self.alpha):
            return f"Alpha({eqx.tree_pformat(self.alpha)})"
        return f"Alpha({self.alpha:g})"

    @property
    def near(self):
        return jnp.abs(self.alpha - 1) <= 0.1

    @property
    def origin(self):
        return jnp.where(self.near, 0, 1 / jnp.where(self.near, 1, 1 - self.alpha))

    @property
    def at_zero(self):
        positive = self.alpha > 0
        return jnp.where(positive, 1 / jnp.where(positive, self.alpha, 1), jnp.inf)

    @property
    def lift(self):
        large = self.alpha > 0.1
        return jnp.where(large, 1 / jnp.where(large, self.alpha, 1), 0)

    def link(self, u):
        e, near, log = self.alpha - 1, self.near, jnp.log(jnp.where(u > 0, u, 1))
        far = jnp.exp(e * log) / jnp.where(near, 1, e)
        link = jnp.where(near, log * expm1_over(e * log), far)
        at_zero = jnp.where(near, -1 / jnp.where(e > 0, e, 1), 0)
        return jnp.where(u > 0, link, jnp.where(e > 0, at_zero, -jnp.inf))

    def logarithms(self, w):
        """ln u and y = u^(alpha - 1); -inf and 1 where u is 0."""
        e, near = self.alpha - 1, self.near
        y = jnp.where(near, 1 + e * w, e * w)
        inside = ~(y <= 0) & (jnp.abs(w) != jnp.inf)  # NaN is
        y, scale = jnp.where(inside, y, 1), jnp.maximum(jnp.abs(e), 1)
        # ln(1 + x) / x = ln(y) / (y - 1) for y = 1 + x as it was rounded.
        t = jnp.where(near, y - 1, e)
        # y itself may overflow.
        scaled = jnp.where(near, y, jnp.where(inside, e / scale * w, 1))
        log = jnp.log(scaled) + jnp.where(inside, jnp.log(scale), 0)
        log = log * (jnp.where(near, w, 1) / jnp.where(t == 0, 1, t))
        log = jnp.where(t == 0, w, log)
        return jnp.where(inside, log, -jnp.inf), y

    def pair(self, w):
        log, y = self.logarithms(w)
        u = jnp.exp(log)
        return u, u / y

    def conjugate(self, w):
        log, y = self.logarithms(w)
        lifted, plain = jnp.exp(log) * y * self.lift, log * expm1_over(self.alpha * log)
        return jnp.where(self.alpha > 0.1, lifted, plain)

    def drift(self, df, u):
        e, near, log = self.alpha - 1, self.near, jnp.log(jnp.where(u > 0, u, 1))
        far = (1 - e * log) / jnp.where(near, 1, e) ** 2
        change = jnp.where(near, log * log * second_remainder(e * log), far)
        return jnp.where(u <= 0, 0, u * change) * df.alpha


def second_remainder(z: Array) -> Array:
    """(1 - e^-z - z) / z^2, which is -1/2 at 0; differentiable there."""
    small = jnp.abs(z) < 0.5
    large, z = jnp.where(small, 1, z), jnp.where(small, z, 0)
    series = 1.0
    for n in range(16, 2, -1):
        series = 1 - z / n * series
    return jnp.where(small, -series / 2, (-jnp.expm1(-large) - large) / large**2)


NAMED = {1.0: KL(), 0.0: ReverseKL(), 2.0: ChiSquare(), -1.0: Neyman()}


def written(f: AbstractDivergence) -> str:
    """A generator as it may have been written: `Alpha` has other names for some."""
    also = [f" = Alpha({a:g})" for a, named in NAMED.items() if f == named]
    return "".join([repr(f), *also])


def Alpha(alpha: float | Float[Array, "..."]) -> AbstractDivergence:
    r"""The alpha-divergence.

    $$f(u) = \frac{u^\alpha - 1 - \alpha (u - 1)}{\alpha (\alpha - 1)}.$$

    $\alpha = 1$ is KL, 0 reverse KL, 2 chi-square, -1 Neyman, 1/2 twice the squared
    Hellinger distance. With the reference "unit", 1.5 is 1.5-entmax, 2 sparsemax, and
    any $\alpha > 1$ alpha-entmax. Ratios can be 0 where $\alpha > 1$. Other authors
    count otherwise: Amari's alpha is $1 - 2\alpha$ or $2\alpha - 1$, the lambda of
    Cressie and Read $\alpha - 1$.

    **Arguments:**

    - `alpha`: a Python number, which is static and has code of its own, or an array,
        which is traced and differentiable; its shape broadcasts against that of the
        scores without their class axis, or with length 1 there, as in entmax, so that
        it can differ from row to row.

    **Returns:** a generator.

    **Raises:** `ValueError` if `alpha` is not finite, where that is known.

    Source: that of [`diffprog.losses.f_softargmax`][].
    """
    if isinstance(alpha, (jax.Array, np.ndarray)):
        array = jnp.asarray(alpha)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"`alpha` is an array of dtype {array.dtype}; a Python number or an "
                "array of floats is expected."
            )
        if not isinstance(alpha, Tracer) and not np.isfinite(alpha).all():
            raise ValueError(f"`alpha` is {alpha}; finite numbers are expected.")
        return TracedAlpha(array)  # pyright: ignore
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.number)):
        raise TypeError(f"`alpha` is {came(alpha)}; a number or an array is expected.")
    number = float(alpha)
    if not math.isfinite(number):
        raise ValueError(f"`alpha` is {number}; a finite number is expected.")
    if number in NAMED:
        return NAMED[number]
    if abs(number - 1) <= 0.1:
        return TracedAlpha(jnp.asarray(number))  # pyright: ignore
    return Power(number)  # pyright: ignore
