"""A solve in one call."""

import dataclasses
import functools as ft
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._chain.limits import projected
from .._chain.manifold import check_state
from .._chain.network_problem import ADVICE as NETWORK_ADVICE, NetworkProblem
from .._chain.problem import AbstractChain
from .._chain.vector import preceding, VectorChain
from .._chain.vectorize import vectorize, Vectorized
from .._common.changes import Same
from .._common.door import door
from .._common.fast_loops import compiled, Loops
from .._common.result import RESULTS, throw_unless_successful
from .._common.tree import strong
from .._common.types import check_kind, check_one_number, with_other_names
from .adjoint import AbstractAdjoint, Found, ImplicitAdjoint, Solved, still
from .defaults import no_state, OTHER_NAMES, OUTER, tolerance
from .direction import AbstractDirection
from .loop import Solver
from .lqr import Policy
from .lqr.base import largest
from .lqr.expand import adjoints
from .outer import AbstractOuter
from .records import Constrained, Loop
from .report import columns
from .search import AbstractSearch, Backtracking
from .solution import (
    ADVICE,
    explain_solution,
    Multipliers,
    on_manifold,
    Solution,
    WarmStart,
)


def solver_of(
    chain, method, search, rtol, atol, max_steps, verbose, outer=None
) -> Solver:
    dtype = chain.dtype
    cast = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf
    search, tolerances = jtu.tree_map(cast, search), (cast(rtol), cast(atol))
    if not chain.names:
        outer = None
    return Solver(chain, method, search, *tolerances, max_steps, verbose, outer)


def duals_of(chain: VectorChain, loop: Loop) -> Any:
    """Costates and gradients, of which the multipliers of limits are made."""
    if loop.constrained is not None:
        chain = chain.priced(loop.constrained.state.duals)
    elif not chain.limits:
        return None
    return adjoints(*chain.around(loop.trajectory))


def found_of(loop: Loop, duals: Any) -> Found:
    """What has derivatives."""
    now, at = loop.trajectory, loop.constrained
    known = now.xs, now.final, now.us, now.cost if at is None else at.found.cost
    found = Found(*known, duals=at and at.found.duals)
    if not duals:
        return found
    first, lams, gradients = duals
    return dataclasses.replace(found, costates=(first, lams), gradients=gradients)


def answer_of(vectorized: Vectorized, found: Found) -> dict[str, Any]:
    """What has derivatives, arranged like the problem."""
    return dict(
        xs=vectorized.states(found.xs, found.final),
        us=vectorized.controls(found.us),
        cost=found.cost,
        multipliers=found.gradients and _multipliers(vectorized, found),
    )


def _multipliers(vectorized: Vectorized, found: Any) -> Multipliers:
    chain, us, gradients = vectorized.chain, found.us, found.gradients
    first, lams = found.costates
    infinite = tuple(jnp.full_like(u, jnp.inf) for u in us)
    limits = chain.limits or (tuple(-side for side in infinite), infinite)
    sides = zip(gradients, us, *limits, strict=True)
    stages, terminal = tuple({} for _ in us), {}
    if found.duals is not None:
        stages, terminal = found.duals.named(chain.names)
    lower, upper = [], []
    for gradient, u, low, high in sides:
        lower.append(jnp.where(u <= low, jnp.maximum(gradient, 0), 0))
        upper.append(jnp.where(u >= high, jnp.maximum(-gradient, 0), 0))
    return Multipliers(
        constraints=vectorized.problem.join_controls(stages),
        terminal=terminal,
        lower=vectorized.controls(tuple(lower)),
        upper=vectorized.controls(tuple(upper)),
        costates=vectorized.differences(preceding(first, lams), lams[-1][-1]),
        _names=chain.names,
    )


