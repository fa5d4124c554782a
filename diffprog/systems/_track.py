"""Tracks: how they are made of points, borders and files, and their lines."""

import os
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from . import _borders, _circuits, _spline, _track_files
from ._track_checks import as_points, as_widths, check_steps, Lines


_SMOOTHING = 1e-6  # half width of the rounded corner of the clamp at an open end [m]
# A closing gap repeats the first point if it is at most this part of the steps before
# and after it: these go on in one direction, or there is a corner.
_GAP, _CORNER_GAP = 0.1, 1e-3
_FAR = 1000.0  # coordinates beyond [m] are kept relative to an origin


class Track(eqx.Module):
    r"""A track: a center line and its left and right borders, as cubic splines.

    All three lines share one parameter s, the length of the polyline through the
    waypoints of the center line, which is close to arc length [m]. The first waypoint
    has s = 0.

    - `length`, `closed`: a closed track takes s modulo its length, others stop there.
    - `origin`: the point [m] that all points are relative to, and the states of a car
        on the track: on the map they lie at `track.origin + point`, which takes
        float64. It is (0, 0), unless a coordinate of the first point is beyond 1000 m,
        as in map projections, where float32 is off by up to half a meter. Then it is
        the first point, rounded to meters.
    - `knots`, `coefficients`, `first`, `halvings`: the splines; not to be relied on.

    A border that is further from the center than the radius of a corner would run
    backwards there. The radius is that of the fitted line, which may be sharper than
    the corner that was measured, most of all where a straight meets an arc. The border
    is drawn nearer, at about nine tenths of the radius, so that it runs forward, and
    tapers before and after the corner, where between rows it may bulge by some percent
    of the distance; `half_widths` says where it is. Where less than half of the
    distance would be left, at a row or between rows, that is an error.

    Make one by `from_waypoints`, `from_borders`, `from_csv` or `from_json`, or take a
    ready one: `oval`, `chicane`, `grand_prix` (full size), `line`, `bend`, `circle`,
    `simple` (miniature).

    The constructors fit the splines by SciPy, once; they are data, not differentiated.
    Every method takes one s or an array of them and follows the dtype of an array.
    """

    knots: Float[Array | np.ndarray, " knots"]
    coefficients: Float[Array | np.ndarray, "pieces 4 3 2"]
    first: Int[Array | np.ndarray, " bins"]
    length: float | Float[Array, ""]
    origin: Float[Array | np.ndarray, " 2"]
    closed: bool = eqx.field(static=True)
    halvings: int = eqx.field(static=True)

    @classmethod
    def from_waypoints(
        cls,
        points: Any,
        half_width: Any = None,
        *,
        left: Any = None,
        right: Any = None,
        closed: bool = True,
        spacing: float | None = None,
    ) -> "Track":
        """A track through points of its center line.

        **Arguments:**

        - `points`: center line in the direction of travel [m], shape `(N, 2)`, N >= 4.
            If closed, the last one may repeat the first, and need not hit it: it is
            dropped if the gap between them, to either side, is at most a tenth of the
            steps before and after it (a thousandth where these are at right angles or
            more).
        - `half_width`: distance from the center to either border [m], a number or
            shape `(N,)`.
        - `left`, `right`: these distances one by one, instead of `half_width`.
        - `closed`: whether the last point joins the first one.
        - `spacing`: about the distance [m] to which the center line is resampled before
            the borders are drawn; by default the points stay as they are.

        **Returns:** a track.

        **Raises:** `ValueError` for less than 4 points, repeated points, numbers that
        are not finite, negative or missing widths; for rows that step back: from one
        turn by more than 90 degrees to the next they are within half of the width to
        one side of the line before or after them, or are one step, shorter than both
        its neighbors, which agree (so the sharp turn of a hairpin of few points is
        none); for rows that come twice, as in two laps; for a closed track that ends
        past its first point; for borders that are more than about 1.8 times as far away
        as the radius of a corner, or would cross the center line; for points in
        float32, or rounded to it, where that changes the curvature by more than about a
        tenth of what it is in the corners.
        """
        return cls._from_widths(points, half_width, left, right, closed, spacing)

    @classmethod
    def _from_widths(
        cls, points, half_width, left, right, closed, spacing=None, lines: Lines = None
    ):
        points = as_points("points", points, lines)
        if (half_width is None) == (left is None and right is None):
            raise ValueError(
                "Give the width of the track once: either `half_width`, or `left` and "
                "`right`."
            )
        if half_width is not None:
            sides = [as_widths("half_width", half_width, len(points))] * 2
        else:
            sides = [
                as_widths("left", left, len(points), lines),
                as_widths("right", right, len(points), lines),
            ]
        widths = np.stack(sides, axis=1)
        origin = _origin(points)
        center, widths = _close(points - origin, widths, closed)
        check_steps("points", center, widths, closed, lines)
        given = (center, lines)
        if spacing is not None:
            center, widths = _spline.resample(center, widths, closed, spacing)
        across = _borders.normals(center, closed)[:, None] * [[-1.0], [1.0]]
        borders = center[:, None] + widths[..., None] * across
        return cls._fit(center, borders, closed, origin, given)

    @classmethod
    def from_borders(
        cls, center: Any, left: Any, right: Any, *, closed: bool = True
    ) -> "Track":
        """A track through points of its three lines.

        **Arguments:**

        - `center`, `left`, `right`: points of the lines in the direction of travel [m],
            shape `(N, 2)` each, N >= 4.
        - `closed`: whether the last point joins the first one.

        **Returns:** a track; nothing is resampled, and nothing moved but borders that
        would run backwards.

        **Raises:** `ValueError` as `from_waypoints`, for lines with different numbers
        of points, and for a border on the wrong side of the center line.
        """
        given = [
            as_points(name, value, distinct=name == "center")
            for name, value in (("center", center), ("left", left), ("right", right))
        ]
        if len({len(points) for points in given}) > 1:
            raise ValueError(
                "`center`, `left` and `right` have "
                f"{', '.join(str(len(points)) for points in given)} points; give each "
                "the same number."
            )
        origin = _origin(given[0])
        center, *borders = (points - origin for points in given)
        center, borders = _close(center, np.stack(borders, axis=1), closed)
        widths = np.linalg.norm(borders - center[:, None], axis=-1)
        check_steps("center", center, widths, closed, None)
        _borders.check_sides(center, borders, closed)
        return cls._fit(center, borders, closed, origin, (center, None))

    @classmethod
    def _fit(cls, center, borders, closed, origin, given):
        knots = _spline.chord_lengths(center)
        coefficients = _borders.fit(knots, center, borders, closed, *given)
        first, halvings = _spline.first_intervals(knots)
        length = float(knots[-1])
        return cls(knots, coefficients, first, length, origin, closed, halvings)

    @classmethod
    def from_csv(
        cls, path: str | os.PathLike, half_width: Any = None, *, closed: bool = True
    ) -> "Track":
        """Reads a track in the format of public race track databases.

        The columns are `x_m,y_m,w_tr_right_m,w_tr_left_m`: the center line and the
        distances from it to the borders [m]. A header line, plain or behind a `#`, may
        name them in another order or among others, in capitals or not; one of other
        names is refused. Any other `#` begins a comment. Commas, semicolons, tabs or
        spaces separate the cells; where it is not the comma, numbers may have a decimal
        comma, and none may have thousands separators. A first line `sep=;`, as
        spreadsheets write it, is skipped. Files are in UTF-8, UTF-16 or Latin-1.

        **Arguments:**

        - `path`: the file.
        - `half_width`: distance from the center to either border [m], instead of the
            widths of the file, which then needs only the columns `x_m,y_m`.
        - `closed`: whether the last point joins the first one.

        **Returns:** a track.

        **Raises:** `FileNotFoundError`, or `ValueError` for missing columns, for cells
        that are no numbers, for commas that may separate thousands or be decimal
        ones, and as `from_waypoints`.

        Source: TUMFTM/racetrack-database, 2019, for the format.
        """
        points, widths, lines, doubt = _track_files.read_csv(path, half_width is None)
        right, left = widths.T if half_width is None else (None, None)
        with _track_files.doubted(doubt):
            return cls._from_widths(
                points, half_width, left, right, closed, lines=lines
            )

    @classmethod
    def from_json(cls, path: str | os.PathLike, *, closed: bool = True) -> "Track":
        """Reads a track from the six columns `X`, `Y`, `X_i`, `Y_i`, `X_o`, `Y_o`.

        They are the center line, the inner (left) and the outer (right) border [m].
        Each is a list of numbers, or an object that maps "0", "1", ... to numbers.

        **Arguments:**

        - `path`: the file.
        - `closed`: whether the last point joins the first one.

        **Returns:** a track.

        **Raises:** `FileNotFoundError`, or `ValueError` for missing columns, for
        entries that are no numbers, and as `from_borders`.

        Source: alexliniger/MPCC, 2015, for the format.
        """
        return cls.from_borders(*_track_files.read_json(path), closed=closed)

    @classmethod
    def line(cls) -> "Track":
        """A miniature straight of 0.7 m, open."""
        return cls._miniature(_circuits.line(), closed=False)

    @classmethod
    def bend(cls) -> "Track":
        """A miniature left bend between two straights, open, 1.0 m."""
        return cls._miniature(_circuits.bend(), closed=False)

    @classmethod
    def circle(cls) -> "Track":
        """A miniature circle, 1.8 m."""
        return cls._miniature(_circuits.circle(), closed=True)

    @classmethod
    def simple(cls) -> "Track":
        """A miniature circuit with five left bends and a right one, 5.6 m."""
        return cls._miniature(_circuits.simple(), closed=True)

    @classmethod
    def _miniature(cls, path, closed):
        # A spline through the drawn path, cut into 99 parts of equal parameter.
        knots = _spline.chord_lengths(path)
        spline, at = _spline.fit(knots, path, closed), np.linspace(0.0, knots[-1], 100)
        center, normal = spline(at), 0.185 * _borders.right_of(spline(at, 1))
        return cls.from_borders(center, center - normal, center + normal, closed=closed)

    @classmethod
    def oval(
        cls, straight: float = 150.0, radius: float = 40.0, half_width: float = 5.0
    ) -> "Track":
        """Two straights joined by two half circles, 549 m by default.

        **Arguments:**

        - `straight`: length of a straight [m].
        - `radius`: radius of a half circle [m].
        - `half_width`: distance from the center to either border [m].
        """
        return cls.from_waypoints(_circuits.oval(straight, radius), half_width)

    @classmethod
    def chicane(cls) -> "Track":
        """A full-size circuit of 0.76 km, one of its straights broken by a chicane.

        10 m wide.
        """
        return cls.from_waypoints(_circuits.chicane(), 5.0)

    @classmethod
    def grand_prix(cls) -> "Track":
        """A full-size circuit of 2.8 km with a hairpin, esses, sweepers and straights.

        10 to 12 m wide; the radii of its corners lie between 22 and 120 m.
        """
        points, half_width = _circuits.grand_prix()
        return cls.from_waypoints(points, half_width)

    def scaled(self, factor: float) -> "Track":
        """The same track with all lengths times `factor`: 1/43 makes a miniature."""
        power = np.power(float(factor), [1.0, 0.0, -1.0, -2.0])
        coefficients = np.asarray(self.coefficients) * power[:, None, None]
        knots, origin = factor * np.asarray(self.knots), factor * self.origin
        length = factor * self.length
        fixed = (self.closed, self.halvings)
        return Track(knots, coefficients, self.first, length, origin, *fixed)

    def lines(
        self, s: Float[ArrayLike, "*shape"]
    ) -> tuple[Float[Array, "*shape 3 2"], Float[Array, "*shape 3 2"]]:
        """Points of the center, left and right line [m], and their derivatives in s."""
        s = s if isinstance(s, jax.Array) else jnp.asarray(s, float)
        length = self.length
        if self.closed:
            s = s - length * jnp.floor(s / length)
        else:
            # min(s, length) with a corner rounded so that it can be differentiated.
            z = length - s
            ramp = jnp.clip(z + _SMOOTHING, 0.0, 2 * _SMOOTHING)
            s = length - ramp**2 / (4 * _SMOOTHING) - jnp.maximum(z - _SMOOTHING, 0.0)
        knots = jnp.asarray(self.knots, s.dtype)
        num_bins, last = self.first.shape[0], self.coefficients.shape[0] - 1
        bin = jnp.floor(s / length * num_bins).astype(jnp.int32)
        i = jnp.asarray(self.first)[jnp.clip(bin, 0, num_bins - 1)]
        # At most 2**halvings - 1 knots lie inside a bin, mostly one.
        for k in reversed(range(self.halvings)):
            ahead = jnp.minimum(i + 2**k, last)
            i = jnp.where(s > knots[ahead], ahead, i)
        row = jnp.asarray(self.coefficients, s.dtype)[i]
        a, b, c, d = (row[..., j, :, :] for j in range(4))
        tau = (s - knots[i])[..., None, None]
        return a + tau * (b + tau * (c + tau * d)), b + tau * (2 * c + tau * 3 * d)

    def center(self, s: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape 2"]:
        """The point of the center line [m]."""
        return self.lines(s)[0][..., 0, :]

    def left(self, s: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape 2"]:
        """The point of the left border [m]."""
        return self.lines(s)[0][..., 1, :]

    def right(self, s: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape 2"]:
        """The point of the right border [m]."""
        return self.lines(s)[0][..., 2, :]

    def derivative(self, s: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape 2"]:
        """The derivative of the center line, about the unit vector of travel."""
        return self.lines(s)[1][..., 0, :]

    def heading(self, s: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        """The direction of travel on the center line [rad], in [-pi, pi]."""
        slope = self.derivative(s)
        return jnp.arctan2(slope[..., 1], slope[..., 0])

    def normal(self, s: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape 2"]:
        """The unit normal of the center line; it points to the right of travel."""
        return right_normal(self.derivative(s))

    def half_widths(
        self, s: Float[ArrayLike, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """The distances to the left and right border along the normal [m]."""
        points, slopes = self.lines(s)
        normal = right_normal(slopes[..., 0, :])
        center, left, right = (points[..., j, :] for j in range(3))
        across = lambda border: jnp.sum((border - center) * normal, axis=-1)
        return -across(left), across(right)


def right_normal(slope: Float[Array, "*shape 2"]) -> Float[Array, "*shape 2"]:
    """The unit normal (y', -x') / |.| to the right of a direction."""
    dx, dy = slope[..., 0], slope[..., 1]
    return jnp.stack([dy, -dx], axis=-1) / jnp.sqrt(dx**2 + dy**2)[..., None]


def _origin(points: np.ndarray) -> np.ndarray:
    far = np.max(np.abs(points[0])) > _FAR
    return np.round(points[0]) if far else np.zeros(2)


def _close(center, data, closed):
    # The rows of a closed line end with its first row, given or added.
    if not closed:
        return center, data
    before, after = center[-1] - center[-2], center[1] - center[0]
    part = _GAP if before @ after > 0 else _CORNER_GAP
    step = min(np.linalg.norm(before), np.linalg.norm(after))
    if np.linalg.norm(center[-1] - center[0]) <= part * step:
        center, data = center[:-1], data[:-1]
        if len(center) < 4:
            raise ValueError(
                f"A closed track needs at least 4 different points; {len(center)} came."
            )
    return np.concatenate([center, center[:1]]), np.concatenate([data, data[:1]])
