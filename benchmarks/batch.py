"""Many starts of one problem: ours as one batch, Crocoddyl in a loop, per core."""

import time

import jax
import jax.numpy as jnp
import numpy

import diffprog as dp

from . import ours
from .peers import load
from .problems import PROBLEMS
from .timing import once


TITLE = "Batches"
COLUMNS = {
    "problem": "{}",
    "batch": "{}",
    "solver": "{}",
    "solves / s / core": "{:.0f}",
    "converged": "{:.3f}",
    "mean cost": "{:.8g}",
    "same cost": "{:.3f}",
    "times as many": "{:.2f}",
    "8 in step": "{:.2f}",
}
NOTES = (
    "Starts are normally distributed around the start of the single solve. Solves per "
    "second of processor time, all threads together; `times as many` is our figure "
    "divided by that of the row. `mean cost` is over the starts "
    "from which all rows of the problem converged; `same cost` is the share of these "
    "where the row and the first row end within 1e-6, since there are several local "
    "minima.",
    "Our problems run one after another. `8 in step` is what eight that wait for their "
    "slowest would cost: its iterations over those that each of them needs.",
    "Crocoddyl solves one after the other, which takes the same time whatever the size "
    "of the batch: the first 256 starts at most.",
)
SIZES = {"pendulum": (64, 512, 4096), "cart-pole": (512,), "quadrotor": (512,)}
ILQR = dp.ILQR()
METHODS = {"pendulum": dp.DDP(), "cart-pole": ILQR, "quadrotor": ILQR, "arm": ILQR}
MAX_STEPS, SAME_COST, MEAN_COST, LOOPED, PATIENCE = 200, 1e-6, 1e-2, 256, 1.0
PLAIN = "pendulum", 512  # also without fast loops


def measure_ours(problem, x0s: numpy.ndarray, **options) -> dict:
    method = METHODS[problem.name]
    solve = ours.batch_solver(problem, method, max_steps=MAX_STEPS, **options)
    uss = numpy.stack([problem.us_from(x0) for x0 in x0s])
    starts = jnp.asarray(x0s), jnp.asarray(uss)
    solve, found = jax.jit(solve).lower(*starts).compile(), []
    call = lambda: found.append(jax.block_until_ready(solve(*starts)))
    seconds = once(call)
    if seconds < PATIENCE:
        seconds = numpy.median([once(call) for _ in range(3)])
    solution = found[-1]
    converged = numpy.asarray(solution.result == dp.RESULTS.successful)
    return dict(
        solver=f"diffprog {type(method).__name__}",
        rate=len(x0s) / seconds,
        costs=numpy.asarray(solution.cost),
        finished=converged,
        in_step=in_step(numpy.asarray(solution.stats["num_steps"])),
    )


def in_step(steps: numpy.ndarray) -> float:
    """Iterations in groups of eight that wait for their slowest, over those needed."""
    groups = steps.reshape(-1, 8)
    return float(groups.max(1).mean() / groups.mean())


def measure_crocoddyl(crocoddyl, problem, x0s: numpy.ndarray) -> dict:
    solver, costs, finished = crocoddyl.Solver(problem), [], []
    start = time.process_time()
    for x0 in x0s:
        solver(x0, problem.us_from(x0))
        costs.append(solver.cost)
        finished.append(solver.converged)
    return dict(
        solver=crocoddyl.name(),
        rate=len(x0s) / (time.process_time() - start),
        costs=numpy.array(costs),
        finished=numpy.array(finished),
    )


def compared(rows: list[dict]) -> list[dict]:
    """The rows with what they have in common: starts from which all converged."""
    count = min(len(row["costs"]) for row in rows)
    both = numpy.all([row["finished"][:count] for row in rows], axis=0)
    first, table = rows[0], []
    reference = first["costs"][:count][both]
    for row in rows:
        costs = row["costs"][:count][both]
        same = numpy.abs(costs - reference) <= SAME_COST * numpy.abs(reference)
        equal = abs(costs.mean() / reference.mean() - 1) <= MEAN_COST
        peer = not row["solver"].startswith("diffprog")
        table.append({
            "solver": row["solver"],
            "solves / s / core": row["rate"],
            "converged": float(row["finished"].mean()),
            "mean cost": float(costs.mean()),
            "same cost": float(same.mean()),
            "times as many": first["rate"] / row["rate"] if peer and equal else None,
            "8 in step": row.get("in_step"),
        })  # fmt: skip
    return table


def one(problem, count: int) -> list[dict]:
    x0s = problem.starts(count)
    rows = []
    for suffix, options in ours.LOOPS.items():
        if not suffix or (problem.name, count) == PLAIN:
            row = measure_ours(problem, x0s, **options)
            rows.append(row | {"solver": row["solver"] + suffix})
    crocoddyl = load("crocoddyl")
    if crocoddyl and crocoddyl.COMPILER:
        rows.append(measure_crocoddyl(crocoddyl, problem, x0s[:LOOPED]))
    return [dict(problem=problem.name, batch=count) | row for row in compared(rows)]


def run() -> list[dict]:
    pairs = [(p, count) for p in PROBLEMS for count in SIZES.get(p.name, ())]
    return [row for problem, count in pairs for row in one(problem, count)]
