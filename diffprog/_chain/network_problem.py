from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._common.reduction import AbstractCounted, check_reduction, Reduction, weight
from .._common.tree import cast
from .._common.types import came, check_callable, check_kind, noted, with_other_names
from .metric import curvature, of_outputs, of_stage, per_example, StageMetric, tangent
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


_NOT_IN_NETWORK = dict(
    control_bounds="the controls are parameters, of which a backward pass keeps no "
    "limits; cut them off after each step, with `optax.projections.projection_box`",
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

    A `metric` D takes the place of the Hessian of the loss at the outputs z of the
    current parameters: the loss is modelled by

    $$\ell(z) + \langle \nabla \ell(z), z' - z \rangle
    + \tfrac12 (z' - z)^\top \nabla^2_{z'} D(z, z) (z' - z),$$

    so that [`diffprog.GaussNewton`][] takes the step of the natural gradient for the
    Kullback-Leibler divergence, and that of the Euclidean metric for the squared
    distance. The cost of a roll-out stays the loss, and a solve minimizes it; only
    second derivatives of the cost are those of D.
    """

    network: Network
    loss: Callable
    targets: PyTree
    reduction: Reduction = eqx.field(static=True)
    metric: Callable | StageMetric | None

    terminal_constraints: ClassVar[tuple] = ()
    manifold: ClassVar[None] = None

    @with_other_names(_NOT_IN_NETWORK)
    def __init__(
        self,
        network: Network,
        loss: Callable,
        targets: PyTree,
        *,
        reduction: Reduction = "mean",
        metric: Callable | StageMetric | None = None,
    ):
        self.network, self.loss, self.targets = network, loss, targets
        self.reduction, self.metric = reduction, metric

    def __check_init__(self):
        check_kind("network", self.network, Network, "dp.Network(layers)")
        expected = "a function `loss(outputs, targets)` with one number per example"
        check_callable("loss", self.loss, expected)
        check_reduction(self.reduction)
        if isinstance(self.metric, StageMetric):
            stages = _num_stages(self.network)
            if self.metric.stage >= stages:
                raise ValueError(
                    f"`metric` is one of stage {self.metric.stage}; the network has "
                    f"the stages 0 to {stages - 1}."
                )
        elif self.metric is not None:
            expected = (
                "a function `metric(reference, outputs)` with one number per example, "
                "a loss, or a `dp.StageMetric(stage, divergence)`"
            )
            check_callable("metric", self.metric, expected)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The layers, as many together as are alike."""
        phases, start = [], 0
        for k, stack in enumerate(self.network.stacks):
            dynamics, cost = _dynamics(stack, start), self._cost(k, start)
            phases.append(Phase(dynamics, cost, stack.size))
            start += stack.size
        return tuple(phases)

    def terminal_cost(self, x) -> Any:
        """The loss of all outputs, with the curvature of the metric."""
        loss = lambda x: self._reduced(self.loss(x, self.targets), x)
        metric = self.metric
        if metric is None:
            return loss(x)
        if not isinstance(metric, StageMetric):
            divergence = of_outputs(metric, self.targets)
        elif metric.stage == _num_stages(self.network) - 1:
            divergence = of_stage(metric)
        else:
            return tangent(loss, x)
        return tangent(loss, x) + self._curved(divergence, x, x)

    def _cost(self, k: int, start: int) -> Callable:
        """Of the stages in stack k: the metric, if it is that of an input of theirs."""
        metric, stack = self.metric, self.network.stacks[k]
        if not isinstance(metric, StageMetric):
            return _no_cost
        stage = metric.stage + 1
        if not start <= stage < start + stack.size:
            return _no_cost

        def cost(x, u, t):
            curved = self._curved(of_stage(metric), x, _outputs(self.network, k, x))
            return jnp.where(t == stage, curved, 0)

        return cost

    def _curved(self, divergence: Callable, x: PyTree, outputs: Any) -> Array:
        """0, with the second derivatives of the divergence from x."""
        reference, outputs = lax.stop_gradient((x, outputs))

        def total(x):
            return self._reduced(per_example(divergence, reference, x), outputs)

        return curvature(total, x)

    def _reduced(self, losses: Array, outputs: Any) -> Array:
        """Numbers of the examples as one."""
        if isinstance(self.loss, AbstractCounted):
            return jnp.sum(losses) * weight(
                self.loss, outputs, self.targets, self.reduction
            )
        return jnp.mean(losses) if self.reduction == "mean" else jnp.sum(losses)

    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        params = self.network.params
        if jtu.tree_structure(us) != jtu.tree_structure(params):
            raise ValueError(
                f"`us` is {came(us)}, not arranged like the parameters of "
                "the network: give `net.params`."
            )
        return self._stacked(us)

    def _stacked(self, parts: Any) -> tuple[PyTree, ...]:
        """With a first axis also for stages that stand alone."""
        return tuple(
            u if stack.size > 1 else jtu.tree_map(lambda a: jnp.asarray(a)[None], u)
            for u, stack in zip(parts, self.network.stacks, strict=True)
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

    def split_states(self, xs: PyTree) -> tuple[PyTree, ...]:
        *parts, final = xs
        return (*self._stacked(parts), final)


NetworkProblem.__init__.__doc__ = """**Arguments:**

- `network`: a [`diffprog.Network`][]. Its parameters are not used: those in `us` are.
- `loss`: `loss(outputs, targets)`, one number per example, such as
    [`diffprog.losses.SoftmaxCrossEntropy`][].
- `targets`: its second argument.
- `reduction`: `"mean"` or `"sum"` over the examples.
- `metric`: `None`, the Hessian of the loss; or a function `D(reference, outputs)` with
    one number per example, such as a divergence, of which only the second derivatives
    in `outputs` at `reference` count; or a loss, which is given the `targets`; or a
    [`diffprog.StageMetric`][] on the outputs of some stage. It is weighed like the loss
    of all examples. With [`diffprog.Newton`][] the second derivatives of the layers,
    which belong to the gradient of the loss, are added.

**Raises:** `TypeError` and `ValueError` for anything else.
"""


def _no_cost(x, u, t):
    return 0.0


def _num_stages(net: Network) -> int:
    return sum(stack.size for stack in net.stacks)


def _outputs(net: Network, k: int, x: PyTree) -> PyTree:
    """Zeros like the outputs, where x is the state of a stage in stack k."""
    dtype = jtu.tree_leaves(x)[0].dtype
    for stack in net.stacks[k:]:  # equal stages keep the shape
        x = jax.eval_shape(jax.vmap(cast(stack.row(0), dtype)), x)
    return jtu.tree_map(lambda a: jnp.zeros(a.shape, a.dtype), x)


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
