"""What a constraint measured, and the checks of it that name the constraint."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._common.tree import working_dtype
from .._common.types import came, is_number


Kind = Literal["at_most", "at_least", "equal"]


class Constraint(eqx.Module):
    """What a call of `measure` found of one constraint.

    Made by [`diffprog.constrained.at_most`][], [`diffprog.constrained.at_least`][] and
    [`diffprog.constrained.equal`][], whose arguments are its fields.

    - `value`, `limit`: what was measured, and what it has to keep.
    - `strict`: the true measure, or `None`.
    - `index`, `mask`: rows of the table of multipliers, and which rows count.
    - `rows`: the size of the table, or `None`.
    - `kind`: `"at_most"`, `"at_least"` or `"equal"`.
    """

    value: Any
    limit: Any
    strict: Any
    index: Any
    mask: Any
    rows: Any = eqx.field(static=True)
    kind: Kind = eqx.field(static=True)

    @property
    def equal(self) -> bool:
        """Whether its multipliers have any sign."""
        return self.kind == "equal"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of its multipliers."""
        shape = self.value.shape
        return shape if self.rows is None else (self.rows, *shape[1:])

    @property
    def dtype(self) -> Any:
        """That of its multipliers: at least float32."""
        return working_dtype(self.value)

    def violation(self) -> Array:
        """g or h of the surrogate, in the dtype of its value."""
        return self._signed(self.value)

    def error(self) -> Array:
        """g or h of the strict measure, in the dtype of the multipliers."""
        if self.strict is None:
            return self.violation().astype(self.dtype)
        return self._signed(jnp.asarray(self.strict).astype(self.dtype))

    def _signed(self, value: Array) -> Array:
        limit = jnp.asarray(self.limit).astype(value.dtype)
        limit = jnp.broadcast_to(limit, value.shape)
        return limit - value if self.kind == "at_least" else value - limit

    def counted(self) -> Array | None:
        """Which entries count; `None` for all."""
        if self.mask is None and self.index is None:
            return None
        mask = jnp.ones_like(self.value, bool)
        if self.index is not None:
            mask &= self._along(self.places() < self.rows)
        return mask if self.mask is None else mask & self._along(self.mask)

    def places(self) -> Array:
        """The row of every example; that of padding is behind the table."""
        inside = (self.index >= 0) & (self.index < self.rows)
        return jnp.where(inside, self.index, self.rows)

    def _along(self, rows: Any) -> Array:
        """An array of rows, as one of all entries."""
        rows = jnp.asarray(rows)
        wide = rows.reshape(rows.shape + (1,) * (self.value.ndim - rows.ndim))
        return jnp.broadcast_to(wide, self.value.shape)


def at_most(
    value: Array,
    limit: Any,
    *,
    strict: Any = None,
    index: Any = None,
    rows: int | None = None,
    mask: Any = None,
) -> Constraint:
    r"""The constraint $g = v - l \le 0$: a value is at most its limit.

    **Arguments:**

    - `value`: v, differentiable in the parameters, an array of any shape. Every entry
        is a constraint of its own, with its own multiplier $\lambda \ge 0$.
    - `limit`: l, a number or an array that broadcasts to the shape of `value`.
    - `strict`: what has to keep the limit in truth, where `value` is only a smooth
        stand-in for it, such as a rate beside a mean of sigmoids; of the same shape. It
        drives the multipliers and the report, and `value` the gradient. A rate jumps:
        with small steps of the dual it can stay a little above its limit for long.
    - `index`: where every example has a multiplier of its own, and a call sees some of
        them: the row in a table of `rows` multipliers, integers of shape `(B,)` for a
        `value` of shape `(B, ...)`. Rows that repeat count with their mean; what is no
        row of the table, such as -1, is padding.
    - `rows`: the number of rows of this table, a Python int.
    - `mask`: which entries count, booleans of the shape of `value` or of its first
        axes.

    **Returns:** a [`diffprog.constrained.Constraint`][], which `measure` returns by
    name. What is wrong with it is said by
    [`diffprog.constrained.Lagrangian`][], which knows the name.
    """
    return _constraint(value, limit, strict, index, mask, rows, "at_most")


def at_least(
    value: Array,
    limit: Any,
    *,
    strict: Any = None,
    index: Any = None,
    rows: int | None = None,
    mask: Any = None,
) -> Constraint:
    r"""The constraint $g = l - v \le 0$: a value is at least its limit.

    **Arguments:** those of [`diffprog.constrained.at_most`][].

    **Returns:** a [`diffprog.constrained.Constraint`][].
    """
    return _constraint(value, limit, strict, index, mask, rows, "at_least")


