"""The replacement for `value_and_grad`: what is checked, and the compiled step."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._common.door import door
from .._common.model import (
    check_apart,
    check_batch,
    check_predict,
    first_half_twice,
    Parts,
    runner,
    split,
)
from .._common.reduction import check_reduction, Reduction
from .._common.result import explain, RESULTS, throw_unless_successful
from .._common.tree import (
    all_finite,
    cast,
    cast_like,
    no,
    norm,
    scale,
    vdot,
    where,
    working_dtype,
)
from .._common.types import came, check_kind
from ..losses import AbstractLoss, as_loss
from ..oracles._base import (
    AbstractOracle,
    check_outputs,
    check_proposal,
    Layers,
    Linearization,
    linearize,
    Proposal,
)
from ..oracles._damping import (
    AbstractDamping,
    as_damping,
    compare,
    DampingState,
    outcome_of,
)


Scale = Literal["step", "gradient"]

# What to do about a result, in the words of training.
ADVICE = dict(
    max_steps_reached="The duality gap of the prox-linear model is above `gap`: raise "
    "`max_steps` of the solver, `gap` or `damping`; in float32 a small gap is lost in "
    "rounding. `ProxLinear(throw=False)` takes the step as it is.",
    no_descent="Not even the gradient lowers the model: raise `damping`, or the steps "
    "of the inner solver; at a kink this may be a minimum. `fallback=True` takes the "
    "gradient.",
    nonfinite_rollout="The loss of this batch, or that after the step, is NaN or "
    "infinite: look for NaN in `inputs`, `targets` and the parameters, and for labels "
    "out of range; if the parameters have grown, take smaller steps or more damping.",
    nonfinite_derivative="Look for sqrt(0), norms at 0 or 0/0 under `jnp.where` in the "
    "model and the loss; with target propagation raise `regularization`.",
    factorization_failed="The loss is not convex in the outputs, or the damping is "
    "lost in rounding: raise `damping`, use float64, or give `fallback=True`, which "
    "takes the gradient. In `MoreauBackprop` it is an inner problem: lower `alpha`.",
)


class DirectionState(eqx.Module):
    """What a [`diffprog.ValueAndDirection`][] remembers between batches.

    - `damping`: the damping of the next step, and how fast it grows.
    - `memory`: what the oracle keeps.
    - `model_state`: the state of the model after the last batch, or `None`.
    """

    damping: DampingState | None
    memory: PyTree
    model_state: PyTree


class DirectionAux(eqx.Module):
    """What is known of a direction besides itself.

    - `result`: `successful`, or why the direction was withheld.
    - `outputs`: of the model, on the batch.
    - `gradient`: the norm of the gradient.
    - `slope`: the derivative of the loss along the step; negative.
    - `decrease`: by how much the oracle's model of the loss falls with the step.
    - `ratio`: the decrease of the loss with the whole step over `decrease`; NaN where
        the damping does not depend on it, or where `decrease` is lost in rounding.
    - `damping`: that of this step.
    - `gap`: the duality gap of the problem the oracle solved; NaN if it has none.
    - `num_inner`: its inner iterations.
    """

    result: RESULTS
    outputs: Array
    gradient: Float[Array, ""]
    slope: Float[Array, ""]
    decrease: Float[Array, ""]
    ratio: Float[Array, ""]
    damping: Float[Array, ""]
    gap: Float[Array, ""]
    num_inner: Int[Array, ""]


class ValueAndDirection(eqx.Module):
    """What [`diffprog.value_and_direction`][] returns."""

    loss: AbstractLoss
    oracle: AbstractOracle
    predict: Callable | None
    scale: Scale = eqx.field(static=True)
    reduction: Reduction = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)
    fallback: bool = eqx.field(static=True)
    check: bool = eqx.field(static=True)

    def __call__(
        self,
        model: PyTree,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Any, PyTree]:
        """`value, direction`, or `(value, aux), direction` with `has_aux`."""
        parts = self._split(model, inputs, targets, key)
        found = _call(self, parts, inputs, targets, key)
        value, aux, outputs, replaced, direction = found
        _check_targets(self.loss, outputs, targets)
        if isinstance(replaced, Tracer) or not jnp.all(replaced):
            result = aux.result if isinstance(aux, DirectionAux) else aux
            told = lambda result: explain(result, ADVICE)
            throw_unless_successful(result, result, True, told)
        return ((value, aux) if self.has_aux else value), direction

    def init(self, model: PyTree, model_state: PyTree = None) -> DirectionState:
        """The state before the first batch.

        With a `model_state` (running means, say) `predict` is given it as `state=`, and
        returns the outputs and the new one.
        """
        return _init(self, split(model, self.predict), model_state)

    def step(
        self,
        model: PyTree,
        state: DirectionState,
        inputs: PyTree,
        targets: PyTree,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[tuple[Float[Array, ""], DirectionAux], PyTree, DirectionState]:
        """`(value, aux), direction, state`; only a wrong call raises.

        A direction that cannot be trusted is 0 (or the gradient, with `fallback`), and
        `aux.result` says why. `predict` is given the `key`, if there is one, as `key=`;
        the default splits it among the examples.
        """
        if not isinstance(state, DirectionState):
            raise TypeError(f"`state` is {came(state)}; start with `init(model)`.")
        parts = self._split(model, inputs, targets, key, state.model_state)
        found = _step(self, parts, state, inputs, targets, key)
        _check_targets(self.loss, found[0][1].outputs, targets)
        return found

    def _split(self, model, inputs, targets, key, model_state=None) -> Parts:
        parts = split(model, self.predict)
        check_batch(key, inputs=inputs, targets=targets)
        if self.check:
            check_apart(_outputs(self, parts, inputs, model_state, key))
        return parts


def value_and_direction(
    loss: Callable,
    oracle: AbstractOracle,
    predict: Callable | None = None,
    *,
    scale: Scale = "step",
    reduction: Reduction = "mean",
    has_aux: bool = False,
    fallback: bool = False,
    check: bool = False,
) -> ValueAndDirection:
    r"""A replacement for `value_and_grad` that follows another rule backward.

    ```python
    vd = dp.value_and_direction(loss, dp.oracles.GaussNewton(damping=0.1))
    value, direction = vd(model, inputs, targets)
    updates, opt_state = optax.sgd(1.0).update(direction, opt_state)
    ```

    The direction is minus the step of the oracle, arranged like the gradient, so that
    any optax optimizer takes it: `optax.sgd(1.0)` makes the whole step. The model runs
    in its own dtypes, bfloat16 and float16 too, and the direction has that of each
    parameter; all else is float32, or float64 where a parameter or an output is.

    **Arguments:**

    - `loss`: `loss(outputs, targets)`, one number per example: one of
        [`diffprog.losses`][diffprog.losses.AbstractLoss], or any function.
    - `oracle`: one of `dp.oracles`, such as [`diffprog.oracles.GaussNewton`][].
    - `predict`: `(model, inputs) -> outputs` of the whole batch. By default
        `jax.vmap(model)(inputs)`. With Flax linen the model is the parameters, and
        this `module.apply`; the page on Equinox, Flax and haiku has a loop for each.
    - `scale`: `"step"`; or `"gradient"`, which multiplies by the damping (divides by
        the step size of the targets, or by alpha) so that the direction tends to the
        gradient as the damping grows.
    - `reduction`: `"mean"` or `"sum"` of the losses over the examples. The mean is one
        over those that count: see `ignore_label` of
        [`diffprog.losses.SoftmaxCrossEntropy`][]. With `"sum"` the damping is weighed
        against the sum.
    - `has_aux`: whether a call returns `(value, aux), direction`, with a
        [`diffprog.DirectionAux`][].
    - `fallback`: return the gradient, where it is finite, instead of a direction that
        cannot be trusted.
    - `check`: raise if the output of one example depends on the input of another, as in
        batch normalization. Runs the model twice more; for debugging.

    **Returns:** a [`diffprog.ValueAndDirection`][]. Call it, or keep its state from
    batch to batch with `init` and `step`, for oracles that adapt their damping or
    start from their last step.

    **Fails:** a call raises [`diffprog.SolveError`][] where the direction cannot be
    trusted, or returns NaN under `jit` and `vmap`; `step` returns 0 and a code.
    `TypeError` or `ValueError` at once for a wrong call, and for targets that the loss
    does not accept, such as labels out of range; where these are traced the value is
    NaN.
    """
    check_kind("oracle", oracle, AbstractOracle, "dp.oracles.GaussNewton()")
    check_predict(predict)
    if scale not in ("step", "gradient"):
        raise ValueError(f'`scale` is {scale!r}; "step" or "gradient" is expected.')
    check_reduction(reduction)
    options = scale, reduction, has_aux, fallback, check
    return ValueAndDirection(as_loss(loss), oracle, predict, *options)


# The compiled part ----------------------------------------------------------------


def _damping_of(vd: ValueAndDirection) -> AbstractDamping | None:
    return None if vd.oracle.damping is None else as_damping(vd.oracle.damping)


def _begin(vd: ValueAndDirection, params: PyTree, model_state) -> DirectionState:
    rule, damping, dtype = _damping_of(vd), None, working_dtype(params)
    if rule is not None:
        convert = lambda a: jnp.asarray(a).astype(dtype)
        damping = jtu.tree_map(convert, rule.init())
    return DirectionState(damping, vd.oracle.init(cast(params, dtype)), model_state)


def _linearized(vd: ValueAndDirection, params, build, inputs, targets, state, key):
    """The linearization at `build(params)`, and the new state of the model."""
    run = runner(vd.predict, inputs, state, key)
    with_params = lambda w: build(cast_like(w, params))
    apply, mapped = lambda model: run(model)[0], vd.predict is None and key is None
    layers = Layers(build(params), inputs, with_params, apply, mapped)
    predict = lambda w: run(build(w))
    batch = targets, inputs
    return linearize(predict, params, vd.loss, *batch, vd.reduction, layers)


def _advance(vd: ValueAndDirection, params, build, state, inputs, targets, key, adapt):
    batch = inputs, targets
    at, model_state = _linearized(vd, params, build, *batch, state.model_state, key)
    rule, gradient = _damping_of(vd), norm(at.gradient)
    damping = jnp.zeros_like(gradient)
    if rule is not None:
        damping = rule.damping(state.damping, gradient).astype(gradient.dtype)
    dtype = at.value.dtype
    memory = cast(state.memory, dtype)
    _check_memory(memory, jax.eval_shape(vd.oracle.init, at.params))
    proposal = vd.oracle.propose(at, damping, memory, key)
    check_proposal(vd.oracle, proposal, at.params)
    # The step as it will be made: what is too small for the parameters is no part.
    rounded = cast(cast_like(proposal.step, params), dtype)
    proposal = dataclasses.replace(proposal, step=rounded)
    result = _judge(at, proposal)
    ok = result == RESULTS.successful
    slope = vdot(at.gradient, proposal.step)
    ratio, keep, next_damping = jnp.full_like(slope, jnp.nan), ok, state.damping
    if adapt and rule is not None:
        outcome = outcome_of(ok)
        if rule.follows_ratio:
            ratio, outcome, after = compare(at, proposal, ok)
            lost = ok & ~jnp.isfinite(after)
            result = RESULTS.where(lost, RESULTS.nonfinite_rollout, result)
            keep = ok & ~lost & rule.keep(outcome)
        given = ratio.astype(next_damping.damping.dtype)
        next_damping = rule.update(next_damping, given, outcome)
    direction = scale(-1, proposal.step)
    if vd.scale == "gradient":
        direction = jtu.tree_map(scale, proposal.unit, direction)
    zeros = jtu.tree_map(jnp.zeros_like, at.params)
    instead = where(_replaced(vd, at.value, gradient, result), at.gradient, zeros)
    direction = cast_like(where(keep, direction, instead), params)
    gap = jnp.asarray(proposal.gap, slope.dtype)
    num_inner = jnp.asarray(proposal.num_inner, jnp.int32)
    known = gradient, slope, proposal.decrease, ratio, damping, gap, num_inner
    aux = DirectionAux(result, at.outputs, *known)
    memory = cast_like(where(ok, proposal.memory, memory), state.memory)
    return (at.value, aux), direction, DirectionState(next_damping, memory, model_state)


def _check_memory(memory: PyTree, made: PyTree):
    """What is remembered must be arranged as what `init` of the oracle makes."""
    arranged = lambda tree: jtu.tree_flatten(jtu.tree_map(jnp.shape, tree))
    if arranged(memory) != arranged(made):
        raise ValueError(
            "`state` remembers a step of another model, or of another oracle: start "
            "with `init(model)`."
        )


def _judge(at: Linearization, proposal: Proposal) -> RESULTS:
    # The gradient itself is not looked at: not every oracle needs it.
    good = proposal.result == RESULTS.successful
    wrong = good & ~all_finite(proposal.step)
    result = RESULTS.where(wrong, RESULTS.nonfinite_derivative, proposal.result)
    return RESULTS.where(jnp.isfinite(at.value), result, RESULTS.nonfinite_rollout)


def _replaced(vd, value: Array, gradient: Array, result: RESULTS) -> Bool[Array, ""]:
    """Whether the gradient takes the place of a direction that cannot be trusted."""
    if not vd.fallback:
        return no(value)
    return (result != RESULTS.successful) & jnp.isfinite(value) & jnp.isfinite(gradient)


@door
def _init(vd, parts: Parts, model_state) -> DirectionState:
    return _begin(vd, parts.joined()[0], model_state)


@door
def _outputs(vd, parts: Parts, inputs, model_state, key):
    """The outputs for a batch, and for one whose second half is its first again."""
    (params, build), found = parts.joined(), []
    for batch in (inputs, jtu.tree_map(first_half_twice, inputs)):
        outputs, _ = runner(vd.predict, batch, model_state, key)(build(params))
        check_outputs(outputs, batch)
        found.append(outputs)
    return tuple(found)


@door
def _step(vd, parts: Parts, state, inputs, targets, key):
    return _advance(vd, *parts.joined(), state, inputs, targets, key, True)


@door
def _call(vd, parts: Parts, inputs, targets, key):
    """A step without memory; what nobody asks for is not computed."""
    params, build = parts.joined()
    state = _begin(vd, params, None)
    args = params, build, state, inputs, targets, key
    (value, aux), direction, _ = _advance(vd, *args, False)
    replaced = _replaced(vd, value, aux.gradient, aux.result)
    good = replaced | (aux.result == RESULTS.successful)
    direction = jtu.tree_map(lambda d: jnp.where(good, d, jnp.nan), direction)
    return value, aux if vd.has_aux else aux.result, aux.outputs, replaced, direction


def _check_targets(loss: AbstractLoss, outputs: Array, targets: PyTree):
    """Raises for what the loss does not accept, before anything is returned."""
    type(loss).count(loss, outputs, targets)  # Equinox binds a method in 20 us
