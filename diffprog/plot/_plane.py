"""Pictures in the plane: tracks, and races on them."""

import os
from typing import Any

import jax
import numpy as np

import diffprog as dp

from ._figure import came, check_axes, holds, need_matplotlib, new_axes, style


def track(track: Any, *, num: int = 1000, ax: Any = None):
    """Draws the borders and the center line of a track.

    **Arguments:**

    - `track`: a [`diffprog.systems.Track`][], or a race on one.
    - `num`: points per line.
    - `ax`: axes; a new figure if `None`.

    **Returns:** the axes, with equal scales, relative to the origin of the track, which
    the labels name unless it is (0, 0). A bar across the track marks its start.
    """
    track = _track(track)
    ax = _plane_axes(ax, _lines(track, 500), bar=False)
    return _draw_track(ax, track, num)


def race(
    path: Any,
    speed: Any = None,
    track: Any = None,
    *,
    label: str = "speed [m/s]",
    ax: Any = None,
):
    """Draws the path of a car, colored by its speed, between the borders of a track.

    `race(problem, solution)` for a solution of a race, or `race(states, speed, track)`.

    **Arguments:**

    - `path`: a [`diffprog.systems.Race`][], a [`diffprog.systems.PathTracking`][] or
        the problem made from it; or positions, or states that begin with them, shape
        `(T+1, n)` [m].
    - `speed`: for the former, its [`diffprog.Solution`][]; for the latter the speed,
        shape `(T+1,)` [m/s].
    - `track`: a [`diffprog.systems.Track`][], drawn below the path; `None` for that of
        the race, or for none.
    - `label`: of the color bar.
    - `ax`: axes; a new figure if `None`.

    **Returns:** the axes, with equal scales and a color bar beside them.

    **Raises:** `TypeError` and `ValueError` for what is none of these.
    """
    system = _system(path)
    if _is_race(system):
        if not holds(speed):
            raise TypeError(
                f"The second argument is {came(speed)}; with a race, its solution is "
                "expected: `race(problem, solution)`."
            )
        points, track = _states(speed), system.track if track is None else track
        speed = _speed(system, points, np.asarray(speed.us))
    else:
        if _is_race(_system(speed)) or speed is None:
            raise TypeError(
                "A path needs its speed, or a race before it: `race(problem, solution)`"
                " or `race(states, speed, track)`."
            )
        points, speed = _states(path), np.asarray(speed)
    if speed.shape != points.shape[:1]:
        raise ValueError(
            f"`speed` is {came(speed)}; one speed for each of the {len(points)} "
            "positions is expected."
        )
    track = None if track is None else _track(track)
    points = points[:, :2]
    need_matplotlib()
    from matplotlib.collections import LineCollection

    ax = _plane_axes(ax, points if track is None else _lines(track, 500), bar=True)
    if track is not None:
        _draw_track(ax, track, 2000)
    pieces = np.stack([points[:-1], points[1:]], axis=1)
    line = LineCollection(
        list(pieces), cmap="turbo", linewidth=2.2, capstyle="round", zorder=3
    )
    line.set_array((speed[:-1] + speed[1:]) / 2)
    ax.add_collection(line)
    _in_the_plane(ax, track).autoscale_view()
    place = dict(location="bottom", shrink=0.5, aspect=40, pad=0.04)
    bar = ax.figure.colorbar(line, ax=ax, label=label, **place)
    bar.outline.set_visible(False)
    return ax


