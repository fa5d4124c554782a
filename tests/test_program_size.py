"""The size of a traced program does not depend on the horizon."""

import jax
import jax.numpy as jnp
import pytest

import diffprog as dp

from . import helpers
from .helpers import DIRECTIONS, name


def count_equations(jaxpr) -> int:
    return sum(1 for _ in helpers.equations(jaxpr))


# About 30 of them unpack the floats that the door was given, 30 keep derivatives out of
# the iterations, and 9 count the rounds of loops, which spares XLA seconds.
CEILINGS = dict(Gradient=894, GaussNewton=1074, Newton=1259, ILQR=1069, DDP=1179)


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


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_conditions_of_loops_read_several_parts_of_what_is_carried(method):
    # Of one part alone XLA clones what it is computed from: see `loops.while_loop`.
    problem, x0, us = helpers.pendulum(10)
    cost = lambda x0: dp.solve(problem, method, x0, us).cost
    program = jax.make_jaxpr(jax.grad(cost))(x0).jaxpr
    loops = [eqn for eqn in helpers.equations(program) if eqn.primitive.name == "while"]
    assert len(loops) >= 3
    for loop in loops:
        condition = loop.params["cond_jaxpr"].jaxpr
        carried = condition.invars[loop.params["cond_nconsts"] :]
        read = {id(v) for eqn in condition.eqns for v in eqn.invars}
        assert sum(id(v) in read for v in carried) > 1
