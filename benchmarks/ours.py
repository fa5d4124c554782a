"""What is measured: `dp.solve` inside the user's own `jax.jit`."""

import functools

import jax
import jax.numpy as jnp

import diffprog as dp


# The stopping rule of Crocoddyl: the model promises less than this.
STOP = dict(rtol=0.0, atol=1e-7, max_steps=500)
DDP = dp.DDP()
METHODS = (dp.ILQR(), DDP)
# The library makes loops fast where it can; plain ones are what it falls back on.
LOOPS = {"": {}, ", plain loops": {"fast_loops": False}}


def chain(problem) -> dp.ControlProblem:
    row = lambda fn: fn and dp.Inequality(lambda x, *_: fn(jnp, x))
    goal = problem.goal and dp.Equality(lambda x: problem.goal(jnp, x))
    known = lambda *rows: tuple(row for row in rows if row)
    return dp.ControlProblem(
        lambda x, u, t: problem.dynamics(jnp, x, u),
        lambda x, u, t: problem.cost(jnp, x, u),
        lambda x: problem.terminal_cost(jnp, x),
        problem.horizon,
        control_bounds=problem.bounds if problem.limits else None,
        constraints=known(row(problem.rows)),
        terminal_constraints=known(goal, row(problem.last_rows)),
    )


def start(problem) -> tuple[jax.Array, jax.Array]:
    return jnp.array(problem.x0), jnp.array(problem.us)


def solver(problem, method, **options):
    """`solve(x0, us, xs)`, for a `jax.jit` around it; `xs` may be left out."""
    ours, options = chain(problem), STOP | options | dict(throw=False)
    return lambda x0, us, xs=None: dp.solve(ours, method, x0, us, xs=xs, **options)


def batch_solver(problem, method, **options):
    """`solve(x0s, uss)` for many starts."""
    ours, options = chain(problem), STOP | options
    return lambda x0s, uss: dp.solve_batch(ours, method, x0s, uss, **options)


class Solver:
    """One problem, one method, compiled; `xs` is a first guess of the states."""

    def __init__(self, problem, method, xs=None, **options):
        self.arguments = (*start(problem), xs)
        self.solve = jax.jit(solver(problem, method, **options))
        self()

    def __call__(self):
        self.solution = jax.block_until_ready(self.solve(*self.arguments))

    def begin(self, us, xs=None):
        """The first guesses of the next calls."""
        self.arguments = (self.arguments[0], jnp.asarray(us), xs)

    @property
    def cost(self) -> float:
        return float(self.solution.cost)

    @property
    def us(self) -> jax.Array:
        return self.solution.us

    @property
    def steps(self) -> int:
        return int(self.solution.stats["num_steps"])

    @property
    def steps_with_gaps(self) -> int:
        return int((self.solution.history.get("gap", jnp.zeros(0)) > 0).sum())

    @property
    def converged(self) -> bool:
        return bool(self.solution.result == dp.RESULTS.successful)


@functools.cache
def solver_of(problem, method, **options) -> Solver:
    """Compiled once, for all sections that measure this solve."""
    return Solver(problem, method, **options)
