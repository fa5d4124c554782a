"""The Hessian of a loss in its scores, as an operator."""

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float

from .call import Call, check, Divergence, operator, Reference
from .root import below, ratio, root, settled


class SoftargmaxJacobian(lx.AbstractLinearOperator):
    r"""The Hessian of f_softmax, which is the Jacobian of f_softargmax.

    $$J = \operatorname{diag}(w) - \frac{w w^\top}{W} = A A^\top, \quad
    A = \operatorname{diag}(\sqrt w) (I - s s^\top), \; s = \sqrt{w / W},$$

    for weights $w \ge 0$, W their sum. A lineax operator, symmetric and positive
    semidefinite; every product takes O(k).

    - `w`: the weights, shape `(k,)`: $q_j (f^*)''(\theta_j - \tau)$.
    """

    w: Float[Array, " k"]

    @property
    def _s(self):
        W = jnp.sum(self.w)
        return jnp.sqrt(self.w / jnp.where(W > 0, W, 1))

    def mv(self, vector):
        """J v."""
        W = jnp.sum(self.w)
        mean = jnp.vdot(self.w, vector) / jnp.where(W > 0, W, 1)
        return self.w * (vector - mean)

    def sqrt_mv(self, vector: Float[Array, " k"]) -> Float[Array, " k"]:
        """A v."""
        return jnp.sqrt(self.w) * (vector - self._s * jnp.vdot(self._s, vector))

    def sqrt_transpose_mv(self, vector: Float[Array, " k"]) -> Float[Array, " k"]:
        """A' v."""
        scaled = jnp.sqrt(self.w) * vector
        return scaled - self._s * jnp.vdot(self._s, scaled)

    def pinv_mv(self, vector: Float[Array, " k"]) -> Float[Array, " k"]:
        """The pseudo-inverse of J times v: v / w, with mean 0 on the support."""
        support = self.w > 0
        count = jnp.maximum(jnp.sum(support), 1).astype(vector.dtype)
        on = lambda v: jnp.where(support, v, 0)
        center = lambda v: on(v - jnp.sum(on(v)) / count)
        return center(center(vector) / jnp.where(support, self.w, 1))

    def as_matrix(self):
        return jax.vmap(self.mv)(jnp.eye(self.w.size, dtype=self.w.dtype))

    def transpose(self):
        return self

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.w.shape, self.w.dtype)

    def out_structure(self):
        return self.in_structure()


for _property in (lx.is_symmetric, lx.is_positive_semidefinite):
    _property.register(SoftargmaxJacobian)(lambda operator: True)
for _property in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.has_unit_diagonal,
    lx.is_negative_semidefinite,
):
    _property.register(SoftargmaxJacobian)(lambda operator: False)
for _same in (lx.linearise, lx.materialise, lx.conj):
    _same.register(SoftargmaxJacobian)(lambda operator: operator)


@lx.diagonal.register(SoftargmaxJacobian)
def _(operator):
    W = jnp.sum(operator.w)
    return operator.w - operator.w**2 / jnp.where(W > 0, W, 1)


@jax.jit
def solution(call: Call) -> tuple[Array, Array]:
    """The probabilities, and the weights w of their Jacobian, for all rows."""
    s = call.set_up()
    sigma = root(s.classes, s.f, s.problem)
    u = ratio(s.f, sigma + below(s.problem.scores, s.problem.m))
    weights = s.problem.q * s.f.curvature(u) / s.beta
    p = settled(s.classes, s.f, s.problem, sigma)
    return call.rows(p), call.rows(weights)


@operator
def hessian_operator(
    scores: Float[ArrayLike, " k"],
    f: Divergence,
    reference: Reference = None,
    *,
    where=None,
    temperature=1.0,
) -> SoftargmaxJacobian:
    """The Hessian of [`diffprog.losses.f_loss`][] in the scores of one row.

    It does not depend on the targets. For many rows: `jax.vmap`.

    **Arguments:** those of [`diffprog.losses.f_softargmax`][]; `scores` of shape
    `(k,)`.

    **Returns:** a [`diffprog.losses.SoftargmaxJacobian`][].
    """
    if jnp.ndim(scores) != 1:
        raise ValueError(
            f"`scores` has shape {jnp.shape(scores)}; one row (k,) is expected: for "
            "many rows use `jax.vmap`."
        )
    call = check(scores, f, reference, -1, where, temperature, None)
    return SoftargmaxJacobian(solution(call)[1])
