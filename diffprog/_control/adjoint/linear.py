"""The linear system of the conditions of optimality: one factorization, cheap solves.

Its unknowns are changes of states, controls, costates and multipliers. A row that is
active, C dx + D du = b, is given the weight 1 / delta, so that dy = (C dx + D du - b) /
delta, and what is left of it is found by repeating the solve with what is left over.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from ..._chain.vector import following, VectorChain
from ..._common.linalg import matmul, solve_positive, symmetrize
from ..._common.tree import vary
from ..._common.types import Stacks
from ..lqr.expand import curved, linear
from .conditions import Active, localized, Point


def delta(dtype) -> float:
    """The inverse weight of an active row."""
    return float(jnp.finfo(dtype).eps) ** (3 / 8)


class Factors(eqx.Module):
    """What the recursion leaves of the matrices of all stages.

    - `AB`: derivatives of the dynamics, those in held controls 0.
    - `K`, `inverses`: gains, and G^-1 with G = R + B'PB.
    - `P`: of the cost-to-go after each stage; `first` before the first one.
    - `CD`, `last`: derivatives of the rows, 0 where they are inactive.
    - `positive`: whether every G was positive definite.
    """

    AB: Stacks
    K: Stacks
    inverses: Stacks
    P: Stacks
    first: Float[Array, "n n"]
    CD: tuple[Array | None, ...]
    last: Array | None
    positive: Bool[Array, ""]


def factorize(chain: VectorChain, at: Point, active: Active) -> Factors:
    """A backward pass with the Hessian of the Lagrangian in controls that are free."""
    local, here = localized(chain, at)
    none = (None,) * len(chain.segments)
    held = none
    if active.lower:
        held = tuple(map(jnp.logical_or, active.lower, active.upper))
    weight = 1 / delta(chain.dtype)

    def derivatives(segment, v, u, t, lam, held, on):
        n, z = len(v), jnp.concatenate([v, u])
        AB = linear(segment, v, u, t)[1:, 1:]
        H = symmetrize(curved(segment, v, u, t, lam)[1:, 1:])
        CD = None
        if segment.rows is not None:
            values = lambda z: segment.rows.values(z[:n], z[n:], t)
            CD = jnp.where(on[:, None], jax.jacfwd(values)(z), 0)
            H = H + weight * matmul(CD.T, CD)
        if held is not None:
            free = jnp.concatenate([jnp.ones(n, bool), ~held])
            AB = jnp.where(free, AB, 0)
            one = jnp.diag((~free).astype(H.dtype))
            H = jnp.where(free & free[:, None], H, one)
            CD = CD if CD is None else jnp.where(free, CD, 0)
        return AB, H, CD

    def stage(segment, carry, AB, H):
        P, positive = carry
        n = segment.chart.size
        Z = H + matmul(AB.T, matmul(P, AB))
        G, H = Z[n:, n:], Z[n:, :n]
        eye = jnp.eye(len(G), dtype=G.dtype)
        solved, good = solve_positive(G, jnp.concatenate([eye, -H], 1))
        inverse, K = solved[:, : len(G)], solved[:, len(G) :]
        new = symmetrize(Z[:n, :n] + matmul(H.T, K))
        return (new, positive & good), (K, inverse, P)

    data = here.xs, here.us, local.ts, here.lams, held, active.rows
    AB, H, CD = zip(*local.map(derivatives, *data), strict=True)
    slope = jax.grad(local.terminal_cost)
    P, last = symmetrize(jax.jacfwd(slope)(here.final)), None
    if local.end.rows is not None:
        last = jax.jacfwd(local.end.rows.values)(here.final)
        last = jnp.where(active.end[:, None], last, 0)
        P = P + weight * matmul(last.T, last)
    start = vary((P, jnp.isfinite(P[0, 0])), like=(H, P))
    (first, positive), found = chain.scan(stage, start, AB, H, reverse=True)
    K, inverses, P = zip(*found, strict=True)
    return Factors(AB, K, inverses, P, first, CD, last, positive)


def solve_once(
    chain: VectorChain, factors: Factors, active: Active, b: Point
) -> Point:
    """The change whose product with the weighted Hessian is b."""
    small = delta(chain.dtype)

    def to_multipliers(values, b, on):
        """dy of rows, given C dx + D du."""
        return None if on is None else jnp.where(on, (values - b) / small, b)

    def sent(CD, b, on):
        """What the right-hand side of rows adds to that of x and u."""
        return matmul(CD.T, jnp.where(on, b, 0)) / small

    def back(segment, p, qr, b_lam, AB, K, inverse, P, CD, b_rows, on):
        n = segment.chart.size
        qr = -qr if CD is None else -qr - sent(CD, b_rows, on)
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

    join = lambda x, u: jnp.concatenate([x, u], 1)
    qr = tuple(map(join, b.xs, b.us))
    rows = factors.CD, b.rows, active.rows
    p, last = -b.final, factors.last
    if last is not None:
        p = p - sent(last, b.end, active.end)
    common = b.lams, factors.AB, factors.K
    data = qr, *common, factors.inverses, factors.P, *rows
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
    factors: Factors,
    active: Active,
    product: Callable[[Point], Point],
    b: Point,
    refine: int,
) -> Point:
    """The change whose `product` is b, refined so many times."""
    minus = lambda a, b: jtu.tree_map(jnp.subtract, a, b)
    found = solve_once(chain, factors, active, b)
    for _ in range(refine):
        more = solve_once(chain, factors, active, minus(b, product(found)))
        found = jtu.tree_map(jnp.add, found, more)
    return found
