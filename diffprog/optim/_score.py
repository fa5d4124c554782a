from typing import Any

import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._common.conjugate_gradients import solve_cg
from .._common.door import door
from .._common.tree import add, cast_like, scale
from .._common.types import check_count, check_not_negative, check_number, Number
from ._checks import check_curvature, check_like
from ._curvature import Curvature, LossModel


def score(
    curvature: Curvature,
    steps: PyTree,
    damping: Number = 0.0,
    *,
    value: Number | None = None,
    rtol: Number = 1e-8,
    max_steps: int = 1000,
) -> PyTree:
    r"""How much of the best decrease of a model steps reach: 1 at the exact step.

    $$\frac{J(d)}{J^*}, \quad
    J(d) = \langle g, d \rangle + \tfrac12 \langle d, (C + \rho I) d \rangle, \quad
    J^* = \min_d J(d) = -\tfrac12 \langle g, (C + \rho I)^{-1} g \rangle.$$

    Judge a step on the batch that made it, and on others.

    **Arguments:**

    - `curvature`: that of a batch, such as `dp.optim.ggn(loss)(model, inputs,
        targets)`.
    - `steps`: a change of the parameters, like them; or a dict, list or tuple of such,
        which are compared.
    - `damping`: rho >= 0.
    - `value`: $J^*$ where it is known, as from [`diffprog.layerwise_lqr`][]; else
        conjugate gradients find it, at most `max_steps`, to a residual of `rtol` |g|.

    **Returns:** a number; or the scores, arranged like `steps`. NaN where C + rho I is
    not positive definite. A score below 0 is of a step that raises the model.

    Costs `max_steps` products with C at most, and one for each step.
    """
    check_curvature(curvature)
    check_not_negative("damping", damping)
    check_number("rtol", rtol, "a number > 0")
    check_count("max_steps", max_steps)
    if value is not None:
        check_number("value", value, "a number < 0")
    return _score(curvature, steps, damping, value, rtol, max_steps)


@door
def _score(curvature, steps, damping, value, rtol, max_steps) -> PyTree:
    params, model = curvature.params, curvature.linearize()
    structure = jtu.tree_structure(params)
    is_step = lambda tree: jtu.tree_structure(tree) == structure
    found, treedef = jtu.tree_flatten(steps, is_leaf=is_step)
    for step in found:
        check_like("steps", step, params)
    best = optimum(model, damping, rtol, max_steps) if value is None else value
    judge = lambda d: model.change(cast_like(d, model.gradient), damping) / best
    return treedef.unflatten(map(judge, found))


def optimum(model: LossModel, damping: Any, rtol: Any, max_steps: int) -> Array:
    """J*, by conjugate gradients."""
    product = lambda d: add(model.mv(d), d, damping)
    g = model.gradient
    return model.change(scale(-1, solve_cg(product, g, max_steps, rtol)), damping)
