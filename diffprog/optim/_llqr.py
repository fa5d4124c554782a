"""Layerwise LQR as an optimizer: a preconditioner learned from the curvature."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._common.tree import cast, norm
from .._common.types import (
    came,
    check_callable,
    check_count,
    check_key,
    check_kind,
    check_not_negative,
    check_number,
    is_known,
    Number,
)
from ._checks import rate_is
from ._llqr_state import LLQRState, make_plan, Plan, Settings
from ._refresh import checked_curvatures, compiled, refreshed_if_due
from ._structure_solvers import (
    AbstractProbe,
    AbstractStructureSolver,
    check_share,
    ExactStep,
    GradientProbe,
    HeavyBall,
)
from ._structures import AbstractStructure, default_structure, Diagonal


Graft = Literal["none", "norm"]


@rate_is("chain it with `optax.scale_by_learning_rate(0.1)`")
def llqr(
    structure: AbstractStructure | Callable | None = None,
    *,
    damping: Number = 1e-3,
    solver: AbstractStructureSolver = ExactStep(),
    probe: AbstractProbe = GradientProbe(),
    ema: Number = 0.0,
    floor: Number | None = None,
    warm_start: bool = True,
    graft: Graft = "none",
    interval: int | Array = 100,
    key: PRNGKeyArray | Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Layerwise LQR: learns a preconditioner U from the curvature of whole batches.

    $$\min_U J(U), \quad J(U) = \operatorname{mean} \left[ -\langle g, U g \rangle
    + \tfrac12 \langle U g, (C + \rho I) U g \rangle \right], \quad
    U = \operatorname{blockdiag}(U_1, U_2, \dots)$$

    over some batches with gradients g and curvatures C, which couple all parameters:
    J is the cost of the linear-quadratic problem over the layers of the network, with
    the steps of their parameters as controls. Between refreshes an update is U g:

    ```python
    optimizer = optax.chain(dp.optim.llqr(), optax.sgd(0.1, momentum=0.9))
    updates, state = optimizer.update(gradient, state, params, curvature=curvature)
    ```

    refreshes U where one is due, with a `curvature` made by a recipe such as
    [`diffprog.optim.ggn`][]; or call [`diffprog.optim.refresh`][] yourself, and give
    none: that compiles less, and may take other batches, 8 or more of them.

    **Arguments:**

    - `structure`: for every leaf, such as [`diffprog.optim.Diagonal`][]`()`; leaves
        with too few axes for a structure of matrices are diagonal. Or a rule
        `structure(path, leaf)` that returns one. `None`:
        [`diffprog.optim.default_structure`][]. Parameters of equal stages of a
        [`diffprog.Network`][] have structures of their own.
    - `damping`: rho >= 0.
    - `solver`: [`diffprog.optim.ExactStep`][], [`diffprog.optim.HeavyBall`][],
        [`diffprog.optim.LinearCG`][] or [`diffprog.optim.NormalEquations`][].
    - `probe`: what stands in for g: the gradient itself,
        [`diffprog.optim.GaussianProbe`][] or [`diffprog.optim.RademacherProbe`][].
    - `ema`: beta from 0 to 1; U becomes beta U + (1 - beta) times what was found,
        number by number.
    - `floor`: the least entry of diagonals and scalars, of the factors of
        [`diffprog.optim.DiagonalKronecker`][] and of D in
        [`diffprog.optim.EigenKronecker`][]; or `None`.
    - `warm_start`: whether a refresh starts from U, else from I.
    - `graft`: `"norm"` gives U g the norm of g, leaf by leaf; or `"none"`.
    - `interval`: a refresh is due after so many updates, and at the first.
    - `key`: a key of `jax.random` or an int, for random probes.

    **Returns:** a transformation for `optax.chain`, with states
    [`diffprog.optim.LLQRState`][]. `update` ignores extra arguments that it does not
    know. `optax.scale_by_backtracking_linesearch` and the zoom line search raise for
    them: call `refresh` in a chain with one of those, and give no `curvature=`.

    A leaf that `optax.masked` leaves out does not move, and its curvature plays no
    part. Numbers such as `damping` may be those of `optax.inject_hyperparams`.

    **Raises:** `ValueError` or `TypeError` for wrong arguments, for a structure that
    does not fit a leaf, for parameters that are not floating, and for a curvature of
    other parameters. What is not finite is never part of U: see
    [`diffprog.optim.LLQRDiagnostics`][].

    A refresh costs about `num_steps` products with C, and those with U; an update the
    product with U.

    Source: Dufort-Labbé, Bacon, Pascanu, Lacoste-Julien, Baratin, "Layerwise LQR for
    Geometry-Aware Optimization of Deep Networks", 2026, arXiv 2605.04230.
    """
    _check(structure, damping, solver, probe, ema, floor, graft, interval)
    if not isinstance(warm_start, bool):
        raise TypeError(f"`warm_start` is {came(warm_start)}; a bool is expected.")
    rule = default_structure if structure is None else structure
    settings = Settings(damping, ema, floor, interval, solver, probe)
    seed = _seed(key)

    def init(params: PyTree) -> LLQRState:
        plan = make_plan(params, rule, solver.needs_linear, graft, warm_start)
        zero = jnp.zeros((), jnp.int32)
        state = LLQRState(
            U=plan.spread(plan.init()),
            count=zero,
            since=zero,
            refreshes=zero,
            refused=zero,
            overdue=jnp.zeros((), bool),
            key=seed(),
            settings=settings.arrays(plan.dtype),
            plan=plan,
        )
        return jtu.tree_map(jnp.array, state)  # each its own, so that it can be donated

    def update(updates, state, params=None, *, curvature=None, **extra_args):
        del params, extra_args
        plan, now = state.plan, settings.arrays(state.plan.dtype)
        state = dataclasses.replace(state, settings=now)
        gradient = plan.take("updates", updates)
        if curvature is not None:
            given = checked_curvatures(curvature, plan)
            state = compiled(refreshed_if_due)(state, given)
        UX = _preconditioned(plan, plan.numbers(state.U), gradient)
        since: Any = optax.safe_increment(state.since)
        state = dataclasses.replace(
            state,
            count=optax.safe_increment(state.count),
            since=since,
            overdue=since > now.interval,
        )
        _warn_once(since, now.interval)
        return plan.tree(UX), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


