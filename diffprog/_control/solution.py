import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._common.result import explain, is_traced, NAMES, RESULTS
from .._common.types import counted
from .lqr import Policy
from .search.base import SearchState


BOUNDED = (
    "Start from `us` that keep the system bounded, shorten the horizon, or use a "
    "search that shortens steps."
)
STIFF = (
    "Where an explicit rule meets a stiff vector field, shorten `dt`, or give "
    "`discretize` an implicit solver."
)
GROWN = f"{BOUNDED} {STIFF}"
# What to do about a result, in the words of a control problem.
ADVICE = dict(
    max_steps_reached="Raise `max_steps`, loosen `rtol` and `atol`, or continue from "
    "`solution.us` with `state=solution.state`.",
    no_descent="The rounding of the cost may hide what is left to gain: use float64, "
    "loosen `rtol`, scale the problem, or take another search. Or the derivatives do "
    "not belong to the cost (non-smooth functions, gradients cut inside): check them.",
    damping_limit="The model of the problem is not convex or not accurate enough here: "
    "start from better `us`, scale the controls, raise the `max_damping` of the search "
    "or, with `dp.Newton()` or `dp.DDP()`, try `dp.ILQR()`, which needs convex costs "
    "only.",
    nonfinite_rollout=GROWN,
    nonfinite_derivative="Look there for sqrt(0), norms at 0, 0/0 under `jnp.where`, "
    "or arctan2(0, 0).",
    factorization_failed="Give a positive `damping`, use a search that raises it, or "
    "add a control cost.",
    infeasible="There a lower limit of `control_bounds` is above the upper one, or one "
    "of them is NaN: give lo <= hi.",
    cost_unbounded="Some motion is rewarded without limit: look for a term of the cost "
    "with the wrong sign, or add one that grows faster.",
)

VIOLATED = (
    "Start from other `us` (a guess that aims at the middle of an obstacle has no side "
    "to go to), try `dp.ILQR()` or another `penalty` of `dp.AugmentedLagrangian`, or "
    "loosen that constraint."
)
# The same, where gaps are left.
OPEN = ADVICE | dict(
    max_steps_reached="Raise `max_steps`, or continue with `us=solution.us` and "
    "`xs=solution.xs`.",
    no_descent="Give `xs` and `us` that fit each other better, or start from `us` "
    "alone.",
)
UNMOVED = (
    "No control changes it there: move `x0`, or loosen the constraint; an `Inequality` "
    "allows `fn <= 0`."
)
GIVEN = "Give finite numbers."
DOMAIN = "Start where the cost is defined (`x0`, `us`), or extend it beyond."
FINDER = (
    "give its root finder more iterations (`root_find_max_steps=100`; diffrax has 10) "
    "or looser tolerances, or take `optimistix.Newton` in place of a chord method such "
    "as `diffrax.VeryChord`."
)
EARLY = (
    "So early that is hardly a matter of `us`: look for NaN in the numbers of the "
    "problem, for a `dt` that is not positive or too long for an explicit rule and a "
    "stiff vector field (shorten it, or give `discretize` an implicit solver), for "
    f"functions outside their domain, and for an implicit step that fails: {FINDER}"
)
FAILED = f"Where a step of an implicit solver fails the new state is NaN: {FINDER}"
# A state beyond runs away: it is not the cost that is to blame.
RUNAWAY = 1e9


class Multipliers(eqx.Module):
    r"""The multipliers of a solution: what a limit costs, to first order.

    $$\nabla_u L + \mu^{upper} - \mu^{lower} = 0, \quad \mu \ge 0, \quad
    L = J + \sum y^\top h + \sum \lambda^\top g,$$

    0 where a control is not at that limit. `upper` is the decrease of the cost per unit
    by which the upper limit is raised.

    - `constraints`, `terminal`: of the constraints of the stages, an array `(T, rows)`
        for each by its name, and of the last state, `(rows,)`; for a
        [`diffprog.Chain`][] a dictionary for each phase.
    - `lower`, `upper`: of the limits of the controls, arranged like `us`.
    - `costates`: the gradient of L in each state, arranged like `xs`; on a manifold in
        its local coordinates, and arranged like these.
    """

    constraints: Any
    terminal: dict[str, Array]
    lower: PyTree[Array]
    upper: PyTree[Array]
    costates: PyTree[Array]
    # Of the constraints in their order: JAX sorts the keys of a dict.
    _names: tuple[str, ...] = eqx.field(static=True, default=(), repr=False)


