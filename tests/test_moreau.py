"""Moreau-gradient back-propagation: exact identities, and the limits of its solvers."""

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
from diffprog.oracles import (
    ChainRule,
    InnerGaussNewton,
    InnerGradient,
    InnerNewton,
    InverseRule,
    MoreauBackprop,
    MoreauRule,
    prox_prop,
)
from diffprog.oracles._rules import RuleBoundary

from . import helpers


ONE = InnerGradient(num_steps=1)
EXACT = InnerNewton(num_steps=12)
BY_CG = InnerNewton(num_steps=12, max_dense=0, rtol=1e-12)


close = ft.partial(helpers.close, scale=1.0)


@jax.jit
def run(rule, fn, x, message):
    return rule.pull(fn, x, message)


class Curved(eqx.Module):
    """A layer that is far from affine."""

    W: jax.Array

    def __call__(self, x):
        return jnp.tanh(self.W @ x) + 0.3 * jnp.sin(x[0])


class Affine(eqx.Module):
    A: jax.Array
    c: jax.Array

    def __call__(self, x):
        return self.A @ x + self.c


class Quadratic(eqx.Module):
    Q: jax.Array

    def __call__(self, x):
        return 0.5 * x @ self.Q @ x


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def normal(seed, *shape):
    return jnp.asarray(drawn(seed, *shape))


def of_norm(size, matrix):
    return jnp.asarray(size * matrix / np.linalg.norm(matrix, 2))


A, Z, LAM = normal(0, 4, 3), normal(1, 3), normal(2, 4)
CURVED, AFFINE = Curved(of_norm(2.0, drawn(3, 4, 3))), Affine(A, normal(4, 4))
# The norm of the Hessian of <lam, CURVED> is at most max |lam| (0.77 |W|^2 + 4 * 0.3).
SMALL = jnp.asarray(0.2 * drawn(2, 4) / np.max(np.abs(drawn(2, 4))))
S = drawn(5, 3, 3)
Q = jnp.asarray(S @ S.T + np.eye(3))
ONE_WEIGHT = jnp.asarray(1.0)


def jacobian(fn, x=Z):
    return jax.jit(jax.jacobian(fn))(x)


# Envelopes ------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [EXACT, BY_CG, InnerGradient(400, 0.2)])
def test_gradient_and_prox_of_a_quadratic_function(solver):
    alpha = jnp.asarray(0.3)
    g = run(MoreauRule(solver), Quadratic(Q), Z, alpha)
    close(g, alpha * Q @ np.linalg.solve(np.eye(3) + alpha * Q, Z))
    prox = np.linalg.solve(np.eye(3) + alpha * Q, Z)
    close(Z - g, prox)


def test_absolute_value_gives_the_huber_function():
    """Gradient steps on |x|, where |x| > alpha: y = -alpha sign(x)."""
    x, alpha = jnp.asarray([3.0, -2.0, 0.7]), 0.5 * ONE_WEIGHT
    absolute = lambda x: jnp.sum(jnp.abs(x))
    g = MoreauRule(ONE).pull(absolute, x, alpha)
    close(g, jnp.clip(x, -0.5, 0.5))
    huber = jnp.sum(jnp.where(jnp.abs(x) <= 0.5, x**2 / 2, 0.5 * (jnp.abs(x) - 0.25)))
    close(alpha * absolute(x - g) + g @ g / 2, huber)


@pytest.mark.parametrize("rule", [MoreauRule(ONE), InverseRule(2.0, ONE)])
def test_one_unit_gradient_step_is_the_chain_rule(rule):
    # Operation by operation: a compiled program may round in another way.
    close(rule.pull(CURVED, Z, LAM), jax.vjp(CURVED, Z)[1](LAM)[0], 1e-15)


def test_one_gauss_newton_step_in_both_forms():
    J, gamma = jacobian(CURVED), 0.7
    primal = np.linalg.solve(J.T @ J + gamma * np.eye(3), J.T @ LAM)
    dual = J.T @ np.linalg.solve(J @ J.T + gamma * np.eye(4), LAM)
    close(primal, dual)
    close(run(InverseRule(gamma), CURVED, Z, LAM), primal)
    matrix_free = InnerGaussNewton(max_dense=0, rtol=1e-14)
    close(run(InverseRule(gamma, matrix_free), CURVED, Z, LAM), primal)
    wide = Affine(A.T, jnp.zeros(3))  # more inputs than outputs: the other form
    expected = A @ np.linalg.solve(A.T @ A + gamma * np.eye(3), Z)
    close(run(InverseRule(gamma), wide, LAM, Z), expected)


