"""Target propagation: the oracle, the model under its rule, and the rule."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._chain.network import Network, split_rows
from .._common.linalg import matmul
from .._common.loops import scan
from .._common.tree import cast, cast_like, vdot, widened, working_dtype
from .._common.types import (
    came,
    check_not_negative,
    check_number,
    check_positive,
    Number,
    number,
)
from ._base import AbstractForgetful, Linearization, Proposal
from ._inverses import (
    Activation,
    as_recurrent,
    cell_activation,
    compose,
    Dense,
    gauss_newton,
    RecurrentLayer,
    regularized_inverse,
    view,
)
from ._rules import AbstractRule, follow, inside, is_boundary, prepared, run_marked


class TargetPropagation(AbstractForgetful):
    r"""Targets for every layer, found by regularized inverses of the layers above.

    A target $v_t = x_t + D_t$ is what the output of layer t should have been. From

    $$D_T = -\gamma_h \nabla_{x_T} h, \quad
    D_{t-1} = (W_t^\top W_t + r I)^{-1} W_t^\top \, \frac{D_t}{a'(z_t)}, \quad
    x_t = a(z_t), \; z_t = W_t x_{t-1} + b_t,$$

    the direction is the gradient of $\sum_t \frac12 \|f_t(x_{t-1}) - v_t\|^2$ in the
    parameters of each layer, with $x_{t-1}$ and $v_t$ held fixed. Where
    back-propagation multiplies by $W' \operatorname{diag}(a')$, targets are multiplied
    by its inverse: they do not vanish over many layers, but may explode.

    What is inverted, by the layer (with the functions that follow it in its stage):

    - [`equinox.nn.Linear`][], alone or before `jnp.tanh`, `jax.nn.sigmoid`,
      `jax.nn.softplus` or `jax.nn.relu` (its own pseudo-inverse): as above.
    - [`diffprog.Recurrent`][] over a [`diffprog.RNNCell`][]: as above for each step, in
      the hidden state, with one factorization for all steps and examples. A stage below
      is given the inverse in the input, with V in the place of W.
    - Any other layer or cell with the Jacobian A: $D_{t-1} = (A'A + r I)^{-1} A' D_t$,
      for each example; by conjugate gradients if its input and its output have more
      than 32 entries.

    The model is a [`diffprog.Network`][], or any other whose layers are marked with
    [`diffprog.rule_boundary`][]; layers that are not marked follow the chain rule.

    - `stepsize`: $\gamma_h > 0$.
    - `regularization`: r. At 0 the matrices must have full rank. With $a' \le 1$ a step
        back multiplies by at most $\max 1 / (2 a' \sqrt r)$.
    - `inverse`: `"linearized"`, as above, or `"difference"`: $D_{t-1}$ from
        $a^{-1}(x_t + D_t) - a^{-1}(x_t)$ in the place of $D_t / a'(z_t)$, for layers of
        the first two kinds.
    - `local`: with `False` only the targets are held fixed, not the states: the
        gradient is taken through all layers of a network, and through all steps of a
        recurrent layer, as in the code published with the source. With marked layers,
        through the steps of each alone.
    - `head`: how many of the last stages of a network are trained by the gradient, and
        pass it down by the chain rule. By default 1 if the network ends in a dense
        layer without activation, else 0.
    - `eps`: outputs of the activations are moved this far into their range.

    The parameters of the head, and of layers not marked, have the gradient of the
    loss for a direction; those of all other layers one with the factor $\gamma_h$. The
    losses of a batch are weighed as in the value: with the mean, $\gamma_h$ multiplies
    the gradient of the mean, and the sum over t goes over the examples too.
    `scale="gradient"` divides by $\gamma_h$ where it is a factor. `aux.decrease` is
    minus the slope, and the slope need not be negative: targets are no gradients.

    Costs as much as back-propagation, another forward pass, and O(n^3) for each matrix.

    Fails where the direction is not finite: at r = 0 and a singular matrix, say.
    `TypeError` for a model without stages or marks.

    Source: Roulet, Harchaoui, "Target Propagation via Regularized Inversion for
    Recurrent Neural Networks", 2021, arXiv 2112.01453.
    """

    stepsize: Number = number(0.01, check_positive)
    regularization: Number = number(1.0, check_not_negative)
    inverse: Literal["linearized", "difference"] = eqx.field(
        static=True, default="linearized"
    )
    local: bool = eqx.field(static=True, default=True)
    head: int | None = eqx.field(static=True, default=None)
    eps: Number = number(1e-3)

    damping: ClassVar[None] = None

    def __check_init__(self):
        below_half = lambda eps: (0 < eps) & (eps < 0.5)
        check_number("eps", self.eps, "a number in (0, 0.5)", below_half)
        if self.inverse not in ("linearized", "difference"):
            raise ValueError(
                f'`inverse` is {self.inverse!r}; "linearized" or "difference" is '
                "expected."
            )
        count = isinstance(self.head, int) and not isinstance(self.head, bool)
        if self.head is not None and not (count and self.head >= 0):
            raise ValueError(
                f"`head` is {came(self.head)}; the number of last stages that are "
                "trained by the gradient, an int >= 0, is expected."
            )

    def propose(self, at, damping, memory, key):
        numbers = (self.stepsize, self.regularization, self.eps)
        rule = _Targets(*numbers, self.inverse == "difference", self.local)
        run = _run_network if isinstance(inside(at).model, Network) else _run_marked
        outputs, factors = run(self, at, rule)
        _, pull = jax.vjp(lambda w: outputs(w).astype(at.outputs.dtype), at.params)
        (message,) = pull(at.weight * at.cotangent)
        step = jtu.tree_map(lambda f, g: (-f * g).astype(g.dtype), factors, message)
        slope = vdot(at.gradient, step)
        return Proposal(step, -slope, jtu.tree_map(lambda f: 1 / f, factors))


# The model with the rule ----------------------------------------------------------


def _run_marked(oracle: TargetPropagation, at: Linearization, rule: "_Targets"):
    """`params -> outputs`, and the factor of each parameter."""
    outputs = run_marked(at, rule)
    if oracle.head is not None:
        raise ValueError(
            f"`head` is {oracle.head}, which counts the stages of a `dp.Network`; here "
            "leave it out, and do not mark the layers that end the model."
        )

    def factor(node):
        value = oracle.stepsize if is_boundary(node) else 1.0
        return jtu.tree_map(lambda _: value, node)

    return outputs, jtu.tree_map(factor, at.params, is_leaf=is_boundary)


def _run_network(oracle: TargetPropagation, at: Linearization, rule: "_Targets"):
    layers, net = inside(at), inside(at).model
    heads = _head_rows(net, oracle.head)

    def outputs(params):
        whole = layers.with_params(params)
        model = _Ruled(*split_rows(whole, heads), rule, layers.mapped)
        return model(layers.inputs) if layers.mapped else layers.apply(model)

    def factor(stack, rows):
        here = jnp.arange(stack.size) < stack.size - rows
        here = jnp.where(here, oracle.stepsize, 1.0)
        shape = lambda a: (-1, *(1,) * (a.ndim - 1)) if stack.size > 1 else ()
        return jtu.tree_map(lambda a: here.reshape(shape(a)).astype(a.dtype), stack)

    stacks = tuple(map(factor, at.params.stacks, heads))
    return outputs, eqx.tree_at(lambda net: net.stacks, at.params, stacks)


def _head_rows(net: Network, head: int | None) -> list[int]:
    """How many stages of each run belong to the head."""
    if head is None:
        last = view(net.stacks[-1].row(-1))
        head = 1 if isinstance(last, Dense) and last.activation is None else 0
    stages = sum(stack.size for stack in net.stacks)
    if head > stages:
        raise ValueError(f"`head` is {head}, and the network has {stages} stages.")
    rows, left = [], head
    for stack in reversed(net.stacks):
        rows.insert(0, min(left, stack.size))
        left -= rows[0]
    return rows


class _Ruled(eqx.Module):
    """A network that follows the rule up to its head."""

    body: Network
    head: Network
    rule: "_Targets"
    batched: bool = eqx.field(static=True)

    def __call__(self, x: PyTree, *, key: Any = None) -> PyTree:
        rule, both = self.rule, not self.rule.local
        prepare = lambda stage, _: (None, prepared(rule, stage))
        memories = self.body.scan(prepare, None)[1]

        def body(stage, x, memory):
            if both:
                return follow(_Both(rule), _Twice(stage), memory, x, self.batched), None
            return follow(rule, stage, memory, x, self.batched), None

        head = lambda stage, x: ((jax.vmap(stage) if self.batched else stage)(x), None)
        x = self.body.scan(body, (x, x) if both else x, memories)[0]
        return self.head.scan(head, x[0] if both else x)[0]


# The rule -------------------------------------------------------------------------


class _Targets(AbstractRule):
    r"""Messages are $-D / \gamma_h$: of the size of gradients, not of their steps."""

    stepsize: Number
    regularization: Number
    eps: Number
    difference: bool = eqx.field(static=True)
    local: bool = eqx.field(static=True)

    def prepare(self, layer):
        inverse = lambda W: regularized_inverse(W, self.regularization)
        match view(layer):
            case Dense(linear=linear):
                return inverse(linear.weight)
            case RecurrentLayer(recurrent=recurrent) if cell_activation(recurrent.cell):
                cell: Any = recurrent.cell
                return inverse(cell.hidden_weight), inverse(cell.input_weight)
        return None

    def backward(self, layer, memory, x, message, batched):
        return self.through(layer, memory, x, message, None, batched)[:2]

    def through(self, layer, memory, x, message, adjoint, batched: bool):
        """The messages, and with an `adjoint` that comes back, the one to x.

        Without `local` an adjoint collects the messages along the chain rule.
        """
        kind = view(layer)
        if isinstance(kind, RecurrentLayer):
            return self._recurrent(layer, memory, x, message, adjoint, batched)
        params, rest = eqx.partition(layer, eqx.is_inexact_array)
        floats, others = eqx.partition(x, eqx.is_inexact_array)
        each = jax.vmap if batched else lambda f: f

        def run(params, floats):
            return each(eqx.combine(params, rest))(eqx.combine(floats, others))

        y, pull = _wide_vjp(run, message, params, floats)
        total = message if adjoint is None else jtu.tree_map(jnp.add, message, adjoint)
        to_params, to_x = pull(total)

        def back(x, y, message):
            if isinstance(kind, Dense):
                message = self._undo(kind.activation, y, message)
                return _pull(compose(kind.before), x, matmul(memory, message))
            return self._generic(layer, x, message)

        return to_params, each(back)(x, y, message), to_x

    def _recurrent(self, layer, memory, x, message, adjoint, batched):
        params, rest = eqx.partition(layer, eqx.is_inexact_array)
        floats, others = eqx.partition(x, eqx.is_inexact_array)
        each = jax.vmap if batched else lambda f: f

        def run(params, floats):
            """h_0, all later states, and the output."""
            parts = as_recurrent(eqx.combine(params, rest))

            def one(x):
                start, states = parts.recurrent.states(compose(parts.before)(x))
                return start, states, parts.output(states)

            return each(one)(eqx.combine(floats, others))

        back = lambda *args: self._steps(as_recurrent(layer), memory, *args)
        if not self.local:
            (_, states, y), pull = _wide_vjp(run, message, params, floats)
            to_start, to_states, to_x, _, _ = each(back)(x, states, message)
            if adjoint is None:
                adjoint = jtu.tree_map(jnp.zeros_like, y)
            to_params, adjoint = pull((to_start, to_states, adjoint))
            return to_params, to_x, adjoint
        _, states, _ = run(params, floats)
        to_start, to_states, to_x, xs, previous = each(back)(x, states, message)

        def steps(params):
            recurrent = as_recurrent(eqx.combine(params, rest)).recurrent
            cells = each(jax.vmap(recurrent.cell))
            return each(recurrent.start)(xs), cells(xs, previous)

        _, pull = _wide_vjp(steps, message, params)
        return pull((to_start, to_states))[0], to_x, None

    def _steps(self, parts: RecurrentLayer, memory, x, states, message):
        """For one example, the messages to h_0, to later states, and to x."""
        recurrent, xs = parts.recurrent, compose(parts.before)(x)
        start = recurrent.start(xs)
        states = cast_like(states, start)
        join = lambda a, b: jnp.concatenate([a[None], b[:-1]])
        previous = jtu.tree_map(join, start, states)
        # The message to the output, as one to every state.
        loss = _pull(parts.output, states, message)
        cell, activation = recurrent.cell, cell_activation(recurrent.cell)

        def step(message, row):
            x, h, h_next, own = row
            message = jtu.tree_map(jnp.add, message, own)
            if activation:
                back = matmul(memory[0], self._undo(activation, h_next, message))
            else:
                back = self._generic(lambda h: cell(x, h), h, message)
            return back, message

        rows = (xs, previous, states, loss)
        zeros = jtu.tree_map(lambda a: jnp.zeros_like(a[0]), loss)
        to_start, to_states = scan(step, zeros, rows, reverse=True)

        def to_input(x, h, h_next, message):
            if activation:
                return matmul(memory[1], self._undo(activation, h_next, message))
            return self._generic(lambda x: cell(x, h), x, message)

        to_xs = jax.vmap(to_input)(xs, previous, states, to_states)
        to_x = _pull(compose(parts.before), x, to_xs)
        return to_start, to_states, to_x, xs, previous

    def _undo(self, activation: Activation | None, y, message):
        """What changes the argument of the activation so that its value follows."""
        if activation is None:
            return message
        y = y.astype(message.dtype)
        if not self.difference:
            return activation.linearized(y, message, self.eps)
        change = activation.difference(y, -self.stepsize * message, self.eps)
        return change / -self.stepsize

    def _generic(self, fn: Callable, x: PyTree, message: PyTree) -> PyTree:
        return gauss_newton(fn, x, message, self.regularization)


class _Twice(eqx.Module):
    """A layer whose output has two messages, with both of its inputs the same."""

    layer: Callable

    def __call__(self, xs):
        y = self.layer(xs[0])
        return y, y


class _Both(AbstractRule):
    """Carries the adjoint of the chain rule next to the targets."""

    rule: _Targets

    def prepare(self, layer: Any):
        return self.rule.prepare(layer.layer)

    def backward(self, layer: Any, memory, x: Any, message: Any, batched):
        targets, adjoint = message
        to_params, to_x, adjoint = self.rule.through(
            layer.layer, memory, x[0], targets, adjoint, batched
        )
        return _Twice(to_params), (to_x, adjoint)


def _pull(fn: Callable, x: PyTree, message: PyTree) -> PyTree:
    """The message along the chain rule; `None` for what is not floating."""
    floats, others = eqx.partition(x, eqx.is_inexact_array)
    run = lambda floats: fn(eqx.combine(floats, others))
    if not jtu.tree_leaves(floats):
        return floats
    return _wide_vjp(run, message, floats)[1](message)[0]


def _wide_vjp(fn: Callable, message: PyTree, *args: PyTree):
    """`jax.vjp`, with values and derivatives in the dtype of the message."""
    dtype = working_dtype(message)
    return jax.vjp(widened(fn, dtype, *args), *cast(args, dtype))
