from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._common.tree import cast, norm, working_dtype
from .._common.types import (
    came,
    check_number,
    Fn,
    is_known,
    is_number,
    with_other_names,
)
from ._curvature import Curvature, LossModel, Recipe


def rate_is(elsewhere: str) -> Callable[[Fn], Fn]:
    """A function that says where the learning rate is that it does not take."""
    others = dict(learning_rate=elsewhere, lr=elsewhere)
    return with_other_names(others)


def check_base(base: Any):
    """Raises for what is no optimizer."""
    if isinstance(base, optax.GradientTransformation):
        return
    advice = " No learning rate is needed." if is_number(base) else ""
    if callable(base):
        advice = " Call it, as in `optax.adam(1.0)`."
    raise TypeError(
        f"`base` is {came(base)}; an optimizer such as `optax.contrib.muon(1.0)` is "
        f"expected.{advice}"
    )


def check_curvature(curvature: Any) -> Curvature:
    """Raises for what is no curvature of a batch."""
    if not isinstance(curvature, Curvature):
        instead = came(curvature)
        if isinstance(curvature, Recipe):
            instead = "a recipe that was not called"
        elif isinstance(curvature, LossModel):
            instead = "a curvature that is linearized already"
        raise TypeError(
            f"`curvature` is {instead}; that of a batch is expected: "
            "`curvature=recipe(model, inputs, targets)` with a recipe such as "
            "`dp.optim.ggn(loss)`."
        )
    return curvature


def check_like(name: str, tree: PyTree, params: PyTree):
    """Raises for what is not like the parameters of a curvature, and names the leaf."""
    if jtu.tree_structure(tree) != jtu.tree_structure(params):
        raise ValueError(
            f"`{name}` is arranged as {jtu.tree_structure(tree)!s:.200}; the model of "
            f"the curvature has parameters {jtu.tree_structure(params)!s:.200}, those "
            "of `eqx.filter(model, eqx.is_inexact_array)`."
        )
    pairs = zip(jtu.tree_leaves_with_path(tree), jtu.tree_leaves(params), strict=True)
    for (path, leaf), like in pairs:
        if jnp.shape(leaf) != like.shape:
            raise ValueError(
                f"`{name}{jtu.keystr(path)}` has shape {jnp.shape(leaf)}; that of the "
                f"parameter of the curvature is {like.shape}."
            )


def check_floating(name: str, params: PyTree):
    """Raises for parameters that are no real floating arrays."""
    for path, leaf in jtu.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`{name}{jtu.keystr(path)}` has dtype {dtype}; parameters are floats: "
                "give those of `eqx.filter(model, eqx.is_inexact_array)`, or convert "
                "it with `.astype(float)`."
            )


def check_gradient(g: PyTree, curvature: Curvature) -> PyTree:
    """g. Raises where it is not the gradient of the curvature, but for rounding."""
    gradient = curvature.linearize().gradient
    own = cast(g, working_dtype(gradient))
    difference = norm(jtu.tree_map(jnp.subtract, own, gradient))
    eps = jnp.finfo(difference.dtype).eps
    wrong = difference > jnp.sqrt(eps) * norm(gradient)
    message = (
        "The gradient that `update` was given is not that of its `curvature`: give "
        "both the same model, batch, loss and `reduction`."
    )
    if not is_known(wrong):
        return eqx.error_if(g, wrong, message)
    if wrong:
        raise ValueError(message)
    return g


def check_average(name: str, value: Any):
    """Raises for what is no weight of the past in a running mean."""
    below_1 = lambda value: (0 <= value) & (value < 1)
    check_number(name, value, "a number from 0 to below 1", below_1)


def is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def filled(
    name: str, tree: PyTree, curvature: Curvature, rows: int | None = None
) -> PyTree:
    """The tree with zeros where `optax.masked` left parameters out; maybe in rows."""
    params = curvature.params
    if rows is not None:
        stacked = lambda a: jnp.zeros((rows, *a.shape), a.dtype)
        params = jtu.tree_map(stacked, params)
    zeros = lambda part: jtu.tree_map(jnp.zeros_like, part)
    fill = lambda node, part: zeros(part) if is_masked(node) else node
    try:
        tree = jtu.tree_map(fill, tree, params, is_leaf=is_masked)
    except ValueError:
        pass  # told below
    check_like(name, tree, params)
    return tree
