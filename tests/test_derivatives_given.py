"""Dynamics with derivatives of one's own, and simulators outside of JAX."""

# Wrong calls are made on purpose.
# pyright: reportArgumentType=false

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

from . import helpers
from .helpers import close


jacobian = lambda f: lambda x, u, t: jax.jacfwd(f, (0, 1))(x, u, t)


def hessian(f):
    def of(x, u, t, p):
        weighted = lambda z: p @ f(z[: len(x)], z[len(x) :], t)
        return jax.hessian(weighted)(jnp.concatenate([x, u]))

    return of


# Arguments of `dp.with_jacobian`, and whether second derivatives are known.
MODES = {
    "fwd": (lambda f: ("fwd",), True),
    "rev": (lambda f: ("rev",), True),
    "differences": (lambda f: (dp.FiniteDifferences(),), False),
    "function": (lambda f: (jacobian(f),), False),
    "hessian": (lambda f: (jacobian(f), hessian(f)), True),
    "hessian alone": (lambda f: ("fwd", hessian(f)), True),
}
KNOWN = [mode for mode, (_, second) in MODES.items() if second]
UNKNOWN = [mode for mode in MODES if mode not in KNOWN]


def given(mode, f):
    return dp.with_jacobian(f, *MODES[mode][0](f))


class CartPole(eqx.Module):
    """A pole on a cart, two steps of Euler in a stage."""

    mass: float | jax.Array = 0.2

    def dynamics(self, x, u, t):
        for _ in range(2):
            x = x + 0.025 * self.rate(x, u)
        return x

    def rate(self, x, u):
        _, angle, speed, turn = x
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        push = u[0] + self.mass * sin * (turn**2 + 9.81 * cos)
        along = push / (1 + self.mass * sin**2)
        return jnp.stack([speed, turn, along, -along * cos - 9.81 * sin])


def cart_pole(dynamics, T=30):
    goal = jnp.array([0.0, jnp.pi, 0.0, 0.0])
    return dp.ControlProblem(
        dynamics,
        lambda x, u, t: 0.05 * (jnp.sum((x - goal) ** 2) / 10 + u[0] ** 2 / 100),
        lambda x: 10 * jnp.sum((x - goal) ** 2),
        T,
    )


X0, US = jnp.zeros(4), jnp.full((30, 1), 0.5)
POINT = jnp.array([0.3, 2.0, -0.4, 1.5]), jnp.array([0.7]), 3


@ft.cache
def first(mode=None):
    """The next state and its derivatives forward, backward and of many states."""
    f = CartPole().dynamics
    g = given(mode, f) if mode else f

    @jax.jit
    def derivatives(x, u):
        at = lambda x, u: g(x, u, POINT[2])
        batch = jax.vmap(jax.grad(lambda x: at(x, u)[2]))
        xs = x[None] + jnp.arange(3.0)[:, None]
        both = (of(at, (0, 1))(x, u) for of in (jax.jacfwd, jax.jacrev))
        return at(x, u), *both, batch(xs)

    return derivatives(*POINT[:2])


@pytest.mark.parametrize("mode", MODES)
def test_first_derivatives_are_those_of_the_program(mode):
    (x, *found), (expected_x, *expected) = first(mode), first()
    close(x, expected_x, rtol=1e-14)
    close(found, expected, rtol=1e-9)


@ft.cache
def second(mode=None):
    """Derivatives of derivatives, forward over backward and backward twice."""
    f = CartPole().dynamics
    g = given(mode, f) if mode else f
    along = lambda x: jnp.sum(g(x, *POINT[1:]) ** 2)
    of = lambda x: (jax.hessian(along)(x), jax.jacrev(jax.jacrev(along))(x))
    return jax.jit(of)(POINT[0])


@pytest.mark.parametrize("mode", KNOWN)
def test_second_derivatives_are_those_of_the_program(mode):
    close(second(mode), second())


@pytest.mark.parametrize("mode", UNKNOWN)
def test_second_derivatives_that_are_not_known_are_refused(mode):
    f = CartPole().dynamics
    g = given(mode, f)
    what = "`dp.FiniteDifferences`" if mode == "differences" else "a function"
    message = f"`jacobian` is {what}. Take `dp.ILQR.*a `hessian`: a function"
    for method in (dp.DDP(), dp.Newton()):
        with pytest.raises(TypeError, match=message):
            dp.direction(cart_pole(g), method, X0, US)
    with pytest.raises(TypeError, match="Second derivatives of the dynamics are need"):
        along = lambda x: jnp.sum(g(x, *POINT[1:]) ** 2)
        jax.eval_shape(jax.hessian(along), POINT[0])
    third = given("hessian", f)
    with pytest.raises(TypeError, match="Third derivatives of dynamics with a `hes"):
        along = lambda x: jnp.sum(third(x, *POINT[1:]) ** 2)
        jax.eval_shape(jax.jacfwd(jax.jacfwd(jax.jacfwd(along))), POINT[0])


