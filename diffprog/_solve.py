"""A solve in one call, one direction, and a solve that is stepped by hand."""

import dataclasses
import functools as ft
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._capture import Same
from ._chain import AbstractChain
from ._direction import AbstractDirection
from ._door import door, undifferentiated
from ._fast_loops import compiled, Loops
from ._loop import Loop, Solver
from ._lqr import Policy
from ._network_problem import ADVICE as NETWORK_ADVICE, NetworkProblem
from ._report import HISTORY
from ._result import explain, RESULTS, throw_unless_successful
from ._rollout import run, vectorize, Vectorized
from ._search import AbstractSearch, Backtracking
from ._search.base import SearchState
from ._solution import ADVICE, explain_solution, Solution
from ._tree import all_finite, strong
from ._types import check_one_number, with_advice


def tolerance(value: Any, dtype) -> Any:
    """The tolerance given, or else an accuracy that the dtype can deliver."""
    if value is None:
        return 1e-9 if dtype == jnp.float64 else 1e-6
    return _float(value)


def _solver(chain, method, search, rtol, atol, max_steps, verbose) -> Solver:
    dtype = chain.dtype
    cast = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf
    return Solver(
        chain=chain,
        method=method,
        search=jtu.tree_map(cast, search),
        rtol=cast(rtol),
        atol=cast(atol),
        max_steps=max_steps,
        verbose=verbose,
    )


def _solution(vectorized: Vectorized, loop: Loop, max_steps: int) -> Solution:
    trajectory, history = loop.trajectory, {}
    if loop.history.shape[0]:
        history = {name: loop.history[:, i] for i, name in enumerate(HISTORY)}
    policies = tuple(
        Policy(
            K=gains[:, :, 1:],
            k=gains[:, :, 0],
            xs=trajectory.xs[i],
            us=trajectory.us[i],
            _x=vectorized.x_layouts[i],
            _u=vectorized.u_layouts[i],
            _start=vectorized.chain.segments[i].start,
        )
        for i, gains in enumerate(loop.gains)
    )
    ok = loop.result == RESULTS.successful
    T = vectorized.chain.horizon
    stats = dict(
        num_steps=loop.num_steps,
        num_rollouts=loop.num_rollouts,
        num_backwards=loop.num_backwards,
        max_steps=max_steps,
        gradient=loop.gradient,
        decrement=loop.decrement,
        minimum=loop.minimum,
        first_nonfinite=jnp.where(ok, T + 1, loop.first_nonfinite),
        nonfinite_step=jnp.where(ok, max_steps + 1, loop.nonfinite_step),
    )
    return Solution(
        vectorized.states(trajectory),
        vectorized.controls(trajectory.us),
        trajectory.cost,
        vectorized.problem.join_controls(policies),
        loop.result,
        stats,
        history,
        loop.search,
    )


@door
def _solve(problem, method, x0, us, search, state, rtol, atol, options) -> Solution:
    max_steps, history, verbose, fast_loops = options
    vectorized = vectorize(problem, x0, us)

    def run(loops: Loops) -> Loop:
        chain = dataclasses.replace(vectorized.chain, loops=loops)
        solver = _solver(chain, method, search, rtol, atol, max_steps, verbose.value)
        return solver.run(solver.init(*vectorized.ravel(x0, us), state, history))

    loop = compiled(run, fast_loops)
    return _undifferentiated(_solution(vectorized, loop, max_steps))


def _undifferentiated(tree: PyTree) -> PyTree:
    numbers, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(undifferentiated(numbers), rest)


def _check(
    problem: Any,
    method: Any,
    search: Any = Backtracking(),
    state: Any = None,
    max_steps: Any = 0,
    **numbers: Any,
):
    for name, value, kind, example in (
        ("problem", problem, AbstractChain, "`dp.ControlProblem(...)`"),
        ("method", method, AbstractDirection, "`dp.ILQR()`"),
        ("search", search, AbstractSearch, "`dp.Backtracking()`"),
        ("state", state, SearchState | None, "`solution.state`"),
    ):
        if not isinstance(value, kind):
            came = f"the class {value.__name__}" if isinstance(value, type) else value
            raise TypeError(
                f"`{name}` is {came!s:.200}; something like {example} is expected."
            )
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"`max_steps` is {max_steps!r}; a Python int is expected.")
    if max_steps < 0:
        raise ValueError(f"`max_steps` is {max_steps}; 0 or more is expected.")
    if any(jnp.ndim(leaf) for leaf in jtu.tree_leaves(state)):
        raise ValueError(
            "`state` holds a batch; give the state of one solve, or `jax.vmap` over it."
        )
    for name, value in numbers.items():
        if value is not None:
            check_one_number(name, value, "one number >= 0")
        if isinstance(value, float | int) and not value >= 0:
            raise ValueError(f"`{name}` is {value}; a number >= 0 is expected.")


