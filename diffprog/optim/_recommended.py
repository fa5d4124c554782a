"""What to take where there is no time to choose an optimizer."""

import functools as ft
from typing import Any

import optax
from jaxtyping import PyTree

from .._common.types import came
from ._checks import rate_is
from ._kfac import is_dense, kfac as kfac_
from ._model_step import model_step
from ._rules import Minimize


@rate_is("a model of the loss says how long a step is")
def recommended(
    base: optax.GradientTransformation | None = None,
    kfac: optax.GradientTransformation | bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer without a learning rate: directions, and a model for their length.

    For a [`diffprog.Network`][] of dense layers

    ```python
    factors = dp.optim.kfac(factors="sampled")
    direction = optax.chain(factors, optax.scale(-1.0))
    dp.optim.model_step(direction, previous=True, scale=1.0, ema=0.0)
    ```

    with Kronecker factors of every fifth batch and the exact momentum; for any other
    model, with orthogonalized momentum for matrices and Adam for the rest,

    ```python
    direction = optax.contrib.muon(1.0, adam_learning_rate=0.3)
    dp.optim.model_step(direction, scale=0.5, ema=0.9)
    ```

    The parameters that `init` and `update` are given decide: those of
    `eqx.filter(net, eqx.is_inexact_array)` are those of a network.

    **Arguments:**

    - `base`: what is taken in place of Muon, for all models; a transformation with
        learning rate 1. Muon itself takes arrays of two axes for matrices: for others,
        as in convolutions, give one with its `muon_weight_dimension_numbers`.
    - `kfac`: `True` or `False` for the first or the second form, whatever the
        parameters are; or a [`diffprog.optim.kfac`][] with options of your own, and the
        first form.

    **Returns:** an optax transformation, whose `update` needs `curvature=`, that of the
    batch of the gradient. Its state is a [`diffprog.optim.ModelStepState`][].

    **Raises:** `TypeError` and `ValueError` for arguments that are none of these, and
    that of [`diffprog.optim.kfac`][] where it is asked for and has no factors.

    Costs beside the gradient two thirds of one for the model, as much again for the
    momentum of the first form, and its factors at every fifth update.
    """
    if kfac is not None and not isinstance(kfac, bool | optax.GradientTransformation):
        raise TypeError(
            f"`kfac` is {came(kfac)}; True, False, or a transformation such as "
            "`dp.optim.kfac(damping=1e-2)` is expected."
        )
    if base is not None and kfac not in (None, False):
        raise ValueError(
            "`base` is the direction of the form without K-FAC: give one of `base` and "
            "`kfac`."
        )
    if base is not None or kfac is False:
        return _with_momentum(base)
    factors = kfac_(factors="sampled") if kfac in (None, True) else kfac
    direction = optax.chain(factors, optax.scale(-1.0))
    with_factors = model_step(direction, previous=True, scale=1.0, ema=0.0)
    if kfac is not None:
        return with_factors
    others = _with_momentum(None)
    form = lambda params: with_factors if is_dense(params) else others
    return optax.GradientTransformationExtraArgs(
        ft.partial(_init, form), ft.partial(_update, form)
    )


def _with_momentum(base: Any) -> optax.GradientTransformationExtraArgs:
    """The form for any model."""
    if base is None:
        base = optax.contrib.muon(1.0, adam_learning_rate=0.3)
    return model_step(base, rule=Minimize(damping=1e-3), scale=0.5, ema=0.9)


def _init(form: Any, params: PyTree) -> Any:
    return form(params).init(params)


def _update(form: Any, updates: PyTree, *args: Any, **extra: Any) -> Any:
    return form(updates).update(updates, *args, **extra)
