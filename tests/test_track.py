import functools as ft
import json
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog.systems import Track

from . import helpers


MINIATURE = ["line", "bend", "circle", "simple"]
CIRCUITS = ["oval", "chicane", "grand_prix"]
CLOSED = ["circle", "simple", *CIRCUITS]


@pytest.fixture(scope="module")
def tracks():
    return {name: getattr(Track, name)() for name in MINIATURE + CIRCUITS}


@eqx.filter_jit
def at(track, line, s):
    """What a track says of the places s, compiled."""
    return getattr(track, line)(s)


@eqx.filter_jit
def derivatives(track, s):
    """The lines at s, and their first two derivatives."""
    value = lambda s: track.lines(s)[0]
    slope = jax.jacfwd(value)
    each = jax.vmap(lambda s: (value(s), slope(s), jax.jacfwd(slope)(s)))
    return each(jnp.asarray(s))


@eqx.filter_jit
def across(track, s):
    """The normal, the direction of travel and the two half widths."""
    return track.normal(s), track.derivative(s), *track.half_widths(s)


def around(track, num=2001):
    return np.linspace(0.0, float(track.length), num)


# Length, then lowest and highest x and y of the center line; 5.4 of the published data.
BOXES = {
    "line": (0.69767, 0.0, 0.6977, 0.0, 0.0),
    "bend": (1.03800, 0.0, 0.5814, 0.0, 0.5814),
    "circle": (1.82620, -0.2907, 0.2907, 0.0, 0.5812),
    "simple": (5.64252, -1.162, 0.872, 0.0, 1.163),
}


@pytest.mark.parametrize("name", MINIATURE)
def test_miniature_tracks_have_their_size(tracks, name):
    track = tracks[name]
    points = np.asarray(at(track, "center", track.knots))
    low, high = points.min(axis=0), points.max(axis=0)
    box = [track.length, low[0], high[0], low[1], high[1]]
    np.testing.assert_allclose(box, BOXES[name], atol=7e-4)
    np.testing.assert_allclose(box[0], BOXES[name][0], atol=5e-6)
    assert track.closed == (name in CLOSED)


def test_spot_values_of_the_simple_track(tracks):
    # Computed with the published file, which carries single precision noise.
    track = tracks["simple"]
    close = ft.partial(helpers.close, rtol=1e-6, scale=1.0)
    close(track.center(1.0), [0.869588854585, 0.253467047313])
    close(track.left(1.0), [0.686183603637, 0.27495069319])
    close(track.right(1.0), [1.052994105547, 0.231983401435])
    close(track.derivative(1.0), [0.12694478, 0.99354138])
    close(track.center(2.5), [0.160607475254, 1.132054237812])
    close(track.derivative(2.5), [-0.89561471, -0.44766442])
    close(track.heading(0.0), 0.0)


@pytest.mark.costly
@pytest.mark.parametrize("name", CLOSED)
def test_seam_is_smooth(tracks, name):
    track = tracks[name]
    L = float(track.length)
    ends = derivatives(track, np.array([L * (1 - 1e-13), 0.0]))
    for order, (before, after) in enumerate(ends):
        atol = (1e-9, 1e-8, 1e-6)[order] * max(1.0, L ** (1 - order))
        np.testing.assert_allclose(before, after, atol=atol)
    s = np.linspace(0.1, 0.9, 5) * L
    lines = eqx.filter_jit(lambda s: track.lines(s)[0])
    np.testing.assert_allclose(lines(s + 3 * L), lines(s), atol=1e-9 * L)
    np.testing.assert_allclose(lines(s - L), lines(s), atol=1e-9 * L)
    heading = eqx.filter_jit(track.heading)(around(track))
    heading = np.unwrap(np.asarray(heading))
    np.testing.assert_allclose(heading[-1] - heading[0], 2 * math.pi, atol=1e-6)


@pytest.mark.parametrize("name", ["simple", "bend", "grand_prix"])
def test_knots_are_smooth(tracks, name):
    track = tracks[name]
    knots = np.asarray(track.knots)[1:-1]
    step = 1e-9 * float(track.length)
    left, right = (derivatives(track, knots + sign * step)[2] for sign in (-1, 1))
    np.testing.assert_allclose(left, right, atol=1e-5 * np.abs(right).max())


@pytest.mark.costly
@pytest.mark.parametrize("name", MINIATURE + CIRCUITS)
def test_derivative_is_that_of_the_points(tracks, name):
    track = tracks[name]
    s = np.linspace(0.03, 0.97, 23) * float(track.length)

    @jax.jit
    def both(s):
        slope = jax.vmap(jax.jacfwd(lambda s: track.lines(s)[0]))(s)
        return track.lines(s)[1], slope, track.derivative(around(track))

    own, slope, tangents = both(s)
    np.testing.assert_allclose(own, slope, rtol=1e-9, atol=1e-12)
    # The parameter is close to arc length.
    speed = np.linalg.norm(np.asarray(tangents), axis=1)
    np.testing.assert_allclose(speed, 1.0, atol=0.01)


