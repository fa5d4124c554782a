"""The size of a traced program does not depend on the horizon."""

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp

from . import helpers
from .helpers import DIRECTIONS, name


def count_equations(jaxpr) -> int:
    return sum(1 for _ in helpers.equations(jaxpr))


# About 30 of them unpack the floats that the door was given, and 30 keep derivatives
# out of the iterations.
CEILINGS = dict(Gradient=885, GaussNewton=1065, Newton=1250, ILQR=1060, DDP=1170)


@pytest.fixture(autouse=True, scope="module")
def as_on_an_accelerator():
    """On the CPU a program stands there twice. The module is traced afresh."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    patch.undo()


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_size_of_the_program_does_not_depend_on_the_horizon(method):
    sizes = []
    for T in (10, 100, 1000):
        problem, x0, us = helpers.pendulum(T)
        solve = lambda us: dp.solve(problem, method, x0, us).us
        sizes.append(count_equations(jax.make_jaxpr(solve)(us).jaxpr))
    assert 300 < sizes[0] == sizes[1] == sizes[2] <= CEILINGS[name(method)]


def test_size_of_the_program_does_not_depend_on_the_horizons_of_a_chain():
    system = helpers.Spring()
    phase = lambda T: dp.Phase(system.dynamics, system.cost, T)
    sizes = []
    for T in (6, 24):
        chain = dp.Chain((phase(T), phase(T)), system.terminal_cost)
        solve = lambda us: dp.solve(chain, dp.ILQR(), jnp.ones(2), us).us
        us = (jnp.ones((T, 1)),) * 2
        sizes.append(count_equations(jax.make_jaxpr(solve)(us).jaxpr))
    assert 300 < sizes[0] == sizes[1]
