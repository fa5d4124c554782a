"""The model of Gauss-Newton in the span of the inputs of each dense layer.

For z = W a + b the derivative of the next state in [W b] is G (a', 1), G = dx'/dz, for
every example. With (a', 1) = L Q' for the batch, Q'Q = I, only w = [W b] Q matters:
what is orthogonal to Q has the damping alone. So the recursion runs with the controls
w, and a pivot has the size min(examples, inputs + 1) outputs.
"""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..._chain.network import is_linear, Stage
from ..._chain.segment import Segment
from ..._chain.vector import VectorTrajectory
from ..._chain.vectorize import Vectorized
from ..._common.linalg import matmul
from ..._common.tree import Layout
from ..._common.types import Rows
from ..lqr.expand import affine, terminal
from .recursion import Model


def in_inputs(at: Vectorized, trajectory: VectorTrajectory, params: tuple) -> Model:
    """The model of Gauss-Newton in the span of the inputs of each dense layer."""
    problem: Any = at.problem
    net, chain = problem.network.with_params(params), at.chain
    columns, fixed = [], []
    for i, (stack, segment) in enumerate(zip(net.stacks, chain.segments, strict=True)):
        arrays, rest = eqx.partition(stack.stage, eqx.is_array)
        if stack.size == 1:
            arrays = jtu.tree_map(lambda a: a[None], arrays)

        def stage(arrays, *row, i=i, segment=segment, rest=rest):
            return _blocks(eqx.combine(arrays, rest), segment, at.x_layouts[i], *row)

        rows = arrays, trajectory.xs[i], trajectory.us[i], chain.ts[i]
        columns.append(jax.vmap(stage)(*rows))
        fixed.append(trajectory.us[i].shape[1] - columns[i][2].shape[1])
    F, W, ws, bases = zip(*columns, strict=True)

    def step(ws: Rows) -> PyTree:
        stages = zip(problem.split(params), bases, ws, strict=True)
        return problem.join_controls(tuple(_unfolded(*stage) for stage in stages))

    V = terminal(chain, trajectory.final)
    return Model(F, W, V, ws, step, tuple(fixed))


def _dense(stage: Stage) -> int:
    """Which of its layers is the dense one."""
    return list(map(is_linear, stage.layers)).index(True)


def _blocks(stage: Any, segment: Segment, layout: Layout, x: Array, u: Array, t):
    """F and W of a stage in w, any w, and its Q."""
    i = _dense(stage)
    before, layer, after = stage.layers[:i], stage.layers[i], stage.layers[i + 1 :]
    a = jax.vmap(Stage(before))(layout.unravel(x))
    outputs = lambda z: jnp.ravel(Stage(after)(z))
    G = jax.vmap(jax.jacfwd(outputs))(jax.vmap(layer)(a))
    ones = jnp.ones_like(a[:, :1])
    L, Q = _factored(jnp.concatenate([a, ones], 1) if layer.use_bias else a)
    rows, n = G.shape[0] * G.shape[1], 0
    B = _einsum("ik,iab->iakb", L, G).reshape(rows, -1)
    blocks, m = [B], B.shape[1]
    if segment.start > 0 or segment.horizon > 1:  # else x is data, and does not change
        eye = jnp.eye(len(a), dtype=a.dtype)
        A = _einsum("iab,ij->iajb", matmul(G, layer.weight), eye)
        blocks, n = [A.reshape(rows, -1), B], x.size
    F = affine(jnp.zeros_like(B[:, 0]), jnp.concatenate(blocks, 1))
    W = jnp.zeros((1 + n + m, 1 + n + m), B.dtype)
    if n:  # zero, but for a metric of these states
        hessian = jax.hessian(lambda x: segment.cost(x, u, t))(x)
        W = W.at[1 : 1 + n, 1 : 1 + n].set(hessian)
    return F, W, jnp.zeros_like(B[0]), Q


_einsum = ft.partial(jnp.einsum, precision="highest")


def _factored(X: Array) -> tuple[Array, Array]:
    """L and Q with X = L Q' and Q'Q = I."""
    if X.shape[0] >= X.shape[1]:
        return X, jnp.eye(X.shape[1], dtype=X.dtype)
    Q, R = jnp.linalg.qr(X.T)
    return R.T, Q


def _unfolded(params: Any, Q: Array, w: Array) -> Stage:
    """[W b] = w Q' for equal stages, in the place of their parameters."""
    i = _dense(params)
    both = jax.vmap(lambda Q, w: matmul(Q, w.reshape(Q.shape[1], -1)).T)(Q, w)
    columns = params.layers[i].weight.shape[-1]
    found = (both[..., :columns],)
    if params.layers[i].use_bias:
        found += (both[..., columns],)
    own = lambda stage: (stage.layers[i].weight, stage.layers[i].bias)[: len(found)]
    return eqx.tree_at(own, params, found)
