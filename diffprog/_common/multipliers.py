r"""Multipliers and penalties of rows h = 0 and g <= 0, entry by entry.

The augmented Lagrangian with multipliers y and a penalty c adds to an objective

$$y h + \tfrac c2 h^2, \qquad \tfrac{1}{2c} ([y + c g]_+^2 - y^2).$$

Its gradient is that of the Lagrangian at the multipliers y + c h and [y + c g]_+. All
hold at a penalty of 0 as well. `equal` says which entries are equalities. With a step
in place of c these multipliers are those after a step of ascent.

Source: Powell, 1969, Hestenes, 1969, and Rockafellar, 1973; see D. Bertsekas,
"Constrained Optimization and Lagrange Multiplier Methods", 1982.
"""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def merit(value: Array, dual: Array, penalty: Array, equal: Any) -> Array:
    """What an entry adds to the objective."""
    value = _above(value, dual, penalty, equal)
    return value * (dual + penalty * value / 2)


def _above(value: Array, dual: Array, penalty: Array, equal: Any) -> Array:
    """h and max(g, -y / c): an inequality is inactive below, the merit constant."""
    none = penalty <= 0
    least = -dual / jnp.where(none, 1, penalty)
    return jnp.maximum(value, jnp.where(equal | none, -jnp.inf, least))


@ft.partial(jax.custom_jvp, nondiff_argnums=(3,))
def priced(value: Array, dual: Array, penalty: Array, equal: bool) -> Array:
    """The merit, whose derivative in the value is the multiplier to the last bit."""
    return merit(value, dual, penalty, equal)


@priced.defjvp
def _(equal, primals, tangents):
    value, dual, penalty = primals
    above = _above(value, dual, penalty, equal)
    slopes = multiplier(value, dual, penalty, equal), above, above**2 / 2
    change = sum(slope * tangent for slope, tangent in zip(slopes, tangents))
    return merit(value, dual, penalty, equal), change


def multiplier(value: Array, dual: Array, penalty: Array, equal: Any) -> Array:
    """The derivative of the merit in the value: the multiplier of the next update."""
    new = dual + penalty * value
    return jnp.where(equal, new, jnp.maximum(new, 0))


def curvature(value: Array, dual: Array, penalty: Array, equal: Any) -> Array:
    """The second derivative of the merit in the value."""
    return jnp.where(equal | (dual + penalty * value > 0), penalty, 0)


def violation(value: Array, equal: Any) -> Array:
    """How far an entry is from being satisfied."""
    return jnp.where(equal, jnp.abs(value), jnp.maximum(value, 0))


def residual(value: Array, dual: Array, penalty: Array, equal: Any) -> Array:
    """How far an entry and its multiplier are from the conditions of optimality.

    |h| and |max(g, -y / c)|: the change of the multiplier by an update, over the
    penalty.
    """
    one = jnp.ones_like(penalty)
    slack = jnp.maximum(value, -dual / jnp.where(penalty > 0, penalty, one))
    return jnp.abs(jnp.where(equal, value, slack))


def complementarity(value: Array, dual: Array, equal: Any) -> Array:
    """|min(y, -g)|, and 0 for equalities."""
    return jnp.where(equal, 0, jnp.abs(jnp.minimum(dual, -value)))
