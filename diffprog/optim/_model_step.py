"""The length of an update, from a quadratic model of the loss."""

import dataclasses
import functools as ft
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._common.result import RESULTS
from .._common.tree import (
    add,
    all_finite,
    cast,
    cast_like,
    norm,
    scale,
    vdot,
    where,
    working_dtype,
    yes,
)
from .._common.types import (
    check_count,
    check_kind,
    check_number,
    check_positive,
    Number,
)
from ._checks import (
    check_average,
    check_base,
    check_curvature,
    check_floating,
    check_gradient,
    filled,
    rate_is,
)
from ._curvature import Curvature, LossModel
from ._rules import AbstractRule, held, Minimize


Groups = Literal["all", "layer", "leaf"] | Callable[[Any], Hashable]


class ModelStepState(eqx.Module):
    """What [`diffprog.optim.model_step`][] remembers.

    - `base`: the state of the base optimizer.
    - `S`, `b`: running means of curvature and slope of directions of length 1.
    - `weight`: what they are divided by.
    - `coefficients`: how far the last step went along each, before `scale`.
    - `length`: the running mean of their lengths.
    - `previous`: the last step, or `None`.
    - `count`: the number of updates.
    - `result`: of the last update, a [`diffprog.RESULTS`][] code: `successful`;
        `no_descent` where the base does not descend, or has length 0;
        `cost_unbounded` where the model has no curvature along the step, whose length
        is that of the damping or the limit; `factorization_failed` where the model has
        no minimum; or `nonfinite_derivative`. In the last two cases the step is 0, and
        no number that is not finite is kept.
    """

    base: Any
    S: Float[Array, "K K"]
    b: Float[Array, " K"]
    weight: Float[Array, ""]
    coefficients: Float[Array, " K"]
    length: Float[Array, ""]
    previous: PyTree
    count: Int[Array, ""]
    result: RESULTS


