from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import diffprog as dp

from . import helpers
from .helpers import DIRECTIONS, name


dynamics = lambda x, u, t: x + u
cost = lambda x, u, t: jnp.sum(x**2) + jnp.sum(u**2)
terminal_cost = lambda x: jnp.sum(x**2)


def problem(dynamics=dynamics, cost=cost, terminal_cost=terminal_cost, horizon=3):
    return dp.ControlProblem(dynamics, cost, terminal_cost, horizon)


x0, us = jnp.ones(2), jnp.ones((3, 2))


def test_rollout_adds_up_the_cost():
    trajectory = dp.rollout(problem(), x0, us)
    np.testing.assert_array_equal(trajectory.xs, np.outer(np.arange(1.0, 5), x0))
    assert trajectory.cost == 2 * (1 + 4 + 9 + 16) + 2 * 3


def test_stages_know_their_index():
    p = problem(lambda x, u, t: x + jnp.asarray(t, x.dtype), cost)
    np.testing.assert_array_equal(dp.rollout(p, x0, us).xs[:, 0], [1, 1, 2, 4])
    one = dp.Phase(p.dynamics, cost, 1)
    chain = dp.Chain((one, one, one), terminal_cost)
    xs = dp.rollout(chain, x0, (us[:1],) * 3).xs
    np.testing.assert_array_equal(xs[-1], [4, 4])


def test_from_system_holds_one_copy_of_the_numbers():
    spring = helpers.Spring(jnp.asarray(0.3), jnp.asarray(0.1))
    one = dp.ControlProblem.from_system(spring, 4)
    three = dp.ControlProblem(spring.dynamics, spring.cost, spring.terminal_cost, 4)
    arrays = lambda p: [x for x in jax.tree.leaves(p) if isinstance(x, jax.Array)]
    assert len(arrays(one)) == 2 and len(arrays(three)) == 6
    rolled = [dp.rollout(p, jnp.ones(2), jnp.ones((4, 1))).cost for p in (one, three)]
    np.testing.assert_allclose(*rolled, rtol=1e-14)  # two programs


def test_from_system_holds_the_system_itself():
    class Scaled(eqx.Module):
        numbers: dict

        def dynamics(self, x, u, t):
            return self.numbers["scale"] * x + u

        def cost(self, x, u, t):
            return jnp.sum(x**2)

        def terminal_cost(self, x):
            return jnp.sum(x**2)

    system = Scaled({"scale": 1.0})
    problem = dp.ControlProblem.from_system(system, 1)
    costs = []
    for system.numbers["scale"] in (1.0, 2.0):
        costs.append(dp.rollout(problem, jnp.ones(1), jnp.zeros((1, 1))).cost)
    np.testing.assert_array_equal(costs, [2, 5])


@pytest.mark.slow
def test_rollout_is_differentiable_in_everything():
    def total(stiffness, x0, us):
        spring = dp.ControlProblem.from_system(helpers.Spring(stiffness), 4)
        return dp.rollout(spring, x0, us).cost

    args = 0.3, jnp.ones(2), jnp.ones((4, 1))
    assert all(jnp.all(d != 0) for d in jax.grad(total, (0, 1, 2))(*args))
    jax.test_util.check_grads(jax.jit(total), args, order=2, rtol=1e-5)


def test_local_models_make_the_gauss_newton_step():
    p, x0, us = helpers.spring()
    linear, quadratic = dp.linearize(p, x0, us), dp.quadratize(p, x0, us)
    f = lambda x, u: p.dynamics(x, u, 0)
    A, B = jax.jit(jax.jacrev(f, (0, 1)))(x0, us[0])
    np.testing.assert_allclose(np.asarray(linear.A)[0], A, atol=1e-15)
    np.testing.assert_allclose(np.asarray(linear.B)[0], B, atol=1e-15)
    lqr = dp.LQR(**vars(linear), c=None, **vars(quadratic))
    step = dp.solve_lqr(lqr, jnp.zeros(2))
    du, _ = dp.direction(p, dp.GaussNewton(), x0, us)
    np.testing.assert_allclose(step.us, du, atol=1e-13)


