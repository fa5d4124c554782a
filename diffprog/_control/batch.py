import functools as ft
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import PyTree

from .._chain.problem import AbstractChain
from .._chain.vectorize import vectorize
from .._common.capture import put_together, Taken
from .._common.changes import is_data, is_list, Same, shape_of
from .._common.door import door
from .._common.fast_loops import FastLoopsError
from .._common.result import RESULTS
from .._common.tree import strong
from .._common.types import check_count, counted, noted, shapes, with_other_names
from .._common.written import taken_back
from .adjoint import AbstractAdjoint, ImplicitAdjoint
from .defaults import OTHER_NAMES, tolerance
from .devices import (
    check_mesh,
    given_rows,
    joined,
    mesh_around,
    on_each,
    own_rows,
    split,
)
from .direction import AbstractDirection
from .outer import AbstractOuter
from .report import print_batch
from .search import AbstractSearch, Backtracking, SearchState
from .solution import on_manifold, Solution, WarmStart
from .solve import solve


@door
def _solve_all(shared, mapped, options):
    *options, mesh = options
    return on_each(ft.partial(_solve_share, *options), mesh.value, shared, mapped)


def _solve_share(size, max_steps, history, fast_loops, shared, mapped):
    shared, method, search, rtol, atol, outer, adjoint, begin = shared
    if begin is not None:
        rows = begin + jnp.arange(size)  # beyond the end it is the last one
        mapped = jtu.tree_map(lambda leaf: leaf.at[rows].get(mode="clip"), mapped)

    def one(arguments, fast_loops):
        numbers, x0, us, xs, state = arguments
        problem = eqx.combine(numbers, shared)
        solution = solve(
            problem, method, x0, us, search, xs=xs, outer=outer, max_steps=max_steps,
            rtol=rtol, atol=atol, state=state, history=history, fast_loops=fast_loops,
            adjoint=adjoint,
        )  # fmt: skip
        return on_manifold(solution, None)  # a function is no answer of a program

    if fast_loops is not False:
        try:
            return lax.map(lambda a: one(a, True), mapped)
        except FastLoopsError:
            if fast_loops:
                raise
    return jax.vmap(lambda a: one(a, False))(mapped)


class _Part:
    """A part of the problem with the axis of its numbers; a leaf."""

    def __init__(self, axis, tree):
        self.axis, self.tree = axis, tree


def _apart(problem: AbstractChain, in_axes: Any) -> tuple[PyTree, PyTree]:
    """The numbers that differ from problem to problem, that axis first; the rest."""

    def first(axis, leaf):
        if axis is None or (axis is in_axes and not jnp.ndim(leaf)):
            return None  # one axis for all arrays leaves out those that have none
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(
                f"`in_axes` has {axis!r}; an axis is an int, or `None` for a number "
                "that all problems share."
            )
        if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(
                f"`in_axes` has {axis} for a number of shape {jnp.shape(leaf)} in the "
                "problem, which has no such axis."
            )
        return jnp.moveaxis(jnp.asarray(leaf), axis, 0)

    is_none = lambda part: part is None
    try:
        parts = jtu.tree_map(_Part, in_axes, problem, is_leaf=is_none)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`in_axes` is {in_axes!r:.100}, no tree like the problem: give `None`, an "
            f"axis for all arrays in the problem, or e.g. {_axes_of('.system.mass')}."
        ) from error
    numbers = lambda part: jtu.tree_map(
        lambda leaf: first(part.axis, leaf), eqx.filter(part.tree, is_data)
    )
    mapped = jtu.tree_map(numbers, parts)
    if in_axes is not None and not jtu.tree_leaves(mapped):
        raise ValueError(
            f"`in_axes` is {in_axes!r:.100}, but no array in the problem has an axis "
            "of problems: numbers that differ are fields of an `equinox.Module`, "
            "stacked, such as `Pendulum(mass=jnp.linspace(0.5, 1.5, 16))`; what "
            "holds the module is one too, since an ordinary object is shared. Make "
            "arrays of lists (`jnp.asarray`)."
        )
    is_shared = lambda new, old: None if new is not None else old
    shared = jtu.tree_map(is_shared, mapped, problem, is_leaf=is_none)
    return mapped, shared


