"""Optimizers for training, side by side.

    python -m benchmarks.training [--only classifier autoencoder] [--write docs]

`make bench-training` prints the tables. The numbers go to
`out/benchmarks_training.json`, and with `--write docs` tables and pictures to
`docs/benchmarks-training.md`.
"""

import argparse
import importlib.util
import json
import pathlib
import shlex
import sys

import numpy as np

from .. import machine, pin, report
from ..losses import keep_memory


INTRODUCTION = """\
# Benchmarks of optimizers

Networks trained by optimizers of optax, by kfac-jax and by those of this library, in
float32. The command

```bash
{command}
```

measured and wrote this page; `make bench-training` prints the tables. Every method gets
at least four settings, and more until the best of them is not at the edge of its grid
of rates; the best by the final training loss on one seed is run on three other seeds,
whose medians stand here. `recommended` and the model steps have one setting, fixed
before. Rates fall linearly to 0 but where "constant" is said. The training loss is that
of the whole training set, looked at every 10 steps; seconds are those of the processor,
one thread, without the evaluation and without compiling. The photograph played no part
in choosing defaults; the tumors none but for the limit to the growth of lengths.

"""
RESULTS = {
    "method": "{}",
    "setting": "{}",
    "settings": "{:d}",
    "a quarter": "{:.3g}",
    "half": "{:.3g}",
    "final loss": "{:.3g}",
    "test loss": "{:.3g}",
    "ms a step": "{:.2f}",
}
SCORES = {
    "structure": "{}",
    "when": "{}",
    "own batch": "{:.2f}",
    "other batches": "{:.2f}",
    "16 batches, full set": "{:.2f}",
}


def makers(task, names: list[str] | None) -> dict:
    """What runs each method on a task."""
    import functools as ft

    import jax.random as jr

    import diffprog as dp

    from .kfac_jax_peer import KFACJax
    from .methods import METHODS
    from .run import Programs

    is_dense = isinstance(task.model(jr.key(0)), dp.Network)
    found = {
        name: ft.partial(Programs, method=method)
        for name, method in METHODS.items()
        if is_dense or not method.dense_only
    }
    if task.goals and importlib.util.find_spec("kfac_jax"):
        found["kfac-jax"] = KFACJax
    return {name: make for name, make in found.items() if not names or name in names}


def summary(numbers: dict) -> tuple[list[dict], dict[str, str]]:
    """Final training losses of all methods on all tasks, and who has the lowest."""
    tasks = {name: rows for name, rows in numbers.items() if rows[0].get("method")}
    methods = dict.fromkeys(row["method"] for rows in tasks.values() for row in rows)
    columns = {"task": "{}", "lowest": "{}"} | dict.fromkeys(methods, "{}")
    table = []
    for name, rows in tasks.items():
        found = {row["method"]: f"{row['final loss']:.3g}" for row in rows}
        table.append(
            {"task": name, "lowest": rows[0]["method"]}
            | {method: found.get(method, "") for method in methods}
        )
    return table, columns


def table(task, results: dict) -> tuple[list[dict], dict[str, str]]:
    """A row for every method, medians of three seeds, the best first."""
    columns, rows = dict(RESULTS), []
    for goal in task.goals:
        columns[f"steps to {goal:g}"] = "{:g}"
        columns[f"s to {goal:g}"] = "{:.2f}"
    for name, result in results.items():
        runs = result["runs"]
        part = lambda share: np.median(
            [run.losses[round(share * (len(run.losses) - 1))] for run in runs]
        )
        row = {
            "method": name,
            "setting": "none" if runs[0].setting is None else show(runs[0].setting),
            "settings": len(result["settings"]),
            "a quarter": part(0.25),
            "half": part(0.5),
            "final loss": np.median([run.final for run in runs]),
            "test loss": np.median([run.test for run in runs]),
            "ms a step": 1e3
            * np.median([run.seconds[-1] for run in runs])
            / task.steps,
        }
        for goal in task.goals:
            row[f"steps to {goal:g}"] = np.median([run.steps_to(goal) for run in runs])
            row[f"s to {goal:g}"] = np.median([run.seconds_to(goal) for run in runs])
        rows.append(row)
    return sorted(rows, key=lambda row: row["final loss"]), columns


def show(setting) -> str:
    parts = setting if isinstance(setting, tuple) else (setting,)
    return ", ".join(f"{part:.3g}" for part in parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("--only", nargs="+", help="tasks, and scores")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--write", choices=["docs"])
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    pin()
    keep_memory()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_x64", False)
    from . import pictures
    from .run import study
    from .scores import scores
    from .tasks import TASKS

    command = shlex.join(["python", "-m", "benchmarks.training", *sys.argv[1:]])
    about = machine.describe() | {"command": command}
    lines, numbers, figures = [report.machine_list(about), ""], {"machine": about}, {}
    chosen = args.only or ["scores", *TASKS]
    if "scores" in chosen:
        rows = scores()
        numbers["scores"] = rows
        figures["training_scores"] = pictures.bars(rows)
        add(
            lines, "Scores of preconditioned gradients", rows, SCORES, "training_scores"
        )
    for name in (name for name in TASKS if name in chosen):
        task = TASKS[name]()
        results = study(task, makers(task, args.methods))
        rows, columns = table(task, results)
        numbers[name] = rows
        picture = "training_" + name.lower().replace(" ", "_")
        figures[picture] = pictures.curves(name, results)
        add(lines, task.title, rows, columns, picture)
    known = {name: rows for name, rows in numbers.items() if name != "machine"}
    if set(known) - {"scores"}:
        add(lines, "Final training losses", *summary(known))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks_training.json").write_text(json.dumps(numbers, indent=1))
    folder = report.DOCS / "images" if args.write == "docs" else args.out
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.svg")
        figure.savefig(args.out / f"{name}.png", dpi=110)
    if args.write == "docs":
        page = INTRODUCTION.format(command=command) + "\n".join(lines)
        (report.DOCS / "benchmarks-training.md").write_text(page)


def add(lines: list[str], title: str, rows, columns, picture: str = ""):
    """A section with its picture and its table, which is printed too."""
    print(f"\n{title}\n\n{report.text_table(rows, columns)}", flush=True)
    lines += [f"## {title}", ""]
    lines += [f"![{title}](images/{picture}.svg)", ""] if picture else []
    lines += [report.markdown_table(rows, columns), ""]


if __name__ == "__main__":
    main()
