"""Gauss-Newton directions of networks: every form against dense matrices."""

import dataclasses
import functools as ft

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import (
    Alpha,
    FLoss,
    Huber,
    Logistic,
    SoftmaxCrossEntropy,
    Squared,
)
from diffprog.oracles import (
    Auto,
    CG,
    Cholesky,
    DualCG,
    DualGaussNewton,
    GaussNewton,
    Gradient,
    RandomSubspace,
)
from diffprog.oracles._base import Layers, linearize
from diffprog.oracles._gram import gram

from . import helpers


M, K = 6, 3  # examples, outputs
KEYS = jr.split(jr.key(1), 20)
INPUTS = jr.normal(KEYS[0], (M, 4))
LABELS = jnp.arange(M) % K
REAL = jr.normal(KEYS[1], (M, K))
SIGNS = jnp.where(REAL > 0, 1.0, -1.0)


def cosh(outputs, targets):
    return jnp.sum(jnp.cosh(outputs - targets), 1)


LOSSES = {
    "softmax": (SoftmaxCrossEntropy(), LABELS),
    "squared": (Squared(), REAL),
    "logistic": (Logistic(), SIGNS),
    "huber": (Huber(0.8), REAL),
    "alpha 1.5": (FLoss(Alpha(1.5), "unit"), LABELS),
    "a function": (cosh, REAL),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
EXACT = {
    "auto": GaussNewton(0.1),
    "Cholesky": GaussNewton(0.1, Cholesky(batch_size=4)),
    "CG": GaussNewton(0.1, CG(60, 1e-15)),
    "CG in outputs": GaussNewton(0.1, CG(60, 1e-15, in_outputs=True)),
    "CG unrolled": GaussNewton(0.1, CG(20, 1e-15, unroll=True)),
    "dual": DualGaussNewton(0.1),
    "dual CG": DualGaussNewton(0.1, DualCG(60, 1e-15)),
    "dual CG, euclidean": DualGaussNewton(0.1, DualCG(60, 1e-15, euclidean=True)),
}


@ft.cache
def network():
    sizes, layers = (4, 5, K), []
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        layers += [eqx.nn.Linear(a, b, key=KEYS[i + 2], use_bias=i > 0), jnp.tanh]
    return dp.Network(layers[:-1])


@ft.cache
def dense(name):
    """The mean loss of the batch as matrices."""
    loss, targets = LOSSES[name]
    net = network()
    flat, unravel = ravel_pytree(net.params)
    outputs = lambda w: jax.vmap(net.with_params(unravel(w)))(INPUTS).ravel()
    mean = lambda o: loss(o.reshape(M, K), targets).mean()
    matrices = jax.jit(lambda w: helpers.dense(outputs, mean, w))(flat)
    return jax.tree.map(np.asarray, matrices)


def run(oracle, name, **options):
    """The step of an oracle as a vector, and the report."""
    loss, targets = LOSSES[name]
    vd = dp.value_and_direction(loss, oracle, has_aux=True, **options)
    (_, aux), direction = vd(network(), INPUTS, targets)
    step = np.concatenate([-np.ravel(a) for a in jax.tree.leaves(direction)])
    return step, aux


def at(name, dtype=None, net=None):
    loss, targets = LOSSES[name]
    net, inputs = net or network(), INPUTS
    if dtype is not None:
        cast = lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a
        net, inputs, targets = jax.tree.map(cast, (net, inputs, targets))
    predict = lambda params: (jax.vmap(net.with_params(params))(inputs), None)
    loss = dp.losses.as_loss(loss)
    apply = lambda net: jax.vmap(net)(inputs)
    layers = Layers(net, inputs, net.with_params, apply, mapped=True)
    return linearize(predict, net.params, loss, targets, inputs, "mean", layers)[0]


close = ft.partial(helpers.close, rtol=1e-10)


# One direction, many ways ---------------------------------------------------------


OTHERS = [loss for loss in LOSSES if loss != "softmax"]
SOME = ("Cholesky", "CG", "dual CG")


@pytest.mark.costly
@pytest.mark.parametrize(
    "solver, name",
    [
        *((solver, "softmax") for solver in EXACT),
        *(
            (solver, name)
            for solver in ("Cholesky", "CG", "dual CG")
            for name in OTHERS
        ),
    ],
)
def test_all_forms_are_the_dense_step(solver, name):
    step, aux = run(EXACT[solver], name)
    desired = dense(name).step(0.1)
    close(step, desired)
    close(aux.slope, dense(name).gradient @ desired)
    close(aux.decrease, dense(name).decrease(desired))
    assert abs(aux.gap) < 1e-10


def test_the_exact_step_is_the_layerwise_riccati_step():
    net = network()
    problem = dp.NetworkProblem(net, LOSSES["softmax"][0], LABELS)
    du, _ = dp.direction(problem, dp.GaussNewton(), INPUTS, net.params, damping=0.1)
    close(run(GaussNewton(0.1), "softmax")[0], ravel_pytree(du)[0])


def test_without_iterations_the_dual_is_the_gradient():
    # The residual that is there at the start is small enough.
    oracle = DualGaussNewton(0.1, DualCG(1, rtol=2.0), scale_model=False)
    step, aux = run(oracle, "softmax")
    close(step, -dense("softmax").gradient / 0.1)
    assert aux.num_inner == 0


@pytest.mark.costly
@every_loss
def test_the_gradient_of_a_damping(name):
    step, _ = run(Gradient(0.1), name)
    close(step, -dense(name).gradient / 0.1)


def test_the_duality_gap():
    # D(g) = h - |grad h|^2 / (2 damping), so that is the gap to the model at d(g), and
    # the gap of a later iterate is that of its dual variable.
    d, damping = dense("softmax"), 0.1
    for count in (1, 2, 3):
        oracle = DualGaussNewton(damping, DualCG(count, 0.0), scale_model=False)
        step, aux = run(oracle, "softmax")
        P = d.h - d.decrease(step) + damping * step @ step / 2
        u = d.J @ step
        # alpha = g + H beta with J' alpha = -damping step; the conjugate of the model
        # at alpha is (alpha - g)' H^+ (alpha - g) / 2.
        A = np.concatenate([d.J.T @ d.H, 1e-10 * np.eye(M * K)])
        b = -damping * step - d.gradient
        beta = np.linalg.lstsq(A, np.concatenate([b, np.zeros(M * K)]))[0]
        D = d.h - beta @ d.H @ beta / 2 - damping * step @ step / 2
        close(aux.gap, P - D, rtol=1e-8)
        close(aux.gap, (u - beta) @ d.H @ (u - beta) / 2, rtol=1e-8)
        assert aux.gap > 0


def test_the_gap_of_conjugate_gradients():
    d, damping = dense("softmax"), 0.1
    for in_outputs in (False, True):
        oracle = GaussNewton(damping, CG(2, 0.0, in_outputs=in_outputs))
        step, aux = run(oracle, "softmax")
        alpha = d.g + d.H @ d.J @ step
        P = d.h - d.decrease(step) + damping * step @ step / 2
        pulled = d.J.T @ alpha
        beta = d.J @ step
        D = d.h - beta @ d.H @ beta / 2 - pulled @ pulled / (2 * damping)
        close(aux.gap, P - D)


def test_the_dual_variable_at_the_solution():
    d, damping = dense("softmax"), 0.1
    step, _ = run(DualGaussNewton(damping, DualCG(60, 1e-15)), "softmax")
    alpha = d.g + d.H @ d.J @ step
    close(step, -d.J.T @ alpha / damping)


def slopes(solver, damping):
    found = []
    for count in (1, 3, 8):
        oracle = GaussNewton(damping, solver(count, 0.0), scale_model=False)
        found.append(run(oracle, "softmax")[1].slope)
    return np.asarray(found)


def test_slopes_of_iterates_are_ordered():
    d, damping = dense("softmax"), 0.01
    exact = d.gradient @ d.step(damping)
    dual, primal = slopes(DualCG, damping), slopes(CG, damping)
    first = -d.gradient @ d.gradient / damping
    assert first < dual[0] and np.all(np.diff(dual) > 0) and dual[-1] < exact
    assert primal[0] < 0 and np.all(np.diff(primal) < 0) and primal[-1] > exact


@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**31 - 1),
    log_damping=st.floats(-4, 1),
    count=st.integers(1, 6),
)
def test_every_dual_iterate_descends(seed, log_damping, count):
    slope, gradient = random_dual(seed, 10**log_damping, count)
    assert slope < 0 or gradient < 1e-12


