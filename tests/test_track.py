import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffprog.systems import Track


MINIATURE = ["line", "bend", "circle", "simple"]
CIRCUITS = ["oval", "chicane", "grand_prix"]
CLOSED = ["circle", "simple", *CIRCUITS]


@pytest.fixture(scope="module")
def tracks():
    return {name: getattr(Track, name)() for name in MINIATURE + CIRCUITS}


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
    points = np.asarray(track.center(track.knots))
    low, high = points.min(axis=0), points.max(axis=0)
    box = [track.length, low[0], high[0], low[1], high[1]]
    np.testing.assert_allclose(box, BOXES[name], atol=7e-4)
    np.testing.assert_allclose(box[0], BOXES[name][0], atol=5e-6)
    assert track.closed == (name in CLOSED)


def test_spot_values_of_the_simple_track(tracks):
    # Computed with the published file, which carries single precision noise.
    track = tracks["simple"]
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    close(track.center(1.0), [0.869588854585, 0.253467047313])
    close(track.left(1.0), [0.686183603637, 0.27495069319])
    close(track.right(1.0), [1.052994105547, 0.231983401435])
    close(track.derivative(1.0), [0.12694478, 0.99354138])
    close(track.center(2.5), [0.160607475254, 1.132054237812])
    close(track.derivative(2.5), [-0.89561471, -0.44766442])
    close(track.heading(0.0), 0.0)


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
        * track.derivative(s)
    )
    curvature = np.asarray(jax.jit(jax.vmap(heading))(s))
    assert 1 / 25.0 < np.abs(curvature).max() < 1 / 20.0  # the car can turn on 9 m
    assert curvature.max() > 0 > curvature.min()
    # No two parts of the track that lie far apart along it come near each other.
    points = np.asarray(track.center(s))[::4]
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
    np.testing.assert_allclose(track.center(track.knots[:-1]), points, atol=1e-12)
    left, right = track.half_widths(track.knots[:-1])
    np.testing.assert_allclose(left, width, atol=1e-12)
    np.testing.assert_allclose(right, 2 * width, atol=1e-12)
    radius = np.linalg.norm(np.asarray(track.center(around(track))), axis=1)
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
    np.testing.assert_allclose(track.center(s), s[:, None] * along, atol=1e-12)


def test_natural_spline_has_no_curvature_at_its_ends(tracks):
    second = jax.jacfwd(tracks["bend"].derivative)
    np.testing.assert_allclose(second(jnp.array(0.0)), 0.0, atol=1e-9)
    ends = jnp.array(float(tracks["bend"].length) - 2e-6)
    np.testing.assert_allclose(second(ends), 0.0, atol=1e-3)


def test_spacing_resamples_by_arc_length():
    angle = np.array([0.0, 0.3, 0.8, 1.6, 2.0, 3.0, 3.3, 4.4, 5.0, 5.7])
    points = 50 * np.stack([2 * np.cos(angle), np.sin(angle)], axis=1)
    track = Track.from_waypoints(points, 4.0, spacing=3.0)
    gaps = np.diff(track.knots)
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-2)
    assert abs(gaps.mean() - 3.0) < 0.1
    speed = np.linalg.norm(np.asarray(track.derivative(around(track))), axis=1)
    np.testing.assert_allclose(speed, 1.0, atol=2e-3)
    apart = np.linalg.norm(
        points[:, None] - np.asarray(track.center(around(track))), axis=-1
    )
    assert apart.min(axis=1).max() < 0.2


def test_scaled(tracks):
    track = tracks["chicane"]
    small = track.scaled(1 / 43)
    s = np.linspace(0.0, 700.0, 50)
    np.testing.assert_allclose(small.center(s / 43), track.center(s) / 43, atol=1e-12)
    # Up to full turns: on the straight back the heading is both pi and -pi.
    turn = np.asarray(small.heading(s / 43) - track.heading(s))
    np.testing.assert_allclose(np.angle(np.exp(1j * turn)), 0.0, atol=1e-9)


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
    left, right = track.half_widths(track.knots[:-1])
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
    points = np.asarray(track.lines(track.knots[:-1])[0]).reshape(-1, 6).T
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


BAD_CSV = {
    "x_m,y_m,w_tr_left_m\n1,2,3\n": "missing: w_tr_right_m",
    "1,2,3\n4,5,6\n": "line 1 has 3 cells; 4 are expected",
    HEADERS["plain"] + "0,0,1,1\n1,abc,1,1\n": "line 3: 'abc' in column y_m",
    HEADERS["plain"] + "0,0,1,1\n1,0,1,1\n": "has 2 points",
    "": "has 0 points",
    "0,0,1,1\n1,0,1,1\n1,1,1,1\n0,nan,1,1\n": "has .*nan.* in row 3",
    "0,0,1,1\n1,0,1,1\n1,0,1,1\n0,1,1,1\n": "same point in rows 1 and 2",
    "0,0,1,1\n1,0,1,1\n1,1,-2,1\n0,1,1,1\n": "`right` is -2.0 in row 2",
}


@pytest.mark.parametrize("text", BAD_CSV)
def test_bad_csv(tmp_path, text):
    path = tmp_path / "track.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=BAD_CSV[text]):
        Track.from_csv(path)


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
    fails("`left` is -0.1", square, left=-0.1, right=0.1)
    fails(r"`right` has shape \(3,\)", square, left=0.1, right=np.ones(3))
    fails("either `half_width`", square)
    fails("either `half_width`", square, 0.1, left=0.1)
    fails("`right` is missing", square, left=0.1)
    with pytest.raises(ValueError, match="4, 5, 4 points"):
        Track.from_borders(square, np.concatenate([square, square[:1]]), square)
