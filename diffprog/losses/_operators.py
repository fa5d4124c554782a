"""softmax, softargmax and Fenchel-Young losses of any f-divergence."""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ._alpha import Alpha
from ._divergence import AbstractDivergence, ChiSquare, KL
from ._generated import as_divergence
from ._root import (
    Classes,
    height,
    largest,
    Problem,
    probabilities,
    same_for_all,
    solve,
    sums,
)


Divergence = AbstractDivergence | Callable
Reference = Literal["unit", "uniform"] | Float[ArrayLike, "..."] | None


class Setup(NamedTuple):
    """A call of an operator: its classes on the last axis, its scores over beta."""

    classes: Classes
    f: AbstractDivergence
    problem: Problem
    beta: Array
    axis: int
    dtype: Any

    def rows(self, a: Array) -> Array:
        """An array like the scores, as the caller has them."""
        return jnp.moveaxis(a, -1, self.axis).astype(self.dtype)

    def row(self, a: Array) -> Array:
        """One number per row, as the caller has them."""
        return a[..., 0].astype(self.dtype)

    @property
    def present(self) -> Array:
        return self.problem.scores > -jnp.inf


def set_up(
    scores, f, reference, axis, where, temperature, axis_name, few=None
) -> Setup:
    scores = jnp.asarray(scores)
    _check_scores(scores, axis)
    f, shape = as_divergence(f), scores.shape
    wide = scores.dtype.itemsize >= 4  # `promote_types` would object to float64
    dtype = scores.dtype if wide else jnp.dtype("float32")
    f = jtu.tree_map(lambda a: _per_row("alpha", a, shape, axis, dtype), f)
    last = lambda a: jnp.moveaxis(jnp.asarray(a), axis, -1)
    theta, q, excluded = last(scores).astype(dtype), None, []
    if where is not None:
        excluded.append(~last(jnp.broadcast_to(where, shape)))
    if not isinstance(reference, str) and reference is not None:
        q = last(_measure(reference, shape)).astype(dtype)
        excluded.append(q <= 0)
    beta = jnp.ones((), dtype)
    if not isinstance(temperature, (int, float)) or temperature != 1:
        beta = _per_row("temperature", temperature, shape, axis, dtype)
        excluded.append(theta == -jnp.inf)
        theta = jnp.where(excluded[-1], 0, theta) / beta
    if excluded:
        theta = jnp.where(ft.reduce(jnp.logical_or, excluded), -jnp.inf, theta)
    unit = reference == "unit" if isinstance(reference, str) else reference is None
    if reference is None and not isinstance(f, KL):
        raise TypeError(
            f"`reference` is missing; for {type(f).__name__} it matters: \"unit\" "
            '(as in entmax and sparsemax), "uniform" (1 / number of classes), or an '
            "array are accepted. Only KL gives the same probabilities for the first two."
        )
    classes = Classes(axis_name, unit and f.sparse if few is None else few)
    if q is None:
        count = classes.sum(jnp.where(theta > -jnp.inf, 1, jnp.zeros_like(theta)))
        q = jnp.ones((), dtype) if unit else 1 / jnp.maximum(count, 1)
        Q = q * count
    else:
        Q = classes.sum(jnp.where(theta > -jnp.inf, q, 0))
    problem = Problem(theta, q, Q, largest(theta, classes))
    return Setup(classes, f, problem, beta, axis, scores.dtype)


def _check_scores(scores: Array, axis: int):
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(
            f"`scores` has dtype {scores.dtype}; floats are expected: convert integers "
            "with `scores.astype(float)`."
        )
    if not isinstance(axis, int) or not -scores.ndim <= axis < scores.ndim:
        raise ValueError(
            f"`axis` is {axis}; an integer from {-scores.ndim} to {scores.ndim - 1} is "
            f"expected for `scores` of shape {scores.shape}."
        )
    if scores.shape[axis] == 0:
        raise ValueError(f"`scores` has shape {scores.shape}: no class on axis {axis}.")


