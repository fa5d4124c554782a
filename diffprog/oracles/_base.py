"""What every oracle is given, and what it returns."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._common.jacobian import products
from .._common.reduction import weight
from .._common.result import RESULTS
from .._common.tree import cast, cast_like, vdot, working_dtype
from .._common.types import AbstractPart, came, check_answer, shapes
from ..losses import AbstractLoss
from ..losses._loss import answered


# So many roundings are allowed for before a change of the loss means something.
EPSILONS = 8
ABOUT_STATE = (
    ". A new state may stand beside it where the old one was given to "
    "`vd.init(model, state)`, and `vd.step` is called"
)
CONSTANT = (
    "The outputs do not depend on the parameters, so no step changes them. A "
    "`predict(model, inputs)` computes outputs from its first argument, not from a "
    "model that it captures: `lambda params, x: module.apply(params, x)`."
)


class Layers(eqx.Module):
    """The model as the user gave it, for oracles that look at its layers.

    - `model`, `inputs`: of the call.
    - `with_params`: the model with other parameters, in the dtypes of its own.
    - `apply`: the outputs as a function of such a model.
    - `mapped`: whether these are `jax.vmap(model)(inputs)`.
    """

    model: Any
    inputs: PyTree
    with_params: Callable
    apply: Callable
    mapped: bool = eqx.field(static=True)


class Linearization(eqx.Module):
    r"""A loss of a model on one batch, $h(w) = c \sum_i \ell_i(f_i(w))$, linearized.

    m examples have k outputs each. c is `weight`: one over those that the loss counts,
    1 / m unless it ignores some, or 1 where losses are summed.

    - `params`: w, a pytree of floating arrays.
    - `outputs`: f(w), shape `(m, ...)`.
    - `value`, `gradient`: h(w), and its gradient, like `params`.
    - `cotangent`: the gradients of the losses in the outputs, without c.
    - `mv`, `transpose_mv`: products with the Jacobian of the outputs: J d, like
        `outputs`, for d like `params`; and J' v, the other way round.
    - `loss`, `targets`: an [`diffprog.losses.AbstractLoss`][] and its second argument.
    - `weight`: c.
    - `predict`: the outputs as a function of the parameters.
    - `eps`: the rounding of the outputs, and one like `params` of the parameters.
    - `layers`: the model itself, an [`diffprog.oracles.Layers`][]; or `None`, and
        oracles know it by its products alone.

    The model runs in its own dtypes. All arrays here, and those that go into these
    functions and come out of them, are float32, or float64 where the model has it.
    """

    params: PyTree
    outputs: Float[Array, "examples ..."]
    value: Float[Array, ""]
    gradient: PyTree
    cotangent: Float[Array, "examples ..."]
    mv: Callable
    transpose_mv: Callable
    loss: AbstractLoss
    targets: PyTree
    weight: float | Array
    predict: Callable
    eps: tuple[float, PyTree]
    layers: Layers | None = None

    def hessian_mv(self, v: Array) -> Array:
        """H v, with the block-diagonal Hessian of the losses in the outputs."""
        Hv = self.loss.hessian_mv(self.outputs, self.targets, v)
        return answered(self.loss, "hessian_mv", Hv, v.shape)

    def value_at(self, params: PyTree) -> Float[Array, ""]:
        """h at other parameters, on the same batch and with the same key."""
        losses = self.loss(self.predict(params), self.targets)
        return (self.weight * jnp.sum(losses)).astype(self.value.dtype)

    def rounding(self) -> Float[Array, ""]:
        r"""By how much h may be wrong because numbers are rounded.

        That of the losses themselves, and what they change by where the outputs are
        off by some roundings of themselves and of the parameters that they add up. A
        loss of 0 of outputs that only end near 0 is not known to more than that.
        """
        of_outputs, of_params = self.eps
        signs = lambda w: jnp.where(jnp.arange(w.size) % 2, -1, 1).reshape(w.shape)
        mixed = lambda w, eps: EPSILONS * eps * w * signs(w).astype(w.dtype)
        of_params = self.mv(jtu.tree_map(mixed, self.params, of_params))
        eps = EPSILONS * of_outputs
        error = eps * jnp.abs(self.outputs) + jnp.abs(of_params)
        upward = jnp.where(self.cotangent < 0, -error, error)
        change = self.weight * jnp.sum(
            self.loss(self.outputs + upward, self.targets)
            - self.loss(self.outputs, self.targets)
        )
        return eps * jnp.abs(self.value) + jnp.where(change < jnp.inf, change, 0)

    def model_decrease(self, step: PyTree) -> Float[Array, ""]:
        r"""$-\langle \nabla h, d \rangle - \frac c2 \langle J d, H J d \rangle$."""
        u = self.mv(step)
        curvature = self.weight * jnp.vdot(u, self.hessian_mv(u))
        return -vdot(self.gradient, step) - curvature / 2


def linearize(
    predict: Callable,
    params: PyTree,
    loss: AbstractLoss,
    targets: PyTree,
    inputs: PyTree,
    reduction: str,
    layers: Layers | None = None,
) -> tuple[Linearization, PyTree]:
    """The linearization, and what else `predict` returns."""

    def checked(params):
        outputs, aux = predict(params)
        check_outputs(outputs, inputs)
        return outputs, aux

    found, mv, transpose_mv, aux = products(checked, params, CONSTANT)
    dtype = working_dtype(params, found)
    eps = lambda a: float(jnp.finfo(a.dtype).eps)
    outputs, targets = found.astype(dtype), _at_least(targets, dtype)
    losses = _losses(loss, outputs, targets, inputs)
    c = weight(loss, outputs, targets, reduction)
    cotangent = loss.gradient(outputs, targets)
    cotangent = answered(loss, "gradient", cotangent, outputs.shape)
    return Linearization(
        params=cast(params, dtype),
        outputs=outputs,
        value=(c * jnp.sum(losses)).astype(dtype),
        gradient=transpose_mv(c * cotangent),
        cotangent=cotangent,
        mv=mv,
        transpose_mv=transpose_mv,
        loss=loss,
        targets=targets,
        weight=c,
        predict=lambda w: predict(cast_like(w, params))[0].astype(dtype),
        eps=(eps(found), jtu.tree_map(eps, params)),
        layers=layers,
    ), aux


def _at_least(targets: PyTree, dtype: Any) -> PyTree:
    """Targets of 16 bits in the dtype of the outputs."""
    small = lambda a: eqx.is_inexact_array(a) and a.dtype.itemsize < 4
    return jtu.tree_map(lambda a: cast(a, dtype) if small(a) else a, targets)


def check_outputs(outputs: Any, inputs: PyTree):
    if eqx.is_array(outputs) and jnp.issubdtype(outputs.dtype, jnp.complexfloating):
        raise TypeError(
            f"The outputs of the model have dtype {outputs.dtype}; losses are of real "
            "numbers: give real and imaginary parts as two outputs, or a modulus."
        )
    if not eqx.is_inexact_array(outputs) or outputs.ndim == 0:
        examples = rows(inputs)
        of = "the batch" if examples is None else f"a batch of {examples} examples"
        with_state = isinstance(outputs, tuple) and len(outputs) == 2
        dtype = getattr(outputs, "dtype", None)
        dtype = "" if dtype is None else f" and dtype {dtype}"
        raise TypeError(
            f"The model (or `predict`) returned {came(outputs)}{dtype} for {of}; one "
            "floating array whose first axis counts examples is expected"
            f"{ABOUT_STATE if with_state else ''}."
        )
    if outputs.size == 0:
        raise ValueError(
            f"The outputs for the batch have shape {outputs.shape}: at least one "
            "example with one output is expected. Skip an empty batch."
        )


def rows(tree: PyTree) -> int | None:
    """The length of the first axis that all arrays of a batch share, if they do."""
    lengths = {np.shape(leaf)[:1] for leaf in jtu.tree_leaves(tree)}
    return lengths.pop()[0] if len(lengths) == 1 and () not in lengths else None


def _losses(loss: AbstractLoss, outputs: Array, targets: PyTree, inputs: PyTree):
    """The losses; where they fail, says who did not give a row for every example."""
    try:
        losses = loss(outputs, targets)
        return answered(loss, "__call__", losses, outputs.shape[:1])
    except Exception as error:
        found, asked, wanted = outputs.shape[0], rows(inputs), rows(targets)
        if wanted is None or wanted == found:
            error.add_note(
                f"The loss was given outputs of shape {outputs.shape}, as the model "
                f"(or `predict`) returns them for the batch, and targets of shape "
                f"{shapes(targets)}."
            )
            raise
        if asked == wanted:
            message = (
                f"`predict` returned outputs of shape {outputs.shape} for {asked} "
                "examples; their first axis is the example, as in "
                "`jax.vmap(model)(inputs)`."
            )
        elif asked == found:
            message = (
                f"`targets` has shape {shapes(targets)} for {asked} examples; the "
                "first axis is the example."
            )
        else:
            message = (
                f"`predict` returned outputs of shape {outputs.shape} for inputs of "
                f"shape {shapes(inputs)}, and `targets` has shape {shapes(targets)}; "
                "the first axis of outputs and targets is the example."
            )
        raise ValueError(message) from error


class Proposal(eqx.Module):
    """The answer of an oracle.

    - `step`: the change of the parameters, at full length.
    - `decrease`: how much the model of the oracle, without its damping term, falls.
    - `unit`: what the step is multiplied with to tend to minus the gradient: a number,
        or a pytree that the step begins with.
    - `gap`: the duality gap of the problem that was solved; NaN if there is none.
    - `num_inner`: inner iterations.
    - `result`: `successful`, or why the step cannot be trusted.
    - `memory`: what the next call is given.
    """

    step: PyTree
    decrease: Float[Array, ""]
    unit: PyTree = 1.0
    gap: Any = float("nan")
    num_inner: Int[Array, ""] | int = 0
    result: RESULTS = eqx.field(default_factory=lambda: RESULTS.successful)
    memory: PyTree = None


def check_proposal(oracle: Any, proposal: Any, params: PyTree):
    """Raises for what is no proposal, or has a step that is not like parameters."""
    check_answer(oracle, "propose", proposal, Proposal)
    if shapes(proposal.step) != shapes(params):
        raise ValueError(
            f"`{type(oracle).__name__}.propose` returned a step of shape "
            f"{shapes(proposal.step):.200}; one like the parameters, "
            f"{shapes(params):.200}, is expected."
        )


class AbstractOracle(AbstractPart):
    """A rule that turns a loss on a batch into a step: see `dp.value_and_direction`.

    - `damping`: a positive number, or an [`diffprog.oracles.AbstractDamping`][], or
        `None` for oracles without.
    """

    damping: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def init(self, params: PyTree) -> PyTree:
        """The memory of an oracle that has not been called."""

    @abc.abstractmethod
    def propose(
        self,
        at: Linearization,
        damping: Float[Array, ""],
        memory: PyTree,
        key: PRNGKeyArray | None,
    ) -> Proposal:
        """The step at `at.params`; `damping` is 0 for oracles without."""


class AbstractForgetful(AbstractOracle):
    """An oracle that remembers nothing from batch to batch."""

    def init(self, params):
        return None
