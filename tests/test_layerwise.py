"""The exact step of a network, and the determinant and inertia of its curvature."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._chain.vector import run
from diffprog._chain.vectorize import vectorize
from diffprog._control.layerwise.door import _in_parameters
from diffprog._control.layerwise.recursion import value_and_gradient

from . import helpers
from .helpers import close


SOFTMAX, SQUARED = dp.losses.SoftmaxCrossEntropy(), dp.losses.Squared()
METHODS = dict(newton=dp.Newton(), ggn=dp.GaussNewton())
flat = lambda tree: ravel_pytree(tree)[0]


# Published networks ---------------------------------------------------------------

# Widths, activation, loss, examples, shift, damping; for Newton and Gauss-Newton the
# norm of the step, value, log |det|, first three entries and last of the step; negative
# eigenvalues of Newton's matrix.
GOLDEN = dict(
    G1=((5, 6, 4, 3), jnp.tanh, SOFTMAX, 7, 0, 0.1, dict(
        newton=(4.073928672168, 0.05181208568386, -158.3287286533, 0.2616609249413,
                -0.3339868309836, 0.783058380207, -0.0971821653351),
        ggn=(1.841910529931, -0.3885579437884, -172.2923817043, -0.1049358058346,
             0.2841503360117, -0.4161441999015, -0.06690977237482)), 14),
    G2=((3, 5, 2), jax.nn.sigmoid, SQUARED, 4, 1, 0.05, dict(
        newton=(27.99274223204, -0.6072544195639, -83.01456515183, -4.552764138228,
                1.350669917705, 2.876974649901, -13.03462346466),
        ggn=(1.578620139219, -0.1512333809851, -85.80928797818, 0.312910910456,
             -0.5287203993518, 0.2303486262266, 0.02609478468788)), 9),
    G3=((4, 4, 4, 4), jax.nn.softplus, SOFTMAX, 5, 2, 0.01, dict(
        newton=(24.34744330496, -0.2063511041987, -197.6210812361, 1.2615313408,
                -2.77231577614, -2.470622143345, -1.551964806863),
        ggn=(6.828755598692, -0.5454318010705, -258.7666368406, 1.273313387908,
             -0.7685489923679, -0.516932768169, 0.1887340788838)), 17),
    G4=((6, 3), None, SOFTMAX, 8, 3, 0.02, dict(
        newton=(4.992667717598, -1.457328717263, -55.71822709512, 1.176359621574,
                1.436268516389, -2.265752799646, -0.6600154696008),
        ggn=(4.992667717598, -1.457328717263, -55.71822709512, 1.176359621574,
             1.436268516389, -2.265752799646, -0.6600154696008)), 0),
    G5=((2, 12, 12, 2), jnp.sin, SQUARED, 3, 4, 0.001, dict(
        newton=(32.38254110877, -0.3016904059425, -876.6283181138, -0.1522972650419,
                -1.312077726521, 0.1877075338813, -0.1786657300512),
        ggn=(1.044000658087, -0.4746141903716, -1466.531121594, 0.04464244148865,
             -0.04942064912151, 0.07541219968111, 0.006168436113022)), 61),
)  # fmt: skip


def published(name):
    """A problem, its inputs, its network and the damping."""
    widths, activation, loss, m, shift, damping, *_ = GOLDEN[name]
    layers = []
    for depth, (n, k) in enumerate(zip(widths, widths[1:])):
        a, b = np.arange(1.0, k + 1)[:, None], np.arange(1.0, n + 1)
        at = depth + shift
        W = np.sin(1.7 * a + 0.9 * b + at) / np.sqrt(n)
        bias = 0.1 * np.cos(1.3 * a[:, 0] + at)
        layer = eqx.filter_eval_shape(eqx.nn.Linear, n, k, key=jr.key(0))
        own = lambda layer: (layer.weight, layer.bias)
        parts = jnp.asarray(W), jnp.asarray(bias)
        layers += [eqx.tree_at(own, layer, parts), activation]
    net, k = dp.Network(layers[:-1]), widths[-1]
    i, c = np.arange(1.0, m + 1)[:, None], np.arange(1.0, widths[0] + 1)
    targets = np.arange(m) % k
    if loss is SQUARED:
        targets = np.sin(i + 2 * np.arange(1.0, k + 1) + shift)
    inputs = np.cos(0.7 * i * c + 0.3 * i)
    problem = dp.NetworkProblem(net, loss, jnp.asarray(targets))
    return problem, jnp.asarray(inputs), net, damping


@pytest.mark.costly
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GOLDEN)
def test_published_networks(name, method):
    problem, inputs, net, damping = published(name)
    *_, values, negative = GOLDEN[name]
    given = problem, inputs, net.params, METHODS[method]
    found = dp.layerwise_lqr(*given, damping=damping, throw=False)
    d = np.asarray(flat(found.step))
    numbers = np.linalg.norm(d), found.value, found.logabsdet, *d[:3], d[-1]
    np.testing.assert_allclose(numbers, values[method], rtol=1e-10)
    negative = negative if method == "newton" else 0
    assert found.num_negative == negative
    assert (found.result == dp.RESULTS.successful) == (negative == 0)


@pytest.mark.parametrize("name", ["G1", pytest.param("G5", marks=pytest.mark.slow)])
def test_the_information_form_and_the_oracle_are_the_exact_step(name):
    problem, inputs, net, damping = published(name)
    given = problem, inputs, net.params
    found = dp.layerwise_lqr(*given, form="information", damping=damping)
    stages = dp.layerwise_lqr(*given, damping=damping)
    assert found.result == dp.RESULTS.successful
    close(found, stages, 1e-11, scale="largest")
    oracle = dp.oracles.GaussNewton(damping, solver=dp.oracles.Cholesky())
    vd = dp.value_and_direction(problem.loss, oracle)
    _, direction = vd(net, inputs, problem.targets)
    close(-flat(direction), flat(stages.step), 1e-9, scale="largest")


# One network with its dense matrices ----------------------------------------------

KEYS = jr.split(jr.key(3), 12)
INPUTS, LABELS, RHO = jr.normal(KEYS[9], (6, 3)), jnp.arange(6) % 2, 0.1
linear = lambda n, k, i: eqx.nn.Linear(n, k, key=KEYS[i])
NET = dp.Network(
    [linear(3, 4, 0), jnp.tanh, linear(4, 3, 1), jnp.tanh, linear(3, 2, 2)]
)
PROBLEM = dp.NetworkProblem(NET, SOFTMAX, LABELS)
START = INPUTS, NET.params
close_all = ft.partial(close, rtol=1e-10, scale="largest")


def outputs(w, upto=None):
    net = NET.with_params(ravel_pytree(NET.params)[1](w))
    return jax.vmap(dp.Stage(net.layers[:upto]))(INPUTS)


@ft.lru_cache
def dense():
    """Gradient, Hessian, Jacobian of the outputs, and the Hessian of the loss there."""
    mean = lambda z: jnp.mean(SOFTMAX(z.reshape(6, 2), LABELS))
    of = lambda w: outputs(w).ravel()
    w = flat(NET.params)
    d = jax.jit(lambda: helpers.dense(of, mean, w))()
    hessian = jax.jit(jax.hessian(lambda w: mean(of(w))))(w)
    return jax.tree.map(np.asarray, (d, hessian))


def matrix(method):
    d, hessian = dense()
    return hessian if method == "newton" else d.gauss_newton


@ft.lru_cache
def exact(method):
    given = PROBLEM, *START, METHODS[method]
    return dp.layerwise_lqr(*given, damping=RHO, throw=False)


every_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.costly
@every_method
def test_the_step_is_the_dense_one(method):
    C, g = matrix(method), dense()[0].gradient
    found = exact(method)
    close_all(flat(found.step), helpers.damped_step(C, g, RHO))
    if method == "ggn":
        step, _ = dp.direction(PROBLEM, METHODS[method], *START, damping=RHO)
        close_all(found.step, step)


@pytest.mark.costly
@every_method
def test_the_objective_is_the_quadratic_model_anywhere(method):
    u = jr.normal(KEYS[10], flat(NET.params).shape)

    @jax.jit
    def objective(u):
        at = vectorize(PROBLEM, *START)
        trajectory = run(at.chain, *at.ravel(*START))
        model = _in_parameters(METHODS[method], at, trajectory)
        us = at.ravel(INPUTS, ravel_pytree(NET.params)[1](u))[1]
        found = value_and_gradient(at.chain, model, us, jnp.asarray(RHO))
        return found[0], at.controls(found[1])

    value, gradient = objective(u)
    C, g = matrix(method), dense()[0].gradient
    Cu = C @ u + RHO * u
    close_all(value, g @ u + u @ Cu / 2)
    close_all(flat(gradient), g + Cu)


def eliminated(A, b, sizes):
    """Pivots of a symmetric matrix from the last block to the first, and of b."""
    stop = len(A)
    for size in reversed(sizes):
        start = stop - size
        S, H, end = A[start:stop, start:stop], A[:start, start:stop], b[start:stop]
        yield S, end
        A = A[:start, :start] - H @ np.linalg.solve(S, H.T)
        b, stop = b[:start] - H @ np.linalg.solve(S, end), start


@every_method
def test_the_value_is_half_the_slope_and_a_sum_over_pivots(method):
    g = dense()[0].gradient
    C, found = matrix(method) + RHO * np.eye(len(g)), exact(method)
    close_all(found.value, -g @ np.linalg.solve(C, g) / 2)
    sizes = [w.size for w in found.pivots]
    terms = [b @ np.linalg.solve(S, b) for S, b in eliminated(C, g, sizes)]
    close_all(found.value, -sum(terms) / 2)


@every_method
def test_determinant_and_inertia_are_those_of_the_pivots(method):
    C = matrix(method) + RHO * np.eye(flat(NET.params).size)
    found, values = exact(method), np.linalg.eigvalsh(C)
    close_all(found.logabsdet, np.linalg.slogdet(C)[1])
    assert int(found.num_negative) == np.sum(values < 0)
    assert (found.num_negative > 0) == (method == "newton")
    pivots = eliminated(C, C[0], [w.size for w in found.pivots])
    for w, (S, _) in zip(reversed(found.pivots), pivots, strict=True):
        close_all(w, np.linalg.eigvalsh(S))
    logs = [np.sum(np.log(np.abs(w))) for w in found.pivots]
    close_all(found.logabsdet, sum(logs))


# Metrics --------------------------------------------------------------------------


def kl(reference, outputs):
    old, new = map(jax.nn.log_softmax, (reference, outputs))
    return jnp.sum(jnp.exp(old) * (old - new), 1)


def renyi(a, reference, outputs):
    old, new = map(jax.nn.log_softmax, (reference, outputs))
    return jax.nn.logsumexp(a * old + (1 - a) * new, 1) / (a - 1)


def euclidean(reference, outputs):
    return jnp.sum((outputs - reference) ** 2, 1) / 2


class Mixed(eqx.Module):
    """Times their numbers; that of Renyi has an order."""

    kl: float = 0.0
    renyi: float = 0.0
    order: float = 2.0
    euclidean: float = 0.0

    def __call__(self, *pair):
        found = self.kl * kl(*pair) + self.euclidean * euclidean(*pair)
        return found + self.renyi * renyi(self.order, *pair)


def layerwise(metric, damping=RHO, **options):
    problem = dp.NetworkProblem(NET, SOFTMAX, LABELS, metric=metric)
    return flat(dp.layerwise_lqr(problem, *START, damping=damping, **options).step)


def dense_step(factor=1.0, damping=RHO):
    d = dense()[0]
    return helpers.damped_step(factor * d.gauss_newton, d.gradient, damping)


def test_the_metric_of_a_divergence():
    closest = ft.partial(close, rtol=1e-12, scale="largest")
    closest(layerwise(Mixed(kl=1.0)), dense_step())
    closest(layerwise(Mixed(kl=6.0)), dense_step(6.0))  # its sum
    for order in (0.5, 2.0):
        closest(layerwise(Mixed(renyi=1.0, order=order)), dense_step(order))
    d = dense()[0]
    J, found = d.J, layerwise(Mixed(euclidean=1.0))
    closest(found, helpers.damped_step(J.T @ J / 6, d.gradient, RHO))
    closest(layerwise(SOFTMAX), dense_step())


def test_a_direction_takes_the_metric_and_the_cost_stays_the_loss():
    thrice = lambda *pair: 3.0 * kl(*pair)
    problem = dp.NetworkProblem(NET, SOFTMAX, LABELS, metric=thrice)
    step, _ = dp.direction(problem, dp.GaussNewton(), *START, damping=RHO)
    close(flat(step), dense_step(3.0), 1e-12, scale="largest")
    cost = lambda params: dp.rollout(problem, INPUTS, params).cost
    value, gradient = jax.value_and_grad(cost)(NET.params)
    close(value, dense()[0].h, 1e-14)
    close_all(flat(gradient), dense()[0].gradient)


def test_without_a_metric_the_step_is_the_gradient():
    g = dense()[0].gradient
    close_all(layerwise(Mixed()), -g / RHO)
    close_all(1e12 * layerwise(Mixed(), 1e12), -g)
    found = dp.layerwise_lqr(PROBLEM, *START, damping=1e12)
    close(1e12 * flat(found.step), -g, 1e-10, scale="largest")


@pytest.mark.costly
@pytest.mark.parametrize("stage, layers", [(0, 2), (1, 4), (2, 5)])
def test_the_metric_of_a_stage(stage, layers):
    jacobian = jax.jit(jax.jacfwd(lambda w: outputs(w, layers).ravel()))
    J = np.asarray(jacobian(flat(NET.params)))
    desired = helpers.damped_step(J.T @ J / 6, dense()[0].gradient, RHO)
    close_all(layerwise(dp.StageMetric(stage, SQUARED)), desired)
    if stage == 0:
        found = layerwise(dp.StageMetric(stage, euclidean), form="information")
        close_all(found, desired)


@pytest.mark.slow
def test_a_metric_is_weighed_like_the_loss_and_joins_what_the_layers_add():
    problem = dp.NetworkProblem(NET, SOFTMAX, LABELS, metric=SOFTMAX)
    found = dp.layerwise_lqr(problem, *START, dp.Newton(), damping=RHO, throw=False)
    close_all(flat(found.step), flat(exact("newton").step))
    # One label does not count.
    loss, labels = dp.losses.SoftmaxCrossEntropy(ignore_label=-1), LABELS.at[2].set(-1)
    metric = dp.StageMetric(1, SQUARED)
    problem = dp.NetworkProblem(NET, loss, labels, metric=metric)
    found = dp.layerwise_lqr(problem, *START, damping=RHO)
    w, total = flat(NET.params), lambda w: jnp.sum(loss(outputs(w), labels)) / 5
    J = jax.jacfwd(lambda w: outputs(w, 4).ravel())(w)
    desired = helpers.damped_step(J.T @ J / 5, jax.grad(total)(w), RHO)
    close_all(flat(found.step), desired)


# Networks of other shapes ---------------------------------------------------------


@pytest.mark.slow
def test_equal_layers_run_in_a_loop():
    layers = [layer for i in range(4) for layer in (linear(3, 3, i), jnp.tanh)]
    problems = [
        dp.NetworkProblem(dp.Network([*layers, linear(3, 2, 5)], stack=stack), *data)
        for stack, data in ((True, (SOFTMAX, LABELS)), (False, (SOFTMAX, LABELS)))
    ]
    loop, apart = (
        dp.layerwise_lqr(p, INPUTS, p.network.params, damping=RHO) for p in problems
    )
    assert [w.shape for w in loop.pivots] == [(4, 12), (8,)]
    close_all(flat(loop.pivots), flat(apart.pivots))
    close_all(loop.value, apart.value)
    p = problems[0]
    given = p, INPUTS, p.network.params
    close_all(dp.layerwise_lqr(*given, form="information", damping=RHO), loop)
    metric = dp.StageMetric(1, euclidean)
    steps = []
    for problem in problems:
        own = dp.NetworkProblem(problem.network, SOFTMAX, LABELS, metric=metric)
        found = dp.layerwise_lqr(own, INPUTS, own.network.params, damping=RHO)
        steps.append(found.value)
    close_all(*steps)


def test_one_step_of_the_last_layer_is_the_least_squares_solution():
    features = lambda x: jnp.tanh(jnp.arange(6.0).reshape(2, 3) / 5 @ x)
    net = dp.Network([features, linear(2, 2, 0)])
    targets = jr.normal(KEYS[11], (6, 2))
    problem = dp.NetworkProblem(net, SQUARED, targets)
    found = dp.layerwise_lqr(problem, INPUTS, net.params)
    layer = jax.tree.map(jnp.add, net.params, found.step)[0].layers[1]
    A = np.concatenate([jax.vmap(features)(INPUTS), np.ones((6, 1))], 1)
    desired = np.linalg.lstsq(A, targets)[0].T
    close_all(np.column_stack([layer.weight, layer.bias]), desired)


class Both(eqx.Module):
    """Two layers as one."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return jnp.tanh(self.second(jnp.tanh(self.first(x))))


