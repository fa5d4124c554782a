"""Functions are traced once, numbers never compile again, T does not grow the graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

from . import helpers
from .helpers import DIRECTIONS, MONOTONE, name


class Counted:
    """A system whose functions count how often their Python runs."""

    def __init__(self, system):
        self.system, self.calls = system, dict(dynamics=0, cost=0, terminal_cost=0)

    def dynamics(self, x, u, t):
        self.calls["dynamics"] += 1
        return self.system.dynamics(x, u, t)

    def cost(self, x, u, t):
        self.calls["cost"] += 1
        return self.system.cost(x, u, t)

    def terminal_cost(self, x):
        self.calls["terminal_cost"] += 1
        return self.system.terminal_cost(x)


@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_functions_are_traced_once_and_data_never_compile_again(method):
    _, x0, us = helpers.spring()
    counted = Counted(helpers.Spring())
    problem = dp.ControlProblem.from_system(counted, 12)
    for scale in (1.0, 1.5):
        solve = lambda x0, us: dp.solve(problem, method, x0, us).us
        jax.make_jaxpr(solve)(scale * x0, scale * us)
    assert counted.calls == dict(dynamics=1, cost=1, terminal_cost=1)


@pytest.mark.parametrize("search", ["Backtracking", "AdaptiveDamping"])
def test_new_numbers_anywhere_never_compile_again(search, caplog):
    _, x0, us = helpers.spring()

    def solve(i):
        numbers = helpers.Spring(stiffness=0.3 + 0.01 * i, weight=0.1 + 0.01 * i)
        problem = dp.ControlProblem.from_system(numbers, 12)
        rule = getattr(dp, search)(decrease=0.5 - 0.01 * i, max_damping=1e9 + i)
        tolerance = dict(rtol=1e-8 * (1 + i), atol=1e-9 * (1 + i))
        solution = dp.solve(
            problem, dp.DDP(), (1 + 0.1 * i) * x0, us, rule, **tolerance
        )
        return solution.cost

    first = solve(0)
    with jax.log_compiles():
        second = solve(1)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert not [m for m in compiled if "jitted" in m or "solve" in m], compiled
    assert first != second


def count_equations(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += count_equations(inner)
    return total


CEILINGS = dict(Gradient=750, GaussNewton=950, Newton=1100, ILQR=950, DDP=1050)


@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_size_of_the_program_does_not_depend_on_the_horizon(method, monkeypatch):
    # As on an accelerator: on the CPU the program stands there twice.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    sizes = []
    for T in (10, 100, 1000):
        problem, x0, us = helpers.pendulum(T)
        solve = lambda us: dp.solve(problem, method, x0, us).us
        sizes.append(count_equations(jax.make_jaxpr(solve)(us).jaxpr))
    jax.clear_caches()
    assert sizes[0] == sizes[1] == sizes[2] <= CEILINGS[name(method)]


def test_size_of_the_program_does_not_depend_on_equal_neighbors():
    system = helpers.Spring()
    phase = lambda T: dp.Phase(system.dynamics, system.cost, T)
    sizes = []
    for T in (6, 24):
        chain = dp.Chain((phase(T), phase(T)), system.terminal_cost)
        solve = lambda us: dp.solve(chain, dp.ILQR(), jnp.ones(2), us).us
        us = (jnp.ones((T, 1)),) * 2
        sizes.append(count_equations(jax.make_jaxpr(solve)(us).jaxpr))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("search", MONOTONE, ids=name)
def test_closures_over_traced_values_work_inside_jit(search):
    problem, x0, us = helpers.spring()

    @jax.jit
    def solve(weight):
        weighted = dp.ControlProblem(
            problem.dynamics,
            lambda x, u, t: problem.cost(x, u, t) + weight * u[0] ** 2,
            problem.terminal_cost,
            12,
        )
        return dp.solve(weighted, dp.ILQR(), x0, us, search).cost

    costs = [float(solve(weight)) for weight in (0.0, 0.1, 0.2)]
    np.testing.assert_allclose(costs[0], dp.solve(problem, dp.ILQR(), x0, us).cost)
    assert costs[0] < costs[1] < costs[2]
    batch = jax.vmap(solve)(jnp.asarray([0.0, 0.1, 0.2]))
    np.testing.assert_allclose(batch, costs, rtol=1e-12)


def test_jit_equals_eager():
    problem, x0, us = helpers.spring(T=2)
    compiled = dp.solve(problem, dp.Gradient(), x0, us, max_steps=1, throw=False)
    with jax.disable_jit():
        eager = dp.solve(problem, dp.Gradient(), x0, us, max_steps=1, throw=False)
    np.testing.assert_allclose(eager.us, compiled.us, atol=1e-13)


def test_bound_methods_of_equal_modules_share_a_compilation():
    calls = []

    class Plant(helpers.eqx.Module):
        gain: float

        def dynamics(self, x, u, t):
            calls.append(t)
            return x + self.gain * u

        def cost(self, x, u, t):
            return jnp.sum(u**2)

        def terminal_cost(self, x):
            return jnp.sum(x**2)

    for gain in (1.0, 2.0, 3.0):
        plant = Plant(gain)
        problem = dp.ControlProblem(plant.dynamics, plant.cost, plant.terminal_cost, 3)
        dp.rollout(problem, jnp.ones(1), jnp.ones((3, 1)))
    assert len(calls) == 1
