"""Constraints of states and controls: rows h = 0 and g <= 0."""

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._common.multipliers import merit
from .._common.types import came, check_function, is_number
from .calls import call, check_dtype


class AbstractConstraint(eqx.Module):
    """Values of states and controls that are 0, or at most 0.

    - `equal`: whether the values are 0.

    A field `name` is what messages call it.
    """

    equal: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def __call__(self, x: PyTree, *rest: Any) -> PyTree[Array]:
        """The values at a state, and at a control and stage unless it is the last."""


class AbstractFunction(AbstractConstraint):
    """A constraint that a function gives."""

    fn: Callable
    name: str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_function("fn", self.fn, "(x, u, t) -> array")
        _check_name(self.name)

    def __call__(self, x, *rest):
        return self.fn(x, *rest)


class Equality(AbstractFunction):
    """The constraint `fn(x, u, t)` = 0; among the terminal ones `fn(x)` = 0.

    Among `constraints` it counts at the stages 0 to T - 1, not at the last state: what
    must hold there too belongs into `terminal_constraints` as well.
    """

    equal: ClassVar[bool] = True


class Inequality(AbstractFunction):
    """The constraint `fn(x, u, t)` <= 0; among the terminal ones `fn(x)` <= 0.

    Among `constraints` it counts at the stages 0 to T - 1, not at the last state: what
    must hold there too belongs into `terminal_constraints` as well.
    """

    equal: ClassVar[bool] = False


for _kind in (Equality, Inequality):
    _kind.__init__.__doc__ = """**Arguments:**

- `fn`: a function of state, control and stage, or of the last state; it returns floats,
    any pytree of arrays. Scale it so that 1e-8 is a small violation.
- `name`: for messages; else its place, such as `constraints[0]`.
"""


class StateBounds(AbstractConstraint):
    """The constraint lo <= x <= hi.

    Among `constraints` it counts at the stages 0 to T - 1, not at the last state: what
    must hold there too belongs into `terminal_constraints` as well.
    """

    lo: PyTree
    hi: PyTree
    name: str | None = eqx.field(static=True, default=None)

    equal: ClassVar[bool] = False

    def __check_init__(self):
        _check_name(self.name)
        for name in ("lo", "hi"):
            for leaf in jtu.tree_leaves(getattr(self, name)):
                if not is_number(leaf):
                    raise TypeError(
                        f"`{name}` is {came(leaf)}; a number, an array, or a tree of "
                        "them like the state is expected."
                    )

    def __call__(self, x, *rest):
        sides = ((self.lo, -1), (self.hi, 1))
        return [_beyond(x, side, sign) for side, sign in sides if side is not None]


StateBounds.__init__.__doc__ = """**Arguments:**

- `lo`, `hi`: a number for all states, or a tree like the state; `None`, or -inf and inf
    in arrays, for no bound.
- `name`: for messages; else its place, such as `constraints[0]`.
"""


def _beyond(x: PyTree, side: PyTree, sign: int) -> PyTree:
    """sign (x - side), and -1 where there is no bound."""
    if is_number(side) and not jtu.all_leaves([x]):
        side = jtu.tree_map(lambda _: side, x)

    def rows(x, bound):
        bound = jnp.broadcast_to(jnp.asarray(bound).astype(x.dtype), x.shape)
        known = jnp.isfinite(bound)
        return jnp.where(known, sign * (x - jnp.where(known, bound, 0)), -1)

    return jtu.tree_map(rows, x, side)