def solution_of(
    vectorized: Vectorized,
    loop: Loop,
    found: Found,
    outer: AbstractOuter,
    max_steps: int,
) -> Solution:
    trajectory, history = loop.trajectory, {}
    if loop.history.shape[0]:
        names = columns(loop.constrained, trajectory.gaps)
        history = {name: loop.history[:, i] for i, name in enumerate(names)}
    policies = tuple(
        Policy(
            K=gains[:, :, 1:],
            k=gains[:, :, 0],
            xs=trajectory.xs[i],
            us=trajectory.us[i],
            _x=vectorized.x_layouts[i],
            _u=vectorized.u_layouts[i],
            _start=vectorized.chain.segments[i].start,
            _limits=tuple(side[i] for side in vectorized.chain.limits),
        )
        for i, gains in enumerate(loop.known.gains)
    )
    ok, T = loop.result == RESULTS.successful, vectorized.chain.horizon
    stats = dict(
        num_steps=loop.counts.steps,
        num_rollouts=loop.counts.rollouts,
        num_backwards=loop.counts.backwards,
        max_steps=max_steps,
        gradient=loop.known.gradient,
        decrement=loop.known.decrement,
        minimum=loop.known.minimum,
        first_nonfinite=jnp.where(ok, T + 1, loop.trouble.stage),
        nonfinite_step=jnp.where(ok, max_steps + 1, loop.trouble.step),
    )
    if trajectory.gaps is not None:
        stats["gap"] = trajectory.gaps.largest
    if found.gradients:
        left = map(projected, found.gradients, found.us, *vectorized.chain.limits)
        stats["stationarity"] = largest(tuple(left))
    if loop.constrained is not None:
        stats |= _constraint_stats(vectorized, loop.constrained)
    answer = answer_of(vectorized, found)
    return Solution(
        **answer,
        policy=vectorized.problem.join_controls(policies),
        result=loop.result,
        stats=stats,
        history=history,
        state=_warm_start(vectorized, loop, outer, answer["multipliers"]),
    )


def _warm_start(vectorized: Vectorized, loop: Loop, outer: AbstractOuter, multipliers):
    at = loop.constrained
    if at is None:
        return WarmStart(loop.search)
    duals = outer.left(at.state, at.found, loop.result == RESULTS.successful)
    stages, terminal = duals.named(vectorized.chain.names)
    rows = dict(constraints=vectorized.problem.join_controls(stages), terminal=terminal)
    used = dataclasses.replace(multipliers, **rows)
    return WarmStart(loop.search, used, duals.penalty)


def begun(vectorized: Vectorized, solver: Solver, x0, us, xs, state, history) -> Loop:
    """The state before the first iteration."""
    duals = solver.outer and vectorized.duals(state.multipliers, state.penalty)
    states = None if xs is None else vectorized.ravel_states(x0, xs)
    first = *vectorized.ravel(x0, us), states
    return solver.init(*first, state.search, duals, history)


def _constraint_stats(vectorized: Vectorized, at: Constrained) -> dict[str, Any]:
    found, state, chain = at.found, at.state, vectorized.chain
    worst = jnp.argmax(found.violation)
    rows = *(segment.rows for segment in chain.segments), chain.end.rows
    signs = [
        jnp.max(jnp.where(np.array(own.equal), 0, -stack))
        for own, stack in zip(rows, found.duals.stacks, strict=True)
        if own is not None and stack is not None
    ]
    return dict(
        violation=jnp.max(found.violation),
        complementarity=jnp.max(found.complementarity),
        dual_sign=jnp.maximum(ft.reduce(jnp.maximum, signs), 0),
        num_outer=state.num_outer,
        num_attempts=state.attempt,
        penalty=jnp.max(state.duals.penalty),
        violated=(worst.astype(jnp.int32), found.stage[worst]),
    )


