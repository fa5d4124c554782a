r"""How the numbers of a structured preconditioner U are found.

With vectors v, which are gradients or random, and the curvatures C of their batches,

    J(U) = mean of <v, u> + <u, (C + rho I) u> / 2,    u = -U v,
    r = v + (C + rho I) u,    dJ/dU = the pull-back of u(U) at r:

one product with C for a gradient of J, whatever the structure.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._common.conjugate_gradients import conjugate_gradients
from .._common.linalg import solve_positive, symmetrize
from .._common.loops import repeat
from .._common.tree import add, normal_like, scale, vdot, where
from .._common.types import (
    AbstractPart,
    check_one_number,
    check_positive,
    checked,
    is_known,
    Number,
    number,
    positive_int,
)


class StructureObjective(eqx.Module):
    r"""What U minimizes: $J(U)$, the mean of a quadratic model over some vectors.

    $$J(U) = \operatorname{mean} \left[ \langle v, u \rangle
    + \tfrac12 \langle u, (C + \rho I) u \rangle \right], \quad u = -U v.$$

    - `vectors`: v, for every batch.
    - `step`: u, for every batch, as a function of U.
    - `product`: $(C + \rho I) u$, for every batch.
    - `weights`: what the sums over the entries of a batch are multiplied with.
    - `linear`: whether u is linear in the numbers that make up U.
    """

    vectors: tuple
    step: Callable
    product: Callable
    weights: tuple[float, ...] = eqx.field(static=True)
    linear: bool = eqx.field(static=True)

    def dot(self, a: tuple, b: tuple) -> Float[Array, ""]:
        """The mean of the inner products of two things like the vectors."""
        return sum(c * vdot(*pair) for c, *pair in zip(self.weights, a, b))  # pyright: ignore

    def change(self, u: tuple, Cu: tuple) -> Float[Array, ""]:
        """J where (C + rho I) u is known."""
        return self.dot(self.vectors, u) + self.dot(u, Cu) / 2

    def value(self, U: PyTree) -> Float[Array, ""]:
        """J(U)."""
        u = self.step(U)
        return self.change(u, self.product(u))

    def gradient(self, U: PyTree) -> PyTree:
        """dJ/dU, the pull-back of r = v + (C + rho I) u."""
        u, pull = jax.vjp(self.step, U)
        return self.pulled(pull, add(self.vectors, self.product(u)))

    def pulled(self, pull: Callable, r: tuple) -> PyTree:
        """The pull-back of r at its weights."""
        return pull(tuple(scale(c, part) for c, part in zip(self.weights, r)))[0]

    def curvature(self, U: PyTree) -> Callable:
        """The product with the Hessian of J, where u is linear in U."""
        _, pull = jax.vjp(self.step, U)
        return lambda E: self.pulled(pull, self.product(self.step(E)))


def check_steps(name: str, value: Any):
    """Raises for what is no number of steps."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`{name}` is {value!r}; a Python int >= 0 is expected.")


def check_share(name: str, value: Any):
    """Raises for what is no number from 0 to 1."""
    expected = "a number from 0 to 1"
    check_one_number(name, value, expected)
    if is_known(value) and not 0 <= value <= 1:
        raise ValueError(f"`{name}` is {value}; {expected} is expected.")


def check_clip(name: str, value: Any):
    """Raises for what is no positive number, and not `None`."""
    if value is not None:
        check_positive(name, value, ", or `None`")


class AbstractStructureSolver(AbstractPart):
    """How U is found, from the U that it starts with.

    - `needs_linear`: whether structures must be linear in their numbers.
    """

    needs_linear: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def solve(self, objective: StructureObjective, U: PyTree) -> PyTree:
        """A better U; NaN where numbers are not finite, and the old one is kept."""


