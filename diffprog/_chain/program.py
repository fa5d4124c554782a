"""Functions that were traced once."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr
from jaxtyping import Array


class Program(eqx.Module):
    """A function as a fixed program: derivatives and loops never run its Python again.

    The numbers it captured are leaves, so that a tree of programs holds all of them.
    """

    numbers: list[Any]
    jaxpr: Jaxpr = eqx.field(static=True)

    @staticmethod
    def of(fn: Callable, *examples: Array) -> "Program":
        """`fn` of arrays, which returns one array."""
        closed = jax.make_jaxpr(fn)(*examples)
        return Program(list(closed.consts), closed.jaxpr)

    def __call__(self, *args: Any) -> Any:
        return eval_jaxpr(self.jaxpr, self.numbers, *args)[0]
