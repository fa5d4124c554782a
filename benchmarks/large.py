"""Problems of 14 to 40 states: ours, and Crocoddyl."""

import time

from . import ours
from .large_problems import large
from .peers import load
from .single import compared
from .timing import once


TITLE = "Large problems"
COLUMNS = {
    "problem": "{}",
    "n, m, T": "{}",
    "solver": "{}",
    "ms": "{:.3f}",
    "iterations": "{}",
    "cost": "{:.9g}",
    "ours / this": "{:.3f}",
    "first call s": "{:.1f}",
}
NOTES = (
    "Times are of one solve from zero controls, or torques that hold the arm, float64, "
    "one thread, with the stopping rules of [Control](benchmarks.md). `ours / this` "
    "divides the better of `dp.ILQR` and `dp.DDP` by the row; there is no ratio where "
    "a solver did not converge or the final cost differs by more than 1e-6. A first "
    "call traces, compiles and solves.",
    "A chain is a row of masses between springs that get stiffer, written with arrays "
    "or with a scalar for each mass. The quadruped is a body on four feet whose forces "
    "are the controls; the arm is [`Arm`][diffprog.systems.Arm], its peer has the same "
    "equations as C code. Nothing was ever tuned for the last three.",
    "What bounds the arm: its cost has no minimum in the model at the first iterates, "
    "whose passes are damped or repeated, and at the end Gauss-Newton steps converge "
    "linearly; Crocoddyl takes fewer of the former and as many of the latter. Other "
    "factors of the damping save a pass or two here and cost more elsewhere. Most of "
    "its first call is LLVM's, on one function in which the equations of all joints "
    "are written out.",
)


def solvers(problem) -> tuple[dict, dict[str, float]]:
    """The solvers, and how long the first call of ours took."""
    found, seconds = {}, {}
    for method in ours.METHODS:
        name = f"diffprog {type(method).__name__}"
        make = lambda: found.setdefault(name, ours.solver_of(problem, method))
        seconds[name] = once(make, time.perf_counter)
    if crocoddyl := load("crocoddyl"):
        found[crocoddyl.name()] = crocoddyl.Solver(problem)
    return found, seconds


def one(problem) -> list[dict]:
    size = f"{len(problem.x0)}, {problem.controls}, {problem.horizon}"
    found, seconds = solvers(problem)
    return [
        row | {"n, m, T": size, "first call s": seconds.get(row["solver"])}
        for row in compared(problem, found)
    ]


def run() -> list[dict]:
    return [row for problem in large() for row in one(problem)]
