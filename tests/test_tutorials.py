"""The pages of tutorials are those of their programs."""

import ast
import pathlib
import runpy
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROGRAM = runpy.run_path(str(DOCS / "programs" / "tutorials.py"))
NAMES = PROGRAM["names"]()
EXTRAS = {"matplotlib", "PIL", "sklearn", "flax"}
AGAIN = "run `make tutorials ARGS="


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_that_of_its_program(name):
    tutorial = PROGRAM["read"](name)
    assert not PROGRAM["stale"](name), f"{AGAIN}{name}`"
    for picture in tutorial.pictures:
        assert (DOCS / "images" / picture).exists(), f"{AGAIN}{name}`"
    thumbnail = DOCS / "images" / "gallery" / f"{name}.png"
    assert thumbnail.stat().st_size < 40_000


def test_a_page_says_when_it_is_not_that_of_its_program(tmp_path):
    recorded, render = PROGRAM["recorded"], PROGRAM["render"]
    tutorial = PROGRAM["read"]("pendulum")
    _, printed, took = recorded("pendulum")
    first = next(cell for cell in tutorial.cells if cell.code)
    assert any(printed) and took
    page = render(tutorial, printed, took)
    first.code += "\nprint(1)"
    assert render(tutorial, printed, took) != page


def test_the_gallery_shows_all_and_so_does_the_navigation():
    assert (DOCS / "gallery.md").read_text() == PROGRAM["gallery"](), f"{AGAIN}`"
    assert {path.stem for path in (DOCS / "tutorials").iterdir()} == set(NAMES)
    navigation = (ROOT / "mkdocs.yml").read_text()
    places = [navigation.find(f"tutorials/{name}.md") for name in NAMES]
    assert -1 not in places and places == sorted(places)


def _told(tree):
    """The imports of which a program says what to install."""
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    return {one for block in tries for node in block.body for one in ast.walk(node)}


@pytest.mark.parametrize("name", NAMES)
def test_says_what_to_install_where_an_extra_is_missing(name):
    tree = ast.parse(PROGRAM["script"](name).read_text())
    for node in set(ast.walk(tree)) - _told(tree):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in EXTRAS
        if isinstance(node, ast.Import):
            assert not EXTRAS & {alias.name.split(".")[0] for alias in node.names}


def _fails(*command):
    """The one line that a program ends with."""
    process = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 1 and not process.stdout
    (line,) = process.stderr.splitlines()
    return line


def test_one_sentence_without_matplotlib(tmp_path):
    hide = "import runpy, sys; sys.modules['matplotlib'] = None; sys.argv[0:1] = []; "
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = PROGRAM["script"]("five_directions")
    told = _fails("-c", hide + run, script, "--fast", "--out", tmp_path)
    assert "matplotlib" in told and "pip install 'diffprog[examples]'" in told


def test_one_sentence_without_a_circuit(tmp_path):
    script = PROGRAM["script"]("fastest_lap")
    missing = tmp_path / "circuit.csv"
    told = _fails(script, "--track", missing, "--out", tmp_path)
    assert told.startswith(f"No circuit from {missing}: ")
