from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._common.reduction import AbstractCounted, check_reduction, Reduction, weight
from .._common.types import came, noted
from .network import Network, Stack
from .problem import AbstractChain, Phase


# What to do about a result, in the words of networks.
ADVICE = dict(
    max_steps_reached="Raise `max_steps`, loosen `rtol` and `atol`, or continue from "
    "`solution.us` with `state=solution.state`.",
    no_descent="The derivatives may not belong to the loss (kinks, gradients cut "
    "inside): check them, use float64, or loosen the tolerances.",
    damping_limit="The model of the loss is not convex or not accurate enough here: "
    "start from other parameters, raise the `max_damping` of the search, or take "
    "`dp.GaussNewton()`.",
    nonfinite_rollout="Look for NaN in the inputs, the targets and the parameters, and "
    "for labels out of range; if values grow from layer to layer, start from smaller "
    "parameters.",
    nonfinite_derivative="Look for sqrt(0), norms at 0, or 0/0 under `jnp.where` in "
    "the layers and the loss.",
    factorization_failed="Give a positive `damping`, or take `dp.GaussNewton()`, whose "
    "model is convex where the loss is convex in the outputs.",
    cost_unbounded="The loss has no lower bound: look for a wrong sign.",
)


class NetworkProblem(AbstractChain):
    r"""The training of a network on one batch, as an optimal control problem.

    $$\min_{u} \frac1m \sum_{i=1}^m \ell(x_T^i, y_i), \quad
    x_{t+1}^i = f_t(x_t^i, u_t), \; x_0^i \text{ given}.$$

    The state is the whole batch, and the controls are the parameters of the layers:
    give the inputs as `x0` and `net.params` as `us`. Then

    ```python
    problem = dp.NetworkProblem(net, loss, targets)
    du, result = dp.direction(problem, dp.Newton(), inputs, net.params, damping=0.1)
    ```

    is the exact step of Newton, and [`diffprog.GaussNewton`][] the exact one of
    Gauss-Newton, found layer by layer. With m examples of n numbers a stage costs
    O((m n + parameters)^3): for small networks, and as a reference for others.
    """

    network: Network
    loss: Callable
    targets: PyTree
    reduction: Reduction = eqx.field(static=True)

    def __init__(
        self,
        network: Network,
        loss: Callable,
        targets: PyTree,
        *,
        reduction: Reduction = "mean",
    ):
        self.network, self.loss, self.targets = network, loss, targets
        self.reduction = reduction

    def __check_init__(self):
        if not isinstance(self.network, Network):
            raise TypeError(
                f"`network` is a {type(self.network).__name__}; a `dp.Network` is "
                "expected: `dp.Network(layers)`."
            )
        if isinstance(self.loss, type) or not callable(self.loss):
            raise TypeError(
                f"`loss` is {came(self.loss)}; a function `loss(outputs, targets)` "
                "with one number per example is expected."
            )
        check_reduction(self.reduction)

    @property
    def phases(self) -> tuple[Phase, ...]:
        phases, start = [], 0
        for stack in self.network.stacks:
            phases.append(Phase(_dynamics(stack, start), _no_cost, stack.size))
            start += stack.size
        return tuple(phases)

    def terminal_cost(self, x) -> Any:
        losses = self.loss(x, self.targets)
        if isinstance(self.loss, AbstractCounted):
            c = weight(self.loss, x, self.targets, self.reduction)
            return c * jnp.sum(losses)
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        params = self.network.params
        if jtu.tree_structure(us) != jtu.tree_structure(params):
            raise ValueError(
                f"`us` is {came(us)}, not arranged like the parameters of "
                "the network: give `net.params`."
            )
        return tuple(
            u if stack.size > 1 else jtu.tree_map(lambda a: jnp.asarray(a)[None], u)
            for u, stack in zip(us, self.network.stacks, strict=True)
        )

    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        # Policies have fields that are no arrays.
        first = lambda a: a[0] if eqx.is_array(a) else a
        return tuple(
            u if stack.size > 1 else jtu.tree_map(first, u)
            for u, stack in zip(us, self.network.stacks, strict=True)
        )

    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        return (*self.join_controls(xs), final)


NetworkProblem.__init__.__doc__ = """**Arguments:**

- `network`: a [`diffprog.Network`][]. Its parameters are not used: those in `us` are.
- `loss`: `loss(outputs, targets)`, one number per example, such as
    [`diffprog.losses.SoftmaxCrossEntropy`][].
- `targets`: its second argument.
- `reduction`: `"mean"` or `"sum"` over the examples.

**Raises:** `TypeError` and `ValueError` for anything else.
"""


def _no_cost(x, u, t):
    return 0.0


def _dynamics(stack: Stack, start: int) -> Callable:
    """x_{t+1} for the whole batch."""
    rest = eqx.filter(stack.stage, eqx.is_inexact_array, inverse=True)

    def dynamics(x, u, t):
        own = rest
        if stack.size > 1:  # integer arrays have a row per stage too
            row = lambda a: a[t - start] if eqx.is_array(a) else a
            own = jtu.tree_map(row, rest)
        layers = eqx.combine(u, own)
        note = lambda: f"Raised in stage {start} of the network: {layers!r:.200}"
        with noted(note):
            return jax.vmap(layers)(x)

    return dynamics
