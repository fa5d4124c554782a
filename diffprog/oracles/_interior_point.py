r"""A primal-dual interior point method for prox-linear models.

With J = B U', where U has orthonormal columns, and d = U e, the model is one in e:

    P(e) = c sum_i l_i(z_i) + damping |e|^2 / 2,  z = f + B e.

It is least where alpha_i is a gradient of l_i at z_i, and damping e + c B' alpha = 0.
Nothing is divided by the damping, but for the gap:

    P - D = c sum_i (l_i(z_i) + l_i*(alpha_i) - <alpha_i, z_i>)
            + |damping e + c B' alpha|^2 / 2 damping.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from jaxtyping import Array, PyTree

from .._common.inner import tree_size
from .._common.linalg import matmul
from .._common.loops import while_loop
from .._common.tree import add, all_finite, cast_like, Layout, scale, vdot, where
from .._common.types import came, positive_int
from ..losses import AbstractBoundedLoss, AbstractDomain, Squared
from ..losses._interior import Inside, Missing
from ._base import Linearization
from ._model_solver import AbstractModelSolver, fenchel, Found
from ._solvers import Cholesky


PATIENCE = 10  # steps without a smaller gap: it is lost in rounding


class InteriorPoint(AbstractModelSolver):
    r"""A primal-dual interior point method: its work does not grow as damping falls.

    For losses with kinks, in themselves or in their gradients, such as `Absolute`,
    `Euclidean`, `Hinge`, `Huber` and the sparse `FLoss`es. Ten to twenty steps of
    Newton's method for any gap; each solves a system with the matrix
    $\lambda I + \frac1m B^\top W B$, where $J = B U^\top$ with orthonormal columns U
    and W tends to the Hessians of the losses.

    B has as many columns as there are parameters, or outputs in the batch, whichever
    are fewer: memory mk times that. It is J, or a square root of J J', which is found
    as by [`diffprog.oracles.Cholesky`][]; then what J does by less than the root of the
    rounding is lost.

    Without matrices it would be slow: the entries of W tend to 0 and to infinity, and
    the iterations of conjugate gradients grow with their ratio.

    - `max_steps`: the most steps.
    - `batch_size`: products with J computed at a time.

    Fails with a `TypeError` for a loss without a
    [`domain`][diffprog.losses.AbstractBoundedLoss].

    Source: Mehrotra, "On the Implementation of a Primal-Dual Interior Point Method",
    1992, for the choice of t; Andersen, Christiansen, Conn, Overton, "An Efficient
    Primal-Dual Interior-Point Method for Minimizing a Sum of Euclidean Norms", 2000.
    """

    max_steps: int = positive_int(60)
    batch_size: int = positive_int(64)

    def minimize(self, at, damping, gap):
        domain = domain_of(at)
        if domain is None:
            raise TypeError(
                f"`InteriorPoint` is given the loss {came(at.loss)}; one with kinks, "
                "such as `dp.losses.Huber()`, is expected: `NewtonSteps()` is for the "
                "smooth ones, and `CoordinateAscent()` for one of your own."
            )
        B, lift = coordinates(at, self.batch_size)
        reduced = Reduced(at, damping, B, domain)
        reached = lambda seen: seen.left <= gap * (at.value - seen.P + seen.left)
        # z may be -inf
        finite = lambda seen: all_finite(seen.e, seen.inside, seen.left)

        def unfinished(carry):
            count, seen, _, last, good = carry
            on = (count < self.max_steps) & (count - last < PATIENCE)
            return on & good & ~reached(seen)

        def step(carry):
            count, seen, best, last, _ = carry
            seen = reduced.step(seen)
            better = (seen.left < best.left) | reached(seen)
            last = jnp.where(better, count, last)
            best = where(better, seen, best)
            return count + 1, seen, best, last, finite(seen)

        e = jnp.zeros(B.shape[-1], B.dtype)
        seen, zero = reduced.look(e, domain.start(at.outputs)), jnp.zeros((), jnp.int32)
        start = zero, seen, seen, zero, finite(seen)
        count, _, best, _, _ = while_loop(unfinished, step, start)
        # The gap anew: that of the step itself, not of its coordinates.
        d, alpha = lift(best.e), best.inside.alpha
        z = at.outputs + at.mv(d)
        r = add(scale(at.weight, at.transpose_mv(alpha)), d, damping)
        losses = at.loss(z, at.targets)
        left = fenchel(at, losses, z, alpha) + vdot(r, r) / (2 * damping)
        return Found(d, z, left, count, jnp.isfinite(left))


class Seen(NamedTuple):
    """A point, and what is known there.

    - `e`, `z`: the step in coordinates, and the linearized outputs.
    - `inside`: alpha and the multipliers.
    - `r`: damping e + c B' alpha.
    - `P`, `left`: the model, and P - D.
    """

    e: Array
    z: Array
    inside: Inside
    r: Array
    P: Array
    left: Array


class Reduced(NamedTuple):
    """The model in coordinates."""

    at: Linearization
    damping: Array
    B: Array  # (examples, ..., number)
    domain: AbstractDomain

    def product(self, e: Array) -> Array:
        """B e."""
        flat = self.B.reshape(-1, self.B.shape[-1])
        return matmul(flat, e).reshape(self.at.outputs.shape)

    def pull(self, alpha: Array) -> Array:
        """c B' alpha."""
        flat = self.B.reshape(-1, self.B.shape[-1])
        return self.at.weight * matmul(flat.T, jnp.ravel(alpha))

    def look(self, e: Array, inside: Inside) -> Seen:
        at, z = self.at, self.at.outputs + self.product(e)
        r = self.damping * e + self.pull(inside.alpha)
        losses = at.loss(z, at.targets)
        P = at.weight * jnp.sum(losses) + self.damping * jnp.vdot(e, e) / 2
        left = fenchel(at, losses, z, inside.alpha)
        left = left + jnp.vdot(r, r) / (2 * self.damping)
        return Seen(e, z, inside, r, P, left)

    def step(self, seen: Seen) -> Seen:
        """One step for t = 0, to see how far t can fall, and the one that is made."""
        domain, inside = self.domain, seen.inside
        solve = self.newton(seen)
        lack = domain.missing(inside, seen.z)
        mean = domain.mean(lack.products)
        de, change = solve(lack)
        a = jnp.minimum(1, 0.99 * domain.longest(inside, change))
        there = add(inside, change, a)
        then = domain.missing(there, seen.z + a * self.product(de))
        t = mean * jnp.minimum(domain.mean(then.products) / mean, 1) ** 3
        # All that is linear falls by 1 - a: the rest is curved, and is taken off too.
        lack = jtu.tree_map(lambda new, old: old + new - (1 - a) * old, then, lack)
        lack = lack._replace(products=tuple(p - t for p in lack.products))
        de, change = solve(lack)
        a = jnp.minimum(1, 0.99 * domain.longest(inside, change))
        return self.look(seen.e + a * de, add(inside, change, a))

    def newton(self, seen: Seen) -> Callable[[Missing], tuple[Array, Inside]]:
        """Newton's step for what is missing, as a function: one factorization.

        (damping I + c B' W B) de = -(r + c B' W g),  dalpha = W (B de + g).
        """
        domain, inside = self.domain, seen.inside
        R = domain.root(inside)
        W = lambda v: R.mv(R.transpose_mv(v))
        n = self.B.shape[-1]
        RB = jax.vmap(R.transpose_mv, -1, -1)(self.B).reshape(-1, n)
        diagonal = self.damping + self.at.weight * jnp.sum(RB**2, 0)
        size = 1 / jnp.sqrt(diagonal)
        scaled = RB * (size * jnp.sqrt(self.at.weight))[None]
        M = matmul(scaled.T, scaled) + jnp.diag(self.damping * size**2)
        M = M + 4 * jnp.finfo(M.dtype).eps * jnp.eye(n, dtype=M.dtype)
        L = cho_factor(M, lower=True)

        def solve(lack):
            g = domain.pull(inside, lack)
            b = -size * (seen.r + self.pull(W(g)))
            x = cho_solve(L, b)
            # One refinement, without the digits that M has lost.
            Mx = matmul(scaled.T, matmul(scaled, x)) + self.damping * size**2 * x
            de = size * (x + cho_solve(L, b - Mx))
            return de, domain.push(inside, W(self.product(de) + g), lack)

        return solve


