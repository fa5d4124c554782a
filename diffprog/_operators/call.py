"""The arguments of an operator: checked, and put in the order of the solver."""

import functools as ft
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._common.types import came, check_positive, Fn, is_known, with_advice
from .alpha import written
from .divergence import AbstractDivergence
from .generated import as_divergence
from .root import Evaluation, largest, Problem


Divergence = AbstractDivergence | Callable
Axis = int | tuple[int, ...]
Reference = Literal["unit", "uniform"] | Float[ArrayLike, "..."] | None


@jax.custom_jvp
def divided(scores: Array, beta: Array) -> Array:
    """scores / beta, infinite where the scores are, and with a derivative there."""
    least = jnp.finfo(scores.dtype).min
    return jnp.where(scores == -jnp.inf, scores, jnp.maximum(scores / beta, least))


@divided.defjvp
def _(primals, tangents):
    (scores, beta), (dscores, dbeta) = primals, tangents
    ratio = divided(scores, beta)
    return ratio, (dscores - jnp.where(jnp.isinf(scores), 0, ratio) * dbeta) / beta


class Setup(NamedTuple):
    """A call with its classes on the last axis and its scores divided by beta."""

    classes: Evaluation
    f: AbstractDivergence
    problem: Problem
    beta: Array

    @property
    def present(self) -> Array:
        return self.problem.scores != -jnp.inf


class Call(eqx.Module):
    """The arguments of an operator, checked. `None` stands for what is not given."""

    scores: Array
    f: AbstractDivergence
    reference: Array | None
    where: Array | None
    temperature: Array | None
    unit: bool = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True)  # none is negative
    axis_name: str | None = eqx.field(static=True)

    def last(self, a: Array) -> Array:
        """An array of the shape of the scores with its classes on the last axis."""
        n = len(self.axes)
        a = jnp.moveaxis(a, self.axes, range(-n, 0))
        return a if n == 1 else a.reshape(*a.shape[:-n], -1)

    @property
    def classes(self) -> int:
        return math.prod(self.scores.shape[i] for i in self.axes)

    def set_up(self) -> Setup:
        small = self.scores.dtype.itemsize < 4
        dtype = jnp.dtype(jnp.float32) if small else self.scores.dtype
        last = self.last
        theta, excluded = last(self.scores).astype(dtype), []
        beta = jnp.ones((), dtype)
        if self.where is not None:
            excluded.append(~last(self.where))
        if self.reference is not None:
            excluded.append(last(self.reference) <= 0)
        if self.temperature is not None:
            beta = self.temperature.astype(dtype)
            theta = divided(theta, beta)
            # NaN before would be looked for in every pass over the scores.
            beta = jnp.where(beta > 0, beta, jnp.nan)
        if excluded:
            theta = jnp.where(ft.reduce(jnp.logical_or, excluded), -jnp.inf, theta)
        f = jtu.tree_map(lambda a: a.astype(dtype), self.f)
        f = f.for_ratios(self.unit) if f.for_ratios is not None else f
        classes = Evaluation(self.axis_name, self.unit and f.sparse)
        if self.reference is None:
            count = classes.sum(jnp.where(theta != -jnp.inf, 1, jnp.zeros_like(theta)))
            q = jnp.ones((), dtype) if self.unit else 1 / jnp.maximum(count, 1)
            Q = q * count
        else:
            q = last(self.reference).astype(dtype)
            Q = classes.sum(jnp.where(theta != -jnp.inf, q, 0))
        return Setup(classes, f, Problem(theta, q, Q, largest(theta, classes)), beta)

    def rows(self, a: Array) -> Array:
        """An array like the scores, as the caller has them."""
        if self.temperature is not None:
            a = a * jnp.where(self.temperature > 0, 1, jnp.nan).astype(a.dtype)
        shape, axes = self.scores.shape, self.axes
        if len(axes) > 1:
            a = a.reshape(*batch_shape(shape, axes), *(shape[i] for i in axes))
        return jnp.moveaxis(a, range(-len(axes), 0), axes).astype(self.scores.dtype)

    def row(self, a: Array) -> Array:
        """One number per row, as the caller has them."""
        return a[..., 0].astype(self.scores.dtype)


