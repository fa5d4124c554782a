"""Solves whose states are angles and attitudes: local coordinates of a manifold."""

import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._control.lqr.expand import curved, second_derivatives
from diffprog.manifolds import Angle, Blocks, Euclidean, Product, UnitQuaternion

from . import helpers
from .helpers import close, name


T, DT = 8, 0.1
INERTIA = np.array([1.0, 2.0, 3.0])
TURN = np.array([0.9, -0.7, 0.5])  # of the goal, from the start
ARRAY = Blocks((4, UnitQuaternion()), (3, Euclidean()))
TREE = Product(dict(q=UnitQuaternion(), w=Euclidean()))
attitude = UnitQuaternion()


def turned(v, y=(1.0, 0.0, 0.0, 0.0)):
    v = jnp.asarray(v)
    return attitude.retract(jnp.asarray(y, v.dtype), v)


class Body(eqx.Module):
    """A rigid body that turns from rest to an attitude, by torques."""

    goal: jax.Array
    manifold: Any = ARRAY

    def dynamics(self, x, u, t):
        q, w = jnp.split(x, [4])
        inertia = jnp.asarray(INERTIA, x.dtype)
        spin = (u - jnp.cross(w, inertia * w)) / inertia
        return jnp.concatenate([attitude.retract(q, DT * w), w + DT * spin])

    def cost(self, x, u, t):
        error = attitude.difference(x[:4], self.goal)
        return 0.02 * jnp.sum(error**2) + 0.01 * jnp.sum(u**2) + 0.01 * u[0] * x[4]

    def terminal_cost(self, x):
        error = attitude.difference(x[:4], self.goal)
        return 5 * jnp.sum(error**2) + jnp.sum(x[4:] ** 2)


def body(dtype=jnp.float64, horizon=T):
    x0 = jnp.zeros(7, dtype).at[0].set(1.0)
    system = Body(turned(jnp.asarray(TURN, dtype)))
    us = jnp.full((horizon, 3), 0.1, dtype)
    return dp.ControlProblem.from_system(system, horizon), x0, us


solve = ft.partial(dp.solve, throw=False)


@ft.cache
def best(method=dp.ILQR()):
    return dp.solve(body()[0], method, *body()[1:], rtol=1e-15, atol=1e-15)


@pytest.mark.costly
@pytest.mark.parametrize("method", helpers.DIRECTIONS, ids=name)
def test_ordinary_subtraction_is_no_manifold(method):
    problem, x0, us = helpers.spring()
    plain = solve(problem, method, x0, us, max_steps=15)
    manifold = dp.Manifold(lambda x, y: x - y, lambda y, v: y + v)
    other = dp.ControlProblem.from_system(helpers.Spring(), 12, manifold=manifold)
    assert other.manifold is manifold
    found = solve(other, method, x0, us, max_steps=15)
    for key in ("num_steps", "num_rollouts", "num_backwards"):
        assert plain.stats[key] == found.stats[key]
    close((found.xs, found.us), (plain.xs, plain.us), 1e-12)
    close(found.history, plain.history, 1e-12)
    close(found.policy.K, plain.policy.K, 1e-12)


@ft.cache
def local():
    """Every function in local coordinates along a roll-out, by the full maps."""
    problem, x0, us = body()
    xs = dp.rollout(problem, x0, us).xs

    def dynamics(t, z):
        x = ARRAY.retract(xs[t], z[:6])
        return ARRAY.difference(problem.dynamics(x, z[6:], t), xs[t + 1])

    cost = lambda t, z: problem.cost(ARRAY.retract(xs[t], z[:6]), z[6:], t)
    last = lambda v: problem.terminal_cost(ARRAY.retract(xs[-1], v))
    zs = jnp.concatenate([jnp.zeros((T, 6)), us], axis=1)
    return dynamics, cost, last, zs


def differences(fn, *at, step=1e-5):
    """Central ones of `fn` in the direction of each entry of the last argument."""
    *rest, z = at
    moves = step * jnp.eye(len(z))
    moves = jnp.concatenate([moves, -moves])
    ahead, back = jnp.split(jax.vmap(lambda move: fn(*rest, z + move))(moves), 2)
    return jnp.moveaxis((ahead - back) / (2 * step), 0, -1)


