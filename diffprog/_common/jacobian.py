"""Products with the Jacobian of a model, which runs in its own dtypes.

What goes in and comes out is in the working dtype: see `working_dtype`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from .primitives import dependence
from .tree import cast, cast_like, working_dtype


LARGEST = 2**27  # entries of a Jacobian that is formed
ROWS = 64  # of it at a time


def products(
    fn: Callable, params: PyTree, constant: str = ""
) -> tuple[PyTree, Callable, Callable, Any]:
    """`outputs, mv, transpose_mv, aux` of `fn(params) = outputs, aux`.

    J d and J' v, as functions of d like `params` and of v like `outputs`. Where a layer
    has a derivative by `jax.custom_vjp`, and so none forward, J is formed by its rows.
    With a message `constant` it raises that where outputs do not depend on parameters.
    """
    outputs, push, aux = jax.linearize(fn, params, has_aux=True)
    pull = jax.linear_transpose(push, params)
    dtype = working_dtype(params, outputs)
    mv = lambda d: cast(push(cast_like(d, params)), dtype)
    transpose_mv = lambda v: cast(pull(cast_like(v, outputs))[0], dtype)
    if _in_float16(params, outputs):
        mv, transpose_mv = _scaled(mv), _scaled(transpose_mv)
    program = jax.make_jaxpr(push)(params).jaxpr
    if constant and not any(dependence(program)):
        raise ValueError(constant)
    if _backward_only(program):
        mv = _by_rows(transpose_mv, params, cast(outputs, dtype))
    return outputs, mv, transpose_mv, aux


def _in_float16(*trees: PyTree) -> bool:
    return any(leaf.dtype == jnp.float16 for leaf in jtu.tree_leaves(trees))


def _scaled(product: Callable) -> Callable:
    """The linear function, given vectors whose largest entry is 1.

    float16 has few exponents: what is small would be 0 there, and the large infinite.
    """

    def call(v):
        sizes = [jnp.max(jnp.abs(leaf)) for leaf in jtu.tree_leaves(v)]
        size = jnp.max(jnp.stack(sizes))
        size = jnp.where(size > 0, size, 1)
        image = product(jtu.tree_map(lambda leaf: leaf / size, v))
        return jtu.tree_map(lambda leaf: size * leaf, image)

    return call


def _backward_only(jaxpr: Any) -> bool:
    """Whether a program is linear in what only its transpose is known of."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_lin":
            return True
        for value in jtu.tree_leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and _backward_only(inner):
                return True
    return False


def _by_rows(transpose_mv: Callable, params: PyTree, outputs: PyTree) -> Callable:
    """J d from the rows J' e of J, which only a program that asks for it computes."""
    flat, unravel = ravel_pytree(outputs)
    size = sum(leaf.size for leaf in jtu.tree_leaves(params))
    if flat.size * size > LARGEST:

        def refuse(d):
            raise TypeError(
                "The model has a layer with `jax.custom_vjp`, whose derivative is "
                "known backward only, and is needed forward, or as a matrix of at "
                f"most 2**27 entries: here it has {flat.size} by {size}, outputs by "
                "parameters. Give smaller batches, define the layer by "
                "`jax.custom_jvp`, or take an oracle that goes backward only, with a "
                "number for its damping: `Gradient`, `TargetPropagation` or "
                "`MoreauBackprop`."
            )

        return refuse
    row = lambda i: transpose_mv(unravel(jnp.zeros_like(flat).at[i].set(1)))
    J = lax.map(row, jnp.arange(flat.size), batch_size=ROWS)

    def mv(d):
        along = lambda rows, d: jnp.tensordot(rows, d, d.ndim, precision="highest")
        parts = jtu.tree_leaves(jtu.tree_map(along, J, d))
        return unravel(jnp.sum(jnp.stack(parts), 0))

    return mv
