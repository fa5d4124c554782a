"""Networks as chains: models under vmap, and exact layerwise directions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp

from . import helpers
from .helpers import close


KEYS = jr.split(jr.key(0), 40)
INPUTS = jr.normal(KEYS[30], (6, 3))
LABELS = jnp.arange(6) % 2


def linear(inputs, outputs, key=0):
    return eqx.nn.Linear(inputs, outputs, key=KEYS[key])


def blocks(n):
    return [layer for i in range(n) for layer in (linear(2, 2, i), jnp.tanh)]


def ragged():
    layers = [linear(3, 5), jnp.tanh, linear(5, 4, 1), jnp.tanh, linear(4, 2, 2)]
    return dp.Network(layers)


def repeated():
    return dp.Network([linear(3, 2), jnp.tanh, *blocks(5), linear(2, 2, 9)])


NETWORKS = dict(ragged=ragged, repeated=repeated)
every_network = pytest.mark.parametrize("name", NETWORKS)


def by_hand(net, x):
    for layer in net.layers:
        x = layer(x)
    return x


# The model ------------------------------------------------------------------------


@every_network
def test_is_its_layers_one_after_another(name):
    net = NETWORKS[name]()
    desired = jax.vmap(lambda x: by_hand(net, x))(INPUTS)
    np.testing.assert_allclose(jax.vmap(net)(INPUTS), desired, rtol=0, atol=1e-15)


def test_equal_stages_are_stored_together():
    assert [stack.size for stack in repeated().stacks] == [1, 5, 1]
    assert [stack.size for stack in ragged().stacks] == [1, 1, 1]
    few = dp.Network([*blocks(3)])
    assert [stack.size for stack in few.stacks] == [1, 1, 1]
    apart = dp.Network([*blocks(5)], stack=False)
    assert [stack.size for stack in apart.stacks] == [1] * 5
    assert len(repeated().layers) == 2 + 10 + 1


def test_functions_before_the_first_layer_belong_to_it():
    net = dp.Network([jnp.ravel, jnp.tanh, linear(4, 2), jnp.sin])
    assert [len(stack.stage.layers) for stack in net.stacks] == [4]
    x = jnp.asarray([[0.5, -1.0], [2.0, 0.1]])
    desired = jnp.sin(linear(4, 2)(jnp.tanh(jnp.ravel(x))))
    np.testing.assert_allclose(net(x), desired, rtol=0, atol=1e-14)


def test_sequentials_are_taken_apart():
    inner = eqx.nn.Sequential([linear(2, 2), eqx.nn.Lambda(jnp.tanh)])
    model = eqx.nn.Sequential([linear(3, 2, 1), inner, linear(2, 1, 2)])
    net = dp.Network(model)
    assert len(net.layers) == 4
    np.testing.assert_array_equal(jax.vmap(net)(INPUTS), jax.vmap(model)(INPUTS))


@every_network
def test_other_parameters(name):
    net = NETWORKS[name]()
    flat, unravel = ravel_pytree(net.params)
    again = net.with_params(unravel(2 * flat))
    np.testing.assert_array_equal(ravel_pytree(again.params)[0], 2 * flat)
    assert jax.tree.structure(again) == jax.tree.structure(net)


def test_keys_reach_every_layer():
    dropout = eqx.nn.Dropout(0.5)
    identity = eqx.tree_at(lambda a: a.weight, linear(64, 64), jnp.eye(64))
    x = jnp.full(64, 2.0)
    for stack in (True, False):
        net = dp.Network([identity, dropout] * 5, stack=stack)
        run = eqx.filter_jit(lambda key, net=net: net(x, key=key))
        first, second = (run(jr.key(i)) for i in (0, 1))
        assert jnp.any(first != second)
        np.testing.assert_array_equal(run(jr.key(0)), first)
        # Five masks together leave one of 32 entries, one mask five times a half.
        assert np.count_nonzero(first > 8) < 16


def test_compiling_does_not_grow_with_equal_blocks():
    def size(n):
        net = dp.Network(blocks(n))
        gradient = eqx.filter_grad(lambda net: jnp.sum(jax.vmap(net)(INPUTS[:, :2])))
        arrays, rest = eqx.partition(net, eqx.is_array)
        fn = lambda arrays: gradient(eqx.combine(arrays, rest))
        return len(str(jax.make_jaxpr(fn)(arrays)).splitlines())

    assert size(24) == size(6)


# The chain ------------------------------------------------------------------------


def dense(net, loss, targets):
    """The mean loss as matrices, and its Hessian."""
    flat, unravel = ravel_pytree(net.params)
    outputs = lambda w: jax.vmap(net.with_params(unravel(w)))(INPUTS).ravel()
    mean = lambda o: loss(o.reshape(6, 2), targets).mean()
    hessian = jax.hessian(lambda w: mean(outputs(w)))(flat)
    return helpers.dense(outputs, mean, flat), hessian


@pytest.mark.costly
@every_network
def test_layerwise_directions_are_the_dense_ones(name):
    net, loss = NETWORKS[name](), dp.losses.SoftmaxCrossEntropy()
    d, H = jax.tree.map(np.asarray, jax.jit(lambda: dense(net, loss, LABELS))())
    eye = np.eye(d.gradient.size)
    problem = dp.NetworkProblem(net, loss, LABELS)
    convex = 0.2 + abs(float(np.linalg.eigvalsh(H)[0]))  # with this damping
    for method, matrix, damping in (
        (dp.Gradient(), 0 * eye, 0.1),
        (dp.GaussNewton(), d.gauss_newton, 0.1),
        (dp.Newton(), H, convex),
    ):
        desired = helpers.damped_step(matrix, d.gradient, damping)
        du, _ = dp.direction(problem, method, INPUTS, net.params, damping=damping)
        np.testing.assert_allclose(ravel_pytree(du)[0], desired, rtol=0, atol=1e-12)


def test_sums_weigh_more_than_means():
    net, loss = ragged(), dp.losses.SoftmaxCrossEntropy()
    mean = dp.NetworkProblem(net, loss, LABELS)
    total = dp.NetworkProblem(net, loss, LABELS, reduction="sum")
    args = dp.GaussNewton(), INPUTS, net.params
    step, _ = dp.direction(mean, *args, damping=0.1)
    same, _ = dp.direction(total, *args, damping=0.6)
    close(step, same, 1e-13, scale=1.0)
    assert all(jnp.any(d != 0) for d in jax.tree.leaves(step))


@pytest.mark.slow
def test_a_network_of_equal_layers_is_a_control_problem():
    net = dp.Network(blocks(5))
    x0, loss = INPUTS[:1, :2], dp.losses.Squared()
    problem = dp.NetworkProblem(net, loss, jnp.ones((1, 2)))
    control = dp.ControlProblem(
        lambda x, u, t: jnp.tanh(u["W"] @ x + u["b"]),
        lambda x, u, t: 0.0,
        lambda x: jnp.sum((x - 1) ** 2) / 2,
        5,
    )
    (stage,) = net.params
    us = dict(W=stage.layers[0].weight, b=stage.layers[0].bias)
    for method in (dp.Newton(), dp.DDP(), dp.ILQR()):
        du, _ = dp.direction(problem, method, x0, net.params, damping=9.0)
        desired, _ = dp.direction(control, method, x0[0], us, damping=9.0)
        found = du[0].layers[0]
        assert jnp.linalg.norm(found.weight) > 1e-3
        np.testing.assert_allclose(found.weight, desired["W"], rtol=0, atol=1e-13)
        np.testing.assert_allclose(found.bias, desired["b"], rtol=0, atol=1e-13)


def test_one_stage_has_one_second_order_direction():
    net = dp.Network([linear(3, 2), jnp.tanh])
    problem = dp.NetworkProblem(net, dp.losses.SoftmaxCrossEntropy(), LABELS)

    def step(method):
        return dp.direction(problem, method, INPUTS, net.params, damping=2.0)[0]

    for pair in ((dp.Newton(), dp.DDP()), (dp.GaussNewton(), dp.ILQR())):
        one, other = map(step, pair)
        close(one, other, 1e-13, scale=1.0)
        assert all(jnp.any(d != 0) for d in jax.tree.leaves(one))


def test_solve_trains_a_network():
    net = ragged()
    problem = dp.NetworkProblem(net, dp.losses.Squared(), jnp.eye(2)[LABELS])
    search = dp.AdaptiveDamping()
    guess = INPUTS, net.params
    solution = dp.solve(
        problem, dp.GaussNewton(), *guess, search, max_steps=60, throw=False
    )
    assert solution.cost < 1e-3
    outputs = jax.vmap(net.with_params(solution.us))(INPUTS)
    np.testing.assert_allclose(solution.xs[-1], outputs, rtol=0, atol=1e-12)
    assert [x.shape for x in solution.xs] == [(6, 3), (6, 5), (6, 4), (6, 2)]


# Errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, error, message",
    [
        ((), ValueError, "at least one layer with parameters"),
        ((jnp.tanh,), ValueError, "at least one layer with parameters"),
        ((linear(2, 2), 3.0), TypeError, "Layer 1 is 3.0, which is no function"),
        ((linear(2, 2), eqx.nn.Linear), TypeError, "Layer 1 is .*, which is no"),
        (
            (linear(2, 2), eqx.nn.BatchNorm(2, "batch", mode="ema")),
            TypeError,
            "Layer 1, a BatchNorm, keeps a state",
        ),
        (3.0, TypeError, "`layers` is a float"),
    ],
)
def test_wrong_layers(layers, error, message, unchecked):
    with pytest.raises(error, match=message):
        dp.Network(layers)


def test_equal_layers_that_change_shapes():
    halve = [eqx.nn.Conv1d(1, 1, 2, stride=2, key=KEYS[i]) for i in range(4)]
    x = jnp.ones((1, 16))
    with pytest.raises(ValueError, match=r"map shapes \[\[1, 16\]\] to \[\[1, 8\]\]"):
        dp.Network(halve)(x)
    assert dp.Network(halve, stack=False)(x).shape == (1, 1)


def test_wrong_problems(unchecked):
    net, loss = ragged(), dp.losses.Squared()
    with pytest.raises(TypeError, match="`network` is a Linear"):
        dp.NetworkProblem(linear(2, 2), loss, LABELS)  # pyright: ignore
    with pytest.raises(TypeError, match="`loss` is 3"):
        dp.NetworkProblem(net, 3, LABELS)  # pyright: ignore
    with pytest.raises(ValueError, match="`reduction` is 'average'"):
        dp.NetworkProblem(net, loss, LABELS, reduction="average")  # pyright: ignore
    problem = dp.NetworkProblem(net, loss, jnp.ones((6, 2)))
    with pytest.raises(ValueError, match="not arranged like the parameters"):
        dp.rollout(problem, INPUTS, net.params[:2])
    with pytest.raises(ValueError, match="`us` is a Network, not arranged .*params`"):
        dp.direction(problem, dp.GaussNewton(), INPUTS, net)
    with pytest.raises(Exception) as raised:
        dp.rollout(problem, INPUTS[:, :2], net.params)
    assert any("stage 0 of the network" in note for note in raised.value.__notes__)
    nan = jnp.full((6, 2), jnp.nan)
    with pytest.raises(dp.SolveError, match="NaN in the inputs, the targets"):
        problem = dp.NetworkProblem(net, loss, nan)
        dp.direction(problem, dp.GaussNewton(), INPUTS, net.params, damping=0.1)
