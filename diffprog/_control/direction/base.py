import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int

from ..._chain.segment import Segment
from ..._chain.vector import first_false, VectorChain, VectorTrajectory
from ..._common.tree import all_finite, norm
from ..._common.types import AbstractPart, check_answer, Rows, shapes, Stacks
from ..lqr import Sweep
from ..lqr.expand import (
    adjoints,
    curved,
    linear,
    Recomputed,
    second_derivatives,
    Stored,
    terminal,
    WithTensors,
)
from .rollouts import AbstractRollout


class Expansion(eqx.Module):
    """A local model and what is known of it before any backward pass.

    - `model`: any pytree of floating arrays.
    - `cost_gradient`: norm of the costs' gradient in all states and controls.
    - `first_nonfinite`: stage of the first derivative that is not finite, else T + 1.
    """

    model: Any
    cost_gradient: Float[Array, ""]
    first_nonfinite: Int[Array, ""]


GAPS = (
    " It has gaps between states: give `dp.extend.simulate` what is left of them, "
    "`gaps=trajectory.left(chain, stepsize)`."
)


class AbstractDirection(AbstractPart):
    """The rule that flows backward through a chain.

    `expand` builds a local model, `backward` turns it into gains, and `forward` rolls
    them out at a step size.

    - `rollout`: how `forward` does it, such as [`diffprog.Feedback`][].
    """

    rollout: eqx.AbstractClassVar[AbstractRollout]

    @abc.abstractmethod
    def expand(self, chain: VectorChain, trajectory: VectorTrajectory) -> Expansion:
        """The local model around a trajectory."""

    @abc.abstractmethod
    def backward(
        self,
        chain: VectorChain,
        trajectory: VectorTrajectory,
        model: Any,
        damping: Float[Array, ""],
    ) -> Sweep:
        """One pass from the last stage to the first."""

    def forward(
        self,
        chain: VectorChain,
        trajectory: VectorTrajectory,
        model: Any,
        sweep: Sweep,
        stepsize: Float[Array, ""],
    ) -> tuple[VectorTrajectory, Rows]:
        """The trajectory of u + v at `stepsize` s, and v of every stage."""
        if chain.limits and not self.rollout.keeps_limits:
            raise ValueError(
                f"`{type(self.rollout).__name__}` does not keep the limits of the "
                "controls; `dp.Feedback()` does."
            )
        found = self.rollout.roll(chain, trajectory, model, sweep.gains, stepsize)
        like = shapes((trajectory, trajectory.us))
        if not isinstance(found, tuple) or shapes(found) != like:
            raise TypeError(
                f"`{type(self.rollout).__name__}.roll` returned {shapes(found):.200}; "
                f"a trajectory and v of every stage, {like:.200}, are expected."
                + (trajectory.gaps and GAPS or "")
            )
        return found


# The second derivatives of f are stored up to so many for a stage; above that each pass
# finds those of p'f again, which are n times fewer. Accelerators find all stages' at
# once, but not those of a pass from stage to stage.
MAX_TENSOR, MAX_TENSOR_ELSEWHERE = 256, 1 << 15


def check_expansion(method: AbstractDirection, expansion: Any):
    """Raises for what `expand` must not return."""
    numbers = dict(cost_gradient=jnp.floating, first_nonfinite=jnp.integer)
    check_answer(method, "expand", expansion, Expansion, **numbers)


def check_sweep(method: AbstractDirection, at: VectorTrajectory, sweep: Any):
    """Raises for what `backward` must not return: gains that do not fit, say."""
    names = "slope", "curvature", "decrement", "gradient"
    numbers = dict.fromkeys(names, jnp.floating)
    check_answer(method, "backward", sweep, Sweep, **numbers, positive=jnp.bool_)
    sizes = zip(at.xs, at.us, strict=True)
    expected = tuple((*u.shape, 1 + x.shape[1]) for x, u in sizes)
    if jtu.tree_map(jnp.shape, sweep.gains) != expected:
        raise ValueError(
            f"`{type(method).__name__}.backward` returned gains of shape "
            f"{shapes(sweep.gains):.200}; [k K] of every stage, one array for each "
            f"segment of the chain, {expected!s:.200}, are expected."
        )


