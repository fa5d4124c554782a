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


DROPOUT = """

    def predict(params, inputs, *, key):
        return module.apply(params, inputs, rngs={"dropout": key})

Give this `predict` to `dp.value_and_direction`, and call it with a `key=`."""


def check_variables(model: PyTree, predict: Any):
    """Raises for what the `apply` of a module of linen does not take as its first."""
    linen, owner = sys.modules.get("flax.linen"), getattr(predict, "__self__", None)
    if linen is None or not isinstance(owner, linen.Module):
        return
    if getattr(predict, "__name__", None) != "apply":
        return
    if not isinstance(model, Mapping) or "params" not in model:
        what = f"the type {type(model).__name__}"
        if isinstance(model, Mapping):
            what = f"the keys {list(model)}"
        raise TypeError(
            f"The model has {what:.200}; `module.apply`"
            ' takes what `module.init` returns, or `{"params": params}`, before the '
            "inputs."
        )


def advice(error: BaseException | None, options: Mapping[str, Any]) -> str:
    """What to do about an error of Flax, or of arguments, that `predict` raises."""
    kind, text = type(error).__name__, str(error)
    if kind == "TraceContextError":
        return f" What a module of Flax NNX changes is its state:{NNX}"
    if "batch_stats" in text or ("state" in options and "argument 'state'" in text):
        returned = "It takes `state=` and returns the outputs and the new state"
        return f" {returned}; with Flax linen:{LINEN}"
    if kind == "InvalidRngError" or ("key" in options and "argument 'key'" in text):
        return f" It is given a key as `key=`; with Flax linen:{DROPOUT}"
    if "key" not in options and "'key'" in text:
        return " A key is given to the call: `vd(model, inputs, targets, key=key)`."
    if "state" not in options and "'state'" in text:
        return " A state is given to `vd.init(model, state)`, and used by `vd.step`."
    return ""


def check_parameters(model: PyTree):
    """Raises for what would be trained although Flax means it otherwise."""
    train_state = sys.modules.get("flax.training.train_state")
    if train_state is not None and isinstance(model, train_state.TrainState):
        raise TypeError(
            "The model is a `TrainState`, which holds the optimizer too: give its "
            "parameters, `vd(state.params, inputs, targets)`, and hand the direction "
            "to `state.apply_gradients(grads=direction)`."
        )
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
