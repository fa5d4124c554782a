r"""Ways to solve the Gauss-Newton system $(c J' H J + \lambda I) d = -\nabla h$.

With g the gradients of the losses in the outputs, K = J J', H = R R' and $c$ the weight
of an example, d is also $-J' \alpha c / \lambda$ for the dual variable
$\alpha = g + H J d$, one vector of outputs per example.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, PyTree

from .._common.conjugate_gradients import conjugate_gradients
from .._common.inner import tree_size
from .._common.linalg import matmul
from .._common.tree import add, all_finite, norm, normal_like, scale
from .._common.types import (
    AbstractPart,
    check_number,
    checked,
    Number,
    number,
    positive_int,
)
from ..losses._loss import factor_of
from ._base import Linearization
from ._gram import dense, gram, gram_flops


class Solved(NamedTuple):
    r"""A step and how it was found.

    - `step`: d, like the parameters.
    - `gap`: the duality gap $P(d) - D(\alpha)$; NaN if it is not known.
    - `num_inner`: iterations.
    - `negative_curvature`: whether a Hessian was found not to be positive semidefinite.
    - `minimizes`: a Python bool, whether d minimizes the model along itself, so that
        its length needs no correction.
    """

    step: PyTree
    gap: Array
    num_inner: Array
    negative_curvature: Array
    minimizes: bool


class AbstractSolver(AbstractPart):
    """Solves the damped Gauss-Newton system of a batch, exactly or nearly."""

    @abc.abstractmethod
    def solve(
        self, at: Linearization, damping: Array, start: PyTree | None, key: Any
    ) -> Solved:
        """The step, from `start` if that is of use."""


class AbstractCG(AbstractSolver):
    """The options of conjugate gradients."""

    max_steps: int = positive_int(10)
    rtol: Number = number(1e-6, check_number)
    warm_start: float = checked(check_number, static=True, default=0.0)
    in_outputs: bool = eqx.field(static=True, default=False)
    unroll: bool = eqx.field(static=True, default=False)


class CG(AbstractCG):
    r"""Conjugate gradients for the step, in the space of the parameters.

    Each iteration takes a product with J and one with J', and lowers the model.

    - `max_steps`, `rtol`: stops at $\|r\| \le$ rtol $\|\nabla h\|$.
    - `warm_start`: the part of the last step to start from, in `step` only: 0.95 is
        usual.
    - `in_outputs`: keep the vectors of the iteration in the space of the outputs, where
        they are small, with d = J' u: the same iterates, cheaper for many parameters.
        Starts from 0 always.
    - `unroll`: write the iterations out, for convolutions on the CPU.

    Source: Martens, "Deep Learning via Hessian-Free Optimization", 2010.
    """

    def solve(self, at, damping, start, key):
        by = self._outputs if self.in_outputs else self._parameters
        return by(at, damping, start)

    def _parameters(self, at: Linearization, damping, start) -> Solved:
        def product(d):
            pulled = at.transpose_mv(at.hessian_mv(at.mv(d)))
            return add(scale(at.weight, pulled), d, damping)

        d = jtu.tree_map(jnp.zeros_like, at.params)
        r = scale(-1, at.gradient)
        starts = start is not None
        if starts:
            d = scale(self.warm_start, start)
            r = add(r, product(d), -1)
        target = self.rtol * norm(at.gradient)
        end = conjugate_gradients(product, d, r, target**2, self.max_steps, self.unroll)
        # P(d) - D(alpha) = |r|^2 / (2 lambda) for alpha = g + H J d.
        return Solved(end.x, end.rr / (2 * damping), end.steps, end.bad, not starts)

    def _outputs(self, at: Linearization, damping, start) -> Solved:
        # d = J' u; the inner product of J' a and J' b is a' K b: u stands beside K u.
        def measure(r):
            Kr = at.mv(at.transpose_mv(r))
            return (r, Kr), jnp.vdot(r, Kr)

        def product(pair):
            p, Kp = pair
            return damping * p + at.weight * at.hessian_mv(Kp)

        r = -at.weight * at.cotangent
        inner, zero = lambda pair, Mp: jnp.vdot(pair[1], Mp), jnp.zeros_like(r)
        stop = (self.rtol * norm(at.gradient)) ** 2, self.max_steps, self.unroll
        end = conjugate_gradients(product, (zero, zero), r, *stop, inner, measure)
        d = at.transpose_mv(end.x[0])
        return Solved(d, end.rr / (2 * damping), end.steps, end.bad, True)


class DualCG(AbstractSolver):
    r"""Conjugate gradients for the dual variable $\alpha = g + H \beta$.

    Solves $(\tfrac{\lambda}{c} I + K H) \beta = -K g$ from $\beta = 0$, which is the
    gradient: d is a descent direction after any number of iterations. With few of them
    and little damping it is a long one, and [`diffprog.oracles.CG`][] does better.

    - `max_steps`, `rtol`: stops when the residual has fallen by rtol.
    - `euclidean`: plain conjugate gradients on $H (\tfrac{\lambda}{c} I + K H) \beta =
        -H K g$, instead of those in the inner product of H; about twice as many
        iterations.
    - `unroll`: write the iterations out, for convolutions on the CPU.

    Source: Roulet, Blondel, "Dual Gauss-Newton Directions for Deep Learning", 2023,
    arXiv 2308.08886.
    """

    max_steps: int = positive_int(10)
    rtol: Number = number(1e-6, check_number)
    euclidean: bool = eqx.field(static=True, default=False)
    unroll: bool = eqx.field(static=True, default=False)

    def solve(self, at, damping, start, key):
        mu = damping / at.weight
        K = lambda v: at.mv(at.transpose_mv(v))

        def measure(s):
            Hs = at.hessian_mv(s)
            z = Hs if self.euclidean else s
            return z, jnp.vdot(z, Hs)

        s = -K(at.cotangent)
        product = lambda p: mu * p + K(at.hessian_mv(p))
        inner = lambda p, w: jnp.vdot(p, at.hessian_mv(w))
        stop = self.rtol**2 * measure(s)[1], self.max_steps, self.unroll
        end = conjugate_gradients(product, jnp.zeros_like(s), s, *stop, inner, measure)
        beta, s = end.x, end.r
        alpha = at.cotangent + at.hessian_mv(beta)
        d = scale(-1 / mu, at.transpose_mv(alpha))
        # P(d) - D(alpha) = c/2 (J d - beta)' H (J d - beta), and J d - beta = s / mu.
        gap = at.weight * jnp.vdot(s, at.hessian_mv(s)) / (2 * mu**2)
        return Solved(d, gap, end.steps, end.bad, False)


class Cholesky(AbstractSolver):
    r"""The exact step, by a factorization as large as there are outputs in the batch.

    $$d = -J' R S^{-1} \rho, \quad S = R' K R + \tfrac{\lambda}{c} I, \quad
    H = R R', \; g = R \rho,$$

    and more where a part of g is not in the range of R: see
    [`diffprog.losses.AbstractFactor`][].

    The whitened matrix S keeps its digits in float32 however small the damping. K comes
    from one product per output and example, or, for a [`diffprog.Network`][] of dense
    layers, from the products of activations and of sensitivities, which is far cheaper.
    Memory (m k)^2.

    - `batch_size`: products computed at a time.

    Source of the identity: Korbit, Adeoye, Bemporad, Zanon, "Exact Gauss-Newton
    Optimization for Training Deep Neural Networks", 2024, arXiv 2405.14402; the
    whitening is ours.
    """

    batch_size: int = positive_int(64)

    def solve(self, at, damping, start, key):
        a, bad = self.dual(at, damping)
        d, zero = scale(-1, at.transpose_mv(a)), jnp.zeros_like(damping)
        return Solved(d, zero, jnp.zeros((), jnp.int32), bad, True)

    def dual(self, at: Linearization, damping: Array, shift: Array | None = None):
        """a with d = -J' a, and whether a Hessian is not positive semidefinite.

        With `shift` the gradient is that of the losses less J' times it.
        """
        mu, factor = damping / at.weight, factor_of(at.loss, at.outputs, at.targets)
        rho, e = factor.rho, factor.remainder
        if shift is not None:
            e = -shift if e is None else e - shift
        K = lambda v: at.mv(at.transpose_mv(v))
        if e is not None:
            rho = rho - factor.transpose_mv(K(e)) / mu
        S = self.whitened(at, factor)
        L = cho_factor(S + mu * jnp.eye(S.shape[0], dtype=S.dtype), lower=True)
        solve = lambda r: cho_solve(L, jnp.ravel(r)).reshape(rho.shape)
        x = solve(rho)
        # One refinement, by a product that has not lost digits to S.
        x = x + solve(rho - factor.transpose_mv(K(factor.mv(x))) - mu * x)
        a = factor.mv(x) if e is None else factor.mv(x) + e / mu
        # Where mu is lost in S by rounding the factorization may fail.
        failed = all_finite(at.cotangent) & ~all_finite(a)
        return a, jnp.any(factor.negative_curvature) | failed

    def whitened(self, at: Linearization, factor) -> Array:
        """R' K R."""
        layers = dense(at.layers)
        if layers is not None:
            return gram(layers, at, factor)

        def column(e):
            v = factor.mv(e.reshape(factor.rho.shape))
            return jnp.ravel(factor.transpose_mv(at.mv(at.transpose_mv(v))))

        unit = jnp.eye(factor.rho.size, dtype=factor.rho.dtype)
        return lax.map(column, unit, batch_size=self.batch_size)


