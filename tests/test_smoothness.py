"""Bounds of networks: their published numbers, and that nothing exceeds them."""

import functools as ft
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._training.layer_constants import find


nn = eqx.nn
inf = math.inf
TANH = 4 / (3 * math.sqrt(3))


def linear(n_in: int = 4, n_out: int = 4, seed: int = 0, bias: bool = True):
    return nn.Linear(n_in, n_out, bias, key=jr.key(seed))


def triples(bounds: dp.Smoothness):
    return [(b.magnitude, b.lipschitz, b.smoothness) for b in bounds.layers]


def constants(layer: Any, shape: tuple[int, ...]) -> dp.LayerConstants:
    rule = find(0, layer, {})
    out = jax.eval_shape(layer, jax.ShapeDtypeStruct(shape, float))
    return rule(layer, shape, out.shape) if callable(rule) else rule


def spectral(matrices) -> np.ndarray:
    return np.linalg.norm(np.asarray(matrices), 2, (-2, -1))


# The published numbers.

TANH_NET = [
    linear(seed=0),
    jnp.tanh,
    linear(seed=1),
    jnp.tanh,
    linear(seed=2),
    jnp.tanh,
]


def test_constants_of_three_layers_with_tanh():
    bounds = dp.smoothness(TANH_NET, 1.0, input_norm=1.0)
    expected = [(2, 2, 3.0792014357), (2, 5, 26.3242104087), (2, 8, 85.5914333795)]
    np.testing.assert_allclose(triples(bounds)[1::2], expected, rtol=0, atol=5e-11)
    final = (bounds.magnitude, bounds.lipschitz, bounds.smoothness)
    assert final == triples(bounds)[-1]


def test_constants_of_three_layers_without_activation():
    bounds = dp.smoothness([linear()] * 3, 1.0, input_norm=1.0)
    assert triples(bounds) == [(2, 2, 0), (3, 5, 4), (4, 9, 14)]


class Shift(eqx.Module):
    u: jax.Array

    def __call__(self, x, *, key=None):
        return jnp.cos(x + self.u)


def test_constants_of_a_chain_by_recursion():
    layer = dp.LayerConstants((1.5, 1.5), (0.7, 0.7, 0.7))
    layers = [Shift(jnp.zeros(3))] * 4
    bounds = dp.smoothness(
        layers, 1.0, input_norm=1.0, input_shape=(3,), rules={Shift: layer}
    )
    assert (bounds.lipschitz, bounds.magnitude) == (12.1875, inf)
    assert math.isclose(bounds.smoothness, 82.1078125, rel_tol=1e-14)


# Nothing exceeds them.


def sampled(net, shape, key, cases, num: int = 10):
    """For each radius and norm of the input: the largest |output|, |Jacobian| and
    |Hessian of an output|, for parameters and inputs in and on their balls."""
    parts = [eqx.filter(layer, eqx.is_inexact_array) for layer in net.layers]
    rest = [
        eqx.filter(layer, eqx.is_inexact_array, inverse=True) for layer in net.layers
    ]

    def draw(key, like, size):
        vector, unravel = ravel_pytree(like)
        if vector.size == 0:
            return like
        a, b = jr.split(key)
        v = jr.normal(a, vector.shape)
        return unravel(size * v / jnp.linalg.norm(v) * jr.uniform(b, minval=0.5) ** 0.1)

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, None, None))
    def derivatives(key, radius, input_norm):
        keys = jr.split(key, len(parts) + 1)
        params = [draw(k, p, radius) for k, p in zip(keys, parts)]
        x = draw(keys[-1], jnp.zeros(shape), input_norm)
        flat, unravel = ravel_pytree(params)

        def fn(flat):
            y = x
            for part, static in zip(unravel(flat), rest):
                y = eqx.combine(part, static)(y)
            return y.ravel()

        return fn(flat)[:, None], jax.jacobian(fn)(flat), jax.hessian(fn)(flat)

    for case in cases:
        arrays = derivatives(jr.split(key, num), *case)
        yield case, np.asarray([np.max(spectral(a)) for a in arrays])


