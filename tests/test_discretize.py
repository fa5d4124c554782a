import inspect
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optimistix
import pytest

import diffprog as dp


# x' = -x + u + cos(time), with this solution for a control held at u.
def exact(x, u, start, dt):
    forced = lambda time: u + (jnp.cos(time) + jnp.sin(time)) / 2
    return forced(start + dt) + (x - forced(start)) * jnp.exp(-dt)


field = lambda x, u, time: -x + u + jnp.cos(time)
ORDERS = [("euler", 1), ("midpoint", 2), ("rk4", 4), (diffrax.Tsit5(), 5)]


@pytest.mark.parametrize("method, order", ORDERS, ids=lambda x: str(x)[:8])
def test_order_of_accuracy_with_time_in_seconds(method, order):
    x, u, t = jnp.asarray([1.0]), jnp.asarray([0.5]), jnp.asarray(3, jnp.int32)
    dts = np.array([0.2, 0.1])
    step = jax.jit(lambda dt: dp.discretize(field, dt, method)(x, u, t))
    errors = [abs(step(dt) - exact(x, u, 3 * dt, dt))[0] for dt in dts]
    slope = np.log2(errors[0] / errors[1])
    assert slope == pytest.approx(order + 1, abs=0.6)


# What diffrax exports and needs no equation in several parts.
SINGLE = (
    "Bosh3 Dopri5 Dopri8 Euler Heun ImplicitEuler Kvaerno3 Kvaerno4 Kvaerno5 Midpoint "
    "Ralston ReversibleHeun Tsit5"
)


def accepted_solvers():
    """The solvers of diffrax that `dp.discretize` accepts."""
    newton: Any = dict(root_finder=optimistix.Newton(rtol=1e-10, atol=1e-10))
    for name, thing in vars(diffrax).items():
        if name.startswith("Abstract") or not inspect.isclass(thing):
            continue
        if not issubclass(thing, diffrax.AbstractSolver) or name == "HalfSolver":
            continue
        implicit = issubclass(thing, diffrax.AbstractImplicitSolver)
        try:
            solver = thing(**newton) if implicit else thing()
            dp.discretize(field, 0.1, solver)
        except ValueError:
            continue
        yield solver


@pytest.mark.slow
def test_every_solver_of_diffrax_keeps_its_order_or_is_refused():
    """What a method carries from step to step is lost between stages."""
    solvers = list(accepted_solvers())
    assert sorted(type(solver).__name__ for solver in solvers) == SINGLE.split()
    curved = lambda x, u, time: -x * (1 + jnp.cos(time) / 2)
    for solver in solvers:
        order = solver.order(diffrax.ODETerm(field)) or 0

        @jax.jit
        def end(dt, num, solver=solver):
            step = dp.discretize(curved, dt, solver)
            return jax.lax.fori_loop(0, num, lambda i, x: step(x, None, i), jnp.ones(1))

        few = 2 if order > 5 else 8
        final = np.exp(-1 - np.sin(1.0) / 2)
        errors = [abs(end(1 / num, num)[0] - final) for num in (few, 2 * few)]
        slope = np.log2(errors[0] / errors[1])
        assert slope > order - 0.4, type(solver).__name__


