import functools as ft
from dataclasses import replace
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..._chain.limits import projected
from ..._common.door import door
from ..._common.fast_loops import compiled, FastLoopsError, Loops, scan
from ..._common.linalg import matmul, solve_positive, symmetrize
from ..._common.result import explain, RESULTS, throw_unless_successful
from ..._common.straight import MAX_MOVED
from ..._common.tree import Layout, vary
from ..._common.types import came
from .base import (
    AbstractRiccati,
    bellman,
    float_array,
    LQR,
    LQRSolution,
    NEVER,
    summarize,
    Sweep,
    Value,
)
from .policy import Policy


class Riccati(AbstractRiccati):
    """The Riccati recursion from stage to stage: the default.

    Takes O(T (n + m)^3) time and O(T (n + m)^2) memory. Every stage needs
    R + damping I + B'PB positive definite, and nothing else.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """

    sequential: ClassVar[bool] = True

    def backward(self, chain, trajectory, model, damping):
        """The backward pass from the last V; the adjoint rides along for the gradient.

        A pass without a minimum leaves a direction of negative curvature at the last
        stage that has none.
        """

        def stage(segment, carry, x, u, t, *row):
            # The costate lam is one more row below V; with gaps, so is the slope.
            rows, total, positive, first = carry
            limits, row = row[:limited], row[limited:]
            p = rows[0, 1:]
            if chain.has_gaps:  # far from a roll-out p says little of the dynamics
                p = jnp.where(jnp.any(segment.dynamics(x, u, t) != 0), 0, p)
            F, W = model.stage(segment, p, x, u, t, *row)
            product, n = matmul(rows, F), F.shape[0]
            terms = F, W, product[:n], len(u), damping, positive
            box = tuple(limit - u for limit in limits)
            V, gains, change, positive = bellman(*terms, box)
            lam = W[0] + product[n]  # and the gradient in u
            slope = ()
            if chain.has_gaps:
                line = W[0] + product[n + 1]
                slope = ((line[: len(V)] + matmul(line[len(V) :], gains))[None],)
            if not model.is_checked:
                # What is not finite in F or W spreads to V, so that V tells where they
                # are not: from a stage that failed the pass goes on with V = 0.
                finite = jnp.all(jnp.isfinite(jnp.sum(V, 0)))
                first, positive = jnp.where(finite, first, t), positive & finite
                V, *slope = (jnp.where(positive, rows, 0) for rows in (V, *slope))
            rows = jnp.concatenate([V, lam[None, : len(V)], *slope])
            gradient = projected(lam[len(V) :], u, *limits)
            return (rows, total + change, positive, first), (gains, gradient)

        def unless_failed(segment, carry, x, u, *row):
            """The stage, or no step if the pass has given up."""
            none = jnp.zeros_like(u, shape=(len(u), 1 + len(x))), jnp.zeros_like(u)
            find = lambda: stage(segment, carry, x, u, *row)
            left = lambda: (carry, vary(none, like=carry))
            return lax.cond(carry[2] | ~model.gives_up, find, left)

        V = symmetrize(model.V)
        more = [V[:1]] * (2 if chain.has_gaps else 1)
        last, finite = jnp.concatenate([V, *more]), jnp.isfinite(V[0, 0])
        start = last, jnp.zeros(3, V.dtype), finite, jnp.asarray(NEVER)
        start = vary(start, like=trajectory)
        limited = len(chain.limits)
        data = (trajectory.xs, trajectory.us, chain.ts, *chain.limits, *model.rows)
        # Small bodies are straight lines, of which nothing can be left out.
        large = chain.loops != "plain" and 2 * V.size > MAX_MOVED
        step = unless_failed if large and model.gives_up is not False else stage
        (V, *sums), rows = chain.scan(step, start, *data, reverse=True)
        gains, gradients = zip(*rows, strict=True)
        change, positive, first = sums
        found = gains, gradients, change, damping, positive, first
        sweep = summarize(*found, bool(limited), chain.duals is not None)
        return across_gaps(sweep, change, V) if chain.has_gaps else sweep

    def values(self, lqr, scan):
        """`bellman` with the terms of a stage apart.

        The blocks would have to be copied together first, and loops over n columns are
        faster than over n + 1 for the usual even n.
        """

        def stage(value, terms):
            (P, p, constant), (A, B, c, Q, R, M, q, r) = value, terms
            PA, PB, g = matmul(P, A), matmul(P, B), p + matmul(P, c)
            H, h = M.T + matmul(B.T, PA), r + matmul(B.T, g)
            hH = jnp.concatenate([h[:, None], H], 1)
            G = symmetrize(R) + matmul(B.T, PB)  # P is symmetrized below, so Q need not
            gains, positive = solve_positive(G, -hH)
            gains = jnp.where(positive, gains, jnp.nan)
            k, K = gains[:, 0], gains[:, 1:]
            constant = constant + (matmul(c, g + p) + matmul(h, k)) / 2
            P = symmetrize(Q + matmul(A.T, PA) + matmul(H.T, K))
            value = P, q + matmul(A.T, g) + matmul(H.T, k), constant
            return value, (value, K, k)

        last = symmetrize(lqr.Q_final), lqr.q_final, jnp.zeros_like(lqr.q_final[0])
        _, (values, K, k) = scan(stage, last, lqr.stages, True)
        join = lambda rows, last: jnp.concatenate([rows, last[None]])
        return Value(*map(join, values, last)), K, k

    def rollout(self, lqr, K, k, x0, scan):
        def stage(x, row):
            A, B, c, K, k = row
            u = matmul(K, x) + k
            return matmul(A, x) + matmul(B, u) + c, (x, u)

        rows = (lqr.A, lqr.B, lqr.c, K, k)
        last, (xs, us) = scan(stage, x0, rows, False)
        return jnp.concatenate([xs, last[None]]), us


