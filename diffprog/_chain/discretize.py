import typing
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from .._common.tree import all_finite, where
from .._common.types import check_function, check_one_number, is_known
from .calls import call


METHODS = ("euler", "midpoint", "rk4")


class Discretized(eqx.Module):
    """A vector field stepped over `dt`: call it as `dynamics(x, u, t) -> x`.

    - `vector_field`, `dt`, `method`: as given to [`diffprog.discretize`][].
    """

    vector_field: Callable
    dt: float | Float[Array, ""]
    method: Any  # a name, or a diffrax solver

    def __call__(self, x: PyTree, u: PyTree, t: int | Int[Array, ""]) -> PyTree:
        if not isinstance(self.method, str):
            return _by_diffrax(self, x, u, t)
        dt, slope = self.dt, _slope(self, x, u, t)
        if isinstance(dt, Tracer):  # where nothing can be raised
            dt = jnp.where(dt > 0, dt, jnp.nan)
        if self.method == "euler":
            return _add(x, dt, slope(x, 0.0))
        if self.method == "midpoint":
            return _add(x, dt, slope(_add(x, dt / 2, slope(x, 0.0)), dt / 2))
        k1 = slope(x, 0.0)
        k2 = slope(_add(x, dt / 2, k1), dt / 2)
        k3 = slope(_add(x, dt / 2, k2), dt / 2)
        k4 = slope(_add(x, dt, k3), dt)
        mean = lambda k1, k2, k3, k4: (k1 + 2 * k2 + 2 * k3 + k4) / 6
        return _add(x, dt, jtu.tree_map(mean, k1, k2, k3, k4))


def _slope(system: Discretized, x: PyTree, u: PyTree, t) -> Callable:
    """The time derivative as a function of the state and the time within the stage."""
    start = jnp.asarray(t, jnp.result_type(jtu.tree_leaves(x)[0])) * system.dt

    def slope(y, elapsed):
        dy = call("vector_field", system.vector_field, y, u, start + elapsed)
        shapes = [jtu.tree_map(jnp.shape, tree) for tree in (dy, x)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`vector_field` returned the shapes {shapes[0]}; those of the "
                f"state, {shapes[1]}, are expected."
            )
        return dy

    return slope


def _add(x: PyTree, step, slope: PyTree) -> PyTree:
    return jtu.tree_map(lambda a, b: a + step * b, x, slope)


def _by_diffrax(system: Discretized, x: PyTree, u: PyTree, t) -> PyTree:
    """One step; NaN where the equation of an implicit solver is not solved."""
    import diffrax

    if not isinstance(system.method, diffrax.AbstractImplicitSolver):
        return _diffrax_step(system, x, u, t)[0]
    # The derivative of a step that fails would abort the program. Where this one
    # fails, that of x' = 0 from 0 is taken instead: it is 0.
    hold = lambda a: lax.stop_gradient(a) if eqx.is_inexact_array(a) else a
    held = jtu.tree_map(hold, (system, x, u))
    y, good = _diffrax_step(held[0], held[1], held[2], t)
    zero = lambda tree: jtu.tree_map(jnp.zeros_like, tree)
    safe = lambda tree: where(good, tree, zero(tree))
    field = lambda y, u, time: safe(system.vector_field(y, u, time))
    calm = Discretized(field, system.dt, system.method)
    y = _differentiated_as(y, _diffrax_step(calm, safe(x), safe(u), t)[0])
    return jtu.tree_map(lambda a: jnp.where(good, a, jnp.nan), y)


def _diffrax_step(system: Discretized, x: PyTree, u: PyTree, t):
    """One step, and whether it succeeded."""
    import diffrax  # slow to import, and rarely needed

    slope = _slope(system, x, u, t)
    # From 0 on: there rounding never leaves a rest for a second step.
    dt = jnp.asarray(system.dt, jnp.result_type(jtu.tree_leaves(x)[0]))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda elapsed, y, _: slope(y, elapsed)),
        system.method,
        t0=jnp.zeros_like(dt),
        t1=dt,
        dt0=dt,
        y0=x,
        saveat=diffrax.SaveAt(t1=True),
        adjoint=diffrax.DirectAdjoint(),
        max_steps=1,
        throw=False,
    )
    y = jtu.tree_map(lambda x: jnp.where(dt > 0, x[0], jnp.nan), solution.ys)
    return y, (solution.result == diffrax.RESULTS.successful) & all_finite(y)


