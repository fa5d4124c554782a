"""Roll-outs of a problem as a user has it."""

import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify
from jaxtyping import Array, Float, PyTree

from .._common.capture import put_together, Taken
from .._common.door import door
from .._common.tree import strong
from .._common.written import taken_back
from .problem import AbstractChain
from .vector import run
from .vectorize import vectorize


class Trajectory(eqx.Module):
    """States, controls and their cost.

    - `xs`: states, T + 1 rows.
    - `us`: controls, T rows.
    - `cost`: the sum of all stage costs and the terminal cost.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    cost: Float[Array, ""]


@door
def _rollout(problem: AbstractChain, x0: PyTree, us: PyTree) -> Trajectory:
    vectorized = vectorize(problem, x0, us)
    trajectory = run(vectorized.chain, *vectorized.ravel(x0, us))
    xs = vectorized.states(trajectory.xs, trajectory.final)
    return Trajectory(xs, us, trajectory.cost)


def _check_indices(problem: AbstractChain, x0: PyTree, us: PyTree):
    """Raises where a function reads beyond the end of an array."""
    taken = Taken((problem, x0, us))  # a NumPy table takes no traced index
    problem, x0, us = put_together(taken.static, map(jnp.asarray, taken.numbers))
    vectorized = vectorize(problem, x0, us)
    chain = vectorized.chain
    trajectory = run(chain, *vectorized.ravel(x0, us))
    if isinstance(trajectory.cost, Tracer):
        raise ValueError("`check=True` looks at numbers: call outside `jit` for it.")

    def check(name: str, fn: Callable, start: int, *rows: Array):
        error, _ = jax.vmap(checkify.checkify(fn, errors=checkify.index_checks))(*rows)
        if message := error.get():
            first, _, _ = message.partition("\n")
            place, _, what = first.removeprefix("at mapped index ").partition(": ")
            outside = r"index (-?\d+) is out of .* axis (\d+) with size (\d+)"
            index = re.search(outside, what)
            if index and 0 <= int(index[1]) < int(index[3]):
                what = (
                    f"a slice from {index[1]} on ends beyond {index[3]}, the size of "
                    f"axis {index[2]}."
                )
            stage = "" if name == "terminal_cost" else f" at stage {start + int(place)}"
            raise IndexError(
                f"`{name}`{stage} reads beyond the end of an array, where JAX raises "
                "nothing and takes another entry, or a fill value such as NaN: "
                f"{what.strip()} A table that is indexed by the stage needs a row for "
                "each; where the last one should go on, write "
                "`jnp.minimum(t, len(table) - 1)`, also in place of a `mode` of "
                "indexing, which is not seen here."
            )

    data = chain.segments, trajectory.xs, trajectory.us, chain.ts
    for segment, *rows in zip(*data, strict=True):
        check("dynamics", segment.dynamics, segment.start, *rows)
        check("cost", segment.cost, segment.start, *rows)
    check("terminal_cost", chain.terminal_cost, chain.horizon, trajectory.final[None])


def rollout(
    problem: AbstractChain, x0: PyTree, us: PyTree, *, check: bool = False
) -> Trajectory:
    r"""Runs $x_{t+1} = f_t(x_t, u_t)$ from `x0` and adds up the cost.

    **Arguments:**

    - `problem`: a [`diffprog.ControlProblem`][] or [`diffprog.Chain`][].
    - `x0`: the first state, shape `(n,)` or any pytree of floating arrays.
    - `us`: the controls, shape `(T, m)` or any pytree of arrays with T rows.
    - `check`: look for indices beyond the end of an array, such as `table[t]` of a
        table with less rows than stages: JAX reads the last row there, or a fill value,
        without a word. A `mode` that intends this is not seen and refused alike. For
        debugging; outside `jit`.

    **Returns:** a [`diffprog.Trajectory`][]; differentiable in every argument. What
    overflows comes back as it is, infinite or NaN.

    **Raises:** `ValueError` or `TypeError` for shapes and dtypes that do not fit;
    `IndexError`, with `check`, that names the function and the stage.
    """
    (x0, us), _ = strong(x0, us)
    if check:
        with taken_back(problem):
            _check_indices(problem, x0, us)
    return _rollout(problem, x0, us)