@pytest.mark.parametrize("name", MINIATURE + CIRCUITS)
def test_borders_lie_across(tracks, name):
    track = tracks[name]
    normal, slope, left, right = map(np.asarray, across(track, around(track, 301)))
    np.testing.assert_allclose(np.sum(normal**2, axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.sum(normal * slope, axis=1), 0.0, atol=1e-12)
    # To the right: the normal is the direction of travel turned by -90 degrees.
    cross = slope[:, 0] * normal[:, 1] - slope[:, 1] * normal[:, 0]
    assert np.all(cross < 0)
    low, high = (0.185, 0.185) if name in MINIATURE else (5.0, 6.0)
    for width in (left, right):
        assert np.all(width > 0.995 * low) and np.all(width < 1.005 * high)


def test_line_has_its_right_border_below(tracks):
    track = tracks["line"]
    np.testing.assert_allclose(track.normal(0.3), [0.0, -1.0], atol=1e-12)
    np.testing.assert_allclose(track.left(0.3), [0.3, 0.185], atol=1e-12)
    np.testing.assert_allclose(track.right(0.3), [0.3, -0.185], atol=1e-12)


@pytest.mark.parametrize("name", ["line", "bend"])
def test_open_track_stops_smoothly(tracks, name):
    track = tracks[name]
    L = float(track.length)
    end = track.center(L + 5.0)
    np.testing.assert_allclose(end, track.center(L), atol=1e-6)
    for s in (L - 2e-6, L - 5e-7, L + 5e-7, L + 2e-6):
        _, slope, hessian = derivatives(track, np.array([s]))
        assert np.all(np.isfinite(slope)) and np.all(np.isfinite(hessian))
    _, slope, _ = derivatives(track, np.array([L + 1.0]))
    np.testing.assert_allclose(slope[0, :2], 0.0)


def test_grand_prix_is_a_circuit_for_the_full_size_car(tracks):
    track = tracks["grand_prix"]
    assert track.length > 1000.0
    s = around(track, 1001)[:-1]
    heading = lambda s: jnp.sum(
        jnp.stack([1.0, -1.0])
        * jax.jacfwd(track.derivative)(s)[::-1]
        * at(track, "derivative", s)
    )
    curvature = np.asarray(jax.jit(jax.vmap(heading))(s))
    assert 1 / 25.0 < np.abs(curvature).max() < 1 / 20.0  # the car can turn on 9 m
    assert curvature.max() > 0 > curvature.min()
    # No two parts of the track that lie far apart along it come near each other.
    points = np.asarray(at(track, "center", s))[::4]
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    steps = np.abs(np.arange(len(points))[:, None] - np.arange(len(points)))
    along = np.minimum(steps, len(points) - steps) * float(track.length) / len(points)
    assert apart[along > 60.0].min() > 3 * 12.0


def test_circle_passes_its_waypoints():
    angle = np.linspace(0.0, 2 * math.pi, 24, endpoint=False)
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    width = 0.1 + 0.02 * np.cos(angle)
    track = Track.from_waypoints(points, left=width, right=2 * width)
    assert track.knots.shape == (25,)
    np.testing.assert_allclose(
        at(track, "center", track.knots[:-1]), points, atol=1e-12
    )
    left, right = at(track, "half_widths", track.knots[:-1])
    np.testing.assert_allclose(left, width, atol=1e-12)
    np.testing.assert_allclose(right, 2 * width, atol=1e-12)
    radius = np.linalg.norm(np.asarray(at(track, "center", around(track))), axis=1)
    np.testing.assert_allclose(radius, 1.0, atol=1e-4)
    # A first point repeated at the end changes nothing.
    again = Track.from_waypoints(
        np.concatenate([points, points[:1]]),
        left=np.append(width, width[0]),
        right=np.append(2 * width, 2 * width[0]),
    )
    np.testing.assert_array_equal(again.coefficients, track.coefficients)


def test_open_spline_reproduces_a_line_and_uneven_knots():
    x = np.array([0.0, 0.1, 1.0, 1.05, 3.0, 7.0])
    track = Track.from_waypoints(np.stack([x, 2 * x], axis=1), 0.5, closed=False)
    s = np.linspace(0.0, 7.0 * math.sqrt(5) - 1e-3, 400)
    along = np.array([1.0, 2.0]) / math.sqrt(5)
    np.testing.assert_allclose(at(track, "center", s), s[:, None] * along, atol=1e-12)


def test_natural_spline_has_no_curvature_at_its_ends(tracks):
    second = jax.jit(jax.jacfwd(tracks["bend"].derivative))
    np.testing.assert_allclose(second(jnp.array(0.0)), 0.0, atol=1e-9)
    ends = jnp.array(float(tracks["bend"].length) - 2e-6)
    np.testing.assert_allclose(second(ends), 0.0, atol=1e-3)


def ring(radius=10.0, num=101):
    """A circle whose last point repeats the first."""
    angle = np.linspace(0.0, 2 * math.pi, num)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


@eqx.filter_jit
def curvature(track, s):
    second = jax.vmap(jax.jacfwd(track.derivative))(s)
    slope = at(track, "derivative", s)
    turn = slope[:, 0] * second[:, 1] - slope[:, 1] * second[:, 0]
    return turn / jnp.sum(slope**2, axis=1) ** 1.5


@pytest.mark.parametrize("past", [1e-4, -1e-7, 0.05, -0.05])
def test_last_point_need_not_hit_the_first(past):
    points = ring()
    points[-1] = 10 * np.cos(past / 10), 10 * np.sin(past / 10)
    track = Track.from_waypoints(points, left=1.5, right=1.0)
    assert track.knots.shape == (101,) and track.first.shape < (110,)
    s = around(track)
    np.testing.assert_allclose(curvature(track, jnp.asarray(s)), 0.1, rtol=1e-3)
    left, right = at(track, "half_widths", s)
    np.testing.assert_allclose(left, 1.5, atol=1e-6)
    np.testing.assert_allclose(right, 1.0, atol=1e-6)


def test_uneven_points_have_a_small_table():
    # Two rows 2 mm apart beside rows 3 m apart; interpolation in numpy tells the place.
    x = np.sort(np.append(3.0 * np.arange(40), [60.002, 60.003, 60.004, 60.005]))
    points = np.stack([x, 0.01 * x**2], axis=1)
    track = Track.from_waypoints(points, 1.0, closed=False)
    assert len(track.first) <= 4 * len(x) and track.halvings == 3
    s = np.sort(np.append(around(track)[:-1], track.knots + 1e-4))
    i = np.searchsorted(track.knots, s, side="right") - 1
    a, b, c, d = np.moveaxis(np.asarray(track.coefficients)[np.minimum(i, 42)], 1, 0)
    tau = (s - track.knots[i])[:, None, None]
    inside = s < float(track.length) - 1e-5
    expected = (a + tau * (b + tau * (c + tau * d)))[inside]
    np.testing.assert_allclose(at(track, "lines", s)[0][inside], expected, atol=1e-11)


def test_steps_back_are_refused():
    x = 3.0 * np.arange(12)
    line = np.stack([x, 0.01 * x**2], axis=1)

    def fails(match, points, closed=False):
        with pytest.raises(ValueError, match=match):
            Track.from_waypoints(points, 1.0, closed=closed)

    back = np.insert(line, 8, line[7] - [1e-3, 1e-4], axis=0)
    fails(r"`points` steps back by 0\.001\d* m from row 7 to row 8;", back)
    fails(
        "steps back by 3.07 m from row 3 to row 4", line[[0, 1, 2, 4, 3, *range(5, 12)]]
    )
    fails(
        "steps back by 0.0141 m from row 11 to row 12",
        np.append(line, [[32.99, 10.88]], 0),
    )
    fails("same point in rows 7 and 8", np.insert(line, 8, line[7], axis=0))
    past = ring()
    past[-1] = past[1] / 3 + 2 * past[0] / 3
    fails(r"`points` ends in row 100, 0\.209 m past its first point", past, closed=True)
    beside = ring()
    for away in (0.15, 0.5):  # of a step
        beside[-1] = beside[0] + [away * np.linalg.norm(beside[1] - beside[0]), 0.0]
        message = r"ends in row 100, 0\.\d+ m beside its first point, with 0\.[67]"
        fails(message, beside, closed=True)
    three = np.concatenate([ring(), ring()[1:4]])
    fails(r"`points` ends in row 103, 1\.88 m past its first point", three, closed=True)


BACK = {
    "two steps": ([*range(11), 8, *range(11, 60)], "by 20.9 m from row 10 to row 11"),
    "copied": ([*range(11), *range(9, 60)], "by 10.5 m from row 10 to row 11"),
    "five copied": ([*range(11), *range(6, 60)], "by 41.6 m from row 10 to row 11"),
    "there and back": (
        [*range(11), 9.3, 8.3, 7.3, *range(8, 60)],
        "by 28.2 m from row 10 to row 13",
    ),
    "around the seam": (
        [8.3, 7.3, *range(8, 60), *range(11), 9.3],
        "by 28.2 m from row 64 to row 1",
    ),
    "at the end": ([*range(60), 57, 58], "by 20.9 m from row 59 to row 60"),
    "at the start": ([3, 2, 1, 0, *range(1, 60)], "by 31.3 m from row 0 to row 3"),
    "half a lap": ([*range(40), *range(5, 60)], "rows 5 and 6 again as rows 40 and 41"),
    "two laps": ([*range(60), *range(60)], "rows 0 and 1 again as rows 60 and 61"),
}


@pytest.mark.parametrize("how", BACK)
@pytest.mark.parametrize("half_width", [5.0, 0.2])
def test_lines_that_run_back_on_themselves_are_refused(how, half_width):
    # Of 60 points around a circle of radius 100.
    order, match = BACK[how]
    angle = np.array(order) * 2 * math.pi / 60
    points = 100 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    with pytest.raises(ValueError, match=match):
        Track.from_waypoints(points, half_width, closed=how != "at the start")
    borders = ((1 + sign * half_width / 100) * points for sign in (-1, 1))
    with pytest.raises(ValueError, match="`center` .*" + match):
        Track.from_borders(points, *borders, closed=how != "at the start")


def test_borders_across_the_center_line_are_refused():
    # A spline through widths that begin at once swings below 0 before they do.
    width = np.where(np.arange(60) < 30, 0.0, 5.0)
    with pytest.raises(
        ValueError, match=r"`\w+` would be drawn 0\.5\d+ m beyond .* row"
    ):
        Track.from_waypoints(ring(100.0, 61)[:-1], width)


COARSE = {
    "square": [[0, 0], [100, 0], [100, 100], [0, 100]],
    "triangle": [[0, 0], [100, 0], [51, 80], [49, 80]],
    "thin": [[0, 0], [500, 0], [501, 3], [0, 6]],
    "lens": [[0, 0], [50, -3], [100, 0], [50, 3]],
    "thin, closed": [[0, 0], [500, -10], [1000, 0], [1000, 8], [500, 18], [0, 0]],
}


@pytest.mark.costly
@pytest.mark.parametrize("name", COARSE)
def test_sharp_turns_of_few_points_are_no_steps_back(name):
    points = np.array(COARSE[name], float)
    track = Track.from_waypoints(points, 1.0)
    num = len(points) - (name == "thin, closed")
    np.testing.assert_allclose(
        at(track, "center", track.knots[:-1]), points[:num], atol=1e-9
    )


def hairpin(radius=4.0, straight=40.0, num=25):
    angle = np.linspace(-math.pi / 2, math.pi / 2, num)
    arc = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + [straight, 0]
    x = np.arange(0.0, straight, 0.5)
    lower = np.stack([x, np.full_like(x, -radius)], axis=1)
    return np.concatenate([lower, arc, lower[::-1] * [1, -1]])


@pytest.mark.parametrize("half_width", [3.0, 4.0, 6.0])
def test_borders_run_forward(half_width):
    track = Track.from_waypoints(hairpin(), half_width, closed=False)
    lines = eqx.filter_jit(lambda track, s: track.lines(s))
    slopes = np.asarray(lines(track, around(track)[:-1])[1])
    assert np.min(np.sum(slopes * slopes[:, :1], axis=-1)) > 0.05
    left, right = map(np.asarray, across(track, track.knots[:-1])[2:])
    np.testing.assert_allclose(right, half_width, atol=1e-9)
    assert np.all(left <= half_width + 1e-9)
    narrowed = left < half_width - 1e-9
    assert np.any(narrowed) == (half_width > 3.5)  # 4 - 0.5 for the start of the arc
    far = np.abs(track.knots[:-1] - 40 - 2 * math.pi) > 2 * math.pi + half_width
    assert not np.any(narrowed & far)
    assert left.min() > min(half_width, 3.2) - 1e-9


def test_borders_far_beyond_a_corner_are_refused():
    points = hairpin()
    for closed in (False, True):
        with pytest.raises(ValueError, match=r"`left` is 20 m away .* row \d+, s = "):
            Track.from_waypoints(points, 20.0, closed=closed)
    with pytest.raises(
        ValueError,
        match=r"radius 3\.\d+ m. Less than that is kept there, and up to about 6\.\d+ "
        r"m is narrowed to about 3\.\d+ m: ",
    ):
        Track.from_waypoints(points, left=12.0, right=1.0, closed=False)
    with pytest.raises(ValueError, match="`right` is 12 m away"):
        Track.from_waypoints(points[::-1], left=1.0, right=12.0, closed=False)


def test_a_border_near_the_radius_of_a_corner():
    """What the message of the error says holds."""
    points = ring(100.0, 61)
    with pytest.raises(
        ValueError,
        match="radius 100 m. Less than that is kept there, and up to about 180 m is "
        "narrowed to about 90 m: lower",
    ):
        Track.from_waypoints(points, 190.0)
    for half_width, least, most in (99.0, 99, 99), (101.0, 88, 92), (178.0, 88, 92):
        track = Track.from_waypoints(points, half_width)
        left = np.asarray(at(track, "half_widths", around(track))[0])
        assert least - 1e-3 < np.min(left) <= np.max(left) < most + 1e-3


def between_rows(track):
    """Distances across, shape (N, 201, 2), and the least advance of the borders."""
    tau = np.linspace(0.0, np.diff(track.knots), 201, axis=1)[..., None, None]
    a, b, c, d = np.moveaxis(track.coefficients[:, None], 2, 0)
    lines, slopes = a + tau * (b + tau * (c + tau * d)), b + tau * (2 * c + tau * 3 * d)
    along = slopes[:, :, :1]
    advance = np.sum(slopes * along, axis=-1) / np.sum(along**2, axis=-1)
    normal = np.stack([along[..., 1], -along[..., 0]], axis=-1)
    normal = normal / np.linalg.norm(along, axis=-1, keepdims=True)
    across = np.sum((lines[:, :, 1:] - lines[:, :, :1]) * normal, axis=-1)
    return across * [-1, 1], np.min(advance)


def sparse(rng):
    """An open line with sharp turns between uneven rows, and its half width."""
    if rng.random() < 0.5:
        points = hairpin(rng.uniform(2.0, 8.0), num=rng.integers(3, 30))
        keep = rng.choice(len(points), int(rng.uniform(0.1, 0.8) * len(points)), False)
        points = points[np.sort(keep)]
    else:
        x = np.sort(rng.uniform(0.0, 60.0, rng.integers(6, 60)))
        y = rng.uniform(1.0, 10.0) * np.sin(x / rng.uniform(1.0, 8.0))
        points = np.stack([x, y], axis=1)
    return points, rng.uniform(0.5, 12.0)


def test_borders_between_rows():
    rng, num_narrowed = np.random.default_rng(9), 0
    for _ in range(100):
        points, half_width = sparse(rng)
        try:
            track = Track.from_waypoints(points, half_width, closed=False)
        except ValueError:
            continue
        across, advance = between_rows(track)
        assert np.min(across) > 0 and advance > 0
        rows = np.stack([across[:, 0], across[:, -1]])
        narrowed = np.min(rows, axis=0) < (1 - 1e-9) * half_width
        num_narrowed += np.any(narrowed)
        least = np.min(across, axis=1)[narrowed]
        assert np.all(least > 0.499 * half_width)
    assert num_narrowed > 15


def test_borders_narrowed_further_between_rows_are_refused():
    match = (
        r"`left` would be drawn 3\.\d+ m away from the center after row 81, s = 49\.\d "
        "m, where 7 m are given: .* Lower the width, or add rows, as `spacing`"
    )
    with pytest.raises(ValueError, match=match):
        Track.from_waypoints(hairpin(num=3), 7.0, closed=False)


def test_borders_on_the_wrong_side_are_refused():
    points = ring(10.0, 40)[:-1]
    with pytest.raises(ValueError, match="`left` lies on the other side .* in row "):
        Track.from_borders(points, 1.1 * points, 0.9 * points)


def test_map_coordinates_in_float32():
    points, place = ring(), np.array([4.5e5, 5.7e6])
    near = Track.from_waypoints(points, 2.0)
    far = Track.from_waypoints(points + place, 2.0)
    np.testing.assert_array_equal(near.origin, [0.0, 0.0])
    np.testing.assert_array_equal(far.origin, [450010.0, 5700000.0])
    s = jnp.linspace(0.0, 62.0, 301, dtype=jnp.float32)
    single, exact = eqx.filter_jit(far.lines)(s)[0], far.lines(s.astype(float))[0]
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, atol=1e-5)
    on_map = np.asarray(exact) + far.origin
    np.testing.assert_allclose(
        on_map[:, 0], np.asarray(at(near, "center", s.astype(float))) + place, atol=1e-6
    )
    assert np.all(far.scaled(0.5).origin == far.origin / 2)
    borders = np.moveaxis(on_map, 1, 0)
    np.testing.assert_array_equal(Track.from_borders(*borders).origin, far.origin)