@door
def _solve(
    problem, method, x0, us, xs, search, state, rtol, atol, outer, options, adjoint
) -> Solution:
    max_steps, history, verbose, fast_loops = options
    whole = vectorize(problem, x0, us)
    chain, first = whole.chain, whole.x_layouts[0].ravel(x0)
    start, rules = (x0, us, xs, state), (method, search, rtol, atol, outer)
    vectorized, start, rules = given = still((whole, start, rules))
    (x0, us, *_), (method, *_, outer) = start, rules
    recorded = history or adjoint.replays

    def run(loops: Loops, vectorized, start, rules) -> tuple[Loop, Any]:
        chain = dataclasses.replace(vectorized.chain, loops=loops)
        x0, us, xs, state = start
        method, search, rtol, atol, outer = rules
        tolerances = rtol, atol, max_steps, verbose.value
        solver = solver_of(chain, method, search, *tolerances, outer)
        loop = solver.run(begun(vectorized, solver, x0, us, xs, state, recorded))
        return loop, duals_of(chain, loop)

    loop, duals = compiled(run, fast_loops, *given)
    found = found_of(loop, duals)
    solution = solution_of(vectorized, loop, found, outer, max_steps)
    rows = [solution.history[k] for k in ("stepsize", "damping") if adjoint.replays]
    if not history:
        solution = dataclasses.replace(solution, history={})
    guess = vectorized.ravel(x0, us)[1]
    solved = Solved(
        method, guess, rows, found, solution.success, with_states=xs is not None
    )
    answer = answer_of(vectorized, adjoint.connect(chain, first, solved))
    # Limits are no batch under `vmap`, where their tangents would be one.
    limits = [id(side) for side in jtu.tree_leaves(vectorized.chain.limits)]
    rest, own = eqx.partition(solution, lambda leaf: id(leaf) not in limits)
    rest = eqx.combine(adjoint.without(chain, first, rest), own)
    return dataclasses.replace(rest, **answer)


def check(
    problem: Any,
    method: Any,
    search: Any = Backtracking(),
    state: Any = None,
    max_steps: Any = 0,
    **numbers: Any,
):
    """Raises for a wrong call."""
    check_kind("problem", problem, AbstractChain, "dp.ControlProblem(...)")
    check_kind("method", method, AbstractDirection, "dp.ILQR()")
    check_kind("search", search, AbstractSearch, "dp.Backtracking()")
    if state is not None:
        check_kind("state", state, WarmStart, "solution.state")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"`max_steps` is {max_steps!r}; a Python int is expected.")
    if max_steps < 0:
        raise ValueError(f"`max_steps` is {max_steps}; 0 or more is expected.")
    if state and any(jnp.ndim(leaf) for leaf in jtu.tree_leaves(state.search)):
        raise ValueError(
            "`state` holds a batch; give the state of one solve, or `jax.vmap` over it."
        )
    for name, value in numbers.items():
        if value is not None:
            check_one_number(name, value, "one number >= 0")
        if isinstance(value, float | int) and not value >= 0:
            raise ValueError(f"`{name}` is {value}; a number >= 0 is expected.")


def arguments(
    problem, method, x0, us, xs, search, state, rtol, atol, outer, max_steps, *options
) -> tuple:
    """Those of a solve: checked, floating, with defaults; options are one of them."""
    check(problem, method, search, state, max_steps, rtol=rtol, atol=atol)
    outer = OUTER if outer is None else outer
    check_kind("outer", outer, AbstractOuter, "dp.AugmentedLagrangian()")
    (x0, us, xs), dtype = strong(x0, us, xs)
    if problem.manifold is not None:
        check_state(problem.manifold, x0)
    state = no_state(dtype) if state is None else state
    tolerances = tolerance(rtol, dtype), tolerance(atol, dtype)
    given = problem, method, x0, us, xs, search, state, *tolerances, outer
    return *given, (max_steps, *options)


_NOT_IN_SOLVE = OTHER_NAMES | dict(
    check="`dp.rollout(problem, x0, us, check=True)` looks for indices beyond the end "
    "of an array",
    in_axes="`dp.solve_batch` solves many problems",
    batch_size="`dp.solve_batch` solves many problems",
    mesh="`dp.solve_batch` solves many problems",
)