def rows_of_differences(fn, *rows):
    return jax.vmap(ft.partial(differences, fn))(*rows)


def test_models_are_derivatives_in_local_coordinates():
    problem, x0, us = body()
    dynamics, cost, last, zs = local()
    ts, here = jnp.arange(T), jnp.zeros((1, 6))
    from_here = lambda v: dp.rollout(problem, ARRAY.retract(x0, v), us).cost

    @jax.jit
    def desired():
        return (
            rows_of_differences(dynamics, ts, zs),
            rows_of_differences(cost, ts, zs),
            rows_of_differences(jax.grad(cost, 1), ts, zs),
            rows_of_differences(jax.grad(last), here)[0],
            rows_of_differences(from_here, here)[0],
            rows_of_differences(last, here)[0],
        )

    @jax.jit
    def models():
        given = problem, x0, us
        return dp.linearize(*given), dp.quadratize(*given), dp.costates(*given)

    slopes, cost_slopes, hessians, last_hessian, *ends = desired()
    linear, model, lams = models()
    A, B = jtu.tree_leaves(linear)
    assert A.shape == (T, 6, 6) and B.shape == (T, 6, 3)
    close(jnp.concatenate([A, B], -1), slopes, 1e-7)
    close(jnp.concatenate([model.q, model.r], -1), cost_slopes, 1e-7)
    close(model.Q, hessians[:, :6, :6], 1e-7)
    close(model.R, hessians[:, 6:, 6:], 1e-7)
    close(model.M, hessians[:, :6, 6:], 1e-7)
    close(model.Q_final, last_hessian, 1e-7)
    assert lams.shape == (T + 1, 6)
    close(lams[0], ends[0], 1e-7)
    close(lams[-1], ends[1], 1e-7)


