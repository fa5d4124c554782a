"""R' J J' R of a network of dense layers, layer by layer.

For z = W a + b the block of the examples i and j and the columns s and t of R is

    sum over layers of (a_i' a_j + 1) (S_i^s)' S_j^t,   S_i^s = d (R_i' f_i)_s / d z_i,

with + 1 where there is a bias: nothing has the size of the parameters.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._chain.network import (
    has_parameters,
    is_linear,
    Network,
    parametrized,
    Stage,
)
from .._common.linalg import matmul
from .._common.tree import cast, vary
from ..losses._factor import AbstractFactor
from ._base import Layers, Linearization


def dense(layers: Layers | None) -> Layers | None:
    """These of a network, if all its parameters are those of dense layers."""
    if layers is None or not (layers.mapped and isinstance(layers.model, Network)):
        return None
    return layers if all(map(is_linear, parametrized(layers.model))) else None


def gram_flops(net: Network, m: int, k: int) -> float:
    """An estimate of the floating point operations of `gram`."""
    flops = 0.0
    for stack, layer in zip(net.stacks, parametrized(net), strict=True):
        inputs, outputs = layer.in_features, layer.out_features
        # k backward passes, products of activations and of sensitivities.
        one = 2 * k * m * inputs * outputs + 2 * m**2 * inputs
        flops += stack.size * (one + 2 * (m * k) ** 2 * outputs)
    return flops


def gram(layers: Layers, at: Linearization, factor) -> Array:
    """R' K R, with a row for every example and column of R."""
    net, m = layers.model, at.outputs.shape[0]
    rows = factor.rho.size // m
    found = sensitivities(net, layers.inputs, columns(factor))
    total = jnp.zeros((m, rows, m, rows), at.outputs.dtype)
    for layer, (S, A) in zip(parametrized(net), found, strict=True):
        for S_t, A_t in zip(S, A, strict=True):
            S_t = S_t.reshape(m * rows, -1)
            inner = matmul(A_t, A_t.T) + (1 if layer.use_bias else 0)  # a_i'a_j + 1
            outer = matmul(S_t, S_t.T).reshape(total.shape)  # (S_i^s)'S_j^t
            total = total + inner[:, None, :, None] * outer
    return total.reshape(m * rows, m * rows)


def columns(factor: AbstractFactor) -> Array:
    """Those of R: for each a row of the shape of the outputs."""
    rows, dtype = factor.rho[0].size, factor.rho.dtype
    unit = jnp.eye(rows, dtype=dtype).reshape(rows, 1, *factor.rho.shape[1:])
    return jax.vmap(factor.mv)(jnp.broadcast_to(unit, (rows, *factor.rho.shape)))


def sensitivities(
    net: Network, inputs: PyTree, cotangents: Array
) -> list[tuple[Array, Array]]:
    """S and A of every run of equal stages: gradients in z = W a + b, and the a.

    S has shape `(stages, m, rows, out)`, from one backward pass for each row of
    `cotangents`, shape `(rows, m, ...)`; A has shape `(stages, m, in)`.
    """
    (rows, m), dtype = cotangents.shape[:2], cotangents.dtype
    zeros = tuple(
        jnp.zeros((m, *(stack.size,) * (stack.size > 1), layer.out_features), dtype)
        for stack, layer in zip(net.stacks, parametrized(net), strict=True)
    )
    zeros = vary(zeros, like=(net, inputs, cotangents))
    run = jax.vmap(lambda x, shifts: net.scan(_run, x, shifts))
    outputs, pull, activations = jax.vjp(ft.partial(run, inputs), zeros, has_aux=True)
    S = jax.vmap(lambda v: pull(v.astype(outputs.dtype))[0])(cotangents)
    found = []
    for stack, S_t, A_t in zip(net.stacks, *cast((S, activations), dtype), strict=True):
        S_t = S_t.reshape(rows, m, stack.size, -1)
        A_t = A_t.reshape(m, stack.size, -1)
        found.append((S_t.transpose(2, 1, 0, 3), A_t.swapaxes(0, 1)))
    return found


def _run(stage: Stage, x, shift):
    """The output of a stage whose dense layer is shifted, and its input."""
    inputs = x
    for layer in stage.layers:
        if has_parameters(layer):
            inputs, x = x, layer(x)
            x = x + shift.astype(x.dtype)
        else:
            x = layer(x)
    return x, inputs
