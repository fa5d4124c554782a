"""Gradients of dense layers, multiplied by inverse Kronecker factors of a curvature."""

import functools as ft
import itertools as it
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from .._chain.network import has_parameters, is_linear, Network, parametrized
from .._common.linalg import matmul
from .._common.tree import all_finite, cast, no, where, working_dtype
from .._common.types import (
    check_count,
    check_key,
    check_not_negative,
    Number,
    Stacks,
)
from ._checks import check_average, check_curvature, check_like, rate_is
from ._curvature import Batch, Curvature
from ._factors import factors_of, inverses
from ._recipes import GGN


Factors = Literal["exact", "sampled"]


class KFACState(eqx.Module):
    """What [`diffprog.optim.kfac`][] remembers of every run of equal layers.

    - `A`, `G`: running means, not yet divided by `weight`. There is one array for each
        run, of shapes `(layers, n, n)` for inputs, with 1 where there is a bias, and
        `(layers, k, k)` for outputs.
    - `weight`: by which they are divided.
    - `A_inverse`, `G_inverse`: those of the damped means; at first the identity.
    - `count`: the number of updates.
    - `since`: that from the last new factors on.
    - `refused`: how many updates had a gradient, or factors, that are not finite, or
        factors without an inverse. Nothing of these is kept.
    - `seed`: of the samples.
    """

    A: Stacks
    G: Stacks
    weight: Float[Array, ""]
    A_inverse: Stacks
    G_inverse: Stacks
    count: Int[Array, ""]
    since: Int[Array, ""]
    refused: Int[Array, ""]
    seed: UInt32[Array, ""]