@ft.cache
def rolled(mode=None):
    """Derivatives of the cost of a roll-out by controls and the mass, and mixed."""

    def cost(us, mass):
        f = CartPole(mass).dynamics
        return dp.rollout(cart_pole(given(mode, f) if mode else f, T=4), X0, us).cost

    @jax.jit
    def derivatives(us, mass):
        mixed = jax.jacfwd(jax.grad(cost), 1)
        return jax.grad(cost, (0, 1))(us, mass), mixed(us, mass)

    return derivatives(US[:4], jnp.asarray(0.3))


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_through_a_roll_out(mode):
    """Also by numbers that the functions hold, and mixed ones."""
    (found, mixed), (expected, expected_mixed) = rolled(mode), rolled()
    close(found, expected, rtol=1e-9)
    close(mixed, expected_mixed, rtol=1e-7)


@ft.cache
def reference():
    return dp.solve(cart_pole(CartPole().dynamics), dp.ILQR(), X0, US)


@pytest.mark.costly
@pytest.mark.parametrize("mode", MODES)
def test_solves_find_the_same_solution(mode):
    """And keep their fast loops."""
    problem = cart_pole(given(mode, CartPole().dynamics))
    solution = dp.solve(problem, dp.ILQR(), X0, US, fast_loops=True)
    assert solution.success
    close(solution.us, reference().us, rtol=1e-6)
    assert solution.stats["num_steps"] == reference().stats["num_steps"]


@pytest.mark.costly
@pytest.mark.parametrize("mode", ["rev", "hessian"])
def test_steps_of_second_order_are_the_same(mode):
    f = CartPole().dynamics
    for method in (dp.DDP(), dp.Newton()):
        step = lambda f, method=method: dp.direction(
            cart_pole(f), method, X0, US, damping=10.0
        )[0]
        close(step(given(mode, f)), step(f), rtol=1e-9)


def test_pytrees_lie_raveled_in_the_matrices():
    def dynamics(x, u, t):
        turn = x["turn"] + 0.1 * u["torque"][None] - jnp.sin(x["angle"])
        return dict(angle=x["angle"] + 0.1 * x["turn"], turn=turn)

    def pair(x, u, t):
        below = jnp.concatenate([-jnp.cos(x["angle"]), jnp.ones(1)])
        return jnp.stack([jnp.array([1.0, 0.1]), below]), jnp.array([[0.0], [0.1]])

    problem = lambda f: dp.ControlProblem(
        f,
        lambda x, u, t: x["angle"][0] ** 2 + u["torque"] ** 2,
        lambda x: x["turn"][0] ** 2,
        5,
    )
    x0, us = dict(angle=jnp.ones(1), turn=jnp.zeros(1)), dict(torque=jnp.zeros(5))
    step = lambda f: dp.direction(problem(f), dp.GaussNewton(), x0, us)[0]
    close(step(dp.with_jacobian(dynamics, pair)), step(dynamics), rtol=1e-10)
    close(
        step(dp.with_jacobian(dynamics, dp.FiniteDifferences())), step(dynamics), 1e-8
    )


def test_a_program_without_forward_mode_goes_backward():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, v: (2 * x * v,))
    f = lambda x, u, t: square(x) + u
    g = dp.with_jacobian(f, "rev")
    x = jnp.array([1.0, 2.0])
    close(jax.jacfwd(lambda x: g(x, x, 0))(x), jnp.diag(2 * x) + jnp.eye(2))


def test_differences_scale_with_their_entries():
    f = lambda x, u, t: jnp.stack([1e-6 * x[0] ** 2, jnp.sin(x[1])])
    x, u = jnp.array([1e6, 1.0]), jnp.zeros(1)
    given = lambda step: dp.with_jacobian(f, dp.FiniteDifferences(step))
    along = lambda step: jax.jit(jax.jacfwd(given(step)))
    close(along(None)(x, u, 0), jnp.diag(jnp.array([2.0, jnp.cos(1.0)])), rtol=1e-9)
    coarse = along(0.1)(x, u, 0)[1, 1]
    close(coarse, jnp.cos(1.0) * jnp.sin(0.1) / 0.1, rtol=1e-9)
    single = along(None)(x.astype("float32"), u.astype("float32"), 0)
    assert single.dtype == jnp.float32
    close(single, jnp.diag(jnp.array([2.0, jnp.cos(1.0)])), rtol=1e-3)