def _float(value):
    return float(value) if isinstance(value, int) else value


_INSTEAD = dict(
    check="`dp.rollout(problem, x0, us, check=True)` looks for indices beyond the end "
    "of an array",
    in_axes="`dp.solve_batch` solves many problems",
    batch_size="`dp.solve_batch` solves many problems",
)


@with_advice(lambda name, _, known: _INSTEAD.get(name, known))
def solve(
    problem: AbstractChain,
    method: AbstractDirection,
    x0: PyTree,
    us: PyTree,
    search: AbstractSearch = Backtracking(),
    *,
    max_steps: int = 256,
    rtol: Any = None,
    atol: Any = None,
    throw: bool = True,
    state: SearchState | None = None,
    history: bool = True,
    verbose: bool | Callable = False,
    fast_loops: bool | None = None,
) -> Solution:
    r"""Minimizes the cost of a chain over its controls.

    $$u \leftarrow u + v(s, \nu), \quad \text{until} \quad
    \text{predicted decrease} \le \text{atol} + \text{rtol} \, |J(u)|,$$

    where the direction v of `method` has step size s and damping $\nu$ from `search`.
    Without damping the predicted decrease is minus half the slope of the cost along v.

    **Arguments:**

    - `problem`: a [`diffprog.ControlProblem`][] or [`diffprog.Chain`][].
    - `method`: the direction, such as [`diffprog.ILQR`][].
    - `x0`: the first state, shape `(n,)` or any pytree of floating arrays.
    - `us`: the first guess of the controls, `(T, m)` or a pytree of arrays with T rows.
    - `search`: [`diffprog.Backtracking`][], [`diffprog.AdaptiveDamping`][] or
        [`diffprog.FixedStep`][].
    - `max_steps`: the most accepted iterations; a Python int.
    - `rtol`, `atol`: tolerances; 1e-9 in float64 and 1e-6 in float32 unless given.
    - `throw`: raise [`diffprog.SolveError`][] for an unsuccessful result when all
        inputs are concrete; under `jit` and `vmap` look at `solution.result`.
    - `state`: `solution.state` of an earlier solve: its step size and damping.
    - `history`: whether to record cost, step size and more of each iteration.
    - `verbose`: `True` prints a row for each iteration; a function receives it as named
        arrays.
    - `fast_loops`: `None` compiles all loops into one function on the CPU where that is
        known to work, which is several times faster for small systems; `False` never
        does, and `True` raises `ValueError` where it is not possible.

    **Returns:** a [`diffprog.Solution`][]: the best finite iterate, in the dtype of the
    inputs.

    **Fails:** `ValueError` or `TypeError` at once for a wrong call. Results other than
    `successful` are listed in [`diffprog.RESULTS`][].

    At a maximum or a saddle the gradient is 0 as well. Where the model of `method` has
    no minimum there (and at most 7 controls), a few steps along its negative curvature
    are tried, and the solve goes on from one that lowers the cost; else
    `solution.stats["minimum"]` is false.

    The functions of the problem are traced once; new numbers in the problem, method,
    search, x0 or us do not compile again. Derivatives of the solution are not
    available yet and raise.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """
    _check(problem, method, search, state, max_steps, rtol=rtol, atol=atol)
    if not isinstance(verbose, bool) and not callable(verbose):
        raise TypeError(
            f"`verbose` is {verbose!r}; True, False or a function of named arrays is "
            "expected."
        )
    options = (max_steps, bool(history), Same(verbose), fast_loops)
    (x0, us), dtype = strong(x0, us)
    tolerances = tolerance(rtol, dtype), tolerance(atol, dtype)
    state = SearchState.none(dtype) if state is None else state
    solution = _solve(problem, method, x0, us, search, state, *tolerances, options)
    return _judged(solution, problem, throw)


def _judged(solution: Solution, problem: AbstractChain, throw: bool) -> Solution:
    told = ft.partial(explain_solution, advice=_advice(problem))
    return throw_unless_successful(solution.result, solution, throw, told)


def _advice(problem: AbstractChain) -> Mapping[str, str]:
    """In the words of the problem."""
    return NETWORK_ADVICE if isinstance(problem, NetworkProblem) else ADVICE


