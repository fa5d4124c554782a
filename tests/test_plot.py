import argparse
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog import plot
from diffprog.plot._plane import _Frame


pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def circuit():
    return dp.systems.Track.circle()


@pytest.fixture(scope="module")
def drive(circuit):
    s = np.linspace(0.0, 1.0, 9)
    center, heading = jax.jit(lambda s: (circuit.center(s), circuit.heading(s)))(s)
    return np.column_stack([center, heading])


def solved(history=True):
    pendulum = dp.systems.Pendulum()
    problem = dp.ControlProblem.from_system(pendulum, 4)
    given = problem, dp.Gradient(), pendulum.x0, jnp.zeros((4, 1))
    return dp.solve(*given, max_steps=5, throw=False, history=history)


@pytest.fixture(scope="module")
def solution():
    return solved()


@pytest.fixture(autouse=True)
def no_global_state():
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    yield
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def _draw(ax, tmp_path):
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def _labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_trajectory(tmp_path):
    rng = np.random.default_rng(0)
    xs, us = rng.normal(size=(5, 2)), rng.normal(size=(4, 1))
    names = ["angle [rad]", "velocity [rad/s]"]
    axes = plot.trajectory(xs, us, dt=0.1, names=names, input_names=["torque [N m]"])
    assert _labels(axes[0]) == names and _labels(axes[1]) == ["torque [N m]"]
    assert axes[1].get_xlabel() == "time [s]"
    for line, column in zip(axes[0].lines, xs.T, strict=True):
        np.testing.assert_allclose(line.get_xdata(), 0.1 * np.arange(5))
        np.testing.assert_array_equal(line.get_ydata(), column)
    (stairs,) = axes[1].patches
    np.testing.assert_array_equal(stairs.get_data().values, us[:, 0])
    np.testing.assert_allclose(stairs.get_data().edges, 0.1 * np.arange(5))
    _draw(axes[0], tmp_path)
    with pytest.raises(ValueError, match="1 names came for 2 columns"):
        plot.trajectory(xs, us, names=["angle"])


def test_trajectory_of_pytrees(tmp_path):
    position = jnp.arange(10.0).reshape(5, 2)
    xs = {"position": position, "speed": -jnp.arange(5.0)}
    axes = plot.trajectory(xs, (jnp.zeros((4, 1)),))
    assert _labels(axes[0]) == ["position[0]", "position[1]", "speed"]
    curves = [line.get_ydata() for line in axes[0].lines]
    np.testing.assert_array_equal(curves, [*position.T, xs["speed"]])
    assert axes[1].get_xlabel() == "stage"
    _draw(axes[0], tmp_path)


@pytest.mark.slow
def test_draws_into_given_axes(solution, circuit, drive):
    from matplotlib.figure import Figure

    for draw in (
        lambda axes: plot.trajectory(solution.xs, solution.us, ax=axes),
        lambda axes: plot.inputs(solution.us, np.ones(4), ax=axes),
    ):
        axes = Figure().subplots(2)
        assert draw(axes) is axes
        assert all(ax.has_data() for ax in axes)
    for draw in (
        lambda ax: plot.convergence({"gradient": solution}, ax=ax),
        lambda ax: plot.track(circuit, ax=ax),
        lambda ax: plot.race(drive, np.ones(9), ax=ax),
    ):
        ax = Figure().subplots()
        assert draw(ax) is ax and ax.has_data()


def test_convergence(solution, tmp_path):
    ax = plot.convergence({"gradient": solution, "again": solution}, best=0.0)
    assert _labels(ax) == ["gradient", "again"] and ax.get_yscale() == "log"
    assert ax.get_xlabel() == "iteration" and ax.get_ylabel()
    rows = int(solution.stats["num_steps"]) + 1
    cost = np.asarray(solution.history["cost"])[:rows]
    assert rows > 2 and cost[-1] < cost[0]
    for line in ax.lines:
        np.testing.assert_allclose(line.get_ydata(), cost)
    _draw(ax, tmp_path)
    # The best cost of a solution is its own: there the curve ends.
    ax = plot.convergence({"gradient": solution})
    curve = np.asarray(ax.lines[0].get_ydata())
    np.testing.assert_allclose(curve[:-1], (cost - cost[-1])[:-1])
    assert np.isnan(curve[-1])
    _draw(ax, tmp_path)