@pytest.mark.parametrize(
    "solver", [ONE, InnerGradient(5), InnerGaussNewton(2), InnerNewton(2)]
)
def test_affine_layers_follow_the_chain_rule(solver):
    close(run(MoreauRule(solver), AFFINE, Z, LAM), A.T @ LAM)
    if solver.exact:
        ridge = np.linalg.solve(A.T @ A + np.eye(3), A.T @ LAM)
        close(run(InverseRule(1.0, solver), AFFINE, Z, LAM), ridge)


def test_exact_chain_rule_of_a_quadratic_function():
    """grad env(f o g) = A' mu*, for a quadratic f after an affine g."""
    P, q, alpha = normal(6, 4, 4), normal(7, 4), 0.4
    P = P @ P.T + np.eye(4)
    c, eye = AFFINE.c, np.eye(4)
    f = lambda z: 0.5 * z @ P @ z + q @ z
    matrix = np.linalg.inv(alpha * P) + A @ A.T
    mu = np.linalg.solve(matrix, A @ Z + c + np.linalg.solve(P, q))
    g = MoreauRule(EXACT).pull(lambda x: f(AFFINE(x)), Z, alpha * ONE_WEIGHT)
    close(g, A.T @ mu)
    # The rule takes one step towards mu*: grad env(alpha f) in place of it.
    one = MoreauRule(EXACT).pull(f, AFFINE(Z), alpha * ONE_WEIGHT)
    close(one, np.linalg.solve(eye + alpha * P, alpha * (P @ AFFINE(Z) + q)))


def test_inverse_with_large_gamma_tends_to_the_chain_rule():
    for solver in (InnerGaussNewton(3), InnerNewton(3)):
        g = run(InverseRule(1e9, solver), CURVED, Z, LAM)
        close(1e9 * g, jax.vjp(CURVED, Z)[1](LAM)[0], 1e-7)


def test_the_message_is_the_derivative_of_the_envelope():
    lam, rule = SMALL, MoreauRule(EXACT)

    @jax.jit
    def envelope(x):
        y = -rule.pull(CURVED, x, lam)
        return lam @ CURVED(x + y) + y @ y / 2

    e = 1e-5 * np.eye(3)
    numeric = [(envelope(Z + d) - envelope(Z - d)) / 2e-5 for d in e]
    close(run(rule, CURVED, Z, lam), jnp.stack(numeric), 1e-9)


# The table of what inner solvers recover -------------------------------------------


def test_one_newton_step():
    lam = SMALL
    gradient = jax.vjp(CURVED, Z)[1](lam)[0]
    C = jax.jit(jax.hessian(lambda x: lam @ CURVED(x)))(Z)
    one = InnerNewton(1)
    plain = np.linalg.solve(np.eye(3) + C, gradient)
    close(run(MoreauRule(one), CURVED, Z, lam), plain)
    by_cg = InnerNewton(1, max_dense=0, rtol=1e-14)
    close(run(MoreauRule(by_cg), CURVED, Z, lam), plain)
    J = jacobian(CURVED)
    fitted = np.linalg.solve(J.T @ J + 2 * np.eye(3) + C, gradient)
    close(run(InverseRule(2.0, one), CURVED, Z, lam), fitted)


def test_gauss_newton_steps_of_the_moreau_rule_are_unit_gradient_steps():
    steps = [run(MoreauRule(s(3)), CURVED, Z, SMALL)
             for s in (InnerGaussNewton, InnerGradient)]  # fmt: skip
    close(*steps)


def test_gradient_steps_converge_and_loops_are_what_is_written_out():
    lam, gamma = 0.5 * SMALL, 1.0
    for rule in (lambda s: MoreauRule(s), lambda s: InverseRule(gamma, s)):
        exact = run(rule(EXACT), CURVED, Z, lam)
        close(run(rule(InnerGradient(2000, 0.1)), CURVED, Z, lam), exact)
    by_cg = lambda num_steps, unroll: InnerNewton(num_steps, 0, 2, unroll=unroll)
    for kind in (InnerGradient, InnerGaussNewton, by_cg):
        pair = [kind(3, unroll=unroll) for unroll in (True, False)]
        first, second = (run(InverseRule(gamma, s), CURVED, Z, lam) for s in pair)
        close(first, second, 1e-14)


