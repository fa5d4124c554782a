import dataclasses
import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._control.direction.base import linear_quadratic
from diffprog._control.lqr.expand import Recomputed, Stored, WithTensors

from . import helpers
from .helpers import BIASED, DIRECTIONS, name, SECOND_ORDER


CHAINS = ["spring", "ragged", "two_phase"]
LINEAR_ROLLOUT = [d for d in DIRECTIONS if isinstance(d.rollout, dp.LinearRollout)]


close = ft.partial(helpers.close, scale="norm")


@pytest.mark.costly
@pytest.mark.parametrize("chain", [*CHAINS, "pendulum"])
def test_gradient_is_minus_the_gradient_of_the_objective(chain):
    problem, x0, us = helpers.PROBLEMS[chain]()
    du, result = dp.direction(problem, dp.Gradient(), x0, us)
    gradient = helpers.gradient(chain)(us)
    close(du, jtu.tree_map(jnp.negative, gradient), 1e-12)
    assert result == dp.RESULTS.successful


@pytest.mark.costly
@pytest.mark.parametrize("method", LINEAR_ROLLOUT, ids=name)
@pytest.mark.parametrize("chain", CHAINS)
def test_step_equals_the_dense_one(chain, method):
    problem, x0, us = helpers.PROBLEMS[chain]()
    dense = helpers.dense_step(problem, method, x0, us)
    # The Hessian of a network is indefinite, whatever its numbers.
    for damping in (30.0, 100.0) if chain == "ragged" else (3.0, 30.0):
        du, _ = dp.direction(problem, method, x0, us, damping=damping)
        close(ravel_pytree(du)[0], dense(damping), 1e-10)


@pytest.mark.costly
@pytest.mark.parametrize("method", SECOND_ORDER, ids=name)
def test_one_full_step_solves_a_linear_quadratic_problem(method):
    problem, x0, us = helpers.linear()
    before = dp.rollout(problem, x0, us).cost
    solution = dp.solve(problem, method, x0, us, dp.FixedStep(), max_steps=1)
    optimum = dp.solve_lqr(problem.system.lqr, x0)
    close(solution.us, optimum.us, 1e-12)
    np.testing.assert_allclose(solution.cost, optimum.cost, rtol=1e-12)
    expected = solution.history["slope"][0] / 2
    np.testing.assert_allclose(solution.cost - before, expected, rtol=1e-12)
    gradient = helpers.gradient("linear")
    scale = np.linalg.norm(gradient(us))
    assert np.linalg.norm(gradient(solution.us)) <= 2e-14 * scale
    close(solution.policy.K, optimum.policy.K, 1e-12)


def test_second_order_directions_agree_on_a_linear_quadratic_problem():
    problem, x0, us = helpers.linear()
    steps = [dp.direction(problem, d, x0, us, damping=0.0)[0] for d in SECOND_ORDER]
    optimum = dp.solve_lqr(problem.system.lqr, x0).us
    for step in steps:
        close(step, optimum - us, 1e-12)


