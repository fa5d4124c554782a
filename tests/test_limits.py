"""Limits of the controls: kept exactly, and optimal to first order within them."""

import dataclasses
import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp
from diffprog._control.lqr.base import bellman
from diffprog._control.lqr.box import solve_in_box

from . import environments, helpers
from .helpers import close, DIRECTIONS, name, SEARCHES, SECOND_ORDER


TIGHT: dict[str, Any] = dict(rtol=1e-15, atol=1e-15)
LIMITS = {
    "spring": (-0.2, 0.3),
    "linear": (jnp.array([-0.3, -1.0]), jnp.array([0.5, jnp.inf])),
}


def limited(problem, bounds):
    """The problem with these limits."""
    return dp.ControlProblem.from_system(problem.system, problem.horizon, bounds)


@ft.cache
def solved(chain, method, search=dp.Backtracking()):
    """A problem with limits, some of them reached, and its solution."""
    problem, x0, us = helpers.PROBLEMS[chain]()
    problem = limited(problem, LIMITS[chain])
    tolerances: dict[str, Any] = TIGHT
    if isinstance(method, dp.Gradient):
        tolerances = dict(rtol=0.0, atol=1e-10, max_steps=5000)
    return problem, x0, dp.solve(problem, method, x0, us, search, **tolerances)


def gradient_of(problem, x0, us):
    return jax.grad(lambda us: dp.rollout(problem, x0, us).cost)(us)


def excess(bounds, us):
    """How far the controls are beyond their limits."""
    lower, upper = (np.asarray(side) for side in bounds)
    return np.max(np.maximum(lower - np.asarray(us), np.asarray(us) - upper))


# One stage.


@ft.partial(jax.jit, static_argnums=2)
def stages(seed, width, m, n=3):
    """Random stages, with what the box rule makes of them."""
    draw = lambda i, *shape: jax.random.normal(
        jax.random.fold_in(jax.random.key(seed), i), (200, *shape)
    )
    square = lambda a: jnp.einsum("tij,tkj->tik", a, a)
    eye = lambda size: jnp.eye(size, dtype=float)[None]
    W = square(draw(0, 1 + n + m, 1 + n + m)) + 0.01 * eye(1 + n + m)
    V, F = square(draw(1, 1 + n, 1 + n)), draw(2, 1 + n, 1 + n + m)
    lower = -width * jnp.abs(draw(3, m))
    upper = lower + jnp.where(draw(5, m) > -1, width * jnp.abs(draw(4, m)), 0.0)

    def stage(F, W, V, lower, upper):
        found = bellman(F, W, V @ F, m, jnp.zeros(()), box=(lower, upper))
        return found, W + F.T @ V @ F

    found = jax.vmap(stage)(F, W, V, lower, upper)
    return found, lower, upper


@pytest.mark.costly
@pytest.mark.parametrize("m", [1, 2, 5])
def test_a_stage_minimizes_within_its_box(m):
    """k = clip(k - (G k + h)), and the cost-to-go is that of any gains, [k K]."""
    (found, Z), lower, upper = jtu.tree_map(np.asarray, stages(m, 0.5, m))
    V, gains, change, positive = found
    k, K = gains[:, :, 0], gains[:, :, 1:]
    G, H = Z[:, -m:, -m:], Z[:, -m:, :-m]
    g = np.einsum("tij,tj->ti", G, k) + H[:, :, 0]
    assert np.all(positive)
    size = 1 + np.max(np.abs(g), 1, keepdims=True)
    np.testing.assert_allclose((k - np.clip(k - g, lower, upper)) / size, 0, atol=1e-12)
    held = (k <= lower) | (k >= upper)
    assert 0.2 < held.mean() < 0.95
    np.testing.assert_array_equal(K[held], 0)
    # (3): Z_xx + H'[k K] + [k K]'H + [k K]'G[k K], whatever the gains; in y the first
    # column counts with the step itself.
    both = np.einsum("tui,tuj->tij", H, gains)
    whole = Z[:, :-m, :-m] + both + np.swapaxes(both, 1, 2)
    whole += np.einsum("tui,tuv,tvj->tij", gains, G, gains)
    whole[:, 0, 0] = V[:, 0, 0]
    scale = np.max(np.abs(whole), (1, 2), keepdims=True)
    np.testing.assert_allclose(V / scale, whole / scale, rtol=0, atol=1e-12)
    slope, curvature, _ = change.T
    np.testing.assert_allclose(slope, np.sum(H[:, :, 0] * k, 1), rtol=1e-12)
    kGk = np.einsum("ti,tij,tj->t", k, G, k)
    np.testing.assert_allclose(curvature, kGk, rtol=1e-12)


