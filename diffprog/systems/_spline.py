from typing import Any

import numpy as np


# All functions here run at construction, in float64; evaluation is a matter of `Track`.


def chord_lengths(points: np.ndarray) -> np.ndarray:
    """Length of the polyline from its first point to each point."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def fit(knots: np.ndarray, values: np.ndarray, closed: bool) -> Any:
    """The cubic spline through `values`, natural or (closed) periodic.

    **Arguments:**

    - `knots`: increasing parameters, shape `(N+1,)`.
    - `values`: shape `(N+1, d)`; if closed, the last row repeats the first.
    - `closed`: whether the spline is periodic.

    **Returns:** a `scipy.interpolate.CubicSpline`.
    """
    from scipy.interpolate import CubicSpline  # slow to import

    if not closed:
        return CubicSpline(knots, values, bc_type="natural")
    values = np.concatenate([values[:-1], values[:1]])  # equal up to rounding
    return CubicSpline(knots, values, bc_type="periodic")


def resample(
    points: np.ndarray, data: np.ndarray, closed: bool, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points about `spacing` apart on the spline through points, and data there."""
    knots = chord_lengths(points)
    num = max(5, 1 + round(knots[-1] / spacing))
    spline = fit(knots, points, closed)
    fine = np.unique(np.linspace(knots[:-1], knots[1:], 17))
    lengths = chord_lengths(spline(fine))
    at = np.interp(np.linspace(0.0, lengths[-1], num), lengths, fine)
    columns = [np.interp(at, knots, column) for column in data.T]
    return spline(at), np.stack(columns, axis=1)


def first_intervals(knots: np.ndarray) -> tuple[np.ndarray, int]:
    """A table to look up intervals: the one where each of equal bins begins.

    The bins are shorter than any interval, but at most 4 for each interval.

    **Returns:** the table, and how many halvings find the interval inside a bin: one
    if no bin holds more than one knot.
    """
    length, num = knots[-1], len(knots) - 1
    num_bins = int(min(np.ceil(1.01 * length / np.min(np.diff(knots))), 4 * num))
    starts = np.arange(num_bins) * (length / num_bins)
    first, last = (
        np.searchsorted(knots, at, side="right") - 1
        for at in (starts, starts + (1 + 1e-6) * length / num_bins)
    )
    most = int(np.max(np.minimum(last, num - 1) - first))
    return first.astype(np.int32), max(most, 1).bit_length()
