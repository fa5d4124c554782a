"""The time of a derivative of a solution, in iterations of the solve."""

import time

import jax
import jax.numpy as jnp

from . import ours
from .problems import LIMITED, PROBLEMS
from .timing import alternate, once


TITLE = "Derivatives of solutions"
COLUMNS = {
    "problem": "{}",
    "iterations": "{}",
    "iteration us": "{:.0f}",
    "derivative us": "{:.0f}",
    "in iterations": "{:.1f}",
    "first solve s": "{:.1f}",
    "first derivative s": "{:.1f}",
}
NOTES = (
    "`dp.DDP`, float64, one thread, fast loops. The derivative is that of a number "
    "that depends on all states and controls, in the first state, by reverse mode: "
    "the time of a solve with it less that of a solve, both from the solution. `in "
    "iterations` divides it by the time of an iteration, which is that of a solve from "
    "the first guess divided by their number. The first calls trace, compile and run.",
)


def one(problem) -> dict:
    solve, found = ours.solver(problem, ours.DDP), ours.solver_of(problem, ours.DDP)
    x0, us = ours.start(problem)

    def loss(x0, us):
        solution = solve(x0, us)
        return jnp.sum(solution.xs**2) + jnp.sum(solution.us**2), solution.stats

    calls = dict(solve=jax.jit(loss), both=jax.jit(jax.grad(loss, has_aux=True)))
    first, run = {}, {}
    for name, call in calls.items():
        run[name] = lambda call=call: jax.block_until_ready(call(x0, found.us))
        first[name] = once(run[name], time.perf_counter)
    run["whole"] = lambda: jax.block_until_ready(calls["solve"](x0, us))
    times, steps = alternate(run), found.steps
    slopes, _ = calls["both"](x0, found.us)
    iteration, more = times["whole"] / steps, times["both"] - times["solve"]
    return {
        "problem": problem.name,
        "iterations": steps,
        "iteration us": 1e6 * iteration,
        "derivative us": 1e6 * more,
        "in iterations": more / iteration if jnp.all(jnp.isfinite(slopes)) else None,
        "first solve s": first["solve"],
        "first derivative s": first["both"],
    }


def run() -> list[dict]:
    return [one(problem) for problem in (*PROBLEMS, LIMITED[0])]