def test_the_box_of_one_control_is_a_cut_off_step():
    ((_, gains, _, _), Z), lower, upper = stages(0, 0.5, 1)
    expected = np.clip(-Z[:, -1, 0] / Z[:, -1, -1], lower[:, 0], upper[:, 0])
    np.testing.assert_allclose(gains[:, 0, 0], expected, rtol=1e-12)


def test_many_controls_take_the_factorization_of_a_library():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(9, 9))
    G, h = jnp.asarray(root @ root.T + np.eye(9)), jnp.asarray(rng.normal(size=(9, 1)))
    box = -0.05 * jnp.ones(9), 0.1 * jnp.ones(9)
    gains, positive = jax.jit(solve_in_box)(G, h, *box)
    k = gains[:, 0]
    assert positive and 0 < np.sum((k > box[0]) & (k < box[1])) < 9
    close(k, np.clip(k - (G @ k + h[:, 0]), *box), 1e-12)


def test_where_there_is_no_minimum_the_way_down_lies_within_the_box():
    G, h = -jnp.eye(2), jnp.zeros((2, 1))
    closed = jnp.zeros(2)
    box = jnp.array([-0.5, -0.5]), closed
    gains, positive = jax.jit(solve_in_box)(G, h, *box)
    assert not positive
    k = gains[:, 0]
    assert np.any(k < 0) and np.all(k >= -0.5) and np.all(k <= 0)


