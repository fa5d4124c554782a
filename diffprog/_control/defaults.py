"""What a solve takes where nothing is given; objects are made once, for speed."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._common.types import to_float
from .outer import AugmentedLagrangian
from .search.base import SearchState
from .solution import WarmStart


OUTER = AugmentedLagrangian()
# What other libraries call the options of a solve.
OTHER_NAMES = dict(
    tol="`rtol` and `atol` are the tolerances",
    maxiter="`max_steps` is the most iterations",
)


@ft.cache
def no_state(dtype) -> WarmStart:
    """In the place of a state: the same program takes both."""
    with jax.ensure_compile_time_eval():  # arrays of JAX pass the door fastest
        return jtu.tree_map(jnp.asarray, WarmStart(SearchState.none(dtype)))


def tolerance(value: Any, dtype) -> Any:
    """The tolerance given, or else an accuracy that the dtype can deliver."""
    if value is None:
        return 1e-9 if dtype == jnp.float64 else 1e-6
    return to_float(value)
