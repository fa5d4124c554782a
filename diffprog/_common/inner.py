r"""Small minimizations inside a backward pass, from zero and with a fixed length.

For a function $\phi$ at z, an incoming message $\lambda$ and $p = \phi(z + y)$:

    plain:   min over y of  <lam, p> + gamma/2 |y|^2
    fitted:  min over y of  <lam, p> + 1/2 |p - phi(z)|^2 + gamma/2 |y|^2,
             which is half of |p - phi(z) + lam|^2 + gamma |y|^2, up to a constant.

With c = lam, or c = lam + p - phi(z) where fitted, and J the Jacobian at z + y, the
gradient is J'c + gamma y and the Hessian [J'J +] gamma I + the Hessian of <c, phi>.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from .conjugate_gradients import solve_cg
from .jacobian import products
from .linalg import matmul, solve_positive, symmetrize
from .loops import repeat
from .tree import add, scale, vary
from .types import (
    AbstractPart,
    check_number,
    check_positive,
    Number,
    number,
    positive_int,
)


class Subproblem(NamedTuple):
    """What is minimized over y: `fn` is phi, `x` is z, `message` is lam."""

    fn: Callable
    x: PyTree
    message: PyTree
    fitted: bool = False
    gamma: Any = 1.0

    def start(self) -> PyTree:
        """phi(z), where it is needed."""
        return self.fn(self.x) if self.fitted else None

    def residual(self, p: PyTree, p0: PyTree) -> PyTree:
        """c: the message, plus p - phi(z) where the output is fitted."""
        return add(add(p, p0, -1), self.message) if self.fitted else self.message

    def gradient(self, y: PyTree, p0: PyTree) -> PyTree:
        """J'c + gamma y."""
        p, pull = jax.vjp(self.fn, add(self.x, y))
        return add(pull(self.residual(p, p0))[0], scale(self.gamma, y))


class AbstractInner(AbstractPart):
    """Solves the small problem of a layer (or stage) approximately, from y = 0.

    - `exact`: whether one step is the solution where the function is affine.
    - `num_steps`: the steps it takes.
    """

    exact: eqx.AbstractClassVar[bool]
    num_steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def solve(self, problem: Subproblem) -> PyTree:
        """Minus the minimizer, like `problem.x`.

        NaN where a curvature is met that is not positive.
        """


class InnerGradient(AbstractInner):
    r"""Gradient descent: $y \leftarrow y - s (J^\top c + \gamma y)$.

    One unit step from 0 is ordinary back-propagation, exactly. Each step costs one
    backward and, from the second on, one forward pass through the layer. Steps converge
    for s < 2 / (1 + C) with the curvature C of $\langle \lambda, \phi \rangle$, or for
    s < 2 / (|J|^2 + gamma) in the regularized inverse.

    - `num_steps`: k.
    - `stepsize`: s.
    - `unroll`: write the steps out, for convolutions on the CPU.
    """

    num_steps: int = positive_int(3)
    stepsize: Number = number(1.0, check_positive)
    unroll: bool = eqx.field(static=True, default=False)

    exact: ClassVar[bool] = False

    def solve(self, problem):
        p0, pull = jax.vjp(problem.fn, problem.x)
        first = scale(-self.stepsize, pull(problem.message)[0])
        step = lambda y: add(y, scale(-self.stepsize, problem.gradient(y, p0)))
        return scale(-1, repeat(step, first, self.num_steps - 1, unroll=self.unroll))


class InnerGaussNewton(AbstractInner):
    r"""Gauss-Newton: $\phi$ is replaced by its linearization at every step.

    $$y \leftarrow (J^\top J + \gamma I)^{-1} J^\top (J y - c)
    = J^\top (J J^\top + \gamma I)^{-1} (J y - c)$$

    for the regularized inverse; the Moreau problem has no J'J, and a step is a unit
    step of the gradient. The smaller of the two matrices is factorized where it has at
    most `max_dense` rows; else conjugate gradients.

    - `num_steps`: of Gauss-Newton.
    - `max_dense`: the most rows of a matrix that is built.
    - `max_cg`, `rtol`: most conjugate gradients, and where they stop: |r| <= rtol |b|.
    - `unroll`: write all steps out, for convolutions on the CPU.
    """

    num_steps: int = positive_int(1)
    max_dense: int = eqx.field(static=True, default=64)
    max_cg: int = positive_int(20)
    rtol: Number = number(1e-6, check_number)
    unroll: bool = eqx.field(static=True, default=False)

    exact: ClassVar[bool] = True

    def solve(self, problem):
        p0 = problem.start()
        step = lambda y: self._step(problem, p0, y)
        zero = jtu.tree_map(jnp.zeros_like, problem.x)
        return scale(-1, repeat(step, zero, self.num_steps, unroll=self.unroll))

    def _step(self, problem: Subproblem, p0: PyTree, y: PyTree) -> PyTree:
        if not problem.fitted:
            return add(y, scale(-1 / problem.gamma, problem.gradient(y, p0)))
        run = lambda y: (problem.fn(y), None)
        p, mv, pull, _ = products(run, add(problem.x, y))
        b = add(mv(y), problem.residual(p, p0), -1)  # J y - c
        if min(tree_size(y), tree_size(p)) <= self.max_dense:
            return regularized_fit(mv, pull, y, b, problem.gamma)
        product = lambda d: add(pull(mv(d)), scale(problem.gamma, d))
        return solve_cg(product, pull(b), self.max_cg, self.rtol, self.unroll)


