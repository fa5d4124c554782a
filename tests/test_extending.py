"""Parts as users write them, through public names and `dp.extend` alone: what the tests
say of ours holds for them, and what breaks its contract is told by name.
"""

import ast
import inspect
import pathlib
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog import extend

from . import (
    helpers,
    test_directions,
    test_loss_interface,
    test_losses,
    test_searches,
    test_solve,
    test_value_and_direction,
)


class Clipped(dp.AbstractRollout):
    """Feedback that changes no control by more than `limit`."""

    limit: float = 1e3

    keeps_limits: ClassVar[bool] = True

    def roll(self, chain, trajectory, model, gains, stepsize):
        def control(segment, x_new, _, x, u, gains, *limits):
            y = segment.difference(x_new, x)
            v = stepsize * gains[:, 0] + extend.matmul(gains[:, 1:], y)
            u, v = extend.moved(u, jnp.clip(v, -self.limit, self.limit), *limits)
            return u, None, v

        x0, data = trajectory.xs[0][0], (trajectory.xs, trajectory.us, gains)
        return extend.simulate(chain, control, x0, None, *data, *chain.limits)


class ProjectedNewton(dp.AbstractDirection):
    """Newton's stage Hessians, each replaced by its positive part."""

    rollout: ClassVar[dp.AbstractRollout] = Clipped()

    def expand(self, chain, trajectory):
        _, lams, _ = extend.adjoints(chain, trajectory)
        expansion = extend.linear_quadratic(chain, trajectory, weights=lams)
        W = chain.map(self.positive_part, expansion.model.W)
        return eqx.tree_at(lambda e: e.model.W, expansion, W)

    @staticmethod
    def positive_part(segment, W):
        values, vectors = jnp.linalg.eigh(W[1:, 1:])
        positive = vectors * jnp.maximum(values, 0)[None]
        return W.at[1:, 1:].set(positive @ vectors.T)

    def backward(self, chain, trajectory, model, damping):
        return dp.Riccati().backward(chain, trajectory, model, damping)


class GainRatio(dp.AbstractSearch):
    """Full steps; the damping follows the ratio of true to promised decrease."""

    factor: float = 4.0
    min_damping: float = 1e-6
    max_damping: float = 1e10

    monotone: ClassVar[bool] = True
    exhausted: ClassVar[dp.RESULTS] = dp.RESULTS.no_descent
    no_minimum: ClassVar[dp.RESULTS] = dp.RESULTS.damping_limit

    def init(self, dtype):
        number = lambda value: jnp.asarray(value, dtype)
        return dp.SearchState(number(1.0), number(0.0), number(0.0), jnp.int32(0))

    def begin(self, state, cost_gradient):
        damping = jnp.where(state.scale < self.min_damping, 0, state.scale)
        return dp.SearchState(state.stepsize, damping, damping, jnp.int32(0))

    def step(self, state, trial):
        promised = trial.slope + trial.curvature / 2
        ratio = (trial.trial_cost - trial.cost) / promised
        accept = trial.decreases(1e-4 * promised)
        more = jnp.maximum(state.damping * self.factor, self.min_damping)
        after = jnp.where(ratio > 0.75, state.damping / self.factor, state.damping)
        after = jnp.where(accept & (ratio > 0.25), after, more)
        damping = jnp.where(accept, state.damping, more)
        fail = ~accept & (more > self.max_damping)
        state = dp.SearchState(state.stepsize, damping, after, state.trials + 1)
        return state, dp.Verdict(accept, ~accept & ~fail, fail)

    def reject(self, state):
        damping = jnp.maximum(state.damping * self.factor, self.min_damping)
        fail = damping > self.max_damping
        state = dp.SearchState(state.stepsize, damping, damping, state.trials)
        return state, dp.Verdict(jnp.zeros_like(fail), ~fail, fail)


class Arsinh(dp.losses.AbstractDivergence):
    """f' = (u - 1/u) / 2, half way from chi-square to reverse KL: u = e^arsinh v."""

    sparse: ClassVar[bool] = False
    convex_ratio: ClassVar[bool] = True
    origin: ClassVar[float] = 0.0
    at_zero: ClassVar[float] = jnp.inf
    lift: ClassVar[float] = 0.0

    def value(self, u):
        return (u**2 - 1) / 4 - jnp.log(u) / 2

    def link(self, u):
        return (u - 1 / u) / 2

    def pair(self, w):
        u = jnp.exp(jnp.arcsinh(w))
        return u, self.curvature(u)

    def curvature(self, u):
        return 2 * u**2 / (1 + u**2)

    def conjugate(self, w):
        u, _ = self.pair(w)
        return u * w - self.value(u)

    def mean_step(self, S, Q):
        return (S - 1) * (1 + Q**2 / S) / 2 * self.curvature(S / Q)