@ft.partial(jax.jit, static_argnums=2)
def random_dual(seed, damping, count):
    keys = jr.split(jr.key(seed), 3)
    W = jr.normal(keys[0], (2, 5))
    inputs, labels = jr.normal(keys[1], (4, 5)), jr.randint(keys[2], (4,), 0, 2)
    predict = lambda W: jnp.tanh(inputs @ W.T)
    loss = SoftmaxCrossEntropy()
    put = lambda params: (predict(params), None)
    lin = linearize(put, W, loss, labels, inputs, "mean")[0]
    step = DualCG(count, 0.0).solve(lin, damping, None, None).step
    return jnp.vdot(lin.gradient, step), jnp.linalg.norm(lin.gradient)


def krylov(matrix, gradient, count):
    """The least point of a quadratic in the space that conjugate gradients span."""
    matrix, v = np.asarray(matrix), np.asarray(gradient)
    basis = np.zeros((len(v), 0))
    for _ in range(count):
        v = v - basis @ (basis.T @ v)
        basis = np.column_stack([basis, v / np.linalg.norm(v)])
        v = matrix @ basis[:, -1]
    small = basis.T @ matrix @ basis
    return -basis @ np.linalg.solve(small, basis.T @ np.asarray(gradient))


def damped(name, damping):
    """The matrix of the model."""
    d = dense(name)
    return d.gauss_newton + damping * np.eye(d.J.shape[1])


