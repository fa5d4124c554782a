"""Stochastic gradient methods for spectral risks: Prospect and LSVRG.

Both minimize R(l_1(w), ..., l_n(w)) + (l2 / 2) |w|^2 with one example per step, and
correct it by what they remember, so that a constant learning rate converges.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, cast, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._common.door import door
from .._common.types import came, check_count, check_not_negative, check_positive
from .._operators.call import Divergence
from .._operators.generated import as_divergence
from ..losses._loss import AbstractLoss
from ..losses._risk import check_spectral, Number, spectral_weights


Loss = Callable[[Any, Any], Float[Array, ""]]


class RiskDescent(NamedTuple):
    """A method that minimizes a spectral risk: two pure functions.

    - `init`: `init(params, data)` returns the first state. `params` is a pytree of
        arrays, `data` one whose leaves have the n examples on their first axis.
    - `step`: `step(state, data, key)` returns the next state, whose `params` are the
        iterate. It can be jitted, scanned and batched.
    """

    init: Callable
    step: Callable


class ProspectState(NamedTuple):
    """What Prospect remembers: one loss, two weights and one gradient per example.

    - `params`: the iterate w.
    - `losses`: the loss of every example when it was last drawn, shape `(n,)`.
    - `weights`: q, the weights of these losses, shape `(n,)`.
    - `table_weights`: rho, the weight of every example when it was last drawn.
    - `gradients`: g, the gradient of every example when it was last drawn: `params`
        with a first axis n.
    - `mean_gradient`: the sum of rho_i g_i, like `params`.
    """

    params: PyTree
    losses: Float[Array, " n"]
    weights: Float[Array, " n"]
    table_weights: Float[Array, " n"]
    gradients: PyTree
    mean_gradient: PyTree


class LSVRGState(NamedTuple):
    """What LSVRG remembers: one checkpoint.

    - `params`: the iterate w.
    - `checkpoint`: the iterate at the last full pass.
    - `weights`: lambda, the weights of the losses there, shape `(n,)`.
    - `mean_gradient`: the gradient of the risk there, like `params`.
    - `num_steps`: how many steps were taken.
    """

    params: PyTree
    checkpoint: PyTree
    weights: Float[Array, " n"]
    mean_gradient: PyTree
    num_steps: Int[Array, ""]


class Risk(NamedTuple):
    """A spectral risk of the losses of a model."""

    loss: Loss
    sigma: Float[Array, " n"]
    f: Divergence | None
    smoothing: Number | None

    def weights(self, losses: Array) -> Array:
        sigma = self.sigma.astype(losses.dtype)
        return spectral_weights(losses, sigma, self.f, smoothing=self.smoothing)


def combine(*terms: tuple[Any, PyTree]) -> PyTree:
    """The sum of scalar times tree."""
    scalars, trees = zip(*terms)
    times = lambda c, a: jnp.asarray(c, a.dtype) * a
    weighted = lambda *leaves: sum(map(times, scalars, leaves))
    return jtu.tree_map(weighted, *trees)


def pick(tree: PyTree, i: Array) -> PyTree:
    return jtu.tree_map(lambda a: a[i], tree)


def _check(loss: Any, sigma: Any, f: Any, smoothing, rate, l2) -> Risk:
    if isinstance(loss, AbstractLoss) or isinstance(loss, type) or not callable(loss):
        raise TypeError(
            f"`loss` is {came(loss)}; a function `loss(params, example)`, the loss of "
            "one example, is expected, which calls the model itself."
        )
    sigma = jnp.asarray(sigma)
    if sigma.ndim != 1:
        raise ValueError(
            f"`sigma` has shape {sigma.shape}; a spectrum with an entry for each "
            'example is expected: `dp.losses.spectrum("superquantile", n, 0.5)`.'
        )
    check_spectral(sigma, f, smoothing)
    check_positive("learning_rate", rate)
    check_not_negative("l2", l2)
    if f is not None:
        as_divergence(f)
    return Risk(cast(Loss, loss), sigma, f, smoothing)


def start(risk: Risk, params: PyTree, data: PyTree) -> PyTree:
    """The parameters as arrays, which are floats, and as many examples as weights."""
    count(data, risk.sigma)
    params = jtu.tree_map(jnp.asarray, params)
    for path, leaf in jtu.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"`params{jtu.keystr(path)}` has dtype {leaf.dtype}; floats are "
                "expected: convert it with `.astype(float)`."
            )
    return params


def count(data: PyTree, sigma: Array) -> int:
    """The number of examples."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(data)}
    n = jnp.shape(sigma)[0]
    if sizes != {(n,)}:
        found = ", ".join(str(size[0]) if size else "none" for size in sorted(sizes))
        raise ValueError(
            f"The first axis of `data` has length {found or 'none'}; {n}, the length "
            "of `sigma`, is expected for every leaf."
        )
    return n


