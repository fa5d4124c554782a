"""Models of the user, taken apart into arrays and code."""

import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from ._capture import Frozen
from ._flax import check_parameters, found_in, NNX
from ._types import came, check_key, noted, shapes


def is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def is_parameter(leaf) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def split(model: PyTree, predict: Callable | None) -> tuple[PyTree, Frozen]:
    """The arrays of a model, and the rest."""
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
    leaves = jtu.tree_leaves_with_path(model)
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
        for path, leaf in leaves:
            if is_array(leaf) and not is_parameter(leaf):
                raise TypeError(
                    f"The parameter {jtu.keystr(path)} has dtype {leaf.dtype}; "
                    "parameters are floating: convert it with `.astype(float)`, or "
                    "keep it out of the parameters."
                )
    arrays, rest = eqx.partition(model, is_array)
    return arrays, Frozen(rest)


def check_batch(key: Any, **batch: PyTree):
    """Raises for lists in place of arrays, for no example, and for what is no key."""
    for name, tree in batch.items():
        number = lambda leaf: isinstance(leaf, int | float)
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
    note, error = f"Raised in `predict(model, inputs{call})`.", sys.exception()
    if type(error).__name__ == "TraceContextError":
        return f"{note} What a module of Flax NNX changes is its state:{NNX}"
    if "state" in options or "'state'" not in str(error):
        return note
    return f"{note} A state is given to `vd.init(model, state)`, and used by `vd.step`."


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
