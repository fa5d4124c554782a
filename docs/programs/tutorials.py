"""Makes the pages of the tutorials from their programs, and the gallery.

    make tutorials ARGS="[--prose] [name ...]"

runs `examples/NAME.py` for each name (all of them without one), and writes
`docs/tutorials/NAME.md` with what each cell printed, its pictures, a thumbnail, and the
gallery. With `--prose` nothing runs: the words are new, and what was recorded stays,
which is refused where the code has changed.

A tutorial is a program as others in `examples/`, with these parts:

- Its docstring: the first line is the title, without the point, the rest a summary,
  whose first paragraph stands in the gallery.
- `# %%` begins a cell, and `# %% Two words` a section with that title.
- Comments at the head of a cell are Markdown, and stand on the page before its code:
  why, and what is typed. Comments at the end of a cell, after an empty line, follow
  what it printed: what is seen. Links are those of a page in `docs/tutorials/`.
- `![What is seen](NAME.png)`, a paragraph of such a comment, shows a picture that the
  program wrote. The thumbnail is the first one, made small.
- The last cells draw, assert what must hold, and say what to change next. Without
  options the program takes less than a minute on two cores; `--fast` keeps assertions.
- Imports of what extras install stand in a `try`, whose `except` says what to install.
- A line in `GROUPS`, below, and one in the `nav` of `mkdocs.yml`.
"""

import ast
import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types

from PIL import Image, ImageOps


ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
GROUPS = {
    "Control": [
        "pendulum",
        "five_directions",
        "parking",
        "obstacles",
        "line_of_states",
        "fastest_lap",
        "mpc_cart_pole",
        "mpc_car",
        "quadrotor_quaternion",
        "many_problems",
        "many_devices",
        "learn_from_demonstrations",
        "simulator",
    ],
    "Training": [
        "backward_passes",
        "layerwise_lqr",
        "no_learning_rate",
        "temporal_order",
        "prox_linear_regression",
        "moreau_pendulum",
    ],
    "Losses": [
        "sparse_probabilities",
        "digits_losses",
        "robust_regression",
    ],
    "Constraints in learning": [
        "norm_constrained",
        "rates",
        "feasible_digits",
        "sparse_digits",
    ],
}
COMMAND = "make tutorials ARGS="
CELL = re.compile(r"^# %%(?P<title>.*)\n", re.MULTILINE)
PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<file>[\w.-]+)\)")
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
TOOK = re.compile(r"\(\d+ s of computing\)")
THUMBNAIL = 480, 240


@dataclasses.dataclass
class Cell:
    """A section title, comments before and after, and code with its first line."""

    title: str
    before: str
    code: str
    after: str
    line: int


@dataclasses.dataclass
class Tutorial:
    name: str
    title: str
    summary: str
    cells: list[Cell]

    @property
    def pictures(self) -> list[str]:
        text = "\n".join(f"{cell.before}\n{cell.after}" for cell in self.cells)
        return [match["file"] for match in PICTURE.finditer(text)]


def script(name: str) -> pathlib.Path:
    return ROOT / "examples" / f"{name}.py"


def page(name: str) -> pathlib.Path:
    return DOCS / "tutorials" / f"{name}.md"


def names() -> list[str]:
    return [name for group in GROUPS.values() for name in group]


def read(name: str) -> Tutorial:
    text = script(name).read_text()
    title, _, summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    starts = [*CELL.finditer(text)]
    ends = [*[match.start() for match in starts[1:]], len(text)]
    cells = [
        split(match["title"].strip(), text, match.end(), end)
        for match, end in zip(starts, ends, strict=True)
    ]
    return Tutorial(name, title.removesuffix("."), summary.strip(), cells)


def split(title: str, text: str, start: int, end: int) -> Cell:
    lines = text[start:end].rstrip().splitlines()
    first = next((i for i, one in enumerate(lines) if one[:1] != "#"), len(lines))
    last = len(lines)
    while last > first and lines[last - 1][:1] == "#":
        last -= 1
    if last > first and lines[last - 1]:  # a comment of the code, not after it
        last = len(lines)
    code = "\n".join(lines[first:last])
    blank = len(code) - len(code.lstrip("\n"))
    line = text[:start].count("\n") + 1 + first + blank
    return Cell(
        title, prose(lines[:first]), code.strip("\n"), prose(lines[last:]), line
    )


def prose(lines: list[str]) -> str:
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def render(tutorial: Tutorial, printed: list[str], took: str) -> str:
    """The page; `printed` has an entry for each cell with code."""
    options = f"`examples/{tutorial.name}.py` {took}"
    parts = [f"# {tutorial.title}", tutorial.summary, f"The program: {options}."]
    outputs = iter(printed)
    for cell in tutorial.cells:
        parts += [f"## {cell.title}"] if cell.title else []
        parts.append(PICTURE.sub(r"![\g<alt>](../images/\g<file>)", cell.before))
        if cell.code:
            parts.append(f"```python\n{cell.code}\n```")
            output = next(outputs)
            parts += [f"```text\n{output}```"] if output else []
        parts.append(PICTURE.sub(r"![\g<alt>](../images/\g<file>)", cell.after))
    return "\n\n".join(part for part in parts if part) + "\n"


