"""The Fenchel-Young losses of f-divergences."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Integer

from .._common.types import check_number, is_known
from .alpha import written
from .call import Axis, Call, check, Divergence, operator, Reference, Setup
from .divergence import AbstractDivergence
from .root import cost, difference, height, same_for_all, weighted
from .targets import as_array, check_labels, check_probabilities, check_targets, short


@operator
def f_loss(
    scores: Float[ArrayLike, "..."],
    targets: Integer[ArrayLike, "..."] | Float[ArrayLike, "..."],
    f: Divergence,
    reference: Reference = None,
    *,
    axis: Axis = -1,
    where=None,
    temperature: Any = 1.0,
    smoothing=0.0,
    constant: bool = True,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    r"""The Fenchel-Young loss of an f-divergence.

    $$L_f(\theta, y; q) = \operatorname{softmax}_f(\theta; q) + \beta D_f(y, q)
    - \langle \theta, y \rangle \ge 0,$$

    convex in the scores, 0 exactly where softargmax is y, with the gradient
    softargmax - y. For KL it is the cross-entropy (minus the entropy of y).

    **Arguments:**

    - `scores`, `f`, `reference`, `axis`, `where`, `temperature`, `axis_name`: those of
        [`diffprog.losses.f_softargmax`][].
    - `targets`: labels, integers of the shape of `scores` without the class axis; or
        probabilities y, floats of the shape of `scores`. Labels of classes on several
        axes count these in the order of `axis`, the last one fastest.
    - `smoothing`: s in [0, 1]; y becomes (1 - s) y + s q / Q. Traced and outside, it
        makes the losses NaN.
    - `constant`: whether $D_f(y, q)$, which does not depend on the scores, is added.
        It is infinite for labels where f(0) is (reverse KL, Neyman, Jeffreys, alpha <=
        0); without it the loss is then unbounded below.

    **Returns:** the loss of every row, infinite where a class has a part of y and is
    excluded: its gradient is softargmax - y even so. In y a derivative that would be
    infinite is 0: that of a class that is excluded, or that has y = 0 where f'(0) is
    infinite. A row whose classes are all excluded has loss 0 and gradient 0, whatever
    its target: to ignore the label -100, let `where` be `(targets != -100)[..., None]`.

    **Raises:** `ValueError` for labels out of range and for what is no probability,
    and for labels with a generator whose f(0) is infinite. The loss of a traced label
    out of range is NaN, with derivatives NaN; traced probabilities are not checked.
    """
    call = check(scores, f, reference, axis, where, temperature, axis_name)
    targets, shape = as_array(targets), call.scores.shape
    labels = check_targets(targets, shape, call.axes)
    check_smoothing(smoothing)
    if isinstance(smoothing, (int, float)) and smoothing == 0:
        smoothing = None
    counted = lambda: _counted(call)
    if axis_name is None and labels:
        check_labels(targets, call.classes, counted)
    elif axis_name is None:
        check_probabilities(targets, call.axes, counted)
    if labels and constant and smoothing is None:
        check_at_zero(call.f)
    return _loss(call, jnp.asarray(targets), smoothing, constant)


def _counted(call: Call) -> Any:
    """The rows that the mask leaves, or none where it is traced."""
    if call.where is None or not is_known(call.where):
        return call.where is None
    return np.any(np.asarray(call.where), call.axes)


@ft.partial(jax.jit, static_argnames="constant")
def _loss(call: Call, targets: Array, smoothing, constant: bool) -> Array:
    s = call.set_up()
    if jnp.issubdtype(targets.dtype, jnp.integer):
        loss, valid = _labelled(s, targets[..., None], smoothing, constant)
    else:
        y = call.last(targets).astype(s.problem.scores.dtype)
        if call.where is not None:
            # A row without a loss may be NaN, and leaves no NaN in derivatives.
            rows = jnp.any(call.last(call.where), -1, keepdims=True)
            y = jnp.where(rows, y, 0)
        loss, valid = _soft(s, y, smoothing, constant), True
    loss = loss + height(s.classes, s.f, s.problem)
    if smoothing is not None:
        valid = valid & (smoothing >= 0) & (smoothing <= 1)
    # A factor, for NaN in derivatives too.
    beta = jnp.where(valid | (s.problem.Q <= 0), s.beta, jnp.nan)
    return call.row(jnp.where(s.problem.Q > 0, beta * loss, 0))


def check_smoothing(smoothing: Any):
    """Raises for what is no number, and for a known one outside of [0, 1]."""
    expected = "a number in [0, 1]"
    check_number("smoothing", smoothing, expected)
    if isinstance(smoothing, float | int) and not 0 <= smoothing <= 1:
        raise ValueError(f"`smoothing` is {smoothing}; {expected} is expected.")


def check_at_zero(f: AbstractDivergence):
    if is_known(f.at_zero) and np.any(np.isinf(f.at_zero)):
        raise ValueError(
            f"The loss of labels is infinite with {written(f)}, whose f(0) is: use "
            "`smoothing=0.1`, or `constant=False` for the loss without D_f(y, q), "
            "which is unbounded below."
        )


def _positive(a: Array) -> Array:
    """`a`, or 1 where it is 0: to divide by, where the result does not matter."""
    return jnp.where(a > 0, a, 1)


def _labelled(s: Setup, labels: Array, smoothing, constant: bool):
    """The loss of labels less its `height`, and where the labels are in range.

    With D_f(e_c, q) = q_c f(1 / q_c) + (Q - q_c) f(0), and the lift taken from each.
    """
    (scores, q, Q, m), lift = s.problem, s.f.lift
    k, labels = scores.shape[-1], short(labels)
    first = lax.axis_index(s.classes.axis_name) * k if s.classes.axis_name else 0
    mine = (labels >= first) & (labels < first + k)
    index = jnp.clip(labels - first, 0, k - 1)

    def at_label(a):
        entry = a if same_for_all(a) else jnp.take_along_axis(a, index, -1)
        return s.classes.sum(jnp.where(mine, entry, 0))

    valid = s.classes.sum(mine.astype(jnp.int32)) > 0
    drop, own = difference(m, at_label(scores)), at_label(q)
    if smoothing is None:
        ratio, rest = 1 / _positive(own), jnp.asarray(s.f.at_zero, Q.dtype) - lift
    else:
        mean = s.classes.sum(jnp.where(s.present, q * difference(m, scores), 0))
        drop = weighted(1 - smoothing, drop) + weighted(smoothing, mean / _positive(Q))
        share = smoothing / _positive(Q)
        ratio, rest = (1 - smoothing) / _positive(own) + share, cost(s.f, share) - lift
    if constant:
        # 0 times an infinite f(0) where there is no other class
        others = jnp.where(Q > own, (Q - own) * rest, 0)
        drop = drop + own * (cost(s.f, ratio) - lift) + others
    return drop, valid


def _soft(s: Setup, y: Array, smoothing, constant: bool) -> Array:
    """The loss of probabilities less its `height`."""
    scores, q, Q, m = s.problem
    if smoothing is not None:
        y = (1 - smoothing) * y + smoothing * jnp.where(s.present, q, 0) / _positive(Q)
    drop = s.classes.sum(weighted(y, difference(m, scores)))
    if not constant:
        return drop
    u = jnp.where(s.present, y / _positive(q), 1)
    values = jnp.where(s.present, q * (cost(s.f, u) - s.f.lift), 0)
    return drop + s.classes.sum(values)