def prospect(
    loss: Loss,
    sigma: Float[Array, " n"],
    f: Divergence,
    *,
    smoothing: Number,
    learning_rate: Number,
    l2: Number = 0.0,
) -> RiskDescent:
    r"""Prospect: a gradient method for smoothed spectral risks with one rate to tune.

    $$\min_w h_\nu(\ell_1(w), \dots, \ell_n(w)) + \tfrac\mu2 \|w\|^2.$$

    A step draws an example i, and with q the weights of the table of losses, and g and
    rho the gradient and the weight of each example when it was last drawn,

    $$v = n q_i \nabla \ell_i(w) - n \rho_i g_i + \sum_j \rho_j g_j, \quad
    w \leftarrow (w - \eta v) / (1 + \eta \mu).$$

    Then the tables take $\ell_i(w)$, $q_i$ and $\nabla \ell_i(w)$, at the w before.

    **Arguments:**

    - `loss`: `loss(params, example)`, the loss of one example, a scalar.
    - `sigma`: the spectrum, shape `(n,)`: see [`diffprog.losses.spectrum`][].
    - `f`, `smoothing`: those of [`diffprog.losses.spectral_risk`][].
    - `learning_rate`: eta. It shrinks with n times the largest weight, the smoothness
        of the losses, and 1 / nu.
    - `l2`: mu >= 0, the weight of the quadratic regularization.

    **Returns:** a [`diffprog.optim.RiskDescent`][] with states
    [`diffprog.optim.ProspectState`][].

    A step costs one gradient, the weights of n losses, and O(n) memory traffic. Memory
    is n times that of the gradient. `init` costs one pass over the data. Not for losses
    that change from call to call, as under dropout: the tables would be stale.

    Source: Mehta, Roulet, Pillutla, Harchaoui, "Distributionally Robust Optimization
    with Bias and Variance Reduction", 2024, arXiv 2310.13863.
    """
    risk = _check(loss, sigma, f, smoothing, learning_rate, l2)
    step = ft.partial(_prospect_step, risk, learning_rate, l2)
    return RiskDescent(ft.partial(_prospect_init, risk), step)


@door
def _prospect_init(risk: Risk, params: PyTree, data: PyTree) -> ProspectState:
    params = start(risk, params, data)
    each = jax.vmap(jax.value_and_grad(risk.loss), (None, 0))
    losses, gradients = each(params, data)
    q = risk.weights(losses)
    mean = lambda a: jnp.tensordot(q.astype(a.dtype), a, 1)  # sum_i q_i g_i
    return ProspectState(params, losses, q, q, gradients, jtu.tree_map(mean, gradients))


@door
def _prospect_step(
    risk: Risk, learning_rate, l2, state: ProspectState, data: PyTree, key: Array
) -> ProspectState:
    w, losses, q, rho, gradients, G = state
    n = count(data, risk.sigma)
    i = jax.random.randint(key, (), 0, n)
    value, gradient = jax.value_and_grad(risk.loss)(w, pick(data, i))
    old = pick(gradients, i)
    # v = n q_i grad l_i(w) - n rho_i g_i + G
    v = combine((n * q[i], gradient), (-n * rho[i], old), (1, G))
    shrink = 1 / (1 + learning_rate * l2)
    losses = losses.at[i].set(value)
    return ProspectState(
        params=combine((shrink, w), (-learning_rate * shrink, v)),
        losses=losses,
        weights=risk.weights(losses),
        table_weights=rho.at[i].set(q[i]),
        gradients=jtu.tree_map(lambda a, b: a.at[i].set(b), gradients, gradient),
        mean_gradient=combine((1, G), (q[i], gradient), (-rho[i], old)),
    )


