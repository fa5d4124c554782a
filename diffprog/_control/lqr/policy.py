import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..._chain.limits import moved
from ..._chain.manifold import AbstractManifold
from ..._common.linalg import matmul
from ..._common.tree import Layout


class Policy(eqx.Module):
    r"""The feedback u = us + k + K (x - xs) around states `xs` and controls `us`.

    Where controls have limits u is cut off there, and the gains of those that are held
    at a limit are 0.

    `policy(t, x)` takes and returns states and controls as the problem has them. In the
    fields they lie raveled, leaf after leaf in the order of `jax.tree.leaves`
    (dictionaries by sorted key).

    Under `jax.jit` a stage that the policy does not have gives NaN. Compile it with
    `equinox.filter_jit(policy)`, or hand it over as data; map the policies of a batch
    with `jax.vmap(lambda policy, x: policy(t, x))(policies, xs)`.

    - `K`: feedback gains, shape `(T, m, n)`; on a manifold n is the number of local
        coordinates, and x - xs is its `difference`.
    - `k`: feedforward terms, shape `(T, m)`; near 0 at an optimum.
    - `xs`, `us`: the trajectory, a row of each stage.
    """

    K: Float[Array, "*batch T m n"]
    k: Float[Array, "*batch T m"]
    xs: Float[Array, "*batch T _"]
    us: Float[Array, "*batch T m"]
    _x: Layout = eqx.field(static=True)
    _u: Layout = eqx.field(static=True)
    _start: int = eqx.field(static=True)
    _limits: tuple[Float[Array, "*batch T m"], ...] = ()
    _manifold: AbstractManifold | None = None

    def __repr__(self) -> str:
        return f"Policy(K={self.K!r}, k={self.k!r})"

    def __call__(self, t: int | np.integer | Int[Array, ""], x: PyTree) -> PyTree:
        """The control at stage `t` in state `x`."""
        if self.us.ndim != 2:
            batch = self.us.shape[:-2]
            raise ValueError(
                f"This policy holds a batch of shape {batch}, one policy for each "
                "problem: map over both, `jax.vmap(lambda policy, x: policy(t, x))"
                "(policy, xs)`."
            )
        layout, stages = Layout.of(x, self._x.dtype), self.us.shape[0]
        if layout != self._x:
            raise ValueError(
                f"`x` has the shapes {layout.describe()}; a state of the problem has "
                f"{self._x.describe()}."
            )
        integer = isinstance(t, int | np.integer)
        if isinstance(t, jax.Array | np.ndarray):
            integer = not t.ndim and jnp.issubdtype(t.dtype, jnp.integer)
        if not integer:
            raise TypeError(
                f"`t` is {t!r:.100}; the index of a stage, one integer, is expected."
            )
        t = t - self._start
        inside = (0 <= t) & (t < stages)
        if isinstance(t, int | np.integer) and not inside:
            raise ValueError(
                f"`t` is {t + self._start}; this policy has the stages {self._start} "
                f"to {self._start + stages - 1}."
            )
        y = self._difference(x, self.xs[t])
        v = self.k[t] + matmul(self.K[t], y)
        u, _ = moved(self.us[t], v, *(limit[t] for limit in self._limits))
        # JAX would take the nearest stage where a `t` that it traces has none.
        return self._u.unravel(jnp.where(inside, u, jnp.nan))

    def _difference(self, x: PyTree, reference: Array) -> Float[Array, " n"]:
        manifold, layout = self._manifold, self._x
        if manifold is None:
            return layout.ravel(x) - reference
        v = manifold.difference(x, layout.unravel(reference))
        return Layout.of(v, layout.dtype).ravel(v)

    def __hash__(self) -> int:
        raise TypeError(
            "A policy holds arrays, so that `jax.jit` cannot take it for a function: "
            "use `equinox.filter_jit(policy)`, or hand it over as data, "
            "`jax.jit(lambda policy, t, x: policy(t, x))`."
        )