def test_exact_inverse_of_an_invertible_layer_is_target_propagation():
    W = of_norm(1.0, drawn(8, 3, 3)) + 2 * np.eye(3)
    layer, lam = (lambda x: W @ x + 0.1 * jnp.sin(W @ x)), 0.1 * Z
    target = layer(Z) - lam
    g = InverseRule(1e-12, InnerGaussNewton(20)).pull(layer, Z, lam)
    close(layer(Z - g), target, 1e-10)


def test_a_problem_that_is_not_convex_gives_nan():
    saddle = Quadratic(-Q)
    for solver in (InnerNewton(), InnerNewton(max_dense=0)):
        assert np.all(np.isnan(run(MoreauRule(solver), saddle, Z, 3 * ONE_WEIGHT)))
    nan = run(InverseRule(1.0, InnerGaussNewton(max_dense=0)), CURVED, Z, jnp.nan * LAM)
    assert np.all(np.isnan(nan))


# Networks -------------------------------------------------------------------------


X, Y = normal(9, 7, 3), jnp.asarray(np.arange(7) % 2)
LOSS = dp.losses.SoftmaxCrossEntropy()


def layers(dtype=jnp.float64):
    keys = jr.split(jr.key(0), 3)
    linear = lambda n, m, key: eqx.nn.Linear(n, m, key=key, dtype=dtype)
    return [linear(3, 4, keys[0]), jnp.tanh, linear(4, 4, keys[1]), jax.nn.softplus,
            linear(4, 2, keys[2])]  # fmt: skip


def small(dtype=jnp.float64):
    first, tanh, _, _, last = layers(dtype)
    return dp.Network([first, tanh, last])


class Marked(eqx.Module):
    """The same as a network, but fanned out: a value is used twice."""

    first: RuleBoundary
    second: RuleBoundary
    last: eqx.nn.Linear

    def __init__(self):
        first, tanh, second, softplus, last = layers()
        self.first = dp.rule_boundary(dp.Stage((first, tanh)))
        self.second = dp.rule_boundary(dp.Stage((second, softplus)))
        self.last = last

    def __call__(self, x):
        x = self.first(x)
        return self.last(x + self.second(self.second(x)))


def direction(oracle, model, loss: Any = LOSS, targets=Y, inputs=X, **options: Any):
    vd = dp.value_and_direction(loss, oracle, **options)
    return vd(model, inputs, targets)[1]


def mean_gradient(model):
    def mean(model):
        return jnp.mean(LOSS(jax.vmap(model)(X), Y))

    return eqx.filter_jit(eqx.filter_grad(mean))(model)


CHAIN: Any = dict(state=ChainRule(), weights=ChainRule(), seed=ChainRule())
ONCE: Any = dict(state=MoreauRule(ONE), weights=InverseRule(1.0, ONE), seed=ChainRule())


@pytest.mark.costly
@pytest.mark.parametrize(
    "model, rules",
    [(dp.Network, CHAIN), (dp.Network, ONCE | dict(split=True)), (Marked, ONCE)],
    ids=["net", "split", "dag"],
)
def test_rules_that_are_the_chain_rule_give_the_gradient(model, rules):
    model = Marked() if model is Marked else dp.Network(layers())
    found = direction(MoreauBackprop(0.5, **rules), model)
    close(found, jtu.tree_map(lambda g: 0.5 * g, mean_gradient(model)), 1e-14)


def test_small_alpha_gives_the_gradient():
    net = small()
    gradient = mean_gradient(net)
    for oracle in (
        MoreauBackprop(1e-6, seed=MoreauRule(InnerNewton(4))),
        prox_prop(1.0, 1e8),
        MoreauBackprop(1e-6, MoreauRule(InnerNewton(1)), InverseRule(1e6), split=True),
    ):
        close(direction(oracle, net, scale="gradient"), gradient, 2e-4)


def test_stationary_where_the_loss_is():
    net = small()
    targets = jax.vmap(net)(X)
    for oracle in (MoreauBackprop(5.0), prox_prop(5.0)):
        found = direction(oracle, net, dp.losses.Squared(), targets)
        close(found, jtu.tree_map(jnp.zeros_like, found), 1e-14)
        elsewhere = direction(oracle, net, dp.losses.Squared(), targets + 1)
        assert np.linalg.norm(ravel_pytree(elsewhere)[0]) > 0.1