class Quantile(dp.losses.AbstractDualLoss):
    """Sum of max(-q r, (1 - q) r), r = u - y: least at the quantile 1 - q of the y."""

    q: float = 0.3

    smooth: ClassVar[bool] = False

    def __call__(self, outputs, targets):
        r = outputs - extend.like(outputs, targets)
        return extend.total(jnp.maximum(-self.q * r, (1 - self.q) * r))

    def count(self, outputs, targets):
        return extend.like(outputs, targets).shape[0]

    def gradient(self, outputs, targets):
        return jnp.where(outputs > extend.like(outputs, targets), 1.0, 0.0) - self.q

    def hessian_mv(self, outputs, targets, vector):
        return jnp.zeros_like(vector)

    def factor(self, outputs, targets):
        return extend.flat_factor(self.gradient(outputs, targets))

    def conjugate(self, alpha, targets):
        beyond = jnp.abs(alpha - self.dual_projection(alpha, targets)) > 1e-13
        return extend.total(jnp.where(beyond, jnp.inf, alpha * targets))

    def dual_projection(self, alpha, targets):
        return jnp.clip(alpha, -self.q, 1 - self.q)

    def conjugate_prox(self, vector, tau, targets):
        tau = extend.per_example("tau", tau, vector)
        return self.dual_projection(vector - tau * targets, targets)

    def block_update(self, alpha, z, K, c, targets):
        return extend.majorized_block(self, alpha, z, K, c, targets)


class Cauchy(dp.oracles.AbstractOracle):
    """The gradient, as long as the damped Gauss-Newton model along it says."""

    damping: float | dp.oracles.AbstractDamping = 0.1

    def init(self, params):
        return None

    def propose(self, at, damping, memory, key):
        g, vdot = at.gradient, extend.vdot
        Jg = at.mv(g)
        curvature = at.weight * vdot(Jg, at.hessian_mv(Jg)) + damping * vdot(g, g)
        step = jax.tree.map(
            lambda g: -vdot(at.gradient, at.gradient) / curvature * g, g
        )
        return dp.oracles.Proposal(step, at.model_decrease(step), unit=damping)


class Steepest(dp.AbstractDirection):
    """Minus the gradient, over the damping or `penalty`."""

    penalty: float = extend.number(1.0)

    rollout: ClassVar[dp.AbstractRollout] = Clipped()

    def expand(self, chain, trajectory):
        return extend.gradients(chain, trajectory)

    def backward(self, chain, trajectory, model, damping):
        penalty = jnp.where(damping > 0, damping, self.penalty)
        gains = extend.feedforward(trajectory, tuple(-g / penalty for g in model))
        norm, finite = extend.norm(model), jnp.isfinite(extend.norm(model))
        slope = -(norm**2) / penalty
        return dp.Sweep(gains, slope, -slope, norm**2 / 2, norm, finite)


class Straight(dp.oracles.AbstractRule):
    """The chain rule."""

    def prepare(self, layer):
        return None

    def backward(self, layer, memory, x, message, batched):
        params, rest = eqx.partition(layer, eqx.is_inexact_array)

        def run(params, x):
            layer = eqx.combine(params, rest)
            return jax.vmap(layer)(x) if batched else layer(x)

        return jax.vjp(run, params, x)[1](message)


PARTS = [
    Clipped,
    ProjectedNewton,
    GainRatio,
    Arsinh,
    Quantile,
    Cauchy,
    Steepest,
    Straight,
]


