"""What is known of layers: how large they are, how steep, how curved."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray


inf = math.inf
Shape = tuple[int, ...]
Real = Any  # a number of Python, NumPy or JAX that is known


def _floats(numbers) -> Any:
    return tuple(float(number) for number in numbers)


class LayerConstants(eqx.Module):
    r"""What is known of a layer $\phi(x, u)$ with input x and parameters u.

    All norms are Euclidean, of arrays as of vectors, and of derivatives as of linear
    maps. A number that is not known is infinite, the default where there is one.

    - `lipschitz`: how fast $\phi$ changes in x, and in u, anywhere.
    - `smoothness`: how fast $\nabla_x \phi$ changes in x; how fast $\nabla_x \phi$
        changes in u, which is how fast $\nabla_u \phi$ changes in x; how fast
        $\nabla_u \phi$ changes in u.
    - `slope`: $\|\nabla_x \phi(0, 0)\|$ and $\|\nabla_u \phi(0, 0)\|$.
    - `value`: $\|\phi(0, 0)\|$.
    - `magnitude`: the largest $\|\phi(x, u)\|$.

    `LayerConstants.function` and `LayerConstants.biaffine` make those of the two common
    kinds of layers.
    """

    lipschitz: tuple[float, float] = eqx.field(converter=_floats)
    smoothness: tuple[float, float, float] = eqx.field(converter=_floats)
    slope: tuple[float, float] = eqx.field(converter=_floats, default=(inf, inf))
    value: float = eqx.field(converter=float, default=inf)
    magnitude: float = eqx.field(converter=float, default=inf)

    def __check_init__(self):
        sizes = [len(n) for n in (self.lipschitz, self.smoothness, self.slope)]
        numbers = [*self.lipschitz, *self.smoothness, *self.slope]
        numbers += [self.value, self.magnitude]
        if sizes != [2, 3, 2] or not all(number >= 0 for number in numbers):
            raise ValueError(
                f"{self}: numbers from 0 to infinity are expected, two for "
                "`lipschitz`, three for `smoothness` and two for `slope`."
            )

    @staticmethod
    def function(
        lipschitz: Real,
        smoothness: Real,
        *,
        slope: Real = inf,
        value: Real = inf,
        magnitude: Real = inf,
    ) -> "LayerConstants":
        """A layer without parameters: each number is about its input."""
        return LayerConstants(
            (lipschitz, 0), (smoothness, 0, 0), (slope, 0), value, magnitude
        )

    @staticmethod
    def biaffine(
        bilinear: Real, *, x: Real = 0.0, u: Real = 0.0, value: Real = 0.0
    ) -> "LayerConstants":
        r"""A layer $\beta(x, u) + \beta_x x + \beta_u u + \beta_0$, $\beta$ bilinear.

        **Arguments:**

        - `bilinear`: the smallest c with $\|\beta(x, u)\| \le c \|x\| \|u\|$.
        - `x`, `u`: $\|\beta_x\|$ and $\|\beta_u\|$.
        - `value`: $\|\beta_0\|$.
        """
        return LayerConstants((inf, inf), (0, bilinear, 0), (x, u), value)


Rule = LayerConstants | Callable[[Any, Shape, Shape], LayerConstants]
Rules = Mapping[Any, Rule]


class SmoothRelu(eqx.Module):
    r"""The rectifier, smoothed.

    $$a_\mu(x) = \max_{0 \le z \le 1} z x - \mu z^2 =
    \begin{cases} 0 & x \le 0 \\ x^2 / (4 \mu) & 0 \le x \le 2 \mu \\
    x - \mu & 2 \mu \le x \end{cases}$$

    It lies below max(0, x) by $\mu$ at most, has slopes from 0 to 1, and its slope has
    the Lipschitz constant $1 / (2 \mu)$.

    - `mu`: a positive number.

    **Source:** "On the Smoothing of Deep Networks", 2021.
    """

    mu: float = eqx.field(static=True, converter=float)

    def __check_init__(self):
        if not 0 < self.mu < inf:
            raise ValueError(f"`mu` is {self.mu}; a positive number is expected.")

    def __call__(self, x: Float[Array, "..."], *, key: PRNGKeyArray | None = None):
        """The function of every entry. `key` is not used."""
        z = jnp.clip(x / (2 * self.mu), 0, 1)
        return z * (x - self.mu * z)


def unwrapped(layer: Any) -> Any:
    """What an `eqx.nn.Lambda` calls, or else the layer."""
    return unwrapped(layer.fn) if isinstance(layer, eqx.nn.Lambda) else layer


def find(i: int, layer: Any, rules: Rules) -> Rule:
    """The rule of layer number i: the user's, or else what is known."""
    layer = unwrapped(layer)
    for table in (rules, KNOWN):
        for key, rule in table.items():
            if layer is key or type(layer) is key:
                return rule
    if isinstance(layer, eqx.nn.Dropout):
        if layer.inference:
            return ISOMETRY
        raise TypeError(
            f"Layer {i} is a dropout in training mode, which has no bounds: take "
            "`eqx.nn.inference_mode(net)`."
        )
    raise TypeError(
        f"Nothing is known of layer {i}, {layer!r:.100}. Give its constants: "
        "`rules={key: constants}`, where the key is the function or the class of the "
        "layer, and the constants are `dp.LayerConstants.function(lipschitz, "
        "smoothness)` for a layer without parameters, else `dp.LayerConstants(...)`."
    )


