"""What a call through the public door costs more than one inside the user's jit."""

import dataclasses

import jax
import numpy

import diffprog as dp

from . import ours
from .problems import PROBLEMS
from .timing import samples


TITLE = "The public door"
COLUMNS = {
    "problem": "{}",
    "door us": "{:.0f}",
    "jit us": "{:.0f}",
    "difference us": "{:.0f}",
}
NOTES = (
    "One iteration of `dp.ILQR` over 20 stages, called as `dp.solve` and as a compiled "
    "function that calls it; the difference is the median over the rounds.",
)


def one(problem) -> dict:
    problem = dataclasses.replace(problem, horizon=20)
    options = dict(max_steps=1, rtol=0.0, atol=0.0, throw=False)
    chain, arguments = ours.chain(problem), ours.start(problem)
    solve = lambda x0, us: dp.solve(chain, dp.ILQR(), x0, us, **options)
    compiled = jax.jit(solve)
    calls = {
        "door us": lambda: jax.block_until_ready(solve(*arguments)),
        "jit us": lambda: jax.block_until_ready(compiled(*arguments)),
    }
    for call in calls.values():
        call()
    door, jit = (1e6 * numpy.array(times) for times in samples(calls).values())
    return {
        "problem": problem.name,
        "door us": float(numpy.median(door)),
        "jit us": float(numpy.median(jit)),
        "difference us": float(numpy.median(door - jit)),
    }


def run() -> list[dict]:
    """The fewest numbers, and the most."""
    return [one(problem) for problem in (PROBLEMS[0], PROBLEMS[-1])]
