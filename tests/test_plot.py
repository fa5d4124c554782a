import functools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog import plot


pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def circuit():
    return dp.systems.Track.circle()


@pytest.fixture(scope="module")
def drive(circuit):
    s = np.linspace(0.0, 1.0, 9)
    heading = np.asarray(circuit.heading(s))
    return np.concatenate([circuit.center(s), heading[:, None]], axis=1)


@pytest.fixture(scope="module")
def solution():
    pendulum = dp.systems.Pendulum()
    problem = dp.ControlProblem.from_system(pendulum, 4)
    us = jnp.zeros((4, 1))
    return dp.solve(problem, dp.Gradient(), pendulum.x0, us, max_steps=5, throw=False)


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
    np.testing.assert_allclose(axes[0].lines[0].get_xdata()[-1], 0.4)
    _draw(axes[0], tmp_path)
    with pytest.raises(ValueError, match="1 names came for 2 columns"):
        plot.trajectory(xs, us, names=["angle"])


def test_trajectory_of_pytrees(tmp_path):
    xs = {"position": jnp.zeros((5, 2)), "speed": jnp.zeros(5)}
    axes = plot.trajectory(xs, (jnp.zeros((4, 1)),))
    assert _labels(axes[0]) == ["position[0]", "position[1]", "speed"]
    assert axes[1].get_xlabel() == "stage"
    _draw(axes[0], tmp_path)


def test_draws_into_given_axes(solution, circuit, drive):
    from matplotlib.figure import Figure

    axes = Figure().subplots(2)
    assert plot.trajectory(solution.xs, solution.us, ax=axes) is axes
    assert plot.inputs(solution.us, np.ones(4), ax=axes) is axes
    for draw in (
        lambda ax: plot.convergence({"gradient": solution}, ax=ax),
        lambda ax: plot.track(circuit, ax=ax),
        lambda ax: plot.race(drive, np.ones(9), ax=ax),
    ):
        ax = Figure().subplots()
        assert draw(ax) is ax


def test_convergence(solution, tmp_path):
    ax = plot.convergence({"gradient": solution, "again": solution}, best=0.0)
    assert _labels(ax) == ["gradient", "again"] and ax.get_yscale() == "log"
    assert ax.get_xlabel() == "iteration" and ax.get_ylabel()
    cost = solution.history["cost"]
    curve = np.asarray(ax.lines[0].get_ydata())
    np.testing.assert_allclose(curve, cost[: len(curve)])
    _draw(ax, tmp_path)
    _draw(plot.convergence({"gradient": solution}), tmp_path)


def test_convergence_needs_a_history():
    class Bare:
        history = None

    with pytest.raises(ValueError, match="history=True"):
        plot.convergence({"bare": Bare()})


def test_track(circuit, tmp_path):
    ax = plot.track(circuit)
    assert ax.get_aspect() == 1 and ax.get_xlabel() == "x [m]"
    radii = np.hypot(*(np.asarray(ax.lines[0].get_data()) - [[0.0], [50 / 172]]))
    np.testing.assert_allclose(radii, 50 / 172 - 0.185, atol=1e-3)
    _draw(ax, tmp_path)
    _draw(plot.track(dp.systems.Track.line()), tmp_path)


def test_race(circuit, drive, tmp_path):
    speed = np.linspace(1.0, 2.0, 9)
    ax = plot.race(drive, speed, circuit)
    line = ax.collections[-1]
    np.testing.assert_allclose(line.get_array(), (speed[1:] + speed[:-1]) / 2)
    assert len(line.get_segments()) == 8
    assert line.colorbar.ax.get_xlabel() == "speed [m/s]"
    _draw(ax, tmp_path)


def test_inputs(tmp_path):
    us = np.zeros((6, 2))
    axes = plot.inputs(us, np.ones(7), dt=0.5, names=["drive", "steering [deg]"])
    labels = [ax.get_ylabel() for ax in axes]
    assert labels == ["speed [m/s]", "drive", "steering [deg]"]
    assert axes[-1].get_xlabel() == "time [s]" and axes[-1].get_xlim() == (0.0, 3.0)
    _draw(axes[0], tmp_path)
    assert len(plot.inputs(us)) == 2


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
    draw(file, drive, circuit, window=0.5)
    assert file.stat().st_size > 1000


def test_the_car_is_drawn_about_its_position(circuit, drive):
    frame = plot._Frame(drive, np.ones(9), circuit, None, 0.09, 0.045, None, 0.1)
    frame.draw(5)
    corners = frame.car.get_corners()
    np.testing.assert_allclose(corners.mean(axis=0), drive[5, :2])
    along = corners[1] - corners[0]
    heading = np.array([np.cos(drive[5, 2]), np.sin(drive[5, 2])])
    np.testing.assert_allclose(along, 0.09 * heading)


def test_matplotlib_is_imported_late():
    code = "import sys, diffprog.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'diffprog\[viz\]'"):
        plot.convergence({})
    with pytest.raises(ImportError, match=r"diffprog\[viz\]"):
        plot.trajectory(np.zeros((3, 1)), np.zeros((2, 1)))
