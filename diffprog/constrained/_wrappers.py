"""Duals made of other things: of an optimizer, of another dual."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu

from .._common.multipliers import multiplier
from .._common.types import came, check_kind, check_positive, checked, Number, to_float
from ._dual import AbstractDual, DualState, spread


def check_transformation(name: str, value: Any):
    """Raises for what is no transformation of optax."""
    if not callable(getattr(value, "init", None)) or not hasattr(value, "update"):
        raise TypeError(
            f"`{name}` is {came(value)}; a transformation of optax is expected, such "
            "as `optax.sgd(0.1)`."
        )


def of_dual() -> Any:
    """A field with another dual."""
    example = "dp.constrained.Ascent(0.1)"
    return checked(lambda name, dual: check_kind(name, dual, AbstractDual, example))


class FromOptax(AbstractDual):
    r"""Multipliers that an optimizer of optax raises: it is given -g or -h as gradient.

    $$\lambda \leftarrow [\lambda + \Delta]_+ \quad \text{with the update } \Delta.$$

    With an `index`, parts of its state with an axis of `rows` in front belong to the
    rows, which keep them while they are not seen; others, such as counts, are shared.
    Numbers of the optimizer are part of the program.

    Momentum and Adam make multipliers overshoot: prefer
    [`diffprog.constrained.Ascent`][] and [`diffprog.constrained.PI`][].

    - `tx`: the optimizer, such as `optax.sgd(0.1)`.
    """

    tx: Any = checked(check_transformation)

    def init(self, value, equal):
        return self.tx.init(value)

    def update(self, state, error):
        change, memory = self.tx.update(-error, state.memory, state.value)
        one = jnp.ones_like(error)
        value = multiplier(change, state.value, one, state.equal)
        return replace(state, value=value, memory=memory)

    def price(self, state):
        return state.value, jnp.zeros_like(state.value)


class Restart(AbstractDual):
    r"""Another dual, which forgets an inequality as soon as it is satisfied:
    $\lambda \leftarrow 0$ where $g \le 0$.

    It ends overshooting where violations are exact; with noise, and where limits are
    active at the solution, multipliers may jump forever. Equalities are left alone.

    - `dual`: the dual that is restarted.

    Source: Gallego-Posada and others, "Controlled Sparsity via Constrained Optimization
    or: How I Learned to Stop Tuning Penalties and Love Constraints", 2022, arXiv
    2208.04425.
    """

    dual: AbstractDual = of_dual()

    def init(self, value, equal):
        return self.dual.init(value, equal)

    def update(self, state, error):
        new = self.dual.update(state, error)
        if state.equal:
            return new
        zero = jnp.zeros_like(state.value)
        first = DualState(zero, self.dual.init(zero, state.equal), state.equal)

        def choose(new, first):
            own = new.shape == error.shape
            return jnp.where(error <= 0, first, new) if own else new

        return jtu.tree_map(choose, new, first)

    def price(self, state):
        return self.dual.price(state)


class Clip(AbstractDual):
    r"""Another dual, whose multipliers stay within $|\lambda| \le \Lambda$.

    A safeguard where a limit may not be kept at all. A penalty still adds to them.

    - `dual`: the dual that is clipped.
    - `limit`: Lambda > 0.
    """

    dual: AbstractDual = of_dual()
    limit: Number = checked(check_positive, converter=to_float)

    def init(self, value, equal):
        return self.dual.init(value, equal)

    def update(self, state, error):
        new = self.dual.update(state, error)
        return replace(new, value=self._clipped(new.value))

    def price(self, state):
        y, c = self.dual.price(state)
        return self._clipped(y), c

    def _clipped(self, y):
        limit = spread(self.limit, y)
        return jnp.clip(y, -limit, limit)