def _num_problems(**trees: PyTree) -> int:
    """The length that the first axes of all leaves share."""
    found: dict[int | None, str] = {}
    for tree_name, tree in trees.items():
        for path, leaf in jtu.tree_leaves_with_path(tree):
            size = jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
            found.setdefault(size, tree_name + jtu.keystr(path))
    if len(found) != 1 or None in found:
        lists = [name for name, tree in trees.items() if isinstance(tree, list)]
        stack = "".join(f"`jnp.stack({name})` makes an array; " for name in lists)
        advice = "`jnp.broadcast_to(us, (problems, *us.shape))`, and `x0` alike."
        of_problem = [name for name in found.values() if name.startswith("problem")]
        if of_problem:
            path = of_problem[0].removeprefix("problem")
            advice = f"`None` in a tree, or an axis for one alone: {_axes_of(path)}."
        listed = ", ".join(
            f"`{name}` has " + ("no axis" if size is None else counted(size, "problem"))
            for size, name in found.items()
        )
        raise ValueError(
            f"{listed or 'nothing is given'}; {stack}the first axis of `x0s`, `uss`, "
            "`state` and what `in_axes` says of the problem is the problem, and all "
            f"must agree. One that all problems share: {advice}"
        )
    return next(iter(found))  # pyright: ignore


def _axis_of(number, num_problems: int) -> int | None:
    """The first axis that is not of length 1, if it has a row for each problem."""
    shape = shape_of(number) or ()
    axis = next((i for i, size in enumerate(shape) if size != 1), None)
    return None if axis is None or shape[axis] != num_problems else axis


def _check_shared(problem: AbstractChain, num_problems: int, x0: PyTree, us: PyTree):
    """Refuses arrays in the problem that are as good with one row per problem."""
    taken = Taken(problem, size=num_problems)
    numbers = taken.numbers
    axes = {i: _axis_of(a, num_problems) for i, a in enumerate(numbers)}
    suspects = [i for i, axis in axes.items() if axis is not None]
    first = lambda a, axis: a[(slice(None),) * axis + (0,)] if axis else a[0]
    whole = lambda node: is_list(node, num_problems)
    fields = jtu.tree_leaves_with_path(problem, is_leaf=whole)
    for chosen in [suspects] * (len(suspects) > 1) + [[i] for i in suspects]:
        one = [first(a, axes[i]) if i in chosen else a for i, a in enumerate(numbers)]
        if not _can_run(taken.static, one, x0, us):
            continue
        some = [numbers[i] for i in chosen]
        paths = [jtu.keystr(p) for p, a in fields if any(a is b for b in some)]
        _refuse_shared(num_problems, paths, some, {axes[i] for i in chosen})


def _refuse_shared(num_problems: int, paths: list, chosen: list, axes: set):
    """The error for fields, or for what functions hold where there are fewer paths."""
    axis = min(axes)
    are_lists = [isinstance(number, list | tuple) for number in chosen]
    is_plain = all(are_lists) and not any(shape_of(number[0]) for number in chosen)
    row = "number" if is_plain else "row"
    given = f"`in_axes={axis}`" if len(axes) == 1 else "a tree of axes as `in_axes`"
    along = f" along axis {axis}" if axes == {axis} != {0} else ""
    rows = f"{num_problems} {row}s{along}"
    as_many = f"as many as there are problems, and one {row} would do for each"
    if len(paths) < len(are_lists):
        held = "a list" if all(are_lists) else "an array"
        it = "it an array in a field" if any(are_lists) else "it a field"
        raise ValueError(
            f"The functions hold {held} of {rows}, {as_many}: make {it} of "
            f"an `equinox.Module` and give {given} if each problem has a {row} of it, "
            "give `in_axes=None` if all problems share it."
        )
    names = ", ".join(f"`problem{path}`" for path in paths)
    verb = "have" if len(paths) > 1 else "has"
    arrays = "make arrays of lists (`jnp.asarray`) and " if any(are_lists) else ""
    raise ValueError(
        f"{names} {verb} {rows}, {as_many}: {arrays}give {given} if the arrays in the "
        f"problem have a {row} for each problem, `in_axes=None` if all problems share "
        f"them; if only some have, a tree: {_axes_of(paths[0], axis)}."
    )


