"""Constraints in learning: the steps of Cooper and their times, and the cost of a step.

    python -m benchmarks.learning [--write docs]

`make bench-learning` installs Cooper and prints the tables. The numbers go to
`out/benchmarks_learning.json`, and with `--write docs` the tables to
`docs/benchmarks-learning.md`.
"""

import argparse
import json
import pathlib
import shlex
import sys
import time

from . import machine, pin, report
from .losses import keep_memory
from .peers import load
from .promises import promise
from .timing import alternate


ROWS, BATCH, SIZES = 50_000, 128, (64, 256, 256, 256, 10)
LOOP = 20
INTRODUCTION = """\
# Benchmarks of constraints in learning

`diffprog.constrained` beside Cooper on PyTorch: 1000 steps on one problem with five
unknowns, two equalities and six inequalities that can be kept, float64, from the same
start. Then the cost of limits in training. The command

```bash
{command}
```

measured and wrote this page; `make bench-learning` prints the tables. One thread each;
times are those of the processor, without compiling.

"""
SAME = """\
The largest difference from Cooper in the unknowns x and in the multipliers, over all
steps. `moved` is what a difference is read beside: our run against itself from a start
moved by one rounding. `times faster` are our steps in one loop, the median of several
runs, against one run of Cooper, which takes them one at a time; both keep every
iterate."""
SGD_START = """\
With the SGD start, nuPI takes the first error for the smoothed error before it, so its
first step is one of ascent. So is Cooper's, but it then stores 0 in place of the error:
later steps differ, and agree once ours forgets the first error as well."""
COST = """\
A step on a batch of 128 with a limit for the loss of every example: multipliers are
50 000 rows of a table, of which a step sees those of the batch. Beside it
`jax.value_and_grad` of the mean loss. The network is 64-256-256-256-10 with ReLU,
float32; both end with a step of SGD and give their buffers away."""
PAIRS = {
    "optimizer": "{}",
    "multipliers by": "{}",
    "order": "{}",
    "x": "{:.1e}",
    "x, moved": "{:.1e}",
    "multipliers": "{:.1e}",
    "multipliers, moved": "{:.1e}",
    "times faster": "{:.0f}",
}
STARTS = {
    "order": "{}",
    "x": "{:.2g}",
    "multipliers": "{:.2g}",
    "x, forgotten": "{:.1e}",
    "multipliers, forgotten": "{:.1e}",
}
COSTS = {"step": "{}", "ms": "{:.3f}", "x value_and_grad": "{:.3f}"}
PROMISES = {"promise": "{}", "limit": "{:g}", "measured": "{:.3g}", "verdict": "{}"}
EQUAL, FEASIBLE, FASTER, STEP = 1e-11, 1e-8, 50, 1.1


def distances(some, others, name: str = "") -> dict[str, float]:
    """Of iterates and multipliers, the largest over all steps."""
    import numpy

    keys = [key + name for key in ("x", "multipliers")]
    apart = lambda a, b: float(numpy.abs(numpy.asarray(a) - numpy.asarray(b)).max())
    return dict(zip(keys, map(apart, some, others)))


def pairs(cooper) -> list[dict]:
    import jax
    import jax.numpy as jnp
    import numpy

    from . import learning_pairs

    start = jnp.asarray(learning_pairs.START)
    moved = jnp.asarray(numpy.nextafter(learning_pairs.START, numpy.inf))
    cooper.run("SGD", "ascent", "dual first", steps=50)  # warms up
    rows = []
    for pair in learning_pairs.PAIRS:
        before = time.process_time()
        theirs = cooper.run(*pair)
        seconds = time.process_time() - before
        run = learning_pairs.run(*pair)
        ours = run(start)
        call = lambda run=run: jax.block_until_ready(run(start))
        row = dict(zip(("optimizer", "multipliers by", "order"), pair))
        row |= distances(theirs, ours) | distances(ours, run(moved), ", moved")
        row["times faster"] = seconds / alternate({"ours": call})["ours"]
        rows.append(row)
    return rows


def sgd_starts(cooper) -> list[dict]:
    import jax.numpy as jnp

    from . import learning_pairs

    rows, start = [], jnp.asarray(learning_pairs.START)
    for order in learning_pairs.ORDERS:
        pair = "SGD", "nuPI, SGD", order
        theirs = cooper.run(*pair)
        row = {"order": order} | distances(theirs, learning_pairs.run(*pair)(start))
        forgotten = learning_pairs.run(*pair, forget=True)(start)
        rows.append(row | distances(theirs, forgotten, ", forgotten"))
    return rows


def training(step, state, batches):
    """A call that goes through the batches, and hands on a state that it gives away."""
    import jax

    program = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)

    def call():
        nonlocal state
        for batch in batches:
            state = program(state, *batch)
        jax.block_until_ready(state)

    call()
    return call


