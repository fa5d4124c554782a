"""Curvature recipes: products, grams and scores against dense matrices."""

# States of optax have any type, and wrong calls are made on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._common.tree import cast_like
from diffprog.losses import (
    Hinge,
    Huber,
    Logistic,
    Poisson,
    SoftmaxCrossEntropy,
    Squared,
)
from diffprog.optim import feature_metric, fisher, ggn, hessian, score, tap

from .helpers import close


M, K = 6, 3
KEYS = jr.split(jr.key(0), 9)
RNG = np.random.default_rng(0)
INPUTS, DRAWN = jnp.asarray(RNG.normal(size=(M, 4))), RNG.normal(size=(M, K))
LABELS, REAL = jnp.asarray(np.arange(M) % K), jnp.asarray(DRAWN)
SIGNS = jnp.asarray(np.where(DRAWN > 0, 1.0, -1.0))
COUNTS = jnp.asarray(np.abs(np.round(2 * DRAWN)))


class Net(eqx.Module):
    """Two layers whose hidden values have a name."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self):
        self.first = eqx.nn.Linear(4, 5, key=KEYS[2])
        self.last = eqx.nn.Linear(5, K, key=KEYS[3])

    def __call__(self, x, key=None):
        return self.last(checkpoint_name(jnp.tanh(self.first(x)), "hidden"))


NET = Net()
PARAMS, REST = eqx.partition(NET, eqx.is_inexact_array)
FLAT, UNRAVEL = ravel_pytree(PARAMS)
DIRECTIONS = jnp.asarray(RNG.normal(size=(3, FLAT.size)))
LIKELIHOODS = {
    "softmax": (SoftmaxCrossEntropy(), LABELS),
    "logistic": (Logistic(), SIGNS),
    "squared": (Squared(), REAL),
    "poisson": (Poisson(), COUNTS),
}
SUM_OF_KL = lambda z0, z: jnp.sum(
    jax.nn.softmax(z0) * (jax.nn.log_softmax(z0) - jax.nn.log_softmax(z)), -1
)
EUCLIDEAN = lambda z0, z: jnp.sum((z - z0) ** 2, -1) / 2


def outputs(w):
    return jax.vmap(eqx.combine(UNRAVEL(w), REST))(INPUTS)


def hidden(w):
    return jax.vmap(lambda x: jnp.tanh(UNRAVEL(w).first(x)))(INPUTS)


def loss_of(loss, targets):
    return lambda w: jnp.mean(loss(outputs(w), targets))


def gauss_newton(values, H):
    """J' H J / M with the Hessian H(z) of all rows of z together."""

    def matrix():
        J = jax.jacfwd(values)(FLAT).reshape(-1, FLAT.size)
        return J.T @ H(values(FLAT)) @ J / M

    return matrix


def hessian_of(fn):
    return lambda z: jax.hessian(lambda v: jnp.sum(fn(v.reshape(z.shape))))(z.ravel())


def case(name):
    """A recipe, its targets, the loss, and what computes its matrix."""
    if name == "hessian":
        h = loss_of(SoftmaxCrossEntropy(), LABELS)
        return hessian(SoftmaxCrossEntropy()), LABELS, h, lambda: jax.hessian(h)(FLAT)
    if name == "features":
        h = loss_of(Squared(), REAL)
        recipe = feature_metric(tap("hidden"), Squared())
        return recipe, REAL, h, gauss_newton(hidden, lambda z: jnp.eye(z.size))
    if name == "features of a divergence":
        h = loss_of(Squared(), REAL)
        recipe = feature_metric(tap("hidden"), Squared(), metric=SUM_OF_KL)
        H = lambda z: hessian_of(lambda v: SUM_OF_KL(z, v))(z)
        return recipe, REAL, h, gauss_newton(hidden, H)
    if name == "divergence":
        h = loss_of(Squared(), REAL)
        H = lambda z: hessian_of(lambda v: SUM_OF_KL(z, v))(z)
        return ggn(Squared(), metric=SUM_OF_KL), REAL, h, gauss_newton(outputs, H)
    if name == "metric":
        h = loss_of(Huber(0.3), REAL)
        recipe = ggn(Huber(0.3), metric=Squared())
        return recipe, REAL, h, gauss_newton(outputs, lambda z: jnp.eye(z.size))
    loss, targets = LIKELIHOODS[name]
    H = hessian_of(lambda v: loss(v, targets))
    return fisher(loss), targets, loss_of(loss, targets), gauss_newton(outputs, H)


def dense(name):
    """The loss, its gradient and its matrix."""
    *_, h, matrix = case(name)
    found = jax.jit(lambda: (*jax.value_and_grad(h)(FLAT), matrix()))()
    return map(np.asarray, found)


