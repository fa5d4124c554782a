"""Losses of supervised learning over classes, which are on the last axis."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jaxtyping import Array

from .._common.types import Number, number
from .._operators.call import (
    Call,
    check,
    check_reference,
    check_temperature,
    Reference,
    Setup,
)
from .._operators.divergence import AbstractDivergence
from .._operators.families import ChiSquare, KL
from .._operators.fenchel_young import check_at_zero, check_smoothing, f_loss
from .._operators.generated import as_divergence
from .._operators.hessian import solution
from .._operators.root import below, difference, Evaluation, largest, row_sum, weighted
from .._operators.simplex import proximal
from .._operators.softmax import f_softargmax
from .._operators.targets import (
    check_classes,
    check_ignored,
    check_probabilities,
    check_within,
    count_labels,
    counting,
    heard,
    is_labels,
    like,
    one_hot,
    SIGNS,
    WEIGHTS,
    within,
)
from ._block import majorized_block, newton_block
from ._factor import class_factor, class_hessian_mv, flat_factor
from ._interior import AbstractBoundedLoss, interval, simplex, within_reach
from ._loss import AbstractDualLoss, per_example, total, where_inside


def _less(p: Array, y: Array, labels: bool) -> Array:
    """p - y. For a label 1 - p is the sum of all others, which has more digits."""
    if not labels:
        return p - y
    return jnp.where(y > 0, -row_sum(jnp.where(y > 0, 0, p)), p - y)


def _softmax_parts(outputs: Array) -> tuple[Array, Array, Array]:
    """The softmax of every row, its largest output, and the logsumexp less that.

    Where all classes are excluded there are zeros, and a logsumexp of -inf.
    """
    m = largest(outputs, Evaluation())
    e = jnp.exp(below(outputs, m))
    total = row_sum(e)
    present = total != 0  # NaN is
    total = jnp.where(present, total, 1)
    return e / total, m, jnp.where(present, jnp.log(total), -jnp.inf)


def _on_simplex(p: Array, present: Array, mass: Array, values: Array) -> Array:
    """The sum over rows of their values, infinite unless p is in mass times simplex."""
    below = jnp.max(jnp.where(present, -p, jnp.abs(p)), -1, keepdims=True)
    excess = jnp.maximum(below, jnp.abs(row_sum(p) - mass))
    return total(where_inside(excess, jnp.maximum(mass, 1), values))


def _project(x: Array, mass: Array) -> Array:
    scale = jnp.where(mass > 0, mass, 1)
    return mass * f_softargmax(x / scale, ChiSquare(), "unit")


class FLoss(AbstractBoundedLoss):
    """The Fenchel-Young loss of an f-divergence: [`diffprog.losses.f_loss`][].

    - `f`, `reference`, `temperature`, `smoothing`: as there. Classes are on the last
        axis. One that is excluded by an output of -inf is not known to the conjugate:
        exclude it by the reference. Where f(0) is infinite a probability that is lost
        to rounding beside y counts as eps y in the conjugate.
    - `ignore_label`: a label without a loss, such as -100. The mean over a batch is one
        over the examples with a label that counts.
    """

    smooth: ClassVar[bool] = True
    f: AbstractDivergence = eqx.field(converter=as_divergence)
    reference: Reference = None
    temperature: Number = number(1.0)
    smoothing: float = eqx.field(static=True, default=0.0)
    ignore_label: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_ignored(self.ignore_label)
        check_reference(self.reference, self.f)
        check_temperature(self.temperature)
        check_smoothing(self.smoothing)

    def __call__(self, outputs, targets):
        check_classes(outputs, targets)
        where = counting(targets, self.ignore_label)
        options: Any = dict(temperature=self.temperature, smoothing=self.smoothing)
        given = outputs, targets, self.f, self.reference
        return total(f_loss(*given, where=where, **options))

    def count(self, outputs, targets):
        if is_labels(targets):
            return count_labels(outputs, targets, self.ignore_label)
        check_classes(outputs, targets)
        check_probabilities(targets, -1)
        return outputs.shape[0]

    def _pose(self, scores: Array, targets: Any) -> tuple[Call, Setup, Array, Array]:
        """The call and what it stands for, y, and 1 for rows with a loss, else 0."""
        call = check(scores, self.f, self.reference, -1, None, self.temperature, None)
        s = call.set_up()
        scores, q, Q, _ = s.problem
        if is_labels(targets):
            y, row = one_hot(call.scores, targets, self.ignore_label)
            if self.smoothing == 0:
                check_at_zero(call.f)
        else:
            check_classes(scores, targets)
            check_probabilities(targets, -1)
            y, row = jnp.asarray(targets, call.scores.dtype), 1
        if self.smoothing:
            share = jnp.where(scores > -jnp.inf, q, 0) / jnp.where(Q > 0, Q, 1)
            y = (1 - self.smoothing) * y + self.smoothing * share.astype(y.dtype)
        row = jnp.broadcast_to(jnp.where(Q > 0, row, 0), (*y.shape[:-1], 1))
        return call, s, y * row.astype(y.dtype), row.astype(y.dtype)

    def _derivatives(self, outputs: Array, targets: Any) -> tuple[Array, Array]:
        """The gradient and the weights of the Hessian."""
        outputs = heard(outputs, targets, self.ignore_label)
        call, _, y, row = self._pose(outputs, targets)
        p, w = solution(call)
        exact = is_labels(targets) and self.smoothing == 0
        return _less(p * row, y, exact), w * row

    def gradient(self, outputs, targets):
        return self._derivatives(outputs, targets)[0]

    def hessian_mv(self, outputs, targets, vector):
        return class_hessian_mv(self._derivatives(outputs, targets)[1], vector)

    def factor(self, outputs, targets):
        return class_factor(*self._derivatives(outputs, targets))

    def conjugate(self, alpha, targets):
        _, s, y, row = self._pose(jnp.zeros_like(alpha), targets)
        p = alpha + y
        # Where f(0) is infinite: what the sum alpha + y cannot resolve is not 0.
        eps = jnp.finfo(y.dtype).eps
        floor = jnp.where(jnp.isinf(jnp.asarray(s.f.at_zero, y.dtype)), eps * y, 0)
        positive = jnp.maximum(p, floor)
        q = jnp.where(s.present, s.problem.q, 1)
        f = lambda p: s.f.value(jnp.where(s.present, p, q).astype(q.dtype) / q)
        values = s.beta * row_sum(q * jnp.where(p == y, 0, f(positive) - f(y)))
        return _on_simplex(p, s.present, row, values.astype(alpha.dtype))

    def dual_projection(self, alpha, targets):
        _, s, y, row = self._pose(jnp.zeros_like(alpha), targets)
        p = f_softargmax(alpha + y, ChiSquare(), "unit", where=s.present)
        return row * p - y

    def conjugate_prox(self, vector, tau, targets):
        _, s, y, row = self._pose(jnp.zeros_like(vector), targets)
        q = jnp.broadcast_to(s.problem.q, vector.shape)
        tau = s.beta * per_example("tau", tau, vector).astype(q.dtype)
        p = proximal(s.f, q, s.present, (vector + y).astype(q.dtype), tau)
        exact = is_labels(targets) and self.smoothing == 0
        return _less(row * p.astype(y.dtype), y, exact)

    def domain(self, outputs, targets):
        if not (self.f.sparse and self.f.support_known):
            return None
        _, s, y, row = self._pose(outputs, targets)
        q = jnp.where(s.present, s.problem.q, 1)
        present = s.present & (row > 0) & within_reach(outputs)
        kept = jnp.where(present, q, 0)
        mass = row_sum(kept)
        even = kept / jnp.where(mass > 0, mass, 1)
        slope = lambda p: s.beta * s.f.link(p / q)
        curvature = lambda p: s.beta / (q * s.f.curvature(p / q))
        return simplex(y, even, present, slope, curvature)

    block_update = newton_block


class SoftmaxCrossEntropy(AbstractDualLoss):
    r"""$-\sum_j y_j \ln p_j$ of the softmax p, for labels or probabilities y.

    Any $y \ge 0$ will do: a row of zeros has no loss. A class whose output is -inf is
    excluded, as in [`diffprog.losses.f_loss`][].

    - `ignore_label`: as in [`diffprog.losses.FLoss`][].
    """

    smooth: ClassVar[bool] = True
    ignore_label: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_ignored(self.ignore_label)

    def __call__(self, outputs, targets):
        check_classes(outputs, targets)
        if is_labels(targets):
            where = counting(targets, self.ignore_label)
            return total(f_loss(outputs, targets, KL(), where=where))
        (_, m, z), (y, mass) = _softmax_parts(outputs), self._targets(outputs, targets)
        losses = row_sum(weighted(y, difference(m, outputs))) + mass * z
        return total(jnp.where(z == -jnp.inf, 0, losses))

    def count(self, outputs, targets):
        if is_labels(targets):
            return count_labels(outputs, targets, self.ignore_label)
        check_classes(outputs, targets)
        check_within(WEIGHTS, outputs, targets)
        return outputs.shape[0]

    def _targets(self, outputs: Array, targets: Any) -> tuple[Array, Array]:
        """y and its sum."""
        check_classes(outputs, targets)
        if is_labels(targets):
            return one_hot(outputs, targets, self.ignore_label)
        check_within(WEIGHTS, outputs, targets)
        y = like(outputs, targets)
        return y, row_sum(y)

    def gradient(self, outputs, targets):
        return self._derivatives(outputs, targets)[0]

    def _derivatives(self, outputs, targets):
        """The gradient and the weights of the Hessian."""
        y, mass = self._targets(outputs, targets)
        p, _, z = _softmax_parts(heard(outputs, targets, self.ignore_label))
        g = _less(mass * p, y, is_labels(targets))
        return jnp.where(z == -jnp.inf, 0, g), mass * p

    def hessian_mv(self, outputs, targets, vector):
        return class_hessian_mv(self._derivatives(outputs, targets)[1], vector)

    def factor(self, outputs, targets):
        return class_factor(*self._derivatives(outputs, targets))

    def conjugate(self, alpha, targets):
        y, mass = self._targets(alpha, targets)
        p = alpha + y
        q = jnp.maximum(p, 0)
        values = row_sum(xlogy(q, q)) - xlogy(mass, mass)
        return _on_simplex(p, jnp.ones_like(p, bool), mass, values)

    def dual_projection(self, alpha, targets):
        y, mass = self._targets(alpha, targets)
        return _project(alpha + y, mass) - y

    def conjugate_prox(self, vector, tau, targets):
        y, mass = self._targets(vector, targets)
        tau, scale = per_example("tau", tau, vector), jnp.where(mass > 0, mass, 1)
        x = (vector + y) / scale
        every = jnp.ones_like(x, bool)
        p = proximal(KL(), jnp.ones_like(x), every, x, tau / scale)
        return _less(mass * p, y, is_labels(targets))

    block_update = newton_block


class Hinge(AbstractBoundedLoss):
    r"""The hinge loss, of binary targets or of labels.

    For targets y = 1 or -1 of the shape of the outputs it is $\max(0, 1 - y u)$, summed
    over the outputs; for labels y, integers, $\max_j u_j - u_y + 1[j \ne y]$. Its
    gradient is 0 where $y u = 1$; where classes tie, that of the first. A class whose
    output is -inf is never the largest.

    - `ignore_label`: as in [`diffprog.losses.FLoss`][].
    """

    smooth: ClassVar[bool] = False
    ignore_label: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_ignored(self.ignore_label)

    def __call__(self, outputs, targets):
        if not is_labels(targets):
            y, one = within(SIGNS, outputs, targets)
            return total(one * jnp.maximum(1 - weighted(y, outputs), 0))
        _, row, margins = self._margins(outputs, targets)
        return total(row * jnp.max(margins, -1, keepdims=True))

    def _margins(self, outputs, labels):
        """Rows of labels, their factors, and u_j - u_y + 1[j != y].

        That is -inf for what is excluded.
        """
        own, row = one_hot(outputs, labels, self.ignore_label)
        outputs = heard(outputs, labels, self.ignore_label)
        label = row_sum(jnp.where(own > 0, outputs, 0))
        margins = jnp.where(own > 0, 0, difference(outputs, label) + 1)
        excluded = (outputs == -jnp.inf) & (own == 0)
        return own, row, jnp.where(excluded, -jnp.inf, margins)

    def count(self, outputs, targets):
        if is_labels(targets):
            return count_labels(outputs, targets, self.ignore_label)
        check_within(SIGNS, outputs, targets)
        return outputs.shape[0]

    def gradient(self, outputs, targets):
        if not is_labels(targets):
            y, one = within(SIGNS, outputs, targets)
            inside = jnp.maximum(jnp.sign(1 - y * outputs), 0)  # NaN stays NaN
            return one * -y * inside
        own, row, margins = self._margins(outputs, targets)
        top, worst = jnp.max(margins, -1, keepdims=True), jnp.argmax(margins, -1)
        worst = jax.nn.one_hot(worst, outputs.shape[-1], dtype=outputs.dtype)
        return (worst - own) * jnp.where(jnp.isnan(top), top, row)

    def hessian_mv(self, outputs, targets, vector):
        return jnp.zeros_like(vector)

    def factor(self, outputs, targets):
        return flat_factor(self.gradient(outputs, targets))

    def conjugate(self, alpha, targets):
        if not is_labels(targets):
            b = -like(alpha, targets) * alpha
            return total(where_inside(jnp.abs(b - 0.5) - 0.5, 1.0, -b))
        own, row = one_hot(alpha, targets, self.ignore_label)
        p = alpha + own
        values = -row_sum(jnp.where(own > 0, 0, alpha))
        return _on_simplex(p, jnp.ones_like(p, bool), row, values)

    def dual_projection(self, alpha, targets):
        if not is_labels(targets):
            y = like(alpha, targets)
            return -y * jnp.clip(-y * alpha, 0, 1)
        own, row = one_hot(alpha, targets, self.ignore_label)
        return _less(_project(alpha + own, row), own, True)

    def conjugate_prox(self, vector, tau, targets):
        tau = per_example("tau", tau, vector)
        if not is_labels(targets):
            y = like(vector, targets)
            return self.dual_projection(vector - tau * y, targets)
        own, row = one_hot(vector, targets, self.ignore_label)
        # tau (1 - own) less tau for all classes, which the projection does not see.
        x = jnp.where(own > 0, vector - tau + 1, vector)
        return _less(_project(x, row), own, True)

    def domain(self, outputs, targets):
        if not is_labels(targets):
            y = like(outputs, targets)
            return interval(jnp.minimum(-y, 0), jnp.maximum(-y, 0), y)
        own, row = one_hot(outputs, targets, self.ignore_label)
        present = (row > 0) & within_reach(outputs)
        even = 1 / jnp.maximum(row_sum(present.astype(own.dtype)), 1)
        even = jnp.where(present, even, 0)
        return simplex(own, even, present, lambda p: own - 1, jnp.zeros_like)

    block_update = majorized_block
