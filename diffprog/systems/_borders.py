import numpy as np

from . import _spline
from ._track_checks import Lines, meters, named


_ADVANCE = 0.1  # of a border that was narrowed, at least, for each meter of s
_NARROWING = 0.02  # of its distance to the center, at a time
_TAPER = 0.5  # of that distance, before and after
_LEAST = 0.5  # of the distance that was given, at rows and between them
_SAMPLES = 32  # for each interval
_SIDES = ("left", "right")


def fit(
    knots: np.ndarray,
    center: np.ndarray,
    borders: np.ndarray,
    closed: bool,
    points: np.ndarray,
    lines: Lines,
) -> np.ndarray:
    """Splines through three lines, with borders that run forward.

    In a corner of radius R, a border that is w away from the center advances by
    1 - w / R for each meter of the center line. Where it would run backwards it is
    narrowed bit by bit, and ever less before and after that place.

    **Arguments:**

    - `knots`, `center`: parameters and points of the center line.
    - `borders`: points of the left and the right one, shape `(N + 1, 2, 2)`.
    - `closed`: whether the splines are periodic.
    - `points`, `lines`: the center line as it came and its lines in a file, for the
        message.

    **Returns:** coefficients, shape `(N, 4, 3, 2)`.
    """
    offsets = borders - center[:, None]
    share, least, given = np.ones((len(center), 2)), np.zeros(2), None
    while True:
        drawn = center[:, None] + share[..., None] * offsets
        values = np.concatenate([center, drawn.reshape(-1, 4)], axis=1)
        powers = _spline.fit(knots, values, closed).c[::-1]
        coefficients = np.moveaxis(powers, 0, 1).reshape(-1, 4, 3, 2)
        advance = _advance(knots, coefficients)
        given = advance if given is None else given
        folds = advance <= least
        if not np.any(folds):
            _check_drawn(knots, coefficients, share, center, points, lines)
            return coefficients
        for side in np.flatnonzero(np.any(folds, axis=0)):
            far = _distances(knots, folds[:, side], closed)
            widest = np.max(np.linalg.norm(offsets[far == 0, side], axis=-1))
            near = np.maximum(1 - far / (_TAPER * widest), 0)
            share[:, side] *= 1 - _NARROWING * near
        least = np.where(np.any(folds, axis=0), _ADVANCE, least)
        if np.min(share) < _LEAST:
            side = int(np.argmin(np.min(share, axis=0)))
            row = int(np.argmin(given[:, side]))
            away = np.linalg.norm(offsets[row, side])
            radius = away / (1 - given[row, side])
            most = min((1 - _ADVANCE) / _LEAST * radius, 0.997 * away)
            raise ValueError(
                f"`{_SIDES[side]}` is {meters(away, 4)} away from the center in "
                f"{_nearest(center[row], points, lines)}, s = {knots[row]:.1f} m, "
                f"where it runs backwards, as in a corner of radius {meters(radius)}. "
                "Less than that is kept there, and up to about "
                f"{meters(most)} is narrowed to about "
                f"{meters((1 - _ADVANCE) * radius)}: lower the width, or smooth the "
                "center line."
            )


def check_sides(center: np.ndarray, borders: np.ndarray, closed: bool) -> None:
    """A `ValueError` unless the borders lie to the left and to the right."""
    offsets, normal = borders - center[:, None], normals(center, closed)[:, None]
    across = np.sum(offsets * normal, axis=-1) * [-1.0, 1.0]
    for name, side in zip(_SIDES, across.T, strict=True):
        if np.min(side) < -1e-6 * np.max(np.abs(side)):
            raise ValueError(
                f"`{name}` lies on the other side of `center` in row "
                f"{np.argmin(side)}, seen in the direction of travel: exchange "
                "`left` and `right`, or reverse the rows of all three."
            )


def normals(center: np.ndarray, closed: bool) -> np.ndarray:
    """Unit normals of the spline through points, to the right of travel."""
    knots = _spline.chord_lengths(center)
    return right_of(_spline.fit(knots, center, closed)(knots, 1))