@pytest.mark.costly
@pytest.mark.parametrize(
    "chain, method",
    [
        *(("spring", method) for method in [*DIRECTIONS, *BIASED]),
        ("ragged", dp.GaussNewton()),
        ("ragged", dp.DDP()),
        ("two_phase", dp.Newton()),
        ("two_phase", dp.ILQR()),
    ],
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_rollout_near_step_size_zero(chain, method):
    """The same trajectory at 0, where the slope is the cost's derivative."""
    problem, x0, us = helpers.PROBLEMS[chain]()
    gradient = helpers.gradient(chain)(us)

    @jax.jit
    def roll(x0, us, damping):
        chain, trajectory = helpers.vectors(problem, x0, us)
        model = method.expand(chain, trajectory).model
        sweep = method.backward(chain, trajectory, model, damping)

        def new(stepsize):
            return method.forward(chain, trajectory, model, sweep, stepsize)[0]

        at_zero, change = jax.jvp(new, (jnp.zeros(()),), (jnp.ones(()),))
        return trajectory, at_zero, change.cost, sweep

    trajectory, new, slope, sweep = roll(x0, us, jnp.asarray(30.0))
    # The compiler may round the two loops in its own way each.
    for a, b in zip(jtu.tree_leaves(trajectory), jtu.tree_leaves(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=1e-14)
    assert slope < 0
    np.testing.assert_allclose(sweep.slope, slope, rtol=1e-12)
    np.testing.assert_allclose(sweep.slope + sweep.curvature, 0.0, atol=1e-12)
    norm = np.linalg.norm(ravel_pytree(gradient)[0])
    np.testing.assert_allclose(sweep.gradient, norm, rtol=1e-12)


@pytest.mark.parametrize("method", LINEAR_ROLLOUT, ids=name)
def test_decrement_is_that_of_the_undamped_model_along_the_direction(method):
    # With one stage the feedforward terms are the whole step.
    problem, x0, us = helpers.spring(T=1)

    @jax.jit
    def swept(damping):
        chain, trajectory = helpers.vectors(problem, x0, us)
        model = method.expand(chain, trajectory).model
        return method.backward(chain, trajectory, model, damping)

    sweeps = [swept(damping) for damping in (0.0, 3.0, 1e6)]
    assert sweeps[0].slope < 0
    for sweep in sweeps:
        np.testing.assert_allclose(sweep.decrement, -sweeps[0].slope / 2, rtol=1e-8)


@pytest.mark.costly
@pytest.mark.parametrize("method", [*DIRECTIONS, *BIASED], ids=name)
def test_large_damping_tends_to_the_gradient(method):
    problem, x0, us = helpers.spring()
    du, _ = dp.direction(problem, method, x0, us, damping=1e9)
    gradient = helpers.gradient("spring")(us)
    close(1e9 * du, -gradient, 1e-6)


def test_newton_and_ddp_agree_on_one_stage_and_at_a_stationary_point():
    problem, x0, us = helpers.spring(T=1)
    step = lambda method: dp.direction(problem, method, x0, us)[0]
    assert jnp.linalg.norm(step(dp.DDP())) > 1e-2
    close(step(dp.Newton()), step(dp.DDP()), 1e-12)
    close(step(dp.GaussNewton()), step(dp.ILQR()), 1e-12)
    problem, x0, us = helpers.spring()
    newton = dp.solve(problem, dp.Newton(), x0, us, rtol=0.0, atol=0.0)
    size = lambda us: np.linalg.norm(helpers.gradient("spring")(us))
    assert size(newton.us) < 1e-6 * size(us)
    ddp = dp.solve(problem, dp.DDP(), x0, newton.us, rtol=0.0, atol=0.0)
    close(newton.policy.K, ddp.policy.K, 1e-6)


@pytest.mark.costly
@pytest.mark.parametrize("method", SECOND_ORDER, ids=name)
def test_gradients_flow_through_a_direction(method):
    """The derivative of a step with respect to a parameter, by central differences."""

    def total(stiffness):
        problem, x0, us = helpers.spring()
        problem = dp.ControlProblem.from_system(helpers.Spring(stiffness), 12)
        return jnp.sum(dp.direction(problem, method, x0, us, damping=1.0)[0])

    exact = jax.grad(total)(0.3)
    numeric = (total(0.3 + 1e-5) - total(0.3 - 1e-5)) / 2e-5
    assert abs(exact) > 1e-3
    np.testing.assert_allclose(exact, numeric, rtol=1e-7)


def test_indefinite_stage_raises_when_concrete_and_is_nan_when_traced():
    saddle = dp.ControlProblem(
        lambda x, u, t: x + u, lambda x, u, t: -jnp.sum(u**2), lambda x: 0.0, 3
    )
    x0, us = jnp.ones(1), jnp.ones((3, 1))
    with pytest.raises(dp.SolveError, match="not positive definite"):
        dp.direction(saddle, dp.ILQR(), x0, us)
    du, result = jax.jit(lambda us: dp.direction(saddle, dp.ILQR(), x0, us))(us)
    assert np.all(np.isnan(du)) and result == dp.RESULTS.factorization_failed
    du, result = dp.direction(saddle, dp.ILQR(), x0, us, damping=10.0)
    np.testing.assert_allclose(du, 2 / (10 - 2), rtol=1e-14)
    assert result == dp.RESULTS.successful


class Follower(dp.AbstractDirection):
    """The pattern of iLQR, as a user would write it."""

    rollout: ClassVar[dp.AbstractRollout] = dp.Feedback()

    def expand(self, chain, trajectory):
        return linear_quadratic(chain, trajectory)

    def backward(self, chain, trajectory, model, damping):
        return dp.Riccati().backward(chain, trajectory, model, damping)


@pytest.mark.slow
def test_a_direction_of_a_user_gets_the_fast_path_unasked(monkeypatch):
    """Its model is found again by each pass in loops that are one function."""
    problem, x0, us = helpers.spring()
    expected = dp.solve(problem, dp.ILQR(), x0, us)
    kinds, expand = [], Follower.expand
    record = lambda *args: (e := expand(*args), kinds.append(type(e.model)))[0]
    monkeypatch.setattr(Follower, "expand", record)
    solution = dp.solve(problem, Follower(), x0, us, fast_loops=True)
    close(solution.us, expected.us, 1e-12)
    assert kinds == [Recomputed, Stored]  # on the CPU, and elsewhere


def affine_model(F, W, V):
    """The chain and trajectory of zeros whose local model has gaps c in F."""
    T, m = len(F), W.shape[1] - V.shape[0]
    A, B = F[:, 1:, 1 : len(V)], F[:, 1:, len(V) :]
    dynamics = lambda x, u, t: A[t] @ x + B[t] @ u
    cost = lambda x, u, t: 0.0 * jnp.sum(u)
    problem = dp.ControlProblem(dynamics, cost, lambda x: 0.0 * x[0], T)
    return helpers.vectors(problem, jnp.zeros(len(V) - 1), jnp.zeros((T, m)))


@pytest.mark.slow
def test_gaps_of_the_dynamics_live_in_the_model(getkey):
    """With c in F gains, controls, slope and curvature are those of the LQR problem."""
    lqr = helpers.random_lqr(getkey(), T=6, n=3, m=2)
    F, W, V = lqr.blocks()
    model, damping = Stored(V, (F,), (W,)), jnp.asarray(0.3)
    chain, trajectory = affine_model(F, W, V)
    sweeps = [
        riccati.backward(chain, trajectory, model, damping)
        for riccati in (dp.Riccati(), dp.ParallelRiccati())
    ]
    R = lqr.R + damping * jnp.eye(2)[None]
    damped = eqx.tree_at(lambda lqr: lqr.R, lqr, R)
    exact = dp.solve_lqr(damped, jnp.zeros(3))
    _, (vs,) = dp.LinearRollout().roll(
        chain, trajectory, model, sweeps[0].gains, jnp.ones(())
    )
    close(vs, exact.us, 1e-12)
    P, p, c = exact.value.P[1:], exact.value.p[1:], lqr.c
    h = lqr.r + jnp.einsum("tij,ti->tj", lqr.B, p + jnp.einsum("tij,tj->ti", P, c))
    G = R + jnp.einsum("tki,tkl,tlj->tij", lqr.B, P, lqr.B)
    for sweep in sweeps:
        gains = jnp.concatenate([exact.policy.k[:, :, None], exact.policy.K], 2)
        close(sweep.gains, (gains,), 1e-10)
        k = exact.policy.k
        slope, curvature = jnp.sum(h * k), jnp.einsum("ti,tij,tj->", k, G, k)
        np.testing.assert_allclose(sweep.slope, slope, rtol=1e-10)
        np.testing.assert_allclose(sweep.curvature, curvature, rtol=1e-10)
        squares = jnp.sum(k**2)
        promised = slope**2 / 2 / (curvature - damping * squares)
        np.testing.assert_allclose(sweep.decrement, promised, rtol=1e-9)


@pytest.mark.costly
@pytest.mark.parametrize("second_order", [False, True])
def test_models_of_a_chain_agree(second_order):
    """What is found again by each pass is what is stored, stage by stage."""
    problem, x0, us = helpers.spring(T=5)
    p = jnp.asarray([0.7, -0.3])

    @jax.jit
    def parts(x0, us):
        chain, trajectory = helpers.vectors(problem, x0, us)
        once = dataclasses.replace(chain, loops="fused")
        models = [
            linear_quadratic(c, trajectory, second_order=second_order).model
            for c in (chain, once)
        ]
        assert type(models[0]) is (WithTensors if second_order else Stored)
        assert type(models[1]) is Recomputed
        data = (trajectory.xs, trajectory.us, chain.ts)
        stages = [
            chain.map(
                lambda segment, *row, model=model: model.stage(segment, p, *row),
                *data,
                *model.rows,
            )
            for model in models
        ]
        dynamics = [model.dynamics(chain, trajectory) for model in models]
        if second_order:
            return stages, dynamics
        return stages, dynamics, [m.stored(chain, trajectory).W for m in models]

    stages, *others = parts(x0, us)
    same: Any = close
    same(*stages, rtol=1e-13)
    for other in others:
        same(*other, rtol=1e-14)