def _per_row(name: str, value, shape: tuple, axis: int, dtype) -> Array:
    """A number for all rows, or one for each, with an axis for the classes."""
    value = jnp.asarray(value, dtype)
    batch = shape[:axis] + shape[axis:][1:]
    try:
        fits = np.broadcast_shapes(value.shape, batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` has shape {value.shape}; one that broadcasts to {batch}, the "
            "shape of `scores` without its class axis, is expected."
        )
    return value[..., None] if value.ndim else value


def _measure(reference, shape: tuple) -> Array:
    reference = jnp.asarray(reference)
    try:
        fits = np.broadcast_shapes(reference.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`reference` has shape {reference.shape}; \"unit\", \"uniform\" or an array "
            f"that broadcasts to the shape {shape} of `scores` is expected."
        )
    if not isinstance(reference, jax.core.Tracer) and not np.all(reference >= 0):
        raise ValueError(
            "`reference` has a negative or NaN entry; a measure is >= 0 everywhere, and "
            "0 excludes a class."
        )
    return jnp.broadcast_to(reference, shape)


def f_softargmax(
    scores: Float[Array, "..."],
    f: Divergence,
    reference: Reference = None,
    *,
    axis: int = -1,
    where=None,
    temperature=1.0,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    r"""The probabilities that trade score against divergence from a reference.

    $$\operatorname{softargmax}_f(\theta; q)
    = \arg\max_{p \in \Delta} \langle p, \theta \rangle - \beta D_f(p, q),
    \quad p_j = q_j\, (f^*)'(\theta_j / \beta - \tau).$$

    **Arguments:**

    - `scores`: theta, any shape; 16-bit floats are computed with in float32. A class of
        score -inf is excluded.
    - `f`: a generator such as [`diffprog.losses.KL`][] or
        [`diffprog.losses.Alpha`][], or any convex function of one number.
    - `reference`: the measure q: `"unit"` (1 for every class, as in entmax), or
        `"uniform"` (1 / number of classes that are not excluded), or an array that
        broadcasts to the shape of `scores`; 0 excludes a class. Needed but for KL,
        where both names give the same probabilities.
    - `axis`: of the classes.
    - `where`: a mask, false where a class is excluded.
    - `temperature`: beta > 0, a number or one per row.
    - `axis_name`: the mesh axis over whose devices the classes are split, inside
        `shard_map`. Two numbers per row are then summed over it in every pass.

    **Returns:** p, with the shape and dtype of `scores`: zeros in a row whose classes
    are all excluded. Where `f.sparse` holds most can be exactly 0. Differentiable to
    any order in `scores`, `reference`, `temperature` and a traced alpha.

    **Raises:** `TypeError` for scores that are not floats and for a missing reference,
    `ValueError` for shapes that do not fit.

    Takes three to six passes over the scores, and two numbers of memory per row.

    Source: Roulet, Liu, Vieillard, Sander, Blondel, "Loss Functions and Operators
    Generated by f-Divergences", 2025, arXiv 2501.18537.
    """
    s = set_up(scores, f, reference, axis, where, temperature, axis_name)
    return s.rows(probabilities(s.classes, s.f, s.problem))


def f_softmax(
    scores: Float[Array, "..."],
    f: Divergence,
    reference: Reference = None,
    *,
    axis: int = -1,
    where=None,
    temperature=1.0,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    r"""The largest score, smoothed: the value of [`diffprog.losses.f_softargmax`][].

    $$\operatorname{softmax}_f(\theta; q)
    = \max_{p \in \Delta} \langle p, \theta \rangle - \beta D_f(p, q).$$

    For KL and the reference "unit" it is logsumexp + 1 - number of classes. Its
    gradient is the softargmax.

    **Arguments:** those of [`diffprog.losses.f_softargmax`][].

    **Returns:** the value of every row, without the class axis: -inf where all classes
    are excluded.
    """
    s = set_up(scores, f, reference, axis, where, temperature, axis_name)
    value = s.problem.m + height(s.classes, s.f, s.problem) - s.f.lift * s.problem.Q
    return s.row(s.beta * jnp.where(s.problem.Q > 0, value, -jnp.inf))


def f_loss(
    scores: Float[Array, "..."],
    targets: Int[ArrayLike, "..."] | Float[ArrayLike, "..."],
    f: Divergence,
    reference: Reference = None,
    *,
    axis: int = -1,
    where=None,
    temperature=1.0,
    smoothing: float = 0.0,
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
        probabilities y, floats of the shape of `scores`.
    - `smoothing`: s in [0, 1]; y becomes (1 - s) y + s q / Q.
    - `constant`: whether $D_f(y, q)$, which does not depend on the scores, is added.
        It is infinite for labels where f(0) is (reverse KL, Neyman, Jeffreys, alpha <=
        0); without it the loss is then unbounded below.

    **Returns:** the loss of every row. A row whose classes are all excluded has loss 0
    and gradient 0. So has a row whose label is out of range, where this cannot be said
    at once.

    **Raises:** `ValueError` for labels out of range, where they are known, and for
    labels with a generator whose f(0) is infinite.
    """
    s = set_up(scores, f, reference, axis, where, temperature, axis_name)
    targets = jnp.asarray(targets)
    labels = jnp.issubdtype(targets.dtype, jnp.integer)
    shape = s.problem.scores.shape
    expected = shape[:-1] if labels else jnp.shape(scores)
    if targets.shape != expected or targets.dtype == bool:
        raise ValueError(
            f"`targets` has shape {targets.shape} and dtype {targets.dtype}; labels "
            f"are integers of shape {shape[:-1]}, probabilities floats of shape "
            f"{jnp.shape(scores)}."
        )
    if labels:
        if axis_name is None:
            _check_labels(targets, shape[-1])
        _check_at_zero(s.f, smoothing, constant)
        loss, valid = _labelled(s, targets[..., None], smoothing, constant)
    else:
        y = jnp.moveaxis(targets, axis, -1).astype(s.problem.scores.dtype)
        loss, valid = _soft(s, y, smoothing, constant), True
    loss = loss + height(s.classes, s.f, s.problem)
    return s.row(jnp.where((s.problem.Q > 0) & valid, s.beta * loss, 0))


def _check_labels(labels: Array, k: int):
    if not isinstance(labels, jax.core.Tracer):
        outside = np.asarray((labels < 0) | (labels >= k))
        if outside.any():
            bad = np.asarray(labels)[outside][0]
            raise ValueError(
                f"`targets` contains the label {bad}; the {k} classes are 0 to {k - 1}."
            )


def _check_at_zero(f: AbstractDivergence, smoothing, constant: bool):
    if constant and isinstance(smoothing, (int, float)) and smoothing == 0:
        at_zero = f.at_zero
        if not isinstance(at_zero, jax.core.Tracer) and np.any(np.isinf(at_zero)):
            raise ValueError(
                f"The loss of labels is infinite with {f}, whose f(0) is: use "
                "`smoothing=0.1`, or `constant=False` for the loss without D_f(y, q), "
                "which is unbounded below."
            )


def _labelled(s: Setup, labels: Array, smoothing, constant: bool):
    """The loss less its `height`, and where labels are in range."""
    scores, q, Q, m = s.problem
    k = scores.shape[-1]
    first = lax.axis_index(s.classes.axis_name) * k if s.classes.axis_name else 0
    mine = (labels >= first) & (labels < first + k)
    index = jnp.clip(labels - first, 0, k - 1)

    def at_label(a):
        value = jnp.take_along_axis(a, index, -1) if a.shape[-1:] == (k,) else a
        return s.classes.sum(jnp.where(mine, value, 0))

    valid = s.classes.sum(jnp.where(mine, 1, 0)) > 0
    drop, q_label = m - at_label(scores), at_label(jnp.broadcast_to(q, q.shape))
    plain = isinstance(smoothing, (int, float)) and smoothing == 0
    if plain:
        # f(0) of the other classes is the lift of the height; or it is infinite.
        constants = q_label * (s.f.value(1 / jnp.where(q_label > 0, q_label, 1)))
        others = (s.f.at_zero - s.f.lift) * (Q - q_label)
        return drop + (constants - s.f.lift * q_label + others if constant else 0), valid
    share = smoothing * q_label / jnp.where(Q > 0, Q, 1)
    mean = s.classes.sum(jnp.where(s.present, q * (m - scores), 0)) / jnp.where(
        Q > 0, Q, 1
    )
    drop = (1 - smoothing) * drop + smoothing * mean
    ratio = (1 - smoothing + share) / jnp.where(q_label > 0, q_label, 1)
    own = q_label * (s.f.value(ratio) - s.f.lift)
    rest = s.f.value(smoothing / jnp.where(Q > 0, Q, 1)) - s.f.lift
    return drop + (own + (Q - q_label) * rest if constant else 0), valid


def _soft(s: Setup, y: Array, smoothing, constant: bool) -> Array:
    """The loss less its `height`."""
    scores, q, Q, m = s.problem
    if not (isinstance(smoothing, (int, float)) and smoothing == 0):
        y = (1 - smoothing) * y + smoothing * q / jnp.where(Q > 0, Q, 1)
    safe = jnp.where(s.present, scores, m)
    drop = s.classes.sum(jnp.where(y > 0, (m - safe) * y, 0))
    lost = s.classes.sum(jnp.where(s.present, 0, y)) > 0
    drop = jnp.where(lost, jnp.inf, drop)  # a target on an excluded class
    if not constant:
        return drop
    u = jnp.where(s.present, y / jnp.where(s.present, q, 1), 1)
    return drop + s.classes.sum(jnp.where(s.present, q * (s.f.value(u) - s.f.lift), 0))