def right_of(slope: np.ndarray) -> np.ndarray:
    """Unit normals to the right of directions, shape `(..., 2)`."""
    normal = np.stack([slope[..., 1], -slope[..., 0]], axis=-1)
    return normal / np.linalg.norm(slope, axis=-1, keepdims=True)


def _check_drawn(knots, coefficients, share, center, points, lines):
    # Between rows, splines may cross or come near whatever they do at rows.
    tau, slopes = _slopes(knots, coefficients)
    normal = right_of(slopes[:, :, 0])[:, :, None]
    apart = coefficients[:, :, 1:] - coefficients[:, :, :1]
    a, b, c, d = np.moveaxis(apart[:, None], 2, 0)
    offsets = a + tau * (b + tau * (c + tau * d))
    across = np.sum(offsets * normal, axis=-1) * [-1.0, 1.0]
    slack = 1e-6 * np.max(np.abs(across))
    least = np.min(across, axis=1)
    if np.min(least) < -slack:
        row, side = np.unravel_index(np.argmin(least), least.shape)
        raise ValueError(
            f"`{_SIDES[side]}` would be drawn {meters(-least[row, side])} beyond the "
            f"center line after {_nearest(center[row], points, lines)}, s = "
            f"{knots[row]:.1f} m, where the line turns back on itself, a sharp corner "
            "has few rows, or the width changes too fast: correct the rows there, or "
            "add some."
        )
    # The distances given at rows, and linear between them.
    begin, end = across[:, :1] / share[:-1, None], across[:, -1:] / share[1:, None]
    given = begin + np.linspace(0.0, 1.0, _SAMPLES + 1)[:, None] * (end - begin)
    narrowed = np.minimum(share[:-1], share[1:]) < 1
    spare = np.where(narrowed[:, None], across - _LEAST * given, 0.0)
    if np.min(spare) < -slack:
        row, sample, side = worst = np.unravel_index(np.argmin(spare), spare.shape)
        s = knots[row] + tau[row, sample, 0, 0]
        raise ValueError(
            f"`{_SIDES[side]}` would be drawn {meters(across[worst])} away from the "
            f"center after {_nearest(center[row], points, lines)}, s = {s:.1f} m, "
            f"where {meters(given[worst])} are given: a corner there is too sharp for "
            "them, or has too few rows. Lower the width, or add rows, as `spacing` in "
            "`from_waypoints` does."
        )


def _nearest(place, points, lines):
    # The row that came: the center line may have been resampled.
    return named(lines, int(np.argmin(np.linalg.norm(points - place, axis=1))))


def _slopes(knots, coefficients):
    # At samples of each interval: tau, and slopes, shape (N, _SAMPLES + 1, 3, 2).
    tau = np.linspace(0.0, np.diff(knots), _SAMPLES + 1, axis=1)[..., None, None]
    _, b, c, d = np.moveaxis(coefficients[:, None], 2, 0)
    return tau, b + tau * (2 * c + tau * 3 * d)


def _advance(knots, coefficients):
    # The least one of each border in each interval, shape (N, 2).
    _, slopes = _slopes(knots, coefficients)
    middle = slopes[:, :, :1]
    along = np.sum(slopes[:, :, 1:] * middle, axis=-1) / np.sum(middle**2, axis=-1)
    return np.min(along, axis=1)


def _distances(knots, folds, closed):
    # Of each knot to the nearest end of a folded interval.
    ends = np.concatenate([folds, [False]]) | np.concatenate([[False], folds])
    places = knots[ends]
    if closed:
        places = np.concatenate([places - knots[-1], places, places + knots[-1]])
    after = np.clip(np.searchsorted(places, knots), 0, len(places) - 1)
    both = places[np.stack([np.maximum(after - 1, 0), after])]
    return np.min(np.abs(knots - both), axis=0)
