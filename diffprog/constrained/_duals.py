"""Duals: ascent, its proportional-integral form, penalties."""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp

from .._common.multipliers import multiplier
from .._common.types import (
    check_kind,
    check_not_negative,
    check_number,
    check_positive,
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


def check_growth(name: str, value: Any):
    """Raises for what is no schedule of a penalty."""
    check_kind(name, value, Growth, "dp.constrained.Growth(1.01)")


def none_or_not_negative() -> Any:
    """A field with a number >= 0, or `None` for another one."""
    check = check_none_or(check_not_negative)
    return checked(check, default=None, converter=to_float)


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
    step: Number | None = none_or_not_negative()
    schedule: Growth | None = checked(check_none_or(check_growth), default=None)

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
    schedule: Growth | None = checked(check_none_or(check_growth), default=None)

    def init(self, value, equal):
        return _start(self, value)

    def update(self, state, error):
        return remembering(state, state.value, **_grown(self, state, error))

    def price(self, state):
        return jnp.zeros_like(state.value), _penalty(self, state)


class Relaxed(AbstractDual):
    r"""Ascent on limits that may give way:
    $\lambda \leftarrow [(1 - \eta / \alpha) \lambda + \eta g]_+$.

    A limit moves by u where that lowers the loss by more than $\tfrac\alpha2 u^2$. It
    settles at $\lambda = \alpha [g]_+$ or $\mu = \alpha h$, also where a limit cannot
    be kept and the multipliers of other duals grow without bound. Parameters are then
    those of [`diffprog.constrained.Penalty`][] with a penalty alpha.

    - `strength`: alpha > 0; large for limits that hardly give way.
    - `step`: eta >= 0; `None` is the strength, which settles in one update. Above twice
        the strength it diverges.

    Source: Ramirez and others, "Feasible Learning", 2025, arXiv 2501.14912.
    """

    strength: Number = checked(check_positive, converter=to_float)
    step: Number | None = none_or_not_negative()

    def init(self, value, equal):
        return {}

    def update(self, state, error):
        strength = spread(self.strength, error)
        step = strength if self.step is None else spread(self.step, error)
        left = (1 - step / strength) * state.value
        return remembering(state, multiplier(error, left, step, state.equal))

    def price(self, state):
        return state.value, jnp.zeros_like(state.value)


class PID(AbstractDual):
    r"""Proportional, integral and derivative control of the violation e = g or h.

    $$I \leftarrow [I + \eta e]_+, \quad
    \lambda = [I + \kappa e + \delta [e - e_{-}]_+]_+.$$

    The derivative acts on what gets worse only. Without brackets for an equality. The
    paper also divides the gradient by $1 + \lambda$, which is left to the optimizer.

    - `step`: eta >= 0.
    - `gain`: kappa.
    - `derivative`: delta.

    Three numbers per multiplier. Source: Stooke, Achiam, Abbeel, "Responsive Safety in
    Reinforcement Learning by PID Lagrangian Methods", 2020, arXiv 2007.03964.
    """

    step: Number = not_negative()
    gain: Number = number(0.0, check_number)
    derivative: Number = number(0.0, check_number)

    def init(self, value, equal):
        return {"error": jnp.zeros_like(value), "change": jnp.zeros_like(value)}

    def update(self, state, error):
        change = error - state.memory["error"]
        change = change if state.equal else jnp.maximum(change, 0)
        step = spread(self.step, error)
        value = multiplier(error, state.value, step, state.equal)
        return remembering(state, value, error=error, change=change)

    def price(self, state):
        value, memory = state.value, state.memory
        value = value + spread(self.derivative, value) * memory["change"]
        gain = spread(self.gain, value)
        return multiplier(memory["error"], value, gain, state.equal), 0 * value


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
