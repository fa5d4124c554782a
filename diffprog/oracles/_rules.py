"""Rules that a layer follows backward in place of the chain rule."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from .._chain.network import Network
from .._common.tree import cast, cast_like, working_dtype
from .._common.types import AbstractPart, check_callable
from ._base import Layers, Linearization


class AbstractRule(AbstractPart):
    """What a layer makes of the message that comes back to it.

    Forward a layer is itself. Backward, `jax.grad` hands on what the rule returns: it
    goes through loops, branches and any other graph of layers, where messages to a
    value that is used twice are added.
    """

    @abc.abstractmethod
    def prepare(self, layer: Callable) -> PyTree:
        """What the rule needs of the layer, once per update and outside of loops."""

    @abc.abstractmethod
    def backward(
        self, layer: Callable, memory: PyTree, x: PyTree, message: PyTree, batched: bool
    ) -> tuple[PyTree, PyTree]:
        """The messages to the parameters of the layer and to its input.

        `memory` is from `prepare`, x the input and `message` like the output: of one
        example, or of a batch with a leading axis where `batched`. For arrays of x that
        are not floating the message is `None`. Messages and memory are float32, or
        float64 where something is, whatever the layer and its input are.
        """


def follow(
    rule: AbstractRule, layer: Callable, memory: PyTree, x: PyTree, batched: bool
) -> PyTree:
    """`layer(x)`, or `jax.vmap(layer)(x)`, whose backward pass is the rule."""
    params, rest = eqx.partition(layer, eqx.is_inexact_array)
    constants, static = eqx.partition(rest, eqx.is_array)

    @jax.custom_vjp
    def run(params, constants, rule, memory, x):
        layer = eqx.combine(params, constants, static)
        return jax.vmap(layer)(x) if batched else layer(x)

    forward = lambda *args: (run(*args), args)

    def backward(args, message):
        params, constants, rule, memory, x = args
        layer = eqx.combine(params, constants, static)
        dtype = working_dtype(params, x, message)
        memory, message = cast((memory, message), dtype)
        to_params, to_x = rule.backward(layer, memory, x, message, batched)
        zero = lambda tree: jtu.tree_map(zero_tangent, tree)
        others = eqx.filter(x, eqx.is_inexact_array, inverse=True)
        to_x = eqx.combine(to_x, zero(others))
        to_params, to_x = cast_like((to_params, to_x), (params, x))
        return to_params, zero(constants), zero(rule), zero(args[3]), to_x

    run.defvjp(forward, backward)
    return run(params, constants, rule, memory, x)


def zero_tangent(leaf: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.zeros_like(leaf)
    return jnp.zeros(jnp.shape(leaf), jax.dtypes.float0)


class RuleBoundary(eqx.Module):
    """A layer at which a rule may take over from the chain rule."""

    layer: Callable
    rule: AbstractRule | None = None
    memory: PyTree = None

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree:
        if self.rule is None:
            options = {} if key is None else {"key": key}
            return self.layer(x, **options)
        return follow(self.rule, self.layer, self.memory, x, batched=False)


def prepared(rule: AbstractRule, layer: Callable) -> PyTree:
    """What the rule needs of the layer, in the working dtype, without derivatives."""
    arrays, rest = eqx.partition(layer, eqx.is_array)
    arrays = cast(jax.lax.stop_gradient(arrays), working_dtype(arrays))
    return rule.prepare(eqx.combine(arrays, rest))


def rule_boundary(layer: Callable) -> RuleBoundary:
    """Marks a layer of any model for the rules of `TargetPropagation` and others.

    The layer keeps its meaning; under such an oracle its backward pass follows the rule
    for one example at a time, wherever it stands in the model.
    """
    check_callable("layer", layer, "a module or a function of one array")
    return RuleBoundary(layer)


def is_boundary(node: Any) -> bool:
    return isinstance(node, RuleBoundary)


def with_rule(model: PyTree, rule: AbstractRule) -> PyTree:
    """The model with the rule at all its boundaries."""

    def mark(node):
        if not is_boundary(node):
            return node
        memory = prepared(rule, node.layer)
        return RuleBoundary(node.layer, rule, memory)

    return jtu.tree_map(mark, model, is_leaf=is_boundary)


def inside(at: Linearization) -> Layers:
    """The model itself, for oracles that cannot do without it."""
    if at.layers is None:
        raise TypeError("The oracle asks for layers, and there are products alone.")
    return at.layers


def run_marked(at: Linearization, rule: AbstractRule) -> Callable:
    """The outputs as a function of the parameters, with the rule at all boundaries."""
    layers = inside(at)
    if not any(map(is_boundary, jtu.tree_leaves(layers.model, is_leaf=is_boundary))):
        raise TypeError(
            f"The model is a {type(layers.model).__name__} without layers that a rule "
            "could follow: make it a `dp.Network(layers)`, or mark its layers with "
            "`dp.rule_boundary(layer)`."
        )
    return lambda params: layers.apply(with_rule(layers.with_params(params), rule))


def run_network(net: Network, rule: AbstractRule, inputs: PyTree) -> PyTree:
    """The outputs for a batch; backward each stage follows the rule batch-wise."""
    prepare = lambda stage, carry: (carry, prepared(rule, stage))
    _, memories = net.scan(prepare, None)
    step = lambda stage, x, memory: (follow(rule, stage, memory, x, True), None)
    return net.scan(step, inputs, memories)[0]
