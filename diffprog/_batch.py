import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.core import Tracer
from jaxtyping import PyTree

from ._chain import AbstractChain
from ._direction import AbstractDirection
from ._door import door
from ._fast_loops import FastLoopsError
from ._report import report_batch
from ._result import RESULTS
from ._search import AbstractSearch, Backtracking, SearchState
from ._solution import Solution
from ._solve import solve


def _solve_all(problem, method, x0s, uss, search, states, rtol, atol, options):
    max_steps, history, fast_loops = options

    def one(arguments, fast_loops):
        x0, us, state = arguments
        return solve(
            problem, method, x0, us, search, max_steps=max_steps, rtol=rtol, atol=atol,
            state=state, history=history, fast_loops=fast_loops,
        )  # fmt: skip

    arguments = x0s, uss, states
    if fast_loops is not False:
        try:
            return lax.map(lambda a: one(a, True), arguments)
        except FastLoopsError:
            if fast_loops:
                raise
    return jax.vmap(lambda a: one(a, False))(arguments)


_door = door(_solve_all)


def _num_problems(**trees: PyTree) -> int:
    """The length that the first axes of all leaves share."""
    found: dict[int | None, str] = {}
    for tree_name, tree in trees.items():
        for path, leaf in jtu.tree_leaves_with_path(tree):
            size = jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
            found.setdefault(size, tree_name + jtu.keystr(path))
    if len(found) != 1 or None in found:
        listed = ", ".join(
            f"`{name}` has " + ("no axis" if size is None else f"{size} problems")
            for size, name in found.items()
        )
        raise ValueError(
            f"{listed or 'nothing is given'}; the first axis of `x0s`, `uss` and "
            "`state` is the problem, and all must agree. To start every problem from "
            "the same `us`: `jnp.broadcast_to(us, (len(x0s), *us.shape))`."
        )
    return next(iter(found))  # pyright: ignore


def solve_batch(
    problem: AbstractChain,
    method: AbstractDirection,
    x0s: PyTree,
    uss: PyTree,
    search: AbstractSearch = Backtracking(),
    *,
    batch_size: int | None = None,
    max_steps: int = 256,
    rtol: Any = None,
    atol: Any = None,
    state: SearchState | None = None,
    history: bool = False,
    verbose: bool | Callable = False,
    fast_loops: bool | None = None,
) -> Solution:
    r"""Solves many problems that differ in the first state and the first guess.

    The solution of each is what [`diffprog.solve`][] gives. On the CPU the problems run
    one after another, each compiled as one function, where that is possible; elsewhere
    all of a batch run at once under `jax.vmap`, until the slowest is done.

    **Arguments:**

    - `problem`, `method`, `search`, `max_steps`, `rtol`, `atol`, `fast_loops`: as in
        [`diffprog.solve`][].
    - `x0s`: the first states, one more axis in front: `(problems, n)`, or a pytree.
    - `uss`: the first guesses of the controls, `(problems, T, m)`, or a pytree.
    - `batch_size`: at most so many problems at once; all unless given. It bounds the
        memory; a last batch that is not full is filled up with copies.
    - `state`: `solution.state` of an earlier batch.
    - `history`: whether to record each iteration of each problem; takes
        `problems * (max_steps + 1) * 6` numbers.
    - `verbose`: `True` prints one line for each batch; a function receives its figures
        by name.

    **Returns:** a [`diffprog.Solution`][] whose arrays have the problem as first axis.
    Nothing is raised for a problem that fails: look at `solution.result`.

    **Fails:** `ValueError` or `TypeError` at once for a wrong call.

    For problems that differ in other numbers, use `jax.vmap` or `jax.lax.map` over
    [`diffprog.solve`][].
    """
    num_problems = _num_problems(x0s=x0s, uss=uss, state=state)
    batch_size = num_problems if batch_size is None else batch_size
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"`batch_size` is {batch_size!r}; a Python int is expected.")
    if batch_size < 1 or num_problems < 1:
        raise ValueError(
            f"`batch_size` is {batch_size} for {num_problems} problems; at least 1 of "
            "each is expected."
        )
    options = (max_steps, bool(history), fast_loops)

    def solve_rows(rows):
        take = lambda leaf: leaf if rows is None else jnp.asarray(leaf)[rows]
        batch = jtu.tree_map(take, (x0s, uss, state))
        return _door(problem, method, *batch[:2], search, batch[2], rtol, atol, options)

    solutions = []
    for first in range(0, num_problems, batch_size):
        start, size = time.perf_counter(), min(batch_size, num_problems - first)
        rows = None
        if batch_size < num_problems:
            rows = first + jnp.minimum(jnp.arange(batch_size), size - 1)
        solution = jtu.tree_map(lambda leaf, n=size: leaf[:n], solve_rows(rows))
        if verbose and not isinstance(solution.cost, Tracer):
            batch = f"{first // batch_size + 1} of {-(-num_problems // batch_size)}"
            _report(verbose, batch, solution, start)
        solutions.append(solution)
    join = lambda *leaves: leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)
    return jtu.tree_map(join, *solutions)


def _report(verbose, batch: str, solution: Solution, start: float):
    successful = jnp.sum(solution.result == RESULTS.successful)
    report_batch(
        verbose,
        batch=batch,
        problems=len(solution.cost),
        successful=int(successful),
        iterations=float(jnp.mean(solution.stats["num_steps"])),
        cost=float(jnp.mean(solution.cost)),
        seconds=time.perf_counter() - start,
    )
