from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._common.types import came, check_number, is_known
from ._curvature import Curvature, LossModel, Recipe


def check_curvature(curvature: Any, params: PyTree = None):
    """Raises for what is no curvature of a batch, or one of other parameters."""
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
    if params is not None:
        check_like("params", params, curvature.params)


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


def check_damping(damping: Any, name: str = "damping"):
    """Raises for what is no number >= 0."""
    check_number(name, damping, "a number >= 0")
    if is_known(damping) and not np.all(np.asarray(damping) >= 0):
        raise ValueError(f"`{name}` is {damping}; a number >= 0 is expected.")
