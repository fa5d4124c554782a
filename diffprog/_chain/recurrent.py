"""Recurrent layers: a cell that runs over a sequence."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._common.capture import Frozen
from .._common.door import door
from .._common.loops import scan
from .._common.tree import vary
from .._common.types import check_callable, check_function, noted, shapes


class RNNCell(eqx.Module):
    r"""A plain recurrent cell: $h_t = a(W h_{t-1} + V x_t + b)$.

    - `hidden_weight`, `input_weight`, `bias`: W, V and b.
    - `activation`: a, a function of each entry.
    """

    hidden_weight: Float[Array, "n n"]
    input_weight: Float[Array, "n p"]
    bias: Float[Array, " n"]
    activation: Callable

    def __init__(
        self,
        in_size: int,
        hidden_size: int,
        activation: Callable = jnp.tanh,
        *,
        key: PRNGKeyArray,
        init: Literal["orthonormal"] | Callable = "orthonormal",
        dtype: Any = None,
    ):
        if init != "orthonormal" and not callable(init):
            raise ValueError(
                f'`init` is {init!r}; "orthonormal" or a function `(key, shape, dtype) '
                "-> array`, such as those of `jax.nn.initializers`, is expected."
            )
        check_function("activation", activation, "a(z)")
        draw = init if callable(init) else _orthonormal
        dtype = jnp.result_type(float) if dtype is None else dtype
        keys = jr.split(key)
        self.hidden_weight = draw(keys[0], (hidden_size, hidden_size), dtype)
        self.input_weight = draw(keys[1], (hidden_size, in_size), dtype)
        self.bias = jnp.zeros(hidden_size, dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, " p"], h: Float[Array, " n"]):
        """The next hidden state."""
        n, p = self.input_weight.shape
        if jnp.shape(x) != (p,) or jnp.shape(h) != (n,):
            raise ValueError(
                f"The cell was given x of shape {jnp.shape(x)} and h of shape "
                f"{jnp.shape(h)}; ({p},) and ({n},) are expected: `dp.Recurrent(cell, "
                f"{n})` takes one sequence of shape (T, {p})."
            )
        z = self.hidden_weight @ h + self.input_weight @ x + self.bias
        return self.activation(z)


RNNCell.__init__.__doc__ = """**Arguments:**

- `in_size`, `hidden_size`: the sizes p and n of the input and of the hidden state.
- `activation`: a function of each entry.
- `key`: for the weights.
- `init`: `"orthonormal"`, the default: W and V are U V' of the singular value
    decomposition of a random matrix, so that the state neither grows nor fades at
    first. Or a function `(key, shape, dtype) -> array`. The bias is 0.
- `dtype`: of the weights.

**Raises:** `ValueError` for another `init`.
"""


def _orthonormal(key, shape, dtype):
    u, _, v = jnp.linalg.svd(jr.normal(key, shape, dtype), full_matrices=False)
    return u @ v


class Recurrent(eqx.Module):
    r"""A layer that runs a cell over a sequence: $h_t = f(x_t, h_{t-1})$.

    Maps a sequence of shape `(T, ...)` to the last hidden state $h_T$, or to all of
    $h_1, \dots, h_T$, stacked.

    - `cell`: f, called as `cell(x, h)`.
    - `initial`: $h_0$, or its size.
    - `sequence`: whether all states are returned.
    """

    cell: Callable
    initial: PyTree
    sequence: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        such = "such as `dp.RNNCell` or `eqx.nn.GRUCell`,"
        check_callable("cell", self.cell, f"a function `cell(x, h) -> h`, {such}")
        leaves = jtu.tree_leaves(self.initial)
        size = lambda a: isinstance(a, int) and not isinstance(a, bool) and a > 0
        if not leaves or not all(size(a) or eqx.is_inexact_array(a) for a in leaves):
            raise TypeError(
                f"`initial` is {self.initial!r:.100}; the size of the hidden state, an "
                "int, or the state to begin with, floating arrays, is expected."
            )

    def start(self, x: PyTree) -> PyTree:
        """The hidden state before the sequence x."""
        floats = jtu.tree_leaves(eqx.filter(self.cell, eqx.is_inexact_array))
        floats = floats or jtu.tree_leaves(eqx.filter(x, eqx.is_inexact_array))
        dtype = jnp.result_type(*floats) if floats else jnp.result_type(float)
        zero = lambda a: jnp.zeros(a, dtype) if isinstance(a, int) else a
        arrays = eqx.filter((self.cell, x), eqx.is_array)
        return vary(jtu.tree_map(zero, self.initial), like=arrays)

    def states(self, x: PyTree) -> tuple[PyTree, PyTree]:
        """$h_0$, and $h_1, ..., h_T$ stacked."""
        start = self.start(x)
        return start, self._run(start, x, True)[1]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree:
        """The last hidden state, or all of them. `key` is not used."""
        return self._run(self.start(x), x, self.sequence)[self.sequence]

    def _run(self, start: PyTree, x: PyTree, all_states: bool) -> tuple[PyTree, PyTree]:
        """$h_T$, and $h_1, ..., h_T$ stacked if they are wanted."""
        lengths = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(x)}
        if len(lengths | {()}) != 2:
            raise ValueError(
                f"The sequence has shape {shapes(x):.200}; arrays whose first axis is "
                "the time, of one length, are expected, of one example."
            )
        arrays, rest = eqx.partition(self.cell, eqx.is_array)
        return _run_cell(arrays, Frozen(rest), start, x, all_states)


@door
def _run_cell(arrays, frozen: Frozen, start: PyTree, xs: PyTree, all_states: bool):
    cell: Any = eqx.combine(arrays, frozen.tree())

    def step(h, x):
        given = lambda: (
            f"The cell was given x of shape {shapes(x):.200}, of a sequence of shape "
            f"{shapes(xs):.200}, and h of shape {shapes(h):.200}, that of `initial`."
        )
        with noted(given):
            new = cell(x, h)
        if _like(new) != _like(h):
            raise ValueError(
                f"The cell returned a state of {_like(new):.200}, from one of "
                f"{_like(h):.200}; both must agree: give `dp.Recurrent` an `initial` "
                "like what the cell returns."
            )
        return new, new if all_states else None

    return scan(step, start, xs)


def _like(state: PyTree) -> str:
    """Shapes and dtypes of a state, in its arrangement."""
    dtypes = jtu.tree_map(lambda leaf: str(jnp.result_type(leaf)), state)
    return f"shape {shapes(state)} and dtype {dtypes}"


Recurrent.__init__.__doc__ = """**Arguments:**

- `cell`: `cell(x, h) -> h`, for one element of the sequence and one example: a
    [`diffprog.RNNCell`][], an [`equinox.nn.GRUCell`][] or any function of them.
- `initial`: the size of a hidden state that begins at 0; or the state to begin with,
    which is then a parameter. For a state of several arrays, a pytree of either.
- `sequence`: whether to return all hidden states in place of the last.

**Raises:** `TypeError` for anything else.
"""
