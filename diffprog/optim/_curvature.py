r"""Curvatures of a loss, as optimizers take them: recipes that a batch completes.

A recipe called with a model and a batch gives a `Curvature`: arrays and static
functions, which cross `jax.jit`. It is linearized where it is used, into a `LossModel`

    h(w + d) ~ value + <gradient, d> + <d, C d> / 2,    C = P' W P,

where P is the Jacobian of outputs or features and W the Hessians behind it, or P is the
identity and W the Hessian of h.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._common.capture import Frozen
from .._common.model import check_batch, check_predict, Parts, runner, split
from .._common.reduction import check_reduction, Reduction, weight
from .._common.tree import scale, vary, varying_axes, vdot
from .._common.types import (
    AbstractPart,
    check_count,
    check_positive,
    Number,
    shapes,
)
from ..losses import AbstractLoss
from ..oracles._base import Linearization, linearize, rows


class LossModel(eqx.Module):
    r"""A quadratic model of a loss around the parameters, $C = P^\top W P$.

    $$h(w + d) \approx \text{value} + \langle \text{gradient}, d \rangle
    + \tfrac12 \langle d, C d \rangle.$$

    - `value`, `gradient`: those of the loss; the gradient is like the parameters.
    - `push`, `weigh`, `pull`: products with P, W and P'.
    - `join`: the sum over devices of what each of them found.
    """

    value: Float[Array, ""]
    gradient: PyTree
    push: Callable
    weigh: Callable
    pull: Callable
    join: Callable

    def mv(self, d: PyTree) -> PyTree:
        """C d, for d like the parameters."""
        return self.join(self.pull(self.weigh(self.push(d))))

    def gram(self, D: PyTree) -> Float[Array, "K K"]:
        """D'C D for K directions, stacked on a leading axis: one `push` for each."""
        Z = jax.vmap(self.push)(D)
        return self.join(inner(Z, jax.vmap(self.weigh)(Z)))

    def slopes(self, D: PyTree) -> Float[Array, " K"]:
        """D'g, with the gradient g."""
        return jax.vmap(lambda d: vdot(d, self.gradient))(D)

    def change(self, d: PyTree, damping: Any = 0.0) -> Float[Array, ""]:
        r"""J(d) = <g, d> + <d, (C + damping I) d> / 2: how much the model changes."""
        curvature = self.gram(jtu.tree_map(lambda a: a[None], d))[0, 0]
        return vdot(self.gradient, d) + (curvature + damping * vdot(d, d)) / 2


def inner(A: PyTree, B: PyTree) -> Float[Array, "K K"]:
    """The inner products of all rows of A with all rows of B."""
    flat = lambda a: a.reshape(a.shape[0], -1)
    dot = lambda a, b: jnp.matmul(flat(a), flat(b).T, precision="highest")
    return sum(jtu.tree_leaves(jtu.tree_map(dot, A, B)))  # pyright: ignore


class AbstractProducts(AbstractPart):
    """Which matrix a recipe takes for C."""

    @abc.abstractmethod
    def model(self, at: "Batch") -> LossModel:
        """The model of the loss on a batch."""


class Recipe(eqx.Module):
    """A choice of curvature: `recipe(model, inputs, targets)` is that of a batch.

    Made by [`diffprog.optim.ggn`][], [`diffprog.optim.fisher`][],
    [`diffprog.optim.hessian`][] and [`diffprog.optim.feature_metric`][].

    - `products`: which matrix it is.
    - `loss`, `predict`, `reduction`, `factor`, `batch_size`, `axis_name`: as there.
    """

    products: AbstractProducts
    loss: AbstractLoss
    predict: Callable | None
    reduction: Reduction = eqx.field(static=True)
    factor: Number
    batch_size: int | None = eqx.field(static=True)
    axis_name: Any = eqx.field(static=True)

    def __check_init__(self):
        check_predict(self.predict)
        check_reduction(self.reduction)
        check_positive("factor", self.factor)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def __call__(
        self,
        model: PyTree,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: PRNGKeyArray | None = None,
    ) -> "Curvature":
        """The curvature of a model on a batch; nothing is computed yet.

        **Arguments:** those of [`diffprog.ValueAndDirection`][]: a model that runs as
        it does in inference, such as `eqx.nn.inference_mode(model)`, or parameters
        where the recipe has a `predict`.
        """
        check_batch(key, inputs=inputs, targets=targets)
        parts, recipe = split(model, self.predict), eqx.partition(self, eqx.is_array)
        arrays, rest = zip(parts, recipe, strict=True)
        static = rest[0], Frozen(rest[1])
        return Curvature(arrays, static, inputs, targets, key)


