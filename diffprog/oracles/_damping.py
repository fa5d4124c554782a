"""How strongly steps are held back: rules that follow how well the model predicts."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float

from .._common.tree import where
from .._common.types import AbstractPart, check_number, check_positive, Number, number
from ._base import Linearization, Proposal


class DampingState(eqx.Module):
    """What a rule remembers between steps.

    - `damping`: of the next step.
    - `growth`: the factor of its next increase, for rules that need one.
    """

    damping: Float[Array, ""]
    growth: Float[Array, ""]


class OUTCOMES(eqx.Enumeration):
    """What is known of a step, for rules of damping."""

    accepted = "The loss falls with the step."
    rejected = "The loss does not fall with the step, or there is no step."
    unclear = (
        "Both decreases, predicted and true, are lost in the rounding of the loss."
    )


def compare(
    at: Linearization, proposal: Proposal, ok: Bool[Array, ""]
) -> tuple[Array, OUTCOMES, Array]:
    """The true decrease of h over the predicted one, what that says of the step, and
    the loss after it.
    """
    step = where(ok, proposal.step, jtu.tree_map(jnp.zeros_like, at.params))
    after = at.value_at(jtu.tree_map(jnp.add, at.params, step))
    predicted, noise = proposal.decrease, at.rounding()
    ratio = (at.value - after) / jnp.where(predicted > noise, predicted, jnp.nan)
    ratio = jnp.where(ok, ratio, jnp.nan)
    # A gap above the noise: it is the solver that found nothing, not the model.
    lost = (jnp.abs(predicted) <= noise) & ~(proposal.gap > noise)
    unclear = ok & lost & (after <= at.value + noise)
    outcome = outcome_of(jnp.isfinite(ratio) & (ratio > 0))
    return ratio, OUTCOMES.where(unclear, OUTCOMES.unclear, outcome), after


def outcome_of(good: Bool[Array, ""]) -> OUTCOMES:
    return OUTCOMES.where(good, OUTCOMES.accepted, OUTCOMES.rejected)


class AbstractDamping(AbstractPart):
    r"""A damping $\lambda$ that changes from step to step.

    The ratio is $\rho = (h(w) - h(w + d)) / \text{predicted decrease}$, on the batch
    that gave the step d. What it says is one of [`diffprog.oracles.OUTCOMES`][]:
    `accepted` where it is positive, `rejected` where it is not, or not finite, and
    `unclear` where the predicted decrease is lost in the rounding of h and nothing else
    speaks against the step, as at a minimum. Without the ratio, `accepted` is that
    there was a step at all.

    - `follows_ratio`: a class variable, whether the ratio is computed, which takes one
        more run of the model; and a step to a loss that is not finite is withheld,
        whatever the rule keeps. Else it is NaN, and every step is made.
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
        self, state: DampingState, ratio: Array, outcome: OUTCOMES
    ) -> DampingState:
        """The state after a step: every one, also where the ratio is not computed.

        An `unclear` outcome (the ratio is NaN then) should leave the damping as it is:
        raised again and again, it would never come down after training has converged.
        """

    @abc.abstractmethod
    def keep(self, outcome: OUTCOMES) -> Bool[Array, ""]:
        """Whether the step is made."""


def _start(value: Any) -> DampingState:
    damping = jnp.asarray(value)
    return DampingState(damping, jnp.full_like(damping, 2))


class _AbstractUnjudged(AbstractDamping):
    """A rule that learns nothing from steps, and makes each of them."""

    follows_ratio: ClassVar[bool] = False

    def update(self, state, ratio, outcome):
        return state

    def keep(self, outcome):
        return jnp.asarray(True)


class _AbstractJudged(AbstractDamping):
    """A rule whose state is the damping, and which may drop steps that fail."""

    initial: eqx.AbstractVar[Number]
    reject: eqx.AbstractVar[bool]

    follows_ratio: ClassVar[bool] = True

    def init(self):
        return _start(self.initial)

    def damping(self, state, gradient):
        return state.damping

    def keep(self, outcome):
        return (outcome != OUTCOMES.rejected) | (not self.reject)


