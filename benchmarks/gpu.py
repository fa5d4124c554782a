"""Batches, the parallel Riccati recursion and entmax in float32, on what JAX runs on.

    python -m benchmarks.gpu [--small] [--write docs]

Needs JAX for the accelerator and none of the peers. The numbers go to
`out/benchmarks_gpu.json`, the tables to `out/benchmarks_gpu.md`, or with `--write docs`
to `docs/benchmarks-gpu.md`.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy

import diffprog as dp
from diffprog.losses import Alpha, entmax15

from . import lqr, machine, ours, report, row_kernel
from .problems import PROBLEMS
from .timing import once


BATCHES = 64, 256, 1024, 4096, 16_384
HORIZONS = 128, 512, 2048, 8192, 16_384
SIZES = (4, 2), (12, 4)
ROWS = (64, 131_072), (4096, 32_000)
ENOUGH = 2.0  # seconds: what takes longer is timed once

BATCH_TITLE = "Batches under `jax.vmap`"
BATCH_COLUMNS = {
    "problem": "{}",
    "batch": "{}",
    "ms": "{:.1f}",
    "solves / s": "{:.0f}",
    "converged": "{:.3f}",
    "iterations, median": "{:.0f}",
    "iterations, most": "{}",
    "compile s": "{:.1f}",
}
RICCATI_TITLE = "Riccati recursions"
RICCATI_COLUMNS = {
    "n, m": "{}",
    "T": "{}",
    "sequential ms": "{:.3f}",
    "parallel ms": "{:.3f}",
    "sequential / parallel": "{:.2f}",
    "difference of the costs": "{:.1e}",
}
ENTMAX_TITLE = "1.5-entmax, of rows of scores"
ENTMAX_COLUMNS = {
    "rows, classes": "{}",
    "row kernel": "{}",
    "softmax ms": "{:.3f}",
    "entmax ms": "{:.3f}",
    "entmax / softmax": "{:.2f}",
    "with derivative, softmax ms": "{:.3f}",
    "with derivative, entmax ms": "{:.3f}",
    "difference to the package": "{:.1e}",
}


def median_seconds(call) -> float:
    wall = lambda: once(call, time.perf_counter)
    first = wall()
    repeats = 1 if first > ENOUGH else 5
    return statistics.median([first] + [wall() for _ in range(repeats - 1)])


def batch(problem, count: int) -> dict:
    """Solves by iLQR, with the library's own tolerances for float32."""
    options = dict(rtol=None, atol=None, max_steps=200, history=False)
    solve = jax.vmap(ours.solver(problem, dp.ILQR(), **options))
    x0s = jnp.asarray(problem.starts(count), jnp.float32)
    uss = jnp.zeros((count, problem.horizon, problem.controls), jnp.float32)
    compiled = []
    lowered = jax.jit(solve).lower(x0s, uss)
    compile = lambda: compiled.append(lowered.compile())
    seconds_to_compile = once(compile, time.perf_counter)
    run = lambda: jax.block_until_ready(compiled[0](x0s, uss))
    solution = run()
    seconds = median_seconds(run)
    steps = numpy.asarray(solution.stats["num_steps"])
    converged = numpy.asarray(solution.result == dp.RESULTS.successful)
    return {
        "problem": problem.name,
        "batch": count,
        "ms": 1e3 * seconds,
        "solves / s": count / seconds,
        "converged": float(converged.mean()),
        "iterations, median": float(numpy.median(steps)),
        "iterations, most": int(steps.max()),
        "compile s": seconds_to_compile,
    }


def riccati(n: int, m: int, T: int) -> dict:
    terms, x0 = lqr.terms(n, m, T)
    single = {name: value.astype(numpy.float32) for name, value in terms.items()}
    methods = {
        "sequential": {"method": dp.Riccati()},
        "parallel": {"method": dp.ParallelRiccati()},
    }
    found = {
        name: lqr.Solver(single, x0.astype(numpy.float32), **options)
        for name, options in methods.items()
    }
    times = {name: 1e3 * median_seconds(solver) for name, solver in found.items()}
    costs = [solver.cost for solver in found.values()]
    parallel = times["parallel"]
    return {
        "n, m": f"{n}, {m}",
        "T": T,
        "sequential ms": times["sequential"],
        "parallel ms": parallel,
        "sequential / parallel": times["sequential"] / parallel,
        "difference of the costs": abs(costs[-1] / costs[0] - 1),
    }


def entmax(rows: int, classes: int) -> list[dict]:
    """Against `jax.nn.softmax`: by the package, and by the row kernel where it can."""
    shape = rows, classes
    scores = 2 * numpy.random.default_rng(0).normal(size=shape).astype(numpy.float32)
    scores = jnp.asarray(scores)

    def timed(operator) -> tuple[float, float, jax.Array]:
        forward = jax.jit(operator)
        backward = jax.jit(lambda a: jax.vjp(operator, a)[1](a))
        run = lambda call: jax.block_until_ready(call(scores))
        p, _ = run(forward), run(backward)
        seconds = [median_seconds(lambda c=c: run(c)) for c in (forward, backward)]
        return 1e3 * seconds[0], 1e3 * seconds[1], p

    softmax, softmax_vjp, _ = timed(jax.nn.softmax)
    operators = {"off": entmax15}
    if jax.devices()[0].platform == "gpu" and classes <= row_kernel.LIMIT:
        operators["on"] = lambda a: row_kernel.row_softargmax(a, Alpha(1.5))
    found, expected = [], None
    for name, operator in operators.items():
        ms, vjp, p = timed(operator)
        expected = p if expected is None else expected
        row = {
            "rows, classes": f"{rows}, {classes}",
            "row kernel": name,
            "softmax ms": softmax,
            "entmax ms": ms,
            "entmax / softmax": ms / softmax,
            "with derivative, softmax ms": softmax_vjp,
            "with derivative, entmax ms": vjp,
            "difference to the package": float(jnp.abs(p - expected).sum(-1).max()),
        }
        found.append(row)
    return found


def measure(small: bool) -> dict:
    batches = BATCHES[:1] if small else BATCHES
    horizons = HORIZONS[:2] if small else HORIZONS
    problems = [problem for problem in PROBLEMS if problem.spread]
    pairs = [(problem, count) for problem in problems for count in batches]
    sizes = [(*size, T) for size in SIZES for T in horizons]
    rows = [(16, 4096)] if small else ROWS
    return {
        BATCH_TITLE: [batch(*pair) for pair in pairs],
        RICCATI_TITLE: [riccati(*size) for size in sizes],
        ENTMAX_TITLE: [row for shape in rows for row in entmax(*shape)],
    }


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="the smallest sizes")
    parser.add_argument("--write", choices=["docs"])
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", False)
    device = jax.devices()[0].device_kind
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    facts = {"device": device} | machine.describe() | {"command": command}
    print("\n".join(report.machine_lines(facts)))
    sections = measure(args.small)
    columns = {
        BATCH_TITLE: BATCH_COLUMNS,
        RICCATI_TITLE: RICCATI_COLUMNS,
        ENTMAX_TITLE: ENTMAX_COLUMNS,
    }
    for title, rows in sections.items():
        print(f"\n{title}\n\n{report.text_table(rows, columns[title])}")
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.dumps({"machine": facts, "sections": sections}, indent=1)
    (args.out / "benchmarks_gpu.json").write_text(results)
    page = report.gpu_page(facts, sections, columns)
    docs = pathlib.Path("docs/benchmarks-gpu.md")
    path = docs if args.write == "docs" else args.out / "benchmarks_gpu.md"
    path.write_text(page)


if __name__ == "__main__":
    main()
