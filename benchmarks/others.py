"""Peers of other kinds: iLQR in PyTorch, and quasi-Newton methods in JAX."""

import time

import diffprog as dp

from . import ours
from .peers import load
from .problems import PROBLEMS
from .timing import once


TITLE = "Other kinds of solvers"
COLUMNS = {
    "problem": "{}",
    "solver": "{}",
    "iterations": "{}",
    "ms": "{:.2f}",
    "ms / iteration": "{:.3f}",
    "cost": "{:.7g}",
    "first call s": "{:.1f}",
}
NOTES = (
    "mpc.pytorch is given a few iterations, the quasi-Newton methods 500, on the cost "
    "as a function of all controls. They do not reach the optimum, so there is no "
    "ratio.",
)
MPC_STEPS = 3


def row(problem, name: str, make) -> dict:
    """Builds and calls a solver, then times one more call."""
    found = []
    first = once(lambda: (found.append(make()), found[0]()), time.perf_counter)
    solver = found[0]
    milliseconds = 1e3 * once(solver)
    return {
        "problem": problem.name,
        "solver": name,
        "iterations": solver.steps,
        "ms": milliseconds,
        "ms / iteration": milliseconds / solver.steps,
        "cost": solver.cost,
        "first call s": first,
    }


def run() -> list[dict]:
    problem = PROBLEMS[0]
    rows = [row(problem, "diffprog ILQR", lambda: ours.Solver(problem, dp.ILQR()))]
    if mpc := load("mpc"):
        rows.append(row(problem, "mpc.pytorch", lambda: mpc.Solver(problem, MPC_STEPS)))
    if shooting := load("shooting"):
        for name, run in shooting.SOLVERS.items():
            rows.append(row(problem, name, lambda: shooting.Solver(problem, run)))
    return rows