def test_merged_stages_and_passive_layers_change_nothing():
    layers: list = [*NET.layers]
    one, _, two, _, three = layers
    fold = lambda x: jnp.reshape(x, (1, -1))
    variants = (
        [Both(one, two), three],
        [one, jnp.tanh, lambda x: x, fold, jnp.ravel, two, jnp.tanh, fold, jnp.ravel,
         three],
    )  # fmt: skip
    for layers in variants:
        net = dp.Network(layers)
        problem = dp.NetworkProblem(net, SOFTMAX, LABELS)
        given = problem, INPUTS, net.params, dp.Newton()
        found = dp.layerwise_lqr(*given, damping=RHO, throw=False)
        close_all(flat(found.step), flat(exact("newton").step))
        close_all(found.logabsdet, exact("newton").logabsdet)
        assert found.num_negative == exact("newton").num_negative


# Programs -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stages", "information"])
def test_mapped_over_parameters_and_compiled(form):
    call = lambda params: dp.layerwise_lqr(
        PROBLEM, INPUTS, params, form=form, damping=RHO, throw=False
    )
    scales = jnp.asarray([1.0, 0.5])
    many = jax.vmap(lambda s: jax.tree.map(lambda a: s * a, NET.params))(scales)
    found = jax.jit(jax.vmap(call))(many)
    for i in range(2):
        row = lambda tree, i=i: jax.tree.map(lambda a: a[i], tree)
        close(row(found), call(row(many)), 1e-12, scale="largest")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["stages", "information"])