def test_rk4_is_exact_for_a_cubic_in_time():
    cubic = lambda x, u, time: jnp.full_like(x, 4.0) * time**3
    step = dp.discretize(cubic, 0.5, "rk4")
    np.testing.assert_allclose(step(jnp.zeros(1), None, 2), 1.5**4 - 1.0, rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rk4", diffrax.Heun()])
def test_pytrees_dtypes_and_derivatives(method):
    field = lambda x, u, time: dict(p=x["v"], v=u - jnp.sin(x["p"]))
    step = dp.discretize(field, 0.1, method)
    x = dict(p=jnp.asarray([0.5], jnp.float32), v=jnp.asarray([0.1], jnp.float32))
    u = jnp.asarray([1.0], jnp.float32)
    new = step(x, u, 0)
    assert new["p"].dtype == jnp.float32 and new["v"].shape == (1,)
    # The Taylor polynomial of the exact flow.
    a, jerk = 1 - np.sin(0.5), -0.1 * np.cos(0.5)
    np.testing.assert_allclose(new["p"], 0.5 + 0.01 + 0.005 * a, atol=1e-4)
    np.testing.assert_allclose(new["v"], 0.1 + 0.1 * a + 0.005 * jerk, atol=2e-4)
    total = lambda u, v: jnp.sum(step(dict(p=u, v=v), u, 0)["p"])
    args = jnp.asarray([0.5]), jnp.asarray([0.1])
    jax.test_util.check_grads(jax.jit(total), args, order=2, rtol=1e-4)


@pytest.mark.slow
def test_discretized_dynamics_in_a_problem():
    step = dp.discretize(field, 0.1, diffrax.Tsit5())
    problem = dp.ControlProblem(
        step, lambda x, u, t: jnp.sum(u**2), lambda x: jnp.sum((x - 1.0) ** 2), 5
    )
    solution = dp.solve(problem, dp.DDP(), jnp.zeros(1), jnp.zeros((5, 1)))
    assert 0 < solution.stats["num_steps"] <= 2
    before = solution.history["gradient"][0]
    assert solution.stats["gradient"] <= 1e-12 * before
    gradient = jax.grad(lambda us: dp.rollout(problem, jnp.zeros(1), us).cost)
    assert jnp.linalg.norm(gradient(solution.us)) <= 1e-12 * before


# Implicit solvers, on x'' = -1000 (x' - cos(x) u).


IMPLICIT = diffrax.ImplicitEuler(root_finder=optimistix.Newton(rtol=1e-8, atol=1e-8))


def stiff(x, u, time):
    return jnp.stack([x[1], -1000 * (x[1] - jnp.cos(x[0]) * u[0])])


@pytest.mark.slow
def test_derivatives_of_an_implicit_step():
    z, dt = jnp.array([0.3, 0.2, 0.5]), 0.05
    g = jax.jit(lambda z: dp.discretize(stiff, dt, IMPLICIT)(z[:2], z[2:], 0))
    new = g(z)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    near(new, z[:2] + dt * stiff(new, z[2:], 0.0))
    # By the implicit function theorem.
    A, B = jax.jacfwd(stiff, (0, 1))(new, z[2:], 0.0)
    factor = jnp.linalg.inv(jnp.eye(2) - dt * A)
    exact = jnp.concatenate([factor, dt * factor @ B], 1)
    near(jax.jit(jax.jacfwd(g))(z), exact)
    jacobian = jax.jit(jax.jacrev(g))
    near(jacobian(z), exact)
    way = exact[1]
    second = jax.jit(lambda z: jax.jvp(jax.jacrev(g), (z,), (way,))[1])(z)
    difference = (jacobian(z + 1e-4 * way) - jacobian(z - 1e-4 * way)) / 2e-4
    np.testing.assert_allclose(second, difference, atol=1e-6)
    assert jnp.max(jnp.abs(second)) > 0.01


def test_an_implicit_step_that_fails_is_nan_and_differentiable():
    """Where it fails the derivative is 0, in every lane of a batch."""
    step = dp.discretize(stiff, 0.05, IMPLICIT)
    f = lambda x, u: step(x, u, 0)
    xs = jnp.array([[0.3, 0.2], [0.3, jnp.nan], [0.3, 0.2]])
    us = jnp.array([[0.5], [0.5], [jnp.inf]])
    bad = np.array([False, True, True])
    new = jax.jit(jax.vmap(f))(xs, us)
    np.testing.assert_array_equal(np.isnan(new), bad[:, None] & np.ones(2, bool))
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jax.jit(jax.vmap(jacobian(f, (0, 1))))(xs, us)
        assert all(np.all(a[bad] == 0) and np.any(a[~bad] != 0) for a in found)


@pytest.mark.slow
def test_a_solve_rejects_a_trial_whose_implicit_step_fails():
    chord = diffrax.VeryChord(rtol=1e-8, atol=1e-8)  # gives up early
    dynamics = dp.discretize(stiff, 0.05, diffrax.ImplicitEuler(root_finder=chord))
    problem = dp.ControlProblem(
        dynamics, lambda x, u, t: 0.01 * jnp.sum(u**2),
        lambda x: 10 * jnp.sum((x - jnp.array([1.0, 0.0])) ** 2), 8
    )  # fmt: skip
    solve = jax.jit(
        lambda us: dp.solve(problem, dp.ILQR(), jnp.zeros(2), us, max_steps=2)
    )
    solution = solve(jnp.zeros((8, 1)))
    assert solution.history["trials"][0] > 1
    assert solution.cost < 0.8 * solution.history["cost"][0]
    worst = solve(jnp.full((8, 1), 1e6))
    assert worst.result == dp.RESULTS.nonfinite_rollout


@pytest.mark.slow
def test_a_chord_method_that_gave_up_is_told_at_the_step_limit():
    def solve(root_finder):
        method = diffrax.Kvaerno3(root_finder=root_finder)
        problem = dp.ControlProblem(
            dp.discretize(stiff, 0.05, method), lambda x, u, t: 0.01 * jnp.sum(u**2),
            lambda x: 10 * (x[0] - 1.0) ** 2, 20
        )  # fmt: skip
        return dp.solve(problem, dp.ILQR(), jnp.zeros(2), jnp.zeros((20, 1)))

    tolerances: Any = dict(rtol=1e-8, atol=1e-8)
    with pytest.raises(dp.SolveError, match="In iteration .* root finder.*Newton") as e:
        solve(diffrax.VeryChord(**tolerances))
    solution = e.value.solution
    assert solution.stats["nonfinite_step"] < 255
    newton = solve(optimistix.Newton(**tolerances))
    assert newton.cost < 0.1 * solution.cost


@pytest.mark.slow
def test_a_newton_method_may_need_more_iterations_than_diffrax_allows():
    def bent(x, u, t):
        i, w = x
        fast = 2500 * (u[0] - 0.3 * w - i - 0.1 * i**3)
        return jnp.stack([3 * i - 0.5 * w - 0.2 * jnp.tanh(4 * w), fast])[::-1]

    newton = optimistix.Newton(rtol=1e-8, atol=1e-8)
    x, u = jnp.array([-0.3, 0.2]), jnp.array([20.0])
    step = lambda **options: dp.discretize(
        bent, 0.04, diffrax.ImplicitEuler(root_finder=newton, **options)
    )(x, u, 0)
    assert jnp.isnan(step()).all()
    new = step(root_find_max_steps=100)
    np.testing.assert_allclose(new - x, 0.04 * bent(new, u, 0), rtol=1e-6, atol=1e-9)


def test_a_class_as_root_finder():
    finder: Any = optimistix.Newton
    with pytest.raises(ValueError, match="is the class `Newton`; .*max_steps=100"):
        dp.discretize(stiff, 0.05, diffrax.ImplicitEuler(root_finder=finder))


def test_one_step_of_diffrax_at_late_times():
    """Rounding of a large time leaves no rest for a second step."""
    t = jnp.asarray(123_457, jnp.int32)
    step = dp.discretize(lambda x, u, time: -x, 0.1, diffrax.Heun())
    x = jax.jit(step)(jnp.ones(1, jnp.float32), None, t)
    np.testing.assert_allclose(x, [0.905], rtol=1e-6)


class Backward(eqx.Module):
    method: Any = eqx.field(static=True)
    dt: float = -0.1

    def dynamics(self, x, u, t):
        return dp.discretize(lambda x, u, time: u - x, self.dt, self.method)(x, u, t)

    def cost(self, x, u, t):
        return jnp.sum(u**2)

    def terminal_cost(self, x):
        return jnp.sum(x**2)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["euler", "rk4", diffrax.Heun()], ids=str)
