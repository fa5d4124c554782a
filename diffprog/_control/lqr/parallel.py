"""The Riccati recursion, parallel in time: policy iteration.

A policy u = [k K] (1, x) turns the stages of `expand` into closed ones,

    (1, x') = Phi (1, x),  cost (1, x)' N (1, x) / 2,  V = N + Phi' V' Phi,

and two closed stages in a row are again a closed stage, with no inverse:

    (Phi1, N1), (Phi2, N2) -> (Phi2 Phi1, N1 + Phi1' N2 Phi1).

So `lax.associative_scan` evaluates a policy in O(log T) levels, and a Bellman step at
every stage, all at once, improves it. Why that is sound, whatever the first policy:

- The V of any policy is at least that of the best one. If the problem has a minimum,
  R + B'PB > 0 therefore holds for the V of every policy; V falls from policy to policy,
  its right digits double near the end, and after T policies it is exact. If for some
  policy R + B'PB > 0 does not hold, the problem has no minimum.
- V is accepted only if at every stage it agrees with the Bellman step from the V after
  the stage. Then it solves the sequential recursion for stage costs close by.
"""

import functools as ft
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array

from ..._common.linalg import matmul, symmetrize
from ..._common.loops import for_each, scan, while_loop
from ..._common.types import check_count
from .base import AbstractRiccati, bellman, summarize, Value


LOOKAHEAD = 8  # Bellman steps before the first policy, which then needs few successors


def with_state(gains: Array) -> Array:
    """(1, x, u) as a function of (1, x): [I; k K]."""
    return jnp.concatenate([jnp.eye(gains.shape[1], dtype=gains.dtype), gains])


def close(F: Array, W: Array, gains: Array) -> tuple[Array, Array]:
    """Phi and N of a stage under a policy."""
    policy = with_state(gains)
    return matmul(F, policy), symmetrize(matmul(policy.T, matmul(W, policy)))


def pull_back(Phi: Array, N: Array, V: Array) -> Array:
    """The cost-to-go before a closed stage, from that after it."""
    return symmetrize(N + matmul(Phi.T, matmul(V, Phi)))


def combine(later: tuple, earlier: tuple) -> tuple[Array, Array]:
    """Two closed stages as one."""
    (Phi2, N2), (Phi1, N1) = later, earlier
    return matmul(Phi2, Phi1), pull_back(Phi1, N1, N2)


def combine_affine(first: tuple, second: tuple) -> tuple[Array, Array]:
    """y'' = M2 (M1 y + f1) + f2 as one map."""
    (M1, f1), (M2, f2) = first, second
    return matmul(M2, M1), matmul(M2, f1) + f2


def affine_scan(M: Array, f: Array, start: Array, reverse: bool = False) -> Array:
    """y = M y' + f at every stage, y' being that of the stage before (or after) it."""
    first = -1 if reverse else 0
    maps = M, f.at[first].add(matmul(M[first], start))
    return lax.associative_scan(jax.vmap(combine_affine), maps, reverse=reverse)[1]


def evaluate(F: Array, W: Array, V: Array, gains: Array) -> Array:
    """The cost-to-go of a policy before every stage, from V after the last one."""
    Phi, N = jax.vmap(close)(F, W, gains)
    N = N.at[-1].set(pull_back(Phi[-1], N[-1], V))
    return lax.associative_scan(jax.vmap(combine), (Phi, N), reverse=True)[1]


def improve(F: Array, W: Array, after: Array, m: int) -> tuple[Array, ...]:
    """A Bellman step at every stage, from V after it."""
    zero = jnp.zeros((), F.dtype)
    step = lambda F, W, V: bellman(F, W, matmul(V, F), m, zero)
    return jax.vmap(step)(F, W, after)


def shift(rows: Array, last: Array) -> Array:
    """What comes after every stage, from what comes before them and after the last."""
    return jnp.concatenate([rows[1:], last[None]])