@pytest.mark.costly
@pytest.mark.parametrize("count", [1, 3])
def test_iterates_in_outputs_are_those_in_parameters(count):
    best = krylov(damped("softmax", 0.01), dense("softmax").gradient, count)
    for flag in (False, True):
        oracle = GaussNewton(0.01, CG(count, 0.0, in_outputs=flag))
        close(run(oracle, "softmax")[0], best)


@pytest.mark.costly
@every_loss
def test_strong_damping_gives_the_gradient(name):
    step, _ = run(GaussNewton(1e8), name)
    gradient = dense(name).gradient
    np.testing.assert_allclose(-1e8 * step, gradient, rtol=1e-5, atol=1e-7)
    scaled, _ = run(GaussNewton(1e8), name, scale="gradient")
    close(-scaled, -1e8 * step)


def test_a_linear_model_interpolates_in_one_step():
    net = dp.Network([eqx.nn.Linear(4, K, key=KEYS[2])])
    inputs, targets = INPUTS[:3], REAL[:3]
    vd = dp.value_and_direction(Squared(), GaussNewton(1e-12))
    _, direction = vd(net, inputs, targets)
    new = eqx.apply_updates(net, jax.tree.map(jnp.negative, direction))
    close(jax.vmap(new)(inputs), targets, rtol=1e-8)


@pytest.mark.costly
@pytest.mark.parametrize("stack", [False, True])
def test_the_layerwise_gram_matrix(stack):
    layers = [eqx.nn.Linear(4, K, key=KEYS[2]), jnp.tanh]
    for i in range(4):
        layers += [eqx.nn.Linear(K, K, key=KEYS[3 + i]), jnp.tanh]
    net = dp.Network(layers, stack=stack)

    @jax.jit
    def matrices():
        here = at("softmax", net=net)
        assert here.layers
        factor = here.loss.factor(here.outputs, here.targets)
        solver = Cholesky(batch_size=7)
        without = dataclasses.replace(here, layers=None)
        row = lambda e: ravel_pytree(here.transpose_mv(factor.mv(e)))[0]
        rows = jax.vmap(row)(jnp.eye(M * K).reshape(-1, M, K))
        whitened = solver.whitened(here, factor), solver.whitened(without, factor)
        return *whitened, gram(here.layers, here, factor), rows @ rows.T

    with_model, *others = matrices()
    for other in others:
        close(with_model, other)