def test_parts_are_short_and_know_public_names_only():
    source = pathlib.Path(__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert "._" not in f"{node.module}.{node.names[0].name}"
    for part in PARTS:
        assert len(inspect.getsource(part).splitlines()) <= 40


# What the tests say of ours --------------------------------------------------------

optimum = test_solve.optimum
GIVEN = dict(
    method=ProjectedNewton(), search=GainRatio(), oracle=Cauchy(), name="yours"
)
SAID = [
    test_directions.test_rollout_near_step_size_zero,
    test_directions.test_one_full_step_solves_a_linear_quadratic_problem,
    test_directions.test_large_damping_tends_to_the_gradient,
    test_directions.test_gradients_flow_through_a_direction,
    test_searches.test_a_cost_that_is_not_finite_is_never_accepted,
    test_searches.test_rejections_end,
    test_solve.test_all_directions_reach_the_same_optimum,
    test_solve.test_chains_of_several_segments,
    test_solve.test_vmap_equals_loop,
    test_solve.test_stepping_by_hand_equals_solve,
    test_solve.test_warm_start_at_a_solution_takes_no_step,
    test_losses.test_generators_are_consistent,
    test_losses.test_the_step_of_the_solver,
    test_losses.test_shifts_permutations_and_equal_scores,
    test_losses.test_the_derivative_of_f_is_the_inverse_link,
    test_losses.test_value_is_score_minus_divergence,
    test_losses.test_first_and_second_derivatives,
    test_losses.test_a_loss_is_zero_at_its_own_probabilities,
    test_loss_interface.test_gradient_hessian_and_factor,
    test_loss_interface.test_conjugate_and_projection,
    test_loss_interface.test_fenchel_young_inequality,
    test_loss_interface.test_conjugate_prox,
    test_loss_interface.test_block_updates,
    test_value_and_direction.test_jit_vmap_and_the_stateful_call_agree,
    test_value_and_direction.test_any_optimizer_takes_the_direction,
    test_value_and_direction.test_numbers_that_go_wrong,
]

# What others of the list show as well, of the same parts.
AGAIN = [
    test_directions.test_one_full_step_solves_a_linear_quadratic_problem,
    test_directions.test_gradients_flow_through_a_direction,
    test_solve.test_all_directions_reach_the_same_optimum,
    test_solve.test_chains_of_several_segments,
    test_solve.test_vmap_equals_loop,
    test_solve.test_stepping_by_hand_equals_solve,
    test_losses.test_first_and_second_derivatives,
    test_value_and_direction.test_any_optimizer_takes_the_direction,
]
CASES = [
    pytest.param(
        said,
        id=said.__name__.removeprefix("test_"),
        marks=[pytest.mark.slow] if said in AGAIN else [],
    )
    for said in SAID
]


@pytest.mark.parametrize("said", CASES)
def test_what_holds_for_ours_holds_for_yours(said, optimum, monkeypatch):
    Y, U = test_loss_interface.Y, test_loss_interface.U
    monkeypatch.setitem(test_loss_interface.CASES, "yours", (Quantile(), U, Y))
    monkeypatch.setitem(test_losses.FAMILIES, "yours", Arsinh())
    monkeypatch.setattr(test_losses, "INFINITE", ("yours",))
    several = said is test_solve.test_chains_of_several_segments
    given = dict(GIVEN, optimum=optimum, chain="two_phase" if several else "spring")
    said(**{name: given[name] for name in inspect.signature(said).parameters})


def test_steepest_descent_from_the_parts_of_ours():
    problem, x0, us = helpers.spring()
    for damping in (0.0, 3.0):
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
        step = lambda method: dp.direction(problem, method, x0, us, damping=damping)[0]
        close(step(Steepest()), step(dp.Gradient()))
        close(
            step(Steepest(1 if damping else 2)),
            step(dp.Gradient()) / (2 - (damping > 0)),
        )
    vectorized = extend.vectorize(problem, x0, us)
    trajectory = extend.run(vectorized.chain, *vectorized.ravel(x0, us))
    close(trajectory.cost, dp.rollout(problem, x0, us).cost)


def test_a_number_is_no_code():
    class Scaled(eqx.Module):
        factor: float = extend.number(2.0)

    assert jax.tree.leaves([Scaled(), Scaled(3)]) == [2.0, 3.0]
    assert type(Scaled(3).factor) is float


def test_square_roots_and_blocks_of_losses():
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11)
    loss, u, y = test_loss_interface.case("CE-soft")

    @jax.jit
    def of_classes(u, y):
        g, p = loss.gradient(u, y), jnp.sum(y, -1, keepdims=True) * jax.nn.softmax(u)
        factor, v = extend.class_factor(g, p), jnp.cos(u)
        assert isinstance(factor, extend.ScaledFactor)
        return factor.mv(factor.transpose_mv(v)), loss.hessian_mv(u, y, v)

    close(*of_classes(u, y))
    poisson, u, y = test_loss_interface.case("Poisson")

    @jax.jit
    def of_counts(u, y):
        g, v = poisson.gradient(u, y), jnp.cos(u)
        factor = extend.diagonal_factor(g, jnp.exp(u), jnp.zeros_like(u))
        square = factor.mv(factor.transpose_mv(v)), poisson.hessian_mv(u, y, v)
        return square, (factor.mv(factor.rho), g)

    for pair in of_counts(u, y):
        close(*pair)
    diagonal = np.arange(1.0, u.shape[1] + 1)
    K = jnp.asarray(np.tile(np.diag(diagonal), (len(u), 1, 1)))
    squared, _, y = test_loss_interface.case("Squared")
    block = jax.jit(lambda u, y: extend.newton_block(squared, 0 * u, u, K, 2.0, y))
    step = np.asarray(block(u, y))
    # The conjugate of |u - y|^2 / 2 is |a|^2 / 2 + a'y.
    close(step + step * diagonal / 2, u - y)


def test_layers_follow_a_rule_of_ones_own():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        eqx.nn.Linear(3, 3, key=keys[0]),
        jnp.tanh,
        eqx.nn.Linear(3, 3, key=keys[1]),
    ]
    net, inputs = dp.Network(layers), jax.random.normal(keys[2], (5, 3))
    value = lambda run: lambda net: jnp.sum(jnp.sin(run(net)))
    objective = lambda run: eqx.filter_jit(eqx.filter_grad(value(run)))(net)
    own = objective(lambda net: extend.run_network(net, Straight(), inputs))
    straight = objective(lambda net: jax.vmap(net)(inputs))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(close, own, straight)
    marked = extend.with_rule(dp.rule_boundary(layers[0]), Straight())
    close(marked(inputs[0]), layers[0](inputs[0]))
    assert extend.view(net.layers[0]) is not None is extend.view(jnp.tanh)