def test_second_derivatives_are_those_of_the_full_maps():
    """Also where cheaper maps take their place: log and exp in what is compared to."""
    problem, x0, us = body()
    dynamics, cost, last, zs = local()
    ts = jnp.arange(T)

    @jax.jit
    def both():
        chain, trajectory = helpers.vectors(problem, x0, us)
        chain, trajectory = chain.around(trajectory)
        data = trajectory.xs, trajectory.us, chain.ts
        (found,) = chain.map(second_derivatives, *data)
        (W,) = chain.map(ft.partial(curved, exact=True), *data)
        dense = jax.vmap(jax.jacfwd(jax.jacfwd(dynamics, 1), 1))(ts, zs)
        return found, dense, W[:, 1:, 1:], jax.vmap(jax.hessian(cost, 1))(ts, zs)

    found, dense, hessians, desired = both()
    assert jnp.max(jnp.abs(dense)) > 0.01
    close(found, dense, 1e-13)
    close(hessians, desired, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("method", [dp.GaussNewton(), dp.Newton()], ids=name)
def test_steps_are_the_dense_ones(method):
    """Newton's does not depend on coordinates, that of Gauss-Newton does."""
    problem, x0, us = body()
    xs = dp.rollout(problem, x0, us).xs
    flat, unravel = ravel_pytree(us)
    difference, retract = (jax.vmap(fn) for fn in (ARRAY.difference, ARRAY.retract))

    def outputs(flat):
        new = dp.rollout(problem, x0, unravel(flat)).xs
        return jnp.concatenate([jnp.ravel(difference(new, xs)), flat])

    def total(vector):
        vs, us = jnp.split(vector, [6 * (T + 1)])
        states = retract(xs, vs.reshape(T + 1, 6))
        rows = states[:-1], unravel(us), jnp.arange(T)
        return jnp.sum(jax.vmap(problem.cost)(*rows)) + problem.terminal_cost(
            states[-1]
        )

    @jax.jit
    def step(flat):
        model = helpers.dense(outputs, total, flat)
        if isinstance(method, dp.GaussNewton):
            return model.step(2.0)
        hessian = jax.hessian(lambda flat: total(outputs(flat)))(flat)
        return helpers.damped_step(hessian, model.gradient, 2.0)

    found, result = dp.direction(problem, method, x0, us, damping=2.0)
    assert result == dp.RESULTS.successful
    close(jnp.ravel(found), step(flat), 1e-10, scale="largest")


@pytest.mark.slow
@pytest.mark.parametrize("method", [dp.Newton(), dp.DDP()], ids=name)
def test_errors_are_squared_near_the_solution(method):
    problem, x0, us = body()
    start = best().us + 0.3 * jnp.cos(jnp.arange(3.0 * T)).reshape(T, 3)
    found = solve(
        problem, method, x0, start, dp.FixedStep(), max_steps=5, atol=0, rtol=0
    )
    errors = np.asarray(found.history["gradient"])[:3]
    assert 1e-3 < errors[0] < 0.1 and errors[2] < 1e-9
    assert np.all(np.log(errors[1:]) / np.log(errors[:-1]) > 1.6), errors


def test_angles_go_the_short_way():
    """Closed form: T equal steps u = q e / (r + q T) for the wrapped error e."""
    goal, q, r, steps = 2 * math.pi - 0.1, 3.0, 0.5, 6
    problem = dp.ControlProblem(
        lambda x, u, t: x + u,
        lambda x, u, t: r / 2 * jnp.sum(u**2),
        lambda x: q / 2 * jnp.sum(Angle().difference(x, goal) ** 2),
        steps,
        manifold=Angle(),
    )
    for method in (dp.ILQR(), dp.Newton()):
        found = dp.solve(problem, method, jnp.array([0.1]), jnp.zeros((steps, 1)))
        u = q * -0.2 / (r + q * steps)
        close(found.us, jnp.full((steps, 1), u), 1e-12)
        close(found.xs[-1], jnp.array([0.1 + steps * u]), 1e-12)
        ways = [found.policy(2, found.xs[2] + turn) for turn in (0.0, 2 * math.pi)]
        close(ways[0], ways[1], 1e-12)


def test_attitudes_stay_unit_and_gains_take_the_short_way():
    found = best()
    norms = np.linalg.norm(found.xs[:, :4], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=1e-12)
    away = jax.jit(lambda q: attitude.difference(q, turned(TURN)))
    assert np.linalg.norm(away(found.xs[-1, :4])) < 0.6
    policy = found.policy
    assert policy.K.shape == (T, 3, 6)
    axis = np.array([0.6, -0.48, 0.64])
    x = found.xs[3]
    at = jax.jit(lambda angle: x.at[:4].set(turned(jnp.radians(angle) * axis, x[:4])))
    here = policy(3, at(-10.0))
    assert jnp.max(jnp.abs(here - found.us[3])) > 0.1
    close(policy(3, at(350.0)), here, 1e-12)
    close(policy(3, at(-10.0) * jnp.array(4 * [-1.0] + 3 * [1.0])), here, 1e-12)
    v = jnp.concatenate([math.radians(-10) * axis, jnp.zeros(3)])
    close(here, found.us[3] + policy.k[3] + policy.K[3] @ v, 1e-12)
    close(jax.jit(lambda policy, x: policy(3, x))(policy, at(-10.0)), here, 1e-12)
    compiled: Any = eqx.filter_jit(policy)
    close(compiled(3, at(-10.0)), here, 1e-12)


def split(x):
    return dict(q=x[..., :4], w=x[..., 4:])


def join(x):
    return jnp.concatenate([x["q"], x["w"]], -1)


@pytest.mark.slow
def test_trees_and_phases_are_the_same_problem():
    problem, x0, us = body()
    dynamics = lambda x, u, t: split(problem.dynamics(join(x), u, t))
    cost = lambda x, u, t: problem.cost(join(x), u, t)
    phases = dp.Phase(dynamics, cost, 3, (-9.0, 9.0)), dp.Phase(dynamics, cost, T - 3)
    terminal_cost = lambda x: problem.terminal_cost(join(x))
    chain = dp.Chain(phases, terminal_cost, manifold=TREE)
    tight: Any = dict(rtol=1e-15, atol=1e-15)
    found = dp.solve(chain, dp.ILQR(), split(x0), (us[:3], us[3:]), **tight)
    us = jnp.concatenate(found.us)
    close(us, best().us, 1e-7)
    close(join(found.xs[-1]), best().xs[-1], 1e-7)
    first, second = found.policy
    close(jnp.concatenate([first.K, second.K]), best().policy.K, 1e-6)
    close(second(5, split(-best().xs[5])), best().policy(5, -best().xs[5]), 1e-6)
    lams = found.multipliers.costates
    rows = [jnp.concatenate([lam["q"], lam["w"]], 1) for lam in lams[:2]]
    close(jnp.concatenate(rows), dp.costates(problem, x0, us)[:-1], 1e-10)


@pytest.mark.slow
def test_batches_and_maps_are_their_solves():
    problem, x0, us = body()
    x0s = jnp.stack([x0, x0.at[:4].set(turned([0.3, 0.1, -0.2]))])
    uss = jnp.stack([us, us])
    one = lambda x0, us: solve(problem, dp.ILQR(), x0, us)
    batch = dp.solve_batch(problem, dp.ILQR(), x0s, uss)
    mapped = jax.vmap(one)(x0s, uss)
    for i in range(2):
        alone = one(x0s[i], uss[i])
        for other in (batch[i], jtu.tree_map(lambda a, i=i: a[i], mapped)):
            assert other.stats["num_steps"] == alone.stats["num_steps"]
            close((other.xs, other.us), (alone.xs, alone.us), 1e-10)
            close(other.policy(2, -alone.xs[2]), alone.policy(2, -alone.xs[2]), 1e-10)
    each = jax.vmap(lambda policy, x: policy(1, x))(batch.policy, batch.xs[:, 1])
    close(each, batch.us[:, 1], 1e-4)


@pytest.mark.slow
def test_single_precision():
    found = dp.solve(body(jnp.float32)[0], dp.ILQR(), *body(jnp.float32)[1:])
    assert found.xs.dtype == found.policy.K.dtype == jnp.float32
    close(found.cost.astype(float), best().cost, 1e-5)
    norms = jnp.linalg.norm(found.xs[:, :4].astype(float), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", helpers.SECOND_ORDER, ids=name)
def test_gaps_between_attitudes_close(method):
    problem, x0, us = body()
    ways = jnp.linspace(0 * TURN, TURN, T + 1)
    xs = jnp.concatenate([turned(ways, jnp.tile(x0[:4], (T + 1, 1))), 0 * ways], 1)
    xs = xs.at[::2, :4].multiply(-1)  # the same attitudes
    found = dp.solve(problem, method, x0, us, xs=xs)
    new = jax.vmap(problem.dynamics)(xs[:-1], us, jnp.arange(T))
    gaps = jax.vmap(ARRAY.difference)(new, xs[1:])
    gaps = gaps.at[0].set(ARRAY.difference(problem.dynamics(x0, us[0], 0), xs[1]))
    close(found.history["gap"][0], jnp.max(jnp.abs(gaps)), 1e-12)
    assert found.stats["gap"] == 0 and found.history["gap"][0] > 0.1
    np.testing.assert_allclose(found.cost, best().cost, rtol=1e-7)
    norms = jnp.linalg.norm(found.xs[:, :4], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_wrong_manifolds():
    problem, x0, us = helpers.spring(3)

    def call(manifold: Any, x0=x0, method: Any = dp.ILQR()):
        system = helpers.Spring()
        other = dp.ControlProblem.from_system(system, 3, manifold=manifold)
        return dp.solve(other, method, x0, us)

    subtract, add = lambda x, y: x - y, lambda y, v: y + v
    with pytest.raises(TypeError, match=r"`manifold` is 3; .*dp.Manifold\(...\)"):
        call(3)
    with pytest.raises(ValueError, match=r"`difference\(x, x\)` of the manifold is 1"):
        call(dp.Manifold(lambda x, y: x - y + 1, add))
    with pytest.raises(ValueError, match="`retract` .* is not the inverse of `differ"):
        call(dp.Manifold(subtract, lambda y, v: y - v))
    with pytest.raises(ValueError, match=r"`retract` returned \(1,\); a state, \(2,\)"):
        call(dp.Manifold(subtract, lambda y, v: y[:1] + v[:1]))
    with pytest.raises(ValueError, match="`MoreauGradient` takes no `xs` and no `mani"):
        call(Angle(), method=dp.MoreauGradient())
    with pytest.raises(ValueError, match=r"`x0\[..., 0:4\]` is a quaternion of norm 2"):
        dp.solve(*body()[:1], dp.ILQR(), 2 * body()[1], body()[2])
    with pytest.raises(ValueError, match="`x0` is an array of shape .*blocks of 4, 3"):
        call(ARRAY)
