"""K-FAC factors: golden scores, dense references, and what stays out of the state."""

# States of optax have any type, and wrong calls are made on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import functools as ft
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import Logistic, SoftmaxCrossEntropy, Squared
from diffprog.optim import (
    Dense,
    EigenKronecker,
    fisher,
    ggn,
    hessian,
    kfac,
    Kronecker,
    PSDKronecker,
)

from .helpers import close


IDENTITY = lambda z: z


def golden(widths, activation, shift, loss, batch):
    """A network of the golden values, its inputs and its targets."""
    layers = []
    for i, (n, k) in enumerate(zip(widths, widths[1:])):
        layer = eqx.filter_eval_shape(eqx.nn.Linear, n, k, key=jr.key(0))
        a, b = np.arange(1, k + 1), np.arange(1, n + 1)
        W = np.sin(1.7 * a[:, None] + 0.9 * b + i + shift) / np.sqrt(n)
        bias = 0.1 * np.cos(1.3 * a + i + shift)
        where = lambda layer: (layer.weight, layer.bias)
        layers.append(eqx.tree_at(where, layer, (jnp.array(W), jnp.array(bias))))
        if i < len(widths) - 2:
            layers.append(activation)
    i, k = np.arange(1, batch + 1)[:, None], np.arange(1, widths[-1] + 1)
    inputs = jnp.array(np.cos(0.7 * i * np.arange(1, widths[0] + 1) + 0.3 * i))
    if isinstance(loss, Squared):
        return dp.Network(layers), inputs, jnp.array(np.sin(i + 2 * k + shift))
    return dp.Network(layers), inputs, jnp.arange(batch) % widths[-1]


NETS = {
    "G1": ([5, 6, 4, 3], jnp.tanh, 0, SoftmaxCrossEntropy(), 7),
    "G2": ([3, 5, 2], jax.nn.sigmoid, 1, Squared(), 4),
    "G3": ([4, 4, 4, 4], jax.nn.softplus, 2, SoftmaxCrossEntropy(), 5),
    "G4": ([6, 3], IDENTITY, 3, SoftmaxCrossEntropy(), 8),
    "G5": ([2, 12, 12, 2], jnp.sin, 4, Squared(), 3),
}
# damping, J of the step, and J of its best length
SCORES = {
    "G1": (0.1, -0.3174435444072, -0.3448849619553),
    "G2": (0.05, -0.1174983914941, -0.1270419356805),
    "G3": (0.01, -0.3707572866095, -0.3721386063178),
    "G4": (0.02, -1.014538609998, -1.253613003212),
    "G5": (0.001, 0.6781781518645, -0.4703358008895),
}


@ft.cache
def problem(name):
    net, inputs, targets = golden(*NETS[name])
    return net, inputs, targets, NETS[name][3]


def parameters(net):
    return eqx.filter(net, eqx.is_inexact_array)


@jax.jit
def gradient(at):
    return at.linearize().gradient


@ft.cache
def compiled(**options):
    optimizer = kfac(**options)
    return optimizer.init, jax.jit(
        lambda grads, state, at: optimizer.update(grads, state, curvature=at)
    )


def update(at, grads=None, state=None, **options):
    """The first update of K-FAC, or the next one."""
    init, run = compiled(**options)
    grads = gradient(at) if grads is None else grads
    return run(grads, init(at.params) if state is None else state, at)


@jax.jit
def judge(at, step, rho):
    """J of a step, and the slope along it."""
    model, row = at.linearize(), jax.tree.map(lambda a: a[None], step)
    return model.change(step, rho), model.slopes(row)[0]


@pytest.mark.costly
@pytest.mark.parametrize("name", NETS)
def test_scores_of_the_golden_networks(name):
    net, inputs, targets, loss = problem(name)
    rho, J, best = SCORES[name]
    at = ggn(loss)(net, inputs, targets)
    V, state = update(at, damping=rho)
    found, slope = judge(at, jax.tree.map(jnp.negative, V), rho)
    close(found, J, 1e-9)
    close(-(slope**2) / (4 * (found - slope)), best, 1e-9)
    assert state.refused == 0 and state.count == 1


