"""Functions are traced once, and numbers never compile again."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog._control.lqr import riccati

from . import helpers, public, twice
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


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_functions_are_traced_once_and_data_never_compile_again(method):
    _, x0, us = helpers.spring()
    counted = Counted(helpers.Spring())
    problem = dp.ControlProblem.from_system(counted, 12)
    for scale in (1.0, 1.5):
        solve = lambda x0, us: dp.solve(problem, method, x0, us).us
        jax.make_jaxpr(solve)(scale * x0, scale * us)
    assert counted.calls == dict(dynamics=1, cost=1, terminal_cost=1)


@pytest.mark.costly
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

    def compiled():
        messages = [record.getMessage() for record in caplog.records]
        messages = [m for m in messages if "Compiling" in m]
        return [m for m in messages if "jitted" in m or "solve" in m]

    first = solve(0)
    with jax.log_compiles():
        second = solve(1)
        assert not compiled()
        # The same call would say so if it did compile.
        new = dp.ControlProblem(lambda x, u, t: x, lambda x, u, t: 0.0, jnp.sum, 1)
        dp.rollout(new, x0, us[:1])
        assert compiled()
    assert first != second


@pytest.mark.slow
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
    plain = dp.solve(problem, dp.ILQR(), x0, us)
    np.testing.assert_allclose(costs[0], plain.cost)
    assert costs[0] < plain.history["cost"][0]
    assert costs[0] < costs[1] < costs[2]
    batch = jax.vmap(solve)(jnp.asarray([0.0, 0.1, 0.2]))
    np.testing.assert_allclose(batch, costs, rtol=1e-12)


def test_jit_equals_eager():
    problem, x0, us = helpers.spring(T=2)
    compiled = dp.solve(problem, dp.Gradient(), x0, us, max_steps=1, throw=False)
    with jax.disable_jit():
        eager = dp.solve(problem, dp.Gradient(), x0, us, max_steps=1, throw=False)
    assert compiled.stats["num_steps"] == 1
    np.testing.assert_allclose(eager.us, compiled.us, atol=1e-13)


def test_bound_methods_of_equal_modules_share_a_compilation():
    calls = []

    class Plant(helpers.eqx.Module):
        gain: float

        def dynamics(self, x, u, t):
            calls.append(None)
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


def test_weak_types_states_and_tolerances_do_not_compile_again(caplog):
    problem, _, us = helpers.spring()
    strong = jnp.array([0.5, 0.0])
    weak = jnp.full(2, 0.25)
    assert weak.weak_type and not strong.weak_type
    cold = dp.solve(problem, dp.ILQR(), strong, us)
    zeros, weak_us = jnp.full(2, 0.0), 0.0 * jnp.full(us.shape, 1.0)  # compiled here
    entries = (
        lambda: dp.solve(problem, dp.ILQR(), weak, us),
        lambda: dp.solve(problem, dp.ILQR(), strong, us, state=cold.state),
        lambda: dp.solve(problem, dp.ILQR(), strong, us, rtol=1e-8, atol=1),
        lambda: dp.solve(problem, dp.ILQR(), zeros, weak_us),
        lambda: dp.solve(problem, dp.ILQR(), np.zeros(2), np.asarray(us)),
    )
    with jax.log_compiles(True):
        solutions = [entry() for entry in entries]
    messages = [record.getMessage() for record in caplog.records]
    assert not [m for m in messages if "Compiling" in m and "jitted" in m]
    assert all(solution.success for solution in solutions)
    assert solutions[1].stats["num_steps"] <= cold.stats["num_steps"]
    single = dp.solve(problem, dp.ILQR(), weak, us.astype(jnp.float32))
    assert single.us.dtype == jnp.float32  # what is weak follows


def test_one_program_steps_by_hand_and_solves_batches(caplog):
    problem, x0, us = helpers.spring()
    weak = jnp.full(2, 0.25)
    batch = lambda x0s, state=None: dp.solve_batch(
        problem, dp.ILQR(), x0s, us[None], state=state, max_steps=3
    )
    first = batch(jnp.stack([x0]))
    entries = (dp.rollout, dp.linearize, dp.quadratize, dp.costates)
    for entry in entries:
        entry(problem, x0, us)
    weak_batch = jnp.full((1, 2), 0.25)
    with jax.log_compiles(True):
        batch(weak_batch, first.state)
        for entry in entries:
            entry(problem, weak, us)
    messages = [record.getMessage() for record in caplog.records]
    assert not [m for m in messages if "Compiling" in m and "jitted" in m]


def test_every_public_function_is_called_twice():
    modules = (dp, dp.losses, dp.optim, dp.constrained)
    names = {n for owner, *_, n in public.functions() if owner in modules}
    called = {name.split(",")[0].split(" ")[0] for name in twice.CALLS}
    called |= {"init", "step", "finish", "value_and_direction"}  # parts of others
    called |= {"Alpha", "as_loss", "generator", "rule_boundary"}  # compute nothing
    called |= {"ggn", "fisher", "hessian", "feature_metric", "default_structure"}
    called |= {"at_least", "at_most", "equal"}  # compute nothing
    called |= {"llqr", "published", "model_step", "kfac", "recommended"}  # optimizers
    assert {name.split(".")[-1] for name in names} <= called


@pytest.mark.costly
@pytest.mark.parametrize("name", twice.CALLS)
def test_the_second_call_of_a_public_function_compiles_nothing(name, caplog):
    call, first, second = twice.CALLS[name], twice.numbers(0), twice.numbers(1)
    call(first)
    with jax.log_compiles():
        call(second)
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if m.startswith("Compiling")] == []


def test_a_solve_is_near_its_bellman_step(monkeypatch):
    """Functions that a reader passes from one to the other; those in between that only
    hand on what they are given (the door, loops) are in `_common`.
    """
    stacks, bellman = [], riccati.bellman

    def spied(*args):
        frame, names = sys._getframe(1), []
        while frame:
            code, frame = frame.f_code, frame.f_back
            _, _, file = code.co_filename.partition("/diffprog/")
            if file and not file.startswith("_common") and "<" not in code.co_qualname:
                names.append(code.co_qualname)
        stacks.append(names)
        return bellman(*args)

    monkeypatch.setattr(riccati, "bellman", spied)
    problem, x0, us = helpers.spring(T=7)
    dp.solve(problem, dp.ILQR(), x0, us, max_steps=1, throw=False)
    assert stacks[0][-1] == "solve" and 5 < len(stacks[0]) <= 10, stacks[0]