def recorded(name: str) -> tuple[list[str], list[str], str]:
    """From a page: the code of its cells, what they printed, and how long it took."""
    text = page(name).read_text()
    blocks = [*BLOCK.finditer(text)]
    code = [block["code"].removesuffix("\n") for block in blocks]
    found = TOOK.search(text)
    return code, [block["printed"] or "" for block in blocks], found[0] if found else ""


def stale(name: str) -> bool:
    """Whether a page is not that of its program."""
    tutorial = read(name)
    if not page(name).exists():
        return True
    code, printed, took = recorded(name)
    good = code == [cell.code for cell in tutorial.cells if cell.code]
    return not good or page(name).read_text() != render(tutorial, printed, took)


def run(name: str):
    """Runs a program cell by cell, as `__main__`; writes what it printed."""
    tutorial, path = read(name), script(name)
    module = types.ModuleType(
        "__main__", ast.get_docstring(ast.parse(path.read_text()))
    )
    module.__file__ = str(path)
    main, sys.modules["__main__"] = sys.modules["__main__"], module
    sys.argv, printed = [str(path)], []
    start = time.perf_counter()
    for cell in tutorial.cells:
        if cell.code:
            out = io.StringIO()
            # The newlines keep the line numbers of errors those of the program.
            code = compile("\n" * (cell.line - 1) + cell.code, str(path), "exec")
            with contextlib.redirect_stdout(out):
                exec(code, module.__dict__)
            printed.append("".join(f"{one}\n" for one in out.getvalue().splitlines()))
    took = [time.perf_counter() - start, time.process_time()]
    pathlib.Path("record.json").write_text(json.dumps([printed, took]))
    sys.modules["__main__"] = main


def record(name: str):
    tutorial = read(name)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", name]
        subprocess.run(command, cwd=folder, check=True)
        printed, (clock, seconds) = json.loads(
            (pathlib.Path(folder) / "record.json").read_text()
        )
        for file in tutorial.pictures:
            shutil.copy(pathlib.Path(folder) / "out" / file, DOCS / "images" / file)
    took = f"({seconds:.0f} s of computing)"
    page(name).parent.mkdir(exist_ok=True)
    page(name).write_text(render(tutorial, printed, took))
    thumbnail(tutorial)
    print(f"{name:30} {seconds:5.1f} s of computing in {clock:.1f} s", flush=True)


def rewrite(name: str):
    """The words of a page anew, without a run."""
    tutorial = read(name)
    code, printed, took = recorded(name)
    if code != [cell.code for cell in tutorial.cells if cell.code]:
        raise SystemExit(f"The code of {name} has changed; run `{COMMAND}{name}`")
    page(name).write_text(render(tutorial, printed, took))
    thumbnail(tutorial)


def thumbnail(tutorial: Tutorial):
    image = Image.open(DOCS / "images" / tutorial.pictures[0]).convert("RGB")
    image = ImageOps.pad(image, THUMBNAIL, Image.Resampling.LANCZOS, color="white")
    folder = DOCS / "images" / "gallery"
    folder.mkdir(exist_ok=True)
    image = image.quantize(128, dither=Image.Dither.NONE)
    image.save(folder / f"{tutorial.name}.png", optimize=True)


def gallery() -> str:
    parts = [
        "# Gallery",
        "Programs from beginning to end, to read and to run. Each is one file in "
        "`examples/`,\nends in assertions, and takes a minute at most.",
    ]
    for group, members in GROUPS.items():
        if members:
            parts += [f"## {group}", '<div class="grid cards gallery" markdown>']
            parts += [card(read(name)) for name in members]
            parts.append("</div>")
    return "\n\n".join(parts) + "\n"


def card(tutorial: Tutorial) -> str:
    link, picture = (
        f"tutorials/{tutorial.name}.md",
        f"images/gallery/{tutorial.name}.png",
    )
    first = tutorial.summary.split("\n\n")[0].replace("\n", "\n    ")
    return (
        f"-   [![]({picture})]({link})\n\n    [{tutorial.title}]({link})\n\n    {first}"
    )


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ["--run"]:
        return run(arguments[1])
    chosen = [argument for argument in arguments if argument != "--prose"] or names()
    unknown = set(chosen) - set(names())
    if unknown:
        raise SystemExit(
            f"No tutorials: {', '.join(unknown)}; see GROUPS in {__file__}"
        )
    for name in chosen:
        (rewrite if "--prose" in arguments else record)(name)
    (DOCS / "gallery.md").write_text(gallery())


if __name__ == "__main__":
    main()