def published(
    structure: AbstractStructure | Callable | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The published settings of [`diffprog.optim.llqr`][].

    A diagonal U; 50 steps of [`diffprog.optim.HeavyBall`][] with rate 0.001, momentum
    0.9 and gradients of at most norm 5, from the U before; average 0.95, floor 1e-8, no
    damping, every 1000 updates. On small networks U hardly moves: an array of it by at
    most 0.103 in one refresh, and training goes as without it.

    The published program sums the Fisher matrix over the B examples of a batch and
    takes the mean of the gradient: `dp.optim.fisher(loss, factor=B)`. Put the
    transformation in front of `optax.sgd` or `optax.adam`, and weight decay in between.

    **Arguments:**

    - `structure`: another one than `Diagonal()`.
    """
    return llqr(
        Diagonal() if structure is None else structure,
        damping=0.0,
        solver=HeavyBall(),
        ema=0.95,
        floor=1e-8,
        interval=1000,
    )


def _preconditioned(plan: Plan, numbers: tuple, gradient: list[Array]) -> list[Array]:
    """U g, at the length of g where it is grafted."""
    UX = plan.apply(numbers, gradient)
    if plan.graft == "none":
        return UX
    work = lambda a: cast(jnp.asarray(a), plan.dtype)

    def grafted(a, like):
        size, target = norm(work(a)), norm(work(like))
        ratio = jnp.where(size > 0, target / jnp.where(size > 0, size, 1), 1)
        return (ratio * work(a)).astype(a.dtype)

    return [grafted(*pair) for pair in zip(UX, gradient, strict=True)]


def _warn_once(since: Any, interval: Any):
    """Where the numbers are known, at the first update after a refresh was due."""
    if is_known(since) and is_known(interval) and int(since) == int(interval) + 1:
        warnings.warn(
            f"The preconditioner of `dp.optim.llqr` was not refreshed for {int(since)} "
            "updates: call `dp.optim.refresh`, give `curvature=` to `update`, or set a "
            "longer `interval`.",
            stacklevel=3,
        )


def _check(structure, damping, solver, probe, ema, floor, graft, interval):
    """Raises for wrong arguments of `llqr`."""
    if structure is not None and not isinstance(structure, AbstractStructure):
        expected = "a structure such as `Diagonal()`, or a rule `structure(path, leaf)`"
        check_callable("structure", structure, expected)
    check_not_negative("damping", damping)
    check_kind("solver", solver, AbstractStructureSolver, "ExactStep()")
    check_kind("probe", probe, AbstractProbe, "GradientProbe()")
    check_share("ema", ema)
    if floor is not None:
        check_number("floor", floor, "a number, or `None`,")
    if graft not in ("none", "norm"):
        raise ValueError(f'`graft` is {graft!r}; "none" or "norm" is expected.')
    if isinstance(interval, jax.Array | np.ndarray):
        check_number("interval", interval, "an int >= 1")
    else:
        check_count("interval", interval)


def _seed(key: Any) -> Callable[[], Array]:
    """The first key of a state, as two integers: a state is then easy to save."""
    number = isinstance(key, int) and not isinstance(key, bool)
    if not number:
        check_key(key)
        number = jnp.ndim(key) == 0 and jnp.issubdtype(
            jnp.result_type(key), jnp.integer
        )
    return lambda: jr.bits(jr.key(key) if number else key, (2,), "uint32")