def test_in_float32(form):
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    found = dp.layerwise_lqr(PROBLEM, *half(START), form=form, damping=RHO)
    assert {a.dtype.name for a in jax.tree.leaves(found.step)} == {"float32"}
    close(flat(found.step), np.float32(flat(exact("ggn").step)), 2e-5, scale="largest")
    close(found.logabsdet, np.float32(exact("ggn").logabsdet), 2e-6)


@pytest.mark.slow
def test_the_derivative_of_the_determinant():
    def logabsdet(damping):
        return dp.layerwise_lqr(PROBLEM, *START, damping=damping).logabsdet

    C = matrix("ggn") + RHO * jnp.eye(flat(NET.params).size)
    close_all(jax.grad(logabsdet)(RHO), jnp.trace(jnp.linalg.inv(C)))


# Failures -------------------------------------------------------------------------


def test_a_stationary_point_is_told_from_a_minimum():
    with pytest.raises(dp.SolveError, match="eigenvalues of the .* `throw=False`") as e:
        dp.layerwise_lqr(PROBLEM, *START, dp.Newton(), damping=RHO)
    close(e.value.solution.step, exact("newton").step)


def test_what_is_singular_or_not_finite_is_nan_and_told():
    # More parameters than outputs, and no damping.
    with pytest.raises(dp.SolveError, match="singular to rounding.*`damping`") as error:
        dp.layerwise_lqr(PROBLEM, *START)
    found = error.value.solution
    numbers = flat((found.step, found.value, found.logabsdet))
    assert np.all(np.isnan(numbers)) and found.num_negative == 0
    bad = INPUTS.at[2, 0].set(jnp.nan)
    for form in ("stages", "information"):
        with pytest.raises(dp.SolveError, match="NaN in the inputs") as error:
            dp.layerwise_lqr(PROBLEM, bad, NET.params, form=form, damping=RHO)
        assert np.all(np.isnan(flat(error.value.solution.step)))