NAMES = [*LIKELIHOODS, "hessian", "features", "features of a divergence"]
NAMES += ["divergence", "metric"]


@jax.jit
def products(curvature):
    """What a model says of the three directions; traced once for many batches."""
    model = curvature.linearize()
    D = jax.vmap(lambda d: cast_like(UNRAVEL(d), model.gradient))(DIRECTIONS)
    flat = jax.vmap(lambda d: ravel_pytree(model.mv(d))[0])(D)
    gradient = ravel_pytree(model.gradient)[0]
    return model.value, gradient, flat, model.gram(D), model.slopes(D)


@pytest.mark.costly
@pytest.mark.parametrize("name", NAMES)
def test_products_equal_those_of_the_dense_matrix(name):
    recipe, targets, *_ = case(name)
    value, gradient, mv, gram, slopes = products(recipe(NET, INPUTS, targets))
    loss, g, C = dense(name)
    D = np.asarray(DIRECTIONS)
    close(value, loss)
    close(gradient, g, scale="norm")
    close(mv, D @ C, 1e-12, scale="norm")
    close(gram, D @ C @ D.T, 1e-12, scale="norm")
    close(slopes, D @ g, 1e-12, scale="norm")


@pytest.mark.costly
@pytest.mark.parametrize("name", ["softmax", "hessian", "features"])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_batch_in_pieces_is_one_batch(name, size):
    recipe, targets, *_ = case(name)
    whole = products(recipe(NET, INPUTS, targets))
    pieces = dataclasses.replace(recipe, batch_size=size)
    for found, desired in zip(products(pieces(NET, INPUTS, targets)), whole):
        close(found, desired, 1e-12, scale="norm")


def test_the_sum_over_the_batch_and_a_factor_scale():
    mean = products(ggn(Squared())(NET, INPUTS, REAL))
    total = products(ggn(Squared(), reduction="sum")(NET, INPUTS, REAL))
    twice = products(ggn(Squared(), factor=2.5)(NET, INPUTS, REAL))
    for found, more, desired in zip(total, twice, mean):
        close(found, M * desired, scale="norm")
    factors = [1, 1, 2.5, 2.5, 1]
    for found, desired, factor in zip(twice, mean, factors):
        close(found, factor * desired, scale="norm")


def test_renyi_divergences_are_multiples_and_the_reverse_one_is_the_same():
    p = jax.nn.log_softmax

    def renyi(a):
        power = lambda z0, z: jnp.sum(jnp.exp(a * p(z0) + (1 - a) * p(z)), -1)
        return lambda z0, z: jnp.log(power(z0, z)) / (a - 1)

    mean = products(ggn(SoftmaxCrossEntropy())(NET, INPUTS, LABELS))
    metrics = {a: renyi(a) for a in (0.5, 2.0)}
    metrics[1.0] = lambda z0, z: SUM_OF_KL(z, z0)
    for a, metric in metrics.items():
        recipe = ggn(SoftmaxCrossEntropy(), metric=metric)
        found = products(recipe(NET, INPUTS, LABELS))
        close(found[3], a * mean[3], 1e-12, scale="norm")


def test_new_numbers_are_the_same_program():
    traces = []

    @jax.jit
    def value(curvature):
        traces.append(None)
        return curvature.linearize().value

    recipe = ggn(SoftmaxCrossEntropy())
    for shift in range(3):
        model = jax.tree.map(lambda a: a + shift if eqx.is_array(a) else a, NET)
        value(recipe(model, INPUTS + shift, (LABELS + shift) % K))
    assert len(traces) == 1


def test_a_vmap_over_models_equals_a_loop():
    scales = np.array([0.5, 1.0, 2.0])
    models = jax.tree.map(lambda a: np.multiply.outer(scales, a), PARAMS)
    recipe = ggn(SoftmaxCrossEntropy())
    run = lambda params: products(recipe(eqx.combine(params, REST), INPUTS, LABELS))
    found = jax.tree.map(np.asarray, jax.vmap(run)(models))
    for i in range(3):
        row = jax.tree.map(lambda a: a[i], models)
        for a, b in zip(found, run(row), strict=True):
            close(a[i], b, 1e-12, scale="norm")


