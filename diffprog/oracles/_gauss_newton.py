import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common.result import RESULTS
from .._common.tree import cast, scale, vdot
from .._common.types import came, component, number
from ._base import AbstractOracle, Linearization, Proposal
from ._damping import check_damping
from ._solvers import AbstractCG, AbstractSolver, Auto


def _is_warm(solver: AbstractSolver) -> bool:
    return isinstance(solver, AbstractCG) and solver.warm_start != 0


def _init(self: "GaussNewton | DualGaussNewton", params: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, params) if _is_warm(self.solver) else None


def _propose(
    self: "GaussNewton | DualGaussNewton",
    at: Linearization,
    damping: Array,
    memory: PyTree,
    key: Any,
) -> Proposal:
    solver, metric = self.solver, self.metric
    structure = jtu.tree_structure(at.params)
    if metric is not None and jtu.tree_structure(metric) != structure:
        raise ValueError(
            f"`metric` is {came(metric)}; a pytree like the parameters, those of "
            "`eqx.filter(model, eqx.is_inexact_array)`, with positive weights is "
            "expected."
        )
    roots = jtu.tree_map(jnp.sqrt, cast(metric, at.value.dtype))
    if metric is not None:  # w = metric^(-1/2) v
        at = _scaled(at, roots)
    solved = solver.solve(at, damping, memory, key)
    step, slope = solved.step, vdot(at.gradient, solved.step)
    length2 = vdot(step, step)
    if solved.minimizes:  # slope = -d'(C + damping I)d
        decrease = (damping * length2 - slope) / 2
    else:
        curvature = -2 * (at.model_decrease(step) + slope)
        factor = jnp.ones_like(slope)
        if self.scale_model:
            total = curvature + damping * length2
            factor = jnp.where(total > 0, -slope / jnp.where(total > 0, total, 1), 1)
        step = scale(factor, step)
        decrease = -factor * slope - factor**2 * curvature / 2
    memory = step if _is_warm(solver) else None
    if metric is not None:
        step = jtu.tree_map(jnp.divide, step, roots)
    bad, failed = solved.negative_curvature, RESULTS.factorization_failed
    result = RESULTS.where(bad, failed, RESULTS.successful)
    found = solved.gap, solved.num_inner
    return Proposal(step, decrease, damping, *found, result, memory)


def _scaled(at: Linearization, roots: PyTree) -> Linearization:
    """In the parameters v with w = v / roots."""
    divide = lambda tree: jtu.tree_map(jnp.divide, tree, roots)
    return dataclasses.replace(
        at,
        gradient=divide(at.gradient),
        mv=lambda d: at.mv(divide(d)),
        transpose_mv=lambda v: divide(at.transpose_mv(v)),
        layers=None,  # these do not know of the scaling
    )


class GaussNewton(AbstractOracle):
    r"""Gauss-Newton, also called Levenberg-Marquardt or generalized Gauss-Newton.

    $$d = \operatorname{argmin}_d \; \frac1m \sum_i q_i(J_i d) + \frac\lambda2 \|d\|^2
    = -\Bigl(\frac1m J^\top H J + \lambda I\Bigr)^{-1} \nabla h,$$

    where $q_i$ is the quadratic model of the loss of example i at its outputs, J the
    Jacobian of the outputs, and H the Hessians of the losses. Examples are coupled: it
    is not the mean of their own directions. With the squared loss it is the exact
    Gauss-Newton method EGN.

    - `damping`: lambda > 0, a number or a rule such as
        [`diffprog.oracles.Threshold`][].
    - `solver`: [`diffprog.oracles.Auto`][], the default; or
        [`diffprog.oracles.Cholesky`][], [`diffprog.oracles.CG`][],
        [`diffprog.oracles.DualCG`][], [`diffprog.oracles.RandomSubspace`][].
    - `scale_model`: give a step that is not the minimizer of the model the length that
        minimizes it along itself.
    - `metric`: positive weights of the parameters, a pytree like them (or `None`), in
        $\frac\lambda2 \langle d, \text{metric} \, d \rangle$.

    Fails with `factorization_failed` where a loss is not convex in the outputs.

    Source: Schraudolph, "Fast Curvature Matrix-Vector Products for Second-Order
    Gradient Descent", 2002; Korbit, Adeoye, Bemporad, Zanon, "Exact Gauss-Newton
    Optimization for Training Deep Neural Networks", 2024, arXiv 2405.14402.
    """

    damping: Any = number(1.0, check_damping)
    solver: AbstractSolver = component(Auto(), "dp.oracles.CG(max_steps=10)")
    scale_model: bool = eqx.field(static=True, default=True)
    metric: PyTree = None

    init, propose = _init, _propose


class DualGaussNewton(AbstractOracle):
    r"""Gauss-Newton, found from the dual problem: one vector of outputs per example.

    $$d = -\frac{1}{\lambda m} J^\top \alpha^*, \quad
    \alpha^* = \operatorname{argmax}_\alpha \; -\frac1m \sum_i q_i^*(\alpha_i)
    - \frac{1}{2 \lambda m^2} \|J^\top \alpha\|^2.$$

    A step is ordinary back-propagation of $\alpha^*$ in place of the gradient of the
    loss. The same direction as [`diffprog.oracles.GaussNewton`][] where both are
    solved exactly.

    - `damping`, `scale_model`, `metric`: as there.
    - `solver`: [`diffprog.oracles.Auto`][], the default, with vectors in the space of
        the outputs; [`diffprog.oracles.DualCG`][] as in the source, where every iterate
        is a descent direction; or any other.

    Source: Roulet, Blondel, "Dual Gauss-Newton Directions for Deep Learning", 2023,
    arXiv 2308.08886.
    """

    damping: Any = number(1.0, check_damping)
    solver: AbstractSolver = component(
        Auto(in_outputs=True), "dp.oracles.CG(max_steps=10)"
    )
    scale_model: bool = eqx.field(static=True, default=True)
    metric: PyTree = None

    init, propose = _init, _propose