def network():
    """Losses of examples by `losses(params, x, y)`, parameters, and batches."""
    import jax
    import jax.numpy as jnp
    import numpy
    import optax

    rng = numpy.random.default_rng(0)
    weight = lambda a, b: rng.normal(size=(a, b)) / numpy.sqrt(a)
    params = [(weight(a, b), numpy.zeros(b)) for a, b in zip(SIZES, SIZES[1:])]
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def losses(params, x, y):
        *hidden, (W, b) = params
        for V, c in hidden:
            x = jax.nn.relu(x @ V + c)
        scores = x @ W + b
        return optax.softmax_cross_entropy_with_integer_labels(scores, y)

    x = jnp.asarray(rng.normal(size=(BATCH, SIZES[0])), jnp.float32)
    y = jnp.asarray(rng.integers(0, SIZES[-1], BATCH), jnp.int32)
    draw = lambda: jnp.asarray(rng.integers(0, ROWS, BATCH), jnp.int32)
    return losses, params, [(draw(), x, y) for _ in range(LOOP)]


def costs() -> list[dict]:
    import jax

    with jax.enable_x64(False):
        return costs_of(*network())


def costs_of(losses, params, batches) -> list[dict]:
    import jax
    import jax.numpy as jnp

    from diffprog.constrained import Ascent, at_most, Lagrangian, PI

    moved = lambda params, grads: jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    def plain(state, index, x, y):
        params, _ = state
        mean = lambda params: jnp.mean(losses(params, x, y))
        value, grads = jax.value_and_grad(mean)(params)
        return moved(params, grads), value

    def measure(params, index, x, y):
        each = at_most(losses(params, x, y), 0.5, index=index, rows=ROWS)
        return 0.0, {"each": each}

    def limited(lagrangian, state, index, x, y):
        params, duals, _ = state
        (_, report), grads, duals = lagrangian.step(params, duals, index, x, y)
        return moved(params, grads), duals, report.feasibility

    zero = jnp.zeros(())
    calls = {"value_and_grad": training(plain, (params, zero), batches)}
    for name, dual in {"Ascent": Ascent(0.01), "PI": PI(0.01, gain=1.0)}.items():
        lagrangian = Lagrangian(measure, dual)
        state = params, lagrangian.init(params, *batches[0]), zero
        step = lambda *args, lagrangian=lagrangian: limited(lagrangian, *args)
        calls[f"step, {name}"] = training(step, state, batches)
    times = alternate(calls)
    base = times["value_and_grad"]
    return [
        {"step": name, "ms": 1e3 * seconds / LOOP, "x value_and_grad": seconds / base}
        for name, seconds in times.items()
    ]


def equality(text: str, rows: list[dict], key: str, control: str | None) -> dict:
    """The pair that is furthest from its limit, which is no less than its control."""
    limit = lambda row: max(EQUAL, row[control]) if control else EQUAL
    worst = max(rows, key=lambda row: row[key] / limit(row))
    return promise(text, limit(worst), worst[key])


def promises(violation, same, starts, cost) -> list[dict]:
    rows, pair = [], f"{len(same)} pairs, largest difference"
    rows.append(promise("violation at the minimum", FEASIBLE, violation))
    for key in ("x", "multipliers"):
        rows.append(equality(f"{pair} in {key}", same, key, f"{key}, moved"))
    slowest = min(row["times faster"] for row in same)
    rows.append(promise("steps in a loop, least times faster", FASTER, slowest, False))
    for key in ("x", "multipliers"):
        text = f"SGD start, forgotten, largest difference in {key}"
        rows.append(equality(text, starts, f"{key}, forgotten", None))
    for row in cost[1:]:
        text = f"{row['step']}, over value_and_grad"
        rows.append(promise(text, STEP, row["x value_and_grad"]))
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning")
    parser.add_argument("--write", choices=["docs"])
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    pin()
    keep_memory()
    cooper = load("cooper")
    if cooper is None:
        sys.exit(1)
    import jax
    import torch

    from . import learning_pairs

    torch.set_num_threads(1)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    command = shlex.join(["python", "-m", "benchmarks.learning", *sys.argv[1:]])
    about = machine.describe() | {"command": command}
    same, starts, cost = pairs(cooper), sgd_starts(cooper), costs()
    kept = promises(learning_pairs.violation(), same, starts, cost)
    tables = (
        ("The same steps", SAME, same, PAIRS),
        ("The SGD start of nuPI", SGD_START, starts, STARTS),
        ("The cost of limits", COST, cost, COSTS),
        ("Promises", "", kept, PROMISES),
    )
    lines = [report.machine_list(about), ""]
    for title, note, rows, columns in tables:
        print(f"\n{title}\n\n{report.text_table(rows, columns)}", flush=True)
        lines += [f"## {title}", "", *([note, ""] if note else [])]
        lines += [report.markdown_table(rows, columns), ""]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": about, "pairs": same, "starts": starts, "cost": cost}
    (args.out / "benchmarks_learning.json").write_text(json.dumps(results, indent=1))
    if args.write == "docs":
        page = INTRODUCTION.format(command=command) + "\n".join(lines)
        (report.DOCS / "benchmarks-learning.md").write_text(page)


if __name__ == "__main__":
    main()
