"""Single solves: ours, and every peer that is installed."""

from . import ours
from .peers import load
from .problems import PROBLEMS, UNSEEN
from .timing import alternate


TITLE = "Single solves"
COLUMNS = {
    "problem": "{}",
    "solver": "{}",
    "ms": "{:.3f}",
    "iterations": "{}",
    "cost": "{:.9g}",
    "ours / this": "{:.3f}",
}
NOTES = (
    "Times are of one solve from zero controls, float64, one thread. `ours / this` "
    "divides the better of `dp.ILQR` and `dp.DDP` by the row; there is no ratio where "
    "a solver did not converge or the final cost differs by more than 1e-6.",
    "Plain loops are [those without the fast path](advanced/speed.md). "
    "Fatrop and Ipopt have the exact Hessian, and the problem either as calls of the "
    "function of a stage or expanded to scalar operations; both are interpreted.",
    "Crocoddyl comes as a wheel for any x86-64 processor; the functions of the problem "
    "are C code for this one. All programs stop by their own rule: diffprog and "
    "Crocoddyl when the model promises a decrease below 1e-7, Fatrop and Ipopt at the "
    "tolerance 1e-8.",
)
SAME_COST = 1e-6


def solvers(problem) -> dict:
    found = {}
    for method in ours.METHODS:
        for suffix, options in ours.LOOPS.items():
            name = f"diffprog {type(method).__name__}{suffix}"
            if not suffix or method is not ours.DDP:
                found[name] = ours.solver_of(problem, method, **options)
    if casadi := load("casadi"):
        found["Fatrop"] = casadi.MultipleShooting(problem, "fatrop", expand=False)
        found["Fatrop, expanded"] = casadi.MultipleShooting(problem, "fatrop", True)
        found["Ipopt, expanded"] = casadi.MultipleShooting(problem, "ipopt", True)
    if crocoddyl := load("crocoddyl"):
        found[crocoddyl.name()] = crocoddyl.Solver(problem)
    return found


def best(rows: list, suffix: str = "") -> dict:
    """The faster of our methods, with the loops of the suffix."""
    names = [f"diffprog {type(method).__name__}{suffix}" for method in ours.METHODS]
    mine = [row for row in rows if row["solver"] in names and row["converged"]]
    return min(mine, key=lambda row: row["ms"], default=None)


def ratio(mine: dict | None, row: dict) -> float | None:
    """Our time over that of a peer, if both solved the problem."""
    if mine is None or not row["converged"] or row["solver"].startswith("diffprog"):
        return None
    same = abs(mine["cost"] - row["cost"]) <= SAME_COST * abs(row["cost"])
    return mine["ms"] / row["ms"] if same else None


def compared(problem, found: dict) -> list[dict]:
    """A row for each solver, which take turns, and its ratio to ours."""
    times = alternate(found)
    rows = [
        dict(
            problem=problem.name,
            solver=name,
            ms=1e3 * times[name],
            iterations=solver.steps,
            cost=solver.cost,
            converged=solver.converged,
        )
        for name, solver in found.items()
    ]
    mine = best(rows)
    return [row | {"ours / this": ratio(mine, row)} for row in rows]


def run() -> list[dict]:
    return [
        row
        for problem in PROBLEMS + UNSEEN
        for row in compared(problem, solvers(problem))
    ]