class Constant(_AbstractUnjudged):
    """The same damping for ever; what a plain number means.

    - `value`: the damping.
    """

    value: Number

    def __check_init__(self):
        check_positive("damping", self.value)

    def init(self):
        return _start(self.value)

    def damping(self, state, gradient):
        return state.damping


class MadsenNielsen(_AbstractJudged):
    r"""Smooth in the ratio: $\lambda$ times $\max(\tfrac13, 1 - (2 \rho - 1)^3)$.

    That is after a success; after a failure it is multiplied by 2, then 4, 8, ...

    - `initial`, `minimum`, `maximum`: of the damping.
    - `reject`: whether the step of a failure is dropped (the direction is 0).

    Source: Madsen, Nielsen, Tingleff, "Methods for Non-Linear Least Squares Problems",
    2004.
    """

    initial: Number = number(1.0, check_positive)
    minimum: Number = number(1e-8, check_number)
    maximum: Number = number(1e8, check_number)
    reject: bool = eqx.field(static=True, default=True)

    def update(self, state, ratio, outcome):
        accepted = outcome == OUTCOMES.accepted
        ratio = jnp.where(accepted, ratio, 0)  # what follows is finite
        better = state.damping * jnp.maximum(1 / 3, 1 - (2 * ratio - 1) ** 3)
        damping = jnp.where(accepted, better, state.damping * state.growth)
        damping = jnp.clip(damping, self.minimum, self.maximum)
        growth = jnp.where(accepted, 2.0, 2 * state.growth).astype(damping.dtype)
        return where(outcome == OUTCOMES.unclear, state, DampingState(damping, growth))


class Threshold(_AbstractJudged):
    r"""Multiplied by `increase` where $\rho$ < `low`, by `decrease` where > `high`.

    - `initial`, `minimum`, `maximum`: of the damping.
    - `low`, `high`: 1/4 and 3/4, as in trust-region methods.
    - `increase`, `decrease`: the factors.
    - `reject`: whether a step that does not decrease the loss is dropped.

    Source: Martens, "Deep Learning via Hessian-Free Optimization", 2010, with other
    factors.
    """

    initial: Number = number(1.0, check_positive)
    low: Number = number(0.25, check_number)
    high: Number = number(0.75, check_number)
    increase: Number = number(1.5, check_number)
    decrease: Number = number(0.5, check_number)
    minimum: Number = number(1e-8, check_number)
    maximum: Number = number(1e8, check_number)
    reject: bool = eqx.field(static=True, default=False)

    def update(self, state, ratio, outcome):
        bad = (outcome == OUTCOMES.rejected) | (ratio < self.low)
        factor = jnp.where(ratio > self.high, self.decrease, 1.0)
        factor = jnp.where(bad, self.increase, factor).astype(state.damping.dtype)
        damping = jnp.clip(state.damping * factor, self.minimum, self.maximum)
        return DampingState(damping, state.growth)


class GradientNorm(_AbstractUnjudged):
    r"""$\lambda = \max(\text{minimum}, \text{factor} \, \|\nabla h\|^{\text{power}})$.

    Steps grow near a minimum, as those of Newton's method do.

    - `factor`, `power`, `minimum`: power 1 keeps the quadratic convergence of exact
        steps; 1/2 is more cautious.

    Source: Mishchenko, "Regularized Newton Method with Global O(1/k^2) Convergence",
    2021, arXiv 2112.02089 (power 1/2).
    """

    factor: Number = number(1.0, check_positive)
    power: Number = number(1.0, check_number)
    minimum: Number = number(1e-8, check_positive)

    def init(self):
        return _start(self.minimum)

    def damping(self, state, gradient):
        return jnp.maximum(self.minimum, self.factor * gradient**self.power)


def as_damping(damping: Any) -> AbstractDamping:
    """The rule itself, or `Constant` for a number."""
    return damping if isinstance(damping, AbstractDamping) else Constant(damping)


def check_damping(name: str, damping: Any):
    """Raises for what is neither a rule nor a positive number."""
    if not isinstance(damping, AbstractDamping):
        check_positive(name, damping, ", or a rule such as `dp.oracles.Threshold()`")
