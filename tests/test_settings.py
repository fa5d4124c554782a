"""Healthy programs run under the settings with which users look for mistakes."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import diffprog as dp

from . import helpers


PROBLEM, X0, US = helpers.spring(T=2)
X0S, USS = jnp.stack([X0, 2 * X0]), jnp.stack([US, US])
SCORES, LABELS = jnp.array([[0.5, -1.0, 2.0], [0.0, 0.0, -3.0]]), jnp.array([0, 2])
MODEL = eqx.nn.Linear(3, 2, key=jr.key(0))
INPUTS, TARGETS = jr.normal(jr.key(1), (5, 3)), jr.normal(jr.key(2), (5, 2))
FAMILIES = [dp.losses.Alpha(1.5), dp.losses.JensenShannon()]


def solve():
    solution = dp.solve(PROBLEM, dp.ILQR(), X0, US)
    return solution.us, solution.result


def solve_batch():
    solution = dp.solve_batch(PROBLEM, dp.ILQR(), X0S, USS)
    return solution.us, solution.result


def loss():
    def total(scores, f):
        present = jnp.array([True, True, False])
        p = dp.losses.f_softargmax(scores, f, "uniform", where=present)
        own = dp.losses.f_loss(scores, LABELS, f, "uniform")
        return jnp.sum(own) + jnp.sum(p**2)

    return [jax.value_and_grad(total)(SCORES, f) for f in FAMILIES]


def training_step():
    rule = dp.oracles.MadsenNielsen(1.0)
    vd = dp.value_and_direction(dp.losses.Squared(), dp.oracles.GaussNewton(rule))
    (value, _), direction, _ = vd.step(MODEL, vd.init(MODEL), INPUTS, TARGETS)
    return value, direction


@contextlib.contextmanager
def debug_finite():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


PROGRAMS = [solve, solve_batch, loss, training_step]
SETTINGS = dict(
    finite=debug_finite,
    leaks=jax.checking_leaks,
    ranks=lambda: jax.numpy_rank_promotion("raise"),
    eager=jax.disable_jit,
)


def close(found, desired):
    helpers.close(found, desired, scale=1.0)
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(found))


@pytest.mark.costly("setting")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_healthy_programs_run_under_every_setting(program, setting):
    desired = program()
    if setting == "leaks":
        if jax.__version_info__ >= (0, 12) and program in (solve, solve_batch):
            pytest.skip("a jaxpr holds its constants, and `custom_vmap` the jaxpr")
        jax.clear_caches()  # what is traced already would not be looked at
    with SETTINGS[setting]():
        found = program()
    close(found, desired)


@pytest.mark.costly
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_compiled_programs_move_nothing_to_the_device(program):
    compiled = jax.jit(program)
    desired = compiled()
    with jax.transfer_guard("disallow"):
        found = compiled()
    close(found, desired)