KEYS = jr.split(jr.key(1), 9)
INPUTS, REAL = jr.normal(KEYS[0], (9, 4)), jr.normal(KEYS[1], (9, 3))
LABELS = jnp.arange(9) % 3
IGNORED = LABELS.at[jnp.array([1, 6])].set(-1)
KL = lambda z0, z: jnp.sum(
    jax.nn.softmax(z0) * (jax.nn.log_softmax(z0) - jax.nn.log_softmax(z)), -1
)


def stacked():
    """A layer without bias, and four equal ones, which are stored as one."""
    layers = [eqx.nn.Linear(4, 3, use_bias=False, key=KEYS[2]), jnp.tanh]
    for key in jr.split(KEYS[3], 4):
        layers += [eqx.nn.Linear(3, 3, key=key), jnp.tanh]
    return dp.Network(layers)


def dense_factors(net, inputs, hessian_of, counts):
    """Means of a a' and of S' H S over the examples that count, layer by layer."""
    layers, found = net.layers, []
    apply = lambda layers: lambda z: ft.reduce(lambda z, fn: fn(z), layers, z)
    H = jax.vmap(hessian_of)(jax.vmap(net)(inputs), jnp.arange(len(inputs)))
    for i, layer in enumerate(layers):
        if not isinstance(layer, eqx.nn.Linear):
            continue
        a = jax.vmap(apply(layers[:i]))(inputs)
        S = jax.vmap(jax.jacfwd(apply(layers[i + 1 :])))(jax.vmap(layer)(a))
        a = a if layer.bias is None else jnp.pad(a, [(0, 0), (0, 1)], constant_values=1)
        A = jnp.einsum("m,mi,mj->ij", counts, a, a)
        G = jnp.einsum("m,mki,mkl,mlj->ij", counts, S, H, S)
        found.append((A / jnp.sum(counts), G / jnp.sum(counts)))
    join = lambda pairs: jax.tree.map(lambda *rows: jnp.stack(rows), *pairs)
    return tuple(zip(join(found[:1]), join(found[1:]), strict=True))


def means(state):
    of = lambda a: np.asarray(a) / np.asarray(state.weight)
    return jax.tree.map(of, (state.A, state.G))


def of_softmax(z, i):
    return jax.hessian(lambda z: SoftmaxCrossEntropy()(z[None], LABELS[:1])[0])(z)