def test_solutions_are_drawn_as_they_are(solution):
    for bare, arrays in (
        (plot.trajectory(solution), plot.trajectory(solution.xs, solution.us)),
        (plot.inputs(solution), plot.inputs(solution.us)),
    ):
        curves = lambda axes: (
            [np.asarray(line.get_ydata()) for ax in axes for line in ax.lines]
            + [patch.get_data().values for ax in axes for patch in ax.patches]
        )
        assert len(curves(bare)) == len(curves(arrays)) > 0
        for a, b in zip(curves(bare), curves(arrays), strict=True):
            np.testing.assert_array_equal(a, b)
    desired = plot.convergence({"solution": solution})
    for some, labels in (
        (solution, ["solution"]),
        ([solution, solution], ["solution 0", "solution 1"]),
    ):
        ax = plot.convergence(some)
        assert _labels(ax) == labels
        for line in ax.lines:
            np.testing.assert_array_equal(
                line.get_ydata(), desired.lines[0].get_ydata()
            )


@pytest.mark.slow
def test_a_race_and_its_solution(circuit, drive, tmp_path):
    tracking = dp.systems.PathTracking(dp.systems.KinematicCar(), circuit)
    sliding = dp.systems.Race.miniature(circuit)
    speed = np.linspace(1.0, 2.0, 9)
    columns = lambda *more: np.stack([*drive.T, *more], axis=1)
    # The speed of a car that slips is that of its position too.
    for race, xs, m in (
        (tracking, columns(speed, 0 * speed), 2),
        (sliding, columns(0.6 * speed, 0.8 * speed, *3 * [0 * speed]), 3),
    ):
        driven = dp.Trajectory(jnp.asarray(xs), jnp.ones((8, m)), jnp.zeros(()))
        for first in (race, dp.ControlProblem.from_system(race, 8)):
            ax = plot.race(first, driven)
            line = ax.collections[-1]
            np.testing.assert_allclose(line.get_array(), (speed[1:] + speed[:-1]) / 2)
            pieces = np.stack([drive[:-1, :2], drive[1:, :2]], axis=1)
            np.testing.assert_allclose(line.get_segments(), pieces)
            assert len(ax.lines) == len(plot.track(race).lines) == 4
    file = tmp_path / "race.gif"
    assert plot.animation(file, driven, race, every=8, dpi=20.0) == file
    assert file.stat().st_size > 1000


def _batch(solution):
    return jax.tree.map(lambda a: jnp.stack([a, a]), solution)


def _subplots(rows):
    from matplotlib.figure import Figure

    figure = Figure()
    return figure, figure.subplots(rows)