def _check_name(name: Any):
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` is {came(name)}; a string is expected.")


def as_constraints(name: str, constraints: Any) -> tuple:
    """A tuple of constraints; raises for anything else."""
    if isinstance(constraints, AbstractConstraint):
        constraints = (constraints,)
    good = isinstance(constraints, tuple | list)
    for item in constraints if good else [constraints]:
        if not isinstance(item, AbstractConstraint):
            raise TypeError(
                f"`{name}` has {came(item)}; a tuple of `dp.Equality(fn)`, "
                "`dp.Inequality(fn)` and `dp.StateBounds(lo, hi)` is expected."
            )
    return tuple(constraints)


class Rows(eqx.Module):
    """The constraints of a stage as one vector.

    - `values`: a function of vectors.
    - `equal`: which entries are equalities.
    - `groups`: the number of the constraint that each entry comes from.
    - `free`: which entries depend on the controls.
    """

    values: Callable
    equal: tuple[bool, ...] = eqx.field(static=True)
    groups: tuple[int, ...] = eqx.field(static=True)
    free: tuple[bool, ...] = eqx.field(static=True)

    def merit(self, values: Array, dual: Array, penalties: Array) -> Float[Array, ""]:
        """What they add to the cost, with a penalty for every entry."""
        return jnp.sum(merit(values, dual, penalties, np.array(self.equal)))


def of_entries(each: Array, groups: tuple[int, ...]) -> Array:
    """What belongs to each constraint, for every entry."""
    sizes = np.bincount(np.array(groups, int), minlength=len(each))
    parts = [jnp.broadcast_to(each[i : i + 1], n) for i, n in enumerate(sizes) if n]
    return jnp.concatenate(parts) if parts else each[:0]


class Duals(eqx.Module):
    """Multipliers of the constraints, and a penalty for each of them.

    - `stages`: of every stage, one stack for each segment; `None` without constraints.
    - `terminal`: of the last state, or `None`.
    - `penalty`: NaN is one that is not known yet.
    - `groups`: the number of the constraint of each entry of a segment, and at the end.
    """

    stages: tuple[Float[Array, "_ _"] | None, ...]
    terminal: Float[Array, " _"] | None
    penalty: Float[Array, " _"]
    groups: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @property
    def stacks(self) -> tuple[Array | None, ...]:
        return *self.stages, self.terminal

    @property
    def penalties(self) -> tuple[Float[Array, " _"], ...]:
        """A penalty for every entry of the segments, and at the end."""
        return tuple(of_entries(self.penalty, groups) for groups in self.groups)

    def chosen(self, which: Array, others: "Duals") -> "Duals":
        """The multipliers of these constraints, and those of the others."""
        return self._joined(jnp.where, which, others)

    def mixed(self, weight: Array, others: "Duals") -> "Duals":
        """The multipliers on the way to the others, for each constraint."""
        return self._joined(lambda w, a, b: a + w * (b - a), weight, others)

    def _joined(self, fn: Callable, each: Array, others: "Duals") -> "Duals":
        stacks = []
        for a, b, groups in zip(self.stacks, others.stacks, self.groups, strict=True):
            if a is not None:
                a = fn(jnp.broadcast_to(of_entries(each, groups), a.shape), a, b)
            stacks.append(a)
        return replace(self, stages=tuple(stacks[:-1]), terminal=stacks[-1])

    def named(self, names: tuple[str, ...]) -> tuple[tuple[dict, ...], dict]:
        """Those of each constraint by its name: of every segment, and of the end."""

        def split(values, groups):
            own = {g: [i for i, h in enumerate(groups) if h == g] for g in groups}
            return {names[g]: values[..., np.array(i)] for g, i in own.items()}

        *stages, terminal = map(split, self.stacks, self.groups)
        return tuple(stages), terminal

    def given(
        self, names: tuple[str, ...], stages: tuple[dict, ...], terminal: dict
    ) -> "Duals":
        """With what `named` returned of a problem with the same constraints."""
        shapes = lambda parts: [{k: np.shape(v) for k, v in p.items()} for p in parts]
        own, last = self.named(names)
        came, expected = shapes([*stages, terminal]), shapes([*own, last])
        if came != expected:
            raise ValueError(
                f"`state` has multipliers of the shapes {came}, of stages and of the "
                f"last state; {expected} are expected: give that of a solve with these "
                "constraints and this horizon, or `dp.WarmStart(state.search)`."
            )
        stacks = [
            None if old is None else jnp.concatenate([new[k] for k in known], -1)
            for new, known, old in zip(
                [*stages, terminal], [*own, last], self.stacks, strict=True
            )
        ]
        return replace(self, stages=tuple(stacks[:-1]), terminal=stacks[-1])


def value_of(name: str, constraint: AbstractConstraint, dtype, *args: Any) -> Array:
    """The entries of a constraint as a vector, checked."""
    own = isinstance(constraint, AbstractFunction)
    value = call(name, constraint.fn if own else constraint, *args)
    leaves = jtu.tree_leaves(value)
    if any(jnp.result_type(leaf) == bool for leaf in leaves):
        kept = "0" if constraint.equal else "<= 0"
        raise TypeError(
            f"`{name}` returned booleans; the number that is kept {kept} is expected, "
            "such as `x[0] - 1`, and no comparison."
        )
    if not sum(map(np.size, leaves)):
        raise ValueError(
            f"`{name}` returned no numbers; an array of floats is expected."
        )
    check_dtype(name, constraint, value, dtype)
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])