def test_prox_prop_on_a_linear_layer_is_ridge_regression():
    """g = (X'X + gamma I)^-1 X' Lam over the batch; one example alone is another."""
    alpha, gamma = 2.0, 0.3
    linear = eqx.nn.Linear(3, 2, key=jr.key(1))
    Lam = jax.jit(lambda X: alpha / 7 * LOSS.gradient(jax.vmap(linear)(X), Y))(X)
    X1, known = np.concatenate([X, np.ones((7, 1))], 1), np.asarray(Lam)
    ridge = np.linalg.solve(X1.T @ X1 + gamma * np.eye(4), X1.T @ known).T
    oracle = prox_prop(alpha, gamma)
    found = direction(oracle, dp.Network([linear]))
    close(jtu.tree_leaves(found), [ridge[:, :3], ridge[:, 3]])
    # The same from a solver that knows nothing of dense layers.
    other = InnerGaussNewton(max_dense=0, rtol=1e-14)
    fn = lambda linear: jax.vmap(linear)(X)
    again = jax.jit(lambda Lam: InverseRule(gamma, other).pull(fn, linear, Lam))(Lam)
    close(jtu.tree_leaves(again), [ridge[:, :3], ridge[:, 3]])

    class Model(eqx.Module):
        layer: RuleBoundary

        def __call__(self, x):
            return self.layer(x)

    apart = direction(oracle, Model(dp.rule_boundary(linear)))
    one = lambda x, lam: np.linalg.solve(
        np.outer(x, x) + gamma * np.eye(4), np.outer(x, lam)
    )
    each = np.sum([one(*row) for row in zip(X1, known)], 0).T
    close(jtu.tree_leaves(apart), [each[:, :3], each[:, 3]])
    assert np.linalg.norm(each - ridge) > 0.1 * np.linalg.norm(ridge)


@pytest.mark.slow
def test_batch_and_examples_apart_differ_for_moreau_and_agree_for_one_example():
    stages = [dp.Stage(tuple(layers()[:2])), layers()[-1]]
    marked = eqx.nn.Sequential(
        [eqx.nn.Lambda(dp.rule_boundary(stage)) for stage in stages]
    )
    oracle = MoreauBackprop(20.0)
    net = small()
    both = [direction(oracle, model) for model in (net, marked)]
    a, b = (ravel_pytree(d)[0] for d in both)
    assert 1e-3 < np.linalg.norm(a - b) / np.linalg.norm(b) < 1
    both = [direction(oracle, m, targets=Y[:1], inputs=X[:1]) for m in (net, marked)]
    one, other = map(jtu.tree_leaves, both)
    close(one, other)


def test_split_takes_a_stage_apart():
    """By hand: the activation, then the dense layer, each with its own problem."""
    linear, tanh = layers()[:2]
    rule = MoreauRule(InnerNewton(6))
    rules: Any = dict(state=rule, weights=rule, seed=ChainRule())
    loss, targets = dp.losses.Squared(), normal(10, 7, 4)
    net = dp.Network([linear, tanh])
    z = jax.vmap(linear)(X)
    residual = tanh(z) - targets
    # So small that all problems are convex: |tanh''| < 0.77.
    squares = jnp.sum(X**2, 1, keepdims=True) + 1
    alpha = float(1 / jnp.max(jnp.mean(jnp.abs(residual) * squares, 0)))
    found = direction(MoreauBackprop(alpha, split=True, **rules), net, loss, targets)
    lam = alpha / 7 * residual
    lam = jax.jit(jax.vmap(lambda z, lam: rule.pull(tanh, z, lam)))(z, lam)
    close(jtu.tree_leaves(found), [lam.T @ X, jnp.sum(lam, 0)])
    whole = direction(MoreauBackprop(alpha, **rules), net, loss, targets)
    whole, found = ravel_pytree(whole)[0], ravel_pytree(found)[0]
    assert np.linalg.norm(whole - found) > 1e-2 * np.linalg.norm(found)