def test_spacing_resamples_by_arc_length():
    angle = np.array([0.0, 0.3, 0.8, 1.6, 2.0, 3.0, 3.3, 4.4, 5.0, 5.7])
    points = 50 * np.stack([2 * np.cos(angle), np.sin(angle)], axis=1)
    track = Track.from_waypoints(points, 4.0, spacing=3.0)
    gaps = np.diff(track.knots)
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-2)
    assert abs(gaps.mean() - 3.0) < 0.1
    speed = np.linalg.norm(np.asarray(at(track, "derivative", around(track))), axis=1)
    np.testing.assert_allclose(speed, 1.0, atol=2e-3)
    apart = np.linalg.norm(
        points[:, None] - np.asarray(at(track, "center", around(track))), axis=-1
    )
    assert apart.min(axis=1).max() < 0.2


def test_scaled(tracks):
    track = tracks["chicane"]
    small = track.scaled(1 / 43)
    s = np.linspace(0.0, 700.0, 50)
    np.testing.assert_allclose(
        at(small, "center", s / 43), at(track, "center", s) / 43, atol=1e-12
    )
    # Up to full turns: on the straight back the heading is both pi and -pi.
    turn = np.asarray(at(small, "heading", s / 43) - at(track, "heading", s))
    np.testing.assert_allclose(np.angle(np.exp(1j * turn)), 0.0, atol=1e-9)