class HeavyBall(AbstractStructureSolver):
    r"""Gradient steps with momentum, as published.

    $$m \leftarrow \mu m + \nabla J(U), \quad U \leftarrow U - \eta m.$$

    No array of U moves further than $\eta c \sum_{t=1}^{T} (1 - \mu^t) / (1 - \mu)$
    from its start: 2.05 with the numbers given here.

    - `num_steps`: T, each a product with the curvature.
    - `learning_rate`, `momentum`: eta and mu.
    - `clip`: c, the largest norm of the gradient of an array of U; or `None`.
    """

    num_steps: int = checked(check_steps, static=True, default=50)
    learning_rate: Number = number(1e-3, check_positive)
    momentum: Number = number(0.9, check_share)
    clip: Number | None = number(5.0, check_clip)

    needs_linear: ClassVar[bool] = False

    def solve(self, objective, U):
        def step(at):
            U, m = at
            g = objective.gradient(U)
            if self.clip is not None:
                g = jtu.tree_map(lambda a: clipped(a, self.clip), g)
            m = add(g, m, self.momentum)
            return add(U, m, -self.learning_rate), m

        start = U, jtu.tree_map(jnp.zeros_like, U)
        return repeat(step, start, self.num_steps)[0]


class Search(NamedTuple):
    """Where conjugate gradients with exact steps are."""

    U: PyTree
    u: tuple
    Cu: tuple  # (C + rho I) u
    value: Array
    g: PyTree  # the gradient before
    E: PyTree  # the direction before
    size: Array  # of the next step: 1, smaller where J rose


class ExactStep(AbstractStructureSolver):
    r"""Conjugate gradients whose step length is that of the model, with no rate.

    $$t = -\frac{\langle r, u_E \rangle}{\langle u_E, (C + \rho I) u_E \rangle}$$

    along a direction E of the structure with its step $u_E$, the derivative of u: the
    exact minimum where the structure is linear. For others the length is halved as long
    as J does not fall. Directions are those of Polak and Ribiere.

    - `num_steps`: each a product with the curvature, or two where the structure is not
        linear.
    """

    num_steps: int = checked(check_steps, static=True, default=10)

    needs_linear: ClassVar[bool] = False

    def solve(self, objective, U):
        u, zero = objective.step(U), jtu.tree_map(jnp.zeros_like, U)
        Cu = objective.product(u)
        value = objective.change(u, Cu)
        start = Search(U, u, Cu, value, zero, zero, jnp.ones_like(value))
        found = repeat(lambda at: self._step(objective, at), start, self.num_steps)
        finite = jnp.isfinite(found.value)
        return jtu.tree_map(lambda a: jnp.where(finite, a, jnp.nan), found.U)

    def _step(self, objective, at: Search) -> Search:
        _, pull = jax.vjp(objective.step, at.U)
        r = add(objective.vectors, at.Cu)
        g = objective.pulled(pull, r)
        E = conjugate(g, at.g, at.E)
        _, u_E = jax.jvp(objective.step, (at.U,), (E,))
        Cu_E = objective.product(u_E)
        bend = objective.dot(u_E, Cu_E)
        t = -objective.dot(r, u_E) / jnp.where(bend == 0, 1, bend)
        t = jnp.where(bend > 0, at.size * t, 0 * bend)  # where it is NaN: NaN
        U = add(at.U, E, t)
        if objective.linear:
            u, Cu = add(at.u, u_E, t), add(at.Cu, Cu_E, t)
        else:
            u = objective.step(U)
            Cu = objective.product(u)
        value = objective.change(u, Cu)
        new = Search(U, u, Cu, value, g, E, jnp.minimum(1, 2 * at.size))
        if objective.linear:
            return new
        # A step that was not taken is tried again at half its length, downhill.
        zero = jtu.tree_map(jnp.zeros_like, E)
        old = at._replace(g=zero, E=zero, size=at.size / 2)
        return where((value > at.value) | ~jnp.isfinite(value), old, new)


class LinearCG(AbstractStructureSolver):
    r"""Conjugate gradients for structures that are linear: J is a quadratic in U.

    With gradients of few batches and many steps U remembers these batches: what it
    scores on others falls again.

    - `num_steps`: each a product with the curvature, and one more.
    """

    num_steps: int = checked(check_steps, static=True, default=10)

    needs_linear: ClassVar[bool] = True

    def solve(self, objective, U):
        r = scale(-1, objective.gradient(U))
        product = objective.curvature(U)
        return conjugate_gradients(product, U, r, jnp.zeros(()), self.num_steps).x