@pytest.mark.slow
def test_equal_stages_in_a_loop_are_the_same_as_written_out():
    keys = jr.split(jr.key(2), 5)
    parts = sum(([eqx.nn.Linear(3, 3, key=key), jnp.tanh] for key in keys), [])
    loss, targets = dp.losses.Squared(), normal(11, 7, 3)
    for oracle in (MoreauBackprop(4.0), prox_prop(4.0)):
        found = []
        for stack in (True, False):
            net = dp.Network(parts, stack=stack)
            stacks = direction(oracle, net, loss, targets).stacks
            found.append([s.row(i) for s in stacks for i in range(s.size)])
        close(*found)
        assert all(jnp.any(d != 0) for d in jtu.tree_leaves(found))


@pytest.mark.slow
def test_jit_equals_eager_and_float32_is_kept():
    dtype = jnp.float32
    net = small(dtype)
    vd = dp.value_and_direction(LOSS, MoreauBackprop(2.0), has_aux=True)
    inputs = X.astype(dtype)
    (value, aux), found = vd(net, inputs, Y)
    assert {a.dtype for a in jtu.tree_leaves((value, found))} == {jnp.dtype(dtype)}
    assert aux.result == dp.RESULTS.successful and aux.slope < 0
    (_, _), again = eqx.filter_jit(vd)(net, inputs, Y)
    close(found, again, 1e-6)


def test_seeds():
    """The envelope of the weighted loss, for each example; and its plain gradient."""
    squared = dp.losses.as_loss(lambda u, y: jnp.sum((u - y) ** 2, 1) / 2)
    linear = dp.Network([eqx.nn.Linear(3, 2, key=jr.key(1))])
    targets, alpha = normal(12, 7, 2), 3.0
    residual = jax.vmap(linear)(X) - targets
    for reduction, t in (("mean", alpha / 7), ("sum", alpha)):
        for loss, seed, lam in (
            (dp.losses.Squared(), MoreauRule(), t / (1 + t) * residual),
            (squared, MoreauRule(InnerNewton(1)), t / (1 + t) * residual),
            (squared, ChainRule(), t * residual),
        ):
            oracle = MoreauBackprop(alpha, ChainRule(), ChainRule(), seed)
            found = direction(oracle, linear, loss, targets, reduction=reduction)
            close(jtu.tree_leaves(found), [lam.T @ X, jnp.sum(lam, 0)])


def test_rules_are_not_homogeneous():
    net = small()
    once, twice = (direction(MoreauBackprop(a), net) for a in (10.0, 20.0))
    once, twice = ravel_pytree(once)[0], ravel_pytree(twice)[0]
    assert np.linalg.norm(2 * once - twice) > 1e-2 * np.linalg.norm(twice)


def test_integer_inputs_and_layers_without_parameters():
    embed, last = (
        eqx.nn.Embedding(5, 3, key=jr.key(3)),
        eqx.nn.Linear(3, 2, key=jr.key(4)),
    )
    net = dp.Network([embed, jnp.tanh, last])
    tokens = jnp.arange(7) % 5
    mean = lambda net: jnp.mean(LOSS(jax.vmap(net)(tokens), Y))
    gradient = eqx.filter_jit(eqx.filter_grad(mean))(net)
    found = direction(MoreauBackprop(1.0, **ONCE), net, inputs=tokens)
    close(found, gradient, 1e-14)


def test_failure_is_reported():
    saddle = dp.losses.as_loss(lambda u, y: -jnp.sum((u - y[:, None]) ** 2, 1))
    net, targets = small(), normal(13, 7)
    oracle = MoreauBackprop(50.0, seed=MoreauRule(InnerNewton()))
    vd = dp.value_and_direction(saddle, oracle)
    with pytest.raises(dp.SolveError):
        vd(net, X, targets)
    (_, aux), found, _ = vd.step(net, vd.init(net), X, targets)
    assert aux.result == dp.RESULTS.factorization_failed
    close(found, jtu.tree_map(jnp.zeros_like, found), 0.0)


def test_wrong_calls_say_what_to_do():
    net, mlp = dp.Network(layers()), eqx.nn.MLP(3, 2, 4, 1, key=jr.key(0))
    with pytest.raises(TypeError, match=r"dp.Network\(layers\).*rule_boundary"):
        direction(MoreauBackprop(), mlp)
    twice = lambda net, x: 2 * jax.vmap(net)(x)
    with pytest.raises(ValueError, match="leave out `predict` and `key`"):
        direction(MoreauBackprop(), net, predict=twice)
    with pytest.raises(TypeError, match="has no inverse"):
        MoreauBackprop(seed=InverseRule())
    for wrong in (
        lambda: MoreauBackprop(0.0),
        lambda: InverseRule(-1.0),
        lambda: InnerGradient(0),
        lambda: InnerGradient(3, 0.0),
        lambda: InnerNewton(True),
        lambda: dp.MoreauGradient(0.0),
    ):
        with pytest.raises(ValueError, match="is expected"):
            wrong()


