import diffrax
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import diffprog as dp


# x' = -x + u + cos(time), with this solution for a control held at u.
def exact(x, u, start, dt):
    forced = lambda time: u + (jnp.cos(time) + jnp.sin(time)) / 2
    return forced(start + dt) + (x - forced(start)) * jnp.exp(-dt)


field = lambda x, u, time: -x + u + jnp.cos(time)
ORDERS = [("euler", 1), ("midpoint", 2), ("rk4", 4), (diffrax.Tsit5(), 5)]


@pytest.mark.parametrize("method, order", ORDERS, ids=lambda x: str(x)[:8])
def test_order_of_accuracy_with_time_in_seconds(method, order):
    x, u, t = jnp.asarray([1.0]), jnp.asarray([0.5]), jnp.asarray(3, jnp.int32)
    dts = np.array([0.2, 0.1])
    step = jax.jit(lambda dt: dp.discretize(field, dt, method)(x, u, t))
    errors = [abs(step(dt) - exact(x, u, 3 * dt, dt))[0] for dt in dts]
    slope = np.log2(errors[0] / errors[1])
    assert slope == pytest.approx(order + 1, abs=0.6)


def test_rk4_is_exact_for_a_cubic_in_time():
    cubic = lambda x, u, time: jnp.full_like(x, 4.0) * time**3
    step = dp.discretize(cubic, 0.5, "rk4")
    np.testing.assert_allclose(step(jnp.zeros(1), None, 2), 1.5**4 - 1.0, rtol=1e-14)


@pytest.mark.parametrize("method", ["rk4", diffrax.Heun()])
def test_pytrees_dtypes_and_derivatives(method):
    field = lambda x, u, time: dict(p=x["v"], v=u - jnp.sin(x["p"]))
    step = dp.discretize(field, 0.1, method)
    x = dict(p=jnp.asarray([0.5], jnp.float32), v=jnp.asarray([0.1], jnp.float32))
    u = jnp.asarray([1.0], jnp.float32)
    new = step(x, u, 0)
    assert new["p"].dtype == jnp.float32 and new["v"].shape == (1,)
    # The Taylor polynomial of the exact flow.
    a, jerk = 1 - np.sin(0.5), -0.1 * np.cos(0.5)
    np.testing.assert_allclose(new["p"], 0.5 + 0.01 + 0.005 * a, atol=1e-4)
    np.testing.assert_allclose(new["v"], 0.1 + 0.1 * a + 0.005 * jerk, atol=2e-4)
    total = lambda u, v: jnp.sum(step(dict(p=u, v=v), u, 0)["p"])
    args = jnp.asarray([0.5]), jnp.asarray([0.1])
    jax.test_util.check_grads(jax.jit(total), args, order=2, rtol=1e-4)


def test_discretized_dynamics_in_a_problem():
    step = dp.discretize(field, 0.1, diffrax.Tsit5())
    problem = dp.ControlProblem(
        step, lambda x, u, t: jnp.sum(u**2), lambda x: jnp.sum((x - 1.0) ** 2), 5
    )
    solution = dp.solve(problem, dp.DDP(), jnp.zeros(1), jnp.zeros((5, 1)))
    assert 0 < solution.stats["num_steps"] <= 2
    before = solution.history["gradient"][0]
    assert solution.stats["gradient"] <= 1e-12 * before
    gradient = jax.grad(lambda us: dp.rollout(problem, jnp.zeros(1), us).cost)
    assert jnp.linalg.norm(gradient(solution.us)) <= 1e-12 * before


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((1.0, 0.1), TypeError, "`vector_field` is 1.0; a function"),
        ((field, 0.0), ValueError, "`dt` is 0.0; a positive number"),
        ((field, 0.1, "rk5"), ValueError, "`method` is 'rk5'; one of euler, midpoint"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_calls(args, error, message):
    with pytest.raises(error, match=message):
        dp.discretize(*args)