NETS = {
    "tanh": (TANH_NET, (4,)),
    "convolution": (
        [
            nn.Conv1d(2, 3, 3, padding=1, key=jr.key(0)),
            dp.SmoothRelu(0.05),
            nn.AvgPool1d(2, 1),
            nn.Conv1d(3, 2, 3, 2, key=jr.key(1)),
            jax.nn.softplus,
            jnp.ravel,
            linear(4, 3),
            jax.nn.softmax,
        ],
        (2, 6),
    ),
    "others": (
        [
            nn.Lambda(jax.nn.sigmoid),
            linear(3, 3),
            jax.nn.silu,
            linear(3, 3, bias=False),
            jax.nn.gelu,
            Shift(jnp.zeros(3)),
        ],
        (3,),
    ),
}
SHIFT = dp.LayerConstants((1, 1), (1, 1, 1), (0, 0), math.sqrt(3), math.sqrt(3))


@pytest.mark.costly
@pytest.mark.parametrize("name", NETS)
def test_sampled_norms_are_below_the_constants(name, getkey):
    layers, shape = NETS[name]
    net = dp.Network(layers, stack=False)
    cases = [(1.0, 1.0), (3.0, 2.0)]
    for (radius, input_norm), found in sampled(net, shape, getkey(), cases):
        for joint in (False, True):
            bounds = dp.smoothness(
                net,
                radius,
                input_norm=input_norm,
                input_shape=shape,
                rules={Shift: SHIFT},
                joint=joint,
            )
            stated = triples(bounds)[-1]
            assert np.all(found <= stated), (found, stated)
            assert np.all(np.isfinite(stated)) and np.all(found > 0)


def test_a_linear_layer_attains_its_bounds():
    x = np.asarray([3.0, 4.0])
    layer = eqx.tree_at(lambda a: a.weight, linear(2, 1, bias=False), jnp.eye(2)[:1])
    bounds = dp.smoothness([layer], 2.0, input_norm=5.0)
    assert triples(bounds) == [(10, 5, 0)]
    # The derivative of x'w is x.
    assert bounds.lipschitz == np.linalg.norm(x)
    # Two layers: the joint bound of W2 W1 x is attained where x, W1 and W2 are aligned.
    bounds = dp.smoothness([linear(bias=False)] * 2, 1.0, input_norm=1.0, joint=True)
    # Then it is u1 u2, at u1 = u2 = 1.
    assert math.isclose(np.linalg.norm([1, 1]), bounds.lipschitz)
    assert math.isclose(np.linalg.norm([[0, 1], [1, 0]], 2), bounds.smoothness)


def test_an_affine_chain_has_the_bilinear_terms_only():
    # Radii r, without bias: L of a product of T matrices is the sum over ordered pairs
    # of layers of the product of the other radii.
    radii = [0.5, 2.0, 3.0, 0.7]
    layers = [linear(bias=False)] * 4
    bounds = dp.smoothness(layers, radii, input_norm=1.5)
    pairs = itertools.permutations(range(4), 2)
    total = sum(
        math.prod(r for i, r in enumerate(radii) if i not in pair) for pair in pairs
    )
    assert math.isclose(bounds.smoothness, 1.5 * total)
    assert math.isclose(bounds.magnitude, 1.5 * math.prod(radii))
    # With biases and pools too, only there where two layers with parameters follow.
    bounds = dp.smoothness(
        [nn.Conv1d(1, 2, 3, key=jr.key(0)), nn.AvgPool1d(2), jnp.ravel, linear(14, 3)],
        1.0,
        input_norm=1.0,
        input_shape=(1, 10),
    )
    assert [b.smoothness for b in bounds.layers[:3]] == [0, 0, 0]
    assert math.isclose(bounds.smoothness, 2 * bounds.layers[2].lipschitz)


