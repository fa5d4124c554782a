import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._chain.network import Network, Stage
from .._common.inner import (
    AbstractInner,
    InnerGaussNewton,
    InnerGradient,
    ridge,
    Subproblem,
)
from .._common.result import RESULTS
from .._common.tree import all_finite, cast, scale, vdot, widened, working_dtype
from .._common.types import AbstractPart, check_positive, component, Number, number
from ..losses import AbstractDualLoss
from ._base import AbstractForgetful, Linearization, Proposal
from ._gram import is_linear
from ._rules import AbstractRule, inside, run_marked, run_network, zero_tangent


class AbstractMessageRule(AbstractPart):
    """How a message goes back through a function."""

    @abc.abstractmethod
    def pull(self, fn: Callable, x: PyTree, message: PyTree) -> PyTree:
        """The message to `x`, from one that is like `fn(x)`."""


class ChainRule(AbstractMessageRule):
    r"""Ordinary back-propagation: $J^\top \lambda$."""

    def pull(self, fn, x, message):
        return jax.vjp(fn, x)[1](message)[0]


class MoreauRule(AbstractMessageRule):
    r"""The gradient of a Moreau envelope:

    $$-\operatorname{argmin}_y \; \langle \lambda, \phi(z + y) \rangle
    + \tfrac12 \|y\|^2.$$

    For an affine function it is the chain rule.

    - `solver`: [`diffprog.oracles.InnerGradient`][], three unit steps unless given;
        [`diffprog.oracles.InnerNewton`][] for functions of few numbers.
    """

    solver: AbstractInner = component(InnerGradient(), "dp.oracles.InnerNewton()")

    def pull(self, fn, x, message):
        return self.solver.solve(Subproblem(fn, x, message))


class InverseRule(AbstractMessageRule):
    r"""A regularized inverse:

    $$-\operatorname{argmin}_y \; \|\phi(z + y) - \phi(z) + \lambda\|^2
    + \gamma \|y\|^2,$$

    one Gauss-Newton step of which is $(J^\top J + \gamma I)^{-1} J^\top \lambda$.

    - `gamma`: 1 unless given. As it grows, gamma times the message tends to that of the
        chain rule.
    - `solver`: [`diffprog.oracles.InnerGaussNewton`][], one step unless given.
    """

    gamma: Number = number(1.0, check_positive)
    solver: AbstractInner = component(
        InnerGaussNewton(), "dp.oracles.InnerGaussNewton()"
    )

    def pull(self, fn, x, message):
        return self.solver.solve(Subproblem(fn, x, message, True, self.gamma))


class LayerRules(AbstractRule):
    """A rule for the input of a layer, and one for its parameters.

    Examples are apart in the problem of the input. In that of the parameters they are
    one problem where `batched`, else each has its own, and the messages are added.
    """

    state: AbstractMessageRule
    weights: AbstractMessageRule
    split: bool = eqx.field(static=True)

    def prepare(self, layer):
        return None

    def backward(self, layer, memory, x, message, batched):
        has_parts = isinstance(layer, Stage | eqx.nn.Sequential)
        if not has_parts or (not self.split and len(layer.layers) > 1):
            return self._through(layer, x, message, batched)
        xs = []
        for part in layer.layers:
            xs.append(x)
            x = jax.vmap(part)(x) if batched else part(x)
        found = []
        for part, x in zip(reversed(layer.layers), reversed(xs), strict=True):
            to_params, message = self._through(part, x, message, batched)
            found.append(to_params)
        params = eqx.filter(layer, eqx.is_inexact_array)
        empty = lambda node: node is None
        parts = tuple(reversed(found))
        return eqx.tree_at(lambda s: s.layers, params, parts, is_leaf=empty), message

    def _through(self, layer: Callable, x: PyTree, message: PyTree, batched: bool):
        params, rest = eqx.partition(layer, eqx.is_inexact_array)
        to_params = params
        if jtu.tree_leaves(params):
            to_params = self._to_params(layer, params, rest, x, message, batched)
        moving, fixed = eqx.partition(x, eqx.is_inexact_array)
        if not jtu.tree_leaves(moving):
            return to_params, jtu.tree_map(zero_tangent, x)

        def one(moving, fixed, message):
            fn = lambda moving: layer(eqx.combine(moving, fixed))
            return _pull(self.state, fn, moving, message)

        pull = jax.vmap(one) if batched else one
        to_x = pull(moving, fixed, message)
        return to_params, eqx.combine(to_x, jtu.tree_map(zero_tangent, fixed))

    def _to_params(self, layer, params, rest, x, message, batched):
        rule = self.weights
        if isinstance(rule, InverseRule) and rule.solver.exact and is_linear(layer):
            if not batched:
                x, message = x[None], message[None]
            return _linear_inverse(layer, params, x, message, rule.gamma)

        def fn(params):
            layer = eqx.combine(params, rest)
            return jax.vmap(layer)(x) if batched else layer(x)

        return _pull(rule, fn, params, message)


