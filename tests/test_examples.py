import multiprocessing
import os
import pathlib
import runpy
import sys

import jax
import pytest


EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
LIMITS = {"car_racing.py": 230}
FILES = {
    "backward_passes.py": {"backward_passes.png"},
    "car_racing.py": {"race.png", "inputs.png", "convergence.png"},
    "mpc_car.py": {"mpc_car.png"},
    "mpc_cart_pole.py": {"mpc_cart_pole.png"},
    "multilabel.py": {"multilabel.png"},
    "character_model.py": {"characters.png"},
    "digits_gauss_newton.py": {"digits_gauss_newton.png"},
    "digits_losses.py": {"digits_curves.png", "digits_operators.png"},
    "fastest_lap.py": {"fastest_lap.png", "fastest_lap_inputs.png"},
    "feasible_digits.py": {"feasible_digits.png"},
    "five_directions.py": {"five_directions.png"},
    "layerwise_lqr.py": {"layerwise_lqr.png"},
    "learn_from_demonstrations.py": {"learn_from_demonstrations.png"},
    "line_of_states.py": {"line_of_states.png"},
    "many_devices.py": {"many_devices.png"},
    "many_problems.py": {"many_problems.png"},
    "moreau_pendulum.py": {"moreau_pendulum.png"},
    "no_learning_rate.py": {"no_learning_rate.png"},
    "norm_constrained.py": {"norm_constrained.png"},
    "obstacles.py": {"obstacles.png", "obstacles.gif"},
    "parking.py": {"parking.png", "parking.gif"},
    "pendulum.py": {"pendulum.png", "pendulum_convergence.png"},
    "quadrotor_quaternion.py": {
        "quadrotor_quaternion.png",
        "quadrotor_quaternion.gif",
    },
    "prox_linear_regression.py": {"prox_linear_regression.png"},
    "rates.py": {"rates.png"},
    "robust_regression.py": {"robust_regression.png"},
    "simulator.py": {"simulator.png"},
    "sparse_digits.py": {"sparse_digits.png"},
    "sparse_probabilities.py": {"sparse_probabilities.png"},
    "temporal_order.py": {"temporal_order.png"},
}
CIRCUIT = """# x_m,y_m,w_tr_right_m,w_tr_left_m
0.0,0.0,6.0,6.0
100.0,0.0,6.0,6.0
150.0,50.0,6.0,6.0
100.0,100.0,6.0,6.0
0.0,100.0,6.0,6.0
-50.0,50.0,6.0,6.0
"""


# Each program runs in a copy of a process that has imported what takes long.
APART = multiprocessing.get_context("forkserver")
APART.set_forkserver_preload(
    ["diffprog", "optax", "matplotlib.figure", "sklearn.datasets"]
)


def _program(command, fast, printed):
    for stream, path in zip((sys.stdout, sys.stderr), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    if fast:
        # Compiling is what costs here, not running.
        jax.config.update("jax_disable_most_optimizations", True)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _run(script, fast, folder, *options):
    """The exit status, and what was printed; files go to `folder / "out"`."""
    options = ["--out", folder / "out", *(["--fast"] if fast else []), *options]
    command = [str(EXAMPLES / script), *map(str, options)]
    printed = folder / "stdout", folder / "stderr"
    process = APART.Process(target=_program, args=(command, fast, printed))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode, *(path.read_text() for path in printed)


SOME = pytest.mark.parametrize("script", [
    script if script == "pendulum.py" else pytest.param(script, marks=pytest.mark.slow)
    for script in SCRIPTS
])  # fmt: skip


@SOME
def test_runs_and_writes_its_files(script, tmp_path, pytestconfig):
    options = []
    if script in ("car_racing.py", "fastest_lap.py"):  # on a circuit of the user
        (tmp_path / "circuit.csv").write_text(CIRCUIT)
        options += ["--track", tmp_path / "circuit.csv"]
    fast = not pytestconfig.getoption("--default-flags")
    status, _, complaints = _run(script, fast, tmp_path, *options)
    assert status == 0, complaints
    files = FILES.get(script, set())
    written = {
        path.name for path in (tmp_path / "out").iterdir() if path.stat().st_size
    }
    assert files <= written


@SOME
def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(script, tmp_path):
    file = tmp_path / "file"
    file.touch()
    status, printed, complaints = _run(script, True, tmp_path, "--out", file)
    assert status == 2 and not printed and "Traceback" not in complaints
    told = f"error: argument --out: no folder for pictures can be made at {file}: "
    assert told in complaints.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("car", ["full-size", "miniature"])
def test_the_race_has_hard_borders(tmp_path, car):
    options = "--borders", "hard", "--car", car
    status, printed, complaints = _run("car_racing.py", True, tmp_path, *options)
    assert status == 0, complaints
    assert "hard borders" in printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_is_short(script):
    lines = (EXAMPLES / script).read_text().splitlines()
    code = [line for line in lines if not line.startswith("#")]  # and no prose
    assert len(code) <= LIMITS.get(script, 150)
