"""Derivatives of a solution from the conditions that it satisfies."""

from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..._chain.vector import VectorChain
from ..._common.fast_loops import compiled, Loops
from ..._common.loops import while_loop
from ..._common.tree import no, where
from .base import AbstractAdjoint, connected, Found, refused, still, with_nan
from .conditions import (
    Active,
    conditions,
    localized,
    moved,
    Point,
    start,
)
from .linear import (
    backward,
    Factors,
    forward,
    Matrices,
    matrices,
    Pass,
    product,
    solve_linear,
)


MAX_STEPS = 5  # of Newton, to where the gradient is a rounding
ROUNDINGS = 16


class Judged(eqx.Module):
    """Whether derivatives at a point may be trusted, and why.

    - `residual`: the largest entry of the gradient of L, over the largest costate.
    - `positive`: whether every stage has a minimum.
    - `weak`: how many limits and rows are met without being pushed against.
    """

    residual: Float[Array, ""]
    positive: Bool[Array, ""]
    weak: Float[Array, ""]

    @property
    def is_stationary(self) -> Bool[Array, ""]:
        return self.residual <= jnp.sqrt(jnp.finfo(self.residual.dtype).eps)

    @property
    def is_good(self) -> Bool[Array, ""]:
        return self.positive & self.is_stationary & (self.weak == 0)


class Settled(eqx.Module):
    """A solution where its gradient is a rounding, and what is known there."""

    at: Point
    active: Active
    matrices: Matrices
    factors: Factors
    judged: Judged


class _Polish(eqx.Module):
    """The best point so far, with its residual, and where to look next.

    - `found`: of the last pass.
    - `back`: whether the next point is the best one, because the last was worse.
    """

    best: Point
    residual: Float[Array, ""]
    next: Point
    found: Pass
    count: Int[Array, ""]
    back: Bool[Array, ""]
    done: Bool[Array, ""]


