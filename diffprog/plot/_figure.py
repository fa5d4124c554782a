"""What all pictures share: axes, their style, and what is drawn on them."""

import argparse
import pathlib
from typing import Any

import jax
import numpy as np

import diffprog as dp


def need_matplotlib():
    # The caller's backend and style stay as they are.
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "The pictures need matplotlib: pip install 'diffprog[viz]'"
        ) from error
    return matplotlib


def folder(path: str) -> pathlib.Path:
    """A folder for pictures, which is made if it is missing.

    For programs: `parser.add_argument("--out", type=dp.plot.folder)` tells in one
    sentence, and not in a traceback, why a path is none.

    **Arguments:**

    - `path`: where it is.

    **Returns:** the path, a `pathlib.Path`.
    """
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"no folder for pictures can be made at {path}: {error.strerror}"
        ) from None
    return pathlib.Path(path)


def new_axes(rows: int = 1, size: tuple = (7.0, 4.2)):
    # A figure that pyplot does not know: nothing to close, no window opens.
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure.subplots(rows, sharex=True, squeeze=False)[:, 0]


def check_axes(ax, num: int | None):
    """Raises for what is not so many axes; `None` is one, not in a sequence."""
    need_matplotlib()
    from matplotlib.axes import Axes

    some = [ax] if num is None else np.ravel(np.asarray(ax, object)).tolist()
    good = all(isinstance(one, Axes) for one in some) and len(some) == (num or 1)
    if ax is not None and not good:
        how = "`plt.gca()`" if num is None else f"`plt.subplots({num})[1]`"
        raise TypeError(
            f"`ax` is {came(ax)}; {num or 'one'} axes are expected, as in {how}."
        )


def style(ax, xlabel: str, ylabel: str):
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def holds(value: Any) -> bool:
    """Whether it has states and controls; raises for a batch."""
    if not isinstance(value, dp.Solution | dp.Trajectory):
        return False
    if np.ndim(value.cost):
        raise ValueError(
            f"A batch of {np.size(value.cost)} solutions came; draw one of them, such "
            "as `solution[0]`."
        )
    return True


def came(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    array = isinstance(value, jax.Array | np.ndarray)
    return f"an array of shape {value.shape}" if array else f"{value!r:.100}"
