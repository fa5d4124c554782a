"""R' J J' R of a network of dense layers, layer by layer.

For z = W a + b the block of the examples i and j and the columns s and t of R is

    sum over layers of (a_i' a_j + 1) (S_i^s)' S_j^t,   S_i^s = d (R_i' f_i)_s / d z_i,

with + 1 where there is a bias: nothing has the size of the parameters.
"""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._chain.network import has_parameters, Network, Stack, Stage
from .._common.linalg import matmul
from .._common.tree import cast
from ._base import Layers, Linearization


def dense(layers: Layers | None) -> Layers | None:
    """These of a network, if all its parameters are those of dense layers."""
    if layers is None or not (layers.mapped and isinstance(layers.model, Network)):
        return None
    found = [layer for stack in layers.model.stacks for layer in _linear(stack.stage)]
    return layers if all(map(is_linear, found)) else None


def gram_flops(net: Network, m: int, k: int) -> float:
    """An estimate of the floating point operations of `gram`."""
    flops = 0.0
    for stack in net.stacks:
        for layer in _linear(stack.stage):
            inputs, outputs = layer.in_features, layer.out_features
            # k backward passes, products of activations and of sensitivities.
            one = 2 * k * m * inputs * outputs + 2 * m**2 * inputs
            flops += stack.size * (one + 2 * (m * k) ** 2 * outputs)
    return flops


def _linear(stage: Stage) -> list[Any]:
    return [layer for layer in stage.layers if has_parameters(layer)]


def is_linear(layer) -> bool:
    return isinstance(layer, eqx.nn.Linear) and "scalar" not in (
        layer.in_features,
        layer.out_features,
    )


def gram(layers: Layers, at: Linearization, factor) -> Array:
    """R' K R, with a row for every example and column of R."""
    net, inputs = layers.model, layers.inputs
    m, dtype = at.outputs.shape[0], at.outputs.dtype
    zeros = tuple(_zeros(stack, m, dtype) for stack in net.stacks)
    run = jax.vmap(lambda x, shifts: net.scan(_run, x, shifts))
    outputs = lambda shifts: run(inputs, shifts)
    own, pull, activations = jax.vjp(outputs, zeros, has_aux=True)
    rows = factor.rho.size // m
    unit = jnp.eye(rows, dtype=dtype).reshape(rows, 1, *factor.rho.shape[1:])
    columns = jnp.broadcast_to(unit, (rows, *factor.rho.shape))
    # (rows, m, [stages,] out)
    S = jax.vmap(lambda e: pull(factor.mv(e).astype(own.dtype))[0])(columns)
    S, activations = cast((S, activations), dtype)
    total = jnp.zeros((m, rows, m, rows), dtype)
    for stack, S_stack, A_stack in zip(net.stacks, S, activations, strict=True):
        dense = _linear(stack.stage)
        for layer, S_layer, A_layer in zip(dense, S_stack, A_stack, strict=True):
            for S_t, A_t in _stages(S_layer, A_layer, stack.size, m):
                inner = matmul(A_t, A_t.T) + (1 if layer.use_bias else 0)  # a_i'a_j + 1
                outer = matmul(S_t, S_t.T).reshape(total.shape)  # (S_i^s)'S_j^t
                total = total + inner[:, None, :, None] * outer
    return total.reshape(m * rows, m * rows)


def _stages(S: Array, A: Array, size: int, m: int) -> Iterator[tuple[Array, Array]]:
    """Sensitivities (m rows, out) and activations (m, in) of each of equal layers."""
    S = S.reshape(S.shape[0], m, size, -1)
    A = A.reshape(m, size, -1)
    for t in range(size):
        S_t = jnp.swapaxes(S[:, :, t], 0, 1)
        yield S_t.reshape(-1, S.shape[-1]), A[:, t]


def _zeros(stack: Stack, m: int, dtype: Any) -> tuple[Array, ...]:
    """Like the outputs of the dense layers of a run of equal stages."""
    rows = (m,) if stack.size == 1 else (m, stack.size)
    layers = _linear(stack.stage)
    return tuple(jnp.zeros((*rows, layer.out_features), dtype) for layer in layers)


def _run(stage: Stage, x, shifts):
    """The output of a stage whose dense layers are shifted, and their inputs."""
    shifts, inputs = list(shifts), []
    for layer in stage.layers:
        if has_parameters(layer):
            inputs.append(x)
            x = layer(x)
            x = x + shifts.pop(0).astype(x.dtype)
        else:
            x = layer(x)
    return x, tuple(inputs)
