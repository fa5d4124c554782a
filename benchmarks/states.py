"""Starts from zero controls and from a line of states: ours, and Crocoddyl's."""

import dataclasses
import functools
import math

import numpy

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
    "of 100 starts": "{}",
    "missed": "{}",
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
    "Iterations are those of one start, and a change of 1e-6 moves some of them by a "
    "fifth. So the first guess of the controls, and of the states on the line, has "
    "normal noise added, of the sizes 1e-4, 1e-3, 1e-2 and 0.1, 25 times each; the "
    "quartiles of the iterations stand under `of 100 starts`, unless the first solve "
    "did not converge. Solves that did not "
    "converge, or to a cost more than 1e-3 above the least of the problem, are "
    "`missed` and count as the longest.",
    "The car has limits, obstacles on its line and a limit of its speed. Crocoddyl "
    "takes no such constraints. On the cart-pole its steps from the line raise the "
    "cost above 1e7, and 500 iterations do not suffice.",
)
SIZES, DRAWS, MISSED = (1e-4, 1e-3, 1e-2, 0.1), 25, 1e-3
CONTROLS, LINE = STARTS = "zero controls", "line of states"
WITH_LINES = tuple(problem for problem in PROBLEMS if problem.line) + (
    dataclasses.replace(CAR, guess=None),
)


def solvers(problem, xs) -> dict:
    make = ours.solver_of if xs is None else functools.partial(ours.Solver, xs=xs)
    found: dict = {
        f"diffprog {type(method).__name__}": make(problem, method)
        for method in ours.METHODS
    }
    crocoddyl = None if problem.rows else load("crocoddyl")
    if crocoddyl:
        found[crocoddyl.name()] = crocoddyl.Solver(problem, xs=xs)
    return found


def perturbed(solver, problem, xs, most: float) -> list[float]:
    """The iterations from each perturbed start: infinite where they miss the cost."""
    draws, counts = numpy.random.default_rng(0), []
    for size in SIZES:
        for _ in range(DRAWS):
            noisy = lambda a: a + size * draws.normal(size=a.shape)
            solver.begin(noisy(problem.us), None if xs is None else noisy(xs))
            solver()
            good = solver.converged and solver.cost <= most
            counts.append(solver.steps if good else math.inf)
    solver.begin(problem.us, xs)
    return counts


def spread(counts: list[float]) -> dict:
    """Quartiles, numbers that occur."""
    ways = numpy.percentile(counts, (25, 50, 75), method="higher").tolist()
    return {
        "median": ways[1],
        "of 100 starts": " / ".join(f"{way:.0f}" for way in ways),
        "missed": int(numpy.sum(numpy.isinf(counts))),
    }


def of_problem(problem) -> list[dict]:
    rows = []
    for start in STARTS:
        xs = problem.xs if start == LINE else None
        found = solvers(problem, xs)
        for row in compared(problem, found):
            solver = found[row["solver"]]
            more = {"start": start, "iterations with gaps": solver.steps_with_gaps}
            rows.append((row | more, solver, xs))
    least = min(row["cost"] for row, *_ in rows if row["converged"])
    most = least + MISSED * abs(least)
    return [
        row | spread(perturbed(solver, problem, xs, most))
        if row["converged"]
        else row | {"median": math.inf}
        for row, solver, xs in rows
    ]


def run() -> list[dict]:
    return [row for problem in WITH_LINES for row in of_problem(problem)]