@jax.custom_jvp
def _differentiated_as(value: PyTree, same: PyTree) -> PyTree:
    """`value`, with the derivatives of `same`, which is only computed for these."""
    return value


@_differentiated_as.defjvp
def _(primals, tangents):
    return _differentiated_as(*primals), tangents[1]


def _check_method(method: Any):
    if isinstance(method, str) and method in METHODS:
        return
    import diffrax

    name = type(method).__name__
    if isinstance(method, str) or not isinstance(method, diffrax.AbstractSolver):
        raise ValueError(
            f"`method` is {method!r}; one of {', '.join(METHODS)}, or a diffrax solver "
            "such as `diffrax.Tsit5()`, is expected."
        )
    if isinstance(method, diffrax.AbstractWrappedSolver):
        raise ValueError(
            f"`method` is {name}, which serves adaptive steps; the length of a step "
            "is `dt` here: give the solver inside."
        )
    if isinstance(method, diffrax.LeapfrogMidpoint):
        raise ValueError(
            "`method` is LeapfrogMidpoint, which steps from the last two states; here "
            "each stage begins anew from one state, and of this method only its first "
            "step, one of Euler, would be left: give a method that needs no state but "
            "the last, such as `diffrax.Midpoint()` or `diffrax.Tsit5()`."
        )
    terms = method.term_structure
    terms = typing.get_origin(terms) or terms
    if not isinstance(terms, type) or not issubclass(diffrax.ODETerm, terms):
        raise ValueError(
            f"`method` is {name}, which needs an equation in several parts (noise, "
            "or a split vector field); a solver of x' = f(x, u, t), such as "
            "`diffrax.Tsit5()`, is expected."
        )
    if not isinstance(method, diffrax.AbstractImplicitSolver):
        return
    finder = method.root_finder
    advice = (
        f"pass `diffrax.{name}(root_finder=optimistix.Newton(rtol=1e-8, atol=1e-8), "
        "root_find_max_steps=100)` in float64, and 1e-3 in float32, where rounding "
        "keeps a stiff step from tighter ones."
    )
    if isinstance(finder, type):
        raise ValueError(
            f"`method` is {name}, whose root finder is the class `{finder.__name__}`; "
            f"one of its objects is expected: {advice}"
        )
    if not eqx.is_array_like(finder.rtol):
        raise ValueError(
            f"`method` is {name}, whose root finder has no tolerances, which come "
            "from an adaptive step size elsewhere; the length of a step is `dt` here: "
            f"{advice}"
        )


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
    - `method`: `"euler"`, `"midpoint"` or `"rk4"`, of order 1, 2 and 4, or a diffrax
        solver of ordinary differential equations, which takes one step, from the last
        state only. (Diffrax is differentiated through its own loop: general, but
        several times slower than the three built-in rules, and implicit solvers compile
        slowly.) The root finder of an implicit solver needs tolerances, about 1e-8 in
        float64 and 1e-3 in float32: `optimistix.Newton(rtol=1e-8, atol=1e-8)`. A chord
        method, such as `diffrax.VeryChord`, keeps one Jacobian and fails more often.
        The solver allows it 10 iterations: `root_find_max_steps=100` costs nothing
        where fewer do.

    **Returns:** a module, to be called as `dynamics(x, u, t)`. The new state is NaN,
    and a solve rejects the trial, where the root finder of an implicit solver does not
    reach its tolerances, or a traced `dt`, such as a field, is not positive.

    For four steps in a stage of length `dt`: `fine = discretize(f, dt / 4)`, and in
    `dynamics(x, u, t)` four times `x = fine(x, u, 4 * t + i)`, i from 0 to 3.

    **Raises:** `ValueError` for a method that is unknown or does not fit, or a `dt`
    that is not positive; `TypeError` for a `dt` that is not one number.
    """
    check_function("vector_field", vector_field, "(x, u, t) -> dx")
    check_one_number("dt", dt, "one number, the seconds of a stage,")
    if is_known(dt) and not dt > 0:
        raise ValueError(f"`dt` is {dt}; a positive number of seconds is expected.")
    _check_method(method)
    return Discretized(vector_field, dt, method)
