"""A batch of pendulums with limits, and its derivative, beside Fatrop in a loop."""

import jax
import jax.numpy as jnp
import numpy

import diffprog as dp

from . import ours
from .peers import load
from .problems import LIMITED
from .timing import once


TITLE = "Batches with limits, and their derivatives"
COLUMNS = {
    "solver": "{}",
    "solves / s / core": "{:.0f}",
    "converged": "{:.3f}",
    "mean cost": "{:.8g}",
    "times Fatrop": "{:.2f}",
}
NOTES = (
    "512 starts of the pendulum with |u| <= 3, normally distributed around the start "
    "of the single solve. The derivative is that of the sum of the squares of all "
    "states and controls in all starts. Solves per second of processor time, all "
    "threads together. Fatrop solves 64 of them one after another, on the expanded "
    "program. `mean cost` is over the first 64.",
)
COUNT, LOOPED = 512, 64


def run() -> list[dict]:
    problem = LIMITED[0]
    solve = ours.batch_solver(problem, ours.DDP)
    x0s = problem.starts(COUNT)
    uss = jnp.asarray(numpy.stack([problem.us_from(x0) for x0 in x0s]))

    def loss(x0s):
        solutions = solve(x0s, uss)
        squares = jnp.sum(solutions.xs**2) + jnp.sum(solutions.us**2)
        return squares, (solutions.result == dp.RESULTS.successful, solutions.cost)

    rows = []
    calls = {"diffprog DDP": loss, "with derivatives": jax.grad(loss, has_aux=True)}
    for name, fn in calls.items():
        call = jax.jit(fn)
        answer, (good, costs) = call(jnp.asarray(x0s))
        ready = lambda call=call: jax.block_until_ready(call(jnp.asarray(x0s)))
        if jnp.ndim(answer):  # a row for each start
            good &= jnp.all(jnp.isfinite(answer), 1)
        seconds = numpy.median([once(ready) for _ in range(3)])
        rows.append({
            "solver": name,
            "solves / s / core": COUNT / seconds,
            "converged": float(jnp.mean(good)),
            "mean cost": float(jnp.mean(costs[:LOOPED])),
        })  # fmt: skip
    if casadi := load("casadi"):
        fatrop = casadi.MultipleShooting(problem, "fatrop", True)
        costs, good, seconds = [], [], 0.0
        for x0 in x0s[:LOOPED]:
            fatrop.x0 = x0
            fatrop.guess = fatrop.roll_out(problem.us_from(x0))
            seconds += once(fatrop)
            costs.append(fatrop.cost)
            good.append(fatrop.converged)
        rate = LOOPED / seconds
        rows.append({
            "solver": "Fatrop, expanded",
            "solves / s / core": rate,
            "converged": float(numpy.mean(good)),
            "mean cost": float(numpy.mean(costs)),
        })  # fmt: skip
        for row in rows[:-1]:
            row["times Fatrop"] = row["solves / s / core"] / rate
    return rows