class Curvature(eqx.Module):
    """A recipe with a model and a batch; every leaf is an array.

    It is given to `update` and [`diffprog.optim.refresh`][], which linearize it: to
    `jax.jit` new batches and parameters are the same program.

    - `arrays`, `rest`: of the model and of the recipe, what is data and what is code.
    - `inputs`, `targets`, `key`: the batch.
    """

    arrays: tuple[PyTree, PyTree]
    rest: tuple[Frozen, Frozen] = eqx.field(static=True)
    inputs: PyTree
    targets: PyTree
    key: PRNGKeyArray | None

    @property
    def params(self) -> PyTree:
        """The parameters: what directions and steps are like."""
        return Parts(self.arrays[0], self.rest[0]).joined()[0]

    def linearize(self) -> LossModel:
        """The model of the loss, see [`diffprog.optim.LossModel`][].

        Costs a forward pass, and a backward one where the gradient is asked for.
        """
        batch = self.batch()
        return batch.recipe.products.model(batch)

    def batch(self) -> "Batch":
        """What the recipe makes a model of."""
        recipe = eqx.combine(self.arrays[1], self.rest[1].tree())
        params, build = Parts(self.arrays[0], self.rest[0]).joined()
        batch = self.inputs, self.targets
        axes = _axes(recipe.axis_name, params, batch)
        if axes:  # else JAX sums what is transposed over the devices by itself
            params = vary(params, like=(params, batch))
        return Batch(recipe, params, build, *batch, self.key, axes)


class Batch(NamedTuple):
    """What a recipe makes a model of."""

    recipe: Recipe
    params: PyTree
    build: Callable
    inputs: PyTree
    targets: PyTree
    key: PRNGKeyArray | None
    axes: tuple

    def join(self, tree: PyTree) -> PyTree:
        """The sum over devices."""
        return lax.psum(tree, self.axes) if self.axes else tree

    def vary(self, tree: PyTree) -> PyTree:
        return vary(tree, like=self.params)

    def outputs(self, params: PyTree) -> Array:
        """Those of the model, in pieces where these are asked for."""
        return self.each(self.recipe.predict, params)

    def each(self, predict: Callable | None, params: PyTree) -> Array:
        """`predict` of the model on the inputs, piece by piece."""

        def run(params, inputs, key):
            return runner(predict, inputs, None, key)(self.build(params))[0]

        size, m = self.recipe.batch_size, rows(self.inputs)
        if size is None or (m is not None and size >= m):
            return run(params, self.inputs, self.key)
        if m is None:
            raise ValueError(
                f"`inputs` has shape {shapes(self.inputs):.200}; `batch_size` splits "
                "the examples, which are on a first axis of one length."
            )
        number, key = m // size, self.key
        keys = None if key is None else jr.split(key, number + 1)
        first = lambda a: a[: number * size].reshape(number, size, *a.shape[1:])
        pieces = jtu.tree_map(first, self.inputs), None if keys is None else keys[:-1]
        piece = jax.checkpoint(run)  # nothing is kept of a piece
        found = lax.map(lambda row: piece(params, *row), pieces)
        found = found.reshape(-1, *found.shape[2:])
        if m % size == 0:
            return found
        rest = jtu.tree_map(lambda a: a[number * size :], self.inputs)
        last = piece(params, rest, None if keys is None else keys[-1])
        return jnp.concatenate([found, last])

    def linearize(self) -> tuple[Linearization, Array | float]:
        """The sum of the losses, linearized, and what it is multiplied by."""
        recipe = self.recipe
        predict = lambda w: (self.outputs(w), None)
        known = recipe.loss, self.targets, self.inputs
        at, _ = linearize(predict, self.params, *known, "sum")
        if recipe.reduction == "sum" or not self.axes:
            return at, weight(recipe.loss, at.outputs, at.targets, recipe.reduction)
        number = jnp.asarray(recipe.loss.count(at.outputs, at.targets), at.value.dtype)
        return at, 1 / jnp.maximum(self.join(self.vary(number)), 1)

    def finish(self, at, c, push: Callable, weigh: Callable, pull: Callable):
        """The model with C = factor P' W P."""
        value, gradient = self.join((c * at.value, scale(c, at.gradient)))
        factor = self.recipe.factor
        weighed = lambda z: scale(factor, weigh(z))
        pushed = lambda d: push(self.vary(d))
        return LossModel(value, gradient, pushed, weighed, pull, self.join)


def _axes(axis_name: Any, params: PyTree, batch: PyTree) -> tuple:
    """The axes of devices to sum over. Raises where the batch has others."""
    names = () if axis_name is None else axis_name
    names = names if isinstance(names, tuple) else (names,)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return names
    of_params, of_batch = map(varying_axes, (params, batch))
    missing = of_batch - of_params - {*names}
    unknown = axis_name is None and not of_params | of_batch
    if missing or unknown:
        over = ", ".join(sorted(map(str, missing or manual)))
        raise ValueError(
            f"The batch of a curvature is split over the devices of `{over}` by "
            "`shard_map`, and its products would have a wrong scale: give the recipe "
            f"`axis_name={min(missing or manual)!r}`; or `axis_name=()` where every "
            "device has the whole batch."
        )
    return names
