"""Limits of the controls: lower <= u <= upper at every stage."""

import math
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._common.types import came, is_known, is_number


NEVER = math.inf, -math.inf  # as a lower limit, as an upper one
PAIRS = "`(lo, hi)` has all lower limits, then all upper ones."


def as_bounds(bounds: Any) -> Any:
    """`control_bounds` as given, ints as floats; raises for what is wrong."""
    if bounds is None:
        return None
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"`control_bounds` is {came(bounds)}; a pair `(lo, hi)` is expected, all "
            "lower limits and all upper ones: each a number, `None` for no limit, or "
            "arranged like one control or like `us`."
        )
    sides = tuple(_as_side(i, side) for i, side in enumerate(bounds))
    _check_order(*sides)
    return sides


def _as_side(i: int, side: PyTree) -> PyTree:
    def convert(path, leaf):
        where = f"`control_bounds[{i}]{jtu.keystr(path)}`"
        if not is_number(leaf) or isinstance(leaf, bool):
            raise TypeError(
                f"{where} is {came(leaf)}; a number or an array of them is expected."
            )
        if isinstance(leaf, int):
            return float(leaf)
        if jnp.result_type(leaf) == bool:
            raise TypeError(f"{where} has dtype bool; numbers are expected.")
        if is_known(leaf) and np.any(np.isnan(leaf)):
            raise ValueError(f"{where} has a NaN; where there is no limit, write inf.")
        if is_known(leaf) and np.any(np.asarray(leaf) == NEVER[i]):
            raise ValueError(
                f"{where} is {NEVER[i]}, which no control keeps; where there is no "
                f"limit, write {-NEVER[i]}."
            )
        return leaf

    return jtu.tree_map_with_path(convert, side)


def _check_order(lower: PyTree, upper: PyTree):
    """Raises where a known lower limit is above the upper one."""
    if lower is None or upper is None:
        return
    lows, highs = (jtu.tree_leaves_with_path(side) for side in (lower, upper))
    if len(lows) != len(highs):  # one number for all, or a mistake that `rows` tells
        lows, highs = lows * len(highs), highs * len(lows)
    for (path, low), (other, high) in zip(lows, highs, strict=False):
        if not (is_known(low) and is_known(high)):
            continue
        try:
            wrong = np.greater(low, high)
        except ValueError:  # shapes that do not fit: also told by `rows`
            continue
        if np.any(wrong):
            index = tuple(map(int, np.argwhere(wrong)[0]))
            pair = [np.broadcast_to(side, wrong.shape)[index] for side in (low, high)]
            at = f"[{', '.join(map(str, index))}]" if index else ""
            key = jtu.keystr(path) or jtu.keystr(other)
            pairs = f" {PAIRS}" if key or at else ""
            raise ValueError(
                f"`control_bounds`: the lower limit{key}{at} is {pair[0]}, above the "
                f"upper one, {pair[1]}; lo <= hi is expected, and lo = hi fixes a "
                f"control.{pairs}"
            )


def like_controls(bounds: Any, us: PyTree, dtype: Any) -> tuple[PyTree, PyTree]:
    """Both limits with the shapes of the stacked controls `us`."""
    sides = bounds or (None, None)
    fills = -jnp.inf, jnp.inf
    return tuple(  # pyright: ignore
        _like(f"control_bounds[{i}]", side, us, fill, dtype)
        for i, (side, fill) in enumerate(zip(sides, fills, strict=True))
    )


def _like(name: str, side: PyTree, us: PyTree, fill: float, dtype: Any) -> PyTree:
    if side is None:
        return jtu.tree_map(lambda u: jnp.full(u.shape, fill, dtype), us)
    if is_number(side) and not np.ndim(side):
        return jtu.tree_map(lambda u: jnp.broadcast_to(_cast(side, dtype), u.shape), us)
    tree, expected = jtu.tree_structure(side), jtu.tree_structure(us)
    if tree != expected:
        raise ValueError(
            f"`{name}` is arranged as {tree}, and a control as {expected}: give one "
            "number for all, or a tree like one control or like `us`; in a tree no "
            "limit is inf or -inf, and a list of numbers is a tree as well: an array "
            f"is `jnp.array([...])`. {PAIRS}"
        )

    def broadcast(path, leaf, u):
        control, shape = u.shape[1:], np.shape(leaf)
        target = u.shape if len(shape) > len(control) else control
        try:
            jnp.broadcast_shapes(shape, target)
            return jnp.broadcast_to(_cast(leaf, dtype), u.shape)
        except ValueError as error:
            raise ValueError(
                f"`{name}{jtu.keystr(path)}` has shape {shape}; that of a control, "
                f"{control}, or of all stages, {u.shape}, is expected."
            ) from error

    return jtu.tree_map_with_path(broadcast, side, us)


def middle(bounds: Any, horizon: int, dtype: Any) -> PyTree:
    """The middle between the limits at all stages, where both are finite.

    Else 0, cut off at a limit; `None` where they do not say the shape of a control.
    """
    is_one = lambda side: side is None or (is_number(side) and not np.ndim(side))
    sides = [side for side in bounds or () if not is_one(side)]
    if not sides:
        return None

    def zeros(leaf):
        stacked = np.ndim(leaf) > 1 and np.shape(leaf)[0] == horizon
        shape = np.shape(leaf)[1:] if stacked else np.shape(leaf)
        return jnp.zeros((horizon, *shape), dtype)

    limits = like_controls(bounds, jtu.tree_map(zeros, sides[0]), dtype)
    return jtu.tree_map(between, *limits)


def between(lower: Array, upper: Array) -> Array:
    """Their middle, or what is nearest to 0 where one of them is infinite.

    NaN where there is nothing between them.
    """
    finite = jnp.isfinite(lower) & jnp.isfinite(upper)
    half = jnp.where(finite, lower / 2 + upper / 2, 0)
    return cut_off(half, lower, upper)


def _cast(leaf: Any, dtype: Any) -> Array:
    return jnp.asarray(leaf).astype(dtype)


def cut_off(u: Array, lower: Array, upper: Array) -> Array:
    """The nearest within the limits; NaN where there is none."""
    return jnp.where(can_be_kept(lower, upper), jnp.clip(u, lower, upper), jnp.nan)


def can_be_kept(lower: Array, upper: Array) -> Array:
    """Whether there is a finite number between them."""
    return (lower <= upper) & (lower < jnp.inf) & (upper > -jnp.inf)


def moved(u: Float[Array, " m"], v: Float[Array, " m"], *limits: Float[Array, " m"]):
    """u + v within the limits, if there are any, and the v that is left of it.

    A limit that the sum differs from by its rounding is reached.
    """
    new = u + v
    if not limits:
        return new, v
    lower, upper = limits
    rounding = lambda limit: jnp.finfo(u.dtype).eps * (jnp.abs(u) + jnp.abs(limit))
    new = jnp.where(new <= lower + rounding(lower), lower, new)
    new = jnp.where(new >= upper - rounding(upper), upper, new)
    return new, new - u


def projected(gradient: Array, u: Array, *limits: Array) -> Array:
    """The gradient without what pushes a control against a limit that it has reached.

    What is left out are the multipliers of the limits.
    """
    if not limits:
        return gradient
    lower, upper = limits
    pushes = ((u <= lower) & (gradient > 0)) | ((u >= upper) & (gradient < 0))
    return jnp.where(pushes, 0, gradient)