class ImplicitAdjoint(AbstractAdjoint):
    r"""The derivatives of a stationary point, from the conditions that it satisfies.

    Where L is the Lagrangian, z all states, controls and multipliers, and
    $\theta$ the numbers of the problem,

    $$\nabla^2_{zz} L \, dz = -\partial_\theta \nabla_z L \, d\theta.$$

    One pass of the Riccati recursion with exact second derivatives solves this, in
    forward and in reverse mode, whatever the method of the solve was and however many
    iterations it took. Controls at a limit move with it. Rows of constraints that are
    active get the weight 1 / delta, with delta = eps^(3/8), and what that leaves is
    mended by repeating the solve. The derivative of the cost is that of L at the
    solution, and may be differentiated once more.

    Derivatives are found at the solution after at most five of Newton's steps, that
    bring the gradient to its rounding; the values are those of the solve. They are NaN
    unless the solve was successful, the gradient is small there, every stage has a
    minimum, and no limit or row is met without being pushed against, where the solution
    has a kink. See [`diffprog.check_gradient`][] for what is wrong.

    Takes the time of a few iterations of [`diffprog.DDP`][], and O(T (n + m)^2) memory.

    Source: Amos, Rodriguez, Sacks, Boots, Kolter, "Differentiable MPC for End-to-end
    Planning and Control", 2018, arXiv 1810.13400; with the Hessian of the Lagrangian in
    place of that of the cost.
    """

    on_unconverged: str = eqx.field(static=True, default="nan")
    refine: Any = eqx.field(static=True, default=1)

    replays: ClassVar[bool] = False

    def __check_init__(self):
        if self.on_unconverged not in ("nan", "accept"):
            raise ValueError(
                f"`on_unconverged` is {self.on_unconverged!r}; 'nan' or 'accept' is "
                "expected."
            )
        if isinstance(self.refine, bool) or not isinstance(self.refine, int):
            raise TypeError(f"`refine` is {self.refine!r}; a Python int is expected.")
        if self.refine < 0:
            raise ValueError(f"`refine` is {self.refine}; 0 or more is expected.")

    def connect(self, chain, x0, solved):
        known = solved.successful
        return connected(self._tangents, (chain, x0), solved.found, known)

    def without(self, chain, x0, rest):
        return with_nan(chain, x0, rest)

    def settled(self, data: tuple[VectorChain, Array], found: Found) -> Settled:
        """The solution after a few exact steps, where derivatives are found."""
        chain, x0 = still(data)

        def run(loops: Loops, chain, x0, found) -> Settled:
            return self._polished(replace(chain, loops=loops), x0, found)

        known = compiled(run, None, chain, x0, found)
        at = connected(self._moves, data, known.at, known)
        return replace(known, at=at)

    def _polished(self, chain, x0, found: Found) -> Settled:
        at, active, fresh = start(chain, found)
        eps = jnp.finfo(chain.dtype).eps

        def step(state: _Polish) -> _Polish:
            first, count = state.count == 0, state.count + 1
            found = backward(chain, x0, state.next, active, fresh & first)
            better = found.residual < state.residual
            residual = jnp.where(better, found.residual, state.residual)
            best = where(better, found.at, state.best)
            enough = (residual <= ROUNDINGS * eps) | (count > MAX_STEPS)
            # Where two roundings meet it does not matter whose matrices these are.
            no_worse = state.back | (found.residual <= jnp.sqrt(eps))
            done = jnp.where(better, enough, no_worse)

            def go() -> Point:
                known = found.matrices, found.factors, active, found.constants
                return moved(chain, found.at, forward(chain, *known), active)

            after = lax.cond(better & ~done, go, lambda: best)
            return _Polish(best, residual, after, found, count, ~better, done)

        zeros = lambda a: jnp.zeros(a.shape, a.dtype)
        like = jax.eval_shape(lambda: backward(chain, x0, at, active, fresh))
        nothing = jtu.tree_map(zeros, like)
        far, count = jnp.full_like(found.cost, jnp.inf), jnp.zeros((), jnp.int32)
        first = _Polish(at, far, at, nothing, count, no(far), no(far))
        go_on = lambda state: ~state.done
        end = while_loop(go_on, step, first, like=at)
        factors = end.found.factors
        judged = Judged(end.residual, factors.positive, active.weak)
        return Settled(end.best, active, end.found.matrices, factors, judged)

    def _moves(self, of, numbers, dots, at: Point, known: Settled) -> Point:
        """How the solution moves."""
        change = self._change(of, numbers, dots, replace(known, at=at))[0]
        zero = jtu.tree_map(jnp.zeros_like, change)
        step = lambda change: moved(of(numbers)[0], at, change, known.active)
        return jax.jvp(step, (zero,), (change,))[1]

    def _change(self, of, numbers, dots, known: Settled) -> tuple[Point, Array]:
        """The change of the solution in local coordinates, and that of L without it."""
        at, active = known.at, known.active

        def found(numbers):
            chain, x0 = of(numbers)
            found = conditions(chain, x0, at, active)
            return found.value, found.left

        _, (value, left) = jax.jvp(found, (numbers,), (dots,))
        value, left = refused((value, left), ~self._trusted(known.judged))
        vector, unravel = ravel_pytree(left)
        flat = lambda tree: ravel_pytree(tree)[0]
        chain = of(numbers)[0]
        refine = self.refine if chain.names else 0  # without rows nothing is left over
        new, quiet = matrices(chain, at, active), still(chain)
        times = lambda z: flat(product(chain, new, active, unravel(z)))

        def run(loops: Loops, chain, matrices, factors, active, b):
            chain = replace(chain, loops=loops)
            return solve_linear(chain, matrices, factors, active, b, refine)

        def solve(_, b):
            given = known.matrices, known.factors, active, unravel(b)
            return flat(compiled(run, None, quiet, *given))

        change = lax.custom_linear_solve(times, vector, solve, symmetric=True)
        return unravel(change), value

    def _trusted(self, judged: Judged) -> Bool[Array, ""]:
        return judged.positive if self.on_unconverged == "accept" else judged.is_good

    def _tangents(self, of, numbers, dots, found: Found, successful) -> Found:
        known = self.settled(of(numbers), still(found))
        if self.on_unconverged == "nan":
            positive = known.judged.positive & successful
            known = replace(known, judged=replace(known.judged, positive=positive))
        at, active = known.at, known.active
        change, cost = self._change(of, numbers, dots, known)

        def answers(numbers, change):
            chain, x0 = of(numbers)
            new = moved(chain, at, change, active)
            out = replace(found, xs=new.xs, final=new.final, us=new.us)
            if found.duals is not None:
                duals = replace(found.duals, stages=new.rows, terminal=new.end)
                out = replace(out, duals=duals)
            if found.costates is None:
                return out
            z = jtu.tree_map(jnp.add, localized(chain, at)[1], change)
            gradients = conditions(chain, x0, at, active, z).us
            return replace(out, costates=(new.first, new.lams), gradients=gradients)

        zero = jtu.tree_map(jnp.zeros_like, change)
        _, out = jax.jvp(answers, (numbers, zero), (dots, change))
        return replace(out, cost=cost)


ImplicitAdjoint.__init__.__doc__ = """**Arguments:**

- `on_unconverged`: "nan", or "accept" to take derivatives also where they may be wrong;
    a row that is met without being pushed against then counts as inactive. Where a
    stage has no minimum they are NaN all the same.
- `refine`: how often the solve is repeated with what it left over, where there are
    constraints.
"""
