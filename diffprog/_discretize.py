from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree


METHODS = ("euler", "midpoint", "rk4")


class Discretized(eqx.Module):
    """A vector field stepped over `dt`: call it as `dynamics(x, u, t) -> x`.

    - `vector_field`, `dt`, `method`: as given to [`diffprog.discretize`][].
    """

    vector_field: Callable
    dt: float | Float[Array, ""]
    method: Any  # a name, or a diffrax solver

    def __call__(self, x: PyTree, u: PyTree, t: int | Int[Array, ""]) -> PyTree:
        dt = self.dt
        start = jnp.asarray(t, jnp.result_type(jtu.tree_leaves(x)[0])) * dt

        def slope(y, elapsed):
            dy = self.vector_field(y, u, start + elapsed)
            shapes = [jtu.tree_map(jnp.shape, tree) for tree in (dy, x)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"`vector_field` returned the shapes {shapes[0]}; those of the "
                    f"state, {shapes[1]}, are expected."
                )
            return dy

        if self.method == "euler":
            return _add(x, dt, slope(x, 0.0))
        if self.method == "midpoint":
            return _add(x, dt, slope(_add(x, dt / 2, slope(x, 0.0)), dt / 2))
        if self.method == "rk4":
            k1 = slope(x, 0.0)
            k2 = slope(_add(x, dt / 2, k1), dt / 2)
            k3 = slope(_add(x, dt / 2, k2), dt / 2)
            k4 = slope(_add(x, dt, k3), dt)
            mean = lambda k1, k2, k3, k4: (k1 + 2 * k2 + 2 * k3 + k4) / 6
            return _add(x, dt, jtu.tree_map(mean, k1, k2, k3, k4))
        import diffrax  # slow to import, and rarely needed

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda time, y, _: slope(y, time - start)),
            self.method,
            t0=start,
            t1=start + dt,
            dt0=dt,
            y0=x,
            saveat=diffrax.SaveAt(t1=True),
            adjoint=diffrax.DirectAdjoint(),
            max_steps=1,
        )
        return jtu.tree_map(lambda x: x[0], solution.ys)


def _add(x: PyTree, step, slope: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: a + step * b, x, slope)


def _is_solver(method: Any) -> bool:
    if isinstance(method, str):
        return False
    import diffrax

    return isinstance(method, diffrax.AbstractSolver)


def discretize(
    vector_field: Callable,
    dt: float | Float[Array, ""],
    method: Any = "rk4",
) -> Discretized:
    r"""Steps $\dot x = f(x, u, t)$ over `dt` with the control held.

    **Arguments:**

    - `vector_field`: `(x, u, t) ->` time derivative of x, with t in seconds: the stage
        index times `dt`.
    - `dt`: the length of a stage in seconds.
    - `method`: `"euler"`, `"midpoint"` or `"rk4"`, of order 1, 2 and 4, or any diffrax
        solver, which takes one step. (Diffrax is differentiated through its own loop:
        general, and several times slower than the three built-in rules.)

    **Returns:** a module, to be called as `dynamics(x, u, t)`.

    **Raises:** `ValueError` for an unknown method or a `dt` that is not positive.
    """
    if not callable(vector_field):
        raise TypeError(
            f"`vector_field` is {vector_field!r}; a function `(x, u, t) -> dx` is "
            "expected."
        )
    if isinstance(dt, float | int) and not dt > 0:
        raise ValueError(f"`dt` is {dt}; a positive number of seconds is expected.")
    if method not in METHODS and not _is_solver(method):
        raise ValueError(
            f"`method` is {method!r}; one of {', '.join(METHODS)}, or a diffrax solver "
            "such as `diffrax.Tsit5()`, is expected."
        )
    return Discretized(vector_field, dt, method)