@rate_is("chain it with `optax.scale_by_learning_rate(0.1)`, or see `model_step`")
def kfac(
    *,
    damping: Number = 3e-3,
    ema: Number = 0.95,
    every: int = 5,
    burn_in: int = 10,
    factors: Factors = "exact",
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies gradients of a network by Kronecker factors of its curvature.

    ```python
    direction = optax.chain(dp.optim.kfac(), optax.scale(-1.0))
    optimizer = dp.optim.model_step(direction, previous=True, scale=1.0, ema=0.0)
    at = curvature(net, inputs, targets)
    updates, state = optimizer.update(grads, state, params, curvature=at)
    ```

    For a dense layer with inputs a, to which 1 is appended, and the Jacobian S of the
    outputs of the network in those of the layer

    $$V = \Bigl(G + \tfrac{\sqrt\rho}\pi I\Bigr)^{-1}
    \begin{bmatrix} \nabla_W & \nabla_b \end{bmatrix}
    \bigl(A + \pi \sqrt\rho \, I\bigr)^{-1}, \quad
    A = \overline{a a^\top}, \; G = c \sum_i S_i^\top H_i S_i,$$

    $$\pi^2 = \frac{\operatorname{tr} A / \dim A}{\operatorname{tr} G / \dim G},$$

    where the bar is the mean over the examples that the loss counts, and H and c are
    those of the curvature. Of both factors there are running means. V is no step yet:
    it has the direction of the gradient, and no trusted length, which
    [`diffprog.optim.model_step`][] finds.

    **Arguments:**

    - `damping`: rho >= 0; 0 only where no factor is singular.
    - `ema`: from 0 to below 1, the weight of the past in the running means.
    - `every`: factors and inverses are found anew every so many updates, and at each of
        the first `burn_in` updates, in which parameters move most.
    - `factors`: `"exact"`, H as it is, by one backward pass for every output; or
        `"sampled"`, from R e in place of R, with H = R R' and random signs e: one
        backward pass, and G on average.
    - `key`: for the samples; `jax.random.key(0)` if there is none.

    **Returns:** an optax transformation of the parameters of a
    [`diffprog.Network`][] whose parameters are those of `eqx.nn.Linear`, with any
    functions between them. `update` needs `curvature=`, that of
    [`diffprog.optim.ggn`][] or [`diffprog.optim.fisher`][]. Its state is a
    [`diffprog.optim.KFACState`][].

    **Fails:** a gradient that is not finite gives 0, and factors that cannot be used
    are refused: those of before are kept, and the next update tries again;
    `state.refused` counts both. `TypeError` for a model that is no such network, which
    names its layer; `TypeError` and `ValueError` for other wrong calls.

    Costs for new factors a forward pass, the backward passes, and for a layer of n
    inputs and k outputs O(m n^2 + m p k^2) operations, with p the outputs of the
    network, or 1 where they are sampled, and O(n^3 + k^3) for the inverses; an update
    O(n k (n + k)). The state has two arrays of the size of every factor; while G is
    found there are p values for every activation, and the `batch_size` of the curvature
    says for how many examples at once.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature", 2015, arXiv 1503.05671.
    """
    check_not_negative("damping", damping)
    check_average("ema", ema)
    check_count("every", every)
    if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
        raise ValueError(f"`burn_in` is {burn_in!r}; a Python int >= 0 is expected.")
    if factors not in ("exact", "sampled"):
        raise ValueError(f'`factors` is {factors!r}; "exact" or "sampled" is expected.')
    if key is not None:
        check_key(key)
    init: Any = ft.partial(_init, key)
    update: Any = ft.partial(_update, _Options(damping, ema, every, burn_in, factors))
    return optax.GradientTransformationExtraArgs(init, update)


class _Options(eqx.Module):
    """What `kfac` was given."""

    damping: Any
    ema: Any
    every: int
    burn_in: int
    factors: Factors


def is_dense(params: Any) -> bool:
    """Whether these are the parameters of a network of dense layers."""
    return isinstance(params, Network) and _other_layer(params) is None


def _other_layer(params: Network) -> tuple[int, Any] | None:
    """The first stage whose parameters are not those of a dense layer, and the layer.

    There is no layer where `optax.masked` left it out.
    """
    number = 0
    for stack in params.stacks:
        layer = next(filter(has_parameters, stack.stage.layers), None)
        if not is_linear(layer):
            return number, layer
        number += stack.size
    return None


def check_dense(params: Any):
    """Raises for other parameters, and names the layer."""
    otherwise = (
        "`dp.optim.recommended()` takes another form for such a model, or "
        "`dp.optim.model_step` with the optimizer of your choice."
    )
    if not isinstance(params, Network):
        raise TypeError(
            f"`params` is a {type(params).__name__}; those of a `dp.Network` of dense "
            "layers are expected, `eqx.filter(net, eqx.is_inexact_array)`. Else "
            f"{otherwise}"
        )
    found = _other_layer(params)
    if found is None:
        return
    number, layer = found
    if layer is None:
        raise TypeError(
            f"Stage {number} of the network has no parameters here; K-FAC is of whole "
            "networks. Give `optax.masked` what comes behind it in the chain."
        )
    raise TypeError(
        f"Stage {number} of the network is a {type(layer).__name__}; K-FAC has factors "
        f"of `eqx.nn.Linear` between vectors only. {otherwise}"
    )


def _init(key: PRNGKeyArray | None, params: PyTree) -> KFACState:
    check_dense(params)
    dtype, sizes = working_dtype(eqx.filter(params, eqx.is_inexact_array)), []
    for stack, layer in zip(params.stacks, parametrized(params), strict=True):
        n = layer.in_features + (layer.bias is not None)
        sizes.append(((stack.size, n), (stack.size, layer.out_features)))
    zeros = lambda size, n: jnp.zeros((size, n, n), dtype)
    unit = lambda size, n: jnp.tile(jnp.eye(n, dtype=dtype), (size, 1, 1))
    of_inputs, of_outputs = zip(*sizes, strict=True)
    number = lambda dtype=jnp.int32: jnp.zeros((), dtype)
    return KFACState(
        A=tuple(it.starmap(zeros, of_inputs)),
        G=tuple(it.starmap(zeros, of_outputs)),
        weight=number(dtype),
        A_inverse=tuple(it.starmap(unit, of_inputs)),
        G_inverse=tuple(it.starmap(unit, of_outputs)),
        count=number(),
        since=number(),
        refused=number(),
        seed=jr.bits(jr.key(0) if key is None else key, (), jnp.uint32),
    )


def _update(
    options: _Options,
    updates: PyTree,
    state: KFACState,
    params: PyTree = None,
    *,
    curvature: Curvature | None = None,
    **extra: Any,
) -> tuple[PyTree, KFACState]:
    at = _checked(updates, state, curvature)
    kept = (state.A, state.G), state.weight, (state.A_inverse, state.G_inverse)
    finite = all_finite(updates)

    def refresh():
        found, usable = _refreshed(options, state, at)
        usable = usable & finite
        return where(usable, found, kept), usable

    early = (state.weight == 0) | (state.count < options.burn_in)
    due = early | (state.since >= options.every)
    if options.every == 1:
        new, taken = refresh()
    else:
        new, taken = lax.cond(due, refresh, lambda: (kept, no(finite)))
    (A, G), weight, (A_inverse, G_inverse) = new
    step = _preconditioned(updates, A_inverse, G_inverse)
    step = jtu.tree_map(lambda a: jnp.where(finite, a, jnp.zeros_like(a)), step)
    refused = state.refused + jnp.where((due & ~taken) | ~finite, 1, 0)
    since = jnp.where(taken, 1, state.since + 1)
    counts = state.count + 1, since, refused
    known = A, G, weight, A_inverse, G_inverse
    return step, KFACState(*known, *counts, state.seed)


def _checked(updates: PyTree, state: KFACState, curvature: Any) -> Batch:
    """The batch of the curvature. Raises where the three do not belong together."""
    curvature = check_curvature(curvature)
    check_like("updates", updates, curvature.params)
    check_dense(updates)
    at = curvature.batch()
    kind = type(at.recipe.products)
    if kind is not GGN:
        raise TypeError(
            f"`curvature` is that of a {kind.__name__}; K-FAC has factors of those "
            "made by `dp.optim.ggn` and `dp.optim.fisher`."
        )
    if at.recipe.predict is not None:
        raise ValueError(
            "`curvature` has a `predict`, and K-FAC runs the layers of the network "
            "itself: make the recipe without, and give it the network."
        )
    sizes = [layer.out_features for layer in parametrized(updates)]
    known = [G.shape[-1] for G in state.G]
    if sizes != known:
        raise ValueError(
            f"`updates` has layers of {sizes} outputs, and the state is that of layers "
            f"of {known}: begin with `optimizer.init(params)`."
        )
    return at


def _refreshed(options: _Options, state: KFACState, at: Batch) -> tuple[tuple, Array]:
    """New running means and inverses, and whether these can be used."""
    key = jr.fold_in(jr.key(state.seed), state.count)
    found = factors_of(at, options.factors, key), jnp.ones_like(state.weight)
    mix = lambda old, new: options.ema * old + (1 - options.ema) * cast(new, old.dtype)
    mixed = lambda old, new: mix(old, new).astype(old.dtype)
    before = (state.A, state.G), state.weight
    factors, weight = jtu.tree_map(mixed, before, found)
    A, G = jtu.tree_map(lambda mean: mean / weight, factors)
    layers = [inverses(*pair, options.damping) for pair in zip(A, G, strict=True)]
    new = factors, weight, tuple(zip(*layers, strict=True))
    return new, all_finite(new)


def _preconditioned(updates: PyTree, A_inverse: Stacks, G_inverse: Stacks) -> PyTree:
    """G^-1 [W b] A^-1 of every layer, in the dtype of the updates."""
    layers, treedef = jtu.tree_flatten(updates, is_leaf=is_linear)
    found = zip(layers, A_inverse, G_inverse, strict=True)
    return treedef.unflatten([_layer_step(*layer) for layer in found])


def _layer_step(layer: eqx.nn.Linear, A_inverse: Array, G_inverse: Array):
    (size, k, _), dtype = G_inverse.shape, G_inverse.dtype
    W, b = layer.weight, layer.bias
    joined = cast(W, dtype).reshape(size, k, -1)
    if b is not None:
        last = cast(b, dtype).reshape(size, k, 1)
        joined = jnp.concatenate([joined, last], -1)
    V = matmul(matmul(G_inverse, joined), A_inverse)
    n = W.shape[-1]
    like = lambda a, leaf: a.reshape(leaf.shape).astype(leaf.dtype)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, like(V[..., :n], W))
    if b is None:
        return layer
    return eqx.tree_at(lambda layer: layer.bias, layer, like(V[..., n], b))