def _pull(rule: AbstractMessageRule, fn: Callable, x: PyTree, message: PyTree):
    """The rule, for a function that has dtypes of its own."""
    dtype = working_dtype(message)
    return rule.pull(widened(fn, dtype, x), cast(x, dtype), message)


def _linear_inverse(layer, params, x: Array, message: Array, gamma: Any) -> PyTree:
    """Ridge regression of the messages: (X'X + gamma I)^-1 X' lam, with ones in X."""
    X = x.astype(message.dtype)
    if layer.use_bias:
        X = jnp.concatenate([X, jnp.ones_like(X[:, :1])], 1)
    V = ridge(X, message, gamma).T
    if not layer.use_bias:
        return eqx.tree_at(lambda p: p.weight, params, V)
    return eqx.tree_at(lambda p: (p.weight, p.bias), params, (V[:, :-1], V[:, -1]))


class MoreauBackprop(AbstractForgetful):
    r"""Back-propagation by gradients of Moreau envelopes, or by regularized inverses.

    The message of the loss goes back from layer to layer, as in back-propagation, but
    through small minimizations in place of products with Jacobians:

    $$\lambda_T = \nabla \operatorname{env}(\alpha h)(x_T), \quad
    \lambda_t = -\operatorname{argmin}_y \; \langle \lambda_{t+1}, f_t(x_t + y, w_t)
    \rangle + \tfrac12 \|y\|^2,$$

    and the step of the parameters, $-g_t$, is such a minimizer in $w_t$. Each unit is
    evaluated where it would go, so steps shrink where the network is strongly curved.
    With $\alpha \to 0$ the step tends to $-\alpha \nabla h$.

    The rules are not homogeneous: twice the loss is not twice the step. Loss scaling,
    sums of gradients over parts of a batch, and the mean in place of the sum of the
    losses all change the direction; alpha goes with the `reduction`.

    - `alpha`: the step size, inside the envelope of the loss.
    - `state`, `weights`: the rules for the input and for the parameters of a layer:
        [`diffprog.oracles.MoreauRule`][], [`diffprog.oracles.InverseRule`][] or
        [`diffprog.oracles.ChainRule`][].
    - `seed`: `MoreauRule()` starts from the envelope of the loss, exactly for the
        losses of `dp.losses` that have a conjugate, else by the solver of the rule;
        `ChainRule()` from alpha times the gradient.
    - `split`: take the stages of a network apart, so that a dense layer and the
        function that follows it have problems of their own.

    A model is a [`diffprog.Network`][], called without `predict` and key: then the
    parameters of a stage have one problem for the whole batch. Or any model whose
    layers are marked by [`diffprog.rule_boundary`][]: then each example has a
    problem of its own, whose solutions are added, and all that is not marked follows
    the chain rule. These are two oracles, equal where the rule is the chain rule.

    The cost is that of back-propagation times the inner steps. Fails with
    `factorization_failed` where Newton or conjugate gradients meet a problem that is
    not convex: alpha is too large.

    Source: Roulet, Harchaoui, "Differentiable Programming a la Moreau", 2020, arXiv
    2012.15458; for `InverseRule` of the weights Frerix, Moellenhoff, Moeller, Cremers,
    "Proximal Backpropagation", 2017, arXiv 1706.04638.
    """

    alpha: Number = number(1.0, check_positive)
    state: AbstractMessageRule = component(MoreauRule(), "dp.oracles.MoreauRule()")
    weights: AbstractMessageRule = component(MoreauRule(), "dp.oracles.MoreauRule()")
    seed: AbstractMessageRule = component(MoreauRule(), "dp.oracles.MoreauRule()")
    split: bool = eqx.field(static=True, default=False)

    damping: ClassVar[None] = None

    def __check_init__(self):
        if isinstance(self.seed, InverseRule):
            raise TypeError(
                "`seed` is an InverseRule, and a loss has no inverse: give "
                "`dp.oracles.MoreauRule()` or `dp.oracles.ChainRule()`."
            )

    def propose(self, at, damping, memory, key):
        run = _with_rules(at, LayerRules(self.state, self.weights, self.split))
        _, pull = jax.vjp(lambda w: run(w).astype(at.outputs.dtype), at.params)
        g = pull(_seed(self.seed, at, self.alpha))[0]
        step = scale(-1, g)
        good = all_finite(g) | ~all_finite(at.cotangent)
        result = RESULTS.where(good, RESULTS.successful, RESULTS.factorization_failed)
        decrease, unit = -vdot(at.gradient, step), 1 / self.alpha
        if isinstance(self.weights, InverseRule):
            unit = unit * self.weights.gamma
        return Proposal(step, decrease, unit, result=result)


