"""Receding horizon: a plan that is moved on and improved at every tick."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._chain.constraints import Duals
from .._chain.limits import middle
from .._chain.manifold import check_state as check_on_manifold
from .._chain.problem import ControlProblem
from .._chain.vector import run, through, VectorChain
from .._chain.vectorize import vectorize, Vectorized
from .._common.changes import Same
from .._common.door import door, undifferentiated
from .._common.fast_loops import compiled, Loops
from .._common.result import RESULTS
from .._common.tree import float_dtype, Layout, no, strong, where, yes
from .._common.types import check_count, check_kind, counted, shapes, with_other_names
from .defaults import no_state, OUTER
from .direction import AbstractDirection
from .outer import AbstractOuter
from .outer.base import measure
from .plan import check_state, later, MPCState
from .search import AbstractSearch, Backtracking
from .solution import Multipliers, WarmStart
from .solve import check
from .tick import awaiting, iterate, Outcome, resting


UNFINISHED = (
    "A tick of `dp.MPC` has no derivatives, since it does not solve its plan to the "
    "end; `dp.solve` has. Or wrap the arguments in `jax.lax.stop_gradient`."
)
_NOT_IN_MPC = dict(
    max_steps="`iterations` is the number of those of a tick",
    horizon="that of the problem is that of every plan",
    dt="a tick is a stage of the problem; `controller.shift` has other rates",
    rtol="a tick does not look whether it has converged",
    atol="a tick does not look whether it has converged",
    us="`controller.init(x0, us)` takes the first plan",
    t="the plan begins with t = 0 at now; what moves is a number of another "
    "`problem`, `controller(x, state, problem)`",
)


def _multipliers(vectorized: Vectorized, duals: Duals | None) -> dict[str, Any]:
    """Multipliers and penalties as a state has them."""
    if duals is None:
        return dict(multipliers=None, penalty=None)
    names = vectorized.chain.names
    (stages,), terminal = duals.named(names)
    found = Multipliers(stages, terminal, None, None, None, names)
    return dict(multipliers=found, penalty=duals.penalty)


def _check_rows(vectorized: Vectorized, state: MPCState):
    """Raises for the state of a controller with other constraints."""
    none = vectorized.chain.no_duals if vectorized.chain.names else None
    expected = shapes(_multipliers(vectorized, none)["multipliers"])
    given = shapes(state.multipliers)
    if given != expected:
        raise ValueError(
            f"`state` is that of other constraints: it has the multipliers {given}, "
            f"and the problem {expected}. Give a problem with the same ones, or begin "
            "anew with `controller.init(x0, us)`."
        )


def _duals(vectorized: Vectorized, state: MPCState | WarmStart) -> Duals | None:
    if not vectorized.chain.names:
        return None
    return vectorized.duals(state.multipliers, state.penalty)


@door
def _tick(controller: "MPC", problem: ControlProblem, x: PyTree, state: MPCState):
    _check_tick(problem, x, state)
    vectorized = vectorize(problem, x, state.us)
    _check_rows(vectorized, state)
    old = where(state._past, later(state, 1), state)
    x0, (us,) = vectorized.ravel(x, old.us)
    xs = jax.vmap(vectorized.x_layouts[0].ravel)(old.xs)
    duals = _duals(vectorized, old)

    iterations, outer = controller.iterations, controller.outer or OUTER
    rules = controller.method, controller.search, outer
    memory = old.search, duals, old._has_gaps

    def run(loops: Loops, chain: VectorChain, rules, x0, plan, memory) -> Outcome:
        chain = replace(chain, loops=loops)
        return iterate(chain, (*rules, iterations), x0, plan, memory)

    given = vectorized.chain, rules, x0, (xs, us, old.K), memory
    outcome = compiled(run, controller.fast_loops, *given)
    loop, now = outcome.loop, outcome.loop.trajectory
    (gains,) = loop.known.gains
    new = replace(
        old,
        xs=vectorized.states(now.xs, now.final),
        us=vectorized.controls(now.us),
        K=gains[:, :, 1:],
        cost=now.cost,
        violation=outcome.violation,
        search=loop.search,
        **_multipliers(vectorized, outcome.duals),
    )
    (kept,) = vectorized.chain.within((us,))
    kept = vectorized.controls((jnp.where(jnp.isfinite(kept), kept, us),))
    unknown = jnp.full_like(now.cost, jnp.nan)
    violation = None if outcome.violation is None else unknown
    old = replace(old, us=kept, cost=unknown, violation=violation)
    state, past = where(outcome.usable, new, old), yes(outcome.usable)
    limits = tuple(side for (side,) in vectorized.chain.limits)
    state = replace(state, result=outcome.result, _past=past, _limits=limits)
    u = jtu.tree_map(lambda rows: rows[0], state.us)
    return undifferentiated((u, state), UNFINISHED)


@door
def _first(controller: "MPC", x0: PyTree, us: PyTree, xs: PyTree, warm: WarmStart):
    problem = controller.problem
    vectorized = vectorize(problem, x0, us)
    chain, layouts = vectorized.chain, (vectorized.x_layouts[0], *vectorized.u_layouts)
    first, given = vectorized.ravel(x0, us)
    given = chain.within(given)
    if xs is None:
        trajectory = run(chain, first, given)
    else:
        states, final = vectorized.ravel_states(x0, xs)
        trajectory = through(chain, states, final, given)
    finite = trajectory.first_nonfinite > chain.horizon
    rows = vectorized.states(trajectory.xs, trajectory.final)
    # Where the roll-out is not finite there is no plan of states yet.
    rows = jtu.tree_map(lambda a, x: jnp.where(finite, a, x[None]), rows, x0)
    memory = controller.search.init(chain.dtype)
    search = where(jnp.isnan(warm.search.stepsize), memory, warm.search)
    duals, violation = _duals(vectorized, warm), None
    if duals is not None:
        duals = (controller.outer or OUTER).init(duals).duals
        violation = jnp.max(measure(awaiting(chain), trajectory, duals).violation)
    n, wrong = chain.segments[0].chart.size, RESULTS.nonfinite_rollout
    (us,) = given
    rest = resting(chain, us)
    return MPCState(
        xs=rows,
        us=vectorized.controls((jnp.where(jnp.isfinite(us), us, rest),)),
        K=jnp.zeros((*us.shape, n), chain.dtype),
        cost=trajectory.cost,
        **_multipliers(vectorized, duals),
        violation=violation,
        search=search,
        result=RESULTS.where(finite, RESULTS.max_steps_reached, wrong),
        _past=no(finite),
        _limits=tuple(side for (side,) in chain.limits),
        _x=layouts[0],
        _u=layouts[1],
        _has_gaps=xs is not None,
        _manifold=None,
    )


@door
def _shifted(state: MPCState, by: int) -> MPCState:
    return replace(later(state, by), _past=no(state._past))


def _check_tick(problem: ControlProblem, x: PyTree, state: MPCState):
    """Raises for what does not fit together."""
    dtype = float_dtype(x=x, state=(state.xs, state.us))
    layout, T = Layout.of(x, dtype), problem.horizon
    if layout != state._x:
        raise ValueError(
            f"`x` has the shapes {layout.describe():.200}; that of a state, "
            f"{state._x.describe():.200}, is expected, as in `controller.init`."
        )
    if len(state.K) != T:
        raise ValueError(
            f"`state` is that of a plan of {counted(len(state.K), 'stage')}, and the "
            f"problem has {T}: give a problem of the same horizon, or begin anew with "
            "`controller.init(x0, us)`."
        )


class MPC(eqx.Module):
    r"""A controller that improves its plan at every tick, and hands out its beginning.

    ```python
    controller = dp.MPC(problem, dp.ILQR())
    state = controller.init(x, us)
    while True:
        u, state = controller(x, state)
        x = plant(x, u)
    ```

    A tick begins with the plan of the one before, moved on by a stage (unless
    [`shift`][diffprog.MPC.shift] has moved it since), so that `state` always holds the
    plan from now on. The plan is followed from the measured x with its feedback, or
    without where that costs less. Then come `iterations` iterations as in
    [`diffprog.solve`][], each to an accepted step, no test whether they have converged,
    and no other pass for the policy: that is around the new trajectory with the gains
    of the last pass. With constraints multipliers and penalties are updated once at the
    end, where the outer method says so of the plan.

    Controls keep their limits exactly. A tick never raises: where x, a number of the
    problem or every roll-out is not finite, the control is that of the plan of before,
    moved on, within its limits.

    `state.result` is `max_steps_reached` after an ordinary tick; `successful` where
    there was nothing left to gain; `no_descent` or `damping_limit` where no step was
    found; `nonfinite_derivative`, `factorization_failed` or `cost_unbounded` as in a
    solve; `nonfinite_rollout` for the plan of before, whose `cost` is then NaN, or
    where no step was found and trials were not finite; and `infeasible` for limits that
    are crossed, or constraints that the largest penalties do not enforce.

    The functions of the stages get t = 0 for now in every tick. What moves, such as a
    reference, is given as numbers of another `problem`, see `__call__`: it is the same
    program, and no number ever compiles again.

    A tick takes O(iterations T (n + m)^3). Calls work under `jax.jit`, in
    `jax.lax.scan` and, for many robots, under `jax.vmap`. Derivatives raise.

    Source: M. Diehl, H. Bock, J. Schlöder, "A Real-Time Iteration Scheme for Nonlinear
    Optimization in Optimal Feedback Control", 2005; and as in [`diffprog.solve`][].
    """

    problem: ControlProblem
    method: AbstractDirection
    iterations: int = eqx.field(static=True)
    search: AbstractSearch
    outer: AbstractOuter | None
    fast_loops: bool | None = eqx.field(static=True)

    @with_other_names(_NOT_IN_MPC)
    def __init__(
        self,
        problem: ControlProblem,
        method: AbstractDirection,
        iterations: int = 1,
        search: AbstractSearch = Backtracking(),
        *,
        outer: AbstractOuter | None = None,
        fast_loops: bool | None = None,
    ):
        self.problem, self.method, self.iterations = problem, method, iterations
        self.search, self.outer, self.fast_loops = search, outer, fast_loops

    def __check_init__(self):
        _check_problem(self.problem)
        check(self.problem, self.method, self.search)
        check_count("iterations", self.iterations)
        if self.outer is not None:
            check_kind("outer", self.outer, AbstractOuter, "dp.AugmentedLagrangian()")

    def init(
        self,
        x0: PyTree,
        us: PyTree = None,
        xs: PyTree = None,
        *,
        state: WarmStart | None = None,
    ) -> MPCState:
        """The state before the first tick.

        **Arguments:**

        - `x0`: a state, shape `(n,)` or any pytree of floating arrays.
        - `us`: the first plan of the controls, `(T, m)` or a pytree of arrays with T
            rows. It may be left out where arrays in the limits of the controls give
            their shape: then it is the middle between two finite limits, else 0 or the
            limit next to it.
        - `xs`: states of the first plan, T + 1 rows, which need not follow from `us`.
            Then every tick begins at the states of the plan, and steps close their
            gaps, see [Starting from states](../starting-from-states.md); the feedback
            of the plan is not needed for it.
        - `state`: `solution.state` of a solve that `us` comes from: its step size and
            damping, multipliers and penalties.

        **Fails:** `ValueError` or `TypeError` for shapes that do not fit.
        """
        problem = self.problem
        if state is not None:
            check(problem, self.method, state=state)
        (x0, us, xs), dtype = strong(x0, us, xs)
        if us is None:
            us = middle(problem.control_bounds, problem.horizon, dtype)
        if us is None:
            raise ValueError(
                f"`us` is not given, and `control_bounds`, {problem.control_bounds}, "
                "do not say the shape of a control: give `us`, with a row for each of "
                f"the {counted(problem.horizon, 'stage')}, or limits that are arrays."
            )
        manifold = problem.manifold
        if manifold is not None:
            check_on_manifold(manifold, x0)
        state = no_state(dtype) if state is None else state
        begun = _first(self, x0, us, xs, state)
        return replace(begun, _manifold=manifold and Same(manifold))

    @with_other_names(_NOT_IN_MPC)
    def __call__(
        self, x: PyTree, state: MPCState, problem: ControlProblem | None = None
    ) -> tuple[PyTree, MPCState]:
        """One tick.

        **Arguments:**

        - `x`: the measured state.
        - `state`: of the tick before, or of [`init`][diffprog.MPC.init].
        - `problem`: a problem like that of the controller with other numbers: a moved
            reference, an obstacle, limits. Unless given, that of the controller.

        **Returns:** `(u, state)`, the control of now, like a row of `us`, and a
        [`diffprog.MPCState`][].

        **Fails:** `ValueError` or `TypeError` at once for a state, an x or a problem
        that does not fit.
        """
        problem = self.problem if problem is None else problem
        _check_problem(problem)
        check_state(state)
        manifold = state._manifold  # functions are no answer of a program
        (x, _), _ = strong(x, state.us)
        bare = replace(state, _manifold=None)
        u, new = _tick(self, problem, x, bare)
        return u, replace(new, _manifold=manifold)

    def shift(self, state: MPCState, by: int = 1) -> MPCState:
        """The plan moved on by so many stages, in place of the next tick's move by one.

        For ticks that are no stage apart: `by` is `round(1 / (rate * dt))` stages, and
        0 plans once more from the same stage. Controls, states, gains and multipliers
        move; last rows are repeated, and multipliers of the last state stay.

        **Arguments:**

        - `state`: of the tick before.
        - `by`: a Python int from 0 to T.
        """
        check_state(state)
        T = len(state.K)
        if isinstance(by, bool) or not isinstance(by, int) or not 0 <= by <= T:
            raise ValueError(
                f"`by` is {by!r}; a Python int from 0 to {T}, the number of stages of "
                "the plan, is expected."
            )
        manifold = state._manifold
        new = _shifted(replace(state, _manifold=None), by)
        return replace(new, _manifold=manifold)

    def __hash__(self) -> int:
        try:
            return super().__hash__()
        except TypeError:
            raise TypeError(
                "This controller holds arrays, so that `jax.jit` cannot take it for a "
                "function: call it in one, `jax.jit(lambda x, state: controller(x, "
                "state))`, or use `equinox.filter_jit(controller)`."
            ) from None


def _check_problem(problem: Any):
    check_kind("problem", problem, ControlProblem, "dp.ControlProblem(...)")


MPC.__init__.__doc__ = """**Arguments:**

- `problem`: a [`diffprog.ControlProblem`][]; its horizon is that of every plan.
- `method`: the direction, such as [`diffprog.ILQR`][].
- `iterations`: those of a tick; a Python int.
- `search`: [`diffprog.Backtracking`][], [`diffprog.AdaptiveDamping`][] or
    [`diffprog.FixedStep`][], whose iterations are one backward pass and one roll-out.
- `outer`: what turns constraints into costs, [`diffprog.AugmentedLagrangian`][] unless
    given.
- `fast_loops`: as in [`diffprog.solve`][].
"""
