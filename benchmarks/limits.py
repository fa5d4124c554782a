"""Problems whose controls have limits: ours, and every peer that takes them."""

import numpy

from . import compilation, ours
from .peers import load
from .problems import LIMITED
from .single import compared


TITLE = "Limits of the controls"
COLUMNS = {
    "problem": "{}",
    "solver": "{}",
    "ms": "{:.3f}",
    "iterations": "{}",
    "ms / iteration": "{:.4f}",
    "cost": "{:.11g}",
    "excess": "{:.1e}",
    "ours / this": "{:.3f}",
    "first call x": "{:.2f}",
}
TOLERANCE = 1e-9
NOTES = (
    "Times are of one solve, float64, one thread. `excess` is the largest distance of "
    "a control beyond its limit. `ours / this` divides the better of `dp.ILQR` and "
    "`dp.DDP` by the row; there is no ratio where a solver did not converge or the "
    "final cost differs by more than 1e-6. `first call x` is the processor time to "
    "trace and compile, divided by that of the same problem without limits.",
    "The pendulum has |u| <= 3, or limits that change with the stage and are missing "
    "at some; the car has |angle| <= 0.5 and |acceleration| <= 2, and starts from "
    "small waves. diffprog and Crocoddyl stop when the model promises a decrease below "
    "1e-9, Fatrop and Ipopt at the tolerance 1e-8. Crocoddyl's box solvers take limits "
    "of every stage, infinite ones as 1e10, and are stopped after 500 iterations.",
)


def solvers(problem) -> dict:
    found = {}
    for method in ours.METHODS:
        name = f"diffprog {type(method).__name__}"
        found[name] = ours.Solver(problem, method, atol=TOLERANCE)
    if casadi := load("casadi"):
        found["Fatrop"] = casadi.MultipleShooting(problem, "fatrop", expand=False)
        found["Fatrop, expanded"] = casadi.MultipleShooting(problem, "fatrop", True)
        found["Ipopt, expanded"] = casadi.MultipleShooting(problem, "ipopt", True)
    if crocoddyl := load("crocoddyl"):
        for name in ("BoxDDP", "BoxFDDP"):
            solver = crocoddyl.Solver(problem, name, TOLERANCE)
            found[crocoddyl.name(name)] = solver
    return found


def excess(problem, us) -> float:
    lower, upper = problem.bounds
    us = numpy.asarray(us)
    return max(0.0, numpy.max(lower - us), numpy.max(us - upper))


def one(problem, first_calls: dict[str, float]) -> list[dict]:
    found = solvers(problem)
    return [
        row
        | {
            "ms / iteration": row["ms"] / row["iterations"],
            "excess": excess(problem, found[row["solver"]].us),
            "first call x": first_calls.get(row["solver"]),
        }
        for row in compared(problem, found)
    ]


def run() -> list[dict]:
    first_calls = compilation.with_limits()
    of = lambda problem: one(problem, first_calls.get(problem.name, {}))
    return [row for problem in LIMITED for row in of(problem)]
