"""What a receding horizon carries from tick to tick."""

import functools as ft
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from .._common.changes import Same
from .._common.result import RESULTS
from .._common.tree import Layout
from .._common.types import check_kind
from .lqr import Policy
from .search import SearchState


class MPCState(eqx.Module):
    """The plan from now on, and what a controller knows about it.

    - `xs`: states, T + 1 rows.
    - `us`: controls, T rows; the first one was returned.
    - `K`: feedback gains around them, shape `(T, m, n)`, raveled as in
        [`diffprog.Policy`][].
    - `cost`: the cost of the plan; NaN where the tick fell back to the plan before.
    - `multipliers`: [`diffprog.Multipliers`][] of the constraints, `None` without.
    - `penalty`: of each constraint, `None` without.
    - `violation`: the largest one along the plan, `None` without constraints.
    - `search`: the memory of the search: its step size and damping.
    - `result`: a [`diffprog.RESULTS`][] code of the last tick, see [`diffprog.MPC`][].

    Property: `policy`, the feedback around the plan, a [`diffprog.Policy`][]:
    `state.policy(0, x)` is the control of now in another state x.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    K: Float[Array, "*batch T m n"]
    cost: Float[Array, "*batch"]
    multipliers: Any
    penalty: Any
    violation: Any
    search: SearchState
    result: RESULTS
    _past: Bool[Array, "*batch"]  # the plan begins a stage before the next tick
    _limits: tuple[Float[Array, "*batch T m"], ...]
    _x: Layout = eqx.field(static=True)
    _u: Layout = eqx.field(static=True)
    _has_gaps: bool = eqx.field(static=True)
    _manifold: Same | None = eqx.field(static=True)

    @property
    def policy(self) -> Policy:
        check_alone(self)
        us = jax.vmap(self._u.ravel)(self.us)
        return Policy(
            K=self.K,
            k=jnp.zeros_like(us),
            xs=jax.vmap(self._x.ravel)(self.xs)[:-1],
            us=us,
            _x=self._x,
            _u=self._u,
            _start=0,
            _limits=self._limits,
            _manifold=self._manifold and self._manifold.value,
        )


def check_alone(state: MPCState):
    """Raises for the states of many controllers."""
    if state.K.ndim != 3:
        raise ValueError(
            f"`state` holds a batch of shape {state.K.shape[:-3]}; the state of one "
            "controller is expected: map over it, `jax.vmap(controller)(xs, states)`."
        )


def later(state: MPCState, by: int) -> MPCState:
    """The plan some stages later; the last rows are repeated."""

    def rows(leaf):
        last = jnp.broadcast_to(leaf[-1:], (by, *leaf.shape[1:]))
        return jnp.concatenate([leaf[by:], last])

    move = ft.partial(jtu.tree_map, rows)
    duals = state.multipliers
    if duals is not None:
        duals = replace(duals, constraints=move(duals.constraints))
    trees = dict(xs=move(state.xs), us=move(state.us), K=move(state.K))
    return replace(state, **trees, multipliers=duals)


def check_state(state: Any):
    check_kind("state", state, MPCState, "controller.init(x0, us)")
    check_alone(state)