def linear_quadratic(
    chain: VectorChain,
    trajectory: VectorTrajectory,
    *,
    weights: Rows | None = None,
    second_order: bool = False,
    stored: bool = False,
) -> Expansion:
    """Linear dynamics and quadratic costs: the model that a Riccati recursion takes.

    With `weights` (a row w_t per stage) the Hessians are those of h_t + w_t' f_t; with
    `second_order` the weights are the gradients p_{t+1} that the recursion itself
    finds. The model has all its F and W at hand where they are `stored`, or given
    weights ask for it; else they may be found again by each pass, where that is faster.
    """
    data = (trajectory.xs, trajectory.us, chain.ts)
    exact = second_order or weights is not None
    V, T = terminal(chain, trajectory.final, exact), jnp.int32(chain.horizon)
    again = chain.recomputes or (second_order and _is_large(trajectory))
    if again and weights is None and not stored:
        norms = chain.map(cost_gradient, *data)
        first = jnp.where(all_finite(V), T + 1, T)
        model = Recomputed(V, second_order=second_order)
        return Expansion(model, norm(norms, V[0]), first)

    def stage(segment, x, u, t, *weight):
        F = linear(segment, x, u, t)
        W = curved(segment, x, u, t, *weight, exact=second_order)
        more = (second_derivatives(segment, x, u, t),) if second_order else ()
        # A costate passes what is not finite down to all earlier W: look at the
        # gradient (q_t, r_t) of the cost first.
        source, second = all_finite(F, W[0]), all_finite(W, *more)
        return (F, W, *more), norm(W[0]), source, second

    weighted = () if weights is None else (weights,)
    rows = zip(*chain.map(stage, *data, *weighted), strict=True)
    blocks, norms, source, second = rows
    first = first_false(chain, source, all_finite(V[0]))
    late = first_false(chain, second, all_finite(V))
    F, W, *tensors = zip(*blocks, strict=True)
    kind = WithTensors if tensors else Stored
    model = kind(V, F, W, *tensors, symmetric=(W, *tensors))
    return Expansion(model, norm(norms, V[0]), jnp.where(first > T, late, first))


def _is_large(trajectory: VectorTrajectory) -> bool:
    """Whether the second derivatives of f are too many to be stored."""
    sizes = zip(trajectory.xs, trajectory.us, strict=True)
    counts = [x.shape[1] * (x.shape[1] + u.shape[1]) ** 2 for x, u in sizes]
    on_cpu = jax.default_backend() == "cpu"
    return max(counts) > (MAX_TENSOR if on_cpu else MAX_TENSOR_ELSEWHERE)


def cost_gradient(segment: Segment, x: Array, u: Array, t: Array) -> Array:
    """The norm of the gradient of a stage's cost."""
    return norm(jax.grad(segment.cost, (0, 1))(x, u, t))


def gradients(chain: VectorChain, trajectory: VectorTrajectory) -> Expansion:
    """The gradient of the objective in every control: the model of first order."""
    _, lams, found = adjoints(chain, trajectory)
    costs = chain.map(cost_gradient, trajectory.xs, trajectory.us, chain.ts)
    last = jax.grad(chain.terminal_cost)(trajectory.final)
    # What is not finite travels down from its stage: the last one is the source.
    late = lambda _, t, *row: jnp.where(all_finite(row), -1, t)
    stages = jnp.concatenate(chain.map(late, chain.ts, lams, found))
    source, T = jnp.max(stages), chain.horizon
    first = jnp.where(source < 0, T + 1, source).astype(jnp.int32)
    return Expansion(found, norm(costs, last), first)


def feedforward(trajectory: VectorTrajectory, k: Rows) -> Stacks:
    """Gains [k K] without feedback."""
    pairs = zip(k, trajectory.xs, strict=True)
    return tuple(
        jnp.concatenate([k[:, :, None], jnp.zeros((*k.shape, x.shape[1]), x.dtype)], 2)
        for k, x in pairs
    )
