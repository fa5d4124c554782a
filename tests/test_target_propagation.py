"""Target propagation: identities, and its recursion written out in NumPy."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import SoftmaxCrossEntropy, Squared
from diffprog.oracles import _inverses, GaussNewton, TargetPropagation
from diffprog.oracles._inverses import activation_of, gauss_newton

from . import helpers


M, T, P, N, K = 6, 5, 3, 4, 3  # examples, steps, sizes of input, state and output
KEYS = jr.split(jr.key(3), 12)
# So small that units stay away from their limits.
SEQUENCES = jr.normal(KEYS[0], (M, T, P)) / 2
INPUTS = jr.normal(KEYS[1], (M, N)) / 2
LABELS = jnp.arange(M) % K
REAL = jr.normal(KEYS[2], (M, N))
GAMMA, R, EPS = 0.05, 0.7, 1e-3
CE: Any = SoftmaxCrossEntropy()


def direct(model, inputs, targets, loss=CE, **options: Any):
    """The direction; options left out are those above."""
    more = {name: options.pop(name) for name in ("predict", "scale") if name in options}
    options = {"stepsize": GAMMA, "regularization": R} | options
    oracle = TargetPropagation(**options)
    return dp.value_and_direction(loss, oracle, **more)(model, inputs, targets)[1]


def gradient(model, inputs, targets, loss=CE):
    mean = lambda model: jnp.mean(loss(jax.vmap(model)(inputs), targets))
    return eqx.filter_jit(eqx.filter_grad(mean))(model)


close = ft.partial(helpers.close, scale="largest")


def skewed(orthogonal):
    """Not orthogonal any more, and well conditioned whatever was drawn."""
    rows, columns = jnp.linspace(0.7, 1.4, N), jnp.linspace(1.2, 0.8, N)
    return rows[:, None] * orthogonal * columns[None]


@ft.cache
def cell(activation=jnp.tanh):
    cell = dp.RNNCell(P, N, activation, key=KEYS[3])
    W, b = skewed(cell.hidden_weight), jnp.linspace(-0.3, 0.3, N)
    return eqx.tree_at(lambda c: (c.hidden_weight, c.bias), cell, (W, b))


@ft.cache
def recurrent():
    return dp.Network([dp.Recurrent(cell(), N), eqx.nn.Linear(N, K, key=KEYS[5])])


def numbers(tree):
    return [np.asarray(a) for a in jtu.tree_leaves(eqx.filter(tree, eqx.is_array))]


def layers(tree):
    """Those of a network, or of a direction for one."""
    rows = [stack.row(i) for stack in tree.stacks for i in range(stack.size)]
    return [layer for row in rows for layer in row.layers]


def inverse_of(W, r=R):
    return np.linalg.solve(W.T @ W + r * np.eye(W.shape[1]), W.T)


def undo(h, D, inverse):
    """What changes the argument of tanh, from h, by D."""
    clip = lambda a: np.clip(a, EPS - 1, 1 - EPS)
    if inverse == "linearized":
        return D / (1 - clip(h) ** 2)
    return np.arctanh(clip(h + D)) - np.arctanh(clip(h))


def written_out(sequences, cell, head, inverse, local, labels=LABELS):
    """The direction of a recurrent network, one formula after the other."""
    (W, V, b), (C, c) = numbers(cell), numbers(head)
    xs, steps = np.swapaxes(np.asarray(sequences), 0, 1), sequences.shape[1]
    hs = [np.zeros((len(sequences), N))]
    for x in xs:
        hs.append(np.tanh(hs[-1] @ W.T + x @ V.T + b))
    u = hs[-1] @ C.T + c
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    g = (p - np.eye(K)[labels]) / len(u)
    D = {steps: -GAMMA * g @ C}
    for t in range(steps, 0, -1):
        D[t - 1] = undo(hs[t], D[t], inverse) @ inverse_of(W).T
    lam = {t: -D[t] for t in D}
    if not local:
        for t in range(steps, 1, -1):
            lam[t - 1] = lam[t - 1] + (lam[t] * (1 - hs[t] ** 2)) @ W
    z = {t: lam[t] * (1 - hs[t] ** 2) for t in range(1, steps + 1)}
    dW = sum(z[t].T @ hs[t - 1] for t in z)
    dV = sum(z[t].T @ xs[t - 1] for t in z)
    return [dW, dV, sum(z[t].sum(0) for t in z), g.T @ hs[-1], g.sum(0)]


every_kind = pytest.mark.parametrize(
    ("inverse", "local"),
    [("linearized", True), ("linearized", False), ("difference", True)],
)


@pytest.mark.costly
@every_kind
def test_target_propagation_is_the_recursion_written_out(inverse, local):
    net = recurrent()
    found = direct(net, SEQUENCES, LABELS, inverse=inverse, local=local)
    _, head = net.layers
    expected = written_out(SEQUENCES, cell(), head, inverse, local)
    for a, b in zip(numbers(found), expected, strict=True):
        assert np.max(np.abs(a - b)) < 1e-12 * np.max(np.abs(b))


def test_the_head_has_the_gradient_and_no_factor():
    net = recurrent()
    step, scaled = (direct(net, SEQUENCES, LABELS, scale=s) for s in STEPS)
    (rest, head), (scaled_rest, scaled_head) = layers(step), layers(scaled)
    close(head, layers(gradient(net, SEQUENCES, LABELS))[1], 1e-14)
    close(scaled_head, head, 1e-14)
    close(jtu.tree_map(lambda a: GAMMA * a, scaled_rest), rest, 1e-14)


STEPS = ("step", "gradient")
LINEAR: dict[str, Any] = dict(loss=Squared())


def square(key, change=lambda W: W):
    weight = change(jax.nn.initializers.orthogonal()(key, (N, N)))
    layer = eqx.nn.Linear(N, N, key=key)
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


def orthogonal(stages, stack=True):
    return dp.Network([square(key) for key in KEYS[:stages]], stack=stack)


def test_orthogonal_steps_give_the_gradient():
    plain = dp.RNNCell(P, N, jax.nn.identity, key=KEYS[3])
    net = eqx.tree_at(lambda n: n.stacks[0].stage.layers[0].cell, recurrent(), plain)
    found = direct(net, SEQUENCES, LABELS, regularization=0.0)
    expected = layers(gradient(net, SEQUENCES, LABELS))[0]
    close(layers(found)[0], jtu.tree_map(lambda a: GAMMA * a, expected), 1e-13)


def test_orthogonal_layers_give_the_gradient():
    net, options = orthogonal(6), LINEAR | dict(regularization=0.0)
    expected = gradient(net, INPUTS, REAL, Squared())
    close(direct(net, INPUTS, REAL, scale="gradient", **options), expected, 1e-13)
    found = direct(net, INPUTS, REAL, head=0, **options)
    close(found, jtu.tree_map(lambda a: GAMMA * a, expected), 1e-13)


def test_regularization_shrinks_every_step_alike():
    net, options = orthogonal(6), LINEAR | dict(head=0)
    biases = lambda r: numbers(
        direct(net, INPUTS, REAL, regularization=r, **options).stacks[0].stage
    )[1]
    free, held = biases(0.0), biases(0.25)
    assert np.all(np.max(np.abs(free), 1) > 0)
    shrink = 1.25 ** -np.arange(5.0, -1, -1)
    for row, expected in zip(held, shrink[:, None] * free, strict=True):
        leaves_close(row, expected, 1e-12)


def test_linear_layers_make_no_difference():
    net = orthogonal(3)
    one, other = (
        direct(net, INPUTS, REAL, Squared(), inverse=i)
        for i in ("linearized", "difference")
    )
    close(one, other, 1e-14)


def test_differences_tend_to_the_linearization():
    net = recurrent()
    loop = lambda **options: numbers(
        layers(direct(net, SEQUENCES, LABELS, scale="gradient", **options))[0]
    )
    exact = loop()
    sizes = 1e-2, 1e-3, 1e-4
    found = [loop(inverse="difference", stepsize=s) for s in sizes]
    for leaf, *others in zip(exact, *found, strict=True):
        errors = [np.max(np.abs(leaf - other)) for other in others]
        assert errors[0] > 1e-6
        assert np.allclose(np.divide(errors[:-1], errors[1:]), 10, rtol=0.08)


def test_square_layers_give_the_gauss_newton_step_of_the_start():
    start, target = 0.1 * jnp.arange(1.0, N + 1), REAL[:1]
    net = dp.Network([dp.Recurrent(cell(), start)])
    options = dict(stepsize=1.0, regularization=0.0, eps=1e-9)
    # The Jacobian of few steps is well conditioned.
    xs = SEQUENCES[0, :3]
    found = direct(net, xs[None], target, Squared(), **options)
    output = lambda h: dp.Recurrent(cell(), h)(xs)
    J, residual = np.asarray(jax.jacobian(output)(start)), output(start) - target[0]
    step = -np.linalg.solve(J, residual)
    leaves_close(-layers(found)[0].initial, step, 1e-11)


def test_much_regularization_gives_the_transpose():
    net = network(2)
    (W, b), (W2, b2) = map(numbers, net.layers[::2])
    found = layers(direct(net, INPUTS, REAL, Squared(), regularization=1e9))[0].bias
    h = np.tanh(np.asarray(INPUTS) @ W.T + b)
    y = np.tanh(h @ W2.T + b2)
    D = -GAMMA * (y - np.asarray(REAL)) / M
    back = (D / (1 - y**2)) @ W2
    expected = -((1 - h**2) * back).sum(0)
    leaves_close(1e9 * found, expected, 1e-8)


def network(stages, activation=jnp.tanh, stack=True, head=False):
    sizes = [N] * stages + [K if head else N]
    layers = []
    for b, key in zip(sizes[1:], KEYS, strict=False):
        layer = square(key, skewed) if b == N else eqx.nn.Linear(N, b, key=key)
        layers += [layer, activation]
    return dp.Network(layers[:-1] if head else layers, stack=stack)


def own_tanh(z):
    return jnp.tanh(z)


def leaves_close(a, b, rtol):
    close(numbers(a), numbers(b), rtol)


def test_an_unknown_layer_is_inverted_by_gauss_newton():
    options = LINEAR | dict(regularization=0.0, eps=1e-9)
    nets = [network(3, f) for f in (own_tanh, jnp.tanh)]
    found, expected = (direct(net, INPUTS, REAL, **options) for net in nets)
    leaves_close(found, expected, 1e-9)
    options |= dict(loss=CE)
    at = lambda n: n.stacks[0].stage.layers[0].cell
    other = eqx.tree_at(at, recurrent(), cell(own_tanh))
    found = direct(other, SEQUENCES, LABELS, **options)
    leaves_close(found, direct(recurrent(), SEQUENCES, LABELS, **options), 1e-9)


def test_nothing_moves_at_a_minimum():
    net = network(2)
    oracle = TargetPropagation(GAMMA, R)
    vd = dp.value_and_direction(Squared(), oracle, has_aux=True)
    (_, aux), direction = vd(net, INPUTS, REAL)
    assert all(np.max(np.abs(leaf)) > 1e-6 for leaf in numbers(direction))
    # The outputs of the same program, so that they do not differ in rounding.
    _, found = vd(net, INPUTS, aux.outputs)
    assert all(np.max(np.abs(leaf)) < 1e-16 for leaf in numbers(found))


@pytest.mark.costly
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_generic_inverse(shape, monkeypatch):
    W = jr.normal(KEYS[6], shape)
    fn = lambda x: {"y": jnp.tanh(W @ x["x"])}
    x, D = {"x": jr.normal(KEYS[7], shape[1:])}, {"y": jr.normal(KEYS[8], shape[:1])}
    A = np.asarray((1 - fn(x)["y"] ** 2)[:, None] * W)
    expected = inverse_of(A, 0.3) @ np.asarray(D["y"])
    for limit in (32, 0):  # dense, and by conjugate gradients
        monkeypatch.setattr(_inverses, "DENSE", limit)
        found = jax.jit(lambda x, D: gauss_newton(fn, x, D, 0.3)["x"])(x, D)
        leaves_close(found, expected, 1e-9)
    found = _inverses.regularized_inverse(W, 0.3)
    leaves_close(found, inverse_of(np.asarray(W), 0.3), 1e-12)


INVERSES = {
    jnp.tanh: np.arctanh,
    jax.nn.sigmoid: lambda y: np.log(y / (1 - y)),
    jax.nn.softplus: lambda y: np.log(np.expm1(y)),
    jax.nn.relu: lambda y: np.maximum(y, 0),
    jax.nn.identity: lambda y: y,
}


@pytest.mark.parametrize("fn", INVERSES, ids=lambda fn: fn.__name__)
def test_inverses_of_activations(fn):
    known: Any = activation_of(fn)
    z = jnp.array([-1.0, -0.2, 0.3, 1.5])
    y, D, exact = fn(z), 1e-2 * jnp.array([1.0, -1.0, 2.0, -1.0]), INVERSES[fn]
    difference = known.difference(y, D, 1e-9)
    equal = ft.partial(np.testing.assert_allclose, atol=0)
    equal(difference, exact(y + D) - exact(y), rtol=1e-11)
    if fn is not jax.nn.relu:  # which has a kink in its pseudo-inverse too
        slope = jax.vmap(jax.grad(fn))(z)
        equal(known.linearized(y, D, 1e-9), D / slope, rtol=1e-12)
        # No cancellation.
        y32, D32 = y.astype("float32"), 1e-9 * D.astype("float32")
        tiny = known.linearized(y, 1e-9 * D, 1e-3)
        equal(known.difference(y32, D32, 1e-3), tiny, rtol=1e-5)


@pytest.mark.parametrize("inverse", ["linearized", "difference"])
def test_saturated_units_stay_finite(inverse):
    # The first two are at their limits, the others nearer than `eps`.
    bias = jnp.array([50.0, -50.0, 6.0, -6.0])
    big = eqx.tree_at(lambda c: c.bias, cell(), bias)
    net = eqx.tree_at(lambda n: n.stacks[0].stage.layers[0].cell, recurrent(), big)
    found = numbers(direct(net, SEQUENCES, LABELS, inverse=inverse))
    expected = written_out(SEQUENCES, big, net.layers[1], inverse, True)
    assert np.all(np.isfinite(expected[0])) and np.any(expected[0] != 0)
    leaves_close(found, expected, 1e-9)


@pytest.mark.costly
@pytest.mark.parametrize("local", [True, False])
def test_a_loop_of_stages_is_the_network_written_out(local):
    inputs = (INPUTS, LABELS)
    loop, plain = (network(5, stack=s, head=True) for s in (True, False))
    assert [stack.size for stack in loop.stacks] == [4, 1]
    found, expected = (direct(n, *inputs, local=local) for n in (loop, plain))
    rows = found.stacks[0].stage.layers[0]
    expected = layers(expected)[::2]
    for i, layer in enumerate(expected[:4]):
        close([rows.weight[i], rows.bias[i]], [layer.weight, layer.bias])
    close(layers(found)[-1], expected[-1])
    weights = [numbers(layer) for layer in plain.layers[::2]]
    hs = [np.asarray(INPUTS)]
    for W, b in weights[:-1]:
        hs.append(np.tanh(hs[-1] @ W.T + b))
    C, c = weights[-1]
    u = hs[-1] @ C.T + c
    p = np.exp(u) / np.exp(u).sum(1, keepdims=True)
    D = -GAMMA * (p - np.eye(K)[LABELS]) / M @ C
    lam = 0 * D
    for t in range(4, 0, -1):
        W = weights[t - 1][0]
        lam = -D + (lam if not local else 0)
        z = lam * (1 - hs[t] ** 2)
        assert np.allclose(
            expected[t - 1].weight, z.T @ hs[t - 1], rtol=1e-11, atol=1e-15
        )
        lam, D = z @ W, undo(hs[t], D, "linearized") @ inverse_of(W).T


class PerStep(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, xs, *, key=None):
        return jax.vmap(self.linear)(xs)


def test_losses_at_every_step():
    loop = dp.Recurrent(cell(), N, sequence=True)
    net = dp.Network([loop, PerStep(eqx.nn.Linear(N, K, key=KEYS[5]))])
    labels = jnp.arange(M * T).reshape(M, T) % K
    found = layers(direct(net, SEQUENCES, labels, head=1))[0].cell
    # The displacement of a step counts what the losses from there on ask for.
    total = 0
    for t in range(1, T + 1):
        options = (cell(), net.layers[1], "linearized", True, labels[:, t - 1])
        total = total + np.asarray(written_out(SEQUENCES[:, :t], *options)[0])
    leaves_close(found.hidden_weight, total, 1e-11)


class Classifier(eqx.Module):
    """A model that is no network, with marked layers or without."""

    loop: Any
    head: Any
    tables: list

    def __call__(self, xs, *, key=None):
        return self.head(self.loop(xs))


@pytest.mark.costly
@pytest.mark.parametrize("local", [True, False])
def test_marked_layers_are_like_those_of_a_network(local):
    net = recurrent()
    loop, head = net.layers
    model = Classifier(dp.rule_boundary(loop), head, [jnp.arange(3), "name"])
    options = dict(local=local, scale=STEPS[local])
    expected = layers(direct(net, SEQUENCES, LABELS, **options))
    found = direct(model, SEQUENCES, LABELS, **options)
    close(found.loop.layer, expected[0])
    close(found.head, expected[1])
    if local:
        return
    predict = lambda net, xs: jax.vmap(net)(xs[::-1])[::-1]
    found = direct(net, SEQUENCES, LABELS, predict=predict, **options)
    close(layers(found), expected)


def test_marked_dense_layers():
    tanh = eqx.nn.Lambda(jnp.tanh)
    dense = lambda key: eqx.nn.Sequential([eqx.nn.Linear(N, N, key=key), tanh])
    marked = [dense(key) for key in KEYS[:2]]
    model = eqx.nn.Sequential([dp.rule_boundary(layer) for layer in marked])
    found = direct(model, INPUTS, REAL, Squared())
    expected = layers(direct(dp.Network(marked), INPUTS, REAL, Squared()))
    for i in range(2):
        close(found.layers[i].layer.layers[0], expected[2 * i])


@pytest.mark.slow
def test_gated_cells_are_inverted_by_gauss_newton():
    gru = eqx.nn.GRUCell(P, N, key=KEYS[3])
    net = dp.Network([dp.Recurrent(gru, N), eqx.nn.Linear(N, K, key=KEYS[5])])
    xs, labels = SEQUENCES[0, :2], LABELS[:1]
    found = layers(direct(net, xs[None], labels))[0].cell

    @jax.jit
    def expected():
        h = gru(xs[0], jnp.zeros(N))
        end = lambda h: CE(net.layers[1](h)[None], labels)[0]
        D2 = -GAMMA * jax.grad(end)(gru(xs[1], h))
        A = jax.jacobian(gru, argnums=1)(xs[1], h)
        D1 = jnp.linalg.solve(A.T @ A + R * jnp.eye(N), A.T @ D2)
        pull = lambda x, h, D: eqx.filter_vjp(lambda c: c(x, h), gru)[1](-D)[0]
        return pull(xs[1], h, D2).weight_ih, pull(xs[0], 0 * h, D1).weight_ih

    last, first = expected()
    # From h = 0 the first step moves no hidden weight, but it moves those of the input.
    assert np.allclose(found.weight_ih, last + first, rtol=1e-11, atol=1e-15)


class Tokens(eqx.Module):
    """A cell over integers, whose state is two arrays."""

    table: jax.Array
    cell: eqx.nn.LSTMCell

    def __call__(self, x, state):
        return self.cell(self.table[x], state)


@pytest.mark.slow
def test_states_of_several_arrays_and_integer_inputs():
    tokens = Tokens(jr.normal(KEYS[6], (5, P)), eqx.nn.LSTMCell(P, 2, key=KEYS[7]))
    loop = dp.Recurrent(tokens, (2, 2))
    net = dp.Network([loop, lambda s: s[0], eqx.nn.Linear(2, K, key=KEYS[8])])
    inputs, labels = jnp.array([[1, 3]]), LABELS[:1]
    found = layers(direct(net, inputs, labels, local=False))[0].cell

    def states(tokens):
        first = tokens(1, (jnp.zeros(2), jnp.zeros(2)))
        return first, tokens(3, first)

    @jax.jit
    def expected():
        (first, last), pull = eqx.filter_vjp(states, tokens)
        end = lambda h: CE(net.layers[-1](h)[None], labels)[0]
        D2 = -GAMMA * jnp.concatenate([jax.grad(end)(last[0]), jnp.zeros(2)])
        flat, unravel = ravel_pytree(first)
        A = jax.jacobian(lambda s: ravel_pytree(tokens(3, unravel(s)))[0])(flat)
        D1 = jnp.linalg.solve(A.T @ A + R * jnp.eye(4), A.T @ D2)
        return pull((unravel(-D1), unravel(-D2)))[0]

    leaves_close(found, expected(), 1e-11)


def test_stages_pass_targets_through_inputs_of_loops():
    loop = dp.Recurrent(cell(), N)
    first = eqx.nn.Linear(P, P, key=KEYS[9])
    # One step: the loop is a dense layer with the weights V.
    dense = eqx.nn.Linear(P, N, key=KEYS[9])
    at = lambda layer: (layer.weight, layer.bias)
    dense = eqx.tree_at(at, dense, (cell().input_weight, cell().bias))
    one = [PerStep(first), loop]
    other = [first, dense, jnp.tanh]
    found = direct(dp.Network(one), SEQUENCES[:, :1], REAL, Squared())
    expected = direct(dp.Network(other), SEQUENCES[:, 0], REAL, Squared())
    close(layers(found)[0].linear, layers(expected)[0])


def test_recurrent_layer():
    loop, h = dp.Recurrent(cell(), N), jnp.zeros(N)
    states = []
    for x in SEQUENCES[0]:
        h = cell()(x, h)
        states.append(h)
    assert np.allclose(loop(SEQUENCES[0]), h, rtol=1e-14)
    every = dp.Recurrent(cell(), N, sequence=True)(SEQUENCES[0])
    assert np.allclose(every, jnp.stack(states), rtol=1e-14)
    fresh = dp.RNNCell(P, N, key=KEYS[0], dtype="float32")
    V, W = np.asarray(fresh.input_weight), np.asarray(fresh.hidden_weight)
    assert np.allclose(V.T @ V, np.eye(P), atol=1e-6) and V.dtype == np.float32
    assert np.allclose(W.T @ W, np.eye(N), atol=1e-6) and not fresh.bias.any()
    other = dp.RNNCell(P, N, key=KEYS[0], init=jax.nn.initializers.zeros)
    assert not other.input_weight.any()


@pytest.mark.slow
def test_jit_vmap_and_float32():
    net = recurrent()
    oracle = TargetPropagation(GAMMA, R)
    vd = dp.value_and_direction(CE, oracle, has_aux=True)
    (value, aux), direction = vd(net, SEQUENCES, LABELS)
    call = lambda x, y: eqx.filter(vd(net, x, y)[1], eqx.is_array)
    leaves = zip(
        numbers(gradient(net, SEQUENCES, LABELS)), numbers(direction), strict=True
    )
    slope = float(sum(np.vdot(a, b) for a, b in leaves))
    assert np.allclose([aux.slope, -aux.decrease], -slope, rtol=1e-10, atol=0)
    both = jax.jit(jax.vmap(call))(
        *(jnp.stack([a, a[::-1]]) for a in (SEQUENCES, LABELS))
    )
    close(jtu.tree_map(lambda a: a[1], both), direction, 1e-10)
    single = lambda tree: jtu.tree_map(
        lambda a: a.astype("float32") if eqx.is_inexact_array(a) else a, tree
    )
    (value, aux), found = vd(single(net), single(SEQUENCES), LABELS)
    assert {a.dtype for a in numbers((value, found))} == {np.dtype("float32")}
    leaves_close(found, direction, 1e-5)


def test_new_numbers_compile_nothing():
    traces = []

    def loss(outputs, targets):
        traces.append(1)
        return jnp.sum((outputs - targets) ** 2, 1)

    counts = []
    for stepsize, r, eps in ((0.1, 1, 0.01), (0.2, 2.0, 0.02)):
        options = dict(stepsize=stepsize, regularization=r, eps=eps)
        direct(network(1), INPUTS, REAL, loss, **options)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_what_is_refused(unchecked):
    oracle = TargetPropagation()
    vd = dp.value_and_direction(Squared(), oracle)
    with pytest.raises(TypeError, match="rule_boundary"):
        vd(eqx.nn.Linear(N, N, key=KEYS[0]), INPUTS, REAL)
    marked = dp.rule_boundary(eqx.nn.Linear(N, N, key=KEYS[0]))
    with pytest.raises(ValueError, match="leave it out"):
        direct(marked, INPUTS, REAL, Squared(), head=1)
    with pytest.raises(ValueError, match="has 2 stages"):
        direct(network(2), INPUTS, REAL, Squared(), head=3)
    wrong: Any = dict(
        stepsize=0, regularization=-1.0, eps=0.5, inverse="exact", head=-1
    )
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"`{name}` is "):
            TargetPropagation(**{name: value})
    with pytest.raises(dp.SolveError):
        singular = eqx.tree_at(
            lambda n: n.stacks[1].stage.layers[0].weight,
            network(2),
            jnp.zeros((N, N)),
        )
        direct(singular, INPUTS, REAL, Squared(), regularization=0.0)
    with pytest.raises(TypeError, match="`initial`"):
        dp.Recurrent(cell(), 0)
    no_cell: Any = 3
    with pytest.raises(TypeError, match="`cell`"):
        dp.Recurrent(no_cell, 1)
    no_init: Any = "zeros"
    with pytest.raises(ValueError, match="`init`"):
        dp.RNNCell(P, N, key=KEYS[0], init=no_init)


def test_gauss_newton_goes_through_recurrent_layers():
    vd = dp.value_and_direction(CE, GaussNewton(1e6), scale="gradient")
    found = vd(recurrent(), SEQUENCES, LABELS)[1]
    leaves_close(found, gradient(recurrent(), SEQUENCES, LABELS), 1e-4)


def test_wrong_sequences(unchecked):
    message = r"given x of shape \(3,\) and h of shape \(2,\); \(3,\) and \(4,\) are"
    with pytest.raises(ValueError, match=message) as raised:
        dp.Recurrent(cell(), 2)(SEQUENCES[0])
    assert "of a sequence of shape (5, 3)" in raised.value.__notes__[0]
    with pytest.raises(ValueError, match=r"one sequence of shape \(T, 3\)"):
        dp.Recurrent(cell(), N)(SEQUENCES)
    with pytest.raises(ValueError, match=r"The sequence has shape \(\); arrays whose"):
        dp.Recurrent(cell(), N)(jnp.ones(()))
    wider = lambda x, h: jnp.concatenate([h, x])
    message = r"a state of shape \(7,\) and dtype float64, from one of shape \(4,\)"
    with pytest.raises(ValueError, match=message):
        dp.Recurrent(wider, N)(SEQUENCES[0])
