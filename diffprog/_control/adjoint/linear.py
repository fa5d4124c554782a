"""The linear system of the conditions of optimality: one backward pass, cheap solves.

Its unknowns are changes of states, controls, costates and multipliers. A row that is
active, C dx + D du = b, is given the weight 1 / delta, so that dy = (C dx + D du - b) /
delta, and what is left of it is found by repeating the solve with what is left over.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from ..._chain.vector import following, preceding, VectorChain
from ..._common.linalg import matmul, solve_positive, symmetrize
from ..._common.tree import vary
from ..._common.types import Rows, Stacks
from ..lqr.expand import curved, linear, terminal
from .conditions import Active, combined, localized, masked, Point, size_of


def delta(dtype) -> float:
    """The inverse weight of an active row."""
    return float(jnp.finfo(dtype).eps) ** (3 / 8)


class Matrices(eqx.Module):
    """The Hessian of L, where controls that are held and inactive rows are left out.

    - `AB`, `H`, `CD`: derivatives of the dynamics, second ones of the Hamiltonian, and
        derivatives of the rows, of every stage.
    - `last`, `end`: H and CD of the last state.

    A pass leaves out H where there are no rows: only they make a solve repeat itself.
    """

    AB: Stacks
    H: tuple[Any, ...]
    CD: tuple[Any, ...]
    last: Float[Array, "n n"]
    end: Any


class Factors(eqx.Module):
    """What the recursion leaves of them.

    - `K`, `inverses`: gains, and G^-1 with G = R + B'PB.
    - `P`: of the cost-to-go after each stage; `first` before the first one.
    - `positive`: whether every G was positive definite.
    """

    K: Stacks
    inverses: Stacks
    P: Stacks
    first: Float[Array, "n n"]
    positive: Bool[Array, ""]


class Constants(eqx.Module):
    """What the recursion leaves of a right-hand side, for the way forward.

    - `k`, `p`: of the controls, and of the costates after each stage.
    - `first`: of the first costate.
    - `start`, `gaps`, `rows`, `end`: of the first state, the dynamics and the rows.
    """

    k: Rows
    p: Rows
    first: Float[Array, " n"]
    start: Float[Array, " n"]
    gaps: Rows
    rows: tuple[Any, ...]
    end: Any


class Pass(eqx.Module):
    """What a backward pass finds at a point.

    - `at`: the point, with its costates.
    - `matrices`, `factors`: of the linear system there.
    - `constants`: of its right-hand side, which is minus the gradient of L.
    - `residual`: the largest entry of that, over one more than the largest costate.
    """

    at: Point
    matrices: Matrices
    factors: Factors
    constants: Constants
    residual: Float[Array, ""]


def _stage(segment, u, t, lam, on, held):
    """F, W and the matrices of a stage; a held control has the identity."""
    v = jnp.zeros(segment.chart.size, u.dtype)
    n, z = len(v), jnp.concatenate([v, u])
    F, W = linear(segment, v, u, t), curved(segment, v, u, t, lam)
    AB, H, CD = F[1:, 1:], symmetrize(W[1:, 1:]), None
    if segment.rows is not None:
        values = lambda z: segment.rows.values(z[:n], z[n:], t)
        CD = jnp.where(on[:, None], jax.jacfwd(values)(z), 0)
    if held is not None:
        free = jnp.concatenate([jnp.ones(n, bool), ~held])
        AB = jnp.where(free[None], AB, 0)
        one = jnp.diag((~free).astype(H.dtype))
        H = jnp.where(free[None] & free[:, None], H, one)
        CD = CD if CD is None else jnp.where(free[None], CD, 0)
    return F, W, (AB, H, CD)


def _last(chain: VectorChain, x: Array, active: Active):
    """V, H and CD of the last state."""
    V, end = terminal(chain, x, exact=True), None
    if chain.end.rows is not None:
        end = jnp.where(active.end[:, None], jax.jacfwd(chain.end.rows.values)(x), 0)
    return V, symmetrize(V[1:, 1:]), end


def matrices(chain: VectorChain, at: Point, active: Active) -> Matrices:
    """Those at a point."""
    local, here = localized(chain, at)
    data = here.us, local.ts, here.lams, active.rows, active.held
    AB, H, CD = _by_kind(local.map(lambda *row: _stage(*row)[2], *data))
    return Matrices(AB, H, CD, *_last(local, here.final, active)[1:])


def product(chain: VectorChain, of: Matrices, active: Active, d: Point) -> Point:
    """The Hessian times a change; the identity in what is left out."""

    def stage(segment, v, u, before, lam, v_next, y, AB, H, CD, on):
        n, z = len(v), jnp.concatenate([v, u])
        Hz = matmul(H, z) + matmul(AB.T, lam)
        if CD is not None:
            Hz, y = Hz + matmul(CD.T, y), matmul(CD, z) + jnp.where(on, 0, y)
        return Hz[:n] - before, Hz[n:], matmul(AB, z) - v_next, y

    after = following(d.xs, d.final)
    data = d.xs, d.us, preceding(d.first, d.lams), d.lams, after, d.rows
    found = chain.map(stage, *data, of.AB, of.H, of.CD, active.rows)
    xs, us, lams, rows = zip(*found, strict=True)
    final, end = matmul(of.last, d.final) - d.lams[-1][-1], None
    if of.end is not None:
        final = final + matmul(of.end.T, d.end)
        end = matmul(of.end, d.final) + jnp.where(active.end, 0, d.end)
    return Point(xs, final, us, -d.xs[0][0], lams, rows, end)


def _sent(CD, b, on) -> Array:
    """What the right-hand side of rows adds to that of x and u."""
    return matmul(CD.T, jnp.where(on, b, 0)) / delta(b.dtype)


def _multipliers(values, b, on) -> Array:
    """dy of rows, given C dx + D du."""
    return jnp.where(on, (values - b) / delta(b.dtype), b)


def _weighted(H, CD) -> Array:
    """H with the active rows in it."""
    return H if CD is None else H + matmul(CD.T, CD) / delta(H.dtype)


def _eliminated(n, P, AB, H, CD):
    """P before a stage of n states, the gains, G^-1, and whether G is positive."""
    Z = _weighted(H, CD) + matmul(AB.T, matmul(P, AB))
    G, H = Z[n:, n:], Z[n:, :n]
    eye = jnp.eye(len(G), dtype=G.dtype)
    solved, good = solve_positive(G, jnp.concatenate([eye, -H], 1))
    inverse, K = solved[:, : len(G)], solved[:, len(G) :]
    return symmetrize(Z[:n, :n] + matmul(H.T, K)), K, inverse, good


def _substituted(p, P, AB, K, inverse, CD, b_x, b_u, b_lam, b_rows, on):
    """p before a stage, and k."""
    n, qr = len(b_x), -jnp.concatenate([b_x, b_u])
    qr = qr if CD is None else qr - _sent(CD, b_rows, on)
    g = p - matmul(P, b_lam)
    h = qr[n:] + matmul(AB[:, n:].T, g)
    return qr[:n] + matmul(AB[:, :n].T, g) + matmul(K.T, h), -matmul(inverse, h)


def backward(
    chain: VectorChain, x0: Array, at: Point, active: Active, fresh: Bool[Array, ""]
) -> Pass:
    """One pass from the last stage to the first, at a point.

    Where it is `fresh` its costates are those of its states and controls.
    """
    local, here = localized(chain, at)

    def stage(segment, carry, u, t, before, on, held):
        (P, p), lam, positive, sizes = carry
        F, W, (AB, H, CD) = _stage(segment, u, t, lam, on, held)
        n, slope, rows = len(before), W[0, 1:] + matmul(lam, F[1:, 1:]), segment.rows
        before = jnp.where(fresh, slope[:n], before)
        b_u = -slope[n:] if held is None else jnp.where(held, 0, -slope[n:])
        v, gap = jnp.zeros_like(before), -F[1:, 0]
        b = before - slope[:n], b_u, gap, masked(rows and -rows.values(v, u, t), on)
        P_new, K, inverse, good = _eliminated(n, P, AB, H, CD)
        p_new, k = _substituted(p, P, AB, K, inverse, CD, *b, on)
        sizes = jtu.tree_map(jnp.maximum, sizes, (size_of(b), size_of(lam)))
        new, H = ((P_new, p_new), before, positive & good, sizes), H if known else None
        return new, (lam, (AB, H, CD), (K, inverse, P), (k, p), b[2:])

    known = bool(chain.names)  # what repeats a solve
    V, H, CD = _last(local, here.final, active)
    rows, start = local.end.rows, chain.segments[0].difference(x0, at.xs[0][0])
    end = masked(rows and -rows.values(here.final), active.end)
    lam = jnp.where(fresh, V[0, 1:], here.lams[-1][-1])
    final = lam - V[0, 1:]
    p = -final if CD is None else -final - _sent(CD, end, active.end)
    sizes = size_of((final, start, end)), jnp.zeros_like(start[0])
    carry = (_weighted(H, CD), p), lam, jnp.isfinite(H[0, 0]), sizes
    data = here.us, local.ts, preceding(here.first, here.lams), active.rows, active.held
    carry, found = local.scan(stage, vary(carry, like=at), *data, reverse=True)
    lams, *kinds = zip(*found, strict=True)
    (ABs, Hs, CDs), (K, inverses, Ps), (k, p), (gaps, rows) = map(_by_kind, kinds)
    (P, first), before, positive, (largest, costate) = carry
    return Pass(
        replace(at, first=before, lams=lams),
        Matrices(ABs, Hs, CDs, H, CD),
        Factors(K, inverses, Ps, P, positive),
        Constants(k, p, first, start, gaps, rows, end),
        largest / (1 + jnp.maximum(costate, size_of(before))),
    )


def _by_kind(segments):
    """Of each kind a row per segment."""
    return tuple(zip(*segments, strict=True))


def substitute(
    chain: VectorChain, of: Matrices, factors: Factors, active: Active, b: Point
) -> Constants:
    """The pass for one right-hand side more."""

    def stage(segment, p, P, *row):
        new, k = _substituted(p, P, *row)
        return new, (k, p)

    p = -b.final
    if of.end is not None:
        p = p - _sent(of.end, b.end, active.end)
    known = factors.P, of.AB, factors.K, factors.inverses, of.CD
    data = *known, b.xs, b.us, b.lams, b.rows, active.rows
    first, found = chain.scan(stage, vary(p, like=b), *data, reverse=True)
    k, p = _by_kind(found)
    return Constants(k, p, first, -b.first, b.lams, b.rows, b.end)


def forward(
    chain: VectorChain,
    of: Matrices,
    factors: Factors,
    active: Active,
    b: Constants,
) -> Point:
    """The change whose product with the weighted Hessian is the right-hand side."""

    def stage(segment, v, k, p, gap, AB, K, P, CD, b_rows, on):
        u = matmul(K, v) + k
        z = jnp.concatenate([v, u])
        new = matmul(AB, z) - gap
        y = None if CD is None else _multipliers(matmul(CD, z), b_rows, on)
        return new, (v, u, matmul(P, new) + p, y)

    data = b.k, b.p, b.gaps, of.AB, factors.K, factors.P, of.CD, b.rows, active.rows
    final, found = chain.scan(stage, b.start, *data)
    xs, us, lams, ys = _by_kind(found)
    end = None
    if of.end is not None:
        end = _multipliers(matmul(of.end, final), b.end, active.end)
    first = matmul(factors.first, b.start) + b.first
    return Point(xs, final, us, first, lams, ys, end)


def solve_linear(
    chain: VectorChain,
    of: Matrices,
    factors: Factors,
    active: Active,
    b: Point,
    refine: int,
) -> Point:
    """The change whose product is b, refined so many times."""
    known = chain, of, factors, active
    once = lambda b: forward(*known, substitute(*known, b))
    found = once(b)
    for _ in range(refine):
        left = combined(chain, jnp.subtract, b, product(chain, of, active, found))
        found = combined(chain, jnp.add, found, once(left))
    return found
