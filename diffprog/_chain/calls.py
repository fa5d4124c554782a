"""Calls of the user's functions; errors say what was given and what came back."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._common.capture import Taken
from .._common.types import noted, shapes


# What is to be said of what JAX raises where Python or NumPy asks for a traced number.
_TABLE = (
    " A list or a NumPy array takes no traced index, such as `t`: make the table an "
    "array of JAX, `jnp.asarray(table)`."
)
_ASKED = {
    jax.errors.TracerIntegerConversionError: _TABLE,
    jax.errors.TracerArrayConversionError: " NumPy takes no traced numbers: write "
    f"`jnp.sin` for `np.sin`, and `jnp.stack` for `np.array`.{_TABLE}",
    jax.errors.TracerBoolConversionError: " `if`, `and` and `max` of Python decide "
    "while the function is traced, before x is known: write `jnp.where(x[0] > 0, a, "
    "b)`, `&` and `jnp.maximum`.",
    jax.errors.ConcretizationTypeError: " `float`, `int` and `math` take no traced "
    "numbers: leave `float` out, write `jnp.sin` for `math.sin`. What cannot be "
    "written in JAX is for `dp.external`; a plant that cannot, for a Python loop over "
    "`controller(x, state)`.",
}


def call(name: str, fn: Callable, x: PyTree, *rest: Any):
    """A function of the user; an error inside it says what it was given."""

    def note():
        given = f"`{name}` was given x of shape {shapes(x):.200}"
        if rest:
            given += f" and u of shape {shapes(rest[0]):.200}"
        advice = how_called(fn, x, *rest) + about_state(x)
        if rest and _is_number(rest[0]):
            advice += (
                " u is a number, as `us` has one number per stage: for an array of one "
                "give `us[:, None]`."
            )
        error = sys.exception()
        asked = _ASKED.get(type(error), "")
        told = any(asked in note for note in getattr(error, "__notes__", ()))
        return f"{given}.{advice}{'' if told else asked}"

    with noted(note):
        return fn(x, *rest)


def how_called(fn: Callable, *args: Any) -> str:
    """What is to be said of a function that does not take so many arguments."""
    try:
        inspect.signature(fn).bind(*args)
    except TypeError:
        return f" It is called with `({', '.join('xut'[: len(args)])})`."
    except ValueError:  # nothing is known of it
        pass
    return ""


def _is_number(tree: PyTree) -> bool:
    return jtu.treedef_is_leaf(jtu.tree_structure(tree)) and np.ndim(tree) == 0


def about_state(x: PyTree) -> str:
    """What is to be said of a state that may have been meant for an array."""
    if isinstance(x, list) and not any(map(np.ndim, jtu.tree_leaves(x))):
        return " `x0` is a list of numbers: for an array give `jnp.asarray(x0)`."
    if _is_number(x):
        return " `x0` is a number: for an array of one give `jnp.asarray([x0])`."
    return ""


def check_dtype(name: str, fn: Callable, tree: PyTree, dtype):
    for path, leaf in jtu.tree_leaves_with_path(tree):
        leaf = jnp.asarray(leaf)
        if leaf.dtype != dtype and not leaf.weak_type:
            alike = lambda a, leaf=leaf: getattr(a, "dtype", None) == leaf.dtype
            held = list(filter(alike, Taken(fn).numbers))
            held = held and f"; it holds a {leaf.dtype} of shape {jnp.shape(held[0])}"
            raise TypeError(
                f"`{name}` returned {leaf.dtype}{jtu.keystr(path)} where x0 and us are "
                f"{dtype} (a weakly typed one, such as `jnp.asarray(0.1)`, follows the "
                f"other){held or ''}: give the arrays inside the problem the dtype of "
                "x0, or make them Python floats, which follow it."
            )


def scalar(name: str, fn: Callable, dtype, *args: Any) -> Float[Array, ""]:
    """A call of a cost, whose value is one number."""
    value = call(name, fn, *args)
    if len(jtu.tree_leaves(value)) != 1 or jnp.shape(jtu.tree_leaves(value)[0]) != ():
        came = jtu.tree_map(jnp.shape, value)
        raise ValueError(
            f"`{name}` returned something of shape {came}; a cost is one scalar: sum "
            "it up, or index the entry that is meant."
        )
    check_dtype(name, fn, value, dtype)
    return jnp.asarray(jtu.tree_leaves(value)[0]).astype(dtype)