IGNORING = SoftmaxCrossEntropy(ignore_label=-1)
CASES = {
    "softmax": (ggn(SoftmaxCrossEntropy()), LABELS, 1),
    "ignored": (fisher(IGNORING), IGNORED, 1),
    "sum": (ggn(IGNORING, reduction="sum", factor=0.5), IGNORED, 3.5),
    "divergence": (ggn(Squared(), metric=KL), REAL, 1),
    "pieces": (ggn(IGNORING, batch_size=4), IGNORED, 1),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", CASES)
def test_factors_equal_those_of_dense_jacobians(name):
    recipe, targets, times = CASES[name]
    net = stacked()
    ignored = jnp.where(IGNORED == -1, 0.0, 1.0)
    counts = ignored if targets is IGNORED else jnp.ones(9)
    A, G = jax.jit(lambda: dense_factors(net, INPUTS, of_softmax, counts))()
    _, state = update(recipe(net, INPUTS, targets), parameters(net))
    close(means(state), (A, jax.tree.map(lambda a: times * a, G)), 1e-12)


@ft.cache
def linear():
    """A linear model with the squared loss: its curvature and its Hessian."""
    net = dp.Network([eqx.nn.Linear(4, 3, key=KEYS[2])])
    flat, unravel = ravel_pytree(parameters(net))
    rest = eqx.filter(net, eqx.is_inexact_array, inverse=True)
    run = lambda w: jax.vmap(eqx.combine(unravel(w), rest))(INPUTS)
    H = jax.jit(jax.hessian(lambda w: jnp.mean(Squared()(run(w), REAL))))(flat)
    return ggn(Squared())(net, INPUTS, REAL), H


def of_linear(inputs):
    """The curvature of the same model on other inputs."""
    net = dp.Network([eqx.nn.Linear(4, 3, key=KEYS[2])])
    return ggn(Squared())(net, inputs, REAL)


def joined(grads):
    """[W b] of the linear model."""
    layer = grads.stacks[0].stage.layers[0]
    return np.column_stack([layer.weight, layer.bias])


def pair(state):
    """The factors of the linear model."""
    (A,), (G,) = means(state)
    return A[0], G[0]


def test_the_product_of_the_factors_is_the_hessian_of_a_linear_layer():
    at, H = linear()
    A, G = pair(update(at)[1])
    # Parameters lie as W, row by row, and then b.
    entries = np.arange(15).reshape(3, 5)
    order = np.concatenate([entries[:, :4].ravel(), entries[:, 4]])
    close(np.kron(G, A)[order][:, order], H, 1e-14)


def test_the_step_solves_with_the_product_of_the_damped_factors():
    at, _ = linear()
    grads = gradient(at)
    V, state = update(at, damping=0.3)
    A, G = pair(state)
    pi = np.sqrt((np.trace(A) / 5) / (np.trace(G) / 3))
    shift = np.sqrt(0.3)
    A, G = A + pi * shift * np.eye(5), G + shift / pi * np.eye(3)
    close(np.kron(G, A) @ joined(V).ravel(), joined(grads).ravel(), 1e-13)


def test_a_large_damping_leaves_the_gradient():
    at, _ = linear()
    V, _ = update(at, damping=1e18)
    close(1e18 * joined(V), joined(gradient(at)), 1e-8)


def test_undamped_steps_do_not_depend_on_coordinates_of_inputs_and_outputs():
    first, last = (eqx.nn.Linear(4, 3, key=KEYS[5]), eqx.nn.Linear(3, 3, key=KEYS[6]))
    rng = np.random.default_rng(0)
    T, U = (np.eye(n) + rng.normal(size=(n, n)) / 4 for n in (4, 3))
    U = U + np.diag([0.0, 1.0, 2.0])
    W = np.linalg.solve(T.T, np.transpose(first.weight)).T  # W T^-1
    where = lambda layer: (layer.weight, layer.bias)
    new = U @ W, U @ (np.asarray(first.bias) - W @ np.ones(4)) + 1
    mapped = eqx.tree_at(where, first, tuple(map(jnp.asarray, new)))
    back = lambda z: jnp.linalg.solve(U, z - 1)
    nets = (
        dp.Network([first, jnp.tanh, last]),
        dp.Network([lambda x: T @ x + 1, mapped, back, jnp.tanh, last]),
    )
    changes = []
    for net in nets:
        params, rest = eqx.partition(net, eqx.is_inexact_array)
        V, state = update(ggn(Squared())(net, INPUTS, REAL), damping=0.0)
        assert state.refused == 0
        outputs = lambda w, rest=rest: jax.vmap(eqx.combine(w, rest))(INPUTS)
        change = jax.jit(lambda p, V, fn=outputs: jax.jvp(fn, (p,), (V,)))
        changes.append(change(params, V))
    close(changes[0], changes[1], 1e-10)


@pytest.mark.slow
def test_sampled_factors_of_one_output_are_exact():
    net = dp.Network([eqx.nn.Linear(4, 3, key=KEYS[2]), jnp.tanh, *last(1)])
    at = ggn(Logistic())(net, INPUTS, jnp.where(REAL[:, :1] > 0, 1.0, -1.0))
    exact, sampled = (update(at, factors=name)[1] for name in ("exact", "sampled"))
    close(means(sampled), means(exact), 1e-13)


def last(k):
    return [eqx.nn.Linear(3, k, key=KEYS[3])]


@pytest.mark.slow
def test_sampled_factors_are_exact_on_average():
    net = dp.Network([eqx.nn.Linear(4, 3, key=KEYS[2]), jnp.tanh, *last(3)])
    at = fisher(SoftmaxCrossEntropy())(net, INPUTS, LABELS)
    _, exact = update(at)
    init = lambda key: kfac(factors="sampled", key=key).init(at.params)
    step = kfac(factors="sampled").update
    one = lambda key: means(step(at.params, init(key), curvature=at)[1])
    number = 4000
    A, G = jax.jit(jax.vmap(one))(jr.split(jr.key(2), number))
    close(jax.tree.map(lambda a: a[7], A), means(exact)[0], 1e-13)
    for found, desired in zip(G, means(exact)[1], strict=True):
        error = jnp.abs(jnp.mean(found, 0) - desired)
        deviation = jnp.std(found, 0) / number**0.5
        assert jnp.all(error < 5 * deviation + 1e-12)
        assert jnp.max(deviation) > 1e-4


def test_samples_are_new_with_every_update_and_key():
    net = dp.Network(last(3))
    at = fisher(SoftmaxCrossEntropy())(net, REAL, LABELS)
    options = dict(factors="sampled", ema=0.0)
    _, first = update(at, **options)
    _, second = update(at, state=first, **options)
    _, again = update(at, **options)
    close(first, again)
    assert jnp.max(jnp.abs(first.G[0] - second.G[0])) > 1e-4
    assert kfac(key=jr.key(1)).init(at.params).seed != first.seed


def batches(number):
    """Curvatures of the linear model, all of one program."""
    return [of_linear(INPUTS + i) for i in range(number)]


def test_running_means_are_taken_every_few_updates():
    ats, state, found = batches(6), None, []
    own = [pair(update(at)[1]) for at in ats]
    steps, grads = [], gradient(ats[0])
    for at in ats:
        V, state = update(at, grads, state, ema=0.8, every=2, burn_in=0)
        found.append(pair(state))
        steps.append(joined(V))
    for i in range(6):
        rows = range(0, i + 1, 2)
        weights = 0.8 ** np.array([(i - i % 2 - row) / 2 for row in rows])
        for k in (0, 1):
            mean = sum(w * own[row][k] for w, row in zip(weights, rows))
            close(found[i][k], mean / np.sum(weights), 1e-13)
    close(steps[2], steps[3])
    assert np.max(np.abs(steps[3] - steps[4])) > 1e-3


def test_the_state_goes_through_loops_and_files():
    ats = batches(5)
    stack = lambda *rows: np.stack(rows)
    grads, state, steps = gradient(ats[0]), None, []
    for i, at in enumerate(ats):
        V, state = update(at, grads, state, factors="sampled", every=2, burn_in=0)
        steps.append(V)
        if i == 1:
            file = io.BytesIO()
            eqx.tree_serialise_leaves(file, state)
            file.seek(0)
            like = jax.tree.map(jnp.zeros_like, state)
            state = eqx.tree_deserialise_leaves(file, like)
    optimizer = kfac(factors="sampled", every=2, burn_in=0)
    step = lambda s, at: optimizer.update(grads, s, curvature=at)[::-1]
    rows = jax.tree.map(stack, *ats)
    final, scanned = jax.jit(lambda s, rows: jax.lax.scan(step, s, rows))(
        optimizer.init(grads), rows
    )
    close((final, scanned), (state, jax.tree.map(stack, *steps)), 1e-13)
    states = jax.tree.map(lambda a: np.stack([a] * 5), optimizer.init(grads))
    mapped, _ = jax.jit(jax.vmap(step))(states, rows)
    for i, at in enumerate(ats):
        row = jax.tree.map(lambda a, i=i: np.asarray(a)[i], mapped)
        close(row, update(at, grads, factors="sampled", every=2, burn_in=0)[1], 1e-13)


def test_new_numbers_are_the_same_program():
    traces = []

    @jax.jit
    def run(damping, state, at):
        traces.append(None)
        optimizer = kfac(damping=damping, ema=damping)
        return optimizer.update(at.params, state, curvature=at)

    for i, at in enumerate(batches(3)):
        run(0.1 * (i + 1), kfac().init(at.params), at)
    assert len(traces) == 1


@pytest.mark.slow
def test_float32_steps_are_those_of_float64():
    net, inputs, targets, loss = problem("G1")
    single = jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a, (net, inputs)
    )
    at = ggn(loss)(net, inputs, targets)
    V, state = update(ggn(loss)(*single, targets), gradient(at))
    assert all(a.dtype == jnp.float32 for a in state.A + state.G_inverse)
    close(V, update(at)[0], 1e-4, scale="norm")


