"""The results as text, and as pages of the documentation."""

import importlib
import pathlib

from . import pictures, promises


DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = {
    "benchmarks": (
        "single",
        "door",
        "lqr",
        "batch",
        "others",
        "compilation",
        "scaling",
    ),
    "benchmarks-limits": ("limits",),
    "benchmarks-constraints": ("constraints",),
    "benchmarks-states": ("states",),
    "benchmarks-ticks": ("ticks",),
    "benchmarks-gradients": ("gradients", "gradients_batch"),
    "benchmarks-large": ("large", "large_lqr", "large_batch", "parts"),
}
TITLES = {
    "benchmarks": "Benchmarks",
    "benchmarks-limits": "Benchmarks with limits",
    "benchmarks-constraints": "Benchmarks with constraints",
    "benchmarks-states": "Benchmarks of starts from states",
    "benchmarks-ticks": "Benchmarks of ticks",
    "benchmarks-gradients": "Benchmarks of derivatives",
    "benchmarks-large": "Benchmarks of large problems",
}
INTRODUCTION = """\
# {title}

diffprog beside other solvers of the same problems, on one machine, in one run. The
command

```bash
{command}
```

measured and wrote this page; `make bench` prints the tables. Solvers take turns, one
thread each, and the figures are medians of the processor time. Of compilation and
first calls it is the time that passes. `ours / this` is our time divided by that of
the row: below 1 we are faster. There is no ratio without an equal final cost.

"""
TICKS_INTRODUCTION = """\
# {title}

Bare times of a controller, without peers. The command

```bash
{command}
```

measured and wrote this page; `make bench` prints the table.

"""
GPU_INTRODUCTION = """\
# Benchmarks on an accelerator

Bare times in float32, without peers. The command

```bash
{command}
```

measured and wrote this page; `make bench-gpu` prints the tables.

"""


def cell(value, form: str) -> str:
    return "-" if value is None else form.format(value)


def cells(rows: list[dict], columns: dict[str, str]) -> list[list[str]]:
    lines = [
        [cell(row.get(key), form) for key, form in columns.items()] for row in rows
    ]
    return [list(columns), *lines]


def is_text(rows: list[dict], columns: dict[str, str]) -> list[bool]:
    return [any(isinstance(row.get(key), str) for row in rows) for key in columns]


def text_table(rows: list[dict], columns: dict[str, str]) -> str:
    """Columns of equal width: words to the left, numbers to the right."""
    lines, words = cells(rows, columns), is_text(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines)]
    align = lambda text, width, word: text.ljust(width) if word else text.rjust(width)
    return "\n".join(
        "  ".join(map(align, line, widths, words)).rstrip() for line in lines
    )


def markdown_table(rows: list[dict], columns: dict[str, str]) -> str:
    head, *lines = cells(rows, columns)
    rule = ["---" if word else "---:" for word in is_text(rows, columns)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def machine_lines(machine: dict) -> list[str]:
    apart = ("versions", "command")
    lines = [f"{key}: {value}" for key, value in machine.items() if key not in apart]
    versions = (f"{name} {number}" for name, number in machine["versions"].items())
    return [*lines, ", ".join(versions)]


def machine_list(machine: dict) -> str:
    return "\n".join(f"- {line}" for line in machine_lines(machine))


def section_text(name: str, rows: list[dict]) -> str:
    section = importlib.import_module(f".{name}", __package__)
    parts = [f"## {section.TITLE}", *section.NOTES]
    if name in pictures.DRAW:
        parts.append(f"![{section.TITLE}](images/{picture_name(name)})")
    return "\n\n".join([*parts, markdown_table(rows, section.COLUMNS)])


def picture_name(section: str) -> str:
    return f"benchmarks_{section}.png"


def write_page(page: str, results: dict):
    """A page of the documentation and its pictures, from the results alone."""
    machine = results["machine"]
    sections = {name: results["sections"][name] for name in PAGES[page]}
    form = TICKS_INTRODUCTION if page == "benchmarks-ticks" else INTRODUCTION
    introduction = form.format(title=TITLES[page], command=machine["command"])
    for name, rows in sections.items():
        if name in pictures.DRAW:
            pictures.save(name, rows, DOCS / "images" / picture_name(name))
    parts = [
        introduction + machine_list(machine),
        *(section_text(name, rows) for name, rows in sections.items()),
        f"## {promises.TITLE}",
        promises.NOTE,
        markdown_table(promises.check(sections), promises.COLUMNS),
    ]
    (DOCS / f"{page}.md").write_text("\n\n".join(parts) + "\n")


def gpu_page(machine: dict, sections: dict, columns: dict) -> str:
    tables = (
        f"## {title}\n\n{markdown_table(rows, columns[title])}"
        for title, rows in sections.items()
    )
    introduction = GPU_INTRODUCTION.format(command=machine["command"])
    return "\n\n".join([introduction + machine_list(machine), *tables]) + "\n"