def test_taps_find_names_in_loops_and_calls_and_stages():
    layers = jr.normal(KEYS[5], (3, 4, 4))

    def model(x):
        def body(x, W):
            x = checkpoint_name(jnp.tanh(W @ x), "inside")
            return x, None

        x, _ = jax.lax.scan(body, x, layers)
        run = jax.jit(jax.checkpoint(lambda x: checkpoint_name(jax.nn.relu(x), "last")))
        return run(x)

    inside = tap("inside")(model, INPUTS)
    assert inside.shape == (M, 3, 4)
    close(jax.nn.relu(inside[:, -1]), tap("last")(model, INPUTS))
    predict = lambda layers, inputs: jax.vmap(model)(inputs)
    batch = tap("last", predict)(layers, INPUTS)
    close(batch, jax.vmap(model)(INPUTS))
    net = dp.Network([NET.first, jnp.tanh, NET.last])
    close(tap(0)(net, INPUTS), hidden(FLAT))
    close(tap(1)(net, INPUTS), outputs(FLAT))


def test_a_tap_keeps_the_derivatives_of_functions_behind_it():
    @jax.custom_jvp
    def odd(x):
        return jnp.sum(x)

    odd.defjvp(lambda x, dx: (odd(*x), 7 * jnp.sum(dx[0])))
    model = lambda x: checkpoint_name(odd(x) * x, "out")
    g = jax.grad(lambda x: jnp.sum(tap("out")(model, x)))(INPUTS)
    close(g, jax.grad(lambda x: jnp.sum(jax.vmap(model)(x)))(INPUTS))


@pytest.mark.costly
@pytest.mark.parametrize("rho", [0.3, 1e-3])
def test_scores_are_shares_of_the_best_decrease(rho):
    recipe, targets, *_ = case("softmax")
    (_, g, C), at = dense("softmax"), recipe(NET, INPUTS, targets)
    A = C + rho * np.eye(FLAT.size)
    exact, best = -np.linalg.solve(A, g), -g @ np.linalg.solve(A, g) / 2
    J = lambda d: g @ d + d @ A @ d / 2
    steps = dict(gradient=UNRAVEL(-g), exact=UNRAVEL(exact), wrong=UNRAVEL(g))
    found = score(at, steps, rho)
    close(found["exact"], 1.0, 1e-8)
    close(found["gradient"], J(-g) / best, 1e-8)
    close(found["wrong"], J(g) / best, 1e-8)
    best = jnp.asarray(best)
    close(score(at, steps["gradient"], rho, value=best), J(-g) / best, 1e-12)


def test_a_score_without_a_minimum_is_nan():
    at = hessian(SoftmaxCrossEntropy())(NET, INPUTS, LABELS)
    assert jnp.isnan(score(at, UNRAVEL(FLAT)))


def test_float32_products_are_those_of_float64():
    single = jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a, NET
    )
    at = ggn(SoftmaxCrossEntropy())
    found = products(at(single, INPUTS.astype(jnp.float32), LABELS))
    for a, b in zip(found, products(at(NET, INPUTS, LABELS)), strict=True):
        close(np.float64(a), b, 1e-5, scale="norm")


CALLED = ggn(Squared())(NET, INPUTS, REAL)
WRONG = {
    r"`predict` is 3; something like": lambda: ggn(Squared(), 3),
    r"`reduction` is 'max'; \"mean\" or \"sum\"": lambda: ggn(
        Squared(), reduction="max"
    ),
    r"`factor` is -1.0; a number > 0": lambda: hessian(Squared(), factor=-1.0),
    r"`batch_size` is 0; a Python int >= 1": lambda: ggn(Squared(), batch_size=0),
    r"`metric` is 'KL'; a loss, or a function": lambda: ggn(Squared(), metric="KL"),
    r"`loss` is a Hinge, whose likelihood is not known.*`metric=`": lambda: fisher(
        Hinge()
    ),
    r"`features` is 'hidden'; a function": lambda: feature_metric("hidden", Squared()),
    r"`place` is 1.5; a name": lambda: tap(1.5),
    r"the name 'other'.*: there are 'hidden'": lambda: tap("other")(NET, INPUTS),
    r"the stages 0 to 0": lambda: tap(1)(dp.Network([NET.first]), INPUTS),
    r"number of a stage, and the model is a Net": lambda: tap(1)(NET, INPUTS),
    r"the model has no floating array|no floating array": lambda: ggn(Squared())(
        lambda x: x, INPUTS, REAL
    ),
    r"`curvature` is a recipe that was not called; that of a batch": lambda: score(
        ggn(Squared()), PARAMS
    ),
    r"`damping` is -1.0; a number >= 0": lambda: score(CALLED, PARAMS, -1.0),
    r"`steps` is arranged as": lambda: score(CALLED, {"a": INPUTS}),
    r"`steps\.first\.weight` has shape \(2,\); that of the parameter": lambda: score(
        CALLED, eqx.tree_at(lambda p: p.first.weight, PARAMS, jnp.ones(2))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_say_what_to_do(message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
