"""Time and memory against the horizon."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy

import diffprog as dp

from . import lqr, ours
from .problems import PROBLEMS
from .timing import alternate


TITLE = "Cost against the horizon"
COLUMNS = {
    "what": "{}",
    "T": "{}",
    "ms": "{:.3f}",
    "us / stage": "{:.3f}",
    "line ms": "{:.3f}",
    "working MB": "{:.2f}",
    "results MB": "{:.2f}",
    "peak MB of the process": "{:.0f}",
}
NOTES = (
    "Ten iterations of `dp.ILQR` on the pendulum, and `dp.solve_lqr` with 12 states "
    "and 4 controls. `line ms` is the straight line a + b T that fits best, by "
    "relative errors. Working memory and results are what the compiler plans; the peak "
    "includes Python, JAX and the compiler.",
)
HORIZONS = (100, 300, 1000, 3000, 10_000)
EXTREMES = HORIZONS[0], HORIZONS[-1]
ILQR, LQR = "ILQR, 10 iterations", "LQR, (12, 4)"


def pendulum(horizon: int) -> ours.Solver:
    problem = dataclasses.replace(PROBLEMS[0], horizon=horizon)
    options = dict(max_steps=10, atol=0.0, history=False)
    return ours.Solver(problem, dp.ILQR(), **options)


def linear(horizon: int) -> lqr.Solver:
    return lqr.Solver(*lqr.terms(12, 4, horizon))


KINDS = {ILQR: pendulum, LQR: linear}


def peak_megabytes(what: str, horizon: int) -> float:
    """Of a process that builds and solves one problem, twice."""
    command = [sys.executable, "-m", "benchmarks.scaling", what, str(horizon)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def of_kind(what: str) -> list[dict]:
    solvers = {horizon: KINDS[what](horizon) for horizon in HORIZONS}
    times = alternate(solvers)
    measured = numpy.array(list(times.values()))
    line = numpy.polyfit(HORIZONS, measured, 1, w=1 / measured)
    rows = []
    for horizon, solver in solvers.items():
        planned, peak = None, None
        if horizon in EXTREMES:
            compiled = solver.solve.lower(*solver.arguments).compile()
            planned, peak = compiled.memory_analysis(), peak_megabytes(what, horizon)
        rows.append({
            "what": what,
            "T": horizon,
            "ms": 1e3 * times[horizon],
            "us / stage": 1e6 * times[horizon] / horizon,
            "line ms": 1e3 * float(numpy.polyval(line, horizon)),
            "working MB": planned and planned.temp_size_in_bytes / 1e6,
            "results MB": planned and planned.output_size_in_bytes / 1e6,
            "peak MB of the process": peak,
        })  # fmt: skip
    return rows


def run() -> list[dict]:
    return [row for what in KINDS for row in of_kind(what)]


if __name__ == "__main__":
    KINDS[sys.argv[1]](int(sys.argv[2]))()
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1e3)