class NormalEquations(AbstractStructureSolver):
    r"""The exact minimum for structures that are linear and have few numbers.

    For one scalar, one per layer or one per leaf, of the gradients $g_i$ of the groups,

    $$S \alpha = b, \quad b_i = \langle g_i, g_i \rangle, \quad
    S_{ij} = \langle g_i, (C + \rho I)_{ij} g_j \rangle.$$

    What has no gradient keeps its number. U is refused where S is not positive definite
    else, as with a Hessian that is not.

    - `max_size`: the most numbers that U may have.

    Costs as many products with the curvature as U has numbers, and a factorization.
    """

    max_size: int = positive_int(1024)

    needs_linear: ClassVar[bool] = True

    def solve(self, objective, U):
        flat, unravel = ravel_pytree(U)
        if flat.size > self.max_size:
            raise ValueError(
                f"U has {flat.size} numbers, more than the `max_size` of "
                f"{self.max_size} of `NormalEquations`; take `LinearCG()`."
            )
        product = objective.curvature(U)
        row = lambda e: ravel_pytree(product(unravel(e)))[0]
        S = lax.map(row, jnp.eye(flat.size, dtype=flat.dtype), batch_size=64)
        g = ravel_pytree(objective.gradient(U))[0]
        sizes = jnp.sqrt(jnp.maximum(jnp.diagonal(S), 0))
        idle = (sizes == 0) & (g == 0)
        sizes = jnp.where(idle, 1, sizes)
        scaled = symmetrize(S / sizes[:, None] / sizes[None])
        scaled = scaled + jnp.diag(idle.astype(S.dtype))
        change, positive = solve_positive(scaled, -(g / sizes)[:, None])
        return unravel(jnp.where(positive, flat + change[:, 0] / sizes, jnp.nan))


def conjugate(g: PyTree, before: PyTree, E: PyTree) -> PyTree:
    """-g + beta E, downhill; beta >= 0 is 0 where there is no direction before."""
    square = vdot(before, before)
    beta = vdot(g, add(g, before, -1)) / jnp.where(square == 0, 1, square)
    beta = jnp.where(square == 0, 0, jnp.maximum(beta, 0))
    new = add(scale(-1, g), E, beta)
    return where(vdot(new, g) > 0, scale(-1, g), new)


def clipped(a: Array, limit: Any) -> Array:
    """The array with at most this norm."""
    size = jnp.sqrt(jnp.sum(a**2))
    return a * jnp.where(size > limit, limit / jnp.where(size > 0, size, 1), 1)


class AbstractProbe(AbstractPart):
    """The vectors v that stand for a batch in what U minimizes."""

    @abc.abstractmethod
    def draw(self, gradient: PyTree, key: PRNGKeyArray) -> PyTree:
        """Vectors like the gradient, on a first axis."""


class GradientProbe(AbstractProbe):
    """The gradient of the batch, as published.

    U fits the batches it sees, and their noise: give 8 or more.
    """

    def draw(self, gradient, key):
        return jtu.tree_map(lambda a: a[None], gradient)


class GaussianProbe(AbstractProbe):
    r"""Standard normal vectors: U is then a best inverse of C for all vectors.

    Independent entries leave out what couples layers: for a diagonal U the minimum is
    1 / (diag C + rho), whose steps are far too long. Set their length by
    [`diffprog.optim.model_step`][].

    - `num`: so many vectors for a batch.
    """

    num: int = positive_int(8)

    def draw(self, gradient, key):
        return normal_like(key, gradient, self.num)


class RademacherProbe(AbstractProbe):
    """Vectors of random signs, see [`diffprog.optim.GaussianProbe`][].

    - `num`: so many vectors for a batch.
    """

    num: int = positive_int(8)

    def draw(self, gradient, key):
        leaves, treedef = jtu.tree_flatten(gradient)
        keys = jr.split(key, len(leaves))
        signs = lambda key, a: jr.rademacher(key, (self.num, *a.shape), a.dtype)
        return treedef.unflatten(map(signs, keys, leaves))