class WarmStart(eqx.Module):
    """What a solve leaves to the next one, which takes it as `state`.

    - `search`: the memory of the search, see [`diffprog.SearchState`][].
    - `multipliers`: [`diffprog.Multipliers`][], `None` without constraints; with
        these penalties they make the gradient 0 that is 0 with the solution's.
    - `penalty`: of each constraint, the terminal ones last; `None` without.

    Numbers are all that may change: constraints and horizon are the same. Of a batch
    every array has the problem as first axis.
    """

    search: SearchState
    multipliers: Any = None
    penalty: Any = None


class Solution(eqx.Module):
    """What a solve returns, whether it succeeded or not.

    Of a batch `solution[i]` is the solution of one problem, and a slice some of them.

    - `xs`: states, T + 1 rows.
    - `us`: controls, T rows.
    - `cost`: their cost.
    - `policy`: the feedback around them, see [`diffprog.Policy`][], from a backward
        pass without damping (with the last damping that worked where there is none);
        zeros if there was no pass. For a [`diffprog.Chain`][], one for each phase.
    - `multipliers`: [`diffprog.Multipliers`][] where there are limits or constraints,
        else `None`.
    - `result`: a [`diffprog.RESULTS`][] code.
    - `stats`: a dictionary: `num_steps` (accepted iterations), `num_rollouts`,
        `num_backwards`, `max_steps`, `gradient` (norm of the gradient in the controls),
        `decrement` (the decrease that the undamped model still promises, which the
        tolerances are about), `minimum` (whether the undamped model of the direction
        has a strict minimum at every stage: at a maximum, a saddle or along a flat
        direction it does not; directions of first order see no curvature and say yes),
        `first_nonfinite` (the first stage that is not finite, in the roll-out, its
        derivatives or the trials of the latest iteration that had such ones) and
        `nonfinite_step` (that iteration); horizon + 1 and `max_steps` + 1 if there was
        none, or if the solve succeeded. Where controls have limits, `gradient` is that
        of the controls as far as they can move, and `stationarity` its largest entry.
        With constraints these are of L, see [`diffprog.Multipliers`][], and there are
        `violation` (the largest), `complementarity`, `dual_sign` (how negative the
        multiplier of an inequality is), `num_outer` (updates of the multipliers),
        `num_attempts`, `penalty` (the largest) and `violated`: the number of the
        constraint that is violated most, the terminal ones last, and the stage.
        Where the solve began with states, `gap` is the largest entry of what is left
        of the gaps between a state and what the dynamics make of the one before.
    - `history`: a dictionary of arrays of length `max_steps + 1`: `cost`, `stepsize`,
        `damping`, `slope`, `trials`, `gradient`, with constraints `violation` and
        `penalty`, and where the solve began with states `gap`. Entry i is about iterate
        i and the step from it; NaN after the end. Empty if `history=False`.
    - `state`: a [`diffprog.WarmStart`][], for `state=` of the next solve.

    Property: `success`, whether the result is `successful`; in a batch, of each.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    cost: Float[Array, "*batch"]
    policy: Any
    multipliers: Any
    result: RESULTS
    stats: dict[str, Any]
    history: dict[str, Float[Array, "*batch rows"]]
    state: WarmStart

    @property
    def success(self) -> Bool[Array, "*batch"]:
        """Whether `result` is `successful`."""
        return self.result == RESULTS.successful

    def __getitem__(self, i) -> "Solution":
        batch = np.shape(self.cost)
        if not batch:
            raise TypeError(
                "This is the solution of one problem; only in a batch is there a "
                "`solution[i]`. Its trajectory is `solution.xs` and `solution.us`."
            )
        if isinstance(i, int) and not -batch[0] <= i < batch[0]:
            raise IndexError(
                f"`solution[{i}]` of a batch of {counted(batch[0], 'problem')}."
            )
        return jtu.tree_map(lambda leaf: leaf[i], self)

    def __repr__(self) -> str:
        code = self.result._value
        if is_traced(self) or not isinstance(code, jax.Array | np.ndarray):
            return eqx.tree_pformat(self, struct_as_array=True)
        if np.ndim(code):
            return _describe_batch(np.asarray(code), self)
        stats = self.stats
        return "\n".join([
            f"Solution{_in_float32(self)}: {NAMES[int(code)]}",
            f"  cost          {float(self.cost):.10g}",
            f"  iterations    {int(stats['num_steps'])} of at most "
            f"{int(stats['max_steps'])} ({int(stats['num_rollouts'])} roll-outs, "
            f"{int(stats['num_backwards'])} backward passes)",
            f"  stationarity  {float(stats['decrement']):.2e} predicted decrease, "
            f"{float(stats['gradient']):.2e} gradient norm",
            *_describe_constraints(stats),
            f"  {explain_solution(self)}",
        ])  # fmt: skip


def on_manifold(solution: Solution, manifold: Any) -> Solution:
    """The solution whose policies take differences of states on the manifold."""
    is_policy = lambda node: isinstance(node, Policy)
    to = lambda policy: dataclasses.replace(policy, _manifold=manifold)
    policy = jtu.tree_map(to, solution.policy, is_leaf=is_policy)
    return dataclasses.replace(solution, policy=policy)


def _describe_constraints(stats: Mapping[str, Any]) -> list[str]:
    if "violation" not in stats:
        return []
    return [
        f"  constraints   {float(stats['violation']):.2e} violation, "
        f"{counted(int(stats['num_outer']), 'update')} of multipliers, "
        f"penalty {float(stats['penalty']):.0e}"
    ]


def _in_float32(solution: Solution) -> str:
    """Said where tolerances are not those of float64."""
    return " in float32" if solution.cost.dtype == np.float32 else ""


def _describe_batch(codes: np.ndarray, solution: Solution) -> str:
    names, counts = np.unique([NAMES[c] for c in codes.ravel()], return_counts=True)
    costs, steps = np.asarray(solution.cost), np.asarray(solution.stats["num_steps"])
    return "\n".join([
        f"Solution of {counted(codes.size, 'problem')}{_in_float32(solution)}: "
        + ", ".join(f"{n} {name}" for name, n in zip(names, counts, strict=True)),
        f"  cost          {costs.min():.6g} to {costs.max():.6g}",
        f"  iterations    {steps.min()} to {steps.max()}",
    ])  # fmt: skip


def explain_solution(solution: Solution, advice: Mapping[str, str] = ADVICE) -> str:
    """The message of the known result of one solve."""
    name, where, instead = NAMES[int(solution.result._value)], "", ""
    stage = int(solution.stats["first_nonfinite"])
    if name == "successful" and not solution.stats["minimum"]:
        where = (
            "It may be no minimum: without damping the model falls or is flat along "
            "some controls. Start from other `us`, such as these with a little noise, "
            "to leave a maximum or a saddle."
        )
    elif name == "infeasible" and not np.isfinite(solution.cost):
        where = f"At stage {stage} there is none."
    elif name == "infeasible":
        at_once = solution.stats["num_backwards"] == 0
        where, instead = _violated(solution), UNMOVED if at_once else VIOLATED
    elif name == "nonfinite_derivative":
        where = f"It is one of the dynamics or of the cost at stage {stage}."
        if (largest := _largest(solution.xs)) > RUNAWAY:
            where += f" The states reach {largest:.1e}: no model holds there."
            instead = GROWN
    elif name in ("max_steps_reached", "no_descent", "damping_limit"):
        where, instead = _hindrances(solution, name, stage)
        if solution.stats.get("violation", 0) > 0:
            where = f"{_violated(solution)} {where}".strip()
        if solution.stats.get("gap", 0) > 0:
            where, instead = f"{_gap(solution)} {where}".strip(), instead or OPEN[name]
    elif name == "nonfinite_rollout":
        where, instead = _nonfinite_place(solution, stage)
    if instead and advice is ADVICE:  # a network has neither `dt` nor root finder
        advice = {**advice, name: instead}
    return explain(solution.result, advice, where)


def _violated(solution: Solution) -> str:
    """The constraint that is violated most, and where."""
    group, stage = map(int, solution.stats["violated"])
    name, size = solution.multipliers._names[group], float(solution.stats["violation"])
    return f"The largest violation, {size:.1e}, is that of `{name}` at stage {stage}."


def _gap(solution: Solution) -> str:
    return (
        f"There are gaps of up to {float(solution.stats['gap']):.3g} between the "
        "states and what the dynamics make of those before."
    )


def _hindrances(solution: Solution, name: str, stage: int) -> tuple[str, str]:
    """What kept a search from its end, and advice of its own."""
    trials, largest = "", _largest(solution.xs)
    if stage <= len(_finite_rows(solution.us, isinstance(solution.policy, tuple))):
        step = int(solution.stats["nonfinite_step"])
        trials = f"in iteration {step} trials were not finite from stage {stage} on"
    if name != "max_steps_reached" and largest > RUNAWAY:
        trials = trials and f", and {trials}"
        return f"The states reach {largest:.1e}{trials}: no model holds there.", GROWN
    where = [f"{trials.capitalize()}."] if trials else []
    if name == "max_steps_reached" and not solution.stats["minimum"]:
        where.append(
            "Without damping the model has no minimum: has the cost a bound below?"
        )
    if not trials:
        return " ".join(where), ""
    otherwise = ADVICE[name][0].lower() + ADVICE[name][1:]
    return " ".join(where), f"{FAILED} {STIFF} Otherwise, {otherwise}"


def _nonfinite_place(solution: Solution, stage: int) -> tuple[str, str]:
    """Where a roll-out is not finite, and advice of its own."""
    if np.isfinite(solution.cost):
        where = f"In the trials that is so from stage {stage} on."
        return where, f"{GROWN} {FAILED}"
    phases = isinstance(solution.policy, tuple)
    states, controls = solution.xs, solution.us
    largest = _largest(states)
    if phases:  # the last state comes on its own
        states = (*states[:-1], jtu.tree_map(lambda a: a[None], states[-1]))
    states, controls = _finite_rows(states, phases), _finite_rows(controls, phases)
    if not states[0]:
        return "There is a NaN or an infinity in `x0`.", GIVEN
    if "gap" in solution.stats and not np.all(states):
        bad = np.argmin(states)
        return f"There is a NaN or an infinity in `xs`, first at stage {bad}.", GIVEN
    if not np.all(controls):
        bad = np.argmin(controls)
        return f"There is a NaN or an infinity in `us`, first at stage {bad}.", GIVEN
    if states[stage] and not np.isfinite(solution.stats.get("gap", 0)):
        return f"What the dynamics make of the state of stage {stage} is not.", DOMAIN
    if states[stage] and largest > RUNAWAY:
        return f"At stage {stage} the state has run away, to {largest:.1e}.", ""
    if states[stage]:
        return f"It is the cost of stage {stage}; its state is finite.", DOMAIN
    where, late = f"The state is not finite from stage {stage} on.", stage > 2
    if late and largest > RUNAWAY:
        return where, GROWN
    return where, f"{BOUNDED} {FAILED}" if late else EARLY


def _largest(tree: PyTree) -> float:
    finite = [np.where(np.isfinite(x), x, 0) for x in jtu.tree_leaves(tree)]
    return max(float(np.max(np.abs(x))) for x in finite)


def _finite_rows(tree: PyTree, phases: bool) -> np.ndarray:
    """Whether each row of the stacked leaves is finite, of phases one after another."""
    if phases:
        return np.concatenate([_finite_rows(stack, False) for stack in tree])
    leaves = [np.asarray(leaf) for leaf in jtu.tree_leaves(tree)]
    flags = [np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in leaves]
    return np.logical_and.reduce(flags)
