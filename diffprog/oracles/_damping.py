"""How strongly steps are held back: rules that follow how well the model predicts."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._types import check_positive, Number, number


class DampingState(eqx.Module):
    """What a rule remembers between steps.

    - `damping`: of the next step.
    - `growth`: the factor of its next increase, for rules that need one.
    """

    damping: Float[Array, ""]
    growth: Float[Array, ""]


class AbstractDamping(eqx.Module):
    r"""A damping $\lambda$ that changes from step to step.

    The ratio is $\rho = (h(w) - h(w + d)) / \text{predicted decrease}$, on the batch
    that gave the step d. A ratio that is not finite counts as a failure.

    - `follows_ratio`: a class variable, whether the ratio is computed, which takes one
        more run of the model. Else it is NaN, and every step is made.
    """

    follows_ratio: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def init(self) -> DampingState:
        """The state before the first step."""

    @abc.abstractmethod
    def damping(self, state: DampingState, gradient: Array) -> Float[Array, ""]:
        """The damping of the next step, where the gradient has this norm."""

    @abc.abstractmethod
    def update(
        self, state: DampingState, ratio: Array, accepted: Bool[Array, ""]
    ) -> DampingState:
        """The state after a step: every one, also where the ratio is not computed.

        `accepted` is whether the ratio is positive or, without it, whether there was a
        step at all.
        """

    @abc.abstractmethod
    def keep(self, accepted: Bool[Array, ""]) -> Bool[Array, ""]:
        """Whether the step is made, where `accepted` says that it decreases h."""


def _start(value: Any) -> DampingState:
    damping = jnp.asarray(value)
    return DampingState(damping, jnp.full_like(damping, 2))


class Constant(AbstractDamping):
    """The same damping for ever; what a plain number means.

    - `value`: the damping.
    """

    value: Number

    follows_ratio: ClassVar[bool] = False

    def __check_init__(self):
        check_positive("damping", self.value)

    def init(self):
        return _start(self.value)

    def damping(self, state, gradient):
        return state.damping

    def update(self, state, ratio, accepted):
        return state

    def keep(self, accepted):
        return accepted | True


class MadsenNielsen(AbstractDamping):
    r"""Smooth in the ratio: $\lambda$ times $\max(\tfrac13, 1 - (2 \rho - 1)^3)$.

    That is after a success; after a failure it is multiplied by 2, then 4, 8, ...

    - `initial`, `minimum`, `maximum`: of the damping.
    - `reject`: whether the step of a failure is dropped (the direction is 0).

    Source: Madsen, Nielsen, Tingleff, "Methods for Non-Linear Least Squares Problems",
    2004.
    """

    initial: Number = number(1.0)
    minimum: Number = number(1e-8)
    maximum: Number = number(1e8)
    reject: bool = eqx.field(static=True, default=True)

    follows_ratio: ClassVar[bool] = True

    def __check_init__(self):
        check_positive("initial", self.initial)

    def init(self):
        return _start(self.initial)

    def damping(self, state, gradient):
        return state.damping

    def update(self, state, ratio, accepted):
        ratio = jnp.where(accepted, ratio, 0)  # what follows is finite
        better = state.damping * jnp.maximum(1 / 3, 1 - (2 * ratio - 1) ** 3)
        damping = jnp.where(accepted, better, state.damping * state.growth)
        growth = jnp.where(accepted, 2.0, 2 * state.growth).astype(damping.dtype)
        return DampingState(jnp.clip(damping, self.minimum, self.maximum), growth)

    def keep(self, accepted):
        return accepted | (not self.reject)


class Threshold(AbstractDamping):
    r"""Multiplied by `increase` where $\rho$ < `low`, by `decrease` where > `high`.

    - `initial`, `minimum`, `maximum`: of the damping.
    - `low`, `high`: 1/4 and 3/4, as in trust-region methods.
    - `increase`, `decrease`: the factors.
    - `reject`: whether a step that does not decrease the loss is dropped.

    Source: Martens, "Deep Learning via Hessian-Free Optimization", 2010, with other
    factors.
    """

    initial: Number = number(1.0)
    low: Number = number(0.25)
    high: Number = number(0.75)
    increase: Number = number(1.5)
    decrease: Number = number(0.5)
    minimum: Number = number(1e-8)
    maximum: Number = number(1e8)
    reject: bool = eqx.field(static=True, default=False)

    follows_ratio: ClassVar[bool] = True

    def __check_init__(self):
        check_positive("initial", self.initial)

    def init(self):
        return _start(self.initial)

    def damping(self, state, gradient):
        return state.damping

    def update(self, state, ratio, accepted):
        bad = ~jnp.isfinite(ratio) | (ratio < self.low)
        factor = jnp.where(ratio > self.high, self.decrease, 1.0)
        factor = jnp.where(bad, self.increase, factor).astype(state.damping.dtype)
        damping = jnp.clip(state.damping * factor, self.minimum, self.maximum)
        return DampingState(damping, state.growth)

    def keep(self, accepted):
        return accepted | (not self.reject)


class GradientNorm(AbstractDamping):
    r"""$\lambda = \max(\text{minimum}, \text{factor} \, \|\nabla h\|^{\text{power}})$.

    Steps grow near a minimum, as those of Newton's method do.

    - `factor`, `power`, `minimum`: power 1 keeps the quadratic convergence of exact
        steps; 1/2 is more cautious.

    Source: Mishchenko, "Regularized Newton Method with Global O(1/k^2) Convergence",
    2021, arXiv 2112.02089 (power 1/2).
    """

    factor: Number = number(1.0)
    power: Number = number(1.0)
    minimum: Number = number(1e-8)

    follows_ratio: ClassVar[bool] = False

    def __check_init__(self):
        check_positive("factor", self.factor)
        check_positive("minimum", self.minimum)

    def init(self):
        return _start(self.minimum)

    def damping(self, state, gradient):
        return jnp.maximum(self.minimum, self.factor * gradient**self.power)

    def update(self, state, ratio, accepted):
        return state

    def keep(self, accepted):
        return accepted | True


def as_damping(damping: Any) -> AbstractDamping:
    """The rule itself, or `Constant` for a number."""
    return damping if isinstance(damping, AbstractDamping) else Constant(damping)
