r"""Steps on the model that keeps the loss and linearizes the network.

    P(d) = c sum_i l_i(f_i + J_i d) + damping |d|^2 / 2,
    D(alpha) = -c sum_i (l_i*(alpha_i) - <alpha_i, f_i>) - |c J' alpha|^2 / 2 damping,

with d = -c J' alpha / damping, K = J J' and the linearized outputs z = f + J d.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._common.inner import tree_size
from .._common.linalg import matmul
from .._common.loops import for_each, repeat, while_loop
from .._common.result import RESULTS
from .._common.tree import add, scale, vdot, where
from .._common.types import (
    came,
    check_positive,
    component,
    Number,
    number,
    positive_int,
)
from .._operators.root import difference
from ..losses import Squared
from ..losses._loss import answered
from ._augmented_lagrangian import AugmentedLagrangian
from ._base import AbstractForgetful, Linearization, Proposal
from ._damping import check_damping
from ._interior_point import domain_of, InteriorPoint
from ._model_solver import (
    AbstractModelSolver,
    bounded,
    dual,
    fenchel,
    Found,
    halved,
    model,
    prox,
    reached,
)
from ._solvers import AbstractSolver, Auto, CG, Cholesky


class Point(NamedTuple):
    """A step d, the outputs z and a dual variable, and what is known there."""

    d: PyTree
    z: Array
    alpha: Array
    g: Array  # the gradient of the losses at z
    G: PyTree  # that of P at d
    P: Array
    left: Array  # P - D


class NewtonSteps(AbstractModelSolver):
    """Newton's method on the model, for losses with a Hessian.

    Each step solves the Gauss-Newton system of the losses at the linearized outputs,
    and is halved until the model decreases: with little damping it would diverge else.
    The network is not run again.

    - `max_steps`: of them.
    - `solver`: of the systems: [`diffprog.oracles.Cholesky`][],
        [`diffprog.oracles.CG`][], or [`diffprog.oracles.Auto`][] to choose.
    """

    max_steps: int = positive_int(20)
    solver: AbstractSolver = Auto(max_steps=50)

    def __check_init__(self):
        if not isinstance(self.solver, Auto | CG | Cholesky):
            raise TypeError(
                f"`solver` is {came(self.solver)}; `Auto`, `CG` or `Cholesky` of "
                "`dp.oracles` is expected."
            )

    def minimize(self, at, damping, gap):
        def look(d, z, alpha, P):
            g = at.loss.gradient(z, at.targets)
            G = add(scale(at.weight, at.transpose_mv(g)), d, damping)
            return Point(d, z, alpha, g, G, P, vdot(G, G) / (2 * damping))

        def unfinished(carry):
            count, here, good = carry
            far = here.left > gap * (at.value - here.P + here.left)
            return (count < self.max_steps) & good & far

        def step(carry):
            count, here, _ = carry
            v, change, bad = self._newton(at, damping, here)
            u, slope = at.mv(v), vdot(here.G, v)
            noise = 4 * jnp.finfo(u.dtype).eps * jnp.abs(here.P)
            value = lambda t: model(at, damping, add(here.d, v, t), here.z + t * u)
            short = lambda t: value(t) <= here.P + 1e-4 * t * slope + noise
            t = halved(lambda t: ~short(t), jnp.ones_like(slope))
            new = add(here.d, v, t), here.z + t * u, here.alpha + t * change
            good = (slope < 0) & (t > 0) & ~bad & jnp.isfinite(value(t))
            return count + 1, look(*new, value(t)), good

        zero, z = jtu.tree_map(jnp.zeros_like, at.params), at.outputs
        first = look(zero, z, jnp.zeros_like(z), at.value)
        start = jnp.zeros((), jnp.int32), first, jnp.isfinite(at.value)
        count, end, good = while_loop(unfinished, step, start)
        # At rounding no step is found any more; that is no failure.
        return Found(end.d, end.z, end.left, count, good | (count > 1))

    def _newton(self, at: Linearization, damping: Array, here: Point):
        """Newton's step, what it adds to alpha, and whether there is none."""
        at = dataclasses.replace(at, outputs=here.z, cotangent=here.g, gradient=here.G)
        solver = self.solver
        solver = solver.choose(at) if isinstance(solver, Auto) else solver
        if isinstance(solver, Cholesky):
            a, bad = solver.dual(at, damping, here.alpha)
            return scale(-1, at.transpose_mv(a)), a * (damping / at.weight), bad
        solver = dataclasses.replace(solver, in_outputs=False)
        solved = solver.solve(at, damping, None, None)
        no_change = jnp.zeros_like(here.alpha)  # of no use without an exact solution
        return solved.step, no_change, solved.negative_curvature


