"""Bounds of a network, pushed forward from layer to layer, and their companions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._chain.network import has_parameters, Network
from .._common.capture import Frozen
from .._common.door import door
from .._common.jacobian import products
from .._common.loops import scan
from .._common.tree import cast, norm, normal_like, scale, where, working_dtype
from .._common.types import check_count, check_key, is_number
from .._common.written import taken_back
from .layer_constants import (
    find,
    LayerConstants,
    Real,
    Rules,
    Shape,
    SmoothRelu,
    unwrapped,
)


inf = math.inf


class Smoothness(eqx.Module):
    r"""Bounds of a network $\psi(u)$, for an input and parameters that are bounded.

    - `magnitude`: of $\|\psi(u)\|$.
    - `lipschitz`: of $\|\nabla \psi(u)\|$.
    - `smoothness`: of the Lipschitz constant of $\nabla \psi$.
    - `layers`: the same for the first layer, the first two, and so on. These have no
        `layers` of their own.
    """

    magnitude: float
    lipschitz: float
    smoothness: float
    layers: tuple["Smoothness", ...] = ()

    def of_loss(
        self, lipschitz: Real, smoothness: Real, *, regularization: Real = 0.0
    ) -> float:
        r"""The Lipschitz constant of the gradient of the objective.

        $$L = \ell_h L_\psi + L_h \ell_\psi^2 + L_r.$$

        Gradient descent with steps of size 1/L does not increase the objective as long
        as the parameters stay in their balls, and finds a gradient of norm $\epsilon$
        in $O(L / \epsilon^2)$ steps.

        **Arguments:**

        - `lipschitz`, `smoothness`: $\ell_h$ and $L_h$ of the loss h of one example as
            a function of its outputs, wherever these are at most `magnitude` large:
            $\sqrt2$ and 1/2 for the cross entropy of a softmax, 1 and 1/4 for the
            logistic loss of one output, `magnitude` + $\|y\|$ and 1 for
            $\frac12 \|u - y\|^2$.
        - `regularization`: $L_r$ of what is added to the losses; the weight
            $\lambda$ for $\frac\lambda2 \|u\|^2$.

        **Returns:** L, for one example or for the mean over examples. For their sum
        multiply the part of the losses by their number.

        **Source:** "An Elementary Approach to Convergence Guarantees of Optimization
        Algorithms for Deep Networks", 2019, arXiv 2002.09051.
        """
        slope = _times(self.lipschitz, self.lipschitz)
        of_losses = _times(self.smoothness, lipschitz) + _times(slope, smoothness)
        return of_losses + float(regularization)


def smoothness(
    net: Network | eqx.nn.Sequential | Sequence[Callable],
    radius: Real | Sequence[Real] | None = None,
    *,
    input_norm: Real,
    input_shape: Shape | None = None,
    rules: Rules | None = None,
    joint: bool = False,
) -> Smoothness:
    r"""Bounds of a network and of its derivative in the parameters, layer by layer.

    With the parameters of layer t in the ball $\|u_t\| \le R_t$, the input fixed, and
    the bounds $m, \ell, L$ of the layers before (magnitude, Lipschitz constant of the
    outputs and of their derivative), a layer $\phi$ does

    $$
    \begin{aligned}
    \ell_x &= \min(\ell^x_\phi, \|\nabla_x \phi(0)\| + L^{xx} m + L^{xu} R), \quad
    \ell_u = \min(\ell^u_\phi, \|\nabla_u \phi(0)\| + L^{uu} R + L^{xu} m), \\
    m &\leftarrow \min(m_\phi, \|\phi(0)\| + \ell_x m +
    \min(\ell^u_\phi, \|\nabla_u \phi(0)\| + L^{uu} R) R), \\
    L &\leftarrow \ell_x L + L^{xx} \ell^2 + 2 L^{xu} \ell + L^{uu}, \qquad
    \ell \leftarrow \ell_u + \ell_x \ell.
    \end{aligned}
    $$

    No data, and nothing is run: plain arithmetic on Python floats. The bounds grow
    geometrically with the number of layers, so compare networks by them, and see
    [`diffprog.jacobian_norm`][] for what is really there.

    **Arguments:**

    - `net`: a [`diffprog.Network`][], or the layers that make one.
    - `radius`: $R_t$, one number or one for every layer that has parameters, which are
        weight and bias together. By default the norms of the parameters of `net`.
    - `input_norm`: the largest norm of an input.
    - `input_shape`: the shape of one input. Not needed if the first layer is linear.
    - `rules`: constants of other layers, or better ones: a mapping from the class of a
        layer, or from a function, to [`diffprog.LayerConstants`][] or to a function
        `rule(layer, shape, out_shape)` that returns them.
    - `joint`: by default the layers' shares are added up, as in the source: then the
        constants hold with respect to $\max_t \|u_t\|$ too. With `joint=True` they
        hold for the Euclidean norm of all parameters together and are smaller:
        $\ell \leftarrow (\ell_u^2 + \ell_x^2 \ell^2)^{1/2}$, and L becomes the largest
        eigenvalue of the matrix with the entries $L^{uu}$, $L^{xu} \ell$ and
        $\ell_x L + L^{xx} \ell^2$.

    Known are `Linear`, `Conv`, average and maximum pooling, `Identity`, `Lambda` and
    `Dropout` in inference mode of [Equinox](https://docs.kidger.site/equinox/); tanh,
    sigmoid, softplus, relu, silu, gelu and softmax of `jax.nn`; `jnp.ravel`; and
    [`diffprog.SmoothRelu`][]. `smoothness` is infinite after a rectifier or a maximum.

    **Returns:** [`diffprog.Smoothness`][].

    **Raises:** `TypeError` for a layer without constants, `ValueError` for a radius or
    a shape that does not fit.

    **Source:** "An Elementary Approach to Convergence Guarantees of Optimization
    Algorithms for Deep Networks", 2019, arXiv 2002.09051.
    """
    steps = _steps(net, radius, input_norm, input_shape, rules or {}, joint)
    last = steps[-1].after
    layers = tuple(step.after for step in steps)
    return Smoothness(last.magnitude, last.lipschitz, last.smoothness, layers)


def smooth_relus(
    net: Network | eqx.nn.Sequential | Sequence[Callable],
    accuracy: Real,
    radius: Real | Sequence[Real] | None = None,
    *,
    input_norm: Real,
    input_shape: Shape | None = None,
    rules: Rules | None = None,
) -> Network:
    r"""The network with smoothed rectifiers, whose outputs are at most `accuracy` away.

    That is so for all parameters in their balls and for all inputs. The n rectifiers
    share the accuracy: one with d entries and with layers after it that have the
    Lipschitz constants $\ell_s$ in their inputs becomes [`diffprog.SmoothRelu`][] with

    $$\mu_t = \frac{\text{accuracy}}{n \sqrt d \prod_{s > t} \ell_s}.$$

    For an accuracy of the objective, divide it by the Lipschitz constant of the loss. A
    maximum pooling is left as it is.

    **Arguments:** `accuracy` is a positive number; the others are those of
    [`diffprog.smoothness`][].

    **Returns:** a [`diffprog.Network`][] whose equal stages are not stacked.

    **Source:** "On the Smoothing of Deep Networks", 2021.
    """
    if not 0 < accuracy < inf:
        raise ValueError(f"`accuracy` is {accuracy}; a positive number is expected.")
    steps = _steps(net, radius, input_norm, input_shape, rules or {}, False)
    num_relus = sum(unwrapped(step.layer) is jax.nn.relu for step in steps)
    layers, after = [], 1.0
    for step in reversed(steps):
        layer = step.layer
        if unwrapped(layer) is jax.nn.relu:
            share = num_relus * math.sqrt(math.prod(step.shape)) * after
            layer = SmoothRelu(accuracy / share if share else accuracy)
        layers.append(layer)
        after = _times(after, step.lipschitz)
    return Network(layers[::-1], stack=False)


def jacobian_norm(
    fn: Callable, params: PyTree, *, key: PRNGKeyArray, num_steps: int = 32
) -> Float[Array, ""]:
    r"""The largest singular value of the Jacobian of `fn`, by power iteration.

    $$v \leftarrow J^\top J v / \|J^\top J v\|, \qquad \|J v\| \to \|J\|.$$

    What comes is never larger than $\|J\|$. A step costs one product with the Jacobian
    and one with its transpose.

    **Arguments:**

    - `fn`: a function of `params`, such as `lambda net: jax.vmap(net)(inputs)`, or the
        gradient of an objective: then its Jacobian is the Hessian.
    - `params`: where; any pytree, derivatives are taken in its floating arrays.
    - `key`: for the first v.
    - `num_steps`: number of steps.

    **Returns:** the norm, for these parameters; [`diffprog.smoothness`][] bounds it for
    all parameters in a ball.

    **Raises:** `TypeError` where there is nothing to differentiate: no floating array
    in `params`, or in what `fn` returns.
    """
    check_count("num_steps", num_steps)
    check_key(key)
    _check_real("params", params, eqx.filter(params, eqx.is_inexact_array))
    arrays, rest = eqx.partition(params, eqx.is_array)
    return _jacobian_norm(fn, arrays, Frozen(rest), key, num_steps)


@door
def _jacobian_norm(fn: Callable, arrays, frozen: Frozen, key, num_steps) -> Array:
    params = eqx.combine(arrays, frozen.tree())
    arrays, rest = eqx.partition(params, eqx.is_inexact_array)

    def run(arrays):
        outputs = fn(eqx.combine(arrays, rest))
        _check_real("fn(params)", outputs, outputs)
        return outputs, None

    _, push, pull, _ = products(run, arrays)
    arrays = cast(arrays, working_dtype(arrays))
    first = normal_like(key, arrays)

    def step(v, _):
        image = push(v)
        back = pull(image)
        size = norm(back)
        v = where(size > 0, scale(1 / jnp.where(size > 0, size, 1), back), v)
        return v, norm(image)

    _, norms = scan(step, scale(1 / norm(first), first), length=num_steps)
    return norms[-1]


def _check_real(name: str, tree: PyTree, found: PyTree):
    """Raises where no real numbers, or also complex ones, were found in a tree."""
    leaves = jtu.tree_leaves(found)
    real = [eqx.is_array(a) and jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]
    if not all(real) or not sum(a.size for a in leaves):
        arrays = [jnp.asarray(a) for a in jtu.tree_leaves(tree) if is_number(a)]
        given = [f"{a.dtype}{list(a.shape)}" for a in arrays]
        raise TypeError(
            f"`{name}` has the arrays {given}; derivatives are taken of floating "
            "arrays with at least one number: convert it with `.astype(float)`."
        )


class _Step(NamedTuple):
    layer: Any
    shape: Shape  # of its output
    lipschitz: float  # in its input
    after: Smoothness


def _steps(net, radius, input_norm, input_shape, rules, joint) -> list[_Step]:
    if not isinstance(net, Network):
        net = Network(net, stack=False)
    layers = net.layers
    radii = iter(_radii(layers, radius))
    after = Smoothness(_nonnegative("input_norm", input_norm), 0.0, 0.0)
    shape = _first_shape(layers[0], input_shape)
    dtype = jtu.tree_leaves(net.params)[0].dtype
    steps = []
    for i, layer in enumerate(layers):
        constants = find(i, layer, rules)
        try:
            with taken_back(layer):
                given = jax.ShapeDtypeStruct(shape, dtype)
                out_shape = jax.eval_shape(layer, given).shape
        except Exception as error:
            raise ValueError(
                f"Layer {i}, {layer!r:.100}, does not take an input of shape {shape}: "
                "the layers do not fit, or `input_shape` is not the shape of one input."
            ) from error
        if callable(constants):
            constants = constants(unwrapped(layer), shape, out_shape)
        if not isinstance(constants, LayerConstants):
            raise TypeError(
                f"The rule of layer {i}, {layer!r:.100}, gives {constants!r:.100}; "
                "`dp.LayerConstants` are expected."
            )
        ball = next(radii) if has_parameters(layer) else 0.0
        lipschitz, after = _push(after, constants, ball, joint)
        shape = out_shape
        steps.append(_Step(layer, shape, lipschitz, after))
    return steps


def _push(before: Smoothness, layer: LayerConstants, R: float, joint: bool):
    """The Lipschitz constant of the layer in its input, and the bounds after it."""
    m, ell, L = before.magnitude, before.lipschitz, before.smoothness
    (max_x, max_u), (slope_x, slope_u) = layer.lipschitz, layer.slope
    xx, xu, uu = layer.smoothness
    ell_x = min(max_x, slope_x + _times(xx, m) + _times(xu, R))
    ell_u = min(max_u, slope_u + _times(uu, R) + _times(xu, m))
    ell_u_at_zero = min(max_u, slope_u + _times(uu, R))  # where x = 0
    magnitude = layer.value + _times(ell_x, m) + _times(ell_u_at_zero, R)
    mixed, of_past = _times(xu, ell), _times(ell_x, ell)
    past = _times(ell_x, L) + _times(xx, _times(ell, ell))
    if joint:
        lipschitz, smoothness = math.hypot(ell_u, of_past), _largest(uu, mixed, past)
    else:
        lipschitz, smoothness = ell_u + of_past, past + 2 * mixed + uu
    return ell_x, Smoothness(min(layer.magnitude, magnitude), lipschitz, smoothness)


def _times(a: Real, b: Real) -> float:
    """The product where nothing outweighs zero: 0 times infinity is 0."""
    return 0.0 if a == 0 or b == 0 else float(a) * float(b)


def _largest(a: float, b: float, c: float) -> float:
    """The largest eigenvalue of the matrix with rows (a, b) and (b, c)."""
    if inf in (a, b, c):
        return inf
    return a / 2 + c / 2 + math.hypot(a / 2 - c / 2, b)


def _norm(tree: PyTree) -> float:
    leaves = [np.asarray(leaf, float) for leaf in jtu.tree_leaves(tree)]
    return math.hypot(*(float(np.linalg.norm(leaf)) for leaf in leaves))


def _nonnegative(name: str, number: Any) -> float:
    if not float(number) >= 0:
        raise ValueError(f"`{name}` is {number}; a number from 0 on is expected.")
    return float(number)


def _radii(layers: tuple, radius: Any) -> list[float]:
    trained = [eqx.filter(a, eqx.is_inexact_array) for a in layers if has_parameters(a)]
    radii = np.asarray([_norm(a) for a in trained] if radius is None else radius, float)
    if radii.shape not in ((), (len(trained),)):
        raise ValueError(
            f"`radius` has shape {radii.shape}; one number, or one for each of the "
            f"{len(trained)} layers with parameters, is expected."
        )
    radii = np.broadcast_to(radii, len(trained)).tolist()
    return [_nonnegative("radius", number) for number in radii]


def _first_shape(layer: Any, input_shape: Shape | None) -> Shape:
    if input_shape is not None:
        return tuple(input_shape)
    if isinstance(layer, eqx.nn.Linear):
        size = layer.in_features
        return () if isinstance(size, str) else (size,)
    raise ValueError(
        "The bounds depend on the size of the input, which the first layer does not "
        f"tell, {layer!r:.100}: give the shape of one input as `input_shape`."
    )