def equal(
    value: Array,
    limit: Any,
    *,
    strict: Any = None,
    index: Any = None,
    rows: int | None = None,
    mask: Any = None,
) -> Constraint:
    r"""The constraint $h = v - l = 0$: a value equals its limit.

    **Arguments:** those of [`diffprog.constrained.at_most`][]; multipliers have any
    sign.

    **Returns:** a [`diffprog.constrained.Constraint`][].
    """
    return _constraint(value, limit, strict, index, mask, rows, "equal")


def _constraint(value, limit, strict, index, mask, rows, kind: Kind) -> Constraint:
    value = jnp.asarray(value) if is_number(value) else value
    index = jnp.asarray(index) if isinstance(index, list | np.ndarray) else index
    return Constraint(value, limit, strict, index, mask, rows, kind)


# What is wrong, by name -----------------------------------------------------------


def check_constraint(name: Any, constraint: Any):
    """Raises for what `measure` must not return under this name."""
    if not isinstance(constraint, Constraint):
        raise TypeError(
            f"Constraint `{name}` is {came(constraint)}; "
            "`dp.constrained.at_most(value, limit)`, `at_least` or `equal` is expected."
        )
    value = constraint.value
    if not isinstance(value, jax.Array):
        raise TypeError(
            f"The value of constraint `{name}` is {came(value)}; one array is "
            "expected: give each array its own name."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"The value of constraint `{name}` has dtype {value.dtype}, so its "
            f"gradient is zero. {SURROGATE}"
        )
    for part in ("limit", "strict"):
        _check_part(name, constraint, part)
    _check_mask(name, constraint)
    _check_index(name, constraint)


SURROGATE = (
    "Give a smooth stand-in as `value`, and the true measure as `strict=`: "
    "`at_most(jnp.mean(jax.nn.sigmoid(u)), limit, strict=jnp.mean(u > 0))`."
)


def _check_part(name: str, constraint: Constraint, part: str):
    """A limit broadcasts to the value, and a strict measure has its shape."""
    found, shape = getattr(constraint, part), constraint.value.shape
    if part == "strict" and found is None:
        return
    if not is_number(found):
        raise TypeError(
            f"`{part}` of constraint `{name}` is {came(found)}; a number or an array "
            "is expected."
        )
    own, expected = np.shape(found), f"one of shape {shape}, as its value, is expected"
    fits = own == shape
    if part == "limit":
        expected = f"a number or one that broadcasts to {shape} is expected"
        fits = len(own) <= len(shape) and all(
            a in (1, b) for a, b in zip(own[::-1], shape[::-1])
        )
    if not fits:
        raise ValueError(
            f"`{part}` of constraint `{name}` has shape {own}; {expected}."
        )


def _check_mask(name: str, constraint: Constraint):
    mask, shape = constraint.mask, constraint.value.shape
    if mask is None:
        return
    found = f"`mask` of constraint `{name}` is {came(mask)}"
    if not is_number(mask) or jnp.result_type(mask) != bool:
        raise TypeError(f"{found}; booleans are expected, such as `labels == 1`.")
    if np.shape(mask) != shape[: np.ndim(mask)]:
        raise ValueError(
            f"{found}; the shape {shape} of its value, or its first axes, is expected."
        )


def _check_index(name: str, constraint: Constraint):
    index, rows, shape = constraint.index, constraint.rows, constraint.value.shape
    if index is None and rows is None:
        return
    if index is None or rows is None:
        given, other = ("index", "rows") if rows is None else ("rows", "index")
        raise ValueError(
            f"Constraint `{name}` has `{given}` and no `{other}`: `index=` are rows of "
            "a table of multipliers, and `rows=` is how many it has, such as the "
            "number of training examples."
        )
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise TypeError(
            f"`rows` of constraint `{name}` is {came(rows)}; a Python int >= 1 is "
            "expected."
        )
    if not isinstance(index, jax.Array) or not jnp.issubdtype(index.dtype, jnp.integer):
        kind = index.dtype if isinstance(index, jax.Array) else type(index).__name__
        raise TypeError(
            f"`index` of constraint `{name}` is of type {kind}; an array of integers "
            "is expected."
        )
    if not shape or index.shape != shape[:1]:
        raise ValueError(
            f"`index` of constraint `{name}` has shape {index.shape}; one integer for "
            f"each row of its value, of shape {shape}, is expected."
        )
