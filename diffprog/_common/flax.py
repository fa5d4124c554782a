"""What Flax keeps beside parameters, found in models without importing Flax."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree


NNX = """

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params, inputs, *, state):
        model = nnx.merge(graphdef, params, state)
        return model(inputs), nnx.state(model, nnx.Not(nnx.Param))

Give this `predict` to `dp.value_and_direction`, begin with `vd.init(params, rest)`, and
call `vd.step(params, ...)`; `nnx.update(model, params, state.model_state)` puts both
back into the model."""
LINEN = """

    def predict(params, inputs, *, state):
        variables = {"params": params, "batch_stats": state}
        outputs, new = module.apply(variables, inputs, mutable="batch_stats")
        return outputs, new["batch_stats"]

Give this `predict` to `dp.value_and_direction`, begin with
`vd.init(variables["params"], variables["batch_stats"])`, and call
`vd.step(params, ...)`."""


def check_parameters(model: PyTree):
    """Raises for what would be trained although Flax means it otherwise."""
    if isinstance(model, Mapping) and "params" in model and "batch_stats" in model:
        raise TypeError(
            "The model has `batch_stats` beside `params`: statistics of Flax are no "
            f"parameters. Hand them on from call to call instead:{LINEN}"
        )
    seen: dict[int, str] = {}
    for name, leaf, parameter in found_in(model):
        if not parameter:
            array = isinstance(leaf, jax.Array | np.ndarray)
            kind = "array" if array else type(leaf).__name__
            raise TypeError(
                f"`{name}` of the model is of type `{kind}`; of a module of Flax NNX "
                f"only what is an `nnx.Param` is trained. Keep the rest apart:{NNX}"
            )
        if id(leaf) in seen:
            raise TypeError(
                f"`{seen[id(leaf)]}` and `{name}` of the model are one `nnx.Param` of "
                f"Flax, and would be trained as two. Take it once:{NNX}"
            )
        seen[id(leaf)] = name


def found_in(tree: PyTree) -> Iterator[tuple[str, Any, bool]]:
    """The variables of Flax NNX and other arrays of its modules, with their names.

    The third part says whether it is a parameter.
    """
    nnx = sys.modules.get("flax.nnx")  # what is not imported made no part of the tree
    if nnx is None:
        return
    # Its own `isinstance` takes longer than all else that is done to a model.
    is_module = lambda node: nnx.Module in type(node).__mro__
    is_variable = lambda node: nnx.Variable in type(node).__mro__
    whole = lambda node: is_module(node) or is_variable(node)
    if not any(map(whole, jtu.tree_leaves(tree, is_leaf=whole))):
        return
    for path, part in jtu.tree_leaves_with_path(tree, is_leaf=whole):
        for inside, leaf in jtu.tree_leaves_with_path(part, is_leaf=is_variable):
            array = isinstance(leaf, jax.Array | np.ndarray)
            if is_variable(leaf) or (is_module(part) and array):
                name = jtu.keystr((*path, *inside)).removeprefix(".")
                yield name, leaf, nnx.Param in type(leaf).__mro__