MISTAKES = {
    "a batch": (lambda s, t: plot.trajectory(_batch(s)), r"`solution\[0\]`"),
    "a batch's inputs": (lambda s, t: plot.inputs(_batch(s)), "batch of 2 solutions"),
    "a batch's costs": (lambda s, t: plot.convergence(_batch(s)), "batch of 2"),
    "states alone": (lambda s, t: plot.trajectory(s.xs), "`us` is missing"),
    "one axes of two": (
        lambda s, t: plot.trajectory(s, ax=_subplots(1)[1]),
        r"2 axes are expected, as in `plt.subplots\(2\)\[1\]`",
    ),
    "a figure too": (
        lambda s, t: plot.convergence(s, ax=_subplots(1)),
        "`ax` is .*; one axes are expected",
    ),
    "costs": (
        lambda s, t: plot.convergence({"a": s.history["cost"]}),
        r"`solutions` holds an array of shape \(6,\); solutions",
    ),
    "no solutions": (lambda s, t: plot.convergence([]), "`solutions` is empty"),
    "phases": (
        lambda s, t: plot.inputs((np.zeros((2, 1)), np.zeros((3, 1)))),
        r"`us` have \[2, 3\] rows; .* `solution.us\[0\]`",
    ),
    "one name as a string": (
        lambda s, t: plot.trajectory(s, names="angle"),
        "1 names came for 2 columns",
    ),
    "a speed of another length": (
        lambda s, t: plot.race(s.xs, np.ones(4), t),
        r"`speed` is an array of shape \(4,\); .* each of the 5 positions",
    ),
    "a speed of few stages": (
        lambda s, t: plot.inputs(s, np.ones(3)),
        r"`speed` is an array of shape \(3,\)",
    ),
    "limits of another shape": (
        lambda s, t: plot.inputs(s, limits=(np.zeros(3), None)),
        r"`limits\[0\]` has shape \(3,\); .* broadcast to \(4, 1\)",
    ),
    "one limit": (
        lambda s, t: plot.inputs(s, limits=3.0),
        r"`limits` is 3.0; a pair `\(lo, hi\)`",
    ),
    "no speed": (lambda s, t: plot.race(s), r"`race\(problem, solution\)`"),
    "a race without its solution": (
        lambda s, t: plot.race(dp.systems.Race.miniature(t), s.xs),
        r"The second argument is an array of shape \(5, 2\)",
    ),
    "a file for a track": (
        lambda s, t: plot.track("monza.csv"),
        r"`track` is 'monza.csv'; .*`dp.systems.Track.from_csv\(path\)`",
    ),
    "no path": (lambda s, t: plot.race(t, np.ones(5)), r"The path is Track"),
    "a film": (
        lambda s, t: plot.animation("race.mp4", s, t),
        "`file` is 'race.mp4'; a name in .gif",
    ),
    "an animation without a car": (
        lambda s, t: plot.animation("race.gif", s, t, dt=0.1),
        "`dt`, `length` or `width` is missing",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, solution, circuit, unchecked):
    call, message = MISTAKES[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(solution, circuit)


def test_convergence_needs_a_history():
    with pytest.raises(ValueError, match="history=True"):
        plot.convergence({"bare": solved(history=False)})


def test_track(circuit, tmp_path):
    ax = plot.track(circuit)
    assert ax.get_aspect() == 1 and ax.get_xlabel() == "x [m]"
    # The left border is the inner one.
    for line, side in zip(ax.lines, (-0.185, 0.185, 0.0)):
        radii = np.hypot(*(np.asarray(line.get_data()) - [[0.0], [50 / 172]]))
        np.testing.assert_allclose(radii, 50 / 172 + side, atol=1e-3)
    _draw(ax, tmp_path)
    _draw(plot.track(dp.systems.Track.line()), tmp_path)


def test_race(circuit, drive, tmp_path):
    speed = np.linspace(1.0, 2.0, 9)
    ax = plot.race(drive, speed, circuit)
    line = ax.collections[-1]
    np.testing.assert_allclose(line.get_array(), (speed[1:] + speed[:-1]) / 2)
    pieces = np.stack([drive[:-1, :2], drive[1:, :2]], axis=1)
    np.testing.assert_allclose(line.get_segments(), pieces)
    assert line.colorbar.ax.get_xlabel() == "speed [m/s]"
    _draw(ax, tmp_path)


def test_inputs(tmp_path):
    us, speed = np.arange(12.0).reshape(6, 2), np.linspace(1.0, 2.0, 7)
    axes = plot.inputs(us, speed, dt=0.5, names=["drive", "steering [deg]"])
    labels = [ax.get_ylabel() for ax in axes]
    assert labels == ["speed [m/s]", "drive", "steering [deg]"]
    assert axes[-1].get_xlabel() == "time [s]" and axes[-1].get_xlim() == (0.0, 3.0)
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), speed)
    for ax, column in zip(axes[1:], us.T, strict=True):
        np.testing.assert_array_equal(ax.patches[0].get_data().values, column)
    _draw(axes[0], tmp_path)
    assert len(plot.inputs(us)) == 2
    # Limits are dashed, where there are any.
    rows = np.linspace(12.0, 20.0, 6)
    upper = np.stack([rows, np.full(6, np.inf)], axis=1)
    drive, steer = plot.inputs(us, limits=([-1.0, -np.inf], upper), dt=0.5)
    low, high = [curve for curve in drive.patches if curve.get_linestyle() == "--"]
    np.testing.assert_array_equal(low.get_data().values, np.full(6, -1.0))
    np.testing.assert_array_equal(high.get_data().values, rows)
    assert len(steer.patches) == 1
    _draw(drive, tmp_path)


