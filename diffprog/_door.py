import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

from ._tree import vary


class _Traced:
    """Marks, among the static leaves, the place of a number that is traced."""


def _is_number(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float)


def door(fn: Callable) -> Callable:
    """Compiles a public function: arrays and Python floats are data, the rest is code.

    A Python float is traced as a weakly typed number, so a new value never compiles
    again and never widens a float32 problem. Integers, booleans, strings and functions
    are part of the program; a function counts as the same one when it compares equal,
    which a `lambda` written anew never does. JAX's searches for numbers that are not
    finite see nothing of what is inside: here these are values, such as what stands in
    a history after its end, and results say where they are wrong.
    """

    @ft.partial(jax.jit, static_argnums=0)
    def jitted(static, numbers):
        treedef, leaves = static
        numbers = iter(numbers)
        args, kwargs = jtu.tree_unflatten(
            treedef,
            [next(numbers) if kind is _Traced else leaf for kind, leaf in leaves],
        )
        args, kwargs = vary((args, kwargs), like=(args, kwargs))
        return fn(*args, **kwargs)

    @ft.wraps(fn)
    def call(*args, **kwargs):
        leaves, treedef = jtu.tree_flatten((args, kwargs))
        # A NumPy float64 scalar is a Python float and counts as one.
        numbers = tuple(
            float(leaf) if isinstance(leaf, float) else leaf
            for leaf in leaves
            if _is_number(leaf)
        )
        # The type stands beside the value because True == 1 == 1.0.
        static = tuple(
            (_Traced, None) if _is_number(leaf) else (type(leaf), leaf)
            for leaf in leaves
        )
        try:
            config: Any = jax.config
            if config.jax_debug_nans or config.jax_debug_infs:
                with jax.debug_nans(False), jax.debug_infs(False):
                    return jitted((treedef, static), numbers)
            return jitted((treedef, static), numbers)
        except (TypeError, ValueError):
            _check_hashable(static)
            raise

    return call


def _check_hashable(static):
    for kind, leaf in static:
        try:
            hash(leaf)
        except TypeError:
            raise TypeError(
                f"A part of the problem, {leaf!r:.100} of type {kind.__name__}, cannot "
                "be hashed, so its compiled code could not be found again: make it an "
                "`equinox.Module`, or give its class a `__hash__`."
            ) from None


@jax.custom_jvp
def undifferentiated(tree):
    """The identity, which refuses to be differentiated."""
    return tree


@undifferentiated.defjvp
def _(primals, tangents):
    raise NotImplementedError(
        "Derivatives of `dp.solve` are not available yet: the solution depends on x0, "
        "on us and on the numbers of the problem through a loop of unknown length. "
        "Wrap these arguments in `jax.lax.stop_gradient`, or differentiate "
        "`dp.rollout` at the solution (the envelope theorem gives the derivative of "
        "the optimal cost)."
    )