def test_costates_are_gradients_of_the_cost_to_go():
    p, x0, us = helpers.spring()
    lam = dp.costates(p, x0, us)

    def total(pushes):
        pushed = lambda x, u, t: p.dynamics(x, u, t) + pushes[t + 1]
        moved = dp.ControlProblem(pushed, p.cost, p.terminal_cost, 12)
        return dp.rollout(moved, x0 + pushes[0], us).cost

    gradients = jax.grad(total)(jnp.zeros((13, 2)))
    np.testing.assert_allclose(lam, gradients, atol=1e-13)
    xs = dp.rollout(p, x0, us).xs
    np.testing.assert_allclose(lam[-1], jax.grad(p.terminal_cost)(xs[-1]), atol=1e-14)


# Pytrees of states and controls.


def test_pytrees_equal_vectors_and_key_names_do_not_matter():
    p, x0, us = helpers.spring()

    def tree(first, second):
        join = lambda x: jnp.stack([x[first], x[second]])
        split = lambda v: {first: v[0], second: v[1]}
        return dp.ControlProblem(
            lambda x, u, t: split(p.dynamics(join(x), u, t)),
            lambda x, u, t: p.cost(join(x), u, t),
            lambda x: p.terminal_cost(join(x)),
            12,
        ), split(x0)

    costs = []
    for names in (("a", "b"), ("z", "b")):
        dictionary, start = tree(*names)
        costs.append(dp.solve(dictionary, dp.DDP(), start, us).cost)
    flat = dp.solve(p, dp.DDP(), x0, us).cost
    assert flat < dp.rollout(p, x0, us).cost
    np.testing.assert_allclose(costs, flat, rtol=1e-14)


def test_scalars_and_matrices_as_states_and_controls():
    p = dp.ControlProblem(
        lambda x, u, t: dict(m=x["m"] + u["m"], s=0.9 * x["s"] + jnp.trace(u["m"])),
        lambda x, u, t: jnp.sum(u["m"] ** 2) + x["s"] ** 2 + jnp.sum(x["m"] ** 2),
        lambda x: x["s"] ** 2,
        3,
    )
    start = dict(m=jnp.eye(2), s=1.0)
    solution = dp.solve(p, dp.ILQR(), start, dict(m=jnp.zeros((3, 2, 2))))
    assert solution.xs["s"].shape == (4,) and solution.us["m"].shape == (3, 2, 2)
    assert solution.policy.K.shape == (3, 4, 5)
    gradient = jax.grad(lambda us: dp.rollout(p, start, us).cost)(solution.us)
    assert jnp.max(jnp.abs(gradient["m"])) < 1e-6 and solution.us["m"][0, 0, 0] < -0.1


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_one_stage_one_state_one_control(method):
    p = problem(horizon=1)
    solution = dp.solve(p, method, jnp.ones(1), jnp.zeros((1, 1)))
    np.testing.assert_allclose(solution.us, -0.5, atol=1e-4)


# Wrong calls: each names the argument, what came, and what is accepted.

whole = jnp.ones((3, 2), int)


def _any(value) -> Any:
    """Hides from the type checker what it would object to."""
    return value