def _can_run(static, numbers: list, x0: PyTree, us: PyTree) -> bool:
    """Whether the functions take numbers of these shapes, as data or as constants."""
    structs = jax.eval_shape(lambda *trees: trees, numbers, x0, us)
    leaves, treedef = jtu.tree_flatten(structs)
    if _can_trace(static, tuple(leaves), treedef):
        return True
    try:
        vectorize(put_together(static, numbers), x0, us)
    except Exception:  # whatever the user's functions raise: no such reading
        return False
    return True


@ft.lru_cache(maxsize=64)
def _can_trace(static, leaves: tuple, treedef) -> bool:
    def trace(numbers, x0, us):
        vectorize(put_together(static, numbers), x0, us)

    try:
        jax.eval_shape(trace, *jtu.tree_unflatten(treedef, leaves))
    except Exception:
        return False
    return True


def _axes_of(path: str, axis: int = 0) -> str:
    """An example of `in_axes` for one field."""
    return (
        f"`eqx.tree_at(lambda p: p{path}, jax.tree.map(lambda _: None, problem), "
        f"{axis}, is_leaf=lambda a: a is None)`"
    )


_NOT_IN_BATCH = OTHER_NAMES | dict(
    throw="nothing is raised for a problem that fails: look at `solution.success`",
    check="`dp.rollout(problem, x0, us, check=True)` of one problem looks for indices "
    "beyond the end of an array",
)


@with_other_names(_NOT_IN_BATCH)
def solve_batch(
    problem: AbstractChain,
    method: AbstractDirection,
    x0s: PyTree,
    uss: PyTree,
    search: AbstractSearch = Backtracking(),
    *,
    xss: PyTree = None,
    outer: AbstractOuter | None = None,
    in_axes: Any = ...,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    max_steps: int = 256,
    rtol: Any = None,
    atol: Any = None,
    state: WarmStart | None = None,
    history: bool = False,
    verbose: bool | Callable = False,
    fast_loops: bool | None = None,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),
) -> Solution:
    r"""Solves many problems that differ in their numbers, first states and guesses.

    The solution of each is what [`diffprog.solve`][] gives. On the CPU the problems run
    one after another, each compiled as one function, where that is possible; elsewhere
    all of a batch run at once under `jax.vmap`, until the slowest is done.

    **Arguments:**

    - `problem`, `method`, `search`, `outer`, `max_steps`, `rtol`, `atol`,
        `fast_loops`, `adjoint`: as in [`diffprog.solve`][].
    - `x0s`: the first states, one more axis in front: `(problems, n)`, or a pytree.
    - `uss`: the first guesses of the controls, `(problems, T, m)`, or a pytree.
    - `xss`: first guesses of the states, arranged like `solution.xs` of a batch, or
        `None`, see `xs` of [`diffprog.solve`][].
    - `in_axes`: which numbers differ from problem to problem: `None` for none; `0`
        for all arrays in the problem, whose first axis then is the problem (Python
        floats and arrays without axes are shared); or a tree of axes and `None` like
        the problem, or like its upper part. Not given, it is `None`, but an array that
        has as many rows as there are problems (or a list of as many numbers or rows),
        and would also do with one row, is refused.
    - `mesh`: a `jax.sharding.Mesh` over whose devices the problems are split, by all of
        its axes. Each device solves its share and waits for no other; shares that are
        not full are filled up with copies. See
        [Several devices](../several-devices.md).
    - `batch_size`: at most so many problems at once on each device; all unless given.
        It bounds the memory; a last batch that is not full is filled up with copies.
    - `state`: `solution.state` of an earlier batch.
    - `history`: whether to record each iteration of each problem; takes
        `problems * (max_steps + 1) * 6` numbers.
    - `verbose`: `True` prints one line for each batch; a function receives its figures
        by name. The cost is the average of those that are finite. Of several processes
        each reports the problems of its own devices.

    **Returns:** a [`diffprog.Solution`][] whose arrays have the problem as first axis,
    split over the devices of a `mesh` if that is possible evenly, else all of them on
    each. Nothing is raised for a problem that fails: look at `solution.result`.

    **Fails:** `ValueError` or `TypeError` at once for a wrong call.

    ```python
    masses = jnp.linspace(0.5, 1.5, 256)
    problem = dp.ControlProblem.from_system(Pendulum(mass=masses), horizon=100)
    solutions = dp.solve_batch(problem, dp.DDP(), x0s, uss, in_axes=0)
    ```
    """
    if mesh is not None:
        check_mesh(mesh)
    asked = in_axes is not ...
    numbers, shared = _apart(problem, in_axes if asked else None)
    given = dict(x0s=x0s, uss=uss, xss=xss, state=state, problem=numbers)
    num_problems = _num_problems(**given)
    if num_problems < 1:
        raise ValueError("`x0s` has 0 problems; at least 1 is expected.")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    (x0s, uss, xss), dtype = strong(x0s, uss, xss)
    tolerances = tolerance(rtol, dtype), tolerance(atol, dtype)
    if state is None:
        state = WarmStart(SearchState.none(dtype, (num_problems,)))
    if not asked and num_problems > 1:  # of one problem both readings are the same
        with taken_back(problem):
            _check_shared(problem, num_problems, _one_of(x0s), _one_of(uss))
    mapped, num_devices = (numbers, x0s, uss, xss, state), 1
    if mesh is not None:
        mesh, num_devices = mesh_around(mesh, shared, mapped), mesh.size
        mapped = split(mesh, mapped, num_problems)
    share = -(-num_problems // num_devices)
    size, parts = min(batch_size or share, share), []
    options = size, max_steps, bool(history), fast_loops, Same(mesh)
    for begin in range(0, share, size):
        start = time.perf_counter()
        first = np.asarray(begin) if size < share else None
        with noted(ft.partial(_note, numbers, x0s, uss, problem, num_problems)):
            common = shared, method, search, *tolerances, outer, adjoint, first
            part = _solve_all(common, mapped, options)
        if verbose and not isinstance(part.cost, Tracer):
            rows = range(begin, begin + size), share, num_devices, num_problems
            figures = part.cost, part.result, part.stats["num_steps"]
            number = f"{begin // size + 1} of {-(-share // size)}"
            _report(verbose, number, own_rows(figures, given_rows(*rows)), start)
        parts.append(part)
    solution = joined(parts, mesh, share, num_problems)
    return on_manifold(solution, problem.manifold)


def _one_of(tree: PyTree) -> PyTree:
    """Of the shapes of one problem."""
    return jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), tree)


