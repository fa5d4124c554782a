"""A solve that is stepped by hand, and one direction."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._chain.problem import AbstractChain
from .._chain.vector import objective, run
from .._chain.vectorize import vectorize, Vectorized
from .._common.door import door, undifferentiated
from .._common.result import explain, RESULTS, throw_unless_successful
from .._common.tree import all_finite, strong
from .._common.types import to_float, with_other_names
from .defaults import OTHER_NAMES
from .direction import AbstractDirection
from .direction.base import check_expansion, check_sweep
from .outer import AbstractOuter
from .records import Loop
from .search import AbstractSearch, Backtracking
from .solution import Solution, WarmStart
from .solve import (
    advice_of,
    arguments,
    begun,
    check,
    duals_of,
    found_of,
    judged,
    solution_of,
    solver_of,
)


BY_HAND = (
    "A solve that is stepped by hand has no derivatives; that of `dp.solve` has: "
    "`dp.solve(problem, method, x0, us)`. Or wrap the arguments in "
    "`jax.lax.stop_gradient`."
)


class SolverState(eqx.Module):
    """A solve that is stepped by hand.

    - `x0`: the first state.
    - `xs`, `us`, `cost`: the iterate.
    - `method`, `search`, `outer`, `rtol`, `atol`, `max_steps`: as given to
        [`diffprog.init`][].

    Properties: `num_steps` accepted so far, `done` and `result`.
    """

    x0: PyTree[Array]
    xs: PyTree[Array]
    us: PyTree[Array]
    cost: Float[Array, ""]
    method: AbstractDirection
    search: AbstractSearch
    outer: AbstractOuter
    rtol: Any
    atol: Any
    max_steps: int = eqx.field(static=True)
    _loop: Loop

    @property
    def num_steps(self) -> Int[Array, ""]:
        return self._loop.counts.steps

    @property
    def done(self) -> Bool[Array, ""]:
        return self._loop.done

    @property
    def result(self) -> RESULTS:
        return self._loop.result


def _iterate(vectorized: Vectorized, loop: Loop) -> tuple[PyTree, PyTree, Any]:
    """States, controls and cost."""
    now, chain = loop.trajectory, vectorized.chain
    cost = objective(chain, now) if chain.names else now.cost
    return vectorized.states(now.xs, now.final), vectorized.controls(now.us), cost


@door
def _first_state(
    problem, method, x0, us, xs, search, state, rtol, atol, outer, options
) -> SolverState:
    max_steps, history = options
    vectorized = vectorize(problem, x0, us)
    rest = rtol, atol, max_steps, False, outer
    solver = solver_of(vectorized.chain, method, search, *rest)
    loop = begun(vectorized, solver, x0, us, xs, state, history)
    xs, us, cost = _iterate(vectorized, loop)
    return SolverState(
        x0,
        xs,
        us,
        cost,
        method,
        search,
        outer,
        solver.rtol,
        solver.atol,
        max_steps,
        loop,
    )


def _stepped(problem, state: SolverState, last: bool):
    vectorized = vectorize(problem, state.x0, state.us)
    options = (state.rtol, state.atol, state.max_steps, False, state.outer)
    solver = solver_of(vectorized.chain, state.method, state.search, *options)
    stop = last | (state.num_steps >= state.max_steps)
    stay, go = lambda loop: loop, lambda loop: solver.step(loop, stop)
    loop = lax.cond(state.done, stay, go, state._loop)
    return vectorized, loop


@door
def _next_state(problem, state: SolverState) -> SolverState:
    vectorized, loop = _stepped(problem, state, False)
    where = lambda s: (s.xs, s.us, s.cost, s._loop)
    return eqx.tree_at(where, state, (*_iterate(vectorized, loop), loop))


@door
def _finished(problem, state: SolverState) -> Solution:
    vectorized, loop = _stepped(problem, state, True)
    duals = duals_of(vectorized.chain, loop)
    options = found_of(loop, duals), state.outer, state.max_steps
    return undifferentiated(solution_of(vectorized, loop, *options), BY_HAND)


@with_other_names(OTHER_NAMES)
def init(
    problem: AbstractChain,
    method: AbstractDirection,
    x0: PyTree,
    us: PyTree,
    search: AbstractSearch = Backtracking(),
    *,
    xs: PyTree = None,
    outer: AbstractOuter | None = None,
    max_steps: int = 256,
    rtol: Any = None,
    atol: Any = None,
    state: WarmStart | None = None,
    history: bool = True,
) -> SolverState:
    """Starts a solve that is stepped by hand; arguments as in [`diffprog.solve`][].

    ```python
    state = dp.init(problem, dp.ILQR(), x0, us)
    while not state.done:
        state = dp.step(problem, state)
    solution = dp.finish(problem, state)
    ```
    """
    options = max_steps, bool(history)
    tolerances = rtol, atol, outer
    given = problem, method, x0, us, xs, search, state, *tolerances, *options
    return _first_state(*arguments(*given))


def step(problem: AbstractChain, state: SolverState) -> SolverState:
    """One accepted iteration; nothing once `state.done`.

    The call after the last accepted iteration finds out that the solve is over and
    computes the policy. The problem must be the one given to [`diffprog.init`][].
    """
    return _next_state(problem, state)


def finish(
    problem: AbstractChain, state: SolverState, *, throw: bool = True
) -> Solution:
    """The solution at the current iterate, with its policy.

    Before `state.done` the result is `max_steps_reached`, unless the iterate turns out
    to be stationary: give `throw=False` to stop early. The problem is that of the
    steps: of one that was changed since, the solution is not.
    """
    return judged(_finished(problem, state), problem, throw)


@door
def _direction(problem, method, x0, us, damping):
    vectorized = vectorize(problem, x0, us)
    chain = vectorized.chain
    if chain.names:
        raise ValueError(
            "`dp.direction` takes no constraints, whose multipliers only a solve "
            "finds: `dp.solve(..., max_steps=1)` takes one step."
        )
    first, given = vectorized.ravel(x0, us)
    trajectory = run(chain, first, chain.within(given))
    local, at = chain.around(trajectory)
    expansion = method.expand(local, at)
    check_expansion(method, expansion)
    damping = jnp.asarray(damping, chain.dtype)
    sweep = method.backward(local, at, expansion.model, damping)
    check_sweep(method, at, sweep)
    one = jnp.ones((), chain.dtype)
    _, vs = method.forward(chain, trajectory, expansion.model, sweep, one)
    T = chain.horizon
    failed, known = RESULTS.factorization_failed, expansion.first_nonfinite > T
    result = RESULTS.where(sweep.positive, RESULTS.successful, failed)
    result = RESULTS.where(known, result, RESULTS.nonfinite_derivative)
    finite = (trajectory.first_nonfinite > T) & (all_finite(vs) | ~sweep.positive)
    result = RESULTS.where(finite, result, RESULTS.nonfinite_rollout)
    ok = result == RESULTS.successful
    if chain.limits:  # from what was given, which may lie outside
        change = zip(vs, trajectory.us, given, strict=True)
        vs = tuple(v + (inside - u) for v, inside, u in change)
    vs = tuple(jnp.where(ok, v, jnp.nan) for v in vs)
    return vectorized.controls(vs), result


def direction(
    problem: AbstractChain,
    method: AbstractDirection,
    x0: PyTree,
    us: PyTree,
    *,
    damping: float | Float[Array, ""] = 0.0,
    throw: bool = True,
) -> tuple[PyTree, RESULTS]:
    r"""The change of the controls that `method` proposes at step size 1.

    **Arguments:**

    - `problem`, `method`, `x0`, `us`: as in [`diffprog.solve`][].
    - `damping`: the weight of $\frac\nu2 \|v\|^2$ in the model.
    - `throw`: raise [`diffprog.SolveError`][] for an unsuccessful result when all
        inputs are concrete.

    **Returns:** `(du, result)`; `du` is like `us`, and for [`diffprog.ILQR`][] and
    [`diffprog.DDP`][] it includes the feedback along the true roll-out. It is NaN where
    `result` is not `successful`.
    """
    check(problem, method, damping=damping)
    (x0, us), _ = strong(x0, us)
    du, result = _direction(problem, method, x0, us, to_float(damping))
    told = lambda _: explain(result, advice_of(problem))
    return throw_unless_successful(result, (du, result), throw, told)
