"""Where the time of an iteration goes: every part of it by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

import diffprog as dp
from diffprog._common.fast_loops import compiled
from diffprog.extend import linear_quadratic, run as roll_out, Stored, vectorize

from . import ours
from .large_problems import arm, CHAINS
from .peers import load
from .problems import PROBLEMS
from .timing import alternate


TITLE = "Parts of an iteration"
COLUMNS = {
    "problem": "{}",
    "solver": "{}",
    "derivatives us": "{:.0f}",
    "sweep us": "{:.0f}",
    "backward us": "{:.0f}",
    "roll-out us": "{:.0f}",
    "trials": "{:.1f}",
    "iteration us": "{:.0f}",
}
NOTES = (
    "Microseconds for all stages, at the solution. `derivatives` are those of the "
    "dynamics and of the costs, stored; `sweep` is the recursion on what is stored; "
    "`backward` is both as in a solve, where fast loops find the derivatives inside "
    "the sweep, for `dp.DDP` with second derivatives of the dynamics. `roll-out` is "
    "that of one trial with its cost, of which an iteration has `trials`. `iteration` "
    "is the time of a solve divided by its iterations. Each part is compiled by "
    "itself, and its loops may be fast where those of the whole solve are not.",
    "Of Crocoddyl: `calcDiff` of the problem, the backward pass, and a forward pass.",
)


REPEATS = 20  # in one call, whose own price is that of a small solve


def part(fn, first, *rest):
    """What `fn(loops, first, *rest)` finds with the loops of a solve, and calls of it.

    Every repeat reads `first`, which is small, once more through what was found.
    """

    def repeated(loops, first, rest):
        def again(_, found):
            nothing = 0 * jtu.tree_leaves(found)[0].ravel()[0]
            return fn(loops, jtu.tree_map(lambda a: a + nothing, first), *rest)

        shapes = jax.eval_shape(lambda: fn(loops, first, *rest))
        zeros = jtu.tree_map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return lax.fori_loop(0, REPEATS, again, zeros)

    call = jax.jit(lambda *given: compiled(lambda loops: repeated(loops, *given), None))
    found = call(first, rest)
    return found, lambda: jax.block_until_ready(call(first, rest))


def of_method(problem, method, us) -> dict:
    """The parts of an iteration at the controls, in order."""
    x0, _ = ours.start(problem)
    vectorized = vectorize(ours.chain(problem), x0, us)
    zero, one = jnp.zeros(()), jnp.ones(())
    within = lambda loops: dataclasses.replace(vectorized.chain, loops=loops)
    at = jax.jit(lambda: roll_out(vectorized.chain, *vectorized.ravel(x0, us)))()
    # What only states are read for must not be found once for all repeats.
    near = lambda first, at: dataclasses.replace(at, xs=first[0], us=first[1])

    def derivatives(loops, first, at):
        found = linear_quadratic(within(loops), near(first, at), stored=True).model
        return found.V, found.F, found.W

    def sweep(loops, V, at, F, W):
        model = Stored(V, F, W, symmetric=W)
        return method.backward(within(loops), at, model, zero)

    def backward(loops, first, at):
        chain, at = within(loops), near(first, at)
        return method.backward(chain, at, method.expand(chain, at).model, zero)

    def trial(loops, first, at, found):
        return method.forward(within(loops), near(first, at), None, found, one)

    found, both = part(backward, (at.xs, at.us), at)
    if isinstance(method, dp.DDP):
        return {"backward us": both}
    (V, F, W), first = part(derivatives, (at.xs, at.us), at)
    return {
        "derivatives us": first,
        "sweep us": part(sweep, V, at, F, W)[1],
        "backward us": both,
        "roll-out us": part(trial, (at.xs, at.us), at, found)[1],
    }


def of_ours(problem, method) -> dict:
    solver = ours.solver_of(problem, method)
    calls = of_method(problem, method, solver.us)
    stats = solver.solution.stats
    trials = (int(stats["num_rollouts"]) - 1) / max(solver.steps, 1)
    row = {"solver": f"diffprog {type(method).__name__}", "trials": trials}
    times = timed(calls | {"iteration us": solver}, solver.steps)
    return row | times | {name: times[name] / REPEATS for name in calls}


def of_crocoddyl(crocoddyl, problem) -> dict:
    solver = crocoddyl.Solver(problem)
    parts = {
        f"{name.replace('_', '-')} us": call for name, call in solver.parts.items()
    }
    calls = parts | {"iteration us": solver}
    return {"solver": crocoddyl.name()} | timed(calls, solver.steps)


def timed(calls: dict, steps: int) -> dict[str, float]:
    times = {name: 1e6 * seconds for name, seconds in alternate(calls).items()}
    return times | {"iteration us": times["iteration us"] / max(steps, 1)}


def one(problem) -> list[dict]:
    # With `dp.DDP` the loops of the arm are not fast, and take long to compile.
    methods = ours.METHODS[:1] if problem.name == "arm" else ours.METHODS
    rows = [of_ours(problem, method) for method in methods]
    crocoddyl = load("crocoddyl")
    if crocoddyl and crocoddyl.COMPILER:
        rows.append(of_crocoddyl(crocoddyl, problem))
    return [{"problem": problem.name} | row for row in rows]


def run() -> list[dict]:
    (quadrotor,) = (p for p in PROBLEMS if p.name == "quadrotor")
    return [row for p in (quadrotor, CHAINS[0], arm()) for row in one(p)]
