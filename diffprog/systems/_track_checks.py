from collections.abc import Sequence
from typing import Any

import numpy as np


# Rows count from 0. `lines` says in which line of a file each of them stands.
Lines = Sequence[int] | None


def named(lines: Lines, *rows: int) -> str:
    """For messages: "rows 1 and 2 (lines 3 and 4 of the file)"."""
    listed = lambda noun, numbers: (
        f"{noun}{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"
    )
    if lines is None:
        return listed("row", rows)
    in_file = listed("line", [lines[row] for row in rows])
    return f"{listed('row', rows)} ({in_file} of the file)"


def as_numbers(name: str, value: Any, lines: Lines = None) -> np.ndarray:
    """`value` as a float64 array, or a `ValueError` that says which row is wrong."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is not an array of numbers: {error}.") from error
    if not np.all(np.isfinite(array)):
        row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
        place = f" in {named(lines, row)}" if array.ndim else ""
        raise ValueError(
            f"`{name}` has {array[row] if array.ndim else array}{place}; all its "
            "numbers must be finite: drop the row or fill it in."
        )
    return array


def as_points(
    name: str, value: Any, lines: Lines = None, distinct: bool = True
) -> np.ndarray:
    """At least 4 points of the plane; if `distinct`, none equals the one before."""
    points = as_numbers(name, value, lines)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(
            f"`{name}` has shape {points.shape}; points of the plane have shape (N, 2)."
        )
    given = getattr(value, "dtype", None)
    if given in ("float16", "float32") and len(points) > 1:
        lost = float(np.finfo(given).eps) * float(np.max(np.abs(points)))
        step = float(np.mean(np.linalg.norm(np.diff(points, axis=0), axis=1)))
        if lost > 1e-3 * step:
            raise ValueError(
                f"`{name}` is {given}, exact to {lost:.1g} m only so far away, with "
                f"{step:.2g} m from point to point: give NumPy's float64, as read from "
                "the file."
            )
    if len(points) < 4:
        raise ValueError(
            f"`{name}` has {len(points)} points; a track needs at least 4: add points."
        )
    if distinct:
        steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
        if np.min(steps) <= 1e-6 * np.mean(steps):
            row = int(np.argmin(steps))
            raise ValueError(
                f"`{name}` has the same point in {named(lines, row, row + 1)}; a curve "
                "needs different ones: drop one of the rows."
            )
    return points


def as_widths(name: str, value: Any, num: int, lines: Lines = None) -> np.ndarray:
    """One nonnegative width per point."""
    if value is None:
        raise ValueError(f"`{name}` is missing; give both `left` and `right`.")
    widths = as_numbers(name, value, lines)
    if widths.shape not in ((), (num,)):
        raise ValueError(
            f"`{name}` has shape {widths.shape}; give one width, or one per point: "
            f"shape ({num},)."
        )
    if np.any(widths < 0):
        row = int(np.argmin(widths)) if widths.ndim else 0
        raise ValueError(
            f"`{name}` is {np.min(widths)} in {named(lines, row)}; widths count from "
            "the center to a border and are not negative: give distances."
        )
    return np.broadcast_to(widths, (num,))


def check_steps(name: str, points: np.ndarray, closed: bool, lines: Lines) -> None:
    """A `ValueError` where the points step back.

    Such a step is shorter than its neighbors and opposed to both, while these agree.
    In a hairpin of few points they do not agree: it turns once, and not back. The step
    that closes a line may be of any length. `points` of a closed line end with the
    first one.
    """
    steps = np.diff(points, axis=0)
    if closed:
        before, after = np.roll(steps, 1, axis=0), np.roll(steps, -1, axis=0)
    else:
        before = np.concatenate([steps[1:2], steps[:-1]])
        after = np.concatenate([steps[1:], steps[-2:-1]])
    dot = lambda a, b: np.sum(a * b, axis=1)
    opposed = (dot(steps, before) < 0) & (dot(steps, after) < 0)
    shorter = dot(steps, steps) < np.minimum(dot(before, before), dot(after, after))
    shorter[-1] |= closed
    back = np.flatnonzero(opposed & (dot(before, after) > 0) & shorter)
    if not back.size:
        return
    row, last = int(back[0]), len(steps) - 1
    length = np.linalg.norm(steps[row])
    if closed and row == last:
        raise ValueError(
            f"`{name}` ends in {named(lines, row)}, {length:.3g} m past its first "
            "point; a closed line ends before it, or there: drop the last rows."
        )
    raise ValueError(
        f"`{name}` steps back by {length:.3g} m from {named(lines, row)} to "
        f"{named(lines, row + 1)}; points follow each other in the direction of "
        "travel: drop or reorder these rows."
    )
