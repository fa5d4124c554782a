"""Duals: ascent, its proportional-integral form, penalties."""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp

from .._common.multipliers import multiplier
from .._common.types import (
    check_kind,
    check_not_negative,
    check_number,
    checked,
    Number,
    number,
    to_float,
)
from ._dual import AbstractDual, remembering, spread
from ._growth import Growth


def not_negative(**options: Any) -> Any:
    """A field with a number >= 0, which has to be given unless there is a default."""
    return checked(check_not_negative, converter=to_float, **options)


def check_smoothing(name: str, value: Any):
    """Raises for what is no number between -1 and 1."""
    check_number(name, value, "a number between -1 and 1", lambda value: abs(value) < 1)


def check_none_or(check: Any) -> Any:
    """The check, which `None` passes."""
    return lambda name, value: None if value is None else check(name, value)


class Ascent(AbstractDual):
    r"""Gradient ascent: $\lambda \leftarrow [\lambda + \eta g]_+$, and
    $\mu \leftarrow \mu + \eta h$.

    The simplest, and the first to try; where loss and violation oscillate take
    [`diffprog.constrained.PI`][].

    - `step`: eta >= 0.

    One number per multiplier.
    """

    step: Number = not_negative()

    def init(self, value, equal):
        return {}

    def update(self, state, error):
        step = spread(self.step, error)
        return remembering(state, multiplier(error, state.value, step, state.equal))

    def price(self, state):
        return state.value, jnp.zeros_like(state.value)


class PI(AbstractDual):
    r"""Proportional-integral control of the violation e = g or h (nuPI).

    $$\xi \leftarrow \nu \xi + (1 - \nu) e, \quad
    I \leftarrow [I + \eta e]_+, \quad \lambda = [I + \kappa \xi]_+.$$

    Without brackets for an equality. The proportional part brakes: a multiplier falls
    while its constraint is still violated but improves fast. Useful gains are much
    larger than the step. Without smoothing this is [`diffprog.constrained.Augmented`][]
    with a penalty kappa, bit for bit, as long as every step of the parameters follows
    one of the multipliers.

    - `step`: eta >= 0, the integral gain.
    - `gain`: kappa, the proportional gain; a negative one acts as momentum.
    - `smoothing`: nu in (-1, 1), of the error in the proportional part.
    - `form`: `"position"`, above; or `"velocity"`, which adds the changes
        $\eta e + \kappa (\xi - \xi_{-})$ to one multiplier, and forgets what the
        bracket cut off. Equalities have the same multipliers in both.
    - `start`: what $\xi$ is before the first error: `"zeros"`; or `"sgd"`, that error,
        for the velocity form only: the first step is then one of ascent.

    Two numbers per multiplier, and with `"sgd"` a flag.

    Source: Sohrabi and others, "On PI Controllers for Updating Lagrange Multipliers in
    Constrained Optimization", 2024, arXiv 2406.04558; in position form equal to the
    augmented Lagrangian: "Dual Optimistic Ascent", 2025, arXiv 2509.22500.
    """

    step: Number = not_negative()
    gain: Number = checked(check_number, converter=to_float)
    smoothing: Number = number(0.0, check_smoothing)
    form: Literal["position", "velocity"] = eqx.field(default="position", static=True)
    start: Literal["zeros", "sgd"] = eqx.field(default="zeros", static=True)

    def __check_init__(self):
        if self.form not in ("position", "velocity"):
            raise ValueError(
                f'`form` is {self.form!r}; "position" or "velocity" is expected.'
            )
        if self.start not in ("zeros", "sgd"):
            raise ValueError(
                f'`start` is {self.start!r}; "zeros" or "sgd" is expected.'
            )
        if self.form == "position" and self.start == "sgd":
            raise ValueError(
                '`start="sgd"` belongs to `form="velocity"`: in position form it would '
                "leave a multiplier on constraints that are satisfied."
            )

    def init(self, value, equal):
        memory = {"error": jnp.zeros_like(value)}
        if self.start == "sgd":
            memory["seen"] = jnp.zeros_like(value, bool)
        return memory

    def update(self, state, error):
        nu, step = spread(self.smoothing, error), spread(self.step, error)
        before, flags = state.memory["error"], {}
        if self.start == "sgd":
            before = jnp.where(state.memory["seen"], before, error)
            flags = {"seen": jnp.ones_like(error, bool)}
        smooth = nu * before + (1 - nu) * error
        value = state.value
        if self.form == "velocity":
            value = value + spread(self.gain, error) * (smooth - before)
        value = multiplier(error, value, step, state.equal)
        return remembering(state, value, error=smooth, **flags)

    def price(self, state):
        value, zero = state.value, jnp.zeros_like(state.value)
        if self.form == "velocity":
            return value, zero
        gain = spread(self.gain, value)
        return multiplier(state.memory["error"], value, gain, state.equal), zero