def test_the_gramian_recursion():
    # G_{t+1} = A G A' + B B' over the stages of the batch is J J'.
    net, d = network(), dense("softmax")
    x, G = INPUTS.ravel(), np.zeros((INPUTS.size,) * 2)
    for stack, params in zip(net.stacks, net.params, strict=True):
        w, unravel = ravel_pytree(params)
        rest = eqx.filter(stack.stage, eqx.is_inexact_array, inverse=True)

        def f(x, w, unravel=unravel, rest=rest):
            stage = eqx.combine(unravel(w), rest)
            return jax.vmap(stage)(x.reshape(M, -1)).ravel()

        both = jax.jit(lambda x, w, f=f: (jax.jacobian(f, (0, 1))(x, w), f(x, w)))
        (A, B), x = jax.tree.map(np.asarray, both(x, w))
        G = A @ G @ A.T + B @ B.T
    close(G, d.J @ d.J.T)
    alpha = np.linalg.solve(d.H @ G + 0.1 * np.eye(M * K), 0.1 * d.g)
    close(-d.J.T @ alpha / 0.1, d.step(0.1))


def test_the_true_class_against_the_rest():
    # diag(p) - p p' = p_y (1 - p_y) a a' + (1 - p_y) Cov(q): splitting the loss at the
    # margin keeps the first term.
    loss = SoftmaxCrossEntropy()
    u, y = REAL[:1], jnp.array([1])
    hessian = jax.jit(jax.vmap(lambda e: loss.hessian_mv(u, y, e[None])[0]))
    p = np.exp(u[0]) / np.exp(u[0]).sum()
    q = np.where(np.arange(K) == 1, 0, p) / (1 - p[1])
    a = np.eye(K)[1] - q
    cov = np.diag(q) - np.outer(q, q)
    split = p[1] * (1 - p[1]) * np.outer(a, a) + (1 - p[1]) * cov
    close(split, np.diag(p) - np.outer(p, p), rtol=1e-14)
    close(split, hessian(jnp.eye(K)), rtol=1e-14)


def test_a_metric_is_a_change_of_variables():
    metric = jax.tree.map(lambda a: 1 + a**2, network().params)
    weights = ravel_pytree(metric)[0]
    step, _ = run(GaussNewton(0.1, metric=at_model(metric)), "softmax")
    d = dense("softmax")
    close(step, -np.linalg.solve(d.gauss_newton + 0.1 * np.diag(weights), d.gradient))


def at_model(params):
    """Parameters arranged as in the model itself."""
    net = network().with_params(params)
    return eqx.filter(net, eqx.is_inexact_array)


# Exact Gauss-Newton and its relatives ---------------------------------------------


def test_one_example_is_normalized_least_mean_squares():
    model = eqx.nn.Linear(4, 1, key=KEYS[2])
    x, y = INPUTS[:1], jnp.array([[0.7]])
    _, direction = dp.value_and_direction(Squared(), GaussNewton(0.3))(model, x, y)
    r, J2 = y[0, 0] - model(x[0])[0], jnp.sum(x**2) + 1
    close(-direction.weight, r * x / (J2 + 0.3))


def test_stacked_least_squares():
    d = dense("squared")
    A = np.concatenate([d.J, np.sqrt(0.1 * M) * np.eye(d.J.shape[1])])
    b = np.concatenate([-M * d.g, np.zeros(d.J.shape[1])])
    close(run(GaussNewton(0.1), "squared")[0], np.linalg.lstsq(A, b)[0])