def test_factors_are_new_at_each_of_the_first_updates():
    state, since = None, []
    for at in batches(7):
        _, state = update(at, at.params, state, every=2, burn_in=3)
        since.append(int(state.since))
    assert since == [1, 1, 1, 2, 1, 2, 1]


def test_what_is_not_finite_stays_out():
    at, other = batches(2)
    bad, grads = of_linear(INPUTS.at[0, 0].set(jnp.nan)), gradient(at)
    V, state = update(bad, grads, burn_in=0)  # no factors yet: the gradient as it is
    close(V, grads)
    assert state.refused == 1 and state.weight == 0
    expected, state = update(at, grads, state, burn_in=0)  # tried again at once
    close(means(state), means(update(at)[1]))
    assert state.refused == 1
    due = lambda state: eqx.tree_at(lambda state: state.since, state, jnp.int32(5))
    nan = jax.tree.map(lambda a: a * jnp.nan, grads)
    nothing = jax.tree.map(jnp.zeros_like, grads)
    cases = (at, nan, nothing), (bad, grads, expected), (other, nan, nothing)
    for curvature, given, step in cases:
        V, after = update(curvature, given, due(state), burn_in=0)
        close(V, step, 0)
        close((after.A, after.G_inverse), (state.A, state.G_inverse), 0)
        assert after.refused == 2 and after.since > 5
    _, after = update(at, nan, state, burn_in=0)  # not due
    assert after.refused == 2