@rate_is("its model of the loss says how long a step is")
def model_step(
    base: optax.GradientTransformation,
    *,
    groups: Groups = "all",
    previous: bool = False,
    rule: AbstractRule = Minimize(),
    scale: Number | Callable[[Array], Any] = 0.5,
    ema: Number = 0.9,
    growth: Number = 3.0,
    every: int = 1,
    start: int = 0,
    check: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the update of an optimizer the length that a model of the loss asks for.

    ```python
    curvature = dp.optim.ggn(loss)
    optimizer = dp.optim.model_step(optax.contrib.muon(1.0))
    at = curvature(model, inputs, targets)
    updates, state = optimizer.update(grads, state, params, curvature=at)
    ```

    There is no learning rate to tune, and no schedule. With the update u of `base`,
    taken apart into directions D of length 1,

    $$d = s \sum_k a_k D_k, \quad (S + \rho I) a = b, \quad
    S = \overline{D^\top C D}, \; b = -\overline{D^\top g},$$

    where the bars are running means.

    **Arguments:**

    - `base`: a transformation that descends: an optimizer with learning rate 1 and no
        schedule, or a chain that ends in `optax.scale(-1)`. Its length does not matter.
        Weight decay comes after `model_step` in the chain, or into the loss.
    - `groups`: what has a length of its own: `"all"`, one for everything; `"layer"`,
        parameters that share their last but one name; `"leaf"`, every array; or a
        function of the path of a leaf that names its group.
    - `previous`: the last step is one more direction: an exact momentum.
    - `rule`: [`diffprog.optim.Minimize`][], [`diffprog.optim.Absolute`][] or
        [`diffprog.optim.Cauchy`][].
    - `scale`: s > 0, or a schedule `scale(count)`. Momentum in `base` knows the
        gradient of this batch, so that slopes look steeper than they are: 0.5, the
        default, makes up for it; 0.25 is safer for deep networks, and 1 is for a `base`
        without momentum.
    - `ema`: from 0 to 1, the weight of the past in the running means.
    - `growth`: no a is longer than this times the running mean of the lengths before:
        a batch with hardly any curvature asks for too much. `jnp.inf` sets no limit.
    - `every`: the model is looked at every so many updates; between them a is kept. On
        the CPU leave it at 1 for models with convolutions, which are slow in a branch.
    - `start`: so many updates of `base` as they are come first.
    - `check`: raise where the gradient is not that of the batch of the curvature.

    **Returns:** an optax transformation, whose state is a
    [`diffprog.optim.ModelStepState`][]. `update` needs `curvature=`, that of the batch
    of the gradient, and hands it and all else on to `base`.

    **Fails:** a step that cannot be trusted is 0, and `state.result` says why. A
    gradient that is not finite changes nothing, and is not shown to `base`. `TypeError`
    and `ValueError` for a wrong call.
    The line searches of optax refuse extra arguments: leave them out of the chain.

    Costs a forward pass and a product with J for every direction: two thirds of a
    gradient for one.

    Source: the objective of Dufort-Labbe and others, "Layerwise LQR for Geometry-Aware
    Optimization of Deep Networks", 2026, arXiv 2605.04230, along one direction; with
    `previous` the lengths of Martens and Grosse, "Optimizing Neural Networks with
    Kronecker-factored Approximate Curvature", 2015, arXiv 1503.05671.
    """
    _check(base, groups, rule, scale, ema, growth)
    check_count("every", every)
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"`start` is {start!r}; a Python int >= 0 is expected.")
    label = LABELS.get(groups, groups) if isinstance(groups, str) else groups
    lengths = rule, scale, ema, growth
    options = _Options(base, label, previous, *lengths, every, start, check)
    init: Any = ft.partial(_init, options)
    update: Any = ft.partial(_update, options)
    return optax.GradientTransformationExtraArgs(init, update)


def _check(base, groups, rule, scale, ema, growth):
    check_base(base)
    if not callable(groups) and groups not in LABELS:
        raise ValueError(
            f'`groups` is {groups!r}; "all", "layer", "leaf" or a function of a path '
            "is expected."
        )
    check_kind("rule", rule, AbstractRule, "dp.optim.Minimize(damping=1e-3)")
    if not callable(scale):
        check_positive("scale", scale)
    check_average("ema", ema)
    check_number("growth", growth, "a number of at least 1", lambda value: value >= 1)


# The names of groups, by the path of a leaf.
LABELS = {
    "all": lambda path: (),
    "layer": lambda path: jtu.keystr(path[:-1]),
    "leaf": jtu.keystr,
}


class _Options(eqx.Module):
    """What `model_step` was given."""

    base: optax.GradientTransformation
    label: Callable
    previous: bool
    rule: AbstractRule
    scale: Any
    ema: Any
    growth: Any
    every: int
    start: int
    check: bool

    def groups(self, params: PyTree) -> list[int]:
        """The group of every leaf."""
        labels = [self.label(path) for path, _ in jtu.tree_leaves_with_path(params)]
        names = list(dict.fromkeys(labels))
        return [names.index(label) for label in labels]


def _init(options: _Options, params: PyTree) -> ModelStepState:
    check_floating("params", params)
    number = max(options.groups(params), default=0) + 1 + options.previous
    dtype = working_dtype(params)
    zeros = lambda *shape: jnp.zeros(shape, dtype)
    last = jtu.tree_map(jnp.zeros_like, params) if options.previous else None
    return ModelStepState(
        options.base.init(params), zeros(number, number), zeros(number), zeros(),
        zeros(number), zeros(), last, jnp.zeros((), jnp.int32), RESULTS.successful,
    )  # fmt: skip


def _update(
    options: _Options,
    grads: PyTree,
    state: ModelStepState,
    params: PyTree = None,
    *,
    curvature: Curvature | None = None,
    **extra: Any,
) -> tuple[PyTree, ModelStepState]:
    curvature = check_curvature(curvature)
    g = filled("grads", grads, curvature)
    if options.check:
        g = check_gradient(g, curvature)
    extra["curvature"] = curvature

    def advance():
        updates, after = _based(options, grads, state.base, params, extra)
        along = _Directions.of(options, updates, state)
        found, finite = _averaged(options, state, curvature, g, along)
        finite = finite & along.finite
        stepped = _stepped(options, state, found, finite, along, updates)
        a, length, step, result = stepped
        previous = step if options.previous else None
        S, b, weight = found
        known = a, length, previous, state.count + 1, result
        return step, ModelStepState(after, S, b, weight, *known)

    def stay():
        new = dict(count=state.count + 1, result=RESULTS.nonfinite_derivative)
        return jtu.tree_map(jnp.zeros_like, grads), dataclasses.replace(state, **new)

    if options.every == 1:  # shares its forward pass with that of the gradient
        return where(_is_finite(g), advance(), stay())
    return lax.cond(_is_finite(g), advance, stay)


def _based(options: _Options, grads: PyTree, base_state, params, extra: dict):
    """The update of the base."""
    base = optax.with_extra_args_support(options.base)
    try:
        return base.update(grads, base_state, params, **extra)
    except TypeError as error:
        if "linesearch" in str(error):
            error.add_note(REFUSED)
        raise


def _stepped(options: _Options, state, found, finite, along, updates: PyTree):
    """Coefficients, their mean length, the step, and whether it can be trusted."""
    S, b, weight = found
    known = jnp.where(weight > 0, weight, 1)
    S, b = S / known, b / known
    a = options.rule.coefficients(S, b)
    a = a if options.previous else jnp.maximum(a, 0)
    a, length = held(a, state.length, options.growth)
    s: Any = options.scale
    s = s(state.count) if callable(s) else s
    step = cast_like(along.combined((s * a).astype(a.dtype)), updates)
    begun = state.count >= options.start
    if options.start:
        step = where(begun, step, updates)
    result = _judge(begun, finite, a, S, b)
    failed = result == RESULTS.factorization_failed
    failed |= result == RESULTS.nonfinite_derivative
    kept = state.coefficients, state.length, jtu.tree_map(jnp.zeros_like, updates)
    return *where(failed, kept, (a, length, step)), result


REFUSED = (
    "The `base` of `model_step` is given `curvature=`, and the line searches of optax "
    "refuse what their `value_fn` does not take: leave them out, the length of a step "
    "is found without."
)


def _judge(begun: Array, finite: Array, a: Array, S: Array, b: Array) -> RESULTS:
    """Whether a step can be trusted."""
    moves = jnp.any(a != 0) | ~begun
    flat = begun & (jnp.abs(a @ S @ a) < jnp.finfo(a.dtype).eps * (a @ b))
    result = RESULTS.where(moves, RESULTS.successful, RESULTS.no_descent)
    result = RESULTS.where(flat, RESULTS.cost_unbounded, result)
    no_model = begun & ~all_finite(a)
    result = RESULTS.where(no_model, RESULTS.factorization_failed, result)
    return RESULTS.where(finite, result, RESULTS.nonfinite_derivative)


class _Directions(NamedTuple):
    """The update, taken apart into groups of leaves, and the last step.

    - `groups`: the group of every leaf.
    - `inverse`: one over the lengths of all directions; 0 where there is none.
    - `finite`: whether all of them are.
    """

    updates: PyTree
    previous: PyTree
    groups: list[int]
    inverse: Float[Array, " K"]
    finite: Bool[Array, ""]

    @staticmethod
    def of(options: _Options, updates: PyTree, state: ModelStepState) -> "_Directions":
        groups, dtype = options.groups(updates), state.S.dtype
        updates, previous = cast((updates, state.previous), dtype)
        leaves = jtu.tree_leaves(updates)
        inside = lambda k: [u for u, group in zip(leaves, groups) if group == k]
        parts = [inside(k) for k in range(len(state.b) - options.previous)]
        parts += [previous] if options.previous else []
        lengths = jnp.stack([_length(part) for part in parts])
        inverse = jnp.where(lengths > 0, 1 / jnp.where(lengths > 0, lengths, 1), 0)
        return _Directions(updates, previous, groups, inverse, all_finite(lengths))

    def stacked(self) -> PyTree:
        """All of length 1, on a leading axis."""
        leaves, treedef = jtu.tree_flatten(self.updates)
        number = len(self.inverse) - (self.previous is not None)
        part = lambda u, group, k: u if group == k else jnp.zeros_like(u)
        rows = [
            treedef.unflatten([part(*pair, k) for pair in zip(leaves, self.groups)])
            for k in range(number)
        ]
        rows += [] if self.previous is None else [self.previous]
        scaled = [scale(*pair) for pair in zip(self.inverse, rows, strict=True)]
        return jtu.tree_map(lambda *leaves: jnp.stack(leaves), *scaled)

    def combined(self, a: Float[Array, " K"]) -> PyTree:
        """The sum of a_k times direction k."""
        c = a * self.inverse
        leaves, treedef = jtu.tree_flatten(self.updates)
        step = treedef.unflatten([c[k] * u for u, k in zip(leaves, self.groups)])
        return step if self.previous is None else add(step, self.previous, c[-1])


def _length(tree: PyTree) -> Float[Array, ""]:
    """`norm`, by one pass where the squares neither over- nor underflow."""
    squares = _squares(tree)
    limits = jnp.finfo(squares.dtype)
    safe = (squares > limits.tiny / limits.eps) & (squares < limits.max)
    return lax.cond(safe, lambda: jnp.sqrt(squares), lambda: norm(tree))


def _squares(tree: PyTree) -> Any:
    return sum(map(_square, jtu.tree_leaves(tree)))


def _square(a: Array) -> Array:
    """The sum of squares, of columns first: a single sum is slow on the CPU."""
    rows = a.reshape(a.shape[0] if a.ndim > 1 else 1, -1)
    return jnp.sum(lax.optimization_barrier(jnp.sum(rows * rows, 0)))


def _is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether all is finite, by the squares where these do not overflow."""
    finite = jnp.isfinite(_squares(tree))
    return lax.cond(finite, lambda: finite, lambda: all_finite(tree))


def _averaged(options: _Options, state, curvature, g: PyTree, along: _Directions):
    """The running means of S and b, and what they are divided by."""
    before = state.S, state.b, state.weight

    def look():
        model: LossModel = curvature.linearize()
        stacked = filled("updates", along.stacked(), curvature, len(state.b))
        D, gradient = cast((stacked, g), state.S.dtype)
        b = -jax.vmap(lambda d: vdot(d, gradient))(D)
        mix = lambda old, new: options.ema * old + (1 - options.ema) * new
        new = model.gram(D), b, jnp.ones_like(state.weight)
        mixed = jtu.tree_map(lambda a, b: mix(a, b).astype(a.dtype), before, new)
        return where(all_finite(mixed), mixed, before), all_finite(mixed)

    if options.every == 1 and options.start == 0:
        return look()
    since = state.count - options.start
    due = (since >= 0) & (since % options.every == 0)
    return lax.cond(due, look, lambda: (before, yes(due)))
