"""Models of the user, taken apart into arrays and code."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from ._capture import Frozen


def is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def is_parameter(leaf) -> bool:
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def split(model: PyTree, predict: Callable | None) -> tuple[PyTree, Frozen]:
    """The arrays of a model, and the rest."""
    if predict is None and not callable(model):
        raise TypeError(
            f"The model is a {type(model).__name__}, which cannot be called: give "
            "`dp.value_and_direction` a `predict`, such as `lambda params, x: "
            "module.apply(params, x)`."
        )
    leaves = jtu.tree_leaves_with_path(model)
    if not any(is_parameter(leaf) for _, leaf in leaves):
        raise TypeError(
            "The model has no floating array, so there is nothing to train."
        )
    if not isinstance(model, eqx.Module):  # a module may well hold indices
        for path, leaf in leaves:
            if is_array(leaf) and not is_parameter(leaf):
                raise TypeError(
                    f"The parameter {jtu.keystr(path)} has dtype {leaf.dtype}; "
                    "parameters are floating: convert it with `.astype(float)`, or "
                    "keep it out of the parameters."
                )
    arrays, rest = eqx.partition(model, is_array)
    return arrays, Frozen(rest)


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