def test_singular_factors_without_damping_are_refused():
    at = of_linear(jnp.ones((9, 4)))
    V, state = update(at, damping=0.0)
    close(V, gradient(at))
    assert state.refused == 1


def test_a_layer_without_signal_is_damped_alone():
    net = dp.Network([eqx.nn.Linear(4, 3, use_bias=False, key=KEYS[2])])
    at = ggn(Squared())(net, 0 * INPUTS, REAL)
    V, state = update(at, at.params, damping=0.25)
    # G = I and A = 0: both have sqrt(rho) added.
    close(V, jax.tree.map(lambda W: W / (1.5 * 0.5), at.params))
    assert state.refused == 0


def conv():
    conv = eqx.nn.Conv1d(1, 2, 3, key=KEYS[0])
    return parameters(dp.Network([eqx.nn.Linear(4, 3, key=KEYS[2]), conv]))


def first(recipe, net=None, grads=None, inputs=INPUTS):
    """An update with the curvature of a recipe, for the linear model."""
    at = of_linear(INPUTS)
    net = dp.Network([eqx.nn.Linear(4, 3, key=KEYS[2])]) if net is None else net
    curvature = recipe if recipe is None else recipe(net, inputs, REAL)
    grads = at.params if grads is None else grads
    return kfac().update(grads, kfac().init(at.params), curvature=curvature)


def misshapen():
    weight = lambda net: net.stacks[0].stage.layers[0].weight
    return eqx.tree_at(weight, of_linear(INPUTS).params, jnp.ones(2))


def wider():
    return dp.Network([eqx.nn.Linear(4, 5, key=KEYS[2]), lambda z: z[:3]])