@pytest.mark.parametrize("solver", ["Cholesky", "CG", "dual CG"])
def test_predicted_decreases_of_the_exact_step(solver):
    step, aux = run(EXACT[solver], "softmax")
    gradient = dense("softmax").gradient
    close(aux.decrease, step @ (0.1 * step - gradient) / 2)
    damped = dense("softmax").decrease(step) - 0.1 * step @ step / 2
    close(damped, -gradient @ step / 2)
    # No step at all satisfies both.
    assert damped > 0


@pytest.mark.costly
@pytest.mark.parametrize("solver", ["Cholesky", "CG", "dual CG"])
def test_repeating_the_batch_changes_nothing(solver):
    loss, targets = LOSSES["softmax"]
    vd = dp.value_and_direction(loss, EXACT[solver])
    twice = lambda a: jnp.concatenate([a, a])
    value, direction = vd(network(), INPUTS, targets)
    again, same = vd(network(), twice(INPUTS), twice(targets))
    close(value, again)
    close(ravel_pytree(direction)[0], ravel_pytree(same)[0])
    close(-ravel_pytree(same)[0], dense("softmax").step(0.1))


def test_sums_count_the_examples():
    step, _ = run(GaussNewton(0.1 * M), "softmax", reduction="sum")
    close(step, dense("softmax").step(0.1))


def test_the_whole_space_as_random_subspace():
    here = at("softmax")
    flat, unravel = ravel_pytree(here.params)

    @jax.jit
    def whole():
        V = jax.vmap(unravel)(jnp.eye(flat.size))
        return RandomSubspace().within(here, jnp.asarray(0.1), V).step

    step = whole()
    close(ravel_pytree(step)[0], dense("softmax").step(0.1))


def test_a_random_subspace_holds_the_best_step():
    d, key = dense("softmax"), jr.key(3)
    vd = dp.value_and_direction(
        LOSSES["softmax"][0], GaussNewton(0.1, RandomSubspace(5)), has_aux=True
    )
    (_, aux), direction = vd(network(), INPUTS, LABELS, key=key)
    step = -ravel_pytree(direction)[0]
    total = lambda d_: d.decrease(d_) - 0.1 * d_ @ d_ / 2
    assert 0 < total(step) < total(d.step(0.1))
    assert total(step) > max(total(0.99 * step), total(1.01 * step))
    with pytest.raises(ValueError, match="give the call a `key`"):
        vd(network(), INPUTS, LABELS)


# Few iterations -------------------------------------------------------------------


def test_scaling_the_model_saves_a_truncated_dual_step():
    d, damping = dense("softmax"), 1e-3
    plain = DualGaussNewton(damping, DualCG(1, 0.0), scale_model=False)
    scaled = DualGaussNewton(damping, DualCG(1, 0.0))
    (a, aux_a), (b, aux_b) = run(plain, "softmax"), run(scaled, "softmax")
    close(aux_a.decrease, d.decrease(a))
    close(aux_b.decrease, d.decrease(b))
    close(b / np.linalg.norm(b), a / np.linalg.norm(a))
    total = lambda s: d.decrease(s) - damping * s @ s / 2
    assert total(a) < 0 < total(b)
    assert total(b) > max(total(0.99 * b), total(1.01 * b))


def test_a_warm_start_continues():
    loss, targets = LOSSES["softmax"]
    oracle = GaussNewton(0.01, CG(3, 0.0, warm_start=1.0))
    vd = dp.value_and_direction(loss, oracle)
    net, d = network(), dense("softmax")
    state, decreases = vd.init(net), []
    matrix, desired = damped("softmax", 0.01), np.zeros_like(d.gradient)
    for _ in range(4):
        (_, aux), direction, state = vd.step(net, state, INPUTS, targets)
        step = np.asarray(-ravel_pytree(direction)[0])
        desired = desired + krylov(matrix, d.gradient + matrix @ desired, 3)
        # The model is scaled: the length is the best along the step.
        desired = desired * -(d.gradient @ desired) / (desired @ matrix @ desired)
        close(step, desired)
        decreases.append(aux.decrease - 0.01 * step @ step / 2)
    best = d.step(0.01)
    short = d.decrease(best) - 0.01 * best @ best / 2 - jnp.stack(decreases)
    assert np.all(np.diff(short) < 0) and short[-1] >= 0


