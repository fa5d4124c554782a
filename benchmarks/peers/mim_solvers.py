"""mim-solvers' SolverPROXQP: sequential quadratic programs, each solved by ProxQP.

Its SolverCSQP, whose quadratic programs are solved by a first-order method, takes far
longer for all but the mass. Both take the action models of Crocoddyl, with rows
within limits; the limits of the controls are rows too. There is no Python version of
these models.
"""

import importlib

import casadi
import numpy

from . import crocoddyl
from .casadi import functions, MODULE


TOLERANCE = 1e-8
if not crocoddyl.COMPILER:
    raise ImportError("there is no C++ compiler")
importlib.import_module("mim_solvers")  # its libraries, which need Crocoddyl's


def row_functions(problem) -> dict[str, casadi.Function]:
    """Rows of a stage and of the end, and their derivatives."""
    x = casadi.SX.sym("x", len(problem.x0))
    u = casadi.SX.sym("u", problem.controls)
    known = lambda *rows: casadi.vertcat(*(fn(MODULE, x) for fn in rows if fn))
    stage = casadi.vertcat(u, known(problem.rows))
    last = known(problem.goal, problem.last_rows)
    outputs = {
        "stage_rows": ([x, u], [stage]),
        "stage_rows_derivatives": (
            [x, u],
            [casadi.jacobian(stage, x), casadi.jacobian(stage, u)],
        ),
        "last_rows": ([x], [last]),
        "last_rows_derivatives": ([x], [casadi.jacobian(last, x)]),
    }
    dense = lambda expressions: [casadi.densify(e) for e in casadi.cse(expressions)]
    return {
        name: casadi.Function(name, inputs, dense(expressions))
        for name, (inputs, expressions) in outputs.items()
    }


def sides(problem, rows: int, last: int) -> list[numpy.ndarray]:
    """The limits of all rows: the goal is met exactly, the others are at most 0."""
    lower, upper = problem.bounds
    others = problem.horizon, rows - problem.controls
    goal = last if problem.last_rows is None else 0
    if problem.goal and problem.last_rows:
        goal = functions(problem)["goal"].size1_out(0)
    return [
        numpy.hstack([lower, numpy.full(others, -numpy.inf)]),
        numpy.hstack([upper, numpy.zeros(others)]),
        numpy.where(numpy.arange(last) < goal, 0.0, -numpy.inf),
        numpy.zeros(last),
    ]


def solver(problem, tolerance: float = TOLERANCE) -> crocoddyl.Compiled:
    parts = functions(problem)
    parts = {name: parts[name] for name in crocoddyl.NAMES} | row_functions(problem)
    rows, last = (parts[name].size1_out(0) for name in ("stage_rows", "last_rows"))
    return crocoddyl.Compiled(
        crocoddyl.interface("mim_solvers", "mim_solvers", "crocoddyl"),
        "PROXQP",
        problem,
        crocoddyl.generated(f"{problem.name}, rows", parts),
        tolerance,
        sides(problem, rows, last),
        (rows, last),
    )
