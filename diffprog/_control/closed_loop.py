"""A controller and a plant in a loop."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._chain.calls import call, check_dtype
from .._chain.manifold import local_difference, local_retraction
from .._common.door import door
from .._common.loops import scan
from .._common.result import RESULTS
from .._common.tree import add, normal_like, strong
from .._common.types import (
    check_count,
    check_function,
    check_key,
    check_kind,
    is_number,
    shapes,
    to_float,
    with_other_names,
)
from .mpc import MPC
from .plan import check_state, MPCState


class Simulation(eqx.Module):
    """A closed loop that [`diffprog.simulate`][] has run.

    - `xs`: states of the plant, `steps` + 1 rows.
    - `us`: controls, a row for each tick.
    - `costs`: the cost of the plan of each tick, NaN where it fell back to the one
        before.
    - `results`: a [`diffprog.RESULTS`][] code of each tick.
    - `state`: that of the controller after the last tick.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    costs: Float[Array, "*batch steps"]
    results: RESULTS
    state: MPCState


_NOT_IN_SIMULATE = dict(horizon="`steps` is the number of ticks")


def _measured(manifold: Any, x: PyTree, noise: PyTree, key: PRNGKeyArray) -> PyTree:
    """A state with normal noise, on a manifold in its local coordinates."""
    if manifold is None:
        like, moved = x, lambda v: add(x, v)
    else:
        like = local_difference(manifold, x, x)
        moved = lambda v: local_retraction(manifold, x, v)
    v = normal_like(key, like)
    if is_number(noise) and not jnp.ndim(noise):
        noise = jtu.tree_map(lambda _: noise, v)
    given, expected = map(jtu.tree_structure, (noise, v))
    if given != expected:
        raise ValueError(
            f"`noise` is arranged as {given}; one number, or a tree like the state, "
            f"{expected}, is expected."
        )
    scaled = lambda v, size: v * jnp.broadcast_to(jnp.asarray(size, v.dtype), v.shape)
    return moved(jtu.tree_map(scaled, v, noise))


@door
def _simulated(
    controller: MPC, plant: Callable, x0: PyTree, state, noise, key, steps: int
) -> tuple:
    def tick(carry, row):
        (x, state), (t, own) = carry, row
        measured = x
        if noise is not None:
            measured = _measured(controller.problem.manifold, x, noise, own)
        u, state = controller(measured, state)
        new = call("plant", plant, x, u, t)
        check_dtype("plant", plant, new, jtu.tree_leaves(x)[0].dtype)
        if shapes(new) != shapes(x):
            raise ValueError(
                f"`plant` returned a state with the shapes {shapes(new):.200}; that of "
                f"`x0`, {shapes(x):.200}, is expected."
            )
        new = jtu.tree_map(lambda a, b: jnp.asarray(a, b.dtype), new, x)
        return (new, state), (x, u, state.cost, state.result)

    rows = jnp.arange(steps, dtype=jnp.int32), None
    if noise is not None:
        rows = rows[0], jax.random.split(key, steps)
    (last, state), (xs, *found) = scan(tick, (x0, state), rows)
    xs = jtu.tree_map(lambda a, b: jnp.concatenate([a, b[None]]), xs, last)
    return xs, *found, state


@with_other_names(_NOT_IN_SIMULATE)
def simulate(
    controller: MPC,
    plant: Callable,
    x0: PyTree,
    steps: int,
    noise: PyTree = None,
    key: PRNGKeyArray | None = None,
    *,
    state: MPCState | None = None,
) -> Simulation:
    r"""Runs a controller in closed loop: one compiled loop over all ticks.

    $$u_t = \text{controller}(x_t + \text{noise} \cdot \epsilon_t), \qquad
    x_{t+1} = \text{plant}(x_t, u_t, t), \qquad \epsilon_t \sim N(0, I)$$

    **Arguments:**

    - `controller`: a [`diffprog.MPC`][].
    - `plant`: `(x, u, t) -> x`, with t the int32 index of the tick. It may differ from
        the model in the controller: other numbers, disturbances of its own (random ones
        from `jax.random.fold_in(key, t)`), or finer steps inside.
    - `x0`: the first state, shape `(n,)` or any pytree of floating arrays.
    - `steps`: the number of ticks; a Python int.
    - `noise`: the standard deviation of what is measured, in the units of the state:
        one number, or a tree like the state; on a manifold like its local coordinates.
        The plant itself has none. Unless given the controller sees the state.
    - `key`: of `jax.random`, for the noise.
    - `state`: of the controller, to begin with; `controller.init(x0)` unless given.

    **Returns:** a [`diffprog.Simulation`][]. No tick raises: look at its `results`.
    Under `jax.vmap` many robots run at once, each with its x0, state, key and numbers.

    **Fails:** `ValueError` or `TypeError` at once for a wrong call.
    """
    check_kind("controller", controller, MPC, "dp.MPC(problem, dp.ILQR())")
    check_function("plant", plant, "(x, u, t) -> x")
    check_count("steps", steps)
    if noise is not None:
        if key is None:
            raise ValueError(
                "`noise` needs a `key`, such as `jax.random.key(0)`, and none is given."
            )
        check_key(key)
    (x0,), _ = strong(x0)
    state = controller.init(x0) if state is None else state
    check_state(state)
    noise = jtu.tree_map(to_float, noise)
    found = _simulated(
        controller, plant, x0, replace(state, _manifold=None), noise, key, steps
    )
    xs, us, costs, results, last = found
    last = replace(last, _manifold=state._manifold)
    return Simulation(xs, us, costs, results, last)
