"""Curves over time, and over iterations."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import diffprog as dp

from ._figure import came, check_axes, holds, need_matplotlib, new_axes, style


def trajectory(
    xs: Any,
    us: Any = None,
    *,
    dt: float | None = None,
    names: Sequence[str] | None = None,
    input_names: Sequence[str] | None = None,
    ax: Any = None,
):
    """Draws states and controls over time: `trajectory(solution)`.

    **Arguments:**

    - `xs`: a [`diffprog.Solution`][] or [`diffprog.Trajectory`][]; or states, shape
        `(T+1, n)` or a pytree of arrays with T + 1 rows.
    - `us`: with states, the controls, shape `(T, m)` or a pytree of arrays with T rows.
    - `dt`: duration of a stage [s]; without it the axis counts stages.
    - `names`, `input_names`: a name, with its unit, for each state and each control.
    - `ax`: two axes, for states and controls; a new figure if `None`.

    **Returns:** the two axes; `axes[0].figure.savefig("file.png")` saves them.

    **Raises:** `ValueError` for a wrong number of names, and for a batch of solutions.
    """
    check_axes(ax, 2)
    if holds(xs):
        xs, us = xs.xs, xs.us
    elif us is None:
        raise TypeError("`us` is missing: give states and controls, or a solution.")
    states, names = _named(xs, names, "x")
    inputs, input_names = _named(us, input_names, "u")
    axes = new_axes(2, (7.5, 5.0)) if ax is None else ax
    unit = 1.0 if dt is None else float(dt)
    for name, column in zip(names, states.T, strict=True):
        axes[0].plot(unit * np.arange(len(column)), column, label=name)
    for name, column in zip(input_names, inputs.T, strict=True):
        # A control holds for a whole stage.
        edges = unit * np.arange(len(column) + 1)
        axes[1].stairs(column, edges, baseline=None, linewidth=1.5, label=name)
    time = "stage" if dt is None else "time [s]"
    for ax, label, num in zip(
        axes, ("states", "controls"), (len(names), len(inputs.T))
    ):
        style(ax, "" if ax is axes[0] else time, label)
        _legend(ax, num)
    return axes


def inputs(
    us: Any,
    speed: Any = None,
    *,
    dt: float | None = None,
    names: Sequence[str] | None = None,
    limits: Any = None,
    ax: Any = None,
):
    """Draws each input over time in axes of its own, and the speed above them.

    **Arguments:**

    - `us`: a [`diffprog.Solution`][] or [`diffprog.Trajectory`][]; or controls, shape
        `(T, m)` or a pytree of arrays with T rows.
    - `speed`: shape `(T,)` or `(T+1,)` [m/s]; not drawn if `None`.
    - `dt`: duration of a stage [s]; without it the axis counts stages.
    - `names`: a name, with its unit, for each input.
    - `limits`: a pair `(lo, hi)`, dashed; each a number, or an array for the inputs,
        shape `(m,)`, or for all stages, shape `(T, m)`. What is `None` or infinite is
        not drawn.
    - `ax`: an array of axes, one for each curve; a new figure if `None`.

    **Returns:** the axes.

    **Raises:** `ValueError` for a wrong number of names, for limits of another shape,
    and for a batch of solutions.
    """
    need_matplotlib()
    us = us.us if holds(us) else us
    values, names = _named(us, names, "u")
    rows = len(names) + (speed is not None)
    check_axes(ax, rows)
    if speed is not None and np.shape(speed) not in (
        (len(values),),
        (len(values) + 1,),
    ):
        raise ValueError(
            f"`speed` is {came(np.asarray(speed))}; one number for each of the "
            f"{len(values)} stages, or one more, is expected."
        )
    sides = _limits(limits, values.shape)
    axes = new_axes(rows, (7.5, 0.9 + 1.5 * rows)) if ax is None else ax
    unit = 1.0 if dt is None else float(dt)
    rest = list(axes)
    if speed is not None:
        curve = np.asarray(speed)
        top = rest.pop(0)
        top.plot(unit * np.arange(len(curve)), curve, color="C3", linewidth=1.4)
        style(top, "", "speed [m/s]")
    for i, (ax, name, column) in enumerate(zip(rest, names, values.T, strict=True)):
        edges = unit * np.arange(len(column) + 1)
        ax.stairs(column, edges, baseline=None, color=f"C{i}", linewidth=1.2)
        for side in sides:
            if np.any(np.isfinite(side[:, i])):
                dashed = dict(color="0.35", linewidth=1.0, linestyle="--")
                ax.stairs(side[:, i], edges, baseline=None, **dashed)
        style(ax, "", name)
    axes[-1].set_xlabel("stage" if dt is None else "time [s]")
    axes[-1].set_xlim(0.0, unit * len(values))
    axes[-1].figure.align_ylabels(list(axes))
    return axes


def convergence(solutions: Any, *, best: float | None = None, ax: Any = None):
    """Draws how far the cost is above the best one, iteration by iteration.

    **Arguments:**

    - `solutions`: a [`diffprog.Solution`][]; or several of one problem, in a list or in
        a dictionary with a label for each.
    - `best`: the least cost; by default the least among the solutions.
    - `ax`: axes; a new figure if `None`.

    **Returns:** the axes. A curve ends where its cost is the best one: zero has no
    logarithm.

    **Raises:** `ValueError` for a solution without history, and for a batch.
    """
    check_axes(ax, None)
    ax = new_axes(size=(8.5, 4.2))[0] if ax is None else ax
    if isinstance(solutions, dp.Solution):
        solutions = {"solution": solutions}
    elif not isinstance(solutions, Mapping):
        solutions = {f"solution {i}": s for i, s in enumerate(solutions)}
    for solution in solutions.values():
        if not isinstance(solution, dp.Solution) or not holds(solution):
            raise TypeError(
                f"`solutions` holds {came(solution)}; solutions of `dp.solve` are "
                "expected."
            )
    if not solutions:
        raise ValueError("`solutions` is empty; at least one is expected.")
    if not all(solution.history for solution in solutions.values()):
        raise ValueError("A solution has no history; solve with `history=True`.")
    costs = {k: np.asarray(s.history["cost"]) for k, s in solutions.items()}
    if best is None:
        best = min(float(np.nanmin(cost)) for cost in costs.values())
    floor = np.finfo(float).eps * max(abs(best), 1e-300)
    for i, (label, cost) in enumerate(costs.items()):
        gap = cost[~np.isnan(cost)] - best
        gap = np.where(gap > floor, gap, np.nan)
        line = ("-", "--", "-.", ":")[i // 10 % 4]
        ax.plot(gap, line, marker=".", markersize=3, linewidth=1.3, label=label)
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    style(ax, "iteration", "cost minus best cost")
    _legend(ax, len(costs))
    return ax


def _columns(tree: Any, letter: str) -> tuple[np.ndarray, list[str]]:
    """The leaves of a tree as columns with names, shape `(rows, columns)`."""
    columns, names = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.atleast_1d(np.asarray(leaf))
        array = array.reshape(array.shape[0], -1)
        name = jax.tree_util.keystr(path, simple=True, separator=".") or letter
        columns.append(array)
        many = array.shape[1] > 1 or not path
        names += [f"{name}[{i}]" if many else name for i in range(array.shape[1])]
    rows = sorted({len(column) for column in columns})
    if len(rows) != 1:
        raise ValueError(
            f"The arrays of `{letter}s` have {rows} rows; one per stage is expected in "
            f"each. Of a chain draw one phase: `solution.{letter}s[0]`."
        )
    return np.concatenate(columns, axis=1), names


def _named(tree, names, letter):
    values, own = _columns(tree, letter)
    if names is None:
        return values, own
    names = [names] if isinstance(names, str) else names
    if len(names) != values.shape[1]:
        raise ValueError(
            f"{len(names)} names came for {values.shape[1]} columns of `{letter}`; "
            "give one for each."
        )
    return values, list(names)


def _limits(limits: Any, shape: tuple) -> list[np.ndarray]:
    """What there is of a pair of limits, with the shape of the inputs."""
    if limits is None:
        return []
    if not isinstance(limits, tuple | list) or len(limits) != 2:
        raise TypeError(
            f"`limits` is {came(limits)}; a pair `(lo, hi)` is expected, each a "
            "number, an array or `None`."
        )
    sides = []
    for i, side in enumerate(limits):
        if side is None:
            continue
        try:
            sides.append(np.broadcast_to(np.asarray(side, float), shape))
        except ValueError as error:
            raise ValueError(
                f"`limits[{i}]` has shape {np.shape(side)}; one that can be broadcast "
                f"to {shape} is expected."
            ) from error
    return sides


def _legend(ax, num: int):
    # Beside the curves, never on top of them.
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        ncols=1 + num // 13,
    )