def test_what_pushes_against_a_limit_is_no_gradient():
    lower, upper = jnp.array([0.0, 0.0, 0.0, 1.0]), jnp.array([1.0, 1.0, 1.0, 1.0])
    u, gradient = jnp.array([0.0, 1.0, 0.5, 1.0]), jnp.array([2.0, 2.0, 2.0, -2.0])
    found = dp.extend.projected(gradient, u, lower, upper)
    np.testing.assert_array_equal(found, [0.0, 2.0, 2.0, 0.0])
    np.testing.assert_array_equal(dp.extend.projected(gradient, u), gradient)
    moved, v = dp.extend.moved(u, gradient, lower, upper)
    np.testing.assert_array_equal(moved, [1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(v, moved - u)


# Solutions.


@pytest.mark.slow
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
@pytest.mark.parametrize("chain", LIMITS)
def test_solutions_are_optimal_within_the_limits(chain, method):
    problem, x0, solution = solved(chain, method)
    bounds, us = LIMITS[chain], np.asarray(solution.us)
    first_order = isinstance(method, dp.Gradient)
    assert solution.success and excess(bounds, us) <= 0
    gradient = gradient_of(problem, x0, solution.us)
    found = solution.multipliers
    left = np.asarray(gradient + found.upper - found.lower)
    tol = 1e-4 if first_order else 1e-7
    np.testing.assert_allclose(left, 0, atol=tol)
    np.testing.assert_allclose(
        solution.stats["stationarity"], np.max(abs(left)), atol=1e-12
    )
    lower, upper = (np.broadcast_to(side, us.shape) for side in bounds)
    for multiplier, limit in ((found.lower, lower), (found.upper, upper)):
        assert np.all(np.asarray(multiplier) >= 0) and np.any(
            np.asarray(multiplier) > 0
        )
        np.testing.assert_array_equal(
            us[np.asarray(multiplier) > 0], limit[np.asarray(multiplier) > 0]
        )
    assert found.constraints == found.terminal == {}
    close(found.costates, dp.costates(problem, x0, solution.us), 1e-12)
    _, _, newton = solved(chain, dp.Newton())
    close(us, newton.us, 1e-3 if first_order else 1e-7)


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_limits_that_are_never_reached_change_nothing(method):
    problem, x0, us = helpers.spring()
    far = limited(problem, (-1e3, None))
    free, bound = (dp.solve(p, method, x0, us) for p in (problem, far))
    assert free.stats["num_steps"] == bound.stats["num_steps"]
    for part in ("us", "xs", "cost", "policy"):
        a, b = (jtu.tree_leaves(getattr(s, part)) for s in (free, bound))
        close(b[: len(a)], a, 1e-12)
    assert free.multipliers is None and "stationarity" not in free.stats
    assert not np.any(bound.multipliers.lower) and not np.any(bound.multipliers.upper)


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
@pytest.mark.parametrize("search", SEARCHES, ids=name)
def test_every_iterate_keeps_the_limits(method, search):
    problem, x0, us = helpers.linear()
    problem = limited(problem, LIMITS["linear"])
    state = dp.init(problem, method, x0, us, search)  # outside, and cut off
    assert excess(LIMITS["linear"], us) > 0 >= excess(LIMITS["linear"], state.us)
    for _ in range(4):
        state = dp.step(problem, state)
        assert excess(LIMITS["linear"], state.us) <= 0
    du, _ = dp.direction(problem, method, x0, us)
    assert excess(LIMITS["linear"], us + du) <= 1e-15


@pytest.mark.costly
@pytest.mark.parametrize("method", SECOND_ORDER, ids=name)
def test_limits_that_meet_fix_a_control(method):
    problem, x0, us = helpers.linear()
    fixed = jnp.sin(jnp.arange(12.0))
    bounds = tuple(
        jnp.stack([fixed, jnp.full(12, side)], 1) for side in (-jnp.inf, jnp.inf)
    )
    solution = dp.solve(limited(problem, bounds), method, x0, us)
    np.testing.assert_array_equal(solution.us[:, 0], fixed)
    np.testing.assert_array_equal(solution.policy.K[:, 0], 0)
    lqr = problem.system.lqr  # the other control alone
    q = lqr.q + lqr.M[:, :, 0] * fixed[:, None]
    r = lqr.r + lqr.R[:, 0] * fixed[:, None]
    c = lqr.c + lqr.B[:, :, 0] * fixed[:, None]
    one = (lqr.A, lqr.B[:, :, 1:], c, lqr.Q, lqr.R[:, 1:, 1:], lqr.M[:, :, 1:])
    alone = dp.LQR(*one, q, r[:, 1:], lqr.Q_final, lqr.q_final)
    close(solution.us[:, 1:], dp.solve_lqr(alone, x0).us, 1e-10)


def test_the_policy_cuts_off_and_does_not_answer_at_a_limit():
    problem, x0, solution = solved("spring", dp.DDP())
    policy, us = solution.policy, np.asarray(solution.us[:, 0])
    held = (us == -0.2) | (us == 0.3)
    assert 0 < held.sum() < len(us)
    np.testing.assert_array_equal(policy.K[held], 0)
    assert np.all(np.any(np.asarray(policy.K[~held]) != 0, axis=(1, 2)))
    for t in range(12):
        far = solution.xs[t] + jnp.array([30.0, -20.0])
        assert -0.2 <= policy(t, far)[0] <= 0.3
        close(policy(t, solution.xs[t]), solution.us[t], 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES[1:], ids=name)
def test_a_warm_start_at_a_solution_takes_no_step(search):
    problem, x0, solution = solved("linear", dp.ILQR(), search)
    again = dp.solve(problem, dp.ILQR(), x0, solution.us, search)
    assert again.success and again.stats["num_steps"] == 0
    np.testing.assert_array_equal(again.us, solution.us)


# Published and reference values.


def varying():
    """Limits that change with the stage, and are missing at some."""
    t = np.arange(100)
    lower = np.where(t >= 70, -np.inf, -3 - 2 * np.sin(t / 8))
    upper = np.where(t < 10, np.inf, 3 + 2 * np.cos(t / 11))
    return lower[:, None], upper[:, None]


# Limits, cost, how many limits are reached, the largest multiplier and their sum.
PENDULUM = {
    "constant": ((-3.0, 3.0), 40.7089294481, 33, 0.1680068, 2.52555),
    "varying": (varying(), 42.19348461612, 22, 0.1728135, 1.955257),
}


@pytest.mark.costly
@pytest.mark.parametrize("limits", PENDULUM)
def test_pendulum(limits):
    bounds, cost, reached, largest, total = PENDULUM[limits]
    problem, x0, us = helpers.pendulum()
    problem = limited(problem, bounds)
    solution = dp.solve(problem, dp.DDP(), x0, us, **TIGHT)
    assert solution.stats["num_steps"] <= 40
    close(solution.cost, cost, 1e-8, 1.0)
    found = np.concatenate([solution.multipliers.lower, solution.multipliers.upper])
    assert np.sum(found > 0) == reached
    np.testing.assert_allclose([found.max(), found.sum()], [largest, total], rtol=1e-5)
    assert solution.stats["stationarity"] < 1e-8 and excess(bounds, solution.us) <= 0


def test_published_pendulum():
    problem, x0, us = environments.pendulum()
    problem = limited(problem, (-8.0, 8.0))
    solution = dp.solve(problem, dp.DDP(), x0, us, **TIGHT)
    np.testing.assert_allclose(solution.cost, 0.001368214827967, rtol=1e-9)
    assert np.sum(np.abs(solution.us) == 8) == 2


class Parking(eqx.Module):
    """A car backs into its place: the front wheels turn and accelerate.

    Source: Y. Tassa, N. Mansard, E. Todorov, "Control-Limited Differential Dynamic
    Programming", 2014.
    """

    dt: float = 0.03
    wheelbase: float = 2.0

    def dynamics(self, x, u, t):
        heading, speed = x[2], x[3]
        front = self.dt * speed
        side = front * jnp.sin(u[0])
        back = jnp.sqrt(self.wheelbase**2 - side**2)
        back = self.wheelbase + front * jnp.cos(u[0]) - back
        step = back * jnp.cos(heading), back * jnp.sin(heading)
        turn = jnp.arcsin(side / self.wheelbase)
        return x + jnp.stack([*step, turn, self.dt * u[1]])

    def cost(self, x, u, t):
        near = smooth_abs(x[:2], 0.1)
        return 0.01 * (u[0] ** 2 + 0.01 * u[1] ** 2) + 0.001 * jnp.sum(near)

    def terminal_cost(self, x):
        errors = smooth_abs(x, jnp.array([0.01, 0.01, 0.01, 1.0]))
        return jnp.sum(jnp.array([0.1, 0.1, 1.0, 0.3]) * errors)


def smooth_abs(z, width):
    return jnp.sqrt(z**2 + width**2) - width


def parking():
    t = jnp.arange(500.0)
    us = jnp.stack([0.1 * jnp.sin(0.7 * t), 0.1 * jnp.cos(1.3 * t)], 1)
    limit = jnp.array([0.5, 2.0])
    problem = dp.ControlProblem.from_system(Parking(), 500, (-limit, limit))
    return problem, jnp.array([1.0, 1.0, 1.5 * jnp.pi, 0.0]), us


MINIMA = 1.905167203444, 2.027223778287


@pytest.mark.slow
@pytest.mark.parametrize("method", [dp.DDP(), dp.ILQR()], ids=name)
def test_parking(method):
    """The cost of a listed minimum, or a lower one."""
    problem, x0, us = parking()
    solution = dp.solve(problem, method, x0, us, max_steps=500, **TIGHT)
    assert solution.success and solution.stats["stationarity"] < 1e-7
    listed = min(abs(solution.cost - minimum) for minimum in MINIMA)
    assert listed < 1e-8 or solution.cost < MINIMA[0]
    assert excess(problem.control_bounds, solution.us) <= 0


# Batches, numbers, phases, trees.


@pytest.mark.slow
def test_vmap_equals_the_loop():
    problem, x0, us = helpers.spring()
    tops = jnp.array([0.05, 0.3, 1.0, -5.0])  # the last one lies below the lower limit
    solve = lambda top, x0: dp.solve(limited(problem, (-0.2, top)), dp.DDP(), x0, us)
    x0s = x0[None] + jnp.linspace(0.0, 1.0, 4)[:, None]
    batch = jax.jit(jax.vmap(solve))(tops, x0s)
    one = jax.jit(solve)
    for i in range(4):
        single = one(tops[i], x0s[i])
        assert batch[i].result == single.result
        assert batch.stats["num_steps"][i] == single.stats["num_steps"]
        close(batch[i].us, single.us, 1e-12)
    assert batch[3].result == dp.RESULTS.infeasible
    assert np.all(batch.success[:3])


def test_a_batch_of_limits():
    problem, x0, us = helpers.spring()
    x0s, uss = (jnp.broadcast_to(a, (3, *a.shape)) for a in (x0, us))
    many = limited(problem, (jnp.array([-0.1, -0.2, -0.3]), 0.3))
    axes = jtu.tree_map(lambda _: None, many)
    axes = eqx.tree_at(
        lambda p: p.bounds[0], axes, 0, is_leaf=lambda leaf: leaf is None
    )
    batch = dp.solve_batch(many, dp.DDP(), x0s, uss, in_axes=axes)
    assert np.all(batch.success)
    close(jnp.min(batch.us[:, :, 0], 1), jnp.array([-0.1, -0.2, -0.3]), 1e-15)
    close(
        batch[1].us, dp.solve(limited(problem, LIMITS["spring"]), dp.DDP(), x0, us).us
    )


@pytest.mark.slow
def test_float32():
    problem, x0, us = helpers.linear(dtype=jnp.float32)
    bounds = tuple(side.astype(jnp.float32) for side in LIMITS["linear"])
    solution = dp.solve(limited(problem, bounds), dp.ILQR(), x0, us)
    assert solution.success and solution.us.dtype == jnp.float32
    assert solution.stats["stationarity"] < 1e-4 and excess(bounds, solution.us) <= 0
    leaves = jtu.tree_leaves(solution.multipliers)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.slow
def test_phases_have_limits_of_their_own():
    chain, x0, us = helpers.two_phase()
    free = dp.solve(chain, dp.DDP(), x0, us)
    top = 0.5 * float(jnp.max(free.us[0]))
    first = dataclasses.replace(chain.phases[0], control_bounds=(None, top))
    chain = dataclasses.replace(chain, phases=(first, *chain.phases[1:]))
    solution = dp.solve(chain, dp.DDP(), x0, us, **TIGHT)
    assert solution.success and jnp.max(solution.us[0]) == top
    gradient = gradient_of(chain, x0, solution.us)
    found = solution.multipliers
    left = jtu.tree_map(lambda g, a, b: g - a + b, gradient, found.lower, found.upper)
    for leaf in jtu.tree_leaves(left):
        np.testing.assert_allclose(leaf, 0, atol=1e-7)
    assert not np.any(found.upper[1]) and not np.any(found.lower[0])
    shapes = lambda tree: jtu.tree_map(jnp.shape, tree)
    assert shapes(found.costates) == shapes(solution.xs)
    start = jax.grad(lambda x0: dp.rollout(chain, x0, solution.us).cost)(x0)
    close(jtu.tree_map(lambda a: a[0], found.costates[0]), start, 1e-12)


def test_limits_are_trees_like_a_control_or_like_all():
    system = helpers.Spring()
    dynamics = lambda x, u, t: system.dynamics(x, u["push"] + u["pull"][None], t)
    cost = lambda x, u, t: system.cost(x, u["push"], t) + u["pull"] ** 2
    us = dict(push=jnp.zeros((12, 1)), pull=jnp.zeros(12))
    solve = lambda *bounds: dp.solve(
        dp.ControlProblem(dynamics, cost, system.terminal_cost, 12, bounds),
        dp.ILQR(),
        jnp.array([1.0, 0.0]),
        us,
    )
    rows = np.linspace(-0.02, -0.01, 12)
    one = solve(dict(push=-0.05, pull=rows), dict(push=jnp.array([0.2]), pull=1))
    assert np.min(one.us["push"]) == -0.05 and np.all(one.us["pull"] >= rows)
    assert np.any(one.us["pull"] == rows)
    close(solve(-0.1, None).us, solve(dict(push=-0.1, pull=-0.1), 9.0).us, 1e-9)
    assert jtu.tree_structure(one.multipliers.lower) == jtu.tree_structure(us)
    point = {"push": jnp.array([0.0]), "pull": jnp.array(0.0)}
    assert jtu.tree_structure(one.policy(0, jnp.zeros(2))) == jtu.tree_structure(point)


@pytest.mark.slow
def test_a_system_may_have_limits():
    class Limited(helpers.Spring):
        most: float = 0.3

        @property
        def control_bounds(self):
            return -0.2, self.most

    problem = dp.ControlProblem.from_system(Limited(), 12)
    assert len(jtu.tree_leaves(problem)) == len(jtu.tree_leaves(Limited()))
    _, x0, us = helpers.spring()
    solution = dp.solve(problem, dp.DDP(), x0, us)
    close(solution.us, solved("spring", dp.DDP())[2].us, 1e-4)
    other = dp.ControlProblem.from_system(Limited(), 12, (-0.1, 0.1))
    assert np.max(np.abs(dp.solve(other, dp.DDP(), x0, us).us)) == 0.1


# What is refused.


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (3.0, "`control_bounds` is 3.0; a pair `(lo, hi)` is expected"),
        ((1.0, 2.0, 3.0), "a pair `(lo, hi)` is expected"),
        (
            (1.0, -1.0),
            "the lower limit is 1.0, above the upper one, -1.0",
        ),
        (
            [(-1.0, 1.0), (-2.0, 2.0)],
            "a control. `(lo, hi)` has all lower limits, then all upper ones.",
        ),
        (
            (dict(a=jnp.array([0.0, 2.0])), dict(a=jnp.array([1.0, 1.0]))),
            "the lower limit['a'][1] is 2.0, above the upper one, 1.0",
        ),
        ((None, -jnp.inf), "`control_bounds[1]` is -inf, which no control keeps"),
        ((np.inf, None), "`control_bounds[0]` is inf, which no control keeps"),
        ((-1.0, jnp.nan), "`control_bounds[1]` has a NaN; where there is no limit"),
        (("a", 1.0), "`control_bounds[0]` is 'a'; a number or an array"),
        ((True, 1.0), "`control_bounds[0]` is True; a number or an array"),
        ((np.array([True]), 1.0), "`control_bounds[0]` has dtype bool"),
    ],
)
def test_wrong_limits_are_refused(bounds, message, unchecked):
    system = helpers.Spring()
    functions = system.dynamics, system.cost, system.terminal_cost
    for make in (
        lambda: dp.ControlProblem(*functions, 12, bounds),
        lambda: dp.Phase(*functions[:2], 12, bounds),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            make()
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            ([-1.0, -1.0], 1.0),
            "a list of numbers is a tree as well: an array is `jnp.array",
        ),
        ((jnp.zeros(3), None), "`control_bounds[0]` has shape (3,); that of a control"),
        ((None, jnp.ones((5, 2))), "or of all stages, (12, 2), is expected"),
    ],
)
def test_limits_that_do_not_fit_the_controls_are_refused(bounds, message):
    problem, x0, us = helpers.linear()
    with pytest.raises(ValueError) as caught:
        dp.solve(limited(problem, bounds), dp.ILQR(), x0, us)
    assert message in str(caught.value)