def test_wrong_rules(unchecked):
    with pytest.raises(TypeError, match="dp.oracles.MoreauRule"):
        MoreauBackprop(state="chain")  # pyright: ignore


# Control --------------------------------------------------------------------------


def by_hand(problem, x0, us, alpha, solver):
    """The recursion in a Python loop."""
    xs = [x0]
    for t, u in enumerate(us):
        xs.append(problem.dynamics(xs[-1], u, t))
    pull = MoreauRule(solver).pull
    mu = pull(problem.terminal_cost, xs[-1], alpha)
    found = []
    for t in reversed(range(len(us))):
        f = lambda x, u: (problem.dynamics(x, u, t), problem.cost(x, u, t))
        message = (mu, alpha)
        found.append(-pull(lambda u: f(xs[t], u), us[t], message))
        mu = pull(lambda x: f(x, us[t]), xs[t], message)
    return jnp.stack(found[::-1])


@pytest.mark.costly
@pytest.mark.parametrize("solver", [InnerNewton(3), InnerGradient(2)])
def test_control_equals_the_recursion_written_out(solver):
    problem, x0, us = helpers.spring(T=4)
    method = dp.MoreauGradient(0.2, solver)
    du, result = dp.direction(problem, method, x0, us)
    assert result == dp.RESULTS.successful
    step = jax.jit(lambda alpha: by_hand(problem, x0, us, alpha, solver))
    close(du, step(0.2 * ONE_WEIGHT))
    damped, _ = dp.direction(problem, method, x0, us, damping=5.0)
    close(damped, step(0.1 * ONE_WEIGHT))


@pytest.mark.slow
def test_control_by_one_gradient_step_is_the_gradient():
    problem, x0, us = helpers.two_phase()
    du, _ = dp.direction(problem, dp.MoreauGradient(0.5, ONE), x0, us)
    gradient, _ = dp.direction(problem, dp.Gradient(), x0, us)
    close(du, jtu.tree_map(lambda g: 0.5 * g, gradient))
    assert all(jnp.any(d != 0) for d in jtu.tree_leaves(du))


def test_control_is_a_network_whose_loss_is_the_terminal_cost():
    """The same messages from both doors, for a stage that is a layer."""
    stage = Curved(normal(14, 3, 3))
    net = dp.Network([stage, jnp.tanh])
    problem = dp.ControlProblem(
        lambda x, u, t: jnp.tanh(Curved(u)(x)),
        lambda x, u, t: jnp.zeros((), x.dtype),
        lambda x: jnp.sum((x - 0.3) ** 2) / 2,
        1,
    )
    # So small that all problems are convex.
    solver, alpha = InnerNewton(4), 0.4 / (1 + float(Z @ Z))
    method = dp.MoreauGradient(alpha, solver)
    du, _ = dp.direction(problem, method, Z, stage.W[None])
    rule = MoreauRule(solver)
    found = direction(
        MoreauBackprop(alpha, rule, rule, rule),
        net,
        dp.losses.Squared(),
        jnp.full((1, 3), 0.3),
        Z[None],
    )
    close(-du[0], *jtu.tree_leaves(found))


def test_control_fails_where_a_problem_is_not_convex_and_searches_shrink_alpha():
    hill = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * u,
        lambda x, u, t: jnp.sum(u**2),
        lambda x: jnp.sum(jnp.cos(x)),
        3,
    )
    x0, us, method = jnp.full(2, 0.1), jnp.zeros((3, 2)), dp.MoreauGradient(4.0)
    with pytest.raises(dp.SolveError, match="positive definite"):
        dp.direction(hill, method, x0, us)
    solution = dp.solve(hill, method, x0, us, max_steps=5, throw=False)
    history = solution.history
    assert np.all(np.diff(history["cost"][:6]) < 0) and history["damping"][0] > 0
    assert np.all(history["slope"][:5] < 0)
