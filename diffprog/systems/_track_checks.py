from typing import Any

import numpy as np


def as_numbers(name: str, value: Any) -> np.ndarray:
    """`value` as a float64 array, or a `ValueError` that says which row is wrong."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is not an array of numbers: {error}.") from error
    if not np.all(np.isfinite(array)):
        row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
        raise ValueError(
            f"`{name}` has {array[row] if array.ndim else array} in row {row}; all its "
            "numbers must be finite: drop the row or fill it in."
        )
    return array


def as_points(name: str, value: Any, distinct: bool = True) -> np.ndarray:
    """At least 4 points of the plane; if `distinct`, none equals the one before."""
    points = as_numbers(name, value)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(
            f"`{name}` has shape {points.shape}; points of the plane have shape (N, 2)."
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
                f"`{name}` has the same point in rows {row} and {row + 1}; a curve "
                "needs different ones: drop one of the rows."
            )
    return points


def as_widths(name: str, value: Any, num: int) -> np.ndarray:
    """One nonnegative width per point."""
    if value is None:
        raise ValueError(f"`{name}` is missing; give both `left` and `right`.")
    widths = as_numbers(name, value)
    if widths.shape not in ((), (num,)):
        raise ValueError(
            f"`{name}` has shape {widths.shape}; give one width, or one per point: "
            f"shape ({num},)."
        )
    if np.any(widths < 0):
        row = int(np.argmin(widths)) if widths.ndim else 0
        raise ValueError(
            f"`{name}` is {np.min(widths)} in row {row}; widths count from the center "
            "to a border and are not negative: give distances."
        )
    return np.broadcast_to(widths, (num,))
