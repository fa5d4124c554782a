"""Divergences whose generator is any function of the user."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array

from .._common.capture import Frozen
from .._common.changes import check_held
from .._common.loops import repeat
from .._common.types import came, check_callable, noted
from .._common.written import taken_back
from .divergence import AbstractDivergence, check_answers


class Generated(AbstractDivergence):
    """The divergence of a function of the user: see [`diffprog.losses.generator`][]."""

    fn: Callable = eqx.field(static=True)
    sparse: ClassVar[bool] = True
    convex_ratio: ClassVar[bool] = False
    origin: ClassVar[float] = 0.0
    lift: ClassVar[float] = 0.0
    support_known: ClassVar[bool] = False

    def __repr__(self):
        return f"generator({getattr(self.fn, '__name__', self.fn)})"

    # Ratios are looked for between e^-REACH and e^REACH.
    REACH: ClassVar[float] = 64.0

    @property
    def at_zero(self):
        return self.value(jnp.zeros(()))

    def _derivative(self, u):
        return _elementwise(jax.grad(self.fn), u)

    def value(self, u):
        one = jnp.ones_like(u)
        line = _elementwise(self.fn, one) + self._derivative(one) * (u - 1)
        f, least = _elementwise(self.fn, u), jnp.exp(-self.REACH * one)
        # Such as u ln u at 0.
        f = jnp.where((u == 0) & jnp.isnan(f), _elementwise(self.fn, least), f)
        return f - line

    def link(self, u):
        return self._derivative(u) - self._derivative(jnp.ones_like(u))

    def pair(self, w):
        # f' grows with ln u: halve until the digits end.
        def halve(bounds):
            low, high = bounds
            middle = (low + high) / 2
            above = self.link(jnp.exp(middle)) > w
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        reach = jnp.full_like(w, self.REACH)
        steps = 8 + jnp.finfo(w.dtype).nmant
        low, high = repeat(halve, (-reach, reach), steps)
        u = jnp.where(low > -reach, jnp.exp((low + high) / 2), 0)
        u = jnp.where(jnp.isnan(w), w, u)
        return u, self.curvature(u)

    def curvature(self, u):
        second = _elementwise(jax.grad(jax.grad(self.fn)), jnp.where(u <= 0, 1, u))
        return jnp.where(u <= 0, 0, 1 / second)

    def conjugate(self, w):
        u, _ = self.pair(w)
        return jnp.where(u > 0, u * w, 0) - self.value(u)

    def mean_step(self, S, Q):
        return S - 1


def _elementwise(fn: Callable, u: Array) -> Array:
    return jax.vmap(fn)(jnp.ravel(u)).reshape(jnp.shape(u))


def generator(fn: Callable) -> AbstractDivergence:
    r"""The divergence of any strictly convex function f, given as a JAX function.

    f need not be normalized: $f(u) - f(1) - f'(1) (u - 1)$ is used. The inverse of f'
    is found by halving, some 30 (float32) or 60 (float64) evaluations of f' for every
    class and evaluation of the sums: for trying things out. Ratios are looked for
    between $e^{-64}$ and $e^{64}$; below, they are 0.

    **Arguments:**

    - `fn`: u -> f(u) for a scalar u > 0, twice differentiable. Numbers that it takes
        from around it are constants: no derivatives flow to them.

    **Returns:** a generator; the operators also take `fn` itself.

    **Raises:** `ValueError` if f'' is not positive somewhere between 1e-4 and 1e4.
    """
    expected = "a generator such as `dp.losses.KL()` or a function of one number"
    check_callable("f", fn, expected)
    name = getattr(fn, "__name__", fn)
    given = lambda: f"`f` is {name}, which was called with one number."
    with taken_back(fn), noted(given):
        value = fn(jnp.ones(()))
    if not eqx.is_array_like(value) or jnp.shape(value) != ():
        raise TypeError(
            f"`f` is {name}, which returned {came(value)} for a number; f(u), one "
            "number, is expected, or a generator such as `dp.losses.Alpha(1.5)`."
        )
    frozen = Frozen(fn)
    with jax.ensure_compile_time_eval():
        grid = jnp.geomspace(1e-4, 1e4, 81)
        second = np.asarray(jax.vmap(jax.grad(jax.grad(frozen)))(grid))
    bad = ~(second > 0)
    if bad.any():
        u, value = float(grid[bad.argmax()]), float(second[bad.argmax()])
        raise ValueError(
            f"f''({u:.3g}) = {value:.3g}; a generator is strictly convex: f'' > 0."
        )
    return Generated(frozen)  # pyright: ignore


def as_divergence(f: AbstractDivergence | Callable) -> AbstractDivergence:
    """Generators as they are, functions as generators."""
    if not isinstance(f, AbstractDivergence):
        return generator(f)
    check_held(f)
    check_answers(jtu.tree_structure(f))
    return f
