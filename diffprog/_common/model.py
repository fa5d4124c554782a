"""Models of the user, taken apart into arrays and code."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .capture import Frozen
from .flax import advice, check_parameters, check_variables, found_in, NNX
from .types import (
    came,
    check_callable,
    check_key,
    check_takes_two,
    noted,
    shapes,
)


def is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def is_parameter(leaf) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


class Parts(NamedTuple):
    """A model taken apart: its arrays, and the rest, which is code."""

    arrays: PyTree
    rest: Frozen

    def joined(self) -> tuple[PyTree, Callable]:
        """The parameters, and the model as a function of them."""
        params, constants = eqx.partition(self.arrays, is_parameter)
        others = eqx.combine(constants, self.rest.tree())
        return params, lambda params: eqx.combine(params, others)


def split(model: PyTree, predict: Callable | None) -> Parts:
    """The parts of a model with parameters to train."""
    if isinstance(model, type):
        raise TypeError(f"The model is {came(model)}; a model made of it is expected.")
    if predict is None and not callable(model):
        what = came(model) if is_array(model) else f"a {type(model).__name__}"
        such = ", such as `lambda params, x: module.apply(params, x)`."
        of_nnx = any(True for _ in found_in(model))
        raise TypeError(
            f"The model is {what}, which cannot be called: give "
            f"`dp.value_and_direction` a `predict`{f':{NNX}' if of_nnx else such}"
        )
    leaves, treedef = jtu.tree_flatten_with_path(model)
    if not any(is_parameter(leaf) for _, leaf in leaves):
        raise TypeError(
            "The model has no floating array, so there is nothing to train. With Flax "
            "linen and haiku the parameters are the model: `params = module.init(...)`."
        )
    for path, leaf in leaves:
        if is_parameter(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"The parameter {jtu.keystr(path)} has dtype {leaf.dtype}; parameters "
                "are real: keep real and imaginary part as two arrays, joined by "
                "`jax.lax.complex` in the model."
            )
    if not isinstance(model, eqx.Module):  # a module may well hold indices
        check_parameters(model)
        check_variables(model, predict)
        for path, leaf in leaves:
            if is_array(leaf) and not is_parameter(leaf):
                raise TypeError(
                    f"The parameter {jtu.keystr(path)} has dtype {leaf.dtype}; "
                    "parameters are floating: convert it with `.astype(float)`, or "
                    "keep it out of the parameters."
                )
    arrays = [leaf if is_array(leaf) else None for _, leaf in leaves]
    rest = [None if is_array(leaf) else leaf for _, leaf in leaves]
    return Parts(treedef.unflatten(arrays), Frozen(treedef.unflatten(rest)))


def check_batch(key: Any, **batch: PyTree):
    """Raises for lists in place of arrays, for no example, and for what is no key."""
    for name, tree in batch.items():
        number = lambda leaf: isinstance(leaf, int | float | np.number)
        if isinstance(tree, list) and all(map(number, jtu.tree_leaves(tree))):
            raise TypeError(
                f"`{name}` is a list of numbers, which is no array: give "
                f"`jnp.asarray({name})`."
            )
        leaves = jtu.tree_leaves(tree)
        if leaves and all(np.shape(leaf)[:1] == (0,) for leaf in leaves):
            raise ValueError(
                f"`{name}` has shape {shapes(tree):.200}: at least one example is "
                "expected. Skip an empty batch."
            )
    if key is not None:
        check_key(key)


def check_examples(inputs: PyTree):
    """Raises for inputs that are not mapped over: there is a row for every example."""
    leaves = jtu.tree_leaves(inputs)
    if not leaves or len({np.shape(leaf)[:1] for leaf in leaves} | {()}) != 2:
        raise ValueError(
            f"`inputs` has shape {shapes(inputs):.200}; arrays with one row for every "
            "example, that is a first axis of one length, are expected. For others "
            "give `dp.value_and_direction` a `predict(model, inputs)`."
        )


def explained(model: Callable, inputs: PyTree) -> Callable:
    """The model for one example, whose errors say what it was given."""

    def call(x, *keys):
        of = f"one example of shape {shapes(x):.200}, a row of inputs of shape "
        given = f"The model was given {of}{shapes(inputs):.200}."
        with noted(lambda: given + _about_state(model)):
            return model(x, key=keys[0]) if keys else model(x)

    return call


def check_predict(predict: Any):
    """Raises for what does not compute outputs."""
    if predict is None:
        return
    if hasattr(predict, "init") and hasattr(predict, "apply"):
        raise TypeError(
            f"`predict` is {came(predict)}, whose `apply` is expected: "
            "`predict=module.apply`."
        )
    check_callable("predict", predict, "something like `lambda model, inputs: ...`")
    call = "predict(model, inputs, *, state, key)"
    check_takes_two("predict", predict, call, ("state", "key"))


def runner(
    predict: Callable | None, inputs: PyTree, model_state: PyTree, key: Any
) -> Callable:
    """`model -> outputs, model_state`."""

    def run(model):
        if predict is None:
            if model_state is not None:
                raise ValueError(
                    "The model has a state: give `dp.value_and_direction` a `predict` "
                    "that takes `state=` and returns the outputs and the new state."
                )
            check_examples(inputs)
            if key is None:
                return jax.vmap(explained(model, inputs))(inputs), None
            keys = jr.split(key, jtu.tree_leaves(inputs)[0].shape[0])
            return jax.vmap(explained(model, inputs))(inputs, keys), None
        options = {} if key is None else {"key": key}
        if model_state is not None:
            # Built anew for each trace: Flax NNX forbids to change older variables.
            options["state"] = jtu.tree_map(lambda leaf: leaf, model_state)
        with noted(lambda: raised_in_predict(options)):
            outputs = predict(model, inputs, **options)
        if model_state is None:
            return outputs, None
        if not isinstance(outputs, tuple | list) or len(outputs) != 2:
            raise TypeError(
                f"`predict` returned {came(outputs)}; with a state of the model it "
                "returns two things, the outputs and the new state."
            )
        return outputs

    return run


def _about_state(model: Callable) -> str:
    is_state = lambda node: isinstance(node, eqx.nn.StateIndex)
    if not any(map(is_state, jtu.tree_leaves(model, is_leaf=is_state))):
        return ""
    return (
        " It keeps a state: give `dp.value_and_direction` a `predict` that takes "
        "`state=` and returns the outputs and the new state; begin with "
        "`vd.init(model, state)`, and call `vd.step`."
    )


def raised_in_predict(options: dict[str, Any]) -> str:
    """A note for the error that `predict` raises."""
    call = "".join(f", {name}={name}" for name in options)
    told = advice(sys.exception(), options)
    return f"Raised in `predict(model, inputs{call})`.{told}"


def first_half_twice(a):
    half = (a.shape[0] + 1) // 2
    return jnp.concatenate([a[:half], a[: a.shape[0] - half]])


def check_apart(found):
    outputs, others = found
    if isinstance(outputs, Tracer):
        raise ValueError("`check=True` looks at numbers: call outside `jit` for it.")
    half = (outputs.shape[0] + 1) // 2
    change = jnp.max(jnp.abs(outputs - others)[:half])
    if change > jnp.sqrt(jnp.finfo(outputs.dtype).eps) * jnp.max(jnp.abs(outputs)):
        raise ValueError(
            f"The outputs of the first {half} examples change by {change:.1e} when the "
            "others do, so examples are not independent. Use a layer that keeps them "
            "apart (`eqx.nn.GroupNorm`, or batch normalization in inference mode), or "
            "an oracle that does not need it, and leave `check=False`."
        )