def first_gains(F: Array, W: Array, V: Array) -> Array:
    """The gains of a few Bellman steps from a guess of V that is rather too large.

    A stage where the step has no minimum keeps its controls at 0.
    """
    T, n, m = F.shape[0], V.shape[0], W.shape[1] - V.shape[0]
    sizes = jnp.max(jnp.sum(jnp.abs(W[:, 1:n, 1:]), 2), 0) + jnp.sum(jnp.abs(V[1:]), 1)
    guess = jnp.pad(jnp.diag(sizes + jnp.max(sizes) / 100), ((1, 0), (1, 0)))

    def step(_, carry):
        after = shift(carry[0], V)
        _, gains, _, positive = improve(F, W, after, m)
        gains = jnp.where(positive[:, None, None], gains, 0)
        return jax.vmap(pull_back)(*jax.vmap(close)(F, W, gains), after), gains

    start = jnp.broadcast_to(guess, (T, n, n)), jnp.zeros_like(W[:, n:, :n])
    return for_each(min(LOOKAHEAD, T), step, start, like=(F, W, V))[1]


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def policy_iteration(limit: int, F: Array, W: Array, V: Array) -> Array:
    """V before every stage; NaN if there is no minimum, or none within the limit."""
    tolerance, m = jnp.sqrt(jnp.finfo(F.dtype).eps), W.shape[1] - V.shape[0]
    diagonal = jax.vmap(jnp.diag)

    def iterate(carry):
        i, gains, _, was_close, _ = carry
        Vs = evaluate(F, W, V, gains)
        after = shift(Vs, V)
        before, gains, _, positive = improve(F, W, after, m)
        # Vs - before = (change of gains)' G (change of gains); all terms that add up
        # to Vs, without their signs, say how large rounding may make it.
        terms = jax.vmap(close)(jnp.abs(F), jnp.abs(W), jnp.abs(gains))
        size = jax.vmap(pull_back)(*terms, jnp.abs(after))
        agree = jnp.all(diagonal(Vs - before) <= tolerance * diagonal(size))
        positive = jnp.all(positive)
        # Once half of the digits are right, the next policy has all of them.
        done = ~positive | (agree & was_close)
        return i + 1, gains, Vs, agree & positive, done

    def unfinished(carry):
        i, *_, done = carry
        return ~done & (i < limit)

    no, Vs = jnp.asarray(False), jnp.zeros_like(W[:, : len(V), : len(V)])
    start = jnp.asarray(0), first_gains(F, W, V), Vs, no, no
    _, _, Vs, found, _ = while_loop(unfinished, iterate, start, like=(F, W, V))
    return jnp.where(found, Vs, jnp.nan)


@policy_iteration.defjvp
def _(limit, primals, tangents):
    # The best gains minimize V, so V changes as if they stayed: exact to every order,
    # because the gains are themselves functions of V.
    F, W, V = primals
    Vs = policy_iteration(limit, F, W, V)
    _, gains, *_ = improve(F, W, shift(Vs, V), W.shape[1] - V.shape[0])
    evaluated = lambda F, W, V: evaluate(F, W, V, gains)
    return Vs, jax.jvp(evaluated, primals, tangents)[1]


def by_chunks(fn, carry, stages, idle, chunk, reverse=False):
    """`carry, out = fn(carry, *stages)` on `chunk` stages at a time.

    The last part is filled up with the stage `idle`, which changes nothing.
    """
    T = stages[0].shape[0]
    if chunk is None or chunk >= T:
        return fn(carry, *stages)
    missing = -T % chunk

    def split(a, filler):
        filler = jnp.broadcast_to(filler, (missing, *filler.shape))
        a = jnp.concatenate([filler, a] if reverse else [a, filler])
        return a.reshape(-1, chunk, *a.shape[1:])

    def join(a):
        a = a.reshape(-1, *a.shape[2:])
        return a[missing:] if reverse else a[:T]

    parts = tuple(map(split, stages, idle))
    body = lambda carry, part: fn(carry, *part)
    carry, out = scan(body, carry, parts, reverse=reverse)
    return carry, jtu.tree_map(join, out)


