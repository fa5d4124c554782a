"""Dynamics whose derivatives come from elsewhere than their program."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, PyTree

from .._common.tree import float_dtype, Layout
from .._common.types import (
    came,
    check_callable,
    check_function,
    check_positive,
    number_or_none,
)
from .calls import check_dtype


BY_JAX = "fwd", "rev"
ACCEPTED = "`dp.FiniteDifferences()` or a function `(x, u, t) -> (A, B)`"


class FiniteDifferences(eqx.Module):
    r"""Central differences, for dynamics that JAX cannot differentiate.

    $$\frac{\partial f}{\partial z_i} \approx
    \frac{f(z + h_i e_i) - f(z - h_i e_i)}{2 h_i}, \quad
    h_i = h \max(1, |z_i|), \quad z = (x, u),$$

    by 2 (n + m) calls of the function, all at once. With the step of the default the
    error is about $\epsilon^{2/3}$ of the scale of f: 4e-11 in float64, and 2e-5 in
    float32, where solves may stop early. Take float64.

    - `step`: h, `None` for the cube root of the rounding of the dtype (6e-6 in float64,
        5e-3 in float32). Larger where the function itself is noisy.
    """

    step: float | Array | None = number_or_none()

    def __check_init__(self):
        if self.step is not None:
            check_positive("step", self.step, ", or `None`")

    def jacobian(self, fn: Callable, z: Float[Array, " _"]) -> Float[Array, "_ _"]:
        """The derivatives of `fn(z)`, a vector, in z: a row for each entry of it."""
        unit = jnp.finfo(z.dtype).eps ** (1 / 3) if self.step is None else self.step
        steps = jnp.asarray(unit, z.dtype) * jnp.maximum(1, jnp.abs(z))
        moved = steps[None] * jnp.eye(len(z), dtype=z.dtype)
        points = jnp.concatenate([z[None] + moved, z[None] - moved])
        values = jax.vmap(fn)(points)
        widths = (z + steps) - (z - steps)  # as they were rounded
        return ((values[: len(z)] - values[len(z) :]) / widths[:, None]).T


class Differentiated(eqx.Module):
    """Dynamics with given derivatives: call it as `dynamics(x, u, t) -> x`.

    - `fn`, `jacobian`, `hessian`: as given to [`diffprog.with_jacobian`][].
    """

    fn: Callable
    jacobian: Any
    hessian: Callable | None

    def __call__(self, x: PyTree, u: PyTree, t: int | Int[Array, ""]) -> PyTree:
        by_name = _is_name(self.jacobian)
        if by_name and self.jacobian == "fwd" and self.hessian is None:
            return self.fn(x, u, t)
        (x, u), t = jtu.tree_map(jnp.asarray, (x, u)), jnp.asarray(t)
        dtype = float_dtype(x=x, u=u)
        at = _Place(self, Layout.of(x, dtype), Layout.of(u, dtype))
        z = jnp.concatenate([at.x.ravel(x), at.u.ravel(u)])
        # The first call says how the next state is arranged.
        levels, last = [_converted(at.value, z, t), _converted(at.jacobian, z, t)], None
        if self.hessian is not None:
            levels, last = [*levels, _converted(at.hessian, z, t)], THIRD
        elif not by_name:
            last = NO_SECOND.format(_described(self.jacobian))
        return at.new.unravel(_evaluated(levels, last, z, t))


def _converted(fn: Callable, *examples: Array) -> tuple[Callable, list]:
    """`fn` as a program, and the traced numbers that it takes from around it."""
    return jax.closure_convert(fn, *examples)


def _evaluated(levels: list, last: str | None, z: Array, t: Array) -> Array:
    """The first function at z, whose derivative by z is the second, and so on.

    The last one has that of its program, or none, which `last` says. All of them are
    differentiated by the numbers that they hold as their programs are.

    JAX drops the rule of a function where it has a linear program to transpose, and
    differentiates what stands in it once more: so each is called at z itself.
    """
    (program, held), *rest = levels
    if not rest and last is None:
        return program(z, t, *held)

    @jax.custom_jvp
    def evaluate(z, t, held):
        return program(z, t, *held[0])

    def rule(primals, tangents):
        z, t, held = primals
        along, _, held_along = tangents
        here = [(level[0], own) for level, own in zip(levels, held, strict=True)]
        value = _evaluated(here, last, z, t)
        change = jnp.zeros_like(value)
        if not isinstance(along, SymbolicZero):
            if not rest:
                raise TypeError(last)
            slope = _evaluated(here[1:], last, z, t)
            change += jnp.tensordot(slope, along, 1, precision="highest")
        if not all(isinstance(dot, SymbolicZero) for dot in held_along[0]):
            by_held = lambda *own: program(z, t, *own)
            dots = map(_known, held[0], held_along[0])
            change += jax.jvp(by_held, tuple(held[0]), tuple(dots))[1]
        return value, change

    evaluate.defjvp(rule, symbolic_zeros=True)
    return evaluate(z, t, [own for _, own in levels])


def _known(value: Array, tangent: Any) -> Array:
    zero = isinstance(tangent, SymbolicZero)
    return jnp.zeros_like(value) if zero else tangent


class _Place:
    """The functions at one kind of state and control, as ones of (z, t), z = (x, u)."""

    def __init__(self, given: Differentiated, x: Layout, u: Layout):
        self.given, self.x, self.u = given, x, u
        self.new: Layout = x

    def _split(self, z: Array) -> tuple[PyTree, PyTree]:
        n = self.x.size
        return self.x.unravel(z[:n]), self.u.unravel(z[n:])

    def value(self, z: Array, t: Array) -> Array:
        new = self.given.fn(*self._split(z), t)
        check_dtype("fn", self.given.fn, new, self.x.dtype)
        self.new = Layout.of(new, self.x.dtype)
        return self.new.ravel(new)

    def jacobian(self, z: Array, t: Array) -> Array:
        """[A B]."""
        given = self.given.jacobian
        fn = lambda z: self.value(z, t)
        if _is_name(given):
            return dict(fwd=jax.jacfwd, rev=jax.jacrev)[given](fn)(z)
        if isinstance(given, FiniteDifferences):
            return given.jacobian(fn, z)
        pair = given(*self._split(z), t)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"`jacobian` returned {came(pair)}; {PAIR} is expected.")
        shapes = [(self.new.size, layout.size) for layout in (self.x, self.u)]
        A = _block("jacobian", "A", pair[0], shapes[0], z, "by x")
        B = _block("jacobian", "B", pair[1], shapes[1], z, "by u")
        return jnp.concatenate([A, B], axis=1)

    def hessian(self, z: Array, t: Array) -> Array:
        """The Hessian of every entry of the next state."""
        hessian, shape = self.given.hessian, (len(z), len(z))
        x, u = self._split(z)

        def of(p):
            found = hessian(x, u, t, self.new.unravel(p))  # pyright: ignore
            return _block("hessian", "an array", found, shape, z, "by (x, u)")

        return jax.vmap(of)(jnp.eye(self.new.size, dtype=z.dtype))


def _block(fn: str, name: str, found: Any, shape: tuple, z: Array, by: str) -> Array:
    """What a function of the user returned for a matrix of derivatives."""
    array = jnp.asarray(found)
    if array.shape != shape:
        rows = "second derivatives" if fn == "hessian" else "the next state"
        raise ValueError(
            f"`{fn}` returned {name} of shape {array.shape}; {shape} is expected, "
            f"{rows} {by}: states and controls that are pytrees lie in it raveled, "
            "leaf after leaf."
        )
    if array.dtype != z.dtype and not array.weak_type:
        raise TypeError(
            f"`{fn}` returned {name} of dtype {array.dtype}, where x and u are "
            f"{z.dtype}: convert it with `.astype`."
        )
    return array.astype(z.dtype)


PAIR = "a pair `(A, B)` of matrices of derivatives, by x and by u,"
THIRD = (
    "Third derivatives of dynamics with a `hessian` are needed here, which are not "
    "known. Leave out `jacobian` and `hessian`: then JAX differentiates the function."
)
NO_SECOND = (
    "Second derivatives of the dynamics are needed here, such as by `dp.DDP()` and "
    "`dp.Newton()`, and only first ones are known: its `jacobian` is {}. Take "
    "`dp.ILQR()` or `dp.GaussNewton()`, which need no more, or give `dp.with_jacobian` "
    "a `hessian`: a function `(x, u, t, p)` that returns that of p'f in (x, u)."
)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _described(jacobian: Any) -> str:
    given = isinstance(jacobian, FiniteDifferences)
    return "`dp.FiniteDifferences`" if given else "a function"


def check_jacobian(jacobian: Any, names: tuple[str, ...] = BY_JAX):
    """Raises for what says nothing about derivatives."""
    if isinstance(jacobian, FiniteDifferences):
        return
    if _is_name(jacobian) and jacobian in names:
        return
    accepted = "".join(f'"{name}", ' for name in names) + ACCEPTED
    if _is_name(jacobian):
        raise ValueError(f"`jacobian` is {jacobian!r}; {accepted} is expected.")
    check_callable("jacobian", jacobian, accepted)


def with_jacobian(
    fn: Callable, jacobian: Any = "fwd", hessian: Callable | None = None
) -> Callable:
    r"""Dynamics with derivatives that you choose, or give.

    Where a solve needs $A = \partial f / \partial x$ and $B = \partial f / \partial u$
    it takes them from `jacobian`, and products with second derivatives from `hessian`;
    values come from `fn`. The same holds under `jax.grad`, `jax.jacfwd`, `jax.jacrev`
    and `jax.vmap`. Derivatives by numbers that `fn` holds, such as a mass, are those of
    its program.

    **Arguments:**

    - `fn`: the dynamics `(x, u, t) -> x`, traceable by JAX. For others there is
        [`diffprog.external`][].
    - `jacobian`: `"fwd"`, forward mode, as without this function: n + m products, each
        as dear as one call; `"rev"`, reverse mode: n products, for states that are
        much shorter than controls, or for programs without forward mode
        (`jax.custom_vjp`); a [`diffprog.FiniteDifferences`][]; or a function
        `(x, u, t) -> (A, B)` with shapes `(n, n)` and `(n, m)`. Where states or
        controls are pytrees, rows and columns are their entries leaf after leaf, as in
        [`diffprog.LinearModel`][]. On a manifold these are derivatives of the entries
        of x, not of local coordinates.
    - `hessian`: a function `(x, u, t, p)`, with p arranged like the next state, that
        returns the Hessian of p'f in (x, u), shape `(n + m, n + m)` and raveled too. It
        is called for the n unit vectors p at once. Unless given, second derivatives are
        those of the program for `"fwd"` and `"rev"`.

    **Returns:** a module, to be called as `dynamics(x, u, t)`.

    **Raises:** `ValueError` and `TypeError` for another `jacobian`, and, where it is
    called, for matrices of other shapes or dtypes. `TypeError` where second derivatives
    are needed and not known (by [`diffprog.DDP`][] and [`diffprog.Newton`][], say).
    Nothing checks that given derivatives belong to `fn`; wrong ones end in
    `no_descent`.
    """
    check_function("fn", fn, "(x, u, t) -> x")
    check_jacobian(jacobian)
    if hessian is not None:
        check_function("hessian", hessian, "(x, u, t, p) -> matrix")
    return Differentiated(fn, jacobian, hessian)