def lsvrg(
    loss: Loss,
    sigma: Float[Array, " n"],
    f: Divergence | None = None,
    *,
    smoothing: Number | None = None,
    learning_rate: Number,
    l2: Number = 0.0,
    period: int | None = None,
) -> RiskDescent:
    r"""LSVRG: stochastic gradients of a spectral risk, corrected at checkpoints.

    Every `period` steps it passes over all examples, at the checkpoint $\bar w$: the
    weights $\lambda$ of the losses there, and the gradient $\bar g$ of the risk. A step
    draws an example i,

    $$v = n \lambda_i (\nabla \ell_i(w) - \nabla \ell_i(\bar w)) + \bar g, \quad
    w \leftarrow (1 - \eta \mu) w - \eta v.$$

    **Arguments:**

    - `loss`, `sigma`, `l2`: those of [`diffprog.optim.prospect`][].
    - `f`, `smoothing`: those of [`diffprog.losses.spectral_risk`][]; without them the
        risk is not smoothed, and convergence to its minimum is not assured.
    - `learning_rate`: eta.
    - `period`: steps from one checkpoint to the next; `None` is n.

    **Returns:** a [`diffprog.optim.RiskDescent`][] with states
    [`diffprog.optim.LSVRGState`][].

    A step costs two gradients, and every `period` of them a pass over the data and one
    sort. O(n) memory.

    Source: Mehta, Roulet, Pillutla, Liu, Harchaoui, "Stochastic Optimization for
    Spectral Risk Measures", 2023, arXiv 2212.05149.
    """
    if period is not None:
        if isinstance(period, np.integer):
            period = int(period)
        check_count("period", period)
    risk = _check(loss, sigma, f, smoothing, learning_rate, l2)
    step = ft.partial(_lsvrg_step, risk, learning_rate, l2, period)
    return RiskDescent(ft.partial(_lsvrg_init, risk), step)


def _check_in(risk: Risk, params: PyTree, data: PyTree):
    """The weights of the losses, and the gradient of the risk."""
    each = lambda params: jax.vmap(risk.loss, (None, 0))(params, data)
    losses, pull_back = jax.vjp(each, params)
    weights = risk.weights(losses)
    (gradient,) = pull_back(weights)
    return params, weights, gradient


@door
def _lsvrg_init(risk: Risk, params: PyTree, data: PyTree) -> LSVRGState:
    params = start(risk, params, data)
    checkpoint, weights, G = _check_in(risk, params, data)
    return LSVRGState(params, checkpoint, weights, G, jnp.zeros((), jnp.int32))


@door
def _lsvrg_step(
    risk: Risk, learning_rate, l2, period, state: LSVRGState, data: PyTree, key: Array
) -> LSVRGState:
    n = count(data, risk.sigma)
    w, *memory, t = state
    due = (t % (period or n) == 0) & (t > 0)  # `init` was the first
    memory = lax.cond(due, lambda: _check_in(risk, w, data), lambda: tuple(memory))
    checkpoint, weights, G = memory
    i = jax.random.randint(key, (), 0, n)
    example, scale = pick(data, i), n * weights[i]
    gradient_of = jax.grad(risk.loss)
    new, old = gradient_of(w, example), gradient_of(checkpoint, example)
    # v = n lambda_i (grad l_i(w) - grad l_i(checkpoint)) + G
    v = combine((scale, new), (-scale, old), (1, G))
    w = combine((1 - learning_rate * l2, w), (-learning_rate, v))
    return LSVRGState(w, checkpoint, weights, G, t + 1)
