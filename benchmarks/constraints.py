"""Problems with constraints: ours, and every peer that takes them."""

import numpy

import diffprog as dp

from . import compilation, ours
from .constrained import CONSTRAINED
from .peers import load
from .single import compared


TITLE = "Constraints"
COLUMNS = {
    "problem": "{}",
    "solver": "{}",
    "ms": "{:.3f}",
    "iterations": "{}",
    "cost": "{:.11g}",
    "violation": "{:.1e}",
    "ours / this": "{:.3f}",
    "first call x": "{:.2f}",
}
NOTES = (
    "Times are of one solve, float64, one thread. `violation` is the largest of all "
    "constraints, in a roll-out of the controls. `ours / this` divides `dp.DDP` by the "
    "row; there is no ratio where a solver did not converge or the final cost differs "
    "by more than 1e-6. `first call x` is the processor time to trace and compile, "
    "divided by that of the same problem without constraints.",
    "A mass and a pendulum end at a point; a car passes two obstacles below a speed "
    "limit, and pays for the distance to its goal or arrives there; a pole swings up "
    "on a cart with a short rail. All controls have limits. diffprog stops when "
    "gradients and residuals are at most 1e-8; Fatrop and Ipopt stop at the "
    "tolerance 1e-8, and have the exact Hessian. mim-solvers stops at the "
    "tolerance 1e-8, and has the Hessian of the cost alone.",
)
FAST = dict(fast_loops=True)
RAIL = dp.AugmentedLagrangian(penalty=1e3)


def solvers(problem) -> dict:
    variants = {"": FAST}
    if problem.name == "short rail":
        variants[", penalty 1000"] = FAST | dict(outer=RAIL)
    found = {}
    for suffix, options in variants.items():
        found[f"diffprog DDP{suffix}"] = ours.Solver(problem, ours.DDP, **options)
    if casadi := load("casadi"):
        for name in ("Fatrop", "Fatrop, expanded", "Ipopt, expanded"):
            solver, _, expand = name.lower().partition(", ")
            found[name] = casadi.MultipleShooting(problem, solver, bool(expand))
    if mim_solvers := load("mim_solvers"):
        found["mim-solvers, ProxQP, C++"] = mim_solvers.solver(problem)
    return found


def violation(problem, us) -> float:
    """The largest, along the states that the controls lead to."""
    xs = [numpy.array(problem.x0)]
    for u in numpy.asarray(us):
        xs.append(problem.dynamics(numpy, xs[-1], u))
    worst = [0.0]
    if problem.rows:
        worst += [numpy.max(problem.rows(numpy, x)) for x in xs[:-1]]
    if problem.last_rows:
        worst.append(numpy.max(problem.last_rows(numpy, xs[-1])))
    if problem.goal:
        worst.append(numpy.max(numpy.abs(problem.goal(numpy, xs[-1]))))
    return float(max(worst))


def one(problem, first_calls: dict[str, float]) -> list[dict]:
    found = solvers(problem)
    return [
        row
        | {
            "violation": violation(problem, found[row["solver"]].us),
            "first call x": first_calls.get(row["solver"]),
        }
        for row in compared(problem, found)
    ]


def run() -> list[dict]:
    first_calls = compilation.with_constraints()
    of = lambda problem: one(problem, first_calls.get(problem.name, {}))
    return [row for problem in CONSTRAINED for row in of(problem)]
