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
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ._jacobian import products
from ._linalg import matmul, solve_positive, symmetrize
from ._tree import add, scale, vdot, where
from ._types import check_count, check_numbers, check_positive, Number, number


class Subproblem(NamedTuple):
    """What is minimized over y: `fn` is phi, `x` is z, `message` is lam."""

    fn: Callable
    x: PyTree
    message: PyTree
    fitted: bool = False
    gamma: Any = 1.0

    def residual(self, p: PyTree, p0: PyTree) -> PyTree:
        """c."""
        return add(add(p, p0, -1), self.message) if self.fitted else self.message

    def gradient(self, y: PyTree, p0: PyTree) -> PyTree:
        """J'c + gamma y."""
        p, pull = jax.vjp(self.fn, add(self.x, y))
        return add(pull(self.residual(p, p0))[0], scale(self.gamma, y))


class AbstractInner(eqx.Module):
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

    num_steps: int = eqx.field(static=True, default=3)
    stepsize: Number = number(1.0)
    unroll: bool = eqx.field(static=True, default=False)

    exact: ClassVar[bool] = False

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        check_positive("stepsize", self.stepsize)

    def solve(self, problem):
        p0, pull = jax.vjp(problem.fn, problem.x)
        first = scale(-self.stepsize, pull(problem.message)[0])

        def step(y):
            return add(y, scale(-self.stepsize, problem.gradient(y, p0)))

        return scale(-1, repeat(step, first, self.num_steps - 1, self.unroll))


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

    num_steps: int = eqx.field(static=True, default=1)
    max_dense: int = eqx.field(static=True, default=64)
    max_cg: int = eqx.field(static=True, default=20)
    rtol: Number = number(1e-6)
    unroll: bool = eqx.field(static=True, default=False)

    exact: ClassVar[bool] = True

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        check_count("max_cg", self.max_cg)
        check_numbers(self, "rtol")

    def solve(self, problem):
        if not problem.fitted:
            p0 = None
            plain = lambda y: add(y, scale(-1 / problem.gamma, problem.gradient(y, p0)))
            step = plain
        else:
            p0 = problem.fn(problem.x)
            step = lambda y: self._step(problem, p0, y)
        zero = jtu.tree_map(jnp.zeros_like, problem.x)
        return scale(-1, repeat(step, zero, self.num_steps, self.unroll))

    def _step(self, problem: Subproblem, p0: PyTree, y: PyTree) -> PyTree:
        run = lambda y: (problem.fn(y), None)
        p, mv, pull, _ = products(run, add(problem.x, y))
        b = add(mv(y), problem.residual(p, p0), -1)  # J y - c
        if min(_size(y), _size(p)) <= self.max_dense:
            return _dense_fit(mv, pull, y, b, problem.gamma)
        product = lambda d: add(pull(mv(d)), scale(problem.gamma, d))
        return conjugate_gradients(
            product, pull(b), self.max_cg, self.rtol, self.unroll
        )


class InnerNewton(AbstractInner):
    r"""Newton: $y \leftarrow y - (\gamma I + [J^\top J +] \nabla^2 \langle c, \phi
    \rangle)^{-1} (J^\top c + \gamma y)$.

    A Cholesky factorization where y has at most `max_dense` entries, else conjugate
    gradients with products of the Hessian. Where the Hessian is not positive definite
    the message is NaN: the problem has no minimum nearby, and alpha is too large for
    Newton.

    - `num_steps`: of Newton.
    - `max_dense`, `max_cg`, `rtol`, `unroll`: as in
        [`diffprog.oracles.InnerGaussNewton`][].
    """

    num_steps: int = eqx.field(static=True, default=3)
    max_dense: int = eqx.field(static=True, default=64)
    max_cg: int = eqx.field(static=True, default=20)
    rtol: Number = number(1e-6)
    unroll: bool = eqx.field(static=True, default=False)

    exact: ClassVar[bool] = True

    def __check_init__(self):
        check_count("num_steps", self.num_steps)
        check_count("max_cg", self.max_cg)
        check_numbers(self, "rtol")

    def solve(self, problem):
        p0 = problem.fn(problem.x) if problem.fitted else None

        def step(y):
            gradient = lambda y: problem.gradient(y, p0)
            if _size(y) <= self.max_dense:
                flat, unravel = ravel_pytree(y)
                vector = lambda v: ravel_pytree(gradient(unravel(v)))[0]
                twice = lambda v: (vector(v), vector(v))
                H, g = jax.jacfwd(twice, has_aux=True)(flat)
                return unravel(flat - _solve(H, g))
            g, product = jax.linearize(gradient, y)
            options = (self.max_cg, self.rtol, self.unroll)
            return add(y, conjugate_gradients(product, g, *options), -1)

        zero = jtu.tree_map(jnp.zeros_like, problem.x)
        return scale(-1, repeat(step, zero, self.num_steps, self.unroll))


def conjugate_gradients(
    product: Callable, b: PyTree, max_steps: int, rtol: Any, unroll: bool
) -> PyTree:
    """Solves `product(d) = b` from 0; NaN where a curvature is not positive."""

    def step(carry):
        d, r, p, rr = carry
        Ap = product(p)
        curvature = vdot(p, Ap)
        a = jnp.where(
            curvature > 0, rr / jnp.where(curvature > 0, curvature, 1), jnp.nan
        )
        d, r = add(d, scale(a, p)), add(r, scale(-a, Ap))
        new = vdot(r, r)
        return d, r, add(r, scale(new / rr, p)), new

    rr = vdot(b, b)
    target = (rtol**2 * rr).astype(rr.dtype)
    go_on = lambda carry: carry[3] > target  # not where it is NaN
    carry = (jtu.tree_map(jnp.zeros_like, b), b, b, rr)
    if unroll:
        for _ in range(max_steps):
            carry = where(go_on(carry), step(carry), carry)
    else:
        on = lambda carry: (carry[0] < max_steps) & go_on(carry[1])
        more = lambda carry: (carry[0] + 1, step(carry[1]))
        carry = lax.while_loop(on, more, (jnp.zeros((), jnp.int32), carry))[1]
    return jtu.tree_map(lambda d: jnp.where(jnp.isfinite(rr), d, jnp.nan), carry[0])


def repeat(step: Callable, y: PyTree, count: int, unroll: bool) -> PyTree:
    """`y = step(y)`, `count` times."""
    if unroll or count == 1:
        for _ in range(count):
            y = step(y)
        return y
    return lax.fori_loop(0, count, lambda _, y: step(y), y) if count else y


def _dense_fit(mv: Callable, pull: Callable, y: PyTree, b: PyTree, gamma: Any):
    """(J'J + gamma I)^-1 J'b, by the smaller of J'J and J J'."""
    flat_y, unravel_y = ravel_pytree(y)
    flat_b, unravel_b = ravel_pytree(b)
    if flat_y.size <= flat_b.size:
        columns = jax.vmap(lambda e: ravel_pytree(mv(unravel_y(e)))[0])
        J = columns(jnp.eye(flat_y.size, dtype=flat_y.dtype)).T
        return unravel_y(_solve(_ridge(matmul(J.T, J), gamma), matmul(J.T, flat_b)))
    rows = jax.vmap(lambda e: ravel_pytree(pull(unravel_b(e)))[0])
    J = rows(jnp.eye(flat_b.size, dtype=flat_b.dtype))
    return unravel_y(matmul(J.T, _solve(_ridge(matmul(J, J.T), gamma), flat_b)))


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


def _size(tree: PyTree) -> int:
    return sum(a.size for a in jtu.tree_leaves(tree))
