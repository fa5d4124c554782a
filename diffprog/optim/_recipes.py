"""The matrices that stand for the curvature of a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._common.jacobian import products
from .._common.reduction import Reduction
from .._common.tree import cast, cast_like, scale, working_dtype
from .._common.types import check_callable, Number
from ..losses import (
    AbstractLoss,
    as_loss,
    Logistic,
    Poisson,
    SoftmaxCrossEntropy,
    Squared,
)
from ..losses._loss import answered
from ._curvature import AbstractProducts, Recipe


def hessian_mv(metric: Any, outputs: Array, targets: PyTree, v: Array) -> Array:
    """H v of a loss, or of a divergence `metric(reference, outputs)` at no distance."""
    if isinstance(metric, AbstractLoss):
        return answered(
            metric, "hessian_mv", metric.hessian_mv(outputs, targets, v), v.shape
        )
    distance = lambda z: jnp.sum(metric(outputs, z))
    return jax.jvp(jax.grad(distance), (outputs,), (v,))[1]


class GGN(AbstractProducts):
    """C = factor c J' H J."""

    metric: Any

    def model(self, at):
        found, c = at.linearize()
        metric = at.recipe.loss if self.metric is None else self.metric
        H = lambda z: c * hessian_mv(metric, found.outputs, found.targets, z)
        return at.finish(found, c, found.mv, H, found.transpose_mv)


class Hessian(AbstractProducts):
    """C = factor times the Hessian of h."""

    def model(self, at):
        found, c = at.linearize()
        loss, dtype = at.recipe.loss, found.outputs.dtype

        def h(w):
            outputs = at.outputs(cast_like(w, at.params)).astype(dtype)
            return jnp.sum(loss(outputs, found.targets))

        _, product = jax.linearize(jax.grad(h), found.params)
        same = lambda d: d
        return at.finish(found, c, same, lambda d: scale(c, product(d)), same)


class FeatureMetric(AbstractProducts):
    """C = factor c J' H J with the Jacobian J of features."""

    features: Callable
    metric: Any

    def model(self, at):
        found, c = at.linearize()
        run = lambda w: (at.each(self.features, w), None)
        features, push, pull, _ = products(run, at.params)
        features = cast(features, working_dtype(at.params, features))
        H = lambda z: c * hessian_mv(self.metric, features, features, z)
        return at.finish(found, c, push, H, pull)


def ggn(
    loss: AbstractLoss | Callable,
    predict: Callable | None = None,
    *,
    metric: AbstractLoss | Callable | None = None,
    reduction: Reduction = "mean",
    factor: Number = 1.0,
    batch_size: int | None = None,
    axis_name: Any = None,
) -> Recipe:
    r"""The generalized Gauss-Newton matrix of a loss.

    $$C = \text{factor} \cdot c \, J^\top H J$$

    with the Jacobian J of the outputs, the Hessians H of the losses in them, and c
    = 1 / m (or 1). Positive semidefinite where the losses are convex.

    **Arguments:**

    - `loss`, `predict`, `reduction`: those of [`diffprog.value_and_direction`][].
    - `metric`: what H is the Hessian of: another loss with the same targets, or a
        divergence `metric(reference, outputs)`, one number per example, whose Hessian
        in the outputs is taken where they are equal. The gradient is that of `loss`.
    - `factor`: a positive number; the number of examples repeats the scale of a Fisher
        matrix that is summed over them, a that of a Renyi divergence of order a.
    - `batch_size`: so many examples at a time, whose activations are found again by
        every product: for batches that do not fit into memory.
    - `axis_name`: inside `jax.shard_map` the axis over which the batch is split. With
        `jax.jit` and arrays that are split nothing is needed.

    **Returns:** a recipe: call it with `(model, inputs, targets)` for a
    [`diffprog.optim.Curvature`][]. A product costs a forward and a backward product of
    the model, about two thirds of a gradient each.

    **Raises:** `TypeError` and `ValueError` for arguments that are none of these.

    Source: Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order
    Gradient Descent", 2002.
    """
    known = reduction, factor, batch_size, axis_name
    return Recipe(GGN(_metric(metric)), as_loss(loss), predict, *known)


