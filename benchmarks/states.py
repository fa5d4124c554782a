"""Starts from zero controls and from a line of states: ours, and Crocoddyl's."""

import dataclasses

from . import ours
from .constrained import CAR
from .peers import load
from .problems import PROBLEMS
from .single import compared


TITLE = "Starts from states"
COLUMNS = {
    "problem": "{}",
    "solver": "{}",
    "start": "{}",
    "ms": "{:.3f}",
    "iterations": "{}",
    "iterations with gaps": "{}",
    "cost": "{:.9g}",
    "ours / this": "{:.3f}",
}
NOTES = (
    "Times are of one solve, float64, one thread, with the stopping rules of "
    "[Control](benchmarks.md). Controls start at zero. The states start at what these "
    "lead to, or on the straight line from the start to the goal, in equal steps; an "
    "iteration is one with gaps if it begins at states that do not follow from the "
    "controls. `ours / this` divides the better of `dp.ILQR` and `dp.DDP` from the "
    "same start by the row; there is no ratio where a solver did not converge or the "
    "final cost differs by more than 1e-6.",
    "The car has limits, obstacles on its line and a limit of its speed. Crocoddyl "
    "takes no such constraints. On the cart-pole its steps from the line raise the "
    "cost above 1e7, and 500 iterations do not suffice.",
)
CONTROLS, LINE = STARTS = "zero controls", "line of states"
WITH_LINES = tuple(problem for problem in PROBLEMS if problem.line) + (
    dataclasses.replace(CAR, guess=None),
)


def solvers(problem, xs) -> dict:
    found = {
        f"diffprog {type(method).__name__}": ours.Solver(problem, method, xs)
        for method in ours.METHODS
    }
    crocoddyl = None if problem.rows else load("crocoddyl")
    if crocoddyl:
        found[crocoddyl.name()] = crocoddyl.Solver(problem, xs=xs)
    return found


def one(problem, start: str) -> list[dict]:
    found = solvers(problem, problem.xs if start == LINE else None)
    return [
        row
        | {
            "start": start,
            "iterations with gaps": found[row["solver"]].steps_with_gaps,
        }
        for row in compared(problem, found)
    ]


def run() -> list[dict]:
    return [
        row for problem in WITH_LINES for start in STARTS for row in one(problem, start)
    ]