class CoordinateAscent(AbstractModelSolver):
    r"""Dual coordinate ascent: the variables of one example after another (SDCA).

    Also for losses without a Hessian, such as hinges. Needs the matrix K of all outputs
    of the batch, which is found as by [`diffprog.oracles.Cholesky`][]: memory (m k)^2.

    - `max_steps`: the most passes over the examples.
    - `batch_size`: products with J computed at a time.

    Source: Shalev-Shwartz and Zhang, "Stochastic Dual Coordinate Ascent Methods for
    Regularized Loss Minimization", 2013, arXiv 1209.1873.
    """

    max_steps: int = positive_int(200)
    batch_size: int = positive_int(64)

    @bounded
    def minimize(self, at, damping, gap):
        m, k = at.outputs.shape[0], at.outputs.size // at.outputs.shape[0]
        c, f, shape = damping / at.weight, at.outputs, at.outputs.shape
        K = Cholesky(self.batch_size).whitened(at, Squared().factor(f, f))
        rows = K.reshape(m, k, m * k)
        blocks = jax.vmap(lambda i: lax.dynamic_slice_in_dim(rows[i], i * k, k, 1))
        blocks = blocks(jnp.arange(m))

        linearized = lambda alpha: f - matmul(K, alpha.ravel()).reshape(shape) / c

        def example(i, state):
            alpha, z = state
            pick = lambda a: lax.dynamic_slice_in_dim(a, i, 1)
            old, targets = pick(alpha), jtu.tree_map(pick, at.targets)
            new = dual(at).block_update(old, pick(z), pick(blocks), c, targets)
            new = answered(at.loss, "block_update", new, old.shape)
            z = z - matmul((new - old).reshape(k), rows[i]).reshape(shape) / c
            return lax.dynamic_update_slice_in_dim(alpha, new, i, 0), z

        def all_examples(state):
            alpha, _ = for_each(m, example, state)
            return alpha, linearized(alpha)  # anew: rounding would add up

        start = at.cotangent, linearized(at.cotangent)
        return ascend(at, damping, gap, all_examples, start, self.max_steps)


class ProximalGradient(AbstractModelSolver):
    r"""Accelerated proximal gradient ascent on the dual, without matrices.

    For any loss with a conjugate, and any size of batch; each step takes a product with
    J and one with J'. Restarts where the momentum points backward.

    - `max_steps`: of them.

    Source: Beck, Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for
    Linear Inverse Problems", 2009.
    """

    max_steps: int = positive_int(300)

    @bounded
    def minimize(self, at, damping, gap):
        c = damping / at.weight
        K = lambda v: at.mv(at.transpose_mv(v))
        # The largest eigenvalue of K, from below by 20 products: hence the margin.
        v = at.cotangent + jnp.finfo(c.dtype).tiny
        unit = lambda v: v / jnp.sqrt(jnp.vdot(v, v))
        v = repeat(lambda v: unit(K(v)), unit(v), 20)
        tau = c / (1.2 * jnp.vdot(v, K(v)))

        def advance(state):
            alpha, z, y, zy, theta = state
            new = prox(at, y + tau * zy, tau)
            backward = jnp.vdot(y - new, new - alpha) > 0
            theta = jnp.where(backward, 1, theta)
            after = (1 + jnp.sqrt(1 + 4 * theta**2)) / 2
            momentum = jnp.where(backward, 0, (theta - 1) / after)
            z_new = at.outputs - K(new) / c
            extrapolate = lambda new, old: new + momentum * (new - old)  # z is affine
            return new, z_new, extrapolate(new, alpha), extrapolate(z_new, z), after

        alpha = at.cotangent
        z = at.outputs - K(alpha) / c
        start = alpha, z, alpha, z, jnp.ones_like(c)
        return ascend(at, damping, gap, advance, start, self.max_steps)


def judge(at: Linearization, damping, alpha: Array, z: Array) -> tuple[Array, Array]:
    """P(d(alpha)) and D(alpha)."""
    losses = at.loss(z, at.targets)
    # |d|^2 = c <alpha, f - z> / damping.
    half = at.weight * jnp.vdot(alpha, at.outputs - z) / 2
    P = at.weight * jnp.sum(losses) + half
    return P, P - fenchel(at, losses, z, alpha)


def ascend(
    at: Linearization,
    damping: Array,
    gap: Array,
    advance: Callable,
    state: tuple,
    max_steps: int,
) -> Found:
    """`state = advance(state)` until the gap is small; it begins with alpha and z.

    P need not fall from step to step: the lowest is kept.
    """

    def unfinished(carry):
        count, _, (P, _, _), D = carry
        return (count < max_steps) & (P - D > gap * (at.value - D))

    def more(carry):
        count, state, best, D = carry
        alpha, z, *_ = state = advance(state)
        P_new, D_new = judge(at, damping, alpha, z)
        # Of those that differ by rounding the last is the best.
        lowest = best[0] + 8 * jnp.finfo(z.dtype).eps * jnp.abs(best[0])
        best = where(P_new <= lowest, (P_new, alpha, z), best)
        return count + 1, state, best, jnp.maximum(D, D_new)

    alpha, z, *_ = state
    P, D = judge(at, damping, alpha, z)
    start = (jnp.zeros((), jnp.int32), state, (P, alpha, z), D)
    count, _, (P, alpha, z), D = while_loop(unfinished, more, start)
    step = scale(-at.weight / damping, at.transpose_mv(alpha))
    return Found(step, z, P - D, count, jnp.isfinite(P - D))