WRONG = {
    r"`damping` is -1; a number >= 0": lambda: kfac(damping=-1),
    r"`ema` is 1.0; a number from 0 to below 1": lambda: kfac(ema=1.0),
    r"`ema` is 'a'; a number from 0 to below 1": lambda: kfac(ema="a"),
    r"`every` is 0; a Python int >= 1": lambda: kfac(every=0),
    r"`burn_in` is -1; a Python int >= 0": lambda: kfac(burn_in=-1),
    r"`factors` is 'kron'; .exact. or .sampled.": lambda: kfac(factors="kron"),
    r"`key` is 3; a key": lambda: kfac(key=3),
    r"Stage 1 of the network is a Conv1d.*`dp.optim.recommended": lambda: kfac().init(
        conv()
    ),
    r"`params` is a dict; those of a `dp.Network`": lambda: kfac().init({"a": REAL}),
    r"Stage 0 of the network has no parameters here": lambda: optax.masked(
        kfac(), lambda params: jax.tree.map(lambda _: False, params)
    ).init(of_linear(INPUTS).params),
    r"`curvature` is None; that of a batch": lambda: first(None),
    r"`updates` is arranged as": lambda: first(ggn(Squared()), grads={"a": REAL}),
    r"weight` has shape \(2,\); that of the parameter .* \(3, 4\)": lambda: first(
        ggn(Squared()), grads=misshapen()
    ),
    r"`updates` has layers of \[5\] outputs, and the state .* \[3\]": lambda: first(
        ggn(Squared()), wider(), parameters(wider())
    ),
    r"`curvature` is that of a Hessian; .*`dp.optim.ggn`": lambda: first(
        hessian(Squared())
    ),
    r"`curvature` has a `predict`": lambda: first(
        ggn(Squared(), lambda net, inputs: jax.vmap(net)(inputs))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_say_what_to_do(message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


BIASES = {False: "without biases", True: "with biases"}


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", BIASES, ids=BIASES.values())
@pytest.mark.parametrize(
    "structure",
    [Kronecker(), PSDKronecker(), EigenKronecker(), Dense()],
    ids=lambda structure: type(structure).__name__,
)
def test_a_learned_preconditioner_starts_from_the_factors(structure, use_bias):
    keys = jr.split(jr.key(5), 7)
    layers = [eqx.nn.Linear(4, 3, use_bias=use_bias, key=keys[0]), jnp.tanh]
    for key in keys[1:6]:  # a stack
        layers += [eqx.nn.Linear(3, 3, use_bias=use_bias, key=key), jnp.tanh]
    net = dp.Network(layers)
    params = eqx.filter(net, eqx.is_inexact_array)
    x, y = jr.normal(keys[6], (8, 4)), jnp.arange(8) % 3
    at = dp.optim.ggn(dp.losses.SoftmaxCrossEntropy())(net, x, y)
    g = at.linearize().gradient
    factors = dp.optim.kfac(damping=0.01)
    step, own = factors.update(g, factors.init(params), curvature=at)
    rule = lambda path, leaf: structure if leaf.ndim > 1 else Dense()
    learned = dp.optim.llqr(rule, solver=dp.optim.HeavyBall(num_steps=0))
    state, _ = dp.optim.refresh(learned.init(params), params, at, start=own)
    found, _ = learned.update(g, state, params)
    if not use_bias:
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(step), strict=True):
            close(a, b, 1e-10, scale="norm")
        return
    # The blocks of weight and bias apart, by the damped factors themselves.
    stack, A, G = found.stacks[1], own.A_inverse[1], own.G_inverse[1]
    of_g = g.stacks[1].stage.layers[0]
    for t in range(5):
        whole = jnp.linalg.inv(A[t])
        weight = G[t] @ of_g.weight[t] @ jnp.linalg.inv(whole[:-1, :-1])
        close(stack.stage.layers[0].weight[t], weight, 1e-10, scale="norm")
        bias = G[t] @ of_g.bias[t] / whole[-1, -1]
        close(stack.stage.layers[0].bias[t], bias, 1e-10, scale="norm")


def test_a_start_of_other_parameters_is_refused():
    nets = [dp.Network([eqx.nn.Linear(n, 3, key=jr.key(0))]) for n in (2, 4)]
    first, second = (eqx.filter(net, eqx.is_inexact_array) for net in nets)
    at = ggn(Squared())(nets[0], jnp.ones((2, 2)), jnp.ones((2, 3)))
    learned = dp.optim.llqr()
    with pytest.raises(
        ValueError, match=r"layers of \[\(3, 5\)\].*the same parameters"
    ):
        dp.optim.refresh(learned.init(first), first, at, start=kfac().init(second))
