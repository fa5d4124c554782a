"""What is handed out: its version, its extras and the archives, built and installed."""

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement


ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
VERSION = PROJECT["version"]

# As a user begins: no test, no page and no example is at hand.
PROGRAM = """
import jax.numpy as jnp
import diffprog as dp

assert dp.__version__ == "{version}", dp.__version__
assert "{folder}" in dp.__file__, dp.__file__
pendulum = dp.systems.Pendulum()
problem = dp.ControlProblem.from_system(pendulum, 20, (-5.0, 5.0))
solution = dp.solve(problem, dp.ILQR(), jnp.zeros(2), jnp.zeros((20, 1)), max_steps=300)
assert solution.success, solution
net = lambda w, x: x @ w
value, _ = dp.value_and_direction(
    dp.losses.Squared(), dp.oracles.GaussNewton(), net
)(jnp.ones((2, 1)), jnp.ones((3, 2)), jnp.zeros((3, 1)))
assert value > 0
print("installed")
"""


def test_all_files_name_one_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search("^version: (.*)$", citation, re.MULTILINE)[1] == VERSION  # pyright: ignore
    latest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert latest and latest[1] == VERSION


def own(requirement: str) -> str | None:
    """The extra that a requirement of this package itself asks for."""
    found = Requirement(requirement)
    return next(iter(found.extras)) if found.name == PROJECT["name"] else None


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_installs_alone(extra):
    """Whatever it needs it asks for itself, and none contradicts the base."""
    wanted, todo = {}, [*PROJECT["dependencies"], *EXTRAS[extra]]
    while todo:
        requirement = todo.pop()
        if (other := own(requirement)) is not None:
            todo += EXTRAS[other]
            continue
        found = Requirement(requirement)
        wanted.setdefault(found.name, []).append(found)
    for name, asked in wanted.items():
        pins = {s.version for one in asked for s in one.specifier if s.operator == "=="}
        assert len(pins) <= 1, name
        assert all(pin in one.specifier for pin in pins for one in asked), name


def test_importing_needs_no_backend():
    """A platform that does not exist is no error before an array is made."""
    program = (
        "import sys, time, jax, equinox; start = time.process_time(); "
        "import diffprog; print(time.process_time() - start); "
        "assert not {'matplotlib', 'mujoco', 'flax', 'sklearn'} & {*sys.modules}"
    )
    environ = {**os.environ, "JAX_PLATFORMS": "none_of_them"}
    command = [sys.executable, "-W", "error", "-c", program]
    run = lambda: subprocess.run(command, env=environ, check=True, capture_output=True)
    # Seconds; the first time Python may have to compile the files.
    assert float(run().stdout) < 1.5 or float(run().stdout) < 1.5


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the source archive, as `make package` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", ROOT, "--outdir", folder]
    subprocess.run(command, check=True, cwd=folder)  # a folder without `build`
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.mark.slow
def test_the_archives_hold_what_they_should(archives):
    wheel, source = archives
    assert wheel.name == f"diffprog-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "diffprog").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = f"diffprog-{VERSION}.dist-info"
    assert {n for n in names if not n.startswith(about)} == package
    assert "diffprog/py.typed" in names and f"{about}/licenses/LICENSE" in names
    with tarfile.open(source) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert package | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= names
    assert not [n for n in names if n.startswith(("tests", "docs", "site", "out"))]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(archives, tmp_path):
    wheel, _ = archives
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = lambda *command: subprocess.run(
        [python, *command], check=True, cwd=tmp_path, env=environ, capture_output=True
    )
    run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    program = PROGRAM.format(version=VERSION, folder="clean")
    assert run("-c", program).stdout == b"installed\n"