def _elementwise(
    lipschitz: Real, smoothness: Real, slope: Real, value: Real, bound: Real = inf
) -> Rule:
    """Of a scalar function: its constants, slope and size at 0, and largest size."""

    def rule(layer, shape, out_shape):
        root = math.sqrt(math.prod(shape))
        sizes = dict(value=value * root, magnitude=bound * root)
        return LayerConstants.function(lipschitz, smoothness, slope=slope, **sizes)

    return rule


def _softmax(layer, shape, out_shape):
    # Variance and third central moment, under the probabilities, of a direction h of
    # norm 1, whose entries lie at most sqrt(2) apart: at most 2 / 4 and
    # 2 sqrt(2) / (6 sqrt(3)).
    rows, size = math.prod(shape[:-1]), shape[-1]
    return LayerConstants.function(
        1 / 2,
        math.sqrt(2) / (3 * math.sqrt(3)),
        slope=1 / size,
        value=math.sqrt(rows / size),
        magnitude=math.sqrt(rows),
    )


def _linear(layer, shape, out_shape):
    return LayerConstants.biaffine(1, u=_of_bias(layer, out_shape))


def _conv(layer, shape, out_shape):
    patches = _patches(layer, shape, out_shape, layer.dilation, layer.padding_mode)
    return LayerConstants.biaffine(math.sqrt(patches), u=_of_bias(layer, out_shape))


def _of_bias(layer, out_shape) -> float:
    if layer.bias is None:
        return 0.0
    return math.sqrt(math.prod(out_shape) / layer.bias.size)  # once at every position


def _average(layer, shape, out_shape):
    # |sum of a patch|^2 <= size |patch|^2, and an entry is in several patches.
    share = _patches(layer, shape, out_shape) / math.prod(layer.kernel_size)
    return _isometry(math.sqrt(share))


def _maximum(layer, shape, out_shape):
    patches = _patches(layer, shape, out_shape)
    return LayerConstants.function(math.sqrt(patches), inf, value=0)


def _adaptive_average(layer, shape, out_shape):
    patch = math.prod(n // k for n, k in zip(shape[1:], out_shape[1:]))
    return _isometry(1 / math.sqrt(patch))


def _isometry(factor: float = 1.0) -> LayerConstants:
    return LayerConstants.function(factor, 0, slope=factor, value=0)


def _patches(layer, shape, out_shape, dilation=None, mode="ZEROS") -> int:
    """The largest number of patches that share a coordinate of the input."""
    sizes, outs = shape[1:], out_shape[1:]
    dilation = (1,) * len(sizes) if dilation is None else dilation
    padding = layer.padding
    if isinstance(padding, str):
        spans = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, dilation)]
        padding = lax.padtype_to_pads(sizes, spans, layer.stride, padding)
    count = 1
    rows = zip(sizes, outs, layer.kernel_size, layer.stride, dilation, padding)
    for size, out, kernel, stride, spread, (before, _) in rows:
        taps = np.arange(out)[:, None] * stride + np.arange(kernel) * spread
        width = (before, max(0, int(taps.max()) + 1 - size - before))
        # 0 for what is none
        entries = np.pad(np.arange(1, size + 1), width, PAD[mode])
        count *= int(np.bincount(entries[taps].ravel())[1:].max(initial=0))
    return count


PAD: dict[str, Literal["constant", "reflect", "edge", "wrap"]] = {
    "ZEROS": "constant",
    "REFLECT": "reflect",
    "REPLICATE": "edge",
    "CIRCULAR": "wrap",
}

_nn = eqx.nn
ISOMETRY = _isometry()
_tanh = _elementwise(1, 4 / (3 * math.sqrt(3)), 1, 0, 1)
_sigmoid = _elementwise(1 / 4, 1 / (6 * math.sqrt(3)), 1 / 4, 1 / 2, 1)
KNOWN: Rules = {
    **dict.fromkeys((jnp.tanh, lax.tanh), _tanh),
    **dict.fromkeys((jax.nn.sigmoid, lax.logistic), _sigmoid),
    jax.nn.softplus: _elementwise(1, 1 / 4, 1 / 2, math.log(2)),
    jax.nn.relu: _elementwise(1, inf, inf, 0),
    jax.nn.silu: _elementwise(1.09983933, 1 / 2, 1 / 2, 0),
    jax.nn.gelu: _elementwise(1.12899307, math.sqrt(2 / math.pi), 1 / 2, 0),
    jax.nn.softmax: _softmax,
    SmoothRelu: lambda layer, *_: LayerConstants.function(
        1, 1 / (2 * layer.mu), slope=0, value=0
    ),
    **dict.fromkeys((jnp.ravel, jax.nn.identity, _nn.Identity), ISOMETRY),
    _nn.Linear: _linear,
    **dict.fromkeys((_nn.Conv, _nn.Conv1d, _nn.Conv2d, _nn.Conv3d), _conv),
    **dict.fromkeys((_nn.AvgPool1d, _nn.AvgPool2d, _nn.AvgPool3d), _average),
    **dict.fromkeys((_nn.MaxPool1d, _nn.MaxPool2d, _nn.MaxPool3d), _maximum),
    **dict.fromkeys(
        (_nn.AdaptiveAvgPool1d, _nn.AdaptiveAvgPool2d, _nn.AdaptiveAvgPool3d),
        _adaptive_average,
    ),
    **dict.fromkeys(
        (_nn.AdaptiveMaxPool1d, _nn.AdaptiveMaxPool2d, _nn.AdaptiveMaxPool3d),
        LayerConstants.function(1, inf, value=0),
    ),
}
