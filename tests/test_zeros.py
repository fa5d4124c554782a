import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog._common import zeros


def both(z):
    """Of every rule; entries 2 to 5 have their own, and the others meet."""
    first, second, rest = jnp.split(z, [2, 6])
    square = jnp.reshape(second**2, (2, 2)).T
    square = jax.lax.pad(square, 0.0, ((1, -1, 0), (0, 1, 1)))
    looped = jax.lax.scan(lambda c, a: (c + a**2, c), 0.0, rest)[1]
    parts = [jnp.sin(first), square.ravel(), looped, jnp.where(z > 0, z, 2 * z)]
    parts.append(jax.lax.slice(z, (0,), (12,), (2,)))
    matrix = jnp.broadcast_to(jnp.exp(z)[:, None], (len(z), 2))
    return jnp.concatenate([*parts, jnp.sum(matrix, 1), jnp.squeeze(z[None] * z[0], 0)])


def test_what_a_program_calls_zero_is_zero():
    z = jnp.asarray(np.random.default_rng(0).normal(size=12))
    J, pattern = np.asarray(jax.jit(jax.jacfwd(both))(z)), zeros.nonzeros(both, z)
    assert J.shape == pattern.shape
    np.testing.assert_array_equal(J[~pattern], 0.0)
    assert pattern.sum() < np.count_nonzero(J) + 36  # a loop is one part


def test_a_derivative_of_its_own_counts():
    """Whatever the values of the function depend on."""

    @jax.custom_jvp
    def through(z):
        return jnp.zeros_like(z)

    through.defjvp(lambda primals, tangents: (through(*primals), tangents[0][::-1]))
    assert zeros.nonzeros(through, jnp.ones(3)).all()


@pytest.mark.parametrize("size", [16, 17])
def test_columns_without_a_common_row_are_found_together(size):
    weights = jnp.arange(1.0, size)

    def gradient(z):
        found = jax.grad(lambda z: jnp.sum(weights * z[1:] ** 4) + z[0] * z[1] ** 3)(z)
        return found, jnp.sum(found)

    z = jnp.linspace(-1.0, 2.0, size)
    found, aux = jax.jit(lambda z: zeros.jacobian(gradient, z, 16)(z))(z)
    expected, total = jax.jit(jax.jacfwd(gradient, has_aux=True))(z)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(aux, total, rtol=1e-12)
    text = str(jax.make_jaxpr(zeros.jacobian(gradient, z, 16))(z))
    assert (f"[{size},{size - 1}]" in text) == (size == 16)  # all tangents at once


def test_what_is_constant_is_left_alone():
    gradient = lambda z: (3 * z, z)
    z = jnp.ones(20)
    text = str(jax.make_jaxpr(zeros.jacobian(gradient, z, 16))(z))
    assert text == str(jax.make_jaxpr(jax.jacfwd(gradient, has_aux=True))(z))


def test_hessians_of_long_states():
    dynamics = lambda x, u, t: 0.9 * jnp.roll(x, 1) + 0.1 * jnp.sum(u) * jnp.cos(x)
    cost = lambda x, u, t: jnp.sum(x**2) + u @ u + u[0] * x[0] * x[1]
    last = lambda x: jnp.sum(x**2 + x**4)
    problem = dp.ControlProblem(dynamics, cost, last, 5)
    x0, us = jnp.linspace(-1.0, 1.0, 18), 0.1 * jnp.ones((5, 2))
    model = dp.quadratize(problem, x0, us)
    (Q, M), (_, R) = jax.jit(jax.hessian(cost, (0, 1)))(x0, us[0], 0)
    for one, other in ((model.Q, Q), (model.M, M), (model.R, R)):
        np.testing.assert_allclose(np.asarray(one)[0], other, rtol=1e-12, atol=1e-12)
    final = dp.rollout(problem, x0, us).xs[-1]
    expected = jax.jit(jax.hessian(last))(final)
    np.testing.assert_allclose(model.Q_final, expected, rtol=1e-12, atol=1e-12)
