"""Local models of a chain around a trajectory.

Inside the recursions a stage is seen through the vector (1, x, u), so that constants,
linear and quadratic terms of a model are the blocks of one matrix:

    F = [1 0 0]        W = [0 q' r']        V = [2s p']
        [c A B],           [q Q  M],            [p  P].
                           [r M' R]

Then (1, x') = F (1, x, u), the stage costs (1, x, u)' W (1, x, u) / 2, and the
cost-to-go is (1, x)' V (1, x) / 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._chain import VectorChain, VectorTrajectory
from ._types import Stacks


def affine(c: Array, AB: Array) -> Array:
    """F from c and [A B]."""
    top = jnp.zeros_like(AB, shape=(1, 1 + AB.shape[1])).at[0, 0].set(1.0)
    return jnp.concatenate([top, jnp.concatenate([c[:, None], AB], 1)])


def quadratic(linear: Array, hessian: Array) -> Array:
    """W from (q, r) and [[Q, M], [M', R]]; V from p and P."""
    top = jnp.concatenate([jnp.zeros_like(linear, shape=1), linear])
    return jnp.concatenate([top[None], jnp.concatenate([linear[:, None], hessian], 1)])


def _joint(fn, x, u):
    """`fn(x, u)` as a function of z = (x, u), and z."""
    n = x.shape[0]
    return lambda z: fn(z[:n], z[n:]), jnp.concatenate([x, u])


def linearized(chain: VectorChain, trajectory: VectorTrajectory) -> Stacks:
    """F of every stage, in deviations from the trajectory: c = 0."""

    def stage(segment, x, u, t):
        f, z = _joint(lambda x, u: segment.dynamics(x, u, t), x, u)
        AB = jax.jacfwd(f)(z)
        return affine(jnp.zeros_like(AB[:, 0]), AB)

    return chain.map(stage, trajectory.xs, trajectory.us, chain.ts)


def quadratized(
    chain: VectorChain, trajectory: VectorTrajectory, weights: tuple | None = None
) -> tuple[Stacks, Float[Array, "_ _"]]:
    """W of every stage and V of the last state.

    With `weights` (a row w_t per stage) the Hessian is that of h_t + w_t' f_t.
    """

    def stage(segment, x, u, t, *weight):
        h, z = _joint(lambda x, u: segment.cost(x, u, t), x, u)
        hamiltonian = h
        if weights is not None:
            f, _ = _joint(lambda x, u: segment.dynamics(x, u, t), x, u)
            hamiltonian = lambda z: h(z) + weight[0] @ f(z)
        return quadratic(jax.grad(h)(z), jax.hessian(hamiltonian)(z))

    data = (trajectory.xs, trajectory.us, chain.ts)
    W = chain.map(stage, *data, *(() if weights is None else (weights,)))
    h, x = chain.terminal_cost, trajectory.final
    return W, quadratic(jax.grad(h)(x), jax.hessian(h)(x))


def curvature(segment, x, u, t, weight) -> Array:
    """The Hessian of weight' f_t in (1, x, u)."""
    f, z = _joint(lambda x, u: weight @ segment.dynamics(x, u, t), x, u)
    return jnp.pad(jax.hessian(f)(z), ((1, 0), (1, 0)))


def adjoints(chain: VectorChain, trajectory: VectorTrajectory):
    """The costate lam_0; lam_{t+1} and the objective's gradient in u_t of every stage.

    With H_t = h_t + lam_{t+1}' f_t: lam_t = dH_t/dx, and the gradient is dH_t/du.
    """

    def stage(segment, lam, x, u, t):
        hamiltonian = lambda x, u: (
            segment.cost(x, u, t) + lam @ segment.dynamics(x, u, t)
        )
        new, gradient = jax.grad(hamiltonian, (0, 1))(x, u)
        return new, (lam, gradient)

    lam = jax.grad(chain.terminal_cost)(trajectory.final)
    data = (trajectory.xs, trajectory.us, chain.ts)
    first, pairs = chain.scan(stage, lam, *data, reverse=True)
    lams, gradients = zip(*pairs, strict=True)
    return first, tuple(lams), tuple(gradients)
