"""The fit of a learned preconditioner to the curvature of batches."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from .._common.door import door
from .._common.tree import add, all_finite, norm, where
from .._common.types import check_not_negative, Number
from ._checks import check_curvature
from ._curvature import Curvature
from ._kfac import KFACState
from ._kfac_start import from_factors
from ._llqr_state import LLQRState, Plan
from ._score import optimum


Curvatures = Curvature | list[Curvature] | tuple[Curvature, ...]
# Conjugate gradients for the best decrease on the batch of a judge.
JUDGE_STEPS, JUDGE_RTOL = 200, 1e-6


class LLQRDiagnostics(NamedTuple):
    r"""What a refresh found. J is what U minimizes, see [`diffprog.optim.llqr`][].

    - `identity`, `fitted`: J(I), and J(U) of the U that is returned.
    - `identity_score`, `score`: those of the steps -g and -U g on the batch of `judge`,
        as in [`diffprog.optim.score`][]: 1 is the best there is. NaN without a judge.
    - `negative`: the share of entries below 0 on the diagonal of U: gradients whose
        sign is turned.
    - `distance`: |U - I|, the norm over all numbers of U.
    - `refused`: whether numbers were not finite, and the U before was kept.
    """

    identity: Float[Array, ""]
    fitted: Float[Array, ""]
    identity_score: Float[Array, ""]
    score: Float[Array, ""]
    negative: Float[Array, ""]
    distance: Float[Array, ""]
    refused: Bool[Array, ""]


def refresh(
    opt_state: PyTree,
    params: PyTree,
    curvature: Curvatures,
    *,
    damping: Number | None = None,
    judge: Curvature | None = None,
    start: KFACState | None = None,
) -> tuple[PyTree, LLQRDiagnostics | tuple[LLQRDiagnostics, ...]]:
    """Fits the preconditioners of [`diffprog.optim.llqr`][] to some batches.

    A pure function, for `jax.jit` too: new parameters, batches and dampings are the
    same program.

    **Arguments:**

    - `opt_state`: the state of any optax transformation with an `llqr` in it, also
        inside of `optax.chain`, `masked`, `multi_transform`, `MultiSteps`,
        `inject_hyperparams` or `apply_if_finite`.
    - `params`: the parameters.
    - `curvature`: a curvature at the parameters, or a list of them, one for every
        batch. A U with many numbers learns the noise of few batches: give 8 or more.
        Compile time grows with their number.
    - `damping`: rho in place of the one of `llqr`, for this call.
    - `judge`: the curvature of a batch that is not among them; `score` in the
        diagnostics is then that of the gradient of this batch. Costs up to 200 products
        with C.
    - `start`: the state of a [`diffprog.optim.kfac`][] of the same parameters: the fit
        starts from its factors, as near as the structures come to them. With
        `HeavyBall(num_steps=0)` U is what K-FAC is.

    **Returns:** the state, with the U that was found; and what is known of it, a
    [`diffprog.optim.LLQRDiagnostics`][], or a tuple of these where there are several
    `llqr`.

    **Raises:** `ValueError` for a state without an `llqr`, and for a curvature of other
    parameters; `TypeError` for what is no curvature.
    """
    is_state = lambda node: isinstance(node, LLQRState)
    nodes, treedef = jtu.tree_flatten(opt_state, is_leaf=is_state)
    states = [node for node in nodes if is_state(node)]
    if not states:
        raise ValueError(
            "`opt_state` has no state of `dp.optim.llqr`: give that of an optax "
            "transformation with one in it, such as `optimizer.init(params)` of "
            "`optimizer = optax.chain(dp.optim.llqr(), optax.sgd(0.1))`."
        )
    if damping is not None:
        check_not_negative("damping", damping)
    found = []
    for state in states:
        given = checked_curvatures(curvature, state.plan, params)
        if judge is not None:
            checked_curvatures(judge, state.plan, name="judge")
        found.append(compiled(_refreshed)(state, given, damping, judge, start))
    new = iter([state for state, _ in found])
    nodes = [next(new) if is_state(node) else node for node in nodes]
    diagnostics = tuple(about for _, about in found)
    one = diagnostics[0] if len(diagnostics) == 1 else diagnostics
    return treedef.unflatten(nodes), one


def checked_curvatures(
    given: Any, plan: Plan, params: PyTree = None, name: str = "curvature"
) -> list[Curvature]:
    """A list of curvatures of the parameters of a plan."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    if params is not None:
        plan.take("params", params)
    if not found:
        raise ValueError("`curvature` is an empty list; at least one is expected.")
    for curvature in found:
        check_curvature(curvature)
        plan.take(f"{name}.params", curvature.params)
    return found