def _note(numbers, x0s: PyTree, uss: PyTree, problem, num_problems: int) -> str:
    """What an error inside does not say."""
    named = lambda pairs: ", ".join(f"`problem{jtu.keystr(path)}`" for path, _ in pairs)
    rows, whole = named(jtu.tree_leaves_with_path(numbers)), ""
    if not rows:
        fields = jtu.tree_leaves_with_path(problem)
        some = [(p, a) for p, a in fields if _axis_of(a, num_problems) is not None]
        whole = (
            some
            and f"; and all of {named(some)}, of which `in_axes=0` would give one row"
        )
    return (
        "Raised in `dp.solve_batch`, where the first axis is the problem: each gets x0 "
        f"of shape {shapes(_one_of(x0s)):.100} from `x0s` of shape {shapes(x0s):.100}, "
        f"us of shape {shapes(_one_of(uss)):.100} from `uss` of shape "
        f"{shapes(uss):.100}"
        + (rows and f", and one row of {rows}")
        + f"{whole or ''}."
    )


def _report(verbose, batch: str, figures: tuple, start: float):
    """Prints one line, or hands it to the user's function by name."""
    costs, results, num_steps = figures
    finite = np.isfinite(costs)
    printed = ft.partial(print_batch, int(finite.sum()))
    receive = verbose if callable(verbose) else printed
    receive(
        batch=batch,
        problems=len(costs),
        successful=int(np.sum(results == RESULTS.successful)),
        iterations=float(jnp.mean(num_steps)),
        cost=float(jnp.mean(costs, where=finite)),
        seconds=time.perf_counter() - start,
    )