@pytest.mark.slow
def test_keeps_float32_and_batches(tracks):
    for track in (tracks["simple"], tracks["bend"]):
        s = jnp.linspace(0.0, 1.0, 6).reshape(2, 3)
        exact = track.center(s)
        assert exact.shape == (2, 3, 2)
        single = eqx.filter_jit(track.center)(s.astype(jnp.float32))
        assert single.dtype == jnp.float32
        assert track.heading(s.astype(jnp.float32)).dtype == jnp.float32
        np.testing.assert_allclose(single, exact, atol=1e-5)
        one = jax.vmap(jax.vmap(track.center))(s)
        np.testing.assert_allclose(one, exact, atol=1e-14)


# Files


def table(num=12):
    angle = np.linspace(0.0, 2 * math.pi, num, endpoint=False)
    center = 30 * np.stack([2 * np.cos(angle), np.sin(angle)], axis=1)
    right, left = 4 + np.cos(angle), 5 + np.sin(angle)
    return np.column_stack([center, right, left])


HEADERS = {
    "plain": "x_m,y_m,w_tr_right_m,w_tr_left_m\n",
    "comment": "# x_m,y_m,w_tr_right_m,w_tr_left_m\n",
    "remark": "# a circuit, drawn by hand\n# x_m, y_m, w_tr_right_m, w_tr_left_m\n\n",
    "remark behind": "# x_m,y_m,w_tr_right_m,w_tr_left_m\n# units: m, m, m, m\n",
    "prefix": "# Columns: x_m; y_m; w_tr_right_m; w_tr_left_m;\n",
    "of numbers": "# 1.0,2.0,3.0,4.0\n",
    "none": "",
}