def test_animation(circuit, drive, tmp_path):
    from PIL import Image

    file = tmp_path / "race.gif"
    plans = np.stack([drive[:, :2]] * 9)
    draw = functools.partial(
        plot.animation, dt=0.1, length=0.09, width=0.045, every=4, dpi=40.0
    )
    assert draw(file, drive, circuit, plans=plans) == file
    with Image.open(file) as image:
        assert image.n_frames == 3  # pyright: ignore[reportAttributeAccessIssue]
    other = tmp_path / "window.gif"
    draw(other, drive, circuit, window=0.5)
    with Image.open(other) as image:
        assert image.n_frames == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert other.read_bytes() != file.read_bytes()


def test_the_car_is_drawn_about_its_position(circuit, drive):
    plans = np.arange(54.0).reshape(9, 3, 2)
    frame = _Frame(drive, np.ones(9), circuit, plans, 0.09, 0.045, 0.5, 0.1)
    frame.draw(5)
    corners = frame.car.get_corners()
    np.testing.assert_allclose(corners.mean(axis=0), drive[5, :2])
    along = corners[1] - corners[0]
    heading = np.array([np.cos(drive[5, 2]), np.sin(drive[5, 2])])
    np.testing.assert_allclose(along, 0.09 * heading)
    # So are the view and what was driven; the plan is that of the stage.
    np.testing.assert_allclose(np.mean(frame.ax.get_xlim()), drive[5, 0])
    np.testing.assert_allclose(np.ptp(frame.ax.get_xlim()), 0.5)
    assert len(frame.trace.get_segments()) == 5
    np.testing.assert_array_equal(np.transpose(frame.plan.get_data()), plans[5])


def test_matplotlib_is_imported_late():
    code = "import sys, diffprog.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'diffprog\[viz\]'"):
        plot.convergence({})
    with pytest.raises(ImportError, match=r"diffprog\[viz\]"):
        plot.trajectory(np.zeros((3, 1)), np.zeros((2, 1)))


def test_a_track_on_the_map_names_its_origin():
    turn = np.linspace(0.0, 2 * np.pi, 30, endpoint=False)
    circle = 20.0 * np.stack([np.cos(turn), np.sin(turn)], 1)
    far = circle + np.array([4.5e5, -5.7e6])
    ax = dp.plot.track(dp.systems.Track.from_waypoints(far, 3.0))
    assert ax.get_xlabel() == "x - 450020 [m]" and ax.get_ylabel() == "y + 5700000 [m]"


def test_a_folder_is_made_or_told(tmp_path):
    folder = plot.folder(str(tmp_path / "of" / "pictures"))
    assert folder == tmp_path / "of" / "pictures" and folder.is_dir()
    assert plot.folder(str(folder)) == folder  # it may be there
    (folder / "file").touch()
    for wrong in ("file", "file/inside"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"no folder .*{wrong}: "):
            plot.folder(str(folder / wrong))