EYE, COLUMN = jnp.eye(4), jnp.ones((4, 1))
WRONG_MATRICES = {
    "no pair": (lambda x, u, t: EYE, TypeError, "of shape .4, 4.; a pair `.A, B.`"),
    "A": (lambda x, u, t: (EYE[:3], COLUMN), ValueError, "returned A of shape .3, 4."),
    "B": (
        lambda x, u, t: (EYE, COLUMN[:, 0]),
        ValueError,
        r"returned B of shape \(4,\); \(4, 1\) is expected, the next state by u: stat",
    ),
    "dtype": (
        lambda x, u, t: (EYE.astype("float32"), COLUMN),
        TypeError,
        "returned A of dtype float32, where x and u are float64: convert it",
    ),
}


@pytest.mark.parametrize("case", WRONG_MATRICES)
def test_matrices_of_another_shape_are_refused_by_name(case):
    given, kind, message = WRONG_MATRICES[case]
    problem = cart_pole(dp.with_jacobian(CartPole().dynamics, given))
    with pytest.raises(kind, match=message):
        dp.rollout(problem, X0, US)


def test_a_next_state_of_another_dtype_is_refused():
    wide = dp.with_jacobian(lambda x, u, t: x.astype(float), "rev")
    problem = cart_pole(wide, T=3)
    with pytest.raises(TypeError, match="`fn` returned float64 where x0 and us are"):
        dp.rollout(problem, X0.astype("float32"), US[:3].astype("float32"))


def test_wrong_arguments_are_refused(unchecked):
    f = CartPole().dynamics
    bent = dp.with_jacobian(f, "fwd", lambda x, u, t, p: jnp.eye(4))
    expected = r"\"fwd\", \"rev\", `dp.FiniteDifferences\(\)` or a function"
    for call, kind, message in (
        (lambda: bent(*POINT), ValueError, r"`hessian` returned .*\(5, 5\) is expect"),
        (lambda: dp.with_jacobian(3), TypeError, "`fn` is 3; a function `.x, u, t."),
        (lambda: dp.with_jacobian(f, "fd"), ValueError, f"is 'fd'; {expected}"),
        (lambda: dp.with_jacobian(f, 3), TypeError, f"is 3; {expected}"),
        (
            lambda: dp.with_jacobian(f, dp.FiniteDifferences),
            TypeError,
            f"is the class FiniteDifferences; {expected}",
        ),
        (lambda: dp.with_jacobian(f, "rev", 3), TypeError, "`hessian` is 3; a funct"),
        (lambda: dp.external(f, "rev"), ValueError, "is 'rev'; `dp.FiniteDiff"),
        (lambda: dp.external(f, vectorized=1), TypeError, "is 1; True or False"),
        (lambda: dp.FiniteDifferences(0.0), ValueError, "`step` is 0.0; a number > 0"),
    ):
        with pytest.raises(kind, match=message):
            call()


# Outside of JAX ------------------------------------------------------------------


def swing(x, u, t):
    """One step of `helpers.Pendulum`, for a row or for many."""
    assert isinstance(x, np.ndarray) and isinstance(u, np.ndarray)
    angle, speed = x[..., 0], x[..., 1]
    change = u[..., 0] - 0.1 * speed - 9.81 * np.sin(angle)
    return np.stack([angle + 0.05 * speed, speed + 0.05 * change], -1)


def swing_matrices(x, u, t):
    one, zero = np.ones_like(x[..., 0]), np.zeros_like(x[..., 0])
    A = [[one, 0.05 * one], [-0.05 * 9.81 * np.cos(x[..., 0]), 0.995 * one]]
    ordered = lambda rows: np.moveaxis(np.array(rows), (0, 1), (-2, -1))
    return ordered(A), ordered([[zero], [0.05 * one]])


def outside(fn=swing, *options, T=20, **named):
    pendulum = helpers.Pendulum()
    dynamics = dp.external(fn, *options, **named)
    return dp.ControlProblem(dynamics, pendulum.cost, pendulum.terminal_cost, T)


@ft.cache
def inside():
    return dp.solve(helpers.pendulum(20)[0], dp.ILQR(), *helpers.pendulum(20)[1:])


EXTERNAL = {
    "differences": (outside, 1e-6),
    "vectorized": (ft.partial(outside, vectorized=True), 1e-6),
    "matrices": (ft.partial(outside, swing, swing_matrices), 1e-9),
    "all at once": (
        ft.partial(outside, swing, swing_matrices, vectorized=True),
        1e-9,
    ),
}


@pytest.mark.costly
@pytest.mark.parametrize("case", EXTERNAL)
def test_a_simulator_outside_is_solved_as_one_inside(case):
    make, rtol = EXTERNAL[case]
    _, x0, us = helpers.pendulum(20)
    solution = dp.solve(make(), dp.ILQR(), x0, us)
    assert solution.success
    close(solution.us, inside().us, rtol=rtol)
    close(solution.xs, inside().xs, rtol=rtol)