# Losses that are minus the logarithm of a likelihood, with its natural parameters.
LIKELIHOODS = SoftmaxCrossEntropy, Logistic, Squared, Poisson


def fisher(
    loss: AbstractLoss | Callable,
    predict: Callable | None = None,
    *,
    metric: AbstractLoss | Callable | None = None,
    reduction: Reduction = "mean",
    factor: Number = 1.0,
    batch_size: int | None = None,
    axis_name: Any = None,
) -> Recipe:
    r"""The Fisher matrix: the Gauss-Newton matrix with the Hessian of a likelihood.

    $$C = \text{factor} \cdot c \, J^\top F J, \quad
    F = \nabla^2 \operatorname{KL}(p_{z}, p_{z'}) \text{ at } z' = z.$$

    For [`diffprog.losses.SoftmaxCrossEntropy`][], [`diffprog.losses.Logistic`][],
    [`diffprog.losses.Squared`][] and [`diffprog.losses.Poisson`][] F is the Hessian of
    the loss itself. For any other the `metric` says what the outputs mean.

    **Arguments:** those of [`diffprog.optim.ggn`][].

    **Raises:** `ValueError` for a loss without a known likelihood and no `metric`.

    Source: Martens, "New Insights and Perspectives on the Natural Gradient Method",
    2014, arXiv 1412.1193.
    """
    loss = as_loss(loss)
    if metric is None and not isinstance(loss, LIKELIHOODS):
        known = ", ".join(kind.__name__ for kind in LIKELIHOODS)
        raise ValueError(
            f"`loss` is a {type(loss).__name__}, whose likelihood is not known; of "
            f"{known} it is. Give `metric=`, such as "
            "`metric=dp.losses.SoftmaxCrossEntropy()`, or take `dp.optim.ggn`."
        )
    known = reduction, factor, batch_size, axis_name
    return Recipe(GGN(_metric(metric)), loss, predict, *known)


def hessian(
    loss: AbstractLoss | Callable,
    predict: Callable | None = None,
    *,
    reduction: Reduction = "mean",
    factor: Number = 1.0,
    batch_size: int | None = None,
    axis_name: Any = None,
) -> Recipe:
    r"""The Hessian of the loss: $C = \text{factor} \cdot \nabla^2 h$, maybe indefinite.

    **Arguments:** those of [`diffprog.optim.ggn`][]. A product costs about two
    gradients.

    Source: Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994.
    """
    known = reduction, factor, batch_size, axis_name
    return Recipe(Hessian(), as_loss(loss), predict, *known)


def feature_metric(
    features: Callable,
    loss: AbstractLoss | Callable,
    predict: Callable | None = None,
    *,
    metric: AbstractLoss | Callable = Squared(),
    reduction: Reduction = "mean",
    factor: Number = 1.0,
    batch_size: int | None = None,
    axis_name: Any = None,
) -> Recipe:
    r"""A metric on features inside of a model: how far steps move these.

    $$C = \text{factor} \cdot c \, J^\top H J$$

    with the Jacobian J of the features, and the Hessian H of `metric`; the gradient is
    that of the loss. Parameters behind the features have no curvature: use a damping.

    **Arguments:**

    - `features`: `features(model, inputs)`, an array whose first axis counts examples:
        [`diffprog.optim.tap`][] takes it out of a model.
    - `metric`: a divergence `metric(reference, features)`, one number per example, or
        a loss that is called with features as outputs and targets.
    - The others: those of [`diffprog.optim.ggn`][].
    """
    check_callable("features", features, "a function `features(model, inputs)`")
    products = FeatureMetric(features, _metric(metric))
    known = reduction, factor, batch_size, axis_name
    return Recipe(products, as_loss(loss), predict, *known)


def _metric(metric: Any) -> Any:
    """A loss, a function, or nothing."""
    if metric is not None:
        expected = "a loss, or a function `metric(reference, outputs)`,"
        check_callable("metric", metric, expected)
    return metric