CONV = dp.Network([eqx.nn.Conv1d(1, 1, 2, key=KEYS[0]), jnp.ravel])
WIDE = dp.Network([linear(3, 5, 0), jnp.tanh, linear(5, 2, 1)])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(problem=NET), TypeError, "`problem` is a Network; .*NetworkProblem"),
        (dict(method=dp.Gradient()), TypeError, r"`dp.Newton\(\)` is .*`dp.direction`"),
        (dict(method=dp.DDP()), TypeError, r"`method` is DDP\("),
        (dict(method=dp.Newton), TypeError, "`method` is the class Newton"),
        (
            dict(method=dp.GaussNewton(dp.ParallelRiccati())),
            ValueError,
            r"one after the other: `dp.GaussNewton\(\)`",
        ),
        (dict(form="dual"), ValueError, '`form` is \'dual\'; "stages" or "info'),
        (
            dict(form="information", method=dp.Newton()),
            ValueError,
            "is for Gauss-Newton, whose",
        ),
        (dict(form="information", damping=0.0), ValueError, "a number > 0 is expected"),
        (dict(damping=-1.0), ValueError, "`damping` is -1.0; a number >= 0"),
        (dict(damping=jnp.asarray(-1.0)), ValueError, "`damping` is -1.0"),
        (dict(damping=float("nan")), ValueError, "`damping` is nan"),
        (dict(damping=jnp.ones(2)), TypeError, r"array of shape \(2,\); one number"),
        (dict(params=NET), ValueError, "`params` is .* not arranged .*`net.params`"),
        (dict(params=NET.params[:2]), ValueError, "not arranged like"),
        (
            dict(problem=dp.NetworkProblem(WIDE, SOFTMAX, LABELS), params=NET.params),
            ValueError,
            "not arranged like",
        ),
        (
            dict(params=jax.tree.map(lambda a: a[:2], NET.params)),
            ValueError,
            r"layers\[0\].weight` has shape \(2, 3\); \(4, 3\), as in the network",
        ),
        (
            dict(params=jax.tree.map(lambda a: a.astype(int), NET.params)),
            TypeError,
            "`params.* has dtype int",
        ),
        (
            dict(
                problem=dp.NetworkProblem(CONV, SQUARED, LABELS),
                params=CONV.params,
                form="information",
            ),
            ValueError,
            "The network has a Conv1d; .*give `form=.stages.`",
        ),
    ],
)
def test_wrong_calls(changes, error, message, unchecked):
    given = dict(problem=PROBLEM, inputs=INPUTS, params=NET.params, damping=RHO)
    with pytest.raises(error, match=message):
        dp.layerwise_lqr(**given | changes)


