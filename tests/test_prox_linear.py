"""Prox-linear directions: optimality, duality, closed forms."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import (
    Absolute,
    Euclidean,
    Hinge,
    Huber,
    SoftmaxCrossEntropy,
    Squared,
)
from diffprog.oracles import (
    CG,
    CoordinateAscent,
    GaussNewton,
    NewtonSteps,
    ProximalGradient,
    ProxLinear,
)
from diffprog.oracles.base import linearize


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
SOLVERS = {
    "Newton": NewtonSteps(),
    "Newton, CG": NewtonSteps(solver=CG(max_steps=60, rtol=1e-12)),
    "coordinates": CoordinateAscent(max_steps=3000),
    "gradient": ProximalGradient(max_steps=3000),
}
PAIRS = [
    (loss, solver)
    for loss, (fn, _) in LOSSES.items()
    for solver in SOLVERS
    if fn.smooth or not solver.startswith("Newton")
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

    return compute(flat)


def run(name, damping, solver=None, gap=1e-11):
    loss, targets = LOSSES[name]
    oracle = ProxLinear(damping, solver, gap)
    vd = dp.value_and_direction(loss, oracle, has_aux=True)
    (value, aux), direction = vd(network(), INPUTS, targets)
    return -ravel_pytree(direction)[0], value, aux


def objective(name, damping, d):
    (loss, targets), (f, J) = LOSSES[name], linear_model()
    return loss(f + J @ d, targets).mean() + damping * d @ d / 2


@ft.cache
def best(name, damping):
    return run(name, damping, ProximalGradient(max_steps=10_000), 1e-13)[0]


@pytest.mark.parametrize("damping", [1.0, 0.03])
@pytest.mark.parametrize("name, solver", PAIRS)
def test_every_solver_finds_the_minimum(name, solver, damping):
    step, value, aux = run(name, damping, SOLVERS[solver])
    P = objective(name, damping, step)
    assert 0 <= aux.gap < 1e-10 * max(1, float(value))
    assert P <= objective(name, damping, best(name, damping)) + 1e-10
    decrease = value - (P - damping * step @ step / 2)
    np.testing.assert_allclose(aux.decrease, decrease, rtol=0, atol=1e-13)
    assert aux.slope < 0 and aux.num_inner < 3000


@pytest.mark.parametrize("name", ["softmax", "huber"])
def test_t1_5_optimality(name):
    # damping d = -J' alpha / m for alpha_i = grad l(f_i + J_i d).
    step, _, _ = run(name, 0.1)
    (loss, targets), (f, J) = LOSSES[name], linear_model()
    alpha = loss.gradient(f + J @ step, targets)
    pulled = jnp.einsum("ijp,ij->p", J, alpha) / M
    np.testing.assert_allclose(0.1 * step, -pulled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "hinge"])
def test_t1_4_the_gap_is_that_of_the_definition(name):
    step, _, aux = run(name, 0.3, CoordinateAscent(max_steps=2))
    (loss, targets), (f, J) = LOSSES[name], linear_model()
    z = f + J @ step
    # alpha from d = -J' alpha / (m damping): unique where J' has full rank.
    flat = J.reshape(M * K, -1)
    alpha = jnp.linalg.lstsq(flat.T, -0.3 * M * step)[0].reshape(M, K)
    inner = jnp.sum(alpha * z, 1)
    gaps = loss(z, targets) + loss.conjugate(alpha, targets) - inner
    np.testing.assert_allclose(aux.gap, gaps.mean(), rtol=0, atol=1e-8)


def test_t3_1_the_squared_loss_is_gauss_newton():
    step, _, _ = run("squared", 0.1)
    vd = dp.value_and_direction(Squared(), GaussNewton(0.1))
    _, direction = vd(network(), INPUTS, REAL)
    np.testing.assert_allclose(step, -ravel_pytree(direction)[0], rtol=0, atol=1e-10)


def test_t1_15_converged_coordinate_ascent_is_the_dense_step():
    # The gap is lost in rounding while the step still moves by the root of that: with a
    # gap below 0 all passes are made.
    net = network()
    predict = lambda params: (jax.vmap(net.with_params(params))(INPUTS), None)
    others = Squared(), REAL, net, INPUTS, "mean"
    solver = CoordinateAscent(max_steps=3000)
    find = lambda: solver.minimize(
        linearize(predict, net.params, *others)[0], jnp.asarray(0.1), jnp.asarray(-1.0)
    )
    step = ravel_pytree(jax.jit(find)().step)[0]
    f, J = linear_model()
    J = J.reshape(M * K, -1)
    matrix = J.T @ J / M + 0.1 * jnp.eye(J.shape[1])
    desired = -jnp.linalg.solve(matrix, J.T @ (f - REAL).ravel() / M)
    np.testing.assert_allclose(step, desired, rtol=0, atol=1e-12)


def test_t3_2_an_affine_model_is_solved_in_one_step():
    model = eqx.nn.Linear(3, K, key=KEYS[4])
    vd = dp.value_and_direction(Absolute(), ProxLinear(1e-4, gap=1e-9))
    _, direction = vd(model, INPUTS, REAL)
    new = eqx.apply_updates(model, jax.tree.map(jnp.negative, direction))
    _, again = vd(new, INPUTS, REAL)
    mean = lambda model: Absolute()(jax.vmap(model)(INPUTS), REAL).mean()
    after = eqx.apply_updates(new, jax.tree.map(jnp.negative, again))
    assert mean(after) > mean(new) - 1e-3 and mean(new) < mean(model)


@pytest.mark.parametrize("shift", [3.0, 0.2, -3.0])
def test_t3_3_one_residual_is_thresholded(shift):
    # u + J d = soft(u, |J|^2 / damping), d = J' (soft - u) / |J|^2.
    model, x = eqx.nn.Linear(3, 1, key=KEYS[5]), INPUTS[:1]
    y = jax.vmap(model)(x) - shift
    J2, damping = jnp.sum(x**2) + 1, 2.0
    vd = dp.value_and_direction(Absolute(), ProxLinear(damping, gap=1e-13))
    _, direction = vd(model, x, y)
    soft = np.sign(shift) * max(abs(shift) - J2 / damping, 0)
    np.testing.assert_allclose(-direction.weight, x * (soft - shift) / J2, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_t3_4_sufficient_damping_decreases_the_loss(name):
    loss, targets = LOSSES[name]
    vd = dp.value_and_direction(loss, ProxLinear(20.0))
    net = network()
    value, direction = vd(net, INPUTS, targets)
    new = eqx.apply_updates(net, jax.tree.map(jnp.negative, direction))
    after = loss(jax.vmap(new)(INPUTS), targets).mean()
    step = -ravel_pytree(direction)[0]
    assert after <= objective(name, 20.0, step) <= value


@pytest.mark.parametrize("name", LOSSES)
def test_t3_5_strong_damping_gives_the_gradient(name):
    step, _, _ = run(name, 1e7)
    (loss, targets), (f, J) = LOSSES[name], linear_model()
    pulled = jnp.einsum("ijp,ij->p", J, loss.gradient(f, targets)) / M
    np.testing.assert_allclose(-1e7 * step, pulled, rtol=0, atol=1e-5)


def test_few_steps_still_descend():
    for name, solver in (("hinge", CoordinateAscent(max_steps=1)),
                         ("absolute", ProximalGradient(max_steps=1))):  # fmt: skip
        step, value, aux = run(name, 1e-4, solver)
        assert aux.slope < 0 and aux.decrease > 0
        assert objective(name, 1e-4, step) < value


def test_float32_is_kept():
    cast = lambda a: a.astype("f4") if eqx.is_inexact_array(a) else a
    net, inputs = jax.tree.map(cast, (network(), INPUTS))
    for name in ("hinge", "softmax"):
        vd = dp.value_and_direction(LOSSES[name][0], ProxLinear(0.1, gap=1e-3))
        _, direction = vd(net, inputs, LABELS)
        found = ravel_pytree(direction)[0]
        assert found.dtype == jnp.float32
        desired, _, _ = run(name, 0.1)
        np.testing.assert_allclose(found, -desired, rtol=0, atol=0.05)


def test_functions_without_a_conjugate():
    smooth = lambda u, y: jnp.sum(jnp.cosh(u - y), 1)
    vd = dp.value_and_direction(smooth, ProxLinear(0.1))
    vd(network(), INPUTS, REAL)
    for solver in (CoordinateAscent(), ProximalGradient()):
        vd = dp.value_and_direction(smooth, ProxLinear(0.1, solver))
        with pytest.raises(TypeError, match="conjugate"):
            vd(network(), INPUTS, REAL)


def test_wrong_arguments(unchecked):
    with pytest.raises(ValueError, match="`damping` is 0"):
        ProxLinear(0)
    with pytest.raises(ValueError, match="`gap` is -1"):
        ProxLinear(1.0, gap=-1)
    for solver in (NewtonSteps, CoordinateAscent, ProximalGradient):
        with pytest.raises(ValueError, match="`max_steps` is 0"):
            solver(0)
    with pytest.raises(TypeError, match="`Auto`, `CG` or `Cholesky`"):
        NewtonSteps(solver=dp.oracles.DualCG())