def check(scores, f, reference, axis, where, temperature, axis_name) -> Call:
    if scores is None or callable(scores) or isinstance(scores, Divergence | str):
        raise TypeError(
            f"`scores` is {came(scores)}; an array is expected, and f comes after it."
        )
    scores, f = jnp.asarray(scores), as_divergence(f)
    axes = _check_scores(scores, axis)
    shape = scores.shape
    per_row_of = lambda path, a: per_row(jtu.keystr(path)[1:], a, shape, axes)
    f = jtu.tree_map_with_path(per_row_of, f)
    if where is not None:
        where = _like_scores("where", where, scores.shape)
        if where.dtype != bool:
            raise TypeError(f"`where` has dtype {where.dtype}; booleans are expected.")
    check_temperature(temperature)
    if isinstance(temperature, (int, float)) and temperature == 1:
        temperature = None
    else:
        temperature = per_row("temperature", temperature, shape, axes)
    check_reference(reference, f)
    unit = reference is None
    if isinstance(reference, str):
        unit, reference = reference == "unit", None
    elif reference is not None:
        reference = _like_scores("reference", reference, scores.shape)
        if is_known(reference) and not np.all(np.asarray(reference) >= 0):
            raise ValueError(
                "`reference` has a negative or NaN entry; a measure is >= 0 "
                "everywhere, and 0 excludes a class."
            )
    return Call(scores, f, reference, where, temperature, unit, axes, axis_name)


def operator(fn: Fn) -> Fn:
    """Refuses options of other libraries, and says what the option is here."""
    has_axis = "axis" in inspect.signature(fn).parameters

    def instead(name: str, value: Any, known: str) -> str:
        if name == "dim" and has_axis:
            return f"say `axis={value!r}`"
        if name in ("dim", "axis"):
            return f"it takes every entry by itself; {known}"
        return known

    return with_advice(instead)(fn)


def check_reference(reference: Any, f: AbstractDivergence):
    """Raises for a measure that is missing, and for a name that there is not."""
    if reference is None and not f.scale_free:
        raise TypeError(
            f'`reference` is missing; for {written(f)} it matters: "unit" (as in '
            'entmax and sparsemax), "uniform" (1 / number of classes), or an array. '
            "Only KL gives the same probabilities for the first two."
        )
    if isinstance(reference, str) and reference not in ("unit", "uniform"):
        raise ValueError(
            f'`reference` is "{reference}"; "unit", "uniform" or an array is expected.'
        )


def check_temperature(temperature: Any, otherwise: str = ""):
    """Raises for what is no number, and for known numbers that are not positive."""
    if isinstance(temperature, list | tuple):
        temperature = np.asarray(temperature)
    check_positive("temperature", temperature, otherwise)


def _check_scores(scores: Array, axis: Axis) -> tuple[int, ...]:
    """The axes of the classes, from the first on."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(
            f"`scores` has dtype {scores.dtype}; floats are expected: convert integers "
            "with `scores.astype(float)`, and mind that scores come before targets."
        )
    if scores.ndim == 0:
        raise ValueError("`scores` is one number; an axis of classes is expected.")
    n, axes = scores.ndim, axis if isinstance(axis, tuple) else (axis,)
    integers = all(isinstance(i, int) and -n <= i < n for i in axes)
    if not integers or not 0 < len(axes) == len({i % n for i in axes}):
        raise ValueError(
            f"`axis` is {axis}; an integer from {-n} to {n - 1}, or a tuple of "
            f"different ones, is expected for `scores` of shape {scores.shape}."
        )
    if any(scores.shape[i] == 0 for i in axes):
        raise ValueError(f"`scores` has shape {scores.shape}: no class on axis {axis}.")
    return tuple(i % n for i in axes)


def batch_shape(shape: tuple, axes: tuple[int, ...]) -> tuple:
    """The shape without the axes of the classes."""
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def per_row(name: str, value, shape: tuple, axes: tuple[int, ...]) -> Array:
    """A number for all rows, or one for each, with an axis for the classes.

    It may have the axes of the classes already, with length 1.
    """
    batch, value = batch_shape(shape, axes), jnp.asarray(value)
    if value.ndim == len(shape) and all(value.shape[i] == 1 for i in axes):
        value = jnp.squeeze(value, axes)
    _check_broadcasts(name, value, batch, "of `scores` without its class axis")
    return jnp.broadcast_to(value, batch)[..., None] if value.ndim else value


def _like_scores(name: str, value, shape: tuple) -> Array:
    value = jnp.asarray(value)
    _check_broadcasts(name, value, shape, "of `scores`")
    return jnp.broadcast_to(value, shape)


def _check_broadcasts(name: str, value: Array, shape: tuple, what: str):
    try:
        fits = np.broadcast_shapes(value.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` has shape {value.shape}; one that broadcasts to {shape}, the "
            f"shape {what}, is expected."
        )
