import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._common.tree import where, working_dtype
from .._common.types import check_not_negative, Number
from ._lagrangian import Report


class Best(eqx.Module):
    r"""The best parameters so far: of those that keep the limits the least loss.

    ```python
    best = dp.constrained.Best(params)
    (loss, report), grads, duals = lagrangian.step(params, duals, *batch)
    best = best.update(params, loss, report)  # before the parameters move on
    ```

    A measure that is a step function, such as a rate, flickers around its limit, and
    the last parameters keep it by chance. Until some keep the limits, the best are
    those that violate them least. Loss and violations are compared as they are: where
    they are of a batch, give those of an evaluation from time to time. In place of the
    loss any number does of which less is better, such as a rate of false alarms.

    - `params`: the best parameters.
    - `loss`: their loss; infinite before the first.
    - `violation`: their largest violation.
    - `tol`: a violation up to here is none.
    """

    params: PyTree
    loss: Float[Array, ""]
    violation: Float[Array, ""]
    tol: Number

    def __init__(self, params: PyTree, *, tol: Number = 0.0):
        check_not_negative("tol", tol)
        own = lambda leaf: jnp.array(leaf) if isinstance(leaf, jax.Array) else leaf
        self.params = jtu.tree_map(own, params)  # can be donated beside the others
        dtype = working_dtype(eqx.filter(params, eqx.is_array))
        self.loss = jnp.full((), jnp.inf, dtype)
        self.violation = jnp.full_like(self.loss, jnp.inf)
        self.tol = float(tol) if isinstance(tol, int) else tol

    @property
    def found(self) -> Array:
        """Whether some parameters kept the limits."""
        return self.violation <= self.tol

    def update(self, params: PyTree, loss: Array, report: Report) -> "Best":
        """The better of these parameters, with their loss and report, and the best."""
        dtype = self.loss.dtype
        loss, size = loss.astype(dtype), report.feasibility.astype(dtype)
        excess = lambda size: jnp.maximum(size - jnp.asarray(self.tol, dtype), 0)
        new, old = excess(size), excess(self.violation)
        better = (new < old) | ((new == old) & (loss < self.loss))
        better &= report.finite & jnp.isfinite(loss)
        params, rest = eqx.partition(params, eqx.is_array)
        before = eqx.filter(self.params, eqx.is_array)
        params = eqx.combine(where(better, params, before), rest)
        loss, size = where(better, (loss, size), (self.loss, self.violation))
        parts = lambda best: (best.params, best.loss, best.violation)
        return eqx.tree_at(parts, self, (params, loss, size))