class ProxLinear(AbstractForgetful):
    r"""The prox-linear method, also called modified Gauss-Newton.

    $$d = \operatorname{argmin}_d \; \frac1m \sum_i \ell_i(f_i + J_i d)
    + \frac\lambda2 \|d\|^2.$$

    Only the network is linearized: the model keeps the kinks of the loss, so that it
    also holds for losses without a Hessian, such as hinges and norms. For the squared
    loss it is [`diffprog.oracles.GaussNewton`][].

    - `damping`: lambda > 0, a number or a rule such as
        [`diffprog.oracles.Threshold`][].
    - `solver`: of the model: [`diffprog.oracles.InteriorPoint`][],
        [`diffprog.oracles.AugmentedLagrangian`][], [`diffprog.oracles.NewtonSteps`][],
        [`diffprog.oracles.CoordinateAscent`][] or
        [`diffprog.oracles.ProximalGradient`][]. For losses with kinks in themselves or
        their gradients `None` takes the first where it has at most 256 unknowns, the
        second and then the first where its matrix has at most 1024^2 entries, and the
        second beyond; for other losses the third.
    - `gap`: the duality gap at which to stop, as a part of the distance from the loss
        to the dual value: 0.1 makes sure of a descent direction.
    - `throw`: whether a gap that was not reached is a failure, `max_steps_reached`,
        which withholds the step. With `False` the step is the best that was found.

    Fails with a `TypeError` for a function of the user that is not smooth: it has no
    conjugate. With much noise in the targets nothing is gained over stochastic
    subgradients: see the source.

    Source: Pillutla, Roulet, Kakade, Harchaoui, "Modified Gauss-Newton Algorithms under
    Noise", 2023, arXiv 2305.10634.
    """

    damping: Any = number(1.0, check_damping)
    solver: AbstractModelSolver | None = component(None, "dp.oracles.NewtonSteps()")
    gap: Number = number(0.1, check_positive)
    throw: bool = eqx.field(static=True, default=True)

    def propose(self, at, damping, memory, key):
        solver = self.solver or choose(at)
        gap = jnp.asarray(self.gap, at.value.dtype)
        found = solver.minimize(at, damping, gap)

        def shortened(d, u, t):
            """t, halved until the convex model falls along d, or 0; u = J d."""
            P = lambda t: model(at, damping, scale(t, d), at.outputs + t * u)
            return halved(lambda t: P(t) >= at.value, t)

        # Where the steps of the solver did not suffice, its point may lie beyond all
        # descent; along minus the gradient a smooth loss always falls.
        one = jnp.ones_like(at.value)
        d, u = found.step, difference(found.z, at.outputs)
        t = shortened(d, u, one)
        instead = scale(-1 / damping, at.gradient)
        d, u = where(t > 0, (d, u), (instead, at.mv(instead)))
        t = shortened(d, u, jnp.where(t > 0, t, one))
        losses = at.loss(at.outputs + t * u, at.targets)
        enough = reached(at, damping, gap, found) | (not self.throw)
        result = RESULTS.where(enough, RESULTS.successful, RESULTS.max_steps_reached)
        useless = (t == 0) & (found.gap > at.rounding())
        result = RESULTS.where(useless, RESULTS.no_descent, result)
        result = RESULTS.where(found.good, result, RESULTS.factorization_failed)
        decrease = at.value - at.weight * jnp.sum(losses)
        known = found.gap, found.num_inner, result
        return Proposal(scale(t, d), decrease, damping, *known)


class Either(AbstractModelSolver):
    """`first`, and where that does not reach the gap, `then`."""

    first: AbstractModelSolver
    then: AbstractModelSolver

    def minimize(self, at, damping, gap):
        found = self.first.minimize(at, damping, gap)

        def again():
            more = self.then.minimize(at, damping, gap)
            return more._replace(num_inner=found.num_inner + more.num_inner)

        enough = reached(at, damping, gap, found)
        return lax.cond(enough, lambda: found, again)


def choose(at: Linearization) -> AbstractModelSolver:
    """The solver for a loss and a batch."""
    n, q, kinks = tree_size(at.params), at.outputs.size, domain_of(at) is not None
    if at.loss.smooth and not kinks:
        return NewtonSteps()
    if not kinks or q * min(n, q) > 1024**2:
        return AugmentedLagrangian()
    if min(n, q) <= 256:
        return InteriorPoint()
    # So many products cost less than the interior point method, and often suffice.
    return Either(AugmentedLagrangian(1000), InteriorPoint())