class ParallelRiccati(AbstractRiccati):
    r"""The Riccati recursion over all stages at once, by policy iteration.

    An associative scan gives the cost-to-go of a policy $u = Kx + k$; a Bellman step at
    every stage then improves the policy:

    $$\Phi_t = A_t + B_t K_t, \quad P_t = \Phi_t^\top P_{t+1} \Phi_t
    + Q_t + M_t K_t + K_t^\top M_t^\top + K_t^\top R_t K_t,$$
    $$K_t \leftarrow -(R_t + B_t^\top P_{t+1} B_t)^{-1}
    (B_t^\top P_{t+1} A_t + M_t^\top),$$

    and likewise for the linear terms, until both agree at every stage. Roll-outs and
    costates are scans too. No R and no Q is inverted or factored: it solves what
    [`diffprog.Riccati`][] solves, the indefinite problems of [`diffprog.Newton`][]
    among them, and about as accurately, also in float32 with control costs near 0.

    - `chunk`: stages that are treated at once, from the last ones to the first; `None`
        is all of them. It bounds the memory of the scans and the time to compile. The
        scans multiply transition matrices, those of the costates without feedback: a
        chunk should be short enough that these products neither overflow nor, over
        thousands of stages in float32, lose digits. 256 is a good start.
    - `max_policies`: how many policies are evaluated at most, in each chunk. Two to
        eight are usual; without running cost it can take about $5 + \log_2 T$.

    Where $R + \nu I + B^\top P B$, with the damping $\nu$, is not positive definite for
    a policy there is no minimum. This, and `max_policies` that did not do, ends like a
    failed factorization: a solve raises the damping, and
    [`diffprog.solve_lqr`][] returns `factorization_failed`.

    A policy takes O(T (n + m)^3) time in O(log T) steps one after the other, and
    O(T (n + m)^2) memory. On a CPU this is 10 to 60 times slower than
    [`diffprog.Riccati`][] (measured). Differentiable to any order.

    Sources: Särkkä, García-Fernández, "Temporal Parallelisation of Dynamic Programming
    and Linear Quadratic Control", 2021, arXiv 2104.03186, for the scans over time.
    Hewer, "An iterative technique for the computation of the steady state gains for the
    discrete optimal regulator", 1971, for the iteration.
    """

    chunk: int | None = eqx.field(static=True, default=None)
    max_policies: int = eqx.field(static=True, default=64)

    sequential: ClassVar[bool] = False

    def __check_init__(self):
        check_count("chunk", 1 if self.chunk is None else self.chunk)
        check_count("max_policies", self.max_policies)

    def backward(self, chain, trajectory, model, damping):
        model = model.stored(chain, trajectory)
        if chain.has_gaps:
            raise ValueError(
                "`ParallelRiccati` takes no `xs`: it joins stages around the states of "
                "a roll-out, and knows no gaps between them. `dp.Riccati()` closes "
                "gaps."
            )
        if chain.limits:
            raise ValueError(
                "`ParallelRiccati` takes no `control_bounds`: it joins stages before "
                "it knows which controls are at a limit. `dp.Riccati()` keeps limits."
            )
        V = symmetrize(model.V)
        lam, rows = V[0], []
        for F, W, u in zip(model.F[::-1], model.W[::-1], trajectory.us[::-1]):
            m, n = u.shape[1], W.shape[1] - u.shape[1]
            W = symmetrize(W)
            lam, gradients = self.adjoint(F, W[:, 0], lam, m)
            penalty = jnp.pad(damping * jnp.eye(m, dtype=W.dtype), ((n, 0), (n, 0)))
            Vs, gains, change, positive = self.recursion(F, W + penalty[None], V, m)
            rows.append((gains, gradients, change, positive))
            V = Vs[0]
        gains, gradients, changes, positive = zip(*rows[::-1])
        positive = jnp.all(jnp.stack(positive))
        slope, curvature, squares = jnp.sum(jnp.stack(changes), 0)
        change = slope, curvature - damping * squares, squares  # W held the damping
        return summarize(gains, gradients, change, damping, positive)

    def values(self, lqr, scan):
        F, W, V = lqr.blocks()
        Vs, gains, _, positive = self.recursion(F, W, V, lqr.B.shape[2])
        Vs, gains = [jnp.where(positive, a, jnp.nan) for a in (Vs, gains)]
        Vs = jnp.concatenate([Vs, V[None]])
        value = Value(Vs[:, 1:, 1:], Vs[:, 0, 1:], Vs[:, 0, 0] / 2)
        return value, gains[:, :, 1:], gains[:, :, 0]

    def recursion(self, F, W, V, m):
        """V before every stage, gains, what they change, and if all have a minimum."""

        def part(V, F, W):
            after = V[None]
            if F.shape[0] > 1:
                after = shift(policy_iteration(self.max_policies, F, W, V), V)
            rows = improve(F, W, after.at[:, 0, 0].set(0), m)
            return rows[0][0], rows

        # x' = x at the cost u'u / 2
        controls = jnp.arange(W.shape[1]) >= W.shape[1] - m
        idle = jnp.eye(*F.shape[1:], dtype=F.dtype), jnp.diag(controls.astype(F.dtype))
        _, rows = by_chunks(part, V, (F, W), idle, self.chunk, reverse=True)
        Vs, gains, changes, positive = rows
        # Up to here the first entry of V is what the stage adds to the constant.
        constants = V[0, 0] + lax.cumsum(Vs[:, 0, 0], reverse=True)
        Vs = Vs.at[:, 0, 0].set(constants)
        return Vs, gains, jnp.sum(changes, 0), jnp.all(positive)

    def rollout(self, lqr, K, k, x0, scan):
        (F, _, _), gains = lqr.blocks(), jnp.concatenate([k[:, :, None], K], 2)

        def part(x, F, gains):
            M = jax.vmap(matmul)(F, jax.vmap(with_state)(gains))
            xs = affine_scan(M[:, 1:, 1:], M[:, 1:, 0], x)
            before = jnp.concatenate([x[None], xs[:-1]])
            us = jax.vmap(matmul)(gains[:, :, 1:], before) + gains[:, :, 0]
            return xs[-1], (before, us)

        idle = jnp.eye(*F.shape[1:], dtype=F.dtype), jnp.zeros_like(gains[0])
        last, (xs, us) = by_chunks(part, x0, (F, gains), idle, self.chunk)
        return jnp.concatenate([xs, last[None]]), us

    def adjoint(self, F, w, lam, m):
        """lam before the first stage, and the objective's gradient in every control.

        [lam gradient] = w + lam' F, with lam' after the stage and w = (q, r).
        """

        def part(lam, F, w):
            after, n = lam[None], len(lam)
            if F.shape[0] > 1:
                lams = affine_scan(F[:, :, :n].mT, w[:, :n], lam, reverse=True)
                after = shift(lams, lam)
            rows = w + jax.vmap(matmul)(after, F)
            before, gradients = jnp.split(rows, [F.shape[2] - m], 1)
            return before[0], gradients

        idle = jnp.eye(*F.shape[1:], dtype=F.dtype), jnp.zeros_like(w[0])
        return by_chunks(part, lam, (F, w), idle, self.chunk, reverse=True)
