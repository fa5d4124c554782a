import numpy as np


# All functions here run on numpy at construction; evaluation is a matter of `Track`.


def chord_lengths(points: np.ndarray) -> np.ndarray:
    """Length of the polyline from its first point to each point."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def fit(knots: np.ndarray, values: np.ndarray, closed: bool) -> np.ndarray:
    r"""The cubic spline through `values`, natural or (closed) periodic.

    On interval i, with $\tau = t - t_i$, it is $a_i + b_i\tau + c_i\tau^2 + d_i\tau^3$.
    The derivatives k at the knots make the second derivative continuous:

    $$r_{i-1} k_{i-1} + 2 (r_{i-1} + r_i) k_i + r_i k_{i+1}
    = 3 (r_i^2 \Delta_i + r_{i-1}^2 \Delta_{i-1}), \quad
    r_i = 1 / (t_{i+1} - t_i), \; \Delta_i = y_{i+1} - y_i,$$

    with r = 0 beyond the ends of a natural spline.

    **Arguments:**

    - `knots`: increasing parameters, shape `(N+1,)`.
    - `values`: shape `(N+1, d)`; if closed, the last row repeats the first.
    - `closed`: whether the spline is periodic.

    **Returns:** coefficients, shape `(N, 4, d)`.
    """
    r = 1 / np.diff(knots)[:, None]
    change = np.diff(values, axis=0)
    if closed:
        after, before = r, np.roll(r, 1, axis=0)
        rise = 3 * r**2 * change
        rhs = rise + np.roll(rise, 1, axis=0)
    else:
        zero = np.zeros_like(r[:1])
        after, before = np.concatenate([r, zero]), np.concatenate([zero, r])
        rise = np.concatenate([zero * change[:1], 3 * r**2 * change, zero * change[:1]])
        rhs = rise[1:] + rise[:-1]
    k = np.zeros_like(rhs)
    # Jacobi sweeps. The diagonal is twice the rest of its row: each halves the error.
    for _ in range(64):
        neighbors = before * np.roll(k, 1, axis=0) + after * np.roll(k, -1, axis=0)
        k = (rhs - neighbors) / (2 * (before + after))
    if closed:
        k = np.concatenate([k, k[:1]])
    c = (3 * change * r - 2 * k[:-1] - k[1:]) * r
    d = (k[:-1] + k[1:] - 2 * change * r) * r**2
    return np.stack([values[:-1], k[:-1], c, d], axis=1)


def evaluate(
    knots: np.ndarray, coefficients: np.ndarray, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative of a spline at parameters `t`, shape `(len(t), d)` each."""
    i = np.clip(np.searchsorted(knots, t) - 1, 0, len(coefficients) - 1)
    tau = (t - knots[i])[:, None]
    a, b, c, d = np.moveaxis(coefficients[i], 1, 0)
    return a + tau * (b + tau * (c + tau * d)), b + tau * (2 * c + tau * 3 * d)


def even_parameters(
    knots: np.ndarray, coefficients: np.ndarray, num: int
) -> np.ndarray:
    """`num` parameters, first to last knot, that cut a curve into equal lengths."""
    fine = np.unique(
        np.concatenate([np.linspace(a, b, 17) for a, b in zip(knots, knots[1:])])
    )
    points, _ = evaluate(knots, coefficients, fine)
    lengths = chord_lengths(points[:, :2])
    return np.interp(np.linspace(0.0, lengths[-1], num), lengths, fine)


def resample(
    points: np.ndarray, data: np.ndarray, closed: bool, spacing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points about `spacing` apart on the spline through points, and data there."""
    knots = chord_lengths(points)
    num = max(5, 1 + round(knots[-1] / spacing))
    coefficients = fit(knots, points, closed)
    at = even_parameters(knots, coefficients, num)
    even, _ = evaluate(knots, coefficients, at)
    if closed:
        even[-1] = even[0]
    columns = [np.interp(at, knots, column) for column in data.T]
    return even, np.stack(columns, axis=1)


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