def across_gaps(sweep: Sweep, change: Array, rows: Array) -> Sweep:
    """With the slope and curvature of a step that also closes gaps.

    At s = 1 the model changes by half the constant of V. Of that, limits of controls
    leave h'k + k'Gk / 2 where it has h'k / 2.
    """
    slope, along = rows[-1, 0], change[0]
    whole = rows[0, 0] / 2 + (along + sweep.curvature) / 2
    return replace(sweep, slope=slope, curvature=2 * (whole - slope))


def _solved(
    lqr: LQR, x0: Float[Array, " n"], method: AbstractRiccati, loops: Loops
) -> LQRSolution:
    n = lqr.B.shape[1]
    if x0.shape != (n,):
        raise ValueError(f"`x0` has shape {x0.shape}; ({n},) is expected.")
    loop = ft.partial(scan, loops=loops)
    value, K, k = method.values(lqr, loop)
    xs, us = method.rollout(lqr, K, k, x0, loop)
    layouts = Layout.of(x0, x0.dtype), Layout.of(us[0], x0.dtype)
    policy = Policy(K, k, jnp.zeros_like(xs[:-1]), jnp.zeros_like(us), *layouts, 0)
    P, p, constant = value.P[0], value.p[0], value.constant[0]
    cost = matmul(x0, matmul(P, x0)) / 2 + matmul(p, x0) + constant
    # A stage without a minimum has NaN for gains, and so has every value before it.
    failed = RESULTS.factorization_failed
    result = RESULTS.where(jnp.isfinite(cost), RESULTS.successful, failed)
    return LQRSolution(xs, us, cost, policy, value, result)


@door
def _solve_lqr(lqr, x0, method, fast_loops) -> LQRSolution:
    solved = lambda loops, lqr, x0: _solved(lqr, x0, method, loops)
    if fast_loops is False:
        return compiled(solved, False, lqr, x0)
    return solved("forced" if fast_loops else "apart", lqr, x0)


def solve_lqr(
    lqr: LQR,
    x0: Float[Array, " n"],
    *,
    method: AbstractRiccati = Riccati(),
    throw: bool = True,
    fast_loops: bool | None = None,
) -> LQRSolution:
    r"""Solves a linear-quadratic problem by the Riccati recursion.

    $$G = R + B^\top P B, \; K = -G^{-1}(B^\top P A + M^\top), \;
    k = -G^{-1}(r + B^\top (p + P c)).$$

    **Arguments:**

    - `lqr`: the problem.
    - `x0`: the first state, shape `(n,)`.
    - `method`: how the recursion is run: [`diffprog.Riccati`][] from stage to stage,
        or [`diffprog.ParallelRiccati`][] over all stages at once.
    - `throw`: raise [`diffprog.SolveError`][] when the problem has no minimum and all
        inputs are concrete.
    - `fast_loops`: `None` compiles each loop into one function on the CPU where that is
        known to work; `False` never does, `True` raises where it is not possible.

    **Returns:** a [`diffprog.LQRSolution`][]. Its `result` is `factorization_failed`,
    and its numbers are not finite, where some G is not positive definite.

    Takes O(T (n + m)^3) time and O(T (n + m)^2) memory. Differentiable.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """
    if not isinstance(lqr, LQR):
        raise TypeError(f"`lqr` is a {type(lqr).__name__}; a `dp.LQR` is expected.")
    if not isinstance(method, AbstractRiccati):
        raise TypeError(
            f"`method` is {came(method)}; `dp.Riccati()` or "
            "`dp.ParallelRiccati()` is expected."
        )
    if fast_loops and not method.sequential:
        raise FastLoopsError(
            f"`fast_loops=True` is not possible with `{type(method).__name__}`, which "
            "takes all stages at once: use `dp.Riccati()`."
        )
    x0 = float_array("x0", x0, lqr.A)
    solution = _solve_lqr(lqr, x0, method, fast_loops)
    return throw_unless_successful(solution.result, solution, throw, _explain)


def _explain(solution: LQRSolution) -> str:
    failed = jnp.flatnonzero(~jnp.all(jnp.isfinite(solution.policy.k), 1))
    where = f"At stage {failed[-1]} it is R + B'PB. " if len(failed) else ""
    advice = (
        "Raise `R`, lower what `Q` and `Q_final` reward, and look for terms that are "
        "not finite."
    )
    return explain(solution.result, dict(factorization_failed=where + advice))
