"""Local models of a chain around a trajectory.

Inside the recursions a stage is seen through the vector (1, x, u), so that constants,
linear and quadratic terms of a model are the blocks of one matrix:

    F = [1 0 0]        W = [0 q' r']        V = [2s p']
        [c A B],           [q Q  M],            [p  P].
                           [r M' R]

Then (1, x') = F (1, x, u), the stage costs (1, x, u)' W (1, x, u) / 2, and the
cost-to-go is (1, x)' V (1, x) / 2.
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ..._chain.problem import ControlProblem
from ..._chain.segment import Segment
from ..._chain.vector import run, VectorChain, VectorTrajectory
from ..._chain.vectorize import vectorize
from ..._common.door import door
from ..._common.linalg import matmul, symmetrize
from ..._common.tree import strong
from ..._common.types import Stacks, Tensors
from ..._common.zeros import jacobian


class AbstractModel(eqx.Module):
    """F and W of every stage, V of the last state: what a Riccati recursion takes.

    - `V`: that of the last state.
    - `is_checked`: whether the expansion says where F or W is not finite.
    - `gives_up`: whether a pass is of use only with a minimum at every stage, so that
        it may leave out, as 0, the gains and gradients before one that has none.
    """

    V: eqx.AbstractVar[Float[Array, "_ _"]]
    is_checked: eqx.AbstractClassVar[bool]
    gives_up: eqx.AbstractVar[Bool[Array, ""] | bool]

    @property
    @abc.abstractmethod
    def rows(self) -> tuple[tuple, ...]:
        """The data with a row per stage that `stage` takes."""

    @abc.abstractmethod
    def stage(
        self, segment: Segment, p: Array, x: Array, u: Array, t: Array, *row: Array
    ) -> tuple[Array, Array]:
        """F and W of a stage, where p is the gradient of the cost-to-go after it."""

    @abc.abstractmethod
    def dynamics(self, chain: VectorChain, trajectory: VectorTrajectory) -> Stacks:
        """F of every stage."""

    @abc.abstractmethod
    def stored(self, chain: VectorChain, trajectory: VectorTrajectory) -> "Stored":
        """The same model with all F and W at hand."""


class Stored(AbstractModel):
    """F and W as arrays. Of a Hessian only the symmetric part counts.

    - `V`, `F`, `W`: of the last state, and of every stage.
    - `symmetric`: W once more if it is known to be symmetric: as long as it is that of
        the model, nothing is to be done.
    """

    V: Float[Array, "_ _"]
    F: Stacks
    W: Stacks
    symmetric: PyTree = None

    is_checked: ClassVar[bool] = True
    gives_up: ClassVar[bool] = False

    @property
    def rows(self):
        return self.F, self.W

    def stage(self, segment, p, x, u, t, *row):
        F, W = row
        return F, W if _is_known(self.symmetric, self.W) else symmetrize(W)

    def dynamics(self, chain, trajectory):
        return self.F

    def stored(self, chain, trajectory):
        return self


class WithTensors(AbstractModel):
    """Also the second derivatives of f, weighted by p: the Hessian of h + p'f (DDP).

    - `V`, `F`, `W`: as in `Stored`.
    - `tensors`: second derivatives of f in (x, u), `(T, n, n + m, n + m)`.
    - `symmetric`: W and the tensors once more, if they are known to be symmetric.
    """

    V: Float[Array, "_ _"]
    F: Stacks
    W: Stacks
    tensors: Tensors
    symmetric: PyTree = None

    is_checked: ClassVar[bool] = True
    gives_up: ClassVar[bool] = False

    @property
    def rows(self):
        return self.F, self.W, self.tensors

    def stage(self, segment, p, x, u, t, *row):
        F, W, tensor = row
        hessian = jnp.einsum("i,ijk->jk", p, tensor, precision="highest")
        W = W + jnp.pad(hessian, ((1, 0), (1, 0)))
        known = _is_known(self.symmetric, (self.W, self.tensors))
        return F, W if known else symmetrize(W)

    def dynamics(self, chain, trajectory):
        return self.F

    def stored(self, chain, trajectory):
        raise ValueError(SEQUENTIAL)


def _is_known(symmetric: PyTree, hessians: PyTree) -> bool:
    """Whether they are the very same arrays."""
    known, leaves = map(jtu.tree_leaves, (symmetric, hessians))
    return [id(a) for a in known] == [id(a) for a in leaves]


class Recomputed(AbstractModel):
    """F and W found again by each pass, with the second derivatives of p'f or without.

    In a loop that is compiled as one function, writing and reading them costs as much
    as computing them.

    - `V`: that of the last state.
    - `second_order`: whether W has the second derivatives of p'f, as in DDP.
    - `gives_up`: as above.
    """

    V: Float[Array, "_ _"]
    second_order: bool = eqx.field(static=True)
    gives_up: Bool[Array, ""] | bool = False

    is_checked: ClassVar[bool] = False

    @property
    def rows(self):
        return ()

    def stage(self, segment, p, x, u, t, *row):
        weight = (p,) if self.second_order else ()
        return linear(segment, x, u, t), curved(segment, x, u, t, *weight)

    def dynamics(self, chain, trajectory):
        return chain.map(linear, trajectory.xs, trajectory.us, chain.ts)

    def stored(self, chain, trajectory):
        if self.second_order:
            raise ValueError(SEQUENTIAL)
        W = chain.map(curved, trajectory.xs, trajectory.us, chain.ts)
        return Stored(self.V, self.dynamics(chain, trajectory), W, symmetric=W)


SEQUENTIAL = (
    "Parts of this model come out of the recursion itself, as in DDP, which is "
    "therefore sequential: use `dp.Riccati()`."
)


def affine(c: Array, AB: Array) -> Array:
    """F from c and [A B]."""
    top = jnp.eye(1, 1 + AB.shape[1], dtype=AB.dtype)
    return jnp.concatenate([top, jnp.concatenate([c[:, None], AB], 1)])


def quadratic(linear: Array, hessian: Array) -> Array:
    """W from (q, r) and [[Q, M], [M', R]]; V from p and P."""
    top = jnp.concatenate([jnp.zeros_like(linear, shape=1), linear])
    return jnp.concatenate([top[None], jnp.concatenate([linear[:, None], hessian], 1)])


def _joint(fn, x, u):
    """`fn(x, u)` as a function of z = (x, u), and z."""
    n = x.shape[0]
    return lambda z: fn(z[:n], z[n:]), jnp.concatenate([x, u])


def linear(segment: Segment, x: Array, u: Array, t: Array) -> Array:
    """F of a stage, in deviations from the trajectory: c is its gap."""
    f, z = _joint(lambda x, u: segment.dynamics(x, u, t), x, u)
    AB = jax.jacfwd(f)(z)
    return affine(f(z) if segment.has_gaps else jnp.zeros_like(AB[:, 0]), AB)


def curved(
    segment: Segment, x: Array, u: Array, t: Array, *weight: Array, exact: bool = False
) -> Array:
    """W of a stage. With a weight w the Hessian is that of h_t + w' f_t.

    Constraints are linear, unless it is `exact` or there is a weight.
    """
    cost = lambda x, u: segment.cost(x, u, t)
    h, z = _joint(cost if weight or exact else segment.cost_near(x, u, t), x, u)
    if not weight:
        return quadratic(*_gradient_and_hessian(h, z))
    f, _ = _joint(lambda x, u: segment.dynamics(x, u, t), x, u)
    return quadratic(*_gradient_and_hessian(h, z, lambda z: matmul(weight[0], f(z))))


def terminal(chain: VectorChain, x: Array, exact: bool = False) -> Array:
    """V of the last state, with linear constraints unless it is `exact`."""
    h = chain.terminal_cost if exact else chain.terminal_cost_near(x)
    return quadratic(*_gradient_and_hessian(h, x))


def _gradient_and_hessian(h, z, more=None):
    """The gradient of h and the Hessian of h + more, sharing what they can."""

    def gradients(z):
        gradient = jax.grad(h)(z)
        return gradient + jax.grad(more)(z) if more else gradient, gradient

    hessian, gradient = jacobian(gradients, z, SHORT)(z)
    return gradient, hessian


# Zeros of Hessians are looked for where states and controls are more than these.
SHORT = 16


def second_derivatives(segment: Segment, x: Array, u: Array, t: Array) -> Array:
    """The second derivatives of f_t in (x, u), shape (n, n + m, n + m)."""
    f, z = _joint(lambda x, u: segment.dynamics(x, u, t), x, u)
    return jax.jacfwd(jax.jacfwd(f))(z)


def adjoints(chain: VectorChain, trajectory: VectorTrajectory):
    """The costate lam_0; lam_{t+1} and the objective's gradient in u_t of every stage.

    With H_t = h_t + lam_{t+1}' f_t: lam_t = dH_t/dx, and the gradient is dH_t/du.
    """

    def stage(segment, lam, x, u, t):
        def hamiltonian(x, u):
            return segment.cost(x, u, t) + matmul(lam, segment.dynamics(x, u, t))

        new, gradient = jax.grad(hamiltonian, (0, 1))(x, u)
        return new, (lam, gradient)

    lam = jax.grad(chain.terminal_cost)(trajectory.final)
    data = (trajectory.xs, trajectory.us, chain.ts)
    first, pairs = chain.scan(stage, lam, *data, reverse=True)
    lams, gradients = zip(*pairs, strict=True)
    return first, tuple(lams), tuple(gradients)


class LinearModel(eqx.Module):
    """The derivatives of the dynamics at every stage.

    - `A`: with respect to the state, shape `(T, n, n)`.
    - `B`: with respect to the control, shape `(T, n, m)`.
    """

    A: Float[Array, "T n n"]
    B: Float[Array, "T n m"]


class QuadraticModel(eqx.Module):
    """Gradients and Hessians of the costs at every stage and at the end.

    - `Q`, `R`, `M`: Hessian blocks, shapes `(T, n, n)`, `(T, m, m)`, `(T, n, m)`.
    - `q`, `r`: gradients, shapes `(T, n)`, `(T, m)`.
    - `Q_final`, `q_final`: those of the terminal cost, shapes `(n, n)`, `(n,)`.
    """

    Q: Float[Array, "T n n"]
    R: Float[Array, "T m m"]
    M: Float[Array, "T n m"]
    q: Float[Array, "T n"]
    r: Float[Array, "T m"]
    Q_final: Float[Array, "n n"]
    q_final: Float[Array, " n"]


def _around(problem, x0, us) -> tuple[VectorChain, VectorTrajectory]:
    if not isinstance(problem, ControlProblem):
        raise TypeError(
            f"`problem` is a {type(problem).__name__}; local models are stacked over "
            "equal stages, so a `dp.ControlProblem` is expected."
        )
    vectorized = vectorize(problem, x0, us)
    chain = vectorized.chain
    return chain.around(run(chain, *vectorized.ravel(x0, us)))


@door
def _linearize(problem, x0, us) -> LinearModel:
    chain, trajectory = _around(problem, x0, us)
    (F,) = chain.map(linear, trajectory.xs, trajectory.us, chain.ts)
    n = trajectory.final.shape[0]
    return LinearModel(F[:, 1:, 1 : 1 + n], F[:, 1:, 1 + n :])


@door
def _quadratize(problem, x0, us) -> QuadraticModel:
    chain, trajectory = _around(problem, x0, us)
    (W,) = chain.map(curved, trajectory.xs, trajectory.us, chain.ts)
    V = terminal(chain, trajectory.final)
    x, u = slice(1, V.shape[0]), slice(V.shape[0], None)
    blocks = W[:, x, x], W[:, u, u], W[:, x, u], W[:, 0, x], W[:, 0, u]
    return QuadraticModel(*blocks, V[1:, 1:], V[0, 1:])


@door
def _costates(problem, x0, us) -> Float[Array, "states n"]:
    first, (lams,), _ = adjoints(*_around(problem, x0, us))
    return jnp.concatenate([first[None], lams])


def linearize(problem: ControlProblem, x0: PyTree, us: PyTree) -> LinearModel:
    r"""The derivatives $A_t, B_t$ of the dynamics along the roll-out of `us`.

    **Arguments:** `problem`, `x0` and `us` as in [`diffprog.rollout`][].

    **Returns:** a [`diffprog.LinearModel`][]; states and controls that are pytrees lie
    in it raveled, leaf after leaf.
    """
    return _linearize(problem, *strong(x0, us)[0])


def quadratize(problem: ControlProblem, x0: PyTree, us: PyTree) -> QuadraticModel:
    r"""Gradients and Hessians of the costs along the roll-out of `us`.

    With [`diffprog.linearize`][] they make the [`diffprog.LQR`][] problem in deviations
    whose solution is the Gauss-Newton step.

    **Arguments:** `problem`, `x0` and `us` as in [`diffprog.rollout`][].

    **Returns:** a [`diffprog.QuadraticModel`][].
    """
    return _quadratize(problem, *strong(x0, us)[0])


def costates(
    problem: ControlProblem, x0: PyTree, us: PyTree
) -> Float[Array, "states n"]:
    r"""The adjoint states along the roll-out of `us`, shape `(T + 1, n)`.

    $$\lambda_T = \nabla h_T(x_T), \quad
    \lambda_t = \nabla_x h_t + A_t^\top \lambda_{t+1}.$$

    The first one is the gradient of the cost with respect to `x0`.

    **Arguments:** `problem`, `x0` and `us` as in [`diffprog.rollout`][].
    """
    return _costates(problem, *strong(x0, us)[0])
