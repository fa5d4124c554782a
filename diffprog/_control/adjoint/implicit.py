"""Derivatives of a solution from the conditions that it satisfies."""

from dataclasses import replace
from typing import Literal as OneOf

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..._chain.vector import VectorChain
from ..._common.tree import no, vary, where
from .base import AbstractAdjoint, connected, Found, refused, still
from .conditions import (
    Active,
    active_at,
    gradient,
    lagrangian,
    localized,
    moved,
    Point,
    point_of,
)
from .linear import Factors, factorize, solve_linear


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


class Settled(eqx.Module):
    """A solution where its gradient is a rounding, and what is known there."""

    at: Point
    active: Active
    factors: Factors
    judged: Judged


class _Polish(eqx.Module):
    at: Point
    size: Float[Array, ""]
    factors: Factors  # of the point before
    count: Int[Array, ""]
    done: Bool[Array, ""]


class ImplicitAdjoint(AbstractAdjoint):
    on_unconverged: OneOf["nan", "accept"] = eqx.field(static=True, default="nan")
    refine: int = eqx.field(static=True, default=1)

    def connect(self, chain, x0, found, good):
        return connected(self._tangents, (chain, x0), found, good)

    def settled(self, data: tuple[VectorChain, Array], found: Found) -> Settled:
        """The solution after a few exact steps, where derivatives are found."""
        chain, x0 = still(data)
        start, gradients = point_of(chain, found, found.duals)
        active = active_at(chain, start, gradients)
        polished = self._polished(chain, x0, start, active)
        sizes = [jnp.max(jnp.abs(a)) for a in jtu.tree_leaves(polished.at.lams)]
        residual = polished.size / (1 + jnp.max(jnp.stack(sizes)))
        positive = polished.factors.positive
        judged = Judged(residual, positive, active.weak)
        known = Settled(polished.at, active, polished.factors, judged)
        at = connected(self._moves, data, polished.at, known)
        return replace(known, at=at)

    def _polished(self, chain, x0, start: Point, active: Active) -> _Polish:
        """Newton's steps, of which the last may be one too many."""
        measure = lambda slope: jnp.max(jnp.abs(ravel_pytree(slope)[0]))

        def step(state: _Polish) -> _Polish:
            factors = factorize(chain, state.at, active)
            slope, times = _linearized(chain, x0, state.at, active)
            known = chain, factors, active
            minus = jtu.tree_map(jnp.negative, slope)
            change = solve_linear(*known, times, minus, self.refine)
            at = active.held(chain, moved(chain, state.at, change))
            new = gradient(chain, x0, at, active)
            size = measure(new)
            better = size < state.size
            at, size = where(better, (at, size), (state.at, state.size))
            scale = 1 + measure((at.first, at.lams))
            small = size <= ROUNDINGS * jnp.finfo(chain.dtype).eps * scale
            return _Polish(at, size, factors, state.count + 1, ~better | small)

        start = active.held(chain, start)
        size = measure(gradient(chain, x0, start, active))
        factors = jtu.tree_map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(lambda: factorize(chain, start, active)),
        )
        count = jnp.zeros((), jnp.int32)
        first = vary(_Polish(start, size, factors, count, no(size)), like=start)
        goes_on = lambda state: ~state.done & (state.count < MAX_STEPS)
        return lax.while_loop(goes_on, step, first)

    def _moves(self, of, numbers, dots, at: Point, known: Settled) -> Point:
        """How the solution moves."""
        change = self._change(of, numbers, dots, replace(known, at=at))[0]
        return _along(lambda z: moved(of(numbers)[0], at, z), change)

    def _change(self, of, numbers, dots, known: Settled) -> tuple[Point, Array]:
        """The change of the solution in local coordinates, and that of L without it."""
        at, active = known.at, known.active

        def conditions(numbers):
            chain, x0 = of(numbers)
            value = lambda z: lagrangian(chain, x0, at, active, z)
            return jax.value_and_grad(value)(localized(chain, at)[1])

        _, (value, slope) = jax.jvp(conditions, (numbers,), (dots,))
        value, slope = refused((value, slope), ~self._trusted(known.judged))
        vector, unravel = ravel_pytree(jtu.tree_map(jnp.negative, slope))
        flat = lambda tree: ravel_pytree(tree)[0]
        chain, x0 = of(numbers)
        _, times = _linearized(chain, x0, at, active)
        _, times_still = _linearized(*still((chain, x0, at)), active)
        given = still(chain), known.factors, active, times_still

        def solve(_, b):
            return flat(solve_linear(*given, unravel(b), self.refine))

        product = lambda z: flat(times(unravel(z)))
        found = lax.custom_linear_solve(product, vector, solve, symmetric=True)
        return unravel(found), value

    def _trusted(self, judged: Judged) -> Bool[Array, ""]:
        if self.on_unconverged == "accept":
            return judged.positive
        return judged.positive & judged.is_stationary & (judged.weak == 0)

    def _tangents(self, of, numbers, dots, found: Found, good) -> Found:
        data = of(numbers)
        known = self.settled(data, still(found))
        if self.on_unconverged == "nan":
            positive = known.judged.positive & good
            known = replace(known, judged=replace(known.judged, positive=positive))
        at, active = known.at, known.active
        change, cost = self._change(of, numbers, dots, known)
        free = replace(active, lower=(), upper=())

        def answers(numbers, change):
            chain, x0 = of(numbers)
            new = active.held(chain, moved(chain, at, change))
            out = replace(found, xs=new.xs, final=new.final, us=new.us)
            if found.duals is not None:
                duals = replace(found.duals, stages=new.rows, terminal=new.end)
                out = replace(out, duals=duals)
            if found.costates is None:
                return out
            here = localized(chain, at)[1]
            z = active.held(chain, jtu.tree_map(jnp.add, here, change))
            value = lambda us: lagrangian(chain, x0, at, free, replace(z, us=us))
            gradients = jax.grad(value)(z.us)
            return replace(out, costates=(new.first, new.lams), gradients=gradients)

        zero = jtu.tree_map(jnp.zeros_like, change)
        _, out = jax.jvp(answers, (numbers, zero), (dots, change))
        return replace(out, cost=cost)


def _along(fn, change: Point):
    """The derivative of `fn` at no change along one."""
    return jax.jvp(fn, (jtu.tree_map(jnp.zeros_like, change),), (change,))[1]


def _linearized(chain: VectorChain, x0: Array, at: Point, active: Active):
    """The gradient of L at a point, and the product of its Hessian with a change."""
    slope = jax.grad(lambda z: lagrangian(chain, x0, at, active, z))
    value, times = jax.linearize(slope, localized(chain, at)[1])
    return value, lambda z: jtu.tree_map(jnp.add, times(z), active.fixed(z))
