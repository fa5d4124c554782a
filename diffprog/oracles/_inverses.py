r"""Regularized inverses of layers: what moves the output of a layer by a given amount.

For $y = a(W x + b)$ with elementwise a, a change D of y asks for the change

    (W'W + r I)^{-1} W' (a^{-1}(y + D) - a^{-1}(y))

of x, which to first order is (W'W + r I)^{-1} W' (D / a'); for any other layer with the
Jacobian A, it is (A'A + r I)^{-1} A' D.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._chain.network import has_parameters, Stage
from .._chain.recurrent import Recurrent, RNNCell
from .._common.conjugate_gradients import solve_cg
from .._common.inner import regularized_fit, tree_size
from .._common.jacobian import products
from .._common.linalg import matmul, solve_positive
from .._common.tree import add, cast, working_dtype
from ._gram import is_linear
from ._rules import RuleBoundary


DENSE = 32  # up to this size the Jacobian of a layer is formed, for each example


# Activations ----------------------------------------------------------------------


class Activation(NamedTuple):
    """The inverse of an elementwise function a, which exists away from its limits.

    Values y = a(z) are first moved `eps` into the range of a.

    - `linearized(y, D, eps)`: D / a'(z).
    - `difference(y, D, eps)`: the change of z that changes y by D, without
        cancellation.
    """

    linearized: Callable
    difference: Callable


def _within(low: Any, high: Any, slope: Callable, change: Callable) -> Activation:
    """Of a function with this range: a' at a value c, and what z changes with c by d.

    A change that would leave the range is cut off.
    """

    def moved(y, D, eps):
        c = jnp.clip(y, low + eps, high - eps)
        return c, jnp.clip(D + (y - c), low + eps - c, high - eps - c)

    linearized = lambda y, D, eps: D / slope(jnp.clip(y, low + eps, high - eps))
    return Activation(linearized, lambda y, D, eps: change(*moved(y, D, eps)))


_identity = Activation(lambda y, D, eps: D, lambda y, D, eps: D)
_tanh = _within(
    -1,
    1,
    lambda c: (1 - c) * (1 + c),
    lambda c, d: jnp.arctanh(d / (1 - c * (c + d))),
)
_sigmoid = _within(
    0, 1, lambda c: c * (1 - c), lambda c, d: jnp.log1p(d / (c * (1 - c - d)))
)
_softplus = _within(
    0,
    jnp.inf,
    lambda c: -jnp.expm1(-c),
    lambda c, d: jnp.log1p(jnp.expm1(d) / -jnp.expm1(-c)),
)
_relu = Activation(  # its own pseudo-inverse
    lambda y, D, eps: jnp.where(y > 0, D, 0), lambda y, D, eps: jnp.maximum(D, -y)
)

_KNOWN = (
    (jax.nn.identity, _identity),
    (jnp.tanh, _tanh),  # and `jax.nn.tanh`
    (jax.lax.tanh, _tanh),
    (jax.nn.sigmoid, _sigmoid),
    (jax.nn.softplus, _softplus),
    (jax.nn.relu, _relu),
)


def activation_of(fn: Any) -> Activation | None:
    """Its inverse, if the function is known."""
    return next((activation for known, activation in _KNOWN if fn is known), None)


# Layers ---------------------------------------------------------------------------


class Dense(NamedTuple):
    """y = a(W x + b), after functions without parameters."""

    before: tuple[Callable, ...]
    linear: eqx.nn.Linear
    activation: Activation | None  # None for none


class RecurrentLayer(NamedTuple):
    """A recurrent layer between functions without parameters."""

    before: tuple[Callable, ...]
    recurrent: Recurrent
    after: tuple[Callable, ...]

    def output(self, states: PyTree) -> PyTree:
        """The output of the layer, from all states of its recurrent part."""
        if not self.recurrent.sequence:
            states = jtu.tree_map(lambda a: a[-1], states)
        return compose(self.after)(states)


def view(layer: Any) -> Dense | RecurrentLayer | None:
    """What the layer is, if it is one of these."""
    parts = _parts(layer)
    places = [i for i, part in enumerate(parts) if has_parameters(part)]
    if len(places) != 1:
        return None
    i = places[0]
    before, part, after = parts[:i], parts[i], parts[i + 1 :]
    if isinstance(part, Recurrent):
        return RecurrentLayer(before, part, after)
    if not is_linear(part):
        return None
    activation = activation_of(after[0]) if len(after) == 1 else None
    return None if after and not activation else Dense(before, part, activation)


def _parts(layer: Any) -> tuple[Any, ...]:
    if isinstance(layer, Stage | eqx.nn.Sequential):
        return sum(map(_parts, layer.layers), ())
    if isinstance(layer, RuleBoundary):
        return _parts(layer.layer)
    return (layer.fn,) if isinstance(layer, eqx.nn.Lambda) else (layer,)


def compose(functions: tuple[Callable, ...]) -> Callable:
    def composed(x):
        for function in functions:
            x = function(x)
        return x

    return composed


def as_recurrent(layer: Callable) -> RecurrentLayer:
    parts = view(layer)
    assert isinstance(parts, RecurrentLayer)
    return parts


def cell_activation(cell: Any) -> Activation | None:
    """That of a plain cell, if it is known."""
    return activation_of(cell.activation) if isinstance(cell, RNNCell) else None


# Inverses -------------------------------------------------------------------------


def regularized_inverse(W: Float[Array, "k n"], r: Any) -> Float[Array, "n k"]:
    """(W'W + r I)^{-1} W' = W' (W W' + r I)^{-1}, by the smaller; NaN if singular."""
    k, n = W.shape
    if k < n:
        return regularized_inverse(W.T, r).T
    W_W = matmul(W.T, W) + r * jnp.eye(n, dtype=W.dtype)
    inverse, positive = solve_positive(W_W, W.T)
    return jnp.where(positive, inverse, jnp.nan)


def gauss_newton(fn: Callable, x: PyTree, message: PyTree, r: Any) -> PyTree:
    """(A'A + r I)^{-1} A' D, with A the Jacobian of `fn` at x.

    In the smaller of both spaces, and by conjugate gradients where that is large.
    """
    x, others = eqx.partition(x, eqx.is_inexact_array)
    if not jtu.tree_leaves(x):
        return x
    run = lambda x: (fn(eqx.combine(x, others)), None)
    y, A, At, _ = products(run, x)
    x, y = cast((x, y), working_dtype(message))
    if min(tree_size(x), tree_size(y)) <= DENSE:
        return regularized_fit(A, At, x, message, r)
    b, product = At(message), lambda v: add(At(A(v)), v, r)
    rtol = float(jnp.finfo(working_dtype(b)).eps) ** 0.75
    return solve_cg(product, b, 10 * tree_size(b), rtol)
