import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..._common.result import RESULTS
from ..._common.types import AbstractPart, came, check_answer


def check_ranges(owner: eqx.Module, **rules: tuple[Callable[[Any], bool], str]):
    """Raises for fields that are Python numbers and break their rule."""
    for name, (holds, accepted) in rules.items():
        value = getattr(owner, name)
        if isinstance(value, int | float) and not holds(value):
            raise ValueError(f"`{name}` is {value}; {accepted} is expected.")


Numbers = Array | np.ndarray

FACTOR = (lambda value: 0 < value < 1, "a number between 0 and 1")
GROWTH = (lambda value: value >= 1, "a number of at least 1")
NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "a finite number >= 0")
POSITIVE = (lambda value: 0 < value < math.inf, "a finite number > 0")


class Trial(eqx.Module):
    """What a search knows of a trial point.

    - `cost`, `trial_cost`: at the iterate and at the trial point.
    - `slope`, `curvature`: of the direction, damping included.
    - `cost_gradient`: norm of the costs' gradient in all states and controls.
    """

    cost: Float[Array, ""]
    trial_cost: Float[Array, ""]
    slope: Float[Array, ""]
    curvature: Float[Array, ""]
    cost_gradient: Float[Array, ""]

    def change(self, stepsize: Float[Numbers, ""]) -> Float[Numbers, ""]:
        """How the model changes: s slope + s^2 curvature / 2 at the step size s."""
        return stepsize * (self.slope + stepsize * self.curvature / 2)

    def decreases(self, change: Float[Numbers, ""]) -> Bool[Array, ""]:
        """Whether the cost changed by `change` or less, up to its rounding error."""
        slack = jnp.finfo(self.cost.dtype).eps * jnp.abs(self.cost)
        return self.trial_cost - self.cost <= change + slack


class SearchState(eqx.Module):
    """The memory of a search, carried from iteration to iteration and solve to solve.

    - `stepsize`: step size of the next trial.
    - `damping`: damping of the next backward pass.
    - `scale`: of [`diffprog.AdaptiveDamping`][] the last accepted damping relative to
        the gradient of the costs, of [`diffprog.Backtracking`][] the factor of the last
        change of the damping.
    - `trials`: roll-outs of the current direction so far.
    """

    stepsize: Float[Numbers, "*batch"]
    damping: Float[Numbers, "*batch"]
    scale: Float[Numbers, "*batch"]
    trials: Int[Numbers, "*batch"]

    @staticmethod
    def first(dtype, stepsize: Any = 1.0, damping: Any = 0.0, scale: Any = 0.0):
        """Before the first iteration."""
        scalar, zero = lambda value: jnp.asarray(value, dtype), jnp.zeros((), jnp.int32)
        return SearchState(scalar(stepsize), scalar(damping), scalar(scale), zero)

    @staticmethod
    def none(dtype, batch: tuple[int, ...] = ()) -> "SearchState":
        """In the place of a memory where there is none: the same program takes both."""
        nan, zero = np.full(batch, np.nan, dtype), np.zeros(batch, np.int32)
        return SearchState(nan, nan, nan, zero)


class Verdict(eqx.Module):
    """What becomes of a trial; if nothing is true, the next step size is tried.

    - `accept`: the trial is the next iterate.
    - `refresh`: a new backward pass, with the damping of the state.
    - `fail`: the search has given up.
    """

    accept: Bool[Array, ""]
    refresh: Bool[Array, ""]
    fail: Bool[Array, ""]


def check_memory(search: Any, method: str, state: Any, dtype: Any) -> SearchState:
    """Raises for what a search of a user must not keep, where it is traced."""
    numbers = dict(stepsize=dtype, damping=dtype, scale=dtype, trials=jnp.int32)
    check_answer(search, method, state, SearchState, **numbers)
    return state


def check_judged(
    search: Any, method: str, judged: Any, dtype: Any
) -> tuple[SearchState, Verdict]:
    """Raises for what a search of a user must not say of a trial."""
    if not isinstance(judged, tuple) or len(judged) != 2:
        raise TypeError(
            f"`{type(search).__name__}.{method}` returned {came(judged)}; two things, "
            "a `SearchState` and a `Verdict`, are expected."
        )
    check_memory(search, method, judged[0], dtype)
    flags = dict.fromkeys(("accept", "refresh", "fail"), jnp.bool_)
    check_answer(search, method, judged[1], Verdict, **flags)
    return judged


class AbstractSearch(AbstractPart):
    """Chooses step sizes and dampings, and says whether a trial point is accepted.

    - `monotone`: whether a higher cost is never accepted.
    - `exhausted`, `no_minimum`: the codes for giving up after finite trials, and for
        giving up because no model had a minimum.
    """

    monotone: eqx.AbstractClassVar[bool]
    exhausted: eqx.AbstractClassVar[RESULTS]
    no_minimum: eqx.AbstractClassVar[RESULTS]

    @abc.abstractmethod
    def init(self, dtype) -> SearchState:
        """The memory before the first iteration."""

    @abc.abstractmethod
    def begin(self, state: SearchState, cost_gradient: Float[Array, ""]) -> SearchState:
        """Called at a new iterate; `cost_gradient` as in `AbstractDirection.expand`."""

    @abc.abstractmethod
    def step(self, state: SearchState, trial: Trial) -> tuple[SearchState, Verdict]:
        """Judges a trial and prepares the next."""

    @abc.abstractmethod
    def reject(self, state: SearchState) -> tuple[SearchState, Verdict]:
        """Called when the factorization failed: there is no trial at this damping."""
