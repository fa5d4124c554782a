import functools as ft
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .capture import in_order, put_together, Taken
from .tree import vary
from .written import taken_back


# What JAX raises where Python or NumPy asks for the value of a traced number.
_ASKED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


FEW = 3  # floats that are passed one by one


P = ParamSpec("P")
R = TypeVar("R")


def door(fn: Callable[P, R]) -> Callable[P, R]:
    """Compiles a public function: arrays and Python floats are data, the rest is code.

    A Python float is traced as a weakly typed number, so a new value never compiles
    again and never widens a float32 problem. Integers, booleans and strings are part
    of the program. Functions are taken apart, see `capture`: the numbers they capture
    are data, or constants of the program where the function asks for their values.

    JAX's searches for numbers that are not finite see nothing of what is inside: here
    these are values, such as what stands in a history after its end, and results say
    where they are wrong.
    """

    num_traces, lost = 0, []
    same: dict = {}  # programs that differ in what their own trace changed
    asks = set()  # programs whose functions ask for the values of what they capture

    @ft.partial(jax.jit, static_argnums=0)
    def jitted(static, floats, others):
        nonlocal num_traces, lost
        num_traces += 1
        floats = [jnp.full_like(0.0, number) for number in floats]  # weakly typed
        args, kwargs = put_together(static, in_order(static, floats, others))
        with taken_back((args, kwargs)) as lost:
            args, kwargs = vary((args, kwargs), like=(args, kwargs))
            return fn(*args, **kwargs)  # pyright: ignore

    def run(static, taken):
        numbers = _packed(taken)
        config: Any = jax.config
        if config.jax_debug_nans or config.jax_debug_infs:
            with jax.debug_nans(False), jax.debug_infs(False):
                return jitted(static, *numbers)
        try:
            return jitted(static, *numbers)
        except jax.errors.UnexpectedTracerError as error:
            if not lost:
                raise
            raise TypeError(
                f"{lost[0]} in which a function left a number while it was traced: "
                "that number is lost with its trace. Compute it before (in "
                "`__init__`), or in each call anew."
            ) from error

    @ft.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tree, before = (args, kwargs), num_traces
        taken = Taken(tree)
        static = same.get(taken.static, taken.static) if same else taken.static
        result: Any = None
        constants = bool(asks) and static in asks
        if not constants:
            try:
                result = run(static, taken)
            except _ASKED:
                if not taken.captured:
                    raise
                constants = True
        if constants:
            fixed = Taken(tree, constants=True)
            result = run(fixed.static, fixed)
            asks.add(static)
        if num_traces > before:
            # A function that counts its own calls is not another one for that.
            after = Taken(tree, traced=True)
            if after.static != static and _are_same(after.numbers, taken.numbers):
                same[after.static] = static
        return result

    return call


def _packed(taken: Taken) -> tuple[Any, tuple]:
    """Floats, many in one array since JAX takes 2 us for each, and the others."""
    # JAX reads the memory of a NumPy array at its leisure: after the call, too.
    own = lambda number: number.copy() if isinstance(number, np.ndarray) else number
    floats = np.array(taken.floats) if len(taken.floats) > FEW else taken.floats
    return floats, tuple(map(own, taken.others))


def _are_same(numbers: list, others: list) -> bool:
    """Whether these are the same numbers in the same places."""
    return len(numbers) == len(others) and all(
        a is b or (type(a) is float and a == b)
        for a, b in zip(numbers, others, strict=True)
    )


def undifferentiated(tree: PyTree, message: str) -> PyTree:
    """The identity, which says why it refuses to be differentiated."""
    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    identity = jax.custom_jvp(lambda numbers: numbers)

    @identity.defjvp
    def _(primals, tangents):
        raise NotImplementedError(message)

    return eqx.combine(identity(numbers), rest)
