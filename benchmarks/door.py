"""What a call through the public door costs more than one inside the user's jit."""

import jax

import diffprog as dp

from . import ours
from .problems import PROBLEMS, UNSEEN
from .timing import alternate


TITLE = "The public door"
COLUMNS = {
    "problem": "{}",
    "door us": "{:.0f}",
    "jit us": "{:.0f}",
    "difference us": "{:.0f}",
}
NOTES = (
    "One iteration of `dp.ILQR`, called as `dp.solve` and as a compiled function that "
    "calls it.",
)


def one(problem) -> dict:
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
    times = {name: 1e6 * value for name, value in alternate(calls).items()}
    difference = times["door us"] - times["jit us"]
    return dict(problem=problem.name, **times) | {"difference us": difference}


def run() -> list[dict]:
    return [one(problem) for problem in PROBLEMS + UNSEEN]