WRONG = {
    "integer controls": (
        lambda: dp.rollout(problem(), x0, whole),
        TypeError,
        "`us` has dtype int64; .* float32 or float64",
    ),
    "integer leaf of a state": (
        lambda: dp.rollout(problem(), dict(a=x0, b=0), us),
        TypeError,
        r"`x0\['b'\]` has dtype int; .* write 0.0 for 0",
    ),
    "half precision": (
        lambda: dp.rollout(problem(), x0.astype(jnp.float16), us),
        TypeError,
        "`x0` has dtype float16",
    ),
    "two dtypes": (
        lambda: dp.rollout(problem(), x0.astype(jnp.float32), us),
        TypeError,
        "`x0` is float32 and `us` is float64",
    ),
    "too many controls": (
        lambda: dp.rollout(problem(), x0, jnp.ones((4, 2))),
        ValueError,
        r"`us` has shape \(4, 2\); .* the horizon is 3",
    ),
    "a scalar control": (
        lambda: dp.rollout(problem(), x0, 1.0),
        ValueError,
        r"`us` has shape \(\)",
    ),
    "an empty state": (
        lambda: dp.rollout(problem(), jnp.ones(0), us),
        ValueError,
        r"`x0` has no entries; .* `jnp.zeros\(1\)` for a problem without a state",
    ),
    "empty controls": (
        lambda: dp.rollout(problem(), x0, jnp.ones((3, 0))),
        ValueError,
        "`us` has no entries",
    ),
    "another structure": (
        lambda: dp.rollout(problem(lambda x, u, t: (x, u)), x0, us),
        ValueError,
        "`dynamics` returned a state with the shapes .* both must agree",
    ),
    "another shape": (
        lambda: dp.rollout(problem(lambda x, u, t: x[:1]), x0, us),
        ValueError,
        r"shapes \(1,\).* has \(2,\)",
    ),
    "another dtype": (
        lambda: dp.rollout(
            problem(lambda x, u, t: x.astype(jnp.float32) + 1.0), x0, us
        ),
        TypeError,
        "`dynamics` returned float32 where x0 and us are float64",
    ),
    "a vector cost": (
        lambda: dp.rollout(problem(cost=lambda x, u, t: x), x0, us),
        ValueError,
        r"`cost` returned something of shape \(2,\); a cost is one scalar",
    ),
    "a vector terminal cost": (
        lambda: dp.rollout(problem(terminal_cost=lambda x: x[:1]), x0, us),
        ValueError,
        r"`terminal_cost` returned something of shape \(1,\)",
    ),
    "a list of controls": (
        lambda: dp.rollout(problem(), x0, [[0.0, 0.0]] * 3),
        TypeError,
        r"`us` is a list of numbers, .*`jnp.asarray\(us\)`",
    ),
    "a list of integers": (
        lambda: dp.rollout(problem(), x0, [[0, 0]] * 3),
        TypeError,
        r"`us` is a list of numbers, .*`jnp.asarray\(us\)`",
    ),
    "a list for a state": (
        lambda: dp.rollout(problem(lambda x, u, t: 0.5 * x), [0.0, 0.0], us),
        TypeError,
        r"`dynamics` was given x of shape \[\(\), \(\)\] and u of shape \(2,\)."
        r" `x0` is a list of numbers: .*`jnp.asarray\(x0\)`",
    ),
    "an array for a list": (
        lambda: dp.rollout(problem(lambda x, u, t: jnp.stack(x)), [0.0, 0.0], us),
        ValueError,
        r"has \[\(\), \(\)\], and both must agree. `x0` is a list of numbers",
    ),
    "a number for a control": (
        lambda: dp.rollout(problem(lambda x, u, t: x + u[0]), x0, us[:, 0]),
        IndexError,
        r"u of shape \(\). u is a number, .*give `us\[:, None\]`",
    ),
    "a number for a control of the cost": (
        lambda: dp.rollout(problem(cost=lambda x, u, t: u @ u), x0, us[:, 0]),
        Exception,
        r"`cost` was given x of shape \(2,\) and u of shape \(\).*`us\[:, None\]`",
    ),
    "a number for a state": (
        lambda: dp.rollout(problem(lambda x, u, t: x[0]), 1.0, us),
        IndexError,
        r"x of shape \(\) .*`x0` is a number: .*`jnp.asarray\(\[x0\]\)`",
    ),
    "an error in the terminal cost": (
        lambda: dp.rollout(problem(terminal_cost=lambda x: x[0, 0]), x0, us),
        IndexError,
        r"`terminal_cost` was given x of shape \(2,\)",
    ),
    "a function of state and control": (
        lambda: dp.rollout(problem(lambda x, u: x), x0, us),
        TypeError,
        r"`dynamics` was given .* It is called with `\(x, u, t\)`",
    ),
    "a terminal cost of a stage": (
        lambda: dp.rollout(problem(terminal_cost=lambda x, u, t: 0.0), x0, us),
        TypeError,
        r"`terminal_cost` was given .* It is called with `\(x\)`",
    ),
    "a decision of Python": (
        lambda: dp.rollout(problem(lambda x, u, t: x if x[0] > 0 else u), x0, us),
        jax.errors.TracerBoolConversionError,
        r"`dynamics` was given .* `if`, .*write `jnp.where\(x\[0\] > 0, a, b\)`",
    ),
    "a function of NumPy": (
        lambda: dp.rollout(problem(lambda x, u, t: x + np.sin(u)), x0, us),
        jax.errors.TracerArrayConversionError,
        "`dynamics` was given .* NumPy takes no traced numbers: write `jnp.sin`",
    ),
    "a float of a traced number": (
        lambda: dp.rollout(problem(lambda x, u, t: x * float(u[0])), x0, us),
        jax.errors.ConcretizationTypeError,
        "`dynamics` was given .* `float`, .* take no traced numbers: leave `float` out",
    ),
    "a list with an index of JAX": (
        lambda: dp.rollout(problem(lambda x, u, t: x * [1.0, 2.0, 3.0][t]), x0, us),
        jax.errors.TracerIntegerConversionError,
        r"`dynamics` was given .* A list .* no traced index.*`jnp.asarray\(table\)`",
    ),
    "a vector field of state and control": (
        lambda: dp.rollout(problem(dp.discretize(lambda x, u: u, 0.1)), x0, us),
        TypeError,
        r"`vector_field` was given .* It is called with `\(x, u, t\)`",
    ),
    "no horizon": (lambda: problem(horizon=0), ValueError, "`horizon` is 0; at least"),
    "a float horizon": (
        lambda: problem(horizon=_any(3.0)),
        TypeError,
        "`horizon` is 3.0",
    ),
    "no function": (
        lambda: problem(cost=1.0),
        TypeError,
        r"`cost` is 1.0; .*\(x, u, t\) -> scalar",
    ),
    "an incomplete system": (
        lambda: dp.ControlProblem.from_system(object(), 3),
        TypeError,
        "`dynamics` of object is None",
    ),
    "local models of several phases": (
        lambda: dp.linearize(*_any(helpers.two_phase())),
        TypeError,
        "`problem` is a Chain; .* stacked over equal stages",
    ),
    "no phases": (lambda: dp.Chain((), terminal_cost), TypeError, "`phases` is"),
    "controls of a chain": (
        lambda: dp.rollout(
            dp.Chain((dp.Phase(dynamics, cost, 3),), terminal_cost), x0, us
        ),
        ValueError,
        "`us` has no entries; the chain has 1 phases",
    ),
    "no problem": (
        lambda: dp.rollout(_any(dynamics), x0, us),
        TypeError,
        "`problem` is a function; a `dp.ControlProblem`",
    ),
    "a class for a method": (
        lambda: dp.solve(problem(), _any(dp.ILQR), x0, us),
        TypeError,
        r"`method` is the class ILQR; something like `dp.ILQR\(\)`",
    ),
    "a method for a search": (
        lambda: dp.solve(problem(), dp.ILQR(), x0, us, _any(dp.ILQR())),
        TypeError,
        r"`search` is ILQR\(\); something like `dp.Backtracking\(\)`",
    ),
    "max_steps": (
        lambda: dp.solve(problem(), dp.ILQR(), x0, us, max_steps=-1),
        ValueError,
        "`max_steps` is -1; 0 or more",
    ),
    "a float max_steps": (
        lambda: dp.solve(problem(), dp.ILQR(), x0, us, max_steps=_any(3.0)),
        TypeError,
        "`max_steps` is 3.0; a Python int",
    ),
    "rtol": (
        lambda: dp.solve(problem(), dp.ILQR(), x0, us, rtol=-1.0),
        ValueError,
        "`rtol` is -1.0; a number >= 0",
    ),
    "a stale state": (
        lambda: dp.solve(problem(), dp.ILQR(), x0, us, state=_any("warm")),
        TypeError,
        "`state` is .warm.; something like `solution.state`",
    ),
    "damping": (
        lambda: dp.direction(problem(), dp.ILQR(), x0, us, damping=-1.0),
        ValueError,
        "`damping` is -1.0; a number >= 0",
    ),
    "a class for a system": (
        lambda: dp.ControlProblem.from_system(helpers.Spring, 3),
        TypeError,
        r"`system` is the class Spring; an object of it is expected: `Spring\(...\)`",
    ),
    "an unhashable part": (
        lambda: dp.rollout(problem(_Unhashable()), x0, us),
        TypeError,
        "A part of what was given is an object of type `_Unhashable`: it can change",
    ),
}


class _Unhashable(dict):
    def __call__(self, x, u, t):
        return x


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("unchecked")
def test_wrong_calls_say_what_came_and_what_is_accepted(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