def _with_rules(at: Linearization, rule: LayerRules) -> Callable:
    """The outputs as a function of the parameters; backward they follow the rule."""
    layers = inside(at)
    if not isinstance(layers.model, Network):
        return run_marked(at, rule)
    if not layers.mapped:
        raise ValueError(
            "`MoreauBackprop` runs the layers of a `dp.Network` itself: leave out "
            "`predict` and `key`, or mark the layers of another model with "
            "`dp.rule_boundary`."
        )
    return lambda w: run_network(layers.with_params(w), rule, layers.inputs)


def _seed(rule: AbstractMessageRule, at: Linearization, alpha: Any) -> Array:
    """The message of the loss to the outputs."""
    t = jnp.asarray(alpha * at.weight).astype(at.outputs.dtype)
    if isinstance(rule, ChainRule):
        return t * at.cotangent

    if isinstance(at.loss, AbstractDualLoss):
        # grad env(t l)(u) = t prox_{l* / t}(u / t)
        return t * at.loss.conjugate_prox(at.outputs / t, 1 / t, at.targets)

    def one(outputs, targets):
        expand = lambda tree: jtu.tree_map(lambda a: a[None], tree)
        fn = lambda outputs: at.loss(outputs[None], expand(targets))[0]
        return rule.pull(fn, outputs, t)

    return jax.vmap(one)(at.outputs, at.targets)


def prox_prop(
    alpha: Any = 1.0, gamma: Any = 1.0, solver: AbstractInner = InnerGaussNewton()
) -> MoreauBackprop:
    r"""Proximal back-propagation: the chain rule for states, inverses for parameters.

    The gradients of the loss are propagated as usual, and every layer with parameters
    takes an implicit step: for $Z = X W$ and the message $\Lambda$

    $$g = (X^\top X + \gamma I)^{-1} X^\top \Lambda,$$

    a ridge regression over the batch, factorized exactly for dense layers.

    **Arguments:**

    - `alpha`: weight of the gradient of the loss in the message.
    - `gamma`: weight of the squared change of the parameters.
    - `solver`: for parameters of layers that are not dense.

    **Returns:** a [`diffprog.oracles.MoreauBackprop`][]. As gamma grows the step tends
    to $-\alpha / \gamma$ times the gradient; `scale="gradient"` takes both out.

    Source: Frerix, Moellenhoff, Moeller, Cremers, "Proximal Backpropagation", 2017,
    arXiv 1706.04638: gamma is the inverse of its step size of the layers.
    """
    rules = dict(state=ChainRule(), weights=InverseRule(gamma, solver))
    return MoreauBackprop(alpha, seed=ChainRule(), split=True, **rules)