def test_wrong_metrics(unchecked):
    problem = ft.partial(dp.NetworkProblem, NET, SOFTMAX, LABELS)
    wrong: list = [3.0, Mixed]
    for metric in wrong:
        with pytest.raises(TypeError, match=r"`metric` is .*metric\(reference, outp"):
            problem(metric=metric)
    with pytest.raises(ValueError, match="of stage 3; the network has the stages 0 to"):
        problem(metric=dp.StageMetric(3, euclidean))
    with pytest.raises(ValueError, match="`stage` is -1; stages count from 0"):
        dp.StageMetric(-1, euclidean)
    with pytest.raises(TypeError, match="`stage` is 1.0; the index"):
        dp.StageMetric(1.0, euclidean)  # pyright: ignore
    with pytest.raises(TypeError, match="`divergence` is 2"):
        dp.StageMetric(0, 2)  # pyright: ignore
    total = lambda reference, outputs: jnp.sum(outputs)
    for metric in (total, dp.StageMetric(0, total)):
        with pytest.raises(ValueError, match=r"metric returned shape \(\); one number"):
            layerwise(metric)
    with pytest.raises(Exception) as raised:
        layerwise(SQUARED)  # labels are no targets for it
    assert any("metric of the network" in note for note in raised.value.__notes__)