@pytest.mark.parametrize("header", HEADERS)
def test_csv(tmp_path, header):
    rows = table()
    path = tmp_path / "track.csv"
    path.write_text(
        HEADERS[header]
        + "".join(",".join(map(repr, map(float, r))) + "\n" for r in rows)
    )
    track = Track.from_csv(path)
    expected = Track.from_waypoints(rows[:, :2], left=rows[:, 3], right=rows[:, 2])
    np.testing.assert_array_equal(track.coefficients, expected.coefficients)
    left, right = at(track, "half_widths", track.knots[:-1])
    np.testing.assert_allclose(right, rows[:, 2], atol=1e-12)
    np.testing.assert_allclose(left, rows[:, 3], atol=1e-12)
    assert track.closed and not Track.from_csv(str(path), closed=False).closed


def test_csv_columns_by_name(tmp_path):
    rows = table()
    path = tmp_path / "track.csv"
    lines = ["w_tr_left_m,speed,x_m,y_m,w_tr_right_m"]
    lines += [f"{l!r},fast,{x!r},{y!r},{r!r}" for x, y, r, l in rows.tolist()]
    path.write_text("\n".join(lines))
    expected = Track.from_waypoints(rows[:, :2], left=rows[:, 3], right=rows[:, 2])
    np.testing.assert_array_equal(
        Track.from_csv(path).coefficients, expected.coefficients
    )


def columns(num=12):
    rows = table(num)
    track = Track.from_waypoints(rows[:, :2], left=rows[:, 3], right=rows[:, 2])
    points = np.asarray(at(track, "lines", track.knots[:-1])[0]).reshape(-1, 6).T
    names = ("X", "Y", "X_i", "Y_i", "X_o", "Y_o")
    return track, dict(zip(names, points.tolist(), strict=True))


def test_json_lists_and_maps(tmp_path):
    track, data = columns()
    path = tmp_path / "track.json"
    path.write_text(json.dumps(data))
    # The keys of a map come in any order: "10" sorts before "2" as a string.
    maps = {
        name: {key: values[int(key)] for key in sorted(map(str, range(12)))}
        for name, values in data.items()
    }
    other = tmp_path / "maps.json"
    other.write_text(json.dumps(maps))
    for read in (Track.from_json(path), Track.from_json(other)):
        np.testing.assert_allclose(read.coefficients, track.coefficients, atol=1e-10)


def rewritten(rows, separator, decimal="."):
    cells = lambda row: [repr(cell).replace(".", decimal) for cell in row]
    return "\n".join(separator.join(cells(row)) for row in rows.tolist())


COLUMNS = ["x_m", "y_m", "w_tr_right_m", "w_tr_left_m"]
WRITTEN = {
    "semicolons": ";".join(COLUMNS) + "\n" + rewritten(table(), ";"),
    "decimal commas": "# " + "; ".join(COLUMNS) + "\n" + rewritten(table(), "; ", ","),
    "tabs": "\t".join(COLUMNS) + "\n" + rewritten(table(), "\t"),
    "tabs, decimal commas": rewritten(table(), "\t", ","),
    "spaces": "# " + " ".join(COLUMNS) + "\n" + rewritten(table(), "  "),
    "commas and spaces": "# " + ", ".join(COLUMNS) + "\n" + rewritten(table(), ", "),
    "capitals": ",".join(COLUMNS).upper() + "\n" + rewritten(table(), ","),
    "last separator": rewritten(table(), ",").replace("\n", ",\n"),
    "remarks": rewritten(table(), ",").replace("\n", "  # start, or not\n", 3),
    "a line for spreadsheets": "sep=;\n" + rewritten(table(), ";", ","),
    "Latin-1": "# N\xfcrburgring, 12 m\n" + rewritten(table(), ","),
    "an ellipsis": "# drawn\x85 by hand\n" + rewritten(table(), ","),
    "UTF-16": "\xff\xfe" + "\0".join([*rewritten(table(), "\t"), ""]),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITTEN)
