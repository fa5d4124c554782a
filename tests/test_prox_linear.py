"""Prox-linear directions: optimality, duality, closed forms."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.optimize import linprog

import diffprog as dp
from diffprog.losses import (
    Absolute,
    AbstractBoundedLoss,
    Euclidean,
    Hinge,
    Huber,
    SoftmaxCrossEntropy,
    Squared,
)
from diffprog.oracles import (
    AugmentedLagrangian,
    CG,
    CoordinateAscent,
    GaussNewton,
    InteriorPoint,
    NewtonSteps,
    ProximalGradient,
    ProxLinear,
)
from diffprog.oracles._base import linearize


M, K = 8, 2
KEYS = jr.split(jr.key(2), 10)
INPUTS = jr.normal(KEYS[0], (M, 3))
REAL = jr.normal(KEYS[1], (M, K))
LABELS = jnp.arange(M) % K
LOSSES = {
    "softmax": (SoftmaxCrossEntropy(), LABELS),
    "squared": (Squared(), REAL),
    "huber": (Huber(0.5), REAL),
    "hinge": (Hinge(), LABELS),
    "absolute": (Absolute(), REAL),
    "euclidean": (Euclidean(), REAL),
}
# Enough for a J that is ill conditioned.
MOST = 30_000
SOLVERS = {
    "Newton": NewtonSteps(),
    "Newton, CG": NewtonSteps(solver=CG(max_steps=60, rtol=1e-12)),
    "interior": InteriorPoint(),
    "Lagrangian": AugmentedLagrangian(max_steps=MOST),
    "coordinates": CoordinateAscent(max_steps=MOST),
    "gradient": ProximalGradient(max_steps=MOST),
}
PAIRS = [
    (loss, solver)
    for loss, (fn, _) in LOSSES.items()
    for solver in SOLVERS
    if (fn.smooth or not solver.startswith("Newton"))
    and (isinstance(fn, AbstractBoundedLoss) or solver != "interior")
]


@ft.cache
def network():
    first, second = (
        eqx.nn.Linear(a, b, key=key) for a, b, key in ((3, 4, KEYS[2]), (4, K, KEYS[3]))
    )
    return dp.Network([first, jnp.tanh, second])


@ft.cache
def linear_model():
    """Outputs and their Jacobian."""
    flat, unravel = ravel_pytree(network().params)

    @jax.jit
    def compute(flat):
        f = lambda w: jax.vmap(network().with_params(unravel(w)))(INPUTS)
        return f(flat), jax.jacobian(f)(flat)

    return jax.tree.map(np.asarray, compute(flat))


def run(name, damping, solver=None, gap=1e-11, throw=True):
    loss, targets = LOSSES[name]
    oracle = ProxLinear(damping, solver, gap, throw)
    vd = dp.value_and_direction(loss, oracle, has_aux=True)
    (value, aux), direction = vd(network(), INPUTS, targets)
    return -flat(direction), value, aux


def flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


@ft.partial(jax.jit, static_argnums=0)
def value_at(name, outputs):
    loss, targets = LOSSES[name]
    return loss(outputs, targets).mean()


@ft.partial(jax.jit, static_argnums=0)
def gradient_at(name, outputs):
    loss, targets = LOSSES[name]
    return loss.gradient(outputs, targets)


@ft.partial(jax.jit, static_argnums=0)
def projected(name, alpha):
    """A dual variable in its domain, and its conjugates."""
    loss, targets = LOSSES[name]
    alpha = loss.dual_projection(alpha, targets)
    return alpha, loss.conjugate(alpha, targets)


def objective(name, damping, d):
    f, J = linear_model()
    return value_at(name, f + J @ d) + damping * d @ d / 2


def bound(name, damping, d):
    """The dual value of the variable of a step, below all values of the model."""
    f, J = linear_model()
    alpha = np.linalg.lstsq(J.reshape(M * K, -1).T, -damping * M * d)[0]
    alpha, conjugate = map(np.asarray, projected(name, alpha.reshape(M, K)))
    pulled = np.einsum("ijp,ij->p", J, alpha) / M
    inner = np.sum(alpha * f, 1) - conjugate
    return inner.mean() - pulled @ pulled / (2 * damping)


@ft.cache
def best(name, damping):
    step = run(name, damping, ProximalGradient(max_steps=MOST), 1e-13)[0]
    # No other step is better, whatever the solvers say.
    assert objective(name, damping, step) < bound(name, damping, step) + 1e-11
    return step


@pytest.mark.costly
@pytest.mark.parametrize("damping", [1.0, 0.03])
@pytest.mark.parametrize("name, solver", PAIRS)
def test_every_solver_finds_the_minimum(name, solver, damping):
    step, value, aux = run(name, damping, SOLVERS[solver])
    P = objective(name, damping, step)
    assert 0 <= aux.gap < 1e-10 * max(1, float(value))
    assert P <= objective(name, damping, best(name, damping)) + 1e-10
    decrease = value - (P - damping * step @ step / 2)
    np.testing.assert_allclose(aux.decrease, decrease, rtol=0, atol=1e-13)
    assert aux.slope < 0 and aux.num_inner < MOST


@pytest.mark.costly
@pytest.mark.parametrize("name", ["softmax", "huber"])
def test_the_dual_variable_is_the_gradient_at_the_solution(name):
    # damping d = -J' alpha / m for alpha_i = grad l(f_i + J_i d). The square of the
    # difference is 2 damping times the gap.
    step, _, _ = run(name, 0.1, gap=1e-13)
    f, J = linear_model()
    pulled = np.einsum("ijp,ij->p", J, gradient_at(name, f + J @ step)) / M
    np.testing.assert_allclose(0.1 * step, -pulled, rtol=0, atol=1e-6)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["softmax", "hinge"])
def test_the_gap_is_that_of_the_definition(name):
    step, _, aux = run(name, 0.3, CoordinateAscent(max_steps=2), throw=False)
    f, J = linear_model()
    z = f + J @ step
    # alpha from d = -J' alpha / (m damping): unique where J' has full rank.
    rows = J.reshape(M * K, -1)
    found = np.linalg.lstsq(rows.T, -0.3 * M * step)[0].reshape(M, K)
    # One rounding outside of its domain the conjugate is infinite.
    alpha, conjugate = map(np.asarray, projected(name, found))
    np.testing.assert_allclose(alpha, found, rtol=0, atol=1e-10)
    gap = value_at(name, z) + (conjugate - np.sum(alpha * z, 1)).mean()
    np.testing.assert_allclose(aux.gap, gap, rtol=0, atol=1e-8)


def test_the_squared_loss_is_gauss_newton():
    step, _, _ = run("squared", 0.1)
    assert np.linalg.norm(step) > 0.1
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1))
    _, direction = vd(network(), INPUTS, REAL)
    np.testing.assert_allclose(step, -flat(direction), rtol=0, atol=1e-10)


def test_converged_coordinate_ascent_is_the_dense_step():
    # The gap is lost in rounding while the step still moves by the root of that: with a
    # gap below 0 all passes are made.
    net = network()
    predict = lambda params: (jax.vmap(net.with_params(params))(INPUTS), None)
    others = Squared(), REAL, INPUTS, "mean"
    solver = CoordinateAscent(max_steps=3000)
    find = lambda: solver.minimize(
        linearize(predict, net.params, *others)[0], jnp.asarray(0.1), jnp.asarray(-1.0)
    )
    step = ravel_pytree(jax.jit(find)().step)[0]
    f, J = linear_model()
    J = J.reshape(M * K, -1)
    matrix = J.T @ J / M + 0.1 * np.eye(J.shape[1])
    desired = -np.linalg.solve(matrix, J.T @ (f - np.asarray(REAL)).ravel() / M)
    np.testing.assert_allclose(step, desired, rtol=0, atol=1e-12)


def least_absolute_deviations():
    """The least mean loss of a linear model, and its weights, by a linear program."""
    X = np.hstack([INPUTS, np.ones((M, 1))])
    A, r = np.kron(np.eye(K), X), np.asarray(REAL).T.ravel()
    # r - A w <= s and A w - r <= s: the sum of s is least.
    signed = np.block([[-A, -np.eye(M * K)], [A, -np.eye(M * K)]])
    costs = np.concatenate([np.zeros(A.shape[1]), np.ones(M * K)]) / M
    bounds = [(None, None)] * A.shape[1] + [(0, None)] * (M * K)
    found = linprog(costs, signed, np.concatenate([-r, r]), bounds=bounds)
    return found.fun, found.x[: A.shape[1]]


@pytest.mark.costly
@pytest.mark.parametrize(
    "damping, solver", [(0.1, CoordinateAscent(max_steps=MOST)), (1e-4, None)]
)
def test_an_affine_model_is_solved_in_one_step(damping, solver):
    model = eqx.nn.Linear(3, K, key=KEYS[4])
    vd = dp.value_and_direction(Absolute(), ProxLinear(damping, solver, 1e-9))
    _, direction = vd(model, INPUTS, REAL)
    new = eqx.apply_updates(model, jax.tree.map(jnp.negative, direction))
    after = Absolute()(jax.vmap(new)(INPUTS), REAL).mean()
    # The step pays for its length: so does the one to the least loss of all.
    least, w = least_absolute_deviations()
    rows = lambda model: np.column_stack([model.weight, model.bias]).ravel()
    cost = lambda w: damping / 2 * np.sum((w - rows(model)) ** 2)
    assert least - 1e-12 < after
    assert after + cost(rows(new)) < least + cost(w) + 1e-8


@pytest.mark.parametrize("shift", [3.0, 0.2, -3.0])
def test_one_residual_is_thresholded(shift):
    # u + J d = soft(u, |J|^2 / damping), d = J' (soft - u) / |J|^2.
    model, x = eqx.nn.Linear(3, 1, key=KEYS[5]), INPUTS[:1]
    y = jax.vmap(model)(x) - shift
    J2, damping = jnp.sum(x**2) + 1, 2.0
    vd = dp.value_and_direction(Absolute(), ProxLinear(damping, gap=1e-13))
    _, direction = vd(model, x, y)
    soft = np.sign(shift) * max(abs(shift) - J2 / damping, 0)
    np.testing.assert_allclose(-direction.weight, x * (soft - shift) / J2, atol=1e-9)


@pytest.mark.costly
@pytest.mark.parametrize("name", LOSSES)
def test_sufficient_damping_decreases_the_loss(name):
    loss, targets = LOSSES[name]
    vd = dp.value_and_direction(loss, ProxLinear(20.0))
    net = network()
    value, direction = vd(net, INPUTS, targets)
    new = eqx.apply_updates(net, jax.tree.map(jnp.negative, direction))
    after = value_at(name, eqx.filter_jit(jax.vmap(new))(INPUTS))
    P = objective(name, 20.0, -flat(direction))
    assert after <= P
    # At least half of what the loss would fall by along its gradient.
    f, J = linear_model()
    pulled = np.einsum("ijp,ij->p", J, gradient_at(name, f)) / M
    assert value - P > pulled @ pulled / (4 * 20.0)


@pytest.mark.costly
@pytest.mark.parametrize("name", LOSSES)
def test_strong_damping_gives_the_gradient(name):
    step, _, _ = run(name, 1e7)
    f, J = linear_model()
    pulled = np.einsum("ijp,ij->p", J, gradient_at(name, f)) / M
    np.testing.assert_allclose(-1e7 * step, pulled, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_few_steps_still_descend():
    for name, solver in (("hinge", CoordinateAscent(max_steps=1)),
                         ("absolute", ProximalGradient(max_steps=1))):  # fmt: skip
        step, value, aux = run(name, 1e-4, solver, throw=False)
        assert aux.slope < 0 and aux.decrease > 0
        assert objective(name, 1e-4, step) < value


def test_too_few_passes_are_no_success_without_a_step():
    # All residuals are at their kinks: no step helps, and nothing says that it is best.
    loss, net = Absolute(), network()
    targets = np.array(eqx.filter_jit(jax.vmap(net))(INPUTS))
    targets[0] += [1.0, -1e-12]
    oracle = ProxLinear(1e-9, CoordinateAscent(max_steps=1), 1e-12)
    vd = dp.value_and_direction(loss, oracle)
    (_, aux), direction, _ = vd.step(net, vd.init(net), INPUTS, jnp.asarray(targets))
    moved = np.any(flat(direction))
    assert moved == (aux.result == dp.RESULTS.successful)


@pytest.mark.slow
def test_float32_is_kept():
    cast = lambda a: a.astype("f4") if eqx.is_inexact_array(a) else a
    net, inputs = jax.tree.map(cast, (network(), INPUTS))
    for name in ("hinge", "softmax"):
        # Of the gap follows |error|^2 < 2 gap / damping.
        vd = dp.value_and_direction(LOSSES[name][0], ProxLinear(0.1, gap=1e-4))
        _, direction = vd(net, inputs, LABELS)
        found = ravel_pytree(direction)[0]
        assert found.dtype == jnp.float32
        desired, value, _ = run(name, 0.1)
        np.testing.assert_allclose(found, -desired, rtol=0, atol=0.05)
        least = objective(name, 0.1, desired)
        P = objective(name, 0.1, -found.astype(float))
        assert P - least < 1e-3 * (value - least)


def test_functions_without_a_conjugate():
    smooth = lambda u, y: jnp.sum(jnp.cosh(u - y), 1)
    vd = dp.value_and_direction(smooth, ProxLinear(0.1, gap=1e-13))
    _, direction = vd(network(), INPUTS, REAL)
    found, (f, J) = flat(direction), linear_model()
    pulled = np.einsum("ijp,ij->p", J, np.sinh(f - J @ found - REAL)) / M
    np.testing.assert_allclose(0.1 * found, pulled, rtol=0, atol=1e-6)
    for solver in (AugmentedLagrangian(), CoordinateAscent(), ProximalGradient()):
        vd = dp.value_and_direction(smooth, ProxLinear(0.1, solver))
        with pytest.raises(TypeError, match="carries no conjugate"):
            vd(network(), INPUTS, REAL)


def test_wrong_arguments(unchecked):
    with pytest.raises(ValueError, match="`damping` is 0"):
        ProxLinear(0)
    with pytest.raises(ValueError, match="`gap` is -1"):
        ProxLinear(1.0, gap=-1)
    for solver in (
        AugmentedLagrangian,
        CoordinateAscent,
        InteriorPoint,
        NewtonSteps,
        ProximalGradient,
    ):
        with pytest.raises(ValueError, match="`max_steps` is 0"):
            solver(0)
    with pytest.raises(TypeError, match="`Auto`, `CG` or `Cholesky`"):
        NewtonSteps(solver=dp.oracles.DualCG())
