"""Derivatives of a solution through the iterations that found it."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from ..._chain.vector import run
from ..._common.types import check_count
from .base import AbstractAdjoint, connected, Found, refused, Solved, with_nan


class UnrolledAdjoint(AbstractAdjoint):
    """The derivatives of what the iterations do, converged or not.

    They are run once more, with their step sizes and dampings held constant, and
    differentiated. At a converged solution that is what
    [`diffprog.ImplicitAdjoint`][] finds in less time; before, it is the derivative of
    the iterate. The first guess has none.

    NaN where the second run does not end where the first did: after steps along
    negative curvature, and where the best iterate was not the last. Limits of controls,
    constraints and first states that are given raise `ValueError`.

    Takes a few times the time of all iterations, and memory for an iterate of each.
    """

    checkpoints: Any = eqx.field(static=True, default=None)

    replays: ClassVar[bool] = True

    def __check_init__(self):
        if self.checkpoints is not None:
            check_count("checkpoints", self.checkpoints)

    def connect(self, chain, x0, solved):
        if chain.limits or chain.names:
            raise ValueError(
                "`dp.UnrolledAdjoint()` takes neither limits of controls nor "
                "constraints, whose active set its iterations look for: use "
                "`dp.ImplicitAdjoint()`."
            )
        if solved.with_states:
            raise ValueError(
                "`dp.UnrolledAdjoint()` takes no first guess of the states: leave `xs` "
                "out, or use `dp.ImplicitAdjoint()`."
            )
        return connected(self._tangents, (chain, x0), solved.found, solved)

    def without(self, chain, x0, rest):
        return with_nan(chain, x0, rest)

    def _tangents(self, of, numbers, dots, found: Found, solved: Solved) -> Found:
        again = lambda numbers: self._replayed(of(numbers), solved)
        new, out = jax.jvp(again, (numbers,), (dots,))
        tol = jnp.sqrt(jnp.finfo(found.cost.dtype).eps)
        far = [
            jnp.any(~(jnp.abs(a - b) <= tol * (1 + jnp.abs(a))))
            for a, b in zip(jtu.tree_leaves(new), jtu.tree_leaves(found), strict=True)
        ]
        return refused(out, jnp.any(jnp.stack(far)))

    def _replayed(self, data, solved: Solved) -> Found:
        chain, x0 = data

        def iterate(trajectory, row):
            stepsize, damping = row
            local, at = chain.around(trajectory)
            expansion = solved.method.expand(local, at)
            sweep = solved.method.backward(local, at, expansion.model, damping)
            model = expansion.model
            return solved.method.forward(chain, trajectory, model, sweep, stepsize)[0]

        @jax.checkpoint
        def step(trajectory, row):
            went = lambda: iterate(trajectory, row)
            stay = lambda: trajectory
            return lax.cond(jnp.isfinite(row[0]), went, stay), None

        trajectory, rows = run(chain, x0, solved.us), solved.history
        count = len(rows[0])
        parts = min(self.checkpoints or count, count)
        width = math.ceil(count / parts)
        none = jnp.full(parts * width - count, jnp.nan, chain.dtype)
        whole = [jnp.concatenate([a, none]).reshape(parts, width) for a in rows]
        part = jax.checkpoint(lambda at, rows: lax.scan(step, at, rows))
        end, _ = lax.scan(part, trajectory, tuple(whole))
        return Found(end.xs, end.final, end.us, end.cost)


UnrolledAdjoint.__init__.__doc__ = """**Arguments:**

- `checkpoints`: of so many iterations the iterate is kept, and those between are run
    again; `None` keeps all. About the square root of the number of iterations needs the
    least memory.
"""