def test_csv_however_it_is_written(tmp_path, how):
    rows = table()
    path = tmp_path / "track.csv"
    path.write_bytes(WRITTEN[how].encode("latin-1"))
    expected = Track.from_waypoints(rows[:, :2], left=rows[:, 3], right=rows[:, 2])
    np.testing.assert_array_equal(
        Track.from_csv(path).coefficients, expected.coefficients
    )


def test_csv_without_widths(tmp_path):
    rows = table()
    path = tmp_path / "line.csv"
    names = "# s_m; x_m; y_m; psi_rad; kappa_radpm; vx_mps; ax_mps2"
    body = [
        f"{i}.0; {x!r}; {y!r}; 0; 0; 9; 0"
        for i, (x, y, _, _) in enumerate(rows.tolist())
    ]
    path.write_text("\n".join(["# 3f9c 1a2b", "#", names, *body]))
    expected = Track.from_waypoints(rows[:, :2], 4.0)
    read = Track.from_csv(path, half_width=4.0)
    np.testing.assert_array_equal(read.coefficients, expected.coefficients)
    with pytest.raises(ValueError, match="missing: w_tr_right_m.*pass `half_width`"):
        Track.from_csv(path)
    path.write_text("\n".join(f"{x!r} {y!r}" for x, y, _, _ in rows.tolist()))
    read = Track.from_csv(path, 4.0)
    np.testing.assert_array_equal(read.coefficients, expected.coefficients)
    with pytest.raises(ValueError, match="columns x_m, y_m; missing: w_tr_right_m"):
        Track.from_csv(path)
    # Widths that came are not used when one is given.
    path.write_text(rewritten(rows, ","))
    read = Track.from_csv(path, half_width=4.0)
    np.testing.assert_array_equal(read.coefficients, expected.coefficients)


BAD_CSV = {
    "x_m,y_m,w_tr_left_m\n1,2,3\n": "missing: w_tr_right_m",
    "1,2,3\n4,5,6\n": "line 1 has 3 cells; without a header .* 4 are expected",
    HEADERS["plain"] + "0,0,1,1\n1,abc,1,1\n": "line 3: 'abc' in column y_m",
    HEADERS["plain"] + "0,0,1,1\n1,0,1,1\n": "has 2 points",
    "": "has 0 points",
    "0,0,1,1\n1,0,1,1\n1,1,1,1\n0,nan,1,1\n": "has .*nan.* in row 3",
    "0,0,1,1\n1,0,1,1\n1,0,1,1\n0,1,1,1\n": "same point in rows 1 and 2",
    "# a\n\n0,0,1,1\n3,0,1,1\n2.99,0,1,1\n6,0,1,1\n6,6,1,1\n": (
        r"from row 1 \(line 4 of the file\) to row 2 \(line 5 of the file\)"
    ),
    "#\n0,0,1,1\n1,0,nan,1\n1,1,1,1\n0,1,1,1": r"in row 1 \(line 3 of the file\)",
    "1,5 2,0 3,0 4,0\n": "line 1 has 5 cells; .* 4 .* decimal comma by semicolons",
    "0,0,1,1\n1,0,1,1\n1,1,-2,1\n0,1,1,1\n": "`right` is -2.0 in row 2",
}


@pytest.mark.parametrize(
    "names",
    ["x;y;w_left;w_right", "x_m [m];y_m [m];w_tr_left_m [m];w_tr_right_m [m]"]
    + ["x;y;left;right;\n# in meters, from a survey", "columns: x;y;right;left"],
)
def test_a_header_of_other_names_is_refused_in_a_comment_too(tmp_path, names):
    """And told in the order of the file."""
    path = tmp_path / "track.csv"
    sides = ("right", "left") if names.endswith("left") else ("left", "right")
    header = "x_m;y_m;" + ";".join(f"w_tr_{side}_m" for side in sides)
    for mark in ("", "# "):
        text = mark + names.replace("; ", ";") + "\n" + rewritten(table(), ";")
        path.write_text(f"# by hand; in 2020\n{text if mark else text.split(': ')[-1]}")
        with pytest.raises(
            ValueError, match=rf"columns x.* \(line 2, '{mark}.*missing: x_m"
        ) as error:
            Track.from_csv(path)
        assert str(error.value).endswith(f" Write the header {header}.")


@pytest.mark.parametrize("names", ["x,y,wide,narrow", "x_1,y,x_right,x_left"])
def test_a_header_whose_meaning_is_open_is_left_to_the_user(tmp_path, names):
    path = tmp_path / "track.csv"
    path.write_text(f"{names}\n{rewritten(table(), ',')}")
    with pytest.raises(ValueError, match="in the order in which the file has them.$"):
        Track.from_csv(path)


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv(tmp_path, text):
    path = tmp_path / "track.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD_CSV[text]):
        Track.from_csv(path)