class Augmented(AbstractDual):
    r"""The augmented Lagrangian, of Powell, Hestenes and Rockafellar.

    It adds $\mu h + \tfrac c2 h^2$ and $\tfrac{1}{2c} ([\lambda + c g]_+^2 -
    \lambda^2)$ to the loss, so the effective multipliers are $\mu + c h$ and
    $[\lambda + c g]_+$, and updates

    $$\lambda \leftarrow [\lambda + \eta g]_+, \quad \mu \leftarrow \mu + \eta h.$$

    The penalty turns solutions into minima that the Lagrangian alone leaves as saddles.

    - `penalty`: c >= 0.
    - `step`: eta >= 0; `None` is the penalty.
    - `schedule`: a [`diffprog.constrained.Growth`][] of the penalty, or `None`.

    One number per multiplier, with a schedule three. Source: see
    [`diffprog.AugmentedLagrangian`][].
    """

    penalty: Number = not_negative()
    step: Number | None = checked(
        check_none_or(check_not_negative), default=None, converter=to_float
    )
    schedule: Growth | None = checked(
        check_none_or(
            lambda name, value: check_kind(name, value, Growth, "Growth(1.01)")
        ),
        default=None,
    )

    def init(self, value, equal):
        return _start(self, value)

    def update(self, state, error):
        c = _penalty(self, state)
        step = c if self.step is None else spread(self.step, error)
        value = multiplier(error, state.value, step, state.equal)
        return remembering(state, value, **_grown(self, state, error))

    def price(self, state):
        return state.value, _penalty(self, state)


class Penalty(AbstractDual):
    r"""No multipliers: adds $\tfrac c2 [g]_+^2$ and $\tfrac c2 h^2$ to the loss.

    The minimum violates its constraints by about $\lambda / c$.

    - `penalty`: c >= 0.
    - `schedule`: a [`diffprog.constrained.Growth`][] of the penalty, or `None`.
    """

    penalty: Number = not_negative()
    schedule: Growth | None = checked(
        check_none_or(
            lambda name, value: check_kind(name, value, Growth, "Growth(1.01)")
        ),
        default=None,
    )

    def init(self, value, equal):
        return _start(self, value)

    def update(self, state, error):
        return remembering(state, state.value, **_grown(self, state, error))

    def price(self, state):
        return jnp.zeros_like(state.value), _penalty(self, state)


def _start(dual: Augmented | Penalty, value):
    if dual.schedule is None:
        return {}
    return {"penalty": spread(dual.penalty, value), "error": jnp.zeros_like(value)}


def _penalty(dual: Augmented | Penalty, state):
    if dual.schedule is None:
        return spread(dual.penalty, state.value)
    return state.memory["penalty"]


def _grown(dual: Augmented | Penalty, state, error):
    if dual.schedule is None:
        return {}
    c, before = state.memory["penalty"], state.memory["error"]
    return {
        "penalty": dual.schedule.grow(c, error, before, state.equal),
        "error": error,
    }
