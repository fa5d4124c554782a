from typing import Any, Literal

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..._chain.network import is_linear, parametrized
from ..._chain.network_problem import ADVICE, NetworkProblem
from ..._chain.vector import run, VectorTrajectory
from ..._chain.vectorize import vectorize, Vectorized
from ..._common.door import door
from ..._common.linalg import symmetrize
from ..._common.result import explain, RESULTS, throw_unless_successful
from ..._common.tree import float_dtype, strong
from ..._common.types import (
    came,
    check_kind,
    check_one_number,
    is_known,
)
from ..direction import GaussNewton, Newton
from ..lqr import Riccati
from .information import in_inputs
from .recursion import LayerwiseLQR, Model, stationary


@door
def _layerwise_lqr(problem, inputs, params, method, form, damping) -> LayerwiseLQR:
    at = vectorize(problem, inputs, params)
    trajectory = run(at.chain, *at.ravel(inputs, params))
    if form == "information":
        if len(at.x_layouts[-1].shapes) > 1:
            raise ValueError(
                f"The network has the outputs {at.x_layouts[-1].describe()}; "
                '`form="information"` is for one array: give `form="stages"`.'
            )
        model = in_inputs(at, trajectory, params)
    else:
        model = _in_parameters(method, at, trajectory)
    return stationary(at, trajectory, model, jnp.asarray(damping, at.chain.dtype))


def _in_parameters(method, at: Vectorized, trajectory: VectorTrajectory) -> Model:
    found: Any = method.expand(at.chain, trajectory).model
    W, fixed = tuple(map(symmetrize, found.W)), (0,) * len(found.W)
    return Model(found.F, W, found.V, trajectory.us, at.controls, fixed)


def layerwise_lqr(
    problem: NetworkProblem,
    inputs: PyTree,
    params: PyTree,
    method: GaussNewton | Newton = GaussNewton(),
    *,
    form: Literal["stages", "information"] = "stages",
    damping: float | Float[Array, ""] = 0.0,
    throw: bool = True,
) -> LayerwiseLQR:
    r"""The exact step of a network, and determinant and inertia of its curvature.

    $$d = -(C + \rho I)^{-1} g, \quad S_t = R_t + B_t^\top P_{t+1} B_t + \rho I, \quad
    \det(C + \rho I) = \prod_t \det S_t,$$

    by the Riccati recursion over the layers: the pivots $S_t$ are those of a block
    factorization of $C + \rho I$ from the last layer to the first, so they also have
    its numbers of positive and negative eigenvalues. g is the gradient of the loss, C
    its Hessian, or the Gauss-Newton matrix, or that of the `metric` of the problem.
    [`diffprog.direction`][] finds the same step where all pivots are positive definite,
    and nothing else; here they may have any signs.

    **Arguments:**

    - `problem`: a [`diffprog.NetworkProblem`][].
    - `inputs`: the inputs of the batch, the first axis being the example.
    - `params`: the parameters, arranged like `net.params`.
    - `method`: [`diffprog.GaussNewton`][] or [`diffprog.Newton`][].
    - `form`: `"stages"` works with all parameters of a layer. `"information"` is the
        same for Gauss-Newton in a network of dense layers ([`equinox.nn.Linear`][]),
        with a positive damping: the parameters of a layer move in the span of its
        inputs alone, and nothing has the size of a layer's parameters squared.
    - `damping`: $\rho \ge 0$.
    - `throw`: raise [`diffprog.SolveError`][] for an unsuccessful result when all
        inputs are concrete; its `solution` is what is returned else.

    **Returns:** a [`diffprog.LayerwiseLQR`][]. With negative eigenvalues its `result`
    is `factorization_failed`, and the step, with `throw=False`, the stationary point of
    the model, which is no minimum.

    **Raises:** `TypeError` and `ValueError` for anything else.

    With m examples of n numbers and p parameters a stage takes O((m n + p)^3) time, and
    O((m n + p)^2) memory. In the information form k min(m, inputs + 1) takes the place
    of p for a layer of k outputs. For small networks, and as a reference for others.

    Source: "Layerwise LQR for Geometry-Aware Optimization of Deep Networks", 2026,
    arXiv 2605.04230.
    """
    check_kind("problem", problem, NetworkProblem, "dp.NetworkProblem(net, loss, y)")
    _check_method(method, form)
    _check_damping(damping, form)
    (inputs, params), _ = strong(inputs, params)
    _check_params(problem, inputs, params)
    if form == "information":
        _check_dense(problem)
    damping = float(damping) if isinstance(damping, int) else damping
    found = _layerwise_lqr(problem, inputs, params, method, form, damping)
    return throw_unless_successful(found.result, found, throw, _explain)


def _check_method(method: Any, form: Any):
    if not isinstance(method, GaussNewton | Newton):
        raise TypeError(
            f"`method` is {came(method)}; `dp.GaussNewton()` or `dp.Newton()` is "
            "expected, whose model is quadratic in the parameters. Any direction: "
            "`dp.direction`."
        )
    if not isinstance(method.riccati, Riccati):
        raise ValueError(
            f"`method` is {came(method)}; here stages are taken one after the other: "
            f"`dp.{type(method).__name__}()` is expected."
        )
    if form not in ("stages", "information"):
        raise ValueError(
            f'`form` is {form!r:.100}; "stages" or "information" is expected.'
        )
    if form == "information" and isinstance(method, Newton):
        raise ValueError(
            '`form="information"` is for Gauss-Newton, whose layers have no second '
            'derivatives: give `method=dp.GaussNewton()`, or `form="stages"`.'
        )


def _check_damping(damping: Any, form: str):
    check_one_number("damping", damping, "one number >= 0")
    if not is_known(damping):
        return
    if not np.asarray(damping) >= 0:
        raise ValueError(f"`damping` is {damping}; a number >= 0 is expected.")
    if form == "information" and not np.asarray(damping) > 0:
        raise ValueError(
            f'`damping` is {damping}; `form="information"` divides by it, so a number '
            '> 0 is expected, or `form="stages"`.'
        )


def _check_params(problem: NetworkProblem, inputs: PyTree, params: PyTree):
    own = problem.network.params
    if jtu.tree_structure(params) != jtu.tree_structure(own):
        raise ValueError(
            f"`params` is {came(params)}, not arranged like the parameters of the "
            "network: give `net.params`, or others arranged like them."
        )
    float_dtype(inputs=inputs, params=params)
    for (path, leaf), one in zip(
        jtu.tree_leaves_with_path(params), jtu.tree_leaves(own), strict=True
    ):
        if np.shape(leaf) != one.shape:
            raise ValueError(
                f"`params{jtu.keystr(path)}` has shape {np.shape(leaf)}; {one.shape}, "
                "as in the network, is expected."
            )


def _check_dense(problem: NetworkProblem):
    for layer in parametrized(problem.network):
        if not is_linear(layer):
            raise ValueError(
                f'The network has a {type(layer).__name__}; `form="information"` is '
                "for dense layers, `eqx.nn.Linear`, and functions without parameters: "
                'give `form="stages"`.'
            )


def _explain(found: LayerwiseLQR) -> str:
    where = ""
    if found.result == RESULTS.factorization_failed:
        where = "A pivot is singular to rounding: there is no single stationary point."
        if np.isfinite(found.value):
            lowest = min(float(np.min(w)) for w in found.pivots)
            where = (
                f"Negative eigenvalues of the curvature matrix: {found.num_negative}; "
                f"the lowest of a pivot is {lowest:.1e}. So the step is a stationary "
                "point, and no minimum; `throw=False` returns it."
            )
    return explain(found.result, ADVICE, where)