def animation(
    file: str | os.PathLike,
    xs: Any,
    track: Any,
    *,
    dt: float | None = None,
    length: float | None = None,
    width: float | None = None,
    speed: Any = None,
    plans: Any = None,
    window: float | None = None,
    every: int = 1,
    fps: float = 15.0,
    dpi: float = 75.0,
):
    """Writes a race as an animated GIF: the car, its trace and its plan.

    `animation("race.gif", solution, race)`, where the race knows the rest.

    **Arguments:**

    - `file`: where to write; its name ends in `.gif`.
    - `xs`: a [`diffprog.Solution`][], or states that begin with the position [m] and
        the heading [rad], shape `(T+1, n)`.
    - `track`: a [`diffprog.systems.Track`][], or a [`diffprog.systems.Race`][] or
        [`diffprog.systems.PathTracking`][] on one.
    - `dt`: duration of a stage [s]; needed for a track, by default that of the race.
    - `length`, `width`: dimensions of the car [m]; needed for a track, by default those
        of the car of the race.
    - `speed`: shape `(T+1,)` [m/s], for the title and the colors; by default the
        distance between two positions over `dt`.
    - `plans`: planned positions at each stage, shape `(T+1, horizon+1, 2)` [m]; not
        drawn if `None`.
    - `window`: width of the view that follows the car [m]; the whole track if `None`.
    - `every`: stages per frame.
    - `fps`: frames per second of the file.
    - `dpi`: resolution; the picture is 8 inches wide.

    **Returns:** the file.
    """
    need_matplotlib()
    from matplotlib.animation import PillowWriter

    if not os.fspath(file).lower().endswith(".gif"):
        raise ValueError(f"`file` is {os.fspath(file)!r}; a name in .gif is expected.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"`every` is {every!r}; an int >= 1 is expected.")
    xs, system = _states(xs), _system(track)
    if _is_race(system):
        dt = system.dt if dt is None else dt
        length = system.car.length if length is None else length
        width = system.car.width if width is None else width
    track = _track(track)
    if dt is None or length is None or width is None:
        raise TypeError(
            "`dt`, `length` or `width` is missing: give all three, or a race in place "
            "of the track."
        )
    if speed is None:
        speed = np.linalg.norm(np.gradient(xs[:, :2], dt, axis=0), axis=1)
    frame = _Frame(xs, np.asarray(speed), track, plans, length, width, window, dt)
    writer = PillowWriter(fps=fps)  # pyright: ignore[reportArgumentType]
    with writer.saving(frame.figure, os.fspath(file), dpi=dpi):
        for i in range(0, len(xs), every):
            frame.draw(i)
            writer.grab_frame()
    return file


class _Frame:
    """One picture of the animation, moved from stage to stage."""

    def __init__(self, xs, speed, track, plans, length, width, window, dt):
        from matplotlib.patches import Rectangle

        self.xs, self.speed, self.plans = xs, speed, plans
        self.window, self.dt = window, dt
        self.ax = race(xs, speed, track)
        self.figure = self.ax.figure
        # The trace grows with the car; the color bar is about all of it from the start.
        self.trace = self.ax.collections[-1]
        self.pieces = np.stack([xs[:-1, :2], xs[1:, :2]], axis=1)
        self.colors = np.asarray(self.trace.get_array())
        (self.plan,) = self.ax.plot([], [], "m", linewidth=1.6, zorder=4)
        self.car = Rectangle(
            (0.0, 0.0), length, width, facecolor="k", edgecolor="w", zorder=5
        )
        self.corner = np.array([length, width]) / 2
        self.ax.add_patch(self.car)
        # The layout of the first picture is that of all: faster, and nothing jumps.
        self.draw(0)
        self.figure.get_layout_engine().set(h_pad=0.12)
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")

    def draw(self, i: int):
        x, y, heading = self.xs[i, :3]
        cos, sin = np.cos(heading), np.sin(heading)
        # The rectangle turns about its lower left corner.
        a, b = self.corner
        self.car.set_xy((x - cos * a + sin * b, y - sin * a - cos * b))
        self.car.set_angle(np.degrees(heading))
        self.trace.set_segments(list(self.pieces[:i]))
        self.trace.set_array(self.colors[:i])
        if self.plans is not None:
            self.plan.set_data(*np.asarray(self.plans[i]).T)
        if self.window is not None:
            half = self.window / 2
            self.ax.set(
                xlim=(x - half, x + half), ylim=(y - 0.7 * half, y + 0.7 * half)
            )
        self.ax.set_title(f"{i * self.dt:.1f} s, {self.speed[i]:.1f} m/s")


def _draw_track(ax, track, num: int):
    center, left, right = _lines(track, num)
    road = np.concatenate([left, right[::-1]])
    ax.fill(*road.T, color="0.92", linewidth=0, zorder=0)
    for border in (left, right):
        ax.plot(*border.T, color="0.25", linewidth=0.9, zorder=1)
    ax.plot(*center.T, color="0.65", linewidth=0.8, linestyle=(0, (6, 5)), zorder=1)
    if track.closed:
        ax.plot(*np.stack([left[0], right[0]]).T, color="0.25", linewidth=2.0)
    return _in_the_plane(ax, track)


def _lines(track, num: int) -> np.ndarray:
    """Points of the center, left and right line, shape `(3, num, 2)`."""
    s = np.linspace(0.0, float(track.length), num)
    return np.moveaxis(np.asarray(track.lines(s)[0]), 1, 0)


def _plane_axes(ax, points: np.ndarray, bar: bool):
    # A figure as high as its picture is at equal scales.
    check_axes(ax, None)
    if ax is not None:
        return ax
    wide, high = np.ptp(points.reshape(-1, 2), axis=0)
    height = float(np.clip(7.0 * high / max(wide, 1e-9), 1.2, 6.5))
    return new_axes(size=(8.0, height + 0.8 + bar * 0.9))[0]


def _in_the_plane(ax, track=None):
    # On the map, a track lies at its origin.
    east, north = (0.0, 0.0) if track is None else np.asarray(track.origin)
    labels = (
        f"{name} {'+' if start < 0 else '-'} {abs(start):.12g} [m]"
        if start
        else f"{name} [m]"
        for name, start in (("x", east), ("y", north))
    )
    style(ax, *labels).grid(False)
    ax.set_aspect("equal")
    return ax


def _states(xs: Any) -> np.ndarray:
    """Rows that begin with a position."""
    points = np.asarray(xs.xs) if holds(xs) else np.asarray(xs)
    if points.ndim != 2 or points.shape[1] < 2 or points.dtype == object:
        raise ValueError(
            f"The path is {came(xs)}; positions, or states that begin with them, of "
            "shape (T+1, n), or a `dp.Solution` is expected."
        )
    return points


def _speed(race: Any, xs: Any, us: Any) -> np.ndarray:
    """How fast the position, the first two numbers of the state, moves."""
    us = np.concatenate([us, us[-1:]])
    velocity = jax.vmap(lambda x, u: race.vector_field(x, u, 0.0)[:2])
    return np.linalg.norm(np.asarray(velocity(np.asarray(xs), us)), axis=1)


def _system(value: Any) -> Any:
    """The system of a problem that was made from one."""
    return value.system if isinstance(value, dp.ControlProblem) else value


def _is_race(value: Any) -> bool:
    return hasattr(value, "track") and hasattr(value, "car")


def _track(value: Any) -> Any:
    """A track, or that of a race."""
    value = _system(value)
    track = value.track if _is_race(value) else value
    if not isinstance(track, dp.systems.Track):
        raise TypeError(
            f"`track` is {came(track)}; a track such as `dp.systems.Track.circle()` "
            "or `dp.systems.Track.from_csv(path)`, or a race on one, is expected."
        )
    return track