class InnerNewton(AbstractInner):
    r"""Newton's method for the inner problem.

    $$y \leftarrow y - (\gamma I + [J^\top J +] \nabla^2 \langle c, \phi \rangle)^{-1}
    (J^\top c + \gamma y)$$

    A Cholesky factorization where y has at most `max_dense` entries, else conjugate
    gradients with products of the Hessian. Where the Hessian is not positive definite
    the message is NaN: the problem has no minimum nearby, and alpha is too large for
    Newton.

    - `num_steps`: of Newton.
    - `max_dense`, `max_cg`, `rtol`, `unroll`: as in
        [`diffprog.oracles.InnerGaussNewton`][].
    """

    num_steps: int = positive_int(3)
    max_dense: int = eqx.field(static=True, default=64)
    max_cg: int = positive_int(20)
    rtol: Number = number(1e-6, check_number)
    unroll: bool = eqx.field(static=True, default=False)

    exact: ClassVar[bool] = True

    def solve(self, problem):
        p0 = problem.start()

        def step(y):
            gradient = lambda y: problem.gradient(y, p0)
            if tree_size(y) <= self.max_dense:
                flat, unravel = ravel_pytree(y)
                vector = lambda v: ravel_pytree(gradient(unravel(v)))[0]
                twice = lambda v: (vector(v), vector(v))
                H, g = jax.jacfwd(twice, has_aux=True)(flat)
                return unravel(flat - _solve(H, g))
            g, product = jax.linearize(gradient, y)
            return add(y, solve_cg(product, g, self.max_cg, self.rtol, self.unroll), -1)

        zero = jtu.tree_map(jnp.zeros_like, problem.x)
        return scale(-1, repeat(step, zero, self.num_steps, unroll=self.unroll))


def regularized_fit(
    mv: Callable, pull: Callable, x: PyTree, b: PyTree, gamma: Any
) -> PyTree:
    """(J'J + gamma I)^-1 J'b for x like this, by the smaller of J'J and J J'."""
    flat_x, unravel_x = ravel_pytree(x)
    flat_b, unravel_b = ravel_pytree(b)
    by, own, other = pull, flat_b, unravel_b
    if flat_x.size <= flat_b.size:
        by, own, other = mv, flat_x, unravel_x
    unit = vary(jnp.eye(own.size, dtype=own.dtype), like=(x, b))
    J = jax.vmap(lambda e: ravel_pytree(by(other(e)))[0])(unit)
    return unravel_x(ridge(J.T if by is mv else J, flat_b, gamma))


def ridge(X: Array, b: Array, gamma: Any) -> Array:
    """(X'X + gamma I)^-1 X'b, by the smaller of X'X and X X'."""
    if X.shape[1] <= X.shape[0]:
        return _solve(_ridge(matmul(X.T, X), gamma), matmul(X.T, b))
    return matmul(X.T, _solve(_ridge(matmul(X, X.T), gamma), b))


def _ridge(matrix: Array, gamma: Any) -> Array:
    diagonal = jnp.asarray(gamma).astype(matrix.dtype)
    return matrix + diagonal * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def _solve(matrix: Array, b: Array) -> Array:
    """Solves with a positive definite matrix; NaN where it is not."""
    rhs = b if b.ndim == 2 else b[:, None]
    x, positive = solve_positive(symmetrize(matrix), rhs)
    return jnp.where(positive, x.reshape(b.shape), jnp.nan)


def tree_size(tree: PyTree) -> int:
    return sum(a.size for a in jtu.tree_leaves(tree))