@pytest.mark.parametrize("mu", [1e-3, 2.0])
def test_smoothed_rectifier_is_near_and_smooth(mu):
    smooth = dp.SmoothRelu(mu)
    x = np.linspace(-3 * mu, 5 * mu, 1601)
    both = jax.jit(jax.vmap(jax.value_and_grad(smooth)))
    y, slope = map(np.asarray, both(x))
    relu = np.maximum(x, 0)
    assert np.all(y <= relu + 1e-15) and np.all(relu <= y + mu * (1 + 1e-12))
    z = np.linspace(0, 1, 10_001)
    largest = np.max(z * x[::50, None] - mu * z**2, axis=1)
    np.testing.assert_allclose(y[::50], largest, atol=mu * 1e-8)
    assert np.all((0 <= slope) & (slope <= 1))
    curvature = np.max(np.diff(slope) / np.diff(x))
    assert math.isclose(curvature, 1 / (2 * mu), rel_tol=1e-8)
    assert constants(smooth, (3,)).smoothness[0] == 1 / (2 * mu)
    # No NaN where branches are not taken.
    corners = np.resize([-1e300, 0.0, 2 * mu, 1e300], x.shape)
    y, slope = both(corners)
    assert np.all(np.isfinite(y))
    np.testing.assert_allclose(slope, corners > 0, atol=1e-15)
    single = jax.eval_shape(smooth, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert single.dtype == jnp.float32


IDENTITIES = {
    "Identity": nn.Identity(),
    "function": jax.nn.identity,
    "Lambda": nn.Lambda(jax.nn.identity),
    "ravel": jnp.ravel,
    "dropout": nn.Dropout(0.5, inference=True),
}


@pytest.mark.parametrize("layer", IDENTITIES.values(), ids=IDENTITIES)
def test_identity_leaves_the_bounds(layer):
    net = [linear(), jnp.tanh, linear(), layer]
    bounds = dp.smoothness(net, 1.5, input_norm=2.0)
    assert triples(bounds)[3] == triples(bounds)[2]
    biaffine = dp.LayerConstants.biaffine(0, x=1)
    again = dp.smoothness(
        [*net[:3], jnp.abs], 1.5, input_norm=2.0, rules={jnp.abs: biaffine}
    )
    assert triples(again) == triples(bounds)


# The constants of the layers.

SCALAR = [jnp.tanh, jax.nn.sigmoid, jax.nn.softplus, jax.nn.silu, jax.nn.gelu]


@pytest.mark.parametrize("fn", SCALAR, ids=lambda fn: fn.__name__)
def test_elementwise_constants_are_tight(fn):
    x = np.linspace(-20, 20, 40_001)
    second = jax.grad(jax.grad(fn))
    value, slope, curvature = jax.jit(
        lambda x: (fn(x), *(jax.vmap(d)(x) for d in (jax.grad(fn), second)))
    )(x)
    zero = len(x) // 2
    known = constants(fn, (3, 3))
    assert 0.9999 <= np.max(np.abs(slope)) / known.lipschitz[0] <= 1 + 1e-12
    assert 0.9999 <= np.max(np.abs(curvature)) / known.smoothness[0] <= 1 + 1e-12
    assert math.isclose(slope[zero], known.slope[0])
    assert math.isclose(3 * value[zero], known.value, abs_tol=1e-15)
    largest = 3 * np.max(np.abs(value))
    assert largest <= known.magnitude * (1 + 1e-12)
    assert known.magnitude == inf or 0.9999 <= largest / known.magnitude


@pytest.mark.parametrize("shape", [(2,), (3, 4)])
def test_softmax_constants(shape):
    known = constants(jax.nn.softmax, shape)
    rows = (math.prod(shape[:-1]), shape[-1])
    jacobian = lambda x: jnp.reshape(jax.jacobian(jax.nn.softmax)(x), (x.size, x.size))
    change = jax.jit(jax.vmap(lambda x, h: jax.jvp(jacobian, (x,), (h,))))
    rng = np.random.default_rng(0)
    x, towards = rng.normal(size=(2, 100, *shape))
    x[0] = 0
    value, changed = change(x, towards)
    assert math.isclose(spectral(value)[0], known.slope[0])
    assert math.isclose(math.sqrt(rows[0] / rows[1]), known.value)
    assert known.magnitude == math.sqrt(rows[0])
    # Attained by two equal classes, up to rounding, as they are in the first.
    assert np.max(spectral(value)[1:]) < known.lipschitz[0] == 1 / 2
    norms = np.linalg.norm(towards.reshape(100, -1), axis=1)
    assert np.max(spectral(changed) / norms) <= known.smoothness[0]
    # Attained by two classes: with h = (1, -1) / sqrt(2) at the worst probabilities.
    if shape == (2,):
        p = 1 / 2 - math.sqrt(3) / 6
        x[0], towards[0] = [math.log(p / (1 - p)), 0], [0.5**0.5, -(0.5**0.5)]
        assert math.isclose(spectral(change(x, towards)[1])[0], known.smoothness[0])


CONVOLUTIONS: dict[str, tuple[int, tuple[int, ...], dict]] = {
    "stride": (1, (11,), dict(kernel_size=5, stride=2)),
    "gaps": (1, (9,), dict(kernel_size=2, stride=4)),
    "dilation": (1, (12,), dict(kernel_size=3, dilation=2, stride=2)),
    "small": (1, (4,), dict(kernel_size=3)),
    "padded": (1, (5,), dict(kernel_size=4, padding=3)),
    "uneven": (1, (5,), dict(kernel_size=4, padding=((0, 3),), stride=2)),
    "same lower": (2, (5, 5), dict(kernel_size=2, padding="SAME_LOWER")),
    "valid": (2, (6, 7), dict(kernel_size=(3, 2), stride=(2, 1), padding="VALID")),
    "circular": (2, (4, 5), dict(kernel_size=3, padding=1, padding_mode="circular")),
    "reflect": (1, (6,), dict(kernel_size=4, padding=2, padding_mode="reflect")),
    "same replicate": (
        1,
        (6,),
        dict(kernel_size=5, padding="SAME", padding_mode="replicate", stride=2),
    ),
    "volume": (3, (3, 4, 3), dict(kernel_size=2, stride=(1, 2, 1))),
    "groups": (1, (6,), dict(kernel_size=3, groups=2, use_bias=False)),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_the_patches_that_share_an_entry(name, getkey):
    num_dims, size, options = CONVOLUTIONS[name]
    layer = nn.Conv(num_dims, 2, 2, **options, key=getkey())
    shape = (2, *size)
    known = constants(layer, shape)
    flat, unravel = ravel_pytree(layer)

    @jax.jit
    @ft.partial(jax.jacobian, argnums=(0, 1))
    def jacobians(x, flat):
        return unravel(flat)(x.reshape(shape)).ravel()

    # The dense Jacobians at a unit input and at unit parameters.
    rng = np.random.default_rng(0)
    unit = lambda size: (v := rng.normal(size=size)) / np.linalg.norm(v)
    x = unit(math.prod(shape))
    in_x, in_u = map(np.asarray, jacobians(x, unit(flat.size)))
    assert spectral(in_x) <= known.smoothness[1]
    assert spectral(in_u) <= known.smoothness[1] + known.slope[1]
    # How often an entry counts in the sums of all patches, which weights of 1 compute.
    ones = eqx.tree_at(
        lambda a: a.weight, layer, jnp.zeros_like(layer.weight).at[0].set(1.0)
    )
    counts, _ = jacobians(x, ravel_pytree(ones)[0])
    assert known.smoothness == (0, math.sqrt(np.max(np.sum(counts, 0))), 0)
    positions = len(in_x) // 2
    assert math.isclose(known.slope[1], options.get("use_bias", True) * positions**0.5)


def test_a_convolution_attains_its_bound():
    layer = nn.Conv1d(
        1,
        1,
        4,
        padding=((0, 3),),
        padding_mode="circular",
        use_bias=False,
        key=jr.key(0),
    )
    layer = eqx.tree_at(lambda a: a.weight, layer, jnp.full((1, 1, 4), 1 / 2))
    out = layer(jnp.full((1, 4), 1 / 2))
    assert math.isclose(np.linalg.norm(out[0]), constants(layer, (1, 4)).smoothness[1])


POOLS = {
    "apart": (nn.AvgPool1d, (6,), dict(kernel_size=2, stride=2)),
    "overlap": (nn.AvgPool1d, (9,), dict(kernel_size=3, stride=2)),
    "dense": (nn.AvgPool2d, (5, 5), dict(kernel_size=3, padding=1)),
    "ceil": (nn.AvgPool1d, (6,), dict(kernel_size=3, stride=2, use_ceil=True)),
    "volume": (nn.AvgPool3d, (4, 4, 4), dict(kernel_size=2, stride=(1, 2, 2))),
    "max apart": (nn.MaxPool1d, (6,), dict(kernel_size=2, stride=2)),
    "max overlap": (nn.MaxPool1d, (9,), dict(kernel_size=3, stride=2)),
    "max dense": (nn.MaxPool2d, (5, 5), dict(kernel_size=3, padding=1)),
    "max ceil": (nn.MaxPool1d, (6,), dict(kernel_size=3, stride=2, use_ceil=True)),
    "max volume": (nn.MaxPool3d, (4, 4, 4), dict(kernel_size=2, stride=(1, 2, 2))),
    "adaptive": (nn.AdaptiveAvgPool1d, (6,), dict(target_shape=2)),
    "adaptive uneven": (nn.AdaptiveAvgPool2d, (5, 7), dict(target_shape=2)),
    "adaptive max": (nn.AdaptiveMaxPool2d, (5, 6), dict(target_shape=2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools(name):
    kind, size, options = POOLS[name]
    layer = kind(**options)
    shape = (1, *size)
    known = constants(layer, shape)
    size = math.prod(size)
    jacobian = jax.jit(
        jax.vmap(jax.jacobian(lambda x: layer(x.reshape(shape)).ravel()))
    )
    # Entry i is the largest in row i, so some row has it in as many windows as can be.
    peaks = np.eye(size) + 0.1 * np.random.default_rng(0).random((size, size))
    largest = np.max(spectral(jacobian(peaks)))
    if "max" in name:
        assert known.smoothness[0] == inf
        assert math.isclose(largest, known.lipschitz[0], rel_tol=1e-12)
    else:
        assert known.smoothness[0] == 0 and known.slope[0] == known.lipschitz[0]
    assert largest <= known.lipschitz[0] * (1 + 1e-12)
    assert largest >= 0.7 * known.lipschitz[0]


# How the bounds behave.


def test_they_grow_with_the_radius_and_the_input():
    nets = [TANH_NET, [linear(), dp.SmoothRelu(0.1), linear(), jax.nn.softplus]]
    for net, joint in itertools.product(nets, (False, True)):
        rows = [
            triples(dp.smoothness(net, r, input_norm=n, joint=joint))
            for r, n in [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 2.0), (4.0, 2.0)]
        ]
        changes = np.diff(rows, axis=0)
        assert np.all(changes >= 0) and np.all(changes[:, -1, 1:] > 0)


def test_joint_bounds_are_not_larger():
    for net in (TANH_NET, [linear()] * 5):
        apart = dp.smoothness(net, 2.0, input_norm=1.0)
        joint = dp.smoothness(net, 2.0, input_norm=1.0, joint=True)
        assert np.all(np.asarray(triples(joint)) <= np.asarray(triples(apart)))
        assert joint.smoothness < apart.smoothness / 2
    # Against the definition, for one layer with all its constants.
    layer = dp.LayerConstants((3, 2), (0.5, 0.7, 1.1))
    bounds = dp.smoothness(
        [linear(bias=False), Shift(jnp.zeros(4))],
        1.5,
        input_norm=2.0,
        rules={Shift: layer},
        joint=True,
    )
    ell = bounds.layers[0].lipschitz
    matrix = [[1.1, 0.7 * ell], [0.7 * ell, 0.5 * ell**2]]
    assert math.isclose(bounds.smoothness, np.linalg.eigvalsh(matrix)[-1])
    assert math.isclose(bounds.lipschitz, math.hypot(2, 3 * ell))


def test_stacked_runs_are_as_written_out():
    layers = [linear(4, 3), jnp.tanh]
    layers += [a for i in range(6) for a in (linear(3, 3, i), jnp.tanh)]
    stacked, apart = dp.Network(layers), dp.Network(layers, stack=False)
    assert len(stacked.stacks) == 2 and len(apart.stacks) == 7
    sequential = nn.Sequential([a if a != jnp.tanh else nn.Lambda(a) for a in layers])
    for radius in (None, 0.7, [0.1 * i for i in range(7)]):
        bounds = [
            dp.smoothness(net, radius, input_norm=1.0)
            for net in (stacked, apart, sequential, layers)
        ]
        assert all(triples(b) == triples(bounds[0]) for b in bounds)
        assert len(bounds[0].layers) == 14


def test_the_norms_of_the_parameters_are_the_default():
    norms = [float(jnp.linalg.norm(ravel_pytree(a)[0])) for a in TANH_NET[::2]]
    own = dp.smoothness(TANH_NET, input_norm=1.0)
    given = dp.smoothness(TANH_NET, jnp.asarray(norms), input_norm=jnp.asarray(1.0))
    np.testing.assert_allclose(triples(own), triples(given), rtol=1e-14)


def test_infinity_is_passed_on_and_never_nan():
    net = [jax.nn.relu, linear(), jax.nn.relu, linear(), jnp.tanh]
    shape: dict[str, Any] = dict(input_shape=(4,))
    for joint in (False, True):
        bounds = dp.smoothness(net, 1.0, input_norm=1.0, joint=joint, **shape)
        first, second, *others = triples(bounds)
        # Before the first parameters there is nothing to differentiate.
        assert first == (1, 0, 0) and second == (2, 2, 0)
        assert all(L == inf and 0 < ell < inf and m <= 3 for m, ell, L in others)
        for radius, norm in itertools.product((0.0, 1.0, inf), (0.0, 1.0, inf)):
            bounds = dp.smoothness(net, radius, input_norm=norm, joint=joint, **shape)
            assert not np.any(np.isnan(triples(bounds)))
            assert bounds.magnitude <= 2
            objective = bounds.of_loss(0.0, 0.0)
            assert objective == 0
        deep = dp.smoothness([linear()] * 150, 1e3, input_norm=1.0, joint=joint)
        assert deep.smoothness == inf and deep.magnitude == inf
    pooled = [nn.Conv1d(1, 1, 2, key=jr.key(0)), nn.MaxPool1d(2, 2), jnp.ravel]
    bounds = dp.smoothness(pooled, 1.0, input_norm=1.0, input_shape=(1, 9))
    assert bounds.smoothness == inf and math.isfinite(bounds.lipschitz)


def test_the_bound_of_the_objective(getkey):
    layers = [linear(3, 3), jnp.tanh, linear(3, 3)]
    net = dp.Network(layers)
    loss, radius = dp.losses.SoftmaxCrossEntropy(), 1.5
    x = jr.normal(getkey(), (8, 3))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    labels = jnp.arange(8) % 3
    bounds = dp.smoothness(net, radius, input_norm=1.0)
    largest = bounds.of_loss(math.sqrt(2), 1 / 2, regularization=0.1)
    by_hand = math.sqrt(2) * bounds.smoothness + bounds.lipschitz**2 / 2 + 0.1
    assert math.isclose(largest, by_hand)

    flat, unravel = ravel_pytree(net.params)

    @jax.jit
    @jax.vmap
    def curvature(key):
        sizes = [ravel_pytree(p)[0].size for p in net.params]
        pieces = jnp.split(jr.normal(key, flat.shape), np.cumsum(sizes)[:-1])
        at = jnp.concatenate([radius * v / jnp.linalg.norm(v) for v in pieces])

        def objective(flat):
            outputs = jax.vmap(net.with_params(unravel(flat)))(x)
            return jnp.mean(loss(outputs, labels)) + 0.05 * jnp.sum(flat**2)

        return jax.hessian(objective)(at)

    worst = np.max(spectral(curvature(jr.split(getkey(), 20))))
    joint = dp.smoothness(net, radius, input_norm=1.0, joint=True)
    assert worst <= joint.of_loss(math.sqrt(2), 1 / 2, regularization=0.1) < largest


# Smoothing a network.


def test_smooth_relus(getkey):
    relu = jax.nn.relu
    layers = [linear(4, 5), relu, linear(5, 3), nn.Lambda(relu), linear(3, 2)]
    radii = [1.0, 2.0, 3.0]
    net = dp.Network(layers)
    smooth = dp.smooth_relus(net, 0.1, radii, input_norm=1.0)
    first, second = smooth.layers[1], smooth.layers[3]
    assert isinstance(first, dp.SmoothRelu) and isinstance(second, dp.SmoothRelu)
    assert math.isclose(first.mu, 0.1 / (2 * math.sqrt(5) * 2 * 3))
    assert math.isclose(second.mu, 0.1 / (2 * math.sqrt(3) * 3))
    bounds = dp.smoothness(smooth, radii, input_norm=1.0)
    assert math.isfinite(bounds.smoothness)
    assert dp.smoothness(net, radii, input_norm=1.0).smoothness == inf

    rearranged = lambda params: ravel_pytree(smooth.params)[1](ravel_pytree(params)[0])

    @jax.jit
    @jax.vmap
    def distance(key):
        def draw(key, tree, size):
            flat, unravel = ravel_pytree(tree)
            v = jr.normal(key, flat.shape)
            return unravel(size * v / jnp.linalg.norm(v))

        keys = jr.split(key, 4)
        params = [draw(k, p, r) for k, p, r in zip(keys, net.params, radii)]
        x = draw(keys[3], jnp.zeros(4), 1.0)
        a, b = net.with_params(tuple(params)), smooth.with_params(rearranged(params))
        return jnp.linalg.norm(a(x) - b(x))

    distances = distance(jr.split(getkey(), 200))
    assert 0 < jnp.max(distances) <= 0.1
    # Aligned with the weights, half of the accuracy is used.
    one = [linear(1, 1, bias=False), relu, linear(1, 1, bias=False)]
    one = [eqx.tree_at(lambda a: a.weight, a, jnp.ones((1, 1))) if a != relu else a
           for a in one]  # fmt: skip
    smooth = dp.smooth_relus(one, 0.1, 1.0, input_norm=1.0)
    gap = dp.Network(one)(jnp.ones(1)) - smooth(jnp.ones(1))
    assert math.isclose(gap[0], 0.1)


def test_smooth_relus_leaves_what_is_smooth():
    smooth = dp.smooth_relus(TANH_NET, 0.1, 1.0, input_norm=1.0)
    assert eqx.tree_equal(smooth, dp.Network(TANH_NET, stack=False))
    dead = dp.smooth_relus([linear(), jax.nn.relu, linear()], 0.1, 0.0, input_norm=1.0)
    assert dead.layers[1] == dp.SmoothRelu(0.1)


# The Jacobian that is really there.


@pytest.mark.slow
def test_jacobian_norm(getkey):
    net = dp.Network(TANH_NET)
    x = jr.normal(getkey(), (5, 4))
    flat, unravel = ravel_pytree(net.params)
    fn = lambda params: jax.vmap(net.with_params(params))(x)
    dense = jax.jacobian(lambda flat: fn(unravel(flat)).ravel())(flat)
    exact = np.linalg.norm(dense, 2)
    key = getkey()
    one = ft.partial(dp.jacobian_norm, fn, key=key, num_steps=1)
    first = jax.jit(one)(net.params)
    # So many that two singular values may be close.
    call = eqx.filter_jit(ft.partial(dp.jacobian_norm, key=key, num_steps=2000))
    last = call(lambda net: {"out": jax.vmap(net)(x)}, net)
    assert 0.05 * exact < first < exact
    assert math.isclose(last, exact, rel_tol=1e-8)
    # The bound is for one example.
    largest = np.max(np.linalg.norm(x, axis=1))
    bounds = dp.smoothness(net, input_norm=largest, joint=True)
    assert 0.05 * bounds.lipschitz < last <= math.sqrt(5) * bounds.lipschitz


def test_jacobian_norm_of_a_constant_and_of_float32(getkey):
    params = dict(a=jnp.ones(3, jnp.float32), b=jnp.ones((), jnp.float32))
    constant = lambda params: jnp.zeros(2, jnp.float32) * params["b"]
    assert dp.jacobian_norm(constant, params, key=getkey()) == 0
    found = dp.jacobian_norm(lambda p: 3 * p["a"], params, key=getkey())
    assert found.dtype == jnp.float32 and math.isclose(found, 3, rel_tol=1e-6)
    low = jax.tree.map(lambda a: a.astype("bfloat16"), params)
    found = dp.jacobian_norm(lambda p: 3 * p["a"], low, key=getkey())
    assert found.dtype == jnp.float32 and math.isclose(found, 3, rel_tol=1e-2)


# What goes wrong says what to do.


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: dp.smoothness([linear(), jnp.exp], 1.0, input_norm=1.0), TypeError,
         "layer 1.*rules={key: constants}"),
        (lambda: dp.smoothness([linear(), nn.LayerNorm(4)], 1.0, input_norm=1.0),
         TypeError, "layer 1, LayerNorm.*dp.LayerConstants"),
        (lambda: dp.smoothness([linear(), nn.Dropout(0.5)], 1.0, input_norm=1.0),
         TypeError, "eqx.nn.inference_mode"),
        (lambda: dp.smoothness([linear(), linear(3, 3)], 1.0, input_norm=1.0),
         ValueError, r"Layer 1.*input of shape \(4,\)"),
        (lambda: dp.smoothness([jnp.tanh, linear()], 1.0, input_norm=1.0), ValueError,
         "give the shape of one input as `input_shape`"),
        (lambda: dp.smoothness([linear()], [1.0, 2.0], input_norm=1.0), ValueError,
         r"`radius` has shape \(2,\).*each of the 1 layers"),
        (lambda: dp.smoothness([linear()], -1.0, input_norm=1.0), ValueError,
         "`radius` is -1.0; a number from 0 on"),
        (lambda: dp.smoothness([linear()], math.nan, input_norm=1.0), ValueError,
         "`radius` is nan"),
        (lambda: dp.smoothness([linear()], 1.0, input_norm=-1.0), ValueError,
         "`input_norm` is -1.0"),
        (lambda: dp.LayerConstants((1, -1), (0, 0, 0)), ValueError, "0 to infinity"),
        (lambda: dp.LayerConstants((1, 1), (0, 0, math.nan)), ValueError, "numbers"),
        (lambda: dp.SmoothRelu(0.0), ValueError, "`mu` is 0.0; a positive"),
        (lambda: dp.smooth_relus([linear()], 0.0, 1.0, input_norm=1.0), ValueError,
         "`accuracy` is 0.0; a positive"),
        (lambda: dp.jacobian_norm(jnp.sin, jnp.ones(2), key=jr.key(0), num_steps=0),
         ValueError, "`num_steps` is 0; a Python int >= 1"),
        (lambda: dp.jacobian_norm(jnp.sin, jnp.arange(2), key=jr.key(0)), TypeError,
         r"`params` has the arrays \['int64\[2\]'\]; derivatives are taken of"),
        (lambda: dp.jacobian_norm(len, (), key=jr.key(0)), TypeError,
         r"`params` has the arrays \[\]"),
        (lambda: dp.jacobian_norm(jnp.sum, jnp.ones(0), key=jr.key(0)), TypeError,
         r"\['float64\[0\]'\]; .* at least one number"),
        (lambda: dp.jacobian_norm(jnp.isnan, jnp.ones(2), key=jr.key(0)), TypeError,
         r"`fn\(params\)` has the arrays \['bool\[2\]'\]"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_rules_see_the_shapes():
    seen = []

    def rule(layer, shape, out_shape):
        seen.append((layer, shape, out_shape))
        return dp.LayerConstants.function(1, 0, value=0)

    def head(x):
        return x[:2]

    net = [linear(4, 5), nn.Lambda(head), linear(2, 1)]
    dp.smoothness(net, 1.0, input_norm=1.0, rules={head: rule})
    assert seen == [(head, (5,), (2,))]
    with pytest.raises(TypeError, match="gives 1.0; `dp.LayerConstants` are expected"):
        dp.smoothness(net, 1.0, input_norm=1.0, rules={head: lambda *_: 1.0})  # pyright: ignore