@pytest.mark.parametrize(
    "cell",
    ["5,150.000", "5,150,000", "5.150,5", "5.150.000", "5'150.0", "5_150", "5 150.0"]
    + ["5\xa0150,0", "\N{MINUS SIGN}5,0", "\N{FULLWIDTH DIGIT FIVE}", "1.5D+03", ",5"],
)
def test_cells_that_are_no_numbers_are_quoted_as_written(tmp_path, cell):
    path = tmp_path / "track.csv"
    advice = ".* is no number; .* without thousands separators"
    for separator in (";", "\t", ","):
        quoted = f'"{cell}"' if separator == "," else cell
        path.write_text(
            "\ufeff" + separator.join(COLUMNS) + "\n"
            f"{separator.join(['1', quoted, '5', '5'])} # start\n",
            encoding="utf-8",
        )
        match = f"line 2: {re.escape(repr(cell))} in column y_m" + advice
        with pytest.raises(ValueError, match=match):
            Track.from_csv(path)
    if " " not in cell and "," not in cell:  # nor are they cut at other spaces
        path.write_text(f"{cell} 1 5 5\n", encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(repr(cell)) + " in column x_m"):
            Track.from_csv(path)


def test_lines_of_grouped_numbers_are_no_header(tmp_path):
    path = tmp_path / "track.csv"
    path.write_text("5,150.000;4,200.000;5,000.0;5,000.0\n")
    with pytest.raises(ValueError, match="line 1: '5,150.000' in column x_m is no"):
        Track.from_csv(path)
    path.write_text("5\u202f150.0 3\u202f200.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: '5\\u202f150.0' in column x_m"):
        Track.from_csv(path, half_width=5.0)
    # Names of columns are quoted as written, too.
    path.write_text("X_m;Y_m;Width\n1;2;5\n")
    with pytest.raises(ValueError, match="has the columns X_m, Y_m, Width .*; missing"):
        Track.from_csv(path)


def test_commas_that_may_separate_thousands_are_refused(tmp_path):
    path = tmp_path / "track.csv"
    head = ";".join(COLUMNS) + "\n"

    def fails(match, text):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            Track.from_csv(path)

    both = (
        r"both decimal commas, '5,150' in line 3, and decimal points, '%s' in line %d: "
        "write all numbers with one of them, without thousands separators"
    )
    fails(both % ("5.234", 3), head + "1;2;5;5\n5,150;5.234;5;5\n")
    fails(both % ("0.5", 2), head + "1;2;5;0.5\n5,150;5;5;5\n")
    with_speed = head.replace("\n", ";v\n") + "1;2;5;5;9\n5,150;5;5;5;9.5\n"
    fails(both % ("9.5", 3), with_speed)
    match = "column x_m .*separate thousands, '1,050' in line 3 beside '950' in line 2:"
    fails(match, head + "950;2;5;5\n1,050;5;5;5\n1,150;9;5;5\n")
    # One comma that is none of theirs makes all of them decimal ones.
    rows = table()
    rows[0, 0], rows[1, 0], rows[2, 2] = 61.0, 55.125, 4.5
    path.write_text(head + rewritten(rows, ";", ",").replace("61,0;", "61;"))
    assert Track.from_csv(path).knots.shape == (13,)
    # A column that has commas throughout has decimal ones, as millimeters are written.
    text = "\n".join(f"{x:.3f};{y:.3f};5;5".replace(".", ",") for x, y in ring()[:-1])
    path.write_text(text)
    np.testing.assert_allclose(Track.from_csv(path).length, 20 * math.pi, rtol=1e-3)


def test_one_decimal_after_a_comma_is_named_where_no_track_comes_of_it(tmp_path):
    """The widths would be single digits; every other error of whole rows names it."""
    path = tmp_path / "track.csv"
    match = "two columns with decimal commas or four"
    circle = 420.0 + ring(100.0, 61)[:-1]
    path.write_text("\n".join(f"{x:.1f},{y:.1f}".replace(".", ",") for x, y in circle))
    for closed in (True, False):
        with pytest.raises(ValueError, match=f"steps back by .* {match}"):
            Track.from_csv(path, closed=closed)
    back = "0,{0},5,5\n10,{0},5,5\n20,{0},5,5\n15,{0},5,5\n30,{0},5,5\n40,{0},5,5\n"
    for y, doubt in (("2", True), ("-2", False), (" 2", False)):
        path.write_text(back.format(y))
        with pytest.raises(ValueError, match="steps back by") as error:
            Track.from_csv(path, closed=False)
        assert (match in str(error.value)) == doubt
        path.write_text(back.format(y).replace("15,", "25,"))
        assert Track.from_csv(path, closed=False).length == 40.0
    path.write_text("# nothing\n")
    for half_width in (5.0, None):
        with pytest.raises(ValueError, match="0 points; .* add points.$"):
            Track.from_csv(path, half_width)


def test_bad_json(tmp_path):
    _, data = columns()
    path = tmp_path / "track.json"

    def read(text):
        path.write_text(text)
        Track.from_json(path)

    def fails(match, changed):
        with pytest.raises(ValueError, match=match):
            read(json.dumps(changed))

    with pytest.raises(ValueError, match="not valid JSON"):
        read("{")
    fails("missing: X, Y, X_i", [1, 2])
    fails("missing: Y_o", {k: v for k, v in data.items() if k != "Y_o"})
    fails("different lengths .*Y 11", data | {"Y": data["Y"][:-1]})
    fails("column X, row 2: 'a' is no number", data | {"X": [0.0, 1.0, "a"]})
    fails("column X is a float", data | {"X": 1.5})
    fails("the key 'a'", data | {"X": {"a": 1.0}})
    fails("`center` has .*nan.* in row 0", data | {"X": [float("nan")] + data["X"][1:]})
    short = {name: values[:3] for name, values in data.items()}
    fails("at least 4", short)


def test_absent_files(tmp_path):
    for read in (Track.from_csv, Track.from_json):
        with pytest.raises(FileNotFoundError, match="`path` is .*, a folder; give"):
            read(tmp_path)
        with pytest.raises(FileNotFoundError, match="`path` is .*absent"):
            read(tmp_path / "absent")


