r"""Newton's method on the augmented Lagrangian of a prox-linear model.

With multipliers alpha of the equation z = f + J d, and any s > 0, the model is least
where the same holds with smooth functions in place of the losses,

    e(z) = min_p l(p) + <alpha, z - p> + |z - p|^2 / 2s,
    grad e(z) = a = prox_{l*/s}(alpha + z / s),

and where the gradients are alpha again. There p = z + s (alpha - a), and so
e(z) = l(p) + s (|a|^2 - |alpha|^2) / 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._common.conjugate_gradients import conjugate_gradients
from .._common.loops import while_loop
from .._common.tree import add, all_finite, norm, scale, vdot, where, yes
from .._common.types import positive_int
from ._base import Linearization
from ._model_solver import (
    AbstractModelSolver,
    bounded,
    fenchel,
    Found,
    halved,
    prox,
)


FIRST = 30.0  # s at first, over what would smooth away all that the losses can fall
SHRINK = 0.65  # of s, whenever the multipliers change
FORCING = 0.5  # the residual of a system, as a part of its right-hand side
SHARE = 0.3  # of the rest of the gap, for what is left to a minimum
SHORTEST = 1e-12  # part of a step


class AugmentedLagrangian(AbstractModelSolver):
    r"""Newton's method on the augmented Lagrangian of the model, without matrices.

    With multipliers $\alpha$ and a length s the losses give way to smooth functions,

    $$e(z) = \min_p \, l(p) + \langle \alpha, z - p \rangle
    + \frac1{2s} \|z - p\|^2, \quad
    \nabla e(z) = \operatorname{prox}_{l^* / s}(\alpha + z / s).$$

    The systems of Newton's method, with the derivative of the prox for a Hessian, are
    solved by conjugate gradients. Near a minimum the gradients of e become the new
    multipliers, and s is lowered.

    For losses with kinks and batches of any size: a step of conjugate gradients takes a
    product with J and one with J'. Where damping is small it needs far fewer of them
    than [`diffprog.oracles.ProximalGradient`][]; their number grows with the spread of
    the eigenvalues of J J'. Where there is room for that matrix,
    [`diffprog.oracles.InteriorPoint`][] does not depend on it.

    - `max_steps`: the most products with J, and with J'.

    Source: Li, Sun, Toh, "A Highly Efficient Semismooth Newton Augmented Lagrangian
    Method for Solving Lasso Problems", 2018, arXiv 1607.05428.
    """

    max_steps: int = positive_int(5000)

    @bounded
    def minimize(self, at, damping, gap):
        smoothed = Smoothed(at, damping)
        s = first_length(at)
        smallest = jnp.finfo(s.dtype).eps * s
        d = jtu.tree_map(jnp.zeros_like, at.params)
        seen = smoothed.look(at.cotangent, s, d, at.outputs)
        zero = jnp.zeros((), jnp.int32)

        def unfinished(carry):
            count, seen, best, D, _, on = carry
            left = best.P - D
            on = on & (seen.s > smallest) & all_finite(seen.P, seen.D)
            return (count < self.max_steps) & on & (left > gap * (at.value - D))

        def step(carry):
            count, seen, best, D, moved, _ = carry
            # Newton's method ends where it adds little to the gap, or cannot move.
            target = jnp.maximum(gap * (at.value - best.P), 0)
            rest = SHARE * jnp.maximum(seen.fenchel, target)
            settled = (seen.missing <= rest) | ~moved
            again = lambda: smoothed.look(seen.a, SHRINK * seen.s, seen.d, seen.z)
            seen = lax.cond(settled, again, lambda: seen)
            new, used, moves = smoothed.newton(seen, rest, self.max_steps - count)
            best, D = where(new.P <= best.P, new, best), jnp.fmax(D, new.D)
            return count + used, new, best, D, moves, moves | moved

        start = zero, seen, seen, seen.D, yes(seen.P), yes(seen.P)
        count, _, best, D, *_ = while_loop(unfinished, step, start)
        left = best.P - D
        return Found(best.d, best.z, left, count, jnp.isfinite(left))


def first_length(at: Linearization) -> Array:
    """The s at which a step of s along minus all gradients would be `FIRST` times too
    long for losses that fall by all they can.
    """
    losses, zero = at.loss(at.outputs, at.targets), jnp.zeros_like(at.outputs)
    fall = fenchel(at, losses, at.outputs, zero)  # inf l = -l*(0)
    square = at.weight * jnp.vdot(at.cotangent, at.cotangent)
    known = (square > 0) & (fall > 0) & (fall < jnp.inf)
    return FIRST * jnp.where(known, fall / jnp.where(known, square, 1), 1)


class Seen(NamedTuple):
    """A point, and what is known there.

    - `alpha`, `s`: of the functions in place of the losses.
    - `d`, `z`: a step and the linearized outputs.
    - `a`, `G`: the gradients of the functions, and that of the smooth model.
    - `value`: of the smooth model.
    - `fenchel`, `missing`: the parts of P(d) - D(a): that of the losses, and
        |G|^2 / 2 damping, which bounds what is left to the least smooth model.
    - `P`, `D`: the model, and the dual value.
    """

    alpha: Array
    s: Array
    d: PyTree
    z: Array
    a: Array
    G: PyTree
    value: Array
    fenchel: Array
    missing: Array
    P: Array
    D: Array


class Smoothed(NamedTuple):
    """The model with smooth functions in place of the losses."""

    at: Linearization
    damping: Array

    def gradients(self, alpha: Array, s: Array, z: Array) -> Array:
        return prox(self.at, alpha + z / s, 1 / s)

    def value(self, alpha: Array, s: Array, z: Array, a: Array, square: Array):
        """At a step with |d|^2 = square, where the gradients are a."""
        losses = self.at.loss(z + s * (alpha - a), self.at.targets)
        e = jnp.sum(losses) + s * jnp.vdot(a - alpha, a + alpha) / 2
        return self.at.weight * e + self.damping * square / 2

    def look(self, alpha: Array, s: Array, d: PyTree, z: Array) -> Seen:
        at, square = self.at, vdot(d, d)
        a = self.gradients(alpha, s, z)
        G = add(scale(at.weight, at.transpose_mv(a)), d, self.damping)
        losses = at.loss(z, at.targets)
        P = at.weight * jnp.sum(losses) + self.damping * square / 2
        left, missing = fenchel(at, losses, z, a), vdot(G, G) / (2 * self.damping)
        value = self.value(alpha, s, z, a, square)
        return Seen(alpha, s, d, z, a, G, value, left, missing, P, P - left - missing)

    def newton(self, seen: Seen, rest: Array, limit: Array):
        """A step of Newton's method, its products, and whether it moved.

        Solved more exactly than by `FORCING` where |G|^2 / 2 damping is to be `rest`.
        """
        at, d, z = self.at, seen.d, seen.z
        fn = lambda z: self.gradients(seen.alpha, seen.s, z)
        _, hessian_mv = jax.linearize(fn, z)

        def product(v):
            pulled = at.transpose_mv(hessian_mv(at.mv(v)))
            return add(scale(at.weight, pulled), v, self.damping)

        zero, r = jtu.tree_map(jnp.zeros_like, d), scale(-1, seen.G)
        least = jnp.sqrt(2 * self.damping * SHARE * rest)
        target = jnp.maximum(FORCING * norm(r), least)
        v, *_, count, _ = conjugate_gradients(product, zero, r, target**2, limit)
        u, slope = at.mv(v), vdot(seen.G, v)
        dd, dv, vv = vdot(d, d), vdot(d, v), vdot(v, v)

        def too_long(t):
            there = z + t * u
            a = self.gradients(seen.alpha, seen.s, there)
            square = dd + t * (2 * dv + t * vv)
            value = self.value(seen.alpha, seen.s, there, a, square)
            falls = value <= seen.value + 1e-4 * t * slope
            # It is convex: where it still falls there it has fallen, rounded or not.
            ahead = at.weight * jnp.vdot(a, u) + self.damping * (dv + t * vv)
            return ~falls & (ahead > 0)

        t = halved(too_long, jnp.ones_like(slope), SHORTEST)
        new = self.look(seen.alpha, seen.s, add(d, v, t), z + t * u)
        return new, count + 1, t > 0
