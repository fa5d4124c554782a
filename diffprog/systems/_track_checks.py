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


def meters(length: float | np.floating, digits: int = 3) -> str:
    """For messages: rounded to `digits`, and without an exponent where it is large."""
    return f"{float(f'{length:.{digits}g}'):g} m"


def as_numbers(name: str, value: Any, lines: Lines = None) -> np.ndarray:
    """`value` as a float64 array, or a `ValueError` that says which row is wrong."""
    try:
        given = np.asarray(value)
        if given.dtype.kind in "bSU":
            first = given.ravel()[:1].tolist()
            kind = "true or false" if given.dtype.kind == "b" else "text"
            raise ValueError(f"it begins with {kind}, {first}; give numbers")
        array = np.asarray(given, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` is not an array of numbers: {error}.") from error
    if array.ndim == 0 and not np.isfinite(array):
        raise ValueError(f"`{name}` is {array}; give a finite number.")
    if not np.all(np.isfinite(array)):
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(
            f"`{name}` has {array[row]} in {named(lines, row)}; all its numbers must "
            "be finite: drop the row or fill it in."
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
    if len(points) > 2:
        _check_rounding(name, points, getattr(value, "dtype", None))
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


def _check_rounding(name, points, dtype):
    """A `ValueError` where the rounding of float16 or float32 makes a curve rough.

    A rounding e turns the steps, of length d, by about e / d, and changes the curvature
    by up to about 4 e / d^2. Too much is a thousandth of the one, and of the other a
    tenth of what it is in the corners of the line.
    """
    if dtype not in ("float16", "float32"):
        # Of numbers that came through float32, every other one ends in an odd bit.
        with np.errstate(over="ignore"):
            single = points.astype(np.float32)
        odd = np.mean(single.view(np.int32) & 1, axis=0)
        if np.any(single != points) or np.min(odd) < 0.25:
            return
        came, dtype = "was rounded to float32", "float32"
    else:
        came = f"is {dtype}"
    steps = np.diff(points, axis=0)
    step = float(np.mean(np.linalg.norm(steps, axis=1)))
    x, y = steps.T
    turns = np.arctan2(x[:-1] * y[1:] - y[:-1] * x[1:], x[:-1] * x[1:] + y[:-1] * y[1:])
    # A line turns no less than the circle that is as long.
    turn = max(np.quantile(np.abs(turns), 0.9), 2 * np.pi / len(steps))
    lost = float(np.finfo(dtype).eps) * float(np.max(np.abs(points)))
    if lost > min(1e-3, 0.1 / 4 * turn) * step:
        raise ValueError(
            f"`{name}` {came}, exact to {meters(lost, 1)} only at such coordinates, "
            f"with {meters(step, 2)} from point to point: give NumPy's float64, as "
            "read from the file, or keep fewer rows."
        )


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
        place = f" in {named(lines, int(np.argmin(widths)))}" if widths.ndim else ""
        raise ValueError(
            f"`{name}` is {np.min(widths)}{place}; widths count from the center to a "
            "border and are not negative: give distances."
        )
    return np.broadcast_to(widths, (num,))


def check_steps(
    name: str, points: np.ndarray, widths: np.ndarray, closed: bool, lines: Lines
) -> None:
    """A `ValueError` where the points step back, or cover the same ground again.

    `points` of a closed line end with the first one; `widths` are the distances to the
    borders, shape `(N, 2)`.
    """
    num = len(points) - 1 if closed else len(points)
    if closed and _ends_beside(points):
        beside, step = np.linalg.norm(np.diff(points[-3:], axis=0), axis=1)[::-1]
        raise ValueError(
            f"`{name}` ends in {named(lines, num - 1)}, {meters(beside)} beside its "
            f"first point, with {meters(step)} from row to row: drop the row if it "
            "repeats the first one."
        )
    back = _short_step_back(points, closed) or _run_back(points, widths, closed)
    if back:
        first, last = back
        length = meters(np.linalg.norm(points[last % num] - points[first]))
        if closed and back == (num - 1, num):
            raise ValueError(
                f"`{name}` ends in {named(lines, first)}, {length} past its first "
                "point; a closed line ends before it, or there: drop the last rows."
            )
        raise ValueError(
            f"`{name}` steps back by {length} from {named(lines, first)} to "
            f"{named(lines, last % num)}; points follow each other in the direction "
            "of travel: drop or reorder these rows."
        )
    copies = _copies(points)
    if copies:
        was, again = (named(lines, row % num, (row + 1) % num) for row in copies)
        raise ValueError(
            f"`{name}` has {was} again as {again}; a track covers its ground once: "
            "keep one lap, and one copy of each row."
        )


def _ends_beside(points):
    """Whether the step that closes a line is short, and aside of those around it."""
    steps = np.array([points[-2] - points[-3], points[1] - points[0]])
    sizes = np.linalg.norm(steps, axis=1)
    before, after = steps / sizes[:, None]
    closing = points[-1] - points[-2]
    length = np.linalg.norm(closing)
    aside = max(abs(closing @ before), abs(closing @ after)) < 0.5 * length
    return before @ after > 0.7 and length < min(sizes) and aside


def _short_step_back(points, closed):
    """First and last row of a step that is shorter than its neighbors, and opposed.

    They agree with each other. In a hairpin of few points they do not: it turns once,
    and not back. The step that closes a line may be of any length.
    """
    steps = np.diff(points, axis=0)
    before, after = np.roll(steps, 1, axis=0), np.roll(steps, -1, axis=0)
    if not closed:
        before[0], after[-1] = steps[1], steps[-2]
    dot = lambda a, b: np.sum(a * b, axis=1)
    opposed = (dot(steps, before) < 0) & (dot(steps, after) < 0)
    shorter = dot(steps, steps) < np.minimum(dot(before, before), dot(after, after))
    shorter[-1] |= closed
    rows = np.flatnonzero(opposed & (dot(before, after) > 0) & shorter)
    return (int(rows[0]), int(rows[0]) + 1) if rows.size else None


def _run_back(points, widths, closed):
    """First and last row of a run that lies on the line before or after it.

    Runs lie between turns by more than 90 degrees and the ends of an open line. One
    runs back if its rows lie beside the line before it, or that after it, in the other
    direction: nearer than half of the width to one side, or a hundredth of the run. The
    straights of a hairpin lie a width apart.
    """
    steps, width = np.diff(points, axis=0), np.min(widths, axis=1)
    s = np.append(0.0, np.cumsum(np.linalg.norm(steps, axis=1)))
    num, total = len(steps), s[-1]
    folds = np.flatnonzero(np.sum(steps * np.roll(steps, 1, axis=0), axis=1) < 0)
    if closed:
        folds = num + np.append(folds, folds[:1] + num)
        # A lap before and one after, where the lines around a run may lie.
        s = np.concatenate([s[:-1] - total, s[:-1], s + total])
        points = np.concatenate([points[:-1], points[:-1], points])
        width = np.concatenate([width[:-1], width[:-1], width])
    else:
        folds = np.concatenate([[0], folds[folds > 0], [num]])
    if len(folds) < 3:
        return None  # a line that turns back once is a hairpin
    for first, last in zip(folds[:-1], folds[1:], strict=True):
        run = s[last] - s[first]
        # A closed line has to cover the ground three times: before, back and after.
        reach = min(2 * run, (total - run) / 2) if closed else 2 * run
        back = np.diff(points[first : last + 1], axis=0)
        near = np.maximum(width[first : last + 1] / 2, 0.01 * run)
        for rows, a, b in (
            (points[first + 1 : last + 1], max(s[first] - reach, s[0]), s[first]),
            (points[first:last], s[last], min(s[last] + reach, s[-1])),
        ):
            line = _part(points, s, a, b)
            beside = near[1:] if b == s[first] else near[:-1]
            if a < b and all(map(_opposes, rows, back, beside, [line] * len(rows))):
                shift = num if closed else 0
                return int(first - shift), int(last - shift)
    return None


def _part(points, s, a, b):
    # Of a polyline, between the lengths a and b.
    at = np.concatenate([[a], s[(s > a) & (s < b)], [b]])
    return np.stack([np.interp(at, s, column) for column in points.T], axis=1)


def _opposes(point, step, near, line):
    # Whether a step from or to a point runs against the line beside it.
    begins, steps = line[:-1], np.diff(line, axis=0)
    part = np.sum((point - begins) * steps, axis=1) / np.sum(steps**2, axis=1)
    nearest = begins + np.clip(part, 0.0, 1.0)[:, None] * steps
    away = np.linalg.norm(point - nearest, axis=1)
    along = steps[np.argmin(away)]
    cosine = step @ along / (np.linalg.norm(step) * np.linalg.norm(along))
    return np.min(away) < near and cosine < -0.5


def _copies(points):
    # A crossing shares one point; two rows in a row that come again are a copy.
    seen: dict[bytes, int] = {}
    for row, pair in enumerate(np.hstack([points[:-1], points[1:]])):
        was = seen.setdefault(pair.tobytes(), row)
        if was != row:
            return was, row
    return None