def test_bad_waypoints():
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])

    def fails(match, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            Track.from_waypoints(*args, **kwargs)

    fails(r"shape \(4, 3\)", np.zeros((4, 3)), 0.1)
    fails("has 3 points; .* at least 4", square[:3], 0.1)
    fails("4 different points", np.concatenate([square[:3], square[:1]]), 0.1)
    fails("rows 0 and 1", np.concatenate([square[:1], square]), 0.1)
    fails("not an array of numbers", [["a", "b"]] * 4, 0.1)
    fails("has .*inf.* in row 1", np.where(square == square[2], np.inf, square), 0.1)
    fails("`half_width` is -1.0; widths", square, -1)
    fails("`half_width` is -1.0 in row 2; widths", square, [1, 1, -1, 1])
    fails(r"`half_width` has shape \(2,\)", square, (1.0, 2.0))
    fails("`half_width` is nan; give a finite number", square, math.nan)
    fails(r"`half_width` .* text, \['5'\]; give numbers", square, "5")
    fails(r"`half_width` .* true or false, \[False\]; give numbers", square, False)
    fails(
        r"`points` .* begins with text, \['0.0'\]; give numbers",
        square.astype(str),
        0.1,
    )
    fails("`left` is -0.1; widths", square, left=-0.1, right=0.1)
    fails(r"`right` has shape \(3,\)", square, left=0.1, right=np.ones(3))
    fails("either `half_width`", square)
    fails("either `half_width`", square, 0.1, left=0.1)
    fails("`right` is missing", square, left=0.1)
    with pytest.raises(ValueError, match="4, 5, 4 points"):
        Track.from_borders(square, np.concatenate([square, square[:1]]), square)


def test_float32_points_far_away_are_refused():
    turn = np.linspace(0.0, 2 * np.pi, 60, endpoint=False)
    circle = 100.0 * np.stack([np.cos(turn), np.sin(turn)], 1)
    far = circle + np.array([4.5e5, 5.7e6])
    with pytest.raises(ValueError, match="`points` is float32, exact to 0.7 m only"):
        Track.from_waypoints(far.astype("f4"), 3.0)
    with pytest.raises(
        ValueError, match="`points` was rounded to float32, exact to 0.7"
    ):
        Track.from_waypoints(far.astype("f4").astype(float), 3.0)
    # Rounded to meters they are what they are; so are sparse ones near zero.
    assert Track.from_waypoints(np.round(far), 3.0).length > 600.0
    near = Track.from_waypoints(circle.astype("f4"), 3.0)
    there = Track.from_waypoints(far, 3.0)
    np.testing.assert_allclose(near.length, there.length, rtol=1e-6)


def test_dense_float32_points_are_refused():
    dense = ring(100.0, 10_001)[:-1].astype("f4")
    with pytest.raises(ValueError, match="`points` is float32, exact to 1e-05 m only"):
        Track.from_waypoints(dense, 5.0)
    for few in (dense[::10], np.stack([np.arange(1000), np.arange(1000)], 1) / 3):
        few = np.asarray(few, "f4")
        track = Track.from_waypoints(few, 5.0, closed=False)
        s = jnp.linspace(0.1, 0.9, 2001) * float(track.length)
        low, high = jnp.quantile(curvature(track, s), jnp.array([0.0, 1.0]))
        assert high - low < 2e-4


@pytest.mark.parametrize("radius, num", [(100.0, 600), (100.0, 2800), (30.0, 2500)])
def test_float32_points_that_are_accepted_have_their_curvature(radius, num):
    points = ring(radius, num + 1)[:-1].astype("f4")
    track = Track.from_waypoints(points, 5.0)
    s = jnp.linspace(0.0, 1.0, 20 * num + 1) * float(track.length)
    np.testing.assert_allclose(radius * curvature(track, s), 1.0, atol=0.1)
    with pytest.raises(ValueError, match="`points` is float32, .* or keep fewer rows"):
        Track.from_waypoints(ring(radius, 3101)[:-1].astype("f4"), 5.0)


@pytest.mark.costly
@pytest.mark.parametrize("size", [1.0, 1.8])
@pytest.mark.parametrize("spacing", [1.0, 5.0])
def test_circuits_in_float32_load(tracks, size, spacing):
    """Of 2.8 and 5.1 km, near the origin."""
    track = tracks["grand_prix"].scaled(size)
    num = round(float(track.length) / spacing)
    exact = np.asarray(
        at(track, "center", np.linspace(0.0, track.length, num + 1)[:-1])
    )
    single = Track.from_waypoints(exact.astype("f4"), 5.0)
    double = Track.from_waypoints(exact, 5.0)
    found, right = curvature(single, around(single)), curvature(double, around(single))
    np.testing.assert_allclose(found, right, atol=0.1 * np.quantile(abs(right), 0.9))


def test_commas_that_may_be_decimal_ones_are_refused(tmp_path):
    path = tmp_path / "track.csv"
    match = "two columns with decimal commas or four"
    path.write_text("100,000,0,000\n0,000,100,000\n-100,000,0,000\n0,000,-100,000\n")
    for half_width in (5.0, None):
        with pytest.raises(ValueError, match=match):
            Track.from_csv(path, half_width=half_width)
    circle = ring(100.0, 61)[:-1]
    text = lambda separator: "\n".join(
        f"{x:.1f}{separator}{y:.1f}".replace(".", ",") for x, y in circle
    )
    path.write_text(text(","))
    with pytest.raises(ValueError, match=match):
        Track.from_csv(path)
    path.write_text(text(";"))
    length = Track.from_csv(path, 5.0).length
    np.testing.assert_allclose(length, 200 * math.pi, rtol=1e-3)
    # Whole numbers between semicolons are what they are, and so are positive widths.
    rows = "100;0;5;5\n0;100;5;5\n-100;0;5;5\n0;-100;5;5\n"
    path.write_text(rows)
    length = Track.from_csv(path, 5.0).length
    path.write_text(rows.replace(";", ","))
    assert Track.from_csv(path).length == length
    path.write_text("100,0,5\n0,100,5\n")
    with pytest.raises(ValueError, match="line 1 has 3 cells; without .* 2 or 4 are"):
        Track.from_csv(path, half_width=5.0)