def _refreshed(
    state: LLQRState,
    curvatures: list[Curvature],
    damping: Any = None,
    judge: Curvature | None = None,
    factors: KFACState | None = None,
) -> tuple[LLQRState, LLQRDiagnostics]:
    """The state with a new U, and what is known of it."""
    plan, settings = state.plan, state.settings
    rho = settings.damping if damping is None else jnp.asarray(damping, plan.dtype)
    rng, key = jr.split(jr.wrap_key_data(state.key, impl="threefry2x32"))
    models = [plan.restricted(curvature.linearize()) for curvature in curvatures]
    objective = plan.objective(models, settings.probe, rho, key)
    old, identity = plan.numbers(state.U), plan.init()
    start = old if plan.warm_start else identity
    if factors is not None:
        start = from_factors(plan, factors)
    new = settings.solver.solve(objective, start)
    new = add(old, add(new, old, -1), 1 - settings.ema)
    if settings.floor is not None:
        new = plan.floored(new, settings.floor)
    bad = ~all_finite(new, objective.vectors)
    new = where(bad, old, new)
    count = lambda n: optax.safe_increment(n)
    state = dataclasses.replace(
        state,
        U=plan.spread(new),
        since=jnp.zeros_like(state.since),
        refreshes=count(state.refreshes),
        refused=jnp.where(bad, count(state.refused), state.refused),
        overdue=jnp.zeros_like(state.overdue),
        key=jr.key_data(rng),
    )
    scores = _scores(plan, (identity, new), judge, rho)
    signs = [jnp.ravel(entries) < 0 for entries in plan.diagonals(new)]
    return state, LLQRDiagnostics(
        identity=objective.value(identity),
        fitted=objective.value(new),
        identity_score=scores[0],
        score=scores[1],
        negative=jnp.mean(jnp.concatenate(signs).astype(plan.dtype)),
        distance=norm(add(new, identity, -1)),
        refused=bad,
    )


def _scores(plan: Plan, preconditioners, judge: Curvature | None, rho) -> list[Array]:
    """J(-U g) / J* on the batch of a judge."""
    if judge is None:
        return [jnp.full((), jnp.nan, plan.dtype) for _ in preconditioners]
    model = plan.restricted(judge.linearize())
    best = optimum(model, rho, JUDGE_RTOL, JUDGE_STEPS)
    g = model.gradient
    steps = [[-Ug for Ug in plan.apply(U, g)] for U in preconditioners]
    return [model.change(step, rho) / best for step in steps]


def refreshed_if_due(state: LLQRState, curvatures: list[Curvature]) -> LLQRState:
    due = (state.since >= state.settings.interval) | (state.refreshes == 0)
    run = lambda state: _refreshed(state, curvatures)[0]
    return lax.cond(due, run, lambda state: state, state)


_PROGRAMS = {fn: door(fn) for fn in (_refreshed, refreshed_if_due)}


def compiled(fn: Callable) -> Callable:
    """Compiled; but inside `shard_map`, where all that goes in would vary, as it is."""
    inside = jax.sharding.get_abstract_mesh().manual_axes
    return fn if inside else _PROGRAMS[fn]