class RandomSubspace(AbstractSolver):
    r"""The best step within a random subspace.

    $$d = -V (c\, Z' H Z + \lambda V' V)^{-1} V' \nabla h, \quad Z = J V.$$

    One product with J for each direction, all at once, and no iterations.

    - `size`: of the subspace: directions, drawn anew with every key.

    Source: Yu, Duncker, Sahani and others, "Second-Order Forward-Mode Optimization of
    Recurrent Neural Networks for Neuroscience", 2024.
    """

    size: int = positive_int(32)

    def solve(self, at, damping, start, key):
        if key is None:
            raise ValueError(
                "`RandomSubspace` draws directions: give the call a `key`, such as "
                "`jax.random.key(0)`, another one each time."
            )
        return self.within(at, damping, normal_like(key, at.params, self.size))

    def within(self, at: Linearization, damping: Array, V: PyTree) -> Solved:
        """The best step in the span of V, a pytree with a leading axis."""
        Z = jax.vmap(at.mv)(V)
        HZ = jax.vmap(at.hessian_mv)(Z)
        flat = lambda a: a.reshape(a.shape[0], -1)
        inner = lambda a, b: matmul(flat(a), flat(b).T)
        VV = sum(inner(v, v) for v in jtu.tree_leaves(V))
        A = at.weight * inner(Z, HZ) + damping * VV
        b = at.weight * matmul(flat(Z), jnp.ravel(at.cotangent))
        a = -cho_solve(cho_factor(A, lower=True), b)
        d = jtu.tree_map(lambda v: jnp.tensordot(a, v, 1, precision="highest"), V)
        nan = jnp.full_like(damping, jnp.nan)
        bad = ~jnp.all(jnp.isfinite(a))
        return Solved(d, nan, jnp.zeros((), jnp.int32), bad, True)


class Auto(AbstractCG):
    """`Cholesky` where it is cheap, else conjugate gradients.

    Cheap means that the estimated work is at most that of 50 products of conjugate
    gradients.

    - `max_steps`, `rtol`, `warm_start`, `unroll`: as in [`diffprog.oracles.CG`][].
    - `in_outputs`: whether its vectors are kept in the space of the outputs, also where
        that is less than 50 times smaller, or there is a warm start.
    """

    def solve(self, at, damping, start, key):
        return self.choose(at).solve(at, damping, start, key)

    def choose(self, at: Linearization) -> AbstractSolver:
        """The solver for a batch of this size."""
        m, q, size = at.outputs.shape[0], at.outputs.size, tree_size(at.params)
        product = 8 * m * size  # where an example uses each parameter once
        layers = dense(at.layers)
        build = gram_flops(layers.model, m, q // m) if layers else float(q * product)
        if build + q**3 / 3 <= 50 * product:
            return Cholesky()
        small = self.in_outputs or (50 * q < size and not self.warm_start)
        return CG(self.max_steps, self.rtol, self.warm_start, small, self.unroll)
