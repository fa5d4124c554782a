"""Problems of 14 to 40 states: ours with both kinds of loops, and Crocoddyl."""

from . import lqr, ours
from .large_problems import large
from .peers import load
from .single import compared


TITLE = "Large problems"
COLUMNS = {
    "problem": "{}",
    "n, m, T": "{}",
    "solver": "{}",
    "ms": "{:.3f}",
    "iterations": "{}",
    "cost": "{:.9g}",
    "ours / this": "{:.3f}",
}
NOTES = (
    "Times are of one solve from zero controls, or torques that hold the arm, float64, "
    "one thread, with the stopping rules of [Control](benchmarks.md). A chain is a "
    "row of masses between springs, written with arrays or with a scalar for each "
    "mass. `ours / this` divides the "
    "better of `dp.ILQR` and `dp.DDP` by the row; there is no ratio where a solver did "
    "not converge or the final cost differs by more than 1e-6.",
    "The linear-quadratic problems are those of [Control](benchmarks.md), of other "
    "sizes: one iteration of Crocoddyl's FDDP with its built-in model in C++.",
)
SIZES = ((14, 7, 100), (24, 12, 200), (40, 20, 200))


def solvers(problem) -> dict:
    found = {
        f"diffprog {type(method).__name__}{suffix}": ours.Solver(
            problem, method, **options
        )
        for method in ours.METHODS
        for suffix, options in ours.LOOPS.items()
    }
    if crocoddyl := load("crocoddyl"):
        found[crocoddyl.name()] = crocoddyl.Solver(problem)
    return found


def of_problem(problem) -> list[dict]:
    size = f"{len(problem.x0)}, {problem.controls}, {problem.horizon}"
    return [row | {"n, m, T": size} for row in compared(problem, solvers(problem))]


def of_lqr(size: tuple) -> list[dict]:
    return [row | {"problem": "linear-quadratic"} for row in lqr.one(*size)]


def run() -> list[dict]:
    nonlinear = [row for problem in large() for row in of_problem(problem)]
    return nonlinear + [row for size in SIZES for row in of_lqr(size)]
