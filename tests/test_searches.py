import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import diffprog as dp

from . import helpers
from .helpers import MONOTONE, name


number = lambda value: jnp.asarray(value, jnp.float64)


def trial(trial_cost, cost=1.0, slope=-1.0, cost_gradient=2.0):
    numbers = map(number, (cost, trial_cost, slope, -slope, cost_gradient))
    return dp.Trial(*numbers)


@jax.jit
def judge(search, state, change, slope):
    return search.step(state, trial(1.0 + change, slope=slope))


as_arrays = lambda search: jax.tree.map(number, search)
finite = st.floats(-2.0, 2.0)
below = st.floats(-2.0, -0.01)


@settings(max_examples=50, deadline=None)
@given(change=finite, slope=below, stepsize=st.floats(0.01, 1.0))
def test_backtracking_accepts_by_the_armijo_condition(change, slope, stepsize):
    search = as_arrays(dp.Backtracking(slope_fraction=0.1))
    state = dp.SearchState(
        number(stepsize), number(0.3), number(1.0), jnp.asarray(0, jnp.int32)
    )
    new, verdict = judge(search, state, change, slope)
    margin = change - 0.1 * stepsize * slope
    if abs(margin) > 1e-12:
        assert bool(verdict.accept) == (margin < 0)
    assert not verdict.fail and not verdict.refresh
    assert new.trials == 1
    if verdict.accept:
        assert new.stepsize == stepsize
        lowered = 0.3 / 2.35 if stepsize >= 0.25 else 0.3
        np.testing.assert_allclose(new.damping, lowered, rtol=1e-12)
    else:
        np.testing.assert_allclose(new.stepsize, stepsize / 2, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(change=finite, slope=below)
def test_adaptive_damping_accepts_by_the_least_value_of_the_model(change, slope):
    search = as_arrays(dp.AdaptiveDamping())
    state = search.begin(search.init(jnp.float64), number(2.0))
    np.testing.assert_allclose(state.damping, 2.0 / 100 / 8)
    new, verdict = judge(search, state, change, slope)
    if abs(change - slope / 2) > 1e-12:
        assert bool(verdict.accept) == (change < slope / 2)
    if verdict.accept:
        np.testing.assert_allclose(new.scale, state.damping / 2.0)
    else:
        assert verdict.refresh and not verdict.fail
        np.testing.assert_allclose(new.damping, 2 * state.damping)


@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_a_cost_that_is_not_finite_is_never_accepted(search):
    state = search.init(jnp.float64)
    for bad in (jnp.inf, jnp.nan):
        _, verdict = search.step(state, trial(bad))
        assert not verdict.accept


@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_rejections_end(search):
    """Damping grows from 0 to its limit, and then the search gives up."""
    state, dampings = search.init(jnp.float64), []
    reject = jax.jit(lambda state: search.reject(state))
    for _ in range(100):
        state, verdict = reject(state)
        assert bool(verdict.refresh) != bool(verdict.fail)
        if verdict.fail:
            break
        dampings.append(float(state.damping))
    assert verdict.fail  # pyright: ignore
    assert dampings[0] == search.min_damping and dampings[-1] <= search.max_damping
    growth = np.divide(dampings[1:-1], dampings[:-2])
    if isinstance(search, dp.Backtracking):  # in a row of rises the factor grows
        growth = growth[1:] / growth[:-1]
        np.testing.assert_allclose(growth, search.damping_factor)
    np.testing.assert_allclose(growth, growth[0])
    assert dampings[-1] > 0.05 * search.max_damping


def test_a_row_of_falls_becomes_steeper_and_a_rise_begins_anew():
    search = dp.Backtracking(damping_factor=2.0, min_damping=1e-9)
    start = search.init(jnp.float64)
    state = dp.SearchState(start.stepsize, number(64.0), start.scale, start.trials)
    found = []
    for _ in range(3):
        state, _ = search.step(state, trial(0.0))
        found.append(float(state.damping))
    for _ in range(2):
        state, _ = search.reject(state)
        found.append(float(state.damping))
    np.testing.assert_allclose(found, [32.0, 8.0, 1.0, 2.0, 8.0])


def test_backtracking_starts_near_the_last_step_size():
    search = dp.Backtracking()
    state = search.init(jnp.float64)
    for last, first in ((1.0, 1.0), (0.5, 1.0), (0.125, 0.5)):
        last = dp.SearchState(number(last), state.damping, state.scale, state.trials)
        assert search.begin(last, number(1.0)).stepsize == first


def test_backtracking_raises_the_damping_when_trials_run_out():
    search = dp.Backtracking(max_trials=3)
    state = search.begin(search.init(jnp.float64), number(1.0))
    stepsizes = []
    for _ in range(3):
        stepsizes.append(float(state.stepsize))
        state, verdict = search.step(state, trial(2.0))
    assert stepsizes == [1.0, 0.5, 0.25]
    assert verdict.refresh and state.damping == 1e-6  # pyright: ignore
    assert state.stepsize == 1.0 and state.trials == 3


def test_small_dampings_count_as_none():
    state = dp.SearchState(
        number(1.0), number(5e-6), number(1e-12), jnp.asarray(0, jnp.int32)
    )
    after, _ = dp.Backtracking().step(state, trial(0.0))
    assert after.damping == 0
    assert dp.AdaptiveDamping().begin(state, number(1.0)).damping == 0


def test_fixed_step_takes_what_is_finite():
    search = dp.FixedStep(stepsize=0.5, damping=0.1)
    state = search.init(jnp.float64)
    assert state.stepsize == 0.5 and state.damping == 0.1
    assert search.step(state, trial(100.0))[1].accept
    assert search.step(state, trial(jnp.inf))[1].fail
    assert search.reject(state)[1].fail


def test_a_state_of_another_precision_or_search_warms_a_solve_up():
    problem, x0, us = helpers.spring()
    double = dp.solve(problem, dp.ILQR(), x0, us, dp.AdaptiveDamping())
    single, x0, us = helpers.spring(dtype=jnp.float32)
    warm = dp.solve(single, dp.ILQR(), x0, us, state=double.state)
    damping = double.state.search.damping.astype(jnp.float32)
    assert warm.us.dtype == warm.state.search.damping.dtype == jnp.float32
    assert damping > 0 and damping == warm.history["damping"][0]
    np.testing.assert_allclose(warm.cost, double.cost, rtol=1e-5)