def test_a_traced_step_that_is_not_positive_is_nan(method):
    for dt in (-0.1, 0.0, jnp.nan):
        problem = dp.ControlProblem.from_system(Backward(method, dt), 3)
        assert np.isnan(dp.rollout(problem, jnp.ones(1), jnp.ones((3, 1))).xs[1:]).all()
    with pytest.raises(dp.SolveError, match="from stage 1 on.*`dt` that is not positi"):
        dp.solve(problem, dp.ILQR(), jnp.ones(1), jnp.ones((3, 1)))


@pytest.mark.slow
def test_several_steps_in_a_stage():
    """The recipe of the docstring."""
    fine = dp.discretize(field, 0.05, "rk4")

    def dynamics(x, u, t):
        for i in range(4):
            x = fine(x, u, 4 * t + i)
        return x

    x, u = jnp.asarray([1.0]), jnp.asarray([0.5])
    np.testing.assert_allclose(dynamics(x, u, 3), exact(x, u, 0.6, 0.2), rtol=1e-7)


@pytest.mark.parametrize(
    "solver, message",
    [
        (diffrax.Kvaerno3, r"no tolerances.*Kvaerno3\(root_finder=optimistix.Newton"),
        (diffrax.ImplicitEuler, r"no tolerances.*ImplicitEuler\(root_finder=optim"),
        (diffrax.EulerHeun, "is EulerHeun, which needs an equation in several parts"),
        (diffrax.KenCarp3, "is KenCarp3, which needs an equation in several parts"),
        (diffrax.SemiImplicitEuler, "which needs an equation in several parts"),
        (lambda: diffrax.HalfSolver(diffrax.Heun()), "HalfSolver, .* the solver insi"),
        (diffrax.LeapfrogMidpoint, "which steps from the last two states.*Midpoint"),
        (lambda: diffrax.Tsit5, "`method` is <class .*; one of euler, midpoint, rk4"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_solvers_that_do_not_fit(solver, message):
    with pytest.raises(ValueError, match=message):
        dp.discretize(field, 0.1, solver())


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((1.0, 0.1), TypeError, "`vector_field` is 1.0; a function"),
        ((field, 0.0), ValueError, "`dt` is 0.0; a positive number"),
        ((field, jnp.array(-0.1)), ValueError, "`dt` is -0.1.*; a positive number"),
        ((field, "0.1"), TypeError, "`dt` is '0.1'; one number, the seconds of a"),
        ((field, jnp.ones(2)), TypeError, r"`dt` is an array of shape \(2,\); one"),
        ((field, 0.1, "rk5"), ValueError, "`method` is 'rk5'; one of euler, midpoint"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_calls(args, error, message):
    with pytest.raises(error, match=message):
        dp.discretize(*args)


@pytest.mark.parametrize("form", ["object", "closure"])
def test_a_solver_that_is_held_is_told_what_it_lacks(form):
    solver = diffrax.Kvaerno3()
    field = lambda x, u, t: -300.0 * (x - u)

    class Stiff:
        def __init__(self):
            self.solver = solver

        def dynamics(self, x, u, t):
            return dp.discretize(field, 0.05, self.solver)(x, u, t)

    dynamics = Stiff().dynamics
    if form == "closure":
        dynamics = lambda x, u, t: dp.discretize(field, 0.05, solver)(x, u, t)
    problem = dp.ControlProblem(
        dynamics, lambda x, u, t: u @ u, lambda x: jnp.sum((x - 1) ** 2), 3
    )
    with pytest.raises(ValueError, match="root finder has no tolerances.*pass"):
        dp.rollout(problem, jnp.zeros(1), jnp.zeros((3, 1)))


def test_advice_about_a_vector_field_is_given_once():
    decide = lambda x, u, t: x if x[0] > 0 else u
    nothing = lambda x, *_: 0.0 * x[0]
    problem = dp.ControlProblem(dp.discretize(decide, 0.1), nothing, nothing, 3)
    with pytest.raises(jax.errors.TracerBoolConversionError) as e:
        dp.rollout(problem, jnp.ones(1), jnp.zeros((3, 1)))
    notes = "".join(e.value.__notes__)
    assert "`vector_field` was given" in notes and "`dynamics` was given" in notes
    assert notes.count("write `jnp.where") == 1