@pytest.mark.slow
def test_many_simulators_at_once():
    problem, x0, us = outside(), *helpers.pendulum(20)[1:]
    x0s, uss = jnp.stack([x0 + 0.1, x0]), jnp.stack([us, us])
    batch = dp.solve_batch(problem, dp.ILQR(), x0s, uss)
    close(batch.us[1], inside().us, rtol=1e-6)
    solve = lambda x0: dp.solve(problem, dp.ILQR(), x0, us, throw=False)
    close(jax.vmap(solve)(x0s).us, batch.us, rtol=1e-9)


def test_calls_of_many_rows_come_together():
    sizes = []

    def noted(x, u, t):
        sizes.append(x.shape)
        assert x.shape[0] == u.shape[0] == t.shape[0]
        return swing(x, u, t)

    problem, x0, us = outside(noted, vectorized=True), *helpers.pendulum(20)[1:]
    jax.block_until_ready(dp.rollout(problem, x0, us))
    assert sizes == [(1, 2)] * 20
    sizes.clear()
    jax.block_until_ready(dp.linearize(problem, x0, us))
    assert set(sizes) == {(1, 2), (20 * 2 * 3, 2)}  # the roll-out, and all stages


def test_a_simulator_may_change_what_it_is_given():
    def in_place(x, u, t):
        assert type(t) is int
        x[:] = swing(x, u, t)
        u[:] = np.nan
        return x

    x0, us = jnp.array([0.5, 0.1]), jnp.ones((20, 1))
    rolled = dp.rollout(outside(in_place), x0, us)
    close(rolled.xs, dp.rollout(helpers.pendulum(20)[0], x0, us).xs)


def test_float32_stays_float32():
    x0, us = jnp.zeros(2, "float32"), jnp.ones((20, 1), "float32")
    rolled = dp.rollout(outside(), x0, us)
    assert rolled.xs.dtype == jnp.float32
    close(rolled.xs, dp.rollout(*helpers.pendulum(20)[:1], x0, us).xs, rtol=1e-5)
    model = dp.linearize(outside(), x0, us)
    assert model.A.dtype == jnp.float32
    close(model.A, dp.linearize(helpers.pendulum(20)[0], x0, us).A, rtol=1e-3)


def test_states_that_are_not_finite_do_not_reach_the_simulator():
    def explodes(x, u, t):
        assert np.all(np.isfinite(x)) and np.all(np.isfinite(u))
        return np.full_like(x, np.inf) if t > 1 else x

    rolled = dp.rollout(outside(explodes), jnp.ones(2), jnp.zeros((20, 1)))
    assert not np.isfinite(rolled.cost) and np.isnan(rolled.xs[-1]).all()


def test_fast_loops_and_second_derivatives_say_why_not():
    problem, x0, us = outside(), *helpers.pendulum(20)[1:]
    with pytest.raises(ValueError, match="because of the primitive `pure_callback`"):
        dp.solve(problem, dp.ILQR(), x0, us, fast_loops=True)
    with pytest.raises(TypeError, match="Second derivatives of the dynamics are need"):
        dp.solve(problem, dp.DDP(), x0, us)


def stuck(x, u, t):
    if t == 3:
        raise OSError("joint 3 is stuck")
    return swing(x, u, t)


BROKEN = {
    "raises": (
        stuck,
        r"`stuck`, of `dp.external`, raised OSError: joint 3 is stuck. It was given "
        r"\(x, u, t\) = \(array\(\[.*\]\), array\(\[0.\]\), 3\)",
    ),
    "shape": (lambda x, u, t: x[:1], r"the shapes \(1,\); \(2,\) is expected, that"),
    "tree": (lambda x, u, t: (x,), r"the shapes \(\(2,\),\); \(2,\) is expected"),
    "complex": (lambda x, u, t: x + 1j, "dtype complex128; real numbers are expected"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_simulator_that_fails_says_what_it_was_given(case):
    fn, message = BROKEN[case]
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(dp.rollout(outside(fn), jnp.zeros(2), jnp.zeros((20, 1))))


def test_what_a_simulator_captures_is_read_when_it_runs():
    strength = [1.0]
    fn = lambda x, u, t: swing(x, strength[0] * u, t)
    problem, x0, us = outside(fn), jnp.zeros(2), jnp.ones((20, 1))
    for strength[0] in (1.0, 2.0):
        same = dp.rollout(helpers.pendulum(20)[0], x0, strength[0] * us)
        close(dp.rollout(problem, x0, us).xs, same.xs)