@with_other_names(_NOT_IN_SOLVE)
def solve(
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
    throw: bool = True,
    state: WarmStart | None = None,
    history: bool = True,
    verbose: bool | Callable = False,
    fast_loops: bool | None = None,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),
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
    - `xs`: a first guess of the states, arranged like `solution.xs`: T + 1 rows, of
        which the first counts as x0. They need not follow from `us`: the iterations
        close the gaps between f(x, u) and the next state, see
        [Starting from states](../starting-from-states.md). Unless given, the roll-out
        of `us`.
    - `outer`: what turns constraints into costs, [`diffprog.AugmentedLagrangian`][]
        unless given. Without constraints it does nothing.
    - `max_steps`: the most accepted iterations; a Python int.
    - `rtol`, `atol`: tolerances; 1e-9 in float64 and 1e-6 in float32 unless given.
    - `throw`: raise [`diffprog.SolveError`][] for an unsuccessful result when all
        inputs are concrete; under `jit` and `vmap` look at `solution.result`.
    - `state`: `solution.state` of an earlier solve: its step size and damping, and with
        constraints its multipliers and penalties.
    - `history`: whether to record cost, step size and more of each iteration.
    - `verbose`: `True` prints a row for each iteration; a function receives it as named
        arrays.
    - `fast_loops`: `None` compiles all loops into one function on the CPU where that is
        known to work, which is several times faster for small systems; `False` never
        does, and `True` raises `ValueError` where it is not possible.
    - `adjoint`: how derivatives of the solution are found:
        [`diffprog.ImplicitAdjoint`][], [`diffprog.UnrolledAdjoint`][] or
        [`diffprog.NoAdjoint`][]. Without differentiation it changes nothing.

    **Returns:** a [`diffprog.Solution`][]: the best finite iterate, in the dtype of the
    inputs.

    **Fails:** `ValueError` or `TypeError` at once for a wrong call. Results other than
    `successful` are listed in [`diffprog.RESULTS`][].

    At a maximum or a saddle the gradient is 0 as well. Where the model of `method` has
    no minimum there (and at most 7 controls), a few steps along its negative curvature
    are tried, and the solve goes on from one that lowers the cost; else
    `solution.stats["minimum"]` is false.

    The functions of the problem are traced once; new numbers in the problem, method,
    search, x0 or us do not compile again.

    States, controls, cost and multipliers may be differentiated with respect to x0 and
    all floats of the problem, those that its functions capture included, in forward and
    reverse mode. Derivatives in the guesses, the search and the tolerances are 0, those
    of the policy, the statistics and `state` are NaN.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """
    if not isinstance(verbose, bool) and not callable(verbose):
        raise TypeError(
            f"`verbose` is {verbose!r}; True, False or a function of named arrays is "
            "expected."
        )
    options = max_steps, bool(history), Same(verbose), fast_loops
    tolerances = rtol, atol, outer
    given = problem, method, x0, us, xs, search, state, *tolerances, *options
    check_kind("adjoint", adjoint, AbstractAdjoint, "dp.ImplicitAdjoint()")
    return judged(_solve(*arguments(*given), adjoint=adjoint), problem, throw)


def judged(solution: Solution, problem: AbstractChain, throw: bool) -> Solution:
    """Raises for what is known to have failed, in the words of the problem."""
    if problem.manifold is not None:
        solution = on_manifold(solution, problem.manifold)
    told = lambda failed: explain_solution(failed, advice_of(problem))
    return throw_unless_successful(solution.result, solution, throw, told)


def advice_of(problem: AbstractChain) -> Mapping[str, str]:
    """In the words of the problem."""
    return NETWORK_ADVICE if isinstance(problem, NetworkProblem) else ADVICE
