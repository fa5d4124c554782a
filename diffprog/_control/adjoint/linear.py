"""The linear system of the conditions of optimality: one factorization, cheap solves.

Its unknowns are changes of states, controls, costates and multipliers. A row that is
active, C dx + D du = b, is given the weight 1 / delta, so that dy = (C dx + D du - b) /
delta, and what is left of it is found by repeating the solve with what is left over.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..._chain.vector import following, preceding, VectorChain
from ..._common.linalg import matmul, solve_positive, symmetrize
from ..._common.tree import vary
from ..._common.types import Stacks
from ..lqr.expand import curved, linear, terminal
from .conditions import Active, combined, localized, Point


def delta(dtype) -> float:
    """The inverse weight of an active row."""
    return float(jnp.finfo(dtype).eps) ** (3 / 8)


class Matrices(eqx.Module):
    """The Hessian of L, where controls that are held and inactive rows are left out.

    - `AB`, `H`, `CD`: derivatives of the dynamics, second ones of the Hamiltonian, and
        derivatives of the rows, of every stage.
    - `last`, `end`: H and CD of the last state.
    """

    AB: Stacks
    H: Stacks
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


def matrices(chain: VectorChain, at: Point, active: Active) -> Matrices:
    """Those at a point; a held control has a row and a column of the identity."""
    local, here = localized(chain, at)
    held = (None,) * len(chain.segments)
    if active.lower:
        held = tuple(map(jnp.logical_or, active.lower, active.upper))

    def stage(segment, v, u, t, lam, held, on):
        n, z = len(v), jnp.concatenate([v, u])
        AB = linear(segment, v, u, t)[1:, 1:]
        H = symmetrize(curved(segment, v, u, t, lam)[1:, 1:])
        CD = None
        if segment.rows is not None:
            values = lambda z: segment.rows.values(z[:n], z[n:], t)
            CD = jnp.where(on[:, None], jax.jacfwd(values)(z), 0)
        if held is not None:
            free = jnp.concatenate([jnp.ones(n, bool), ~held])
            AB = jnp.where(free[None], AB, 0)
            one = jnp.diag((~free).astype(H.dtype))
            H = jnp.where(free[None] & free[:, None], H, one)
            CD = CD if CD is None else jnp.where(free[None], CD, 0)
        return AB, H, CD

    data = here.xs, here.us, local.ts, here.lams, held, active.rows
    AB, H, CD = zip(*local.map(stage, *data), strict=True)
    last = symmetrize(terminal(local, here.final, exact=True)[1:, 1:])
    end = None
    if local.end.rows is not None:
        end = jax.jacfwd(local.end.rows.values)(here.final)
        end = jnp.where(active.end[:, None], end, 0)
    return Matrices(AB, H, CD, last, end)


def factorize(chain: VectorChain, of: Matrices) -> Factors:
    """A backward pass over the matrices."""
    weight = 1 / delta(chain.dtype)
    weighted = lambda H, CD: H if CD is None else H + weight * matmul(CD.T, CD)

    def stage(segment, carry, AB, H, CD):
        P, positive = carry
        n = segment.chart.size
        Z = weighted(H, CD) + matmul(AB.T, matmul(P, AB))
        G, H = Z[n:, n:], Z[n:, :n]
        eye = jnp.eye(len(G), dtype=G.dtype)
        solved, good = solve_positive(G, jnp.concatenate([eye, -H], 1))
        inverse, K = solved[:, : len(G)], solved[:, len(G) :]
        new = symmetrize(Z[:n, :n] + matmul(H.T, K))
        return (new, positive & good), (K, inverse, P)

    P = weighted(of.last, of.end)
    start = vary((P, jnp.isfinite(P[0, 0])), like=of)
    data = of.AB, of.H, of.CD
    (first, positive), found = chain.scan(stage, start, *data, reverse=True)
    K, inverses, P = zip(*found, strict=True)
    return Factors(K, inverses, P, first, positive)


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


def _solve_once(
    chain: VectorChain, of: Matrices, factors: Factors, active: Active, b: Point
) -> Point:
    """The change whose product with the weighted Hessian is b."""
    small = delta(chain.dtype)

    def to_multipliers(values, b, on):
        """dy of rows, given C dx + D du."""
        return jnp.where(on, (values - b) / small, b)

    def sent(CD, b, on):
        """What the right-hand side of rows adds to that of x and u."""
        return matmul(CD.T, jnp.where(on, b, 0)) / small

    def back(segment, p, b_x, b_u, b_lam, AB, K, inverse, P, CD, b_rows, on):
        n, qr = len(b_x), -jnp.concatenate([b_x, b_u])
        qr = qr if CD is None else qr - sent(CD, b_rows, on)
        g = p - matmul(P, b_lam)
        h = qr[n:] + matmul(AB[:, n:].T, g)
        new = qr[:n] + matmul(AB[:, :n].T, g) + matmul(K.T, h)
        return new, (-matmul(inverse, h), p)

    def forth(segment, v, k, p, b_lam, AB, K, P, CD, b_rows, on):
        u = matmul(K, v) + k
        z = jnp.concatenate([v, u])
        new = matmul(AB, z) - b_lam
        y = None if CD is None else to_multipliers(matmul(CD, z), b_rows, on)
        return new, (v, u, matmul(P, new) + p, y)

    rows = of.CD, b.rows, active.rows
    p, last = -b.final, of.end
    if last is not None:
        p = p - sent(last, b.end, active.end)
    common = b.lams, of.AB, factors.K
    data = b.xs, b.us, *common, factors.inverses, factors.P, *rows
    p, found = chain.scan(back, vary(p, like=b), *data, reverse=True)
    k, ps = zip(*found, strict=True)
    start = -b.first
    data = k, ps, *common, factors.P, *rows
    final, found = chain.scan(forth, start, *data)
    xs, us, lams, ys = zip(*found, strict=True)
    end = None
    if last is not None:
        end = to_multipliers(matmul(last, final), b.end, active.end)
    first = matmul(factors.first, start) + p
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
    found = _solve_once(*known, b)
    for _ in range(refine):
        left = combined(chain, jnp.subtract, b, product(chain, of, active, found))
        found = combined(chain, jnp.add, found, _solve_once(*known, left))
    return found