def coordinates(
    at: Linearization, batch_size: int
) -> tuple[Array, Callable[[Array], PyTree]]:
    """B with J = B U', shape (examples, ..., number), and the function e -> U e."""
    n, q = tree_size(at.params), at.outputs.size
    dtype = at.outputs.dtype
    if n <= q:
        layout = Layout.of(at.params, dtype)
        lift = lambda e: cast_like(layout.unravel(e), at.params)
        unit = jnp.eye(n, dtype=dtype)
        columns = lax.map(lambda e: at.mv(lift(e)), unit, batch_size=batch_size)
        return jnp.moveaxis(columns, 0, -1), lift
    K = Cholesky(batch_size).whitened(at, Squared().factor(at.outputs, at.outputs))
    # More than the rounding of K, which may be singular.
    tiny = jnp.finfo(dtype).tiny
    more = 4 * jnp.finfo(dtype).eps * jnp.trace(K) + tiny
    L = jnp.linalg.cholesky(K + more * jnp.eye(q, dtype=dtype))

    def lift(e):
        # U = J' L^-T.
        v = solve_triangular(L, e, trans=1, lower=True)
        return at.transpose_mv(v.reshape(at.outputs.shape))

    return L.reshape(*at.outputs.shape, q), lift


def domain_of(at: Linearization) -> AbstractDomain | None:
    """That of the conjugates, if the loss knows one."""
    known = isinstance(at.loss, AbstractBoundedLoss)
    return at.loss.domain(at.outputs, at.targets) if known else None  # pyright: ignore