def test_auto_is_dense_where_that_is_cheap():
    wide = eqx.nn.Linear(256, 256, key=KEYS[2])

    def choice(model, rows, **options):
        predict = lambda params: (jnp.tile(params.bias, (rows, 1)), None)
        params = eqx.filter(wide, eqx.is_inexact_array)
        others = Squared(), jnp.ones((rows, 256)), None, "mean"
        layers = Layers(model, None, model, model, mapped=True)
        return Auto(**options).choose(linearize(predict, params, *others, layers)[0])

    assert isinstance(choice(dp.Network([wide]), 16), CG)
    assert isinstance(choice(wide, 1), CG)
    chosen = choice(wide, 16, in_outputs=True)
    assert isinstance(chosen, CG) and chosen.in_outputs
    here = at("softmax")
    assert isinstance(Auto().choose(here), Cholesky)


# Precision ------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("name", ["softmax", "squared"])
def test_whitened_solves_in_float32(name, damping):
    keys = jr.split(jr.key(0), 4)
    net = dp.Network(
        [
            eqx.nn.Linear(20, 40, key=keys[0]),
            jnp.tanh,
            eqx.nn.Linear(40, 10, key=keys[1]),
        ]
    )
    inputs = jr.normal(keys[2], (32, 20))
    targets = jr.randint(keys[3], (32,), 0, 10)
    if name == "squared":
        targets = jax.nn.one_hot(targets, 10)
    vd = dp.value_and_direction(LOSSES[name][0], GaussNewton(damping, Cholesky()))
    _, desired = vd(net, inputs, targets)
    cast = lambda a: a.astype("f4") if eqx.is_inexact_array(a) else a
    _, found = vd(*jax.tree.map(cast, (net, inputs, targets)))
    desired, found = (ravel_pytree(d)[0] for d in (desired, found))
    assert found.dtype == jnp.float32
    error = np.linalg.norm(np.float64(found) - desired) / np.linalg.norm(desired)
    assert error < 1e-5


# Failures -------------------------------------------------------------------------


def test_losses_that_are_not_convex():
    bad = lambda u, y: jnp.sum(jnp.cos(u), 1)
    for solver in (Cholesky(), CG(5), DualCG(5)):
        vd = dp.value_and_direction(bad, GaussNewton(1e-3, solver))
        with pytest.raises(dp.SolveError, match="not positive definite"):
            vd(network(), INPUTS, LABELS)


def test_a_gradient_that_is_not_finite_where_the_loss_is():
    norm = lambda w, x: 1 + jnp.sqrt(jnp.sum(w**2)) * x[:, :1]  # 0/0 at w = 0
    for solver in (CG(5), CG(5, warm_start=0.9), CG(5, in_outputs=True), DualCG(5)):
        vd = dp.value_and_direction(Squared(), GaussNewton(1.0, solver), norm)
        with pytest.raises(dp.SolveError, match="A derivative is not finite"):
            vd(jnp.zeros(3), INPUTS, jnp.zeros((len(INPUTS), 1)))


@pytest.mark.parametrize("oracle", [GaussNewton, DualGaussNewton, Gradient])
@pytest.mark.parametrize("damping", [0.0, -1, float("nan")])
def test_damping_is_positive(oracle, damping):
    with pytest.raises(ValueError, match="a number > 0 is expected"):
        oracle(damping)


@pytest.mark.parametrize("solver", [CG, DualCG, Auto, RandomSubspace, Cholesky])
def test_counts_are_positive(solver, unchecked):
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match="a Python int >= 1 is expected"):
            solver(count)