def test_crossed_limits_that_are_traced_have_a_code():
    problem, x0, us = helpers.spring()
    rows = jnp.where(jnp.arange(12) == 7, 1.0, -1.0)[:, None]
    solve = lambda lower: dp.solve(limited(problem, (lower, 0.5)), dp.DDP(), x0, us)
    for wrong in (1.0, jnp.nan, jnp.inf):
        lower = jnp.where(rows > 0, wrong, rows)
        solution = jax.jit(solve)(lower)
        assert solution.result == dp.RESULTS.infeasible
        message = "No point that satisfies the constraints was found. At stage 7 there"
        assert message in repr(solution)


class Loose(dp.AbstractRollout):
    """A roll-out that knows of no limits."""

    keeps_limits: ClassVar[bool] = False

    def roll(self, chain, trajectory, model, gains, stepsize):
        return dp.Feedback().roll(chain, trajectory, model, gains, stepsize)


class Careless(dp.ILQR):
    rollout = Loose()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (dp.MoreauGradient(), "`MoreauGradient` takes no `control_bounds`"),
        (dp.GaussNewton(dp.ParallelRiccati()), "`ParallelRiccati` takes no"),
        (Careless(), "`Loose` does not keep the limits of the controls"),
    ],
    ids=lambda value: name(value),
)
def test_who_keeps_no_limits_says_so(method, message):
    problem, x0, us = helpers.spring()
    with pytest.raises(ValueError, match=message):
        dp.solve(limited(problem, (-1.0, 1.0)), method, x0, us)


def test_a_network_takes_no_limits(unchecked):
    net = dp.Network((eqx.nn.Linear(2, 1, key=jax.random.key(0)),))
    with pytest.raises(TypeError, match="takes no `control_bounds`: the controls are"):
        make: Any = dp.NetworkProblem
        make(net, lambda o, t: o, jnp.zeros(2), control_bounds=(0.0, 1.0))


@pytest.mark.slow
def test_new_limits_do_not_compile_again():
    problem, x0, us = helpers.spring()
    traces = 0

    def dynamics(x, u, t):
        nonlocal traces
        traces += 1
        return problem.dynamics(x, u, t)

    system = problem.system
    for top in (0.3, 0.2, 1, jnp.inf):
        limits = dp.ControlProblem(
            dynamics, system.cost, system.terminal_cost, 12, (-0.2, top)
        )
        dp.solve(limits, dp.ILQR(), x0, us)
    assert traces <= 2