@door
def _direction(problem, method, x0, us, damping):
    vectorized = vectorize(problem, x0, us)
    chain = vectorized.chain
    trajectory = run(chain, *vectorized.ravel(x0, us))
    expansion = method.expand(chain, trajectory)
    damping = jnp.asarray(damping, chain.dtype)
    sweep = method.backward(chain, trajectory, expansion.model, damping)
    one = jnp.ones((), chain.dtype)
    _, vs = method.forward(chain, trajectory, expansion.model, sweep, one)
    T = chain.horizon
    result = RESULTS.where(
        sweep.positive, RESULTS.successful, RESULTS.factorization_failed
    )
    result = RESULTS.where(
        expansion.first_nonfinite > T, result, RESULTS.nonfinite_derivative
    )
    finite = (trajectory.first_nonfinite > T) & (all_finite(vs) | ~sweep.positive)
    result = RESULTS.where(finite, result, RESULTS.nonfinite_rollout)
    ok = result == RESULTS.successful
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
    _check(problem, method, damping=damping)
    (x0, us), _ = strong(x0, us)
    du, result = _direction(problem, method, x0, us, _float(damping))
    told = lambda _: explain(result, _advice(problem))
    return throw_unless_successful(result, (du, result), throw, told)


class SolverState(eqx.Module):
    """A solve that is stepped by hand.

    - `x0`: the first state.
    - `xs`, `us`: the iterate.
    - `method`, `search`, `rtol`, `atol`, `max_steps`: as given to [`diffprog.init`][].

    Properties: `cost` of the iterate, `num_steps` accepted so far, `done` and `result`.
    """

    x0: PyTree[Array]
    xs: PyTree[Array]
    us: PyTree[Array]
    method: AbstractDirection
    search: AbstractSearch
    rtol: Any
    atol: Any
    max_steps: int = eqx.field(static=True)
    _loop: Loop

    @property
    def cost(self) -> Float[Array, ""]:
        return self._loop.trajectory.cost

    @property
    def num_steps(self) -> Int[Array, ""]:
        return self._loop.num_steps

    @property
    def done(self) -> Bool[Array, ""]:
        return self._loop.done

    @property
    def result(self) -> RESULTS:
        return self._loop.result


@door
def _init(problem, method, x0, us, search, state, rtol, atol, options) -> SolverState:
    max_steps, history = options
    vectorized = vectorize(problem, x0, us)
    solver = _solver(vectorized.chain, method, search, rtol, atol, max_steps, False)
    loop = solver.init(*vectorized.ravel(x0, us), state, history)
    xs = vectorized.states(loop.trajectory)
    return SolverState(
        x0, xs, us, method, search, solver.rtol, solver.atol, max_steps, loop
    )


def _advance(problem, state: SolverState, last: bool):
    vectorized = vectorize(problem, state.x0, state.us)
    options = (state.rtol, state.atol, state.max_steps, False)
    solver = _solver(vectorized.chain, state.method, state.search, *options)
    stop = last | (state.num_steps >= state.max_steps)
    loop = lax.cond(
        state.done, lambda loop: loop, lambda loop: solver.step(loop, stop), state._loop
    )
    return vectorized, loop


@door
def _step(problem, state: SolverState) -> SolverState:
    vectorized, loop = _advance(problem, state, False)
    xs, us = vectorized.states(loop.trajectory), vectorized.controls(loop.trajectory.us)
    where = lambda s: (s.xs, s.us, s._loop)
    return eqx.tree_at(where, state, (xs, us, loop))


@door
def _finish(problem, state: SolverState) -> Solution:
    vectorized, loop = _advance(problem, state, True)
    return _undifferentiated(_solution(vectorized, loop, state.max_steps))


def init(
    problem: AbstractChain,
    method: AbstractDirection,
    x0: PyTree,
    us: PyTree,
    search: AbstractSearch = Backtracking(),
    *,
    max_steps: int = 256,
    rtol: Any = None,
    atol: Any = None,
    state: SearchState | None = None,
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
    _check(problem, method, search, state, max_steps, rtol=rtol, atol=atol)
    options = (max_steps, bool(history))
    (x0, us), dtype = strong(x0, us)
    tolerances = tolerance(rtol, dtype), tolerance(atol, dtype)
    state = SearchState.none(dtype) if state is None else state
    return _init(problem, method, x0, us, search, state, *tolerances, options)


def step(problem: AbstractChain, state: SolverState) -> SolverState:
    """One accepted iteration; nothing once `state.done`.

    The call after the last accepted iteration finds out that the solve is over and
    computes the policy. The problem must be the one given to [`diffprog.init`][].
    """
    return _step(problem, state)


def finish(
    problem: AbstractChain, state: SolverState, *, throw: bool = True
) -> Solution:
    """The solution at the current iterate, with its policy.

    Before `state.done` the result is `max_steps_reached`, unless the iterate turns out
    to be stationary: give `throw=False` to stop early.
    """
    return _judged(_finish(problem, state), problem, throw)
