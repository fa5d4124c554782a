import dataclasses
import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog import manifolds
from diffprog.systems import (
    _rigid_bodies as rigid,
    Arm,
    Car,
    CartPole,
    KinematicCar,
    PathTracking,
    Pendulum,
    Quadrotor,
    QuaternionQuadrotor,
    Race,
    Tire,
    Track,
)


# Stored numbers: the problems of V. Roulet, S. Srinivasa, M. Fazel, Z. Harchaoui, 2022,
# arXiv:2207.06362, in float64. Tracks there are natural splines, ours periodic: 1e-6.


def objective(system, us):
    """J(us), by a plain scan."""

    def step(x, row):
        u, t = row
        return system.dynamics(x, u, t), system.cost(x, u, t)

    ts = jnp.arange(len(us), dtype=jnp.int32)
    final, costs = jax.lax.scan(step, system.x0, (us, ts))
    return jnp.sum(costs) + system.terminal_cost(final)


def systems():
    return {
        "pendulum": (Pendulum(), 1),
        "cart pole": (CartPole(), 1),
        "quadrotor": (Quadrotor(), 4),
        "quaternion quadrotor": (QuaternionQuadrotor(), 4),
        "arm": (Arm(), 7),
        "tracking": (PathTracking(KinematicCar(), Track.simple()), 2),
        "kinematic race": (Race(KinematicCar(), Track.bend(), method="midpoint"), 3),
        "miniature race": (Race(Car.miniature(), Track.simple(), method="euler"), 3),
        "full-size race": (Race.full_size(Track.oval()), 3),
    }


NAMES = list(systems())


@pytest.fixture(params=NAMES)
def system(request):
    return systems()[request.param]


@eqx.filter_jit
def cost_and_slope(system, us):
    """J and the norm of its gradient."""
    J, gradient = jax.value_and_grad(lambda us: objective(system, us))(us)
    return J, jnp.sqrt(jnp.sum(gradient**2))


@eqx.filter_jit
def functions(system, x, u, t):
    """All that a system defines, at one point."""
    slope = system.vector_field(x, u, 0.5)
    costs = system.cost(x, u, t), system.terminal_cost(x)
    return system.dynamics(x, u, t), slope, *costs


@eqx.filter_jit
def slope_of(system, x, u):
    return system.vector_field(x, u, 0.0)


@eqx.filter_jit
def torques_of(arm, x, a):
    return arm.torques(x, a)


def test_first_cost_of_the_pendulum():
    J, slope = cost_and_slope(Pendulum(), jnp.zeros((50, 1)))
    np.testing.assert_allclose(J, math.pi**2, rtol=1e-14)
    np.testing.assert_allclose(slope, 0.4868142624368118, rtol=1e-11)
    system, u = Pendulum(control_weight=0.5), jnp.array([3.0])
    np.testing.assert_allclose(system.cost(system.x0, u, 0), 4.5, rtol=1e-14)


def test_first_cost_of_the_cart_pole():
    J, slope = cost_and_slope(CartPole(control_weight=1e-6), jnp.zeros((50, 1)))
    np.testing.assert_allclose(J, 118.43525281307232, rtol=1e-13)
    np.testing.assert_allclose(J, 12 * math.pi**2, rtol=1e-13)
    np.testing.assert_allclose(slope, 25.496256398778822, rtol=1e-10)


def test_first_cost_of_path_tracking():
    tracking = PathTracking(KinematicCar(), Track.simple())
    J, slope = cost_and_slope(tracking, jnp.zeros((50, 2)))
    np.testing.assert_allclose(J, 135.637730684638, rtol=1e-7)
    np.testing.assert_allclose(slope, 36.78250335986215, rtol=1e-6)


def test_first_cost_of_the_race():
    race = Race.miniature(Track.simple(), dt=0.04)
    J, slope = cost_and_slope(race, jnp.zeros((25, 3)))
    J = J - eqx.filter_jit(race.terminal_cost)(race.x0)
    np.testing.assert_allclose(J, 39.33518788490791, rtol=1e-6)
    np.testing.assert_allclose(slope, 160.08092679182207, rtol=1e-6)


def test_step_of_the_kinematic_car():
    race = Race(KinematicCar(), Track.simple(), dt=0.04, method="euler")
    x, u = jnp.array([0.1, -0.02, 0.3, 1.2, 0.05, 1.1]), jnp.array([0.5, 0.4, 0.2])
    expected = [
        0.1458561514780291, -0.005815030080255704, 0.43826979604459304,
        1.22, 0.094, 1.108,
    ]  # fmt: skip
    np.testing.assert_allclose(race.dynamics(x, u, 0), expected, rtol=1e-11)


START = np.array([0.1, -0.02, 0.3, 1.2, 0.1, 0.5, 0.05, 1.1])


def test_step_of_the_car():
    race = Race.miniature(Track.simple())
    u = jnp.array([0.5, 0.4, 0.2])
    expected = [
        0.12280260042304102, -0.010619798299939942, 0.3335945121526912,
        1.259155270582321, 0.08291342802454757, 2.6030832956349412, 0.07204, 1.104,
    ]  # fmt: skip
    x = jnp.asarray(START)
    np.testing.assert_allclose(race.dynamics(x, u, 0), expected, rtol=1e-11)
    state_cost = race.terminal_cost(x)
    np.testing.assert_allclose(state_cost, 0.025184305791417304, rtol=1e-6)
    np.testing.assert_allclose(race.cost(x, u, 0) - state_cost, 4.5e-7, rtol=1e-9)


def test_contouring_errors_on_a_straight():
    # On a line along x: the contouring error is -y, the lag error s - x.
    race = Race.miniature(Track.line())
    x = jnp.asarray(START)
    np.testing.assert_allclose(race.lateral_error(x), 0.02, rtol=1e-12)
    np.testing.assert_allclose(race.border_margin(x), 0.185 - 0.0225 - 0.02, rtol=1e-12)
    lag = 0.05 - 0.1
    speed = 0.1 * 0.02**2 * (1.1 - 3) ** 2
    expected = 0.1 * 0.02**2 + 10 * lag**2 + speed - 1e-6 * math.log(1.1)
    np.testing.assert_allclose(race.terminal_cost(x), expected, rtol=1e-12)


def test_border_cost_pushes_inward():
    race = Race(Car.miniature(), Track.line(), q_contour=0.0, q_lag=0.0)
    both = lambda x: (race.border_margin(x), jax.grad(race.terminal_cost)(x))
    both = jax.jit(both)
    for side in (-1.0, 1.0):
        margin, gradient = both(jnp.asarray(START).at[1].set(side * 0.2))
        inside = 0.185 - 0.0225 - 0.2
        np.testing.assert_allclose(margin, inside, rtol=1e-12)
        np.testing.assert_allclose(gradient[1], side * 300 * inside**2, rtol=1e-10)
        np.testing.assert_allclose(gradient[0], 0.0, atol=1e-12)


@pytest.mark.parametrize("half_width", [3.0, 6.0])
def test_border_margin_is_that_of_the_cost(half_width):
    # A hairpin of radius 4 m, at places across and along it.
    angle = np.linspace(-math.pi / 2, math.pi / 2, 25)
    arc = 4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + [40, 0]
    x = np.arange(0.0, 40.0, 0.5)
    lower = np.stack([x, np.full_like(x, -4.0)], axis=1)
    points = np.concatenate([lower, arc, lower[::-1] * [1, -1]])
    track = Track.from_waypoints(points, half_width, closed=False)
    race = Race.full_size(track)

    @jax.jit
    def both(s, offset):
        state = race.start(10.0, s).at[:2].add(offset * track.normal(s))
        border = dataclasses.replace(
            race, q_contour=0.0, q_lag=0.0, q_speed=0.0, q_log=0.0, q_border=1.0
        )
        return race.border_margin(state), border.terminal_cost(state)

    s, offset = np.meshgrid(np.linspace(1.0, 90.0, 179), np.linspace(-7.0, 7.0, 57))
    margin, cost = map(np.asarray, jax.vmap(both)(s.ravel(), offset.ravel()))
    outside = np.maximum(race.margin - margin, 0.0)
    np.testing.assert_array_less(outside**3 - 1e-9, cost)
    np.testing.assert_array_less(cost, 2 * outside**3 + 1e-9)  # one border or both
    # On the center line the borders are far enough away for the car.
    middle = margin[offset.ravel() == 0.0]
    assert np.all(middle > min(half_width, 3.5) - 1.0 - 0.9)


def test_borders_are_at_most_zero_on_the_track():
    race = Race(KinematicCar(), Track.line(), margin=0.01)
    x = race.start(1.0, 0.5).at[1].set(0.16)
    rows = race.borders(x)
    np.testing.assert_allclose(rows.max(), 0.01 - race.border_margin(x), rtol=1e-12)
    np.testing.assert_array_equal(race.borders(x, jnp.zeros(3), 2), rows)
    assert np.all(race.borders(x, jnp.zeros(3), 0) == -1)
    np.testing.assert_allclose(rows.sum(), 0.02 + race.car.width - 0.37, rtol=1e-12)


@pytest.mark.slow
def test_a_race_between_hard_borders():
    race = Race(
        KinematicCar(),
        Track.line(),
        dt=0.04,
        v_ref=1.0,
        q_contour=0.0,
        q_border=0.0,
        control_weight=1e-2,
        method="euler",
    )
    borders = dp.Inequality(race.borders, name="borders")
    problem = dp.ControlProblem.from_system(
        race, 20, constraints=borders, terminal_constraints=borders
    )
    x0 = race.start(1.5).at[2].set(0.3)
    outer = dp.AugmentedLagrangian(tol=1e-6)
    solution = dp.solve(problem, dp.ILQR(), x0, jnp.zeros((20, 3)), outer=outer)
    margins = jax.jit(jax.vmap(race.border_margin))(solution.xs)
    assert -1e-6 < margins.min() < 1e-6
    pushes = solution.multipliers.constraints["borders"]
    assert pushes.max() > 0.1 and np.all(pushes[0] == 0)


def test_border_cost_gradient_matches_differences():
    race = Race.miniature(Track.simple())
    x = jnp.asarray(START).at[:2].set(jnp.array([0.6, 0.19]))
    assert race.border_margin(x) < 0
    cost = jax.jit(lambda x: race.terminal_cost(x))
    gradient = jax.grad(cost)(x)
    for i in range(8):
        e = 1e-6 * jnp.eye(8)[i]
        slope = (cost(x + e) - cost(x - e)) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-6, atol=1e-8)


def test_progress_backwards_costs_nan():
    race = Race.miniature(Track.simple())
    x = jnp.asarray(START).at[-1].set(-0.1)
    assert jnp.isnan(race.terminal_cost(x))


@pytest.mark.costly
def test_keeps_float32(system):
    system, m = system
    x, u, t = system.x0.astype(jnp.float32), jnp.zeros(m, jnp.float32), jnp.int32(3)
    single = functions(system, x, u, t)
    double = functions(system, x.astype(float), u.astype(float), t)
    for a, b in zip(single, double, strict=True):
        assert a.dtype == jnp.float32 and b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_derivatives_are_finite(system):
    system, m = system
    x, u, t = system.x0, 0.1 * jnp.ones(m), jnp.int32(2)

    def along(size):
        """The functions along a line through (x, u)."""
        y = x + size * jnp.cos(jnp.arange(1.0, len(x) + 1))
        v = u + size * jnp.sin(jnp.arange(1.0, m + 1))
        costs = system.cost(y, v, t), system.terminal_cost(y)
        return jnp.append(system.dynamics(y, v, t), jnp.stack(costs))

    slope = jax.jacfwd(along)
    at = jax.jit(along)
    first, second = jax.jit(lambda size: (slope(size), jax.jacfwd(slope)(size)))(0.0)
    differences = (at(1e-6) - at(-1e-6)) / 2e-6
    np.testing.assert_allclose(first, differences, rtol=1e-5, atol=1e-6)
    assert jnp.all(jnp.isfinite(second)) and jnp.any(second != 0)


@pytest.mark.costly
def test_numbers_are_leaves(system):
    """A number may be a traced array, and the cost has a derivative in it."""
    system, m = system
    u = 0.1 * jnp.ones(m)

    @eqx.filter_jit
    def cost(dt):
        changed = eqx.tree_at(lambda s: s.dt, system, dt)
        return changed.terminal_cost(changed.dynamics(system.x0, u, 0))

    slope = jax.grad(cost)(jnp.array(0.01))
    difference = (cost(jnp.array(0.01001)) - cost(jnp.array(0.00999))) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-4, atol=1e-7)
    assert jnp.abs(slope) > 1e-6


@pytest.mark.costly
def test_vmap_equals_one_by_one(system):
    system, m = system
    xs = system.x0[None] + 0.01 * jnp.arange(3.0)[:, None] * jnp.ones(
        (1, len(system.x0))
    )
    us, ts = 0.1 * jnp.ones((3, m)), jnp.arange(3, dtype=jnp.int32)
    both = lambda x, u, t: (system.dynamics(x, u, t), system.cost(x, u, t))
    together, costs = jax.jit(jax.vmap(both))(xs, us, ts)
    for i in range(3):
        alone, _, cost, _ = functions(system, xs[i], us[i], ts[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(costs[i], cost, rtol=1e-9)


def drive(system, x, u, steps):
    step = lambda x, _: (system.dynamics(x, u, 0), None)
    return jax.lax.scan(step, x, length=steps)[0]


def test_pendulum_keeps_its_energy():
    pendulum = Pendulum(friction=0.0, dt=1e-3, method="rk4", mass=0.7, length=1.3)

    def energy(x):
        kinetic = 0.7 * 1.3**2 * x[1] ** 2 / 2
        return kinetic - 0.7 * 10.0 * 1.3 * jnp.cos(x[0])

    x = jnp.array([1.0, 2.0])
    end = drive(pendulum, x, jnp.zeros(1), 1000)
    assert jnp.abs(end[0] - x[0]) > 0.1
    np.testing.assert_allclose(energy(end), energy(x), rtol=1e-11)


def test_pendulum_rests_hanging_and_upright():
    pendulum, u = Pendulum(), jnp.zeros(1)
    for angle in (0.0, math.pi):
        slope = pendulum.vector_field(jnp.array([angle, 0.0]), u, 0.0)
        np.testing.assert_allclose(slope, 0.0, atol=1e-14)
    np.testing.assert_allclose(pendulum.terminal_cost(jnp.array([math.pi, 0.0])), 0.0)


def test_cart_pole_keeps_its_energy():
    cart = CartPole(friction=0.0, dt=1e-3, method="rk4")
    M, m, l, inertia, g = 0.5, 0.2, 0.3, 0.006, 10.0

    def energy(x):
        _, angle, velocity, rate = x
        kinetic = (M + m) * velocity**2 + (inertia + m * l**2) * rate**2
        coupling = m * l * velocity * rate * jnp.cos(angle)
        return kinetic / 2 + coupling - m * g * l * jnp.cos(angle)

    def momentum(x):
        return (M + m) * x[2] + m * l * x[3] * jnp.cos(x[1])

    x = jnp.array([0.1, 2.0, 0.3, -1.0])
    end = drive(cart, x, jnp.zeros(1), 1000)
    assert jnp.all(jnp.abs(end - x) > 0.01)
    np.testing.assert_allclose(energy(end), energy(x), rtol=1e-9)
    np.testing.assert_allclose(momentum(end), momentum(x), rtol=1e-9)


def test_cart_pole_limits_and_target():
    cart = CartPole(limits=(-1.0, 2.0), limit_weight=3.0)
    upright = lambda position: jnp.array([position, -math.pi, 0.0, 0.0])
    np.testing.assert_allclose(cart.terminal_cost(upright(0.0)), 0.0, atol=1e-15)
    np.testing.assert_allclose(cart.terminal_cost(upright(2.5)), 3 * 0.5**3)
    np.testing.assert_allclose(cart.cost(upright(-1.5), jnp.zeros(1), 0), 3 * 0.5**3)
    hanging = jnp.zeros(4)
    assert cart.cost(hanging, jnp.zeros(1), 38) == 0
    np.testing.assert_allclose(cart.cost(hanging, jnp.zeros(1), 39), math.pi**2)


def test_quadrotor_hovers():
    quadrotor = Quadrotor()
    x = jnp.array([3.0, -2.0, 1.0] + 9 * [0.0]).at[5].set(0.7)
    slope = quadrotor.vector_field(x, jnp.zeros(4), 0.0)
    np.testing.assert_allclose(slope, 0.0, atol=1e-14)


def test_quadrotor_turns_with_its_yaw():
    """The same flight, seen from a frame turned about the vertical axis."""
    quadrotor, turn = Quadrotor(), 0.8
    c, s = math.cos(turn), math.sin(turn)
    turned = jnp.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    x = jnp.linspace(-0.5, 0.6, 12)
    u = jnp.array([0.1, -0.2, 0.3, 0.4])
    p, angles, v, w = x.reshape(4, 3)
    y = jnp.concatenate([turned @ p, angles.at[2].add(turn), turned @ v, w])
    dx = quadrotor.vector_field(x, u, 0.0).reshape(4, 3)
    dy = quadrotor.vector_field(y, u, 0.0).reshape(4, 3)
    np.testing.assert_allclose(dy[0], turned @ dx[0], atol=1e-12)
    np.testing.assert_allclose(dy[1], dx[1], atol=1e-12)
    np.testing.assert_allclose(dy[2], turned @ dx[2], atol=1e-12)
    np.testing.assert_allclose(dy[3], dx[3], atol=1e-12)


def test_quadrotor_moves_like_a_rigid_body():
    """Its rotation R obeys R' = R [w], m v' = R (0, 0, F) - (0, 0, m g), and Euler."""
    cross = -np.cross(np.eye(3)[:, None], np.eye(3))  # [e_i] for each axis e_i

    def rotation(angles):
        def turn(i):  # by Rodrigues
            K = cross[i]
            return np.eye(3) + jnp.sin(angles[i]) * K + (1 - jnp.cos(angles[i])) * K @ K

        return turn(2) @ turn(1) @ turn(0)

    @jax.jit
    def motion(x, u):
        parts = Quadrotor().vector_field(x, u, 0.0).reshape(4, 3)
        return parts, *jax.jvp(rotation, (x[3:6],), (parts[1],))

    x, u = np.linspace(-0.5, 0.6, 12), np.array([0.1, -0.2, 0.3, 0.4])
    (velocity, _, acceleration, spin), R, change = map(np.asarray, motion(x, u))
    v, w = x[6:9], x[9:]
    f1, f2, f3, f4 = forces = u + 0.5 * 9.81 / 4
    torque = [0.175 * (f2 - f4), 0.175 * (f3 - f1), 0.0168 * (f1 - f2 + f3 - f4)]
    inertia = np.array([0.0023, 0.0023, 0.004])
    lift = np.sum(forces) / 0.5 * R[:, 2]
    for found, desired in (
        (velocity, v),
        (change, R @ np.tensordot(w, cross, 1)),
        (acceleration, lift - [0.0, 0.0, 9.81]),
        (inertia * spin, torque - np.cross(w, inertia * w)),
    ):
        np.testing.assert_allclose(found, desired, rtol=0, atol=1e-12)


def test_quadrotor_spins_freely():
    """Without torques the rotation energy stays."""
    quadrotor = Quadrotor(dt=1e-3, method="rk4")
    x = jnp.zeros(12).at[9:].set(jnp.array([0.4, -0.3, 0.5]))
    end = drive(quadrotor, x, jnp.zeros(4), 300)
    assert jnp.all(jnp.abs(end[9:11] - x[9:11]) > 0.01)
    inertia = jnp.array(quadrotor.inertia)
    energy = lambda x: jnp.sum(inertia * x[9:] ** 2)
    np.testing.assert_allclose(energy(end), energy(x), rtol=1e-12)


@jax.jit
def of_angles(x):
    """The state of a `QuaternionQuadrotor` from that of a `Quadrotor`."""
    turn = lambda angle, i: jnp.concatenate(
        [jnp.cos(angle / 2)[None], jnp.sin(angle / 2) * jnp.eye(3)[i]]
    )
    q, attitudes = turn(x[5], 2), manifolds.UnitQuaternion()
    for i in (1, 0):  # yaw, pitch, roll
        q = attitudes.retract(q, x[3 + i] * jnp.eye(3)[i])
    return jnp.concatenate([x[:3], q, x[6:]])


def rotation(q):
    K = np.cross(q[1:], np.eye(3)).T
    return np.eye(3) + 2 * q[0] * K + 2 * K @ K


def test_both_quadrotors_fly_alike():
    """By angles and by a quaternion, from the same start with the same forces."""
    x, u = jnp.linspace(-0.5, 0.6, 12), jnp.array([0.1, -0.2, 0.3, 0.4])
    start = of_angles(x)
    np.testing.assert_allclose(of_angles(Quadrotor().x0), QuaternionQuadrotor().x0)
    field = jax.jvp(of_angles, (x,), (slope_of(Quadrotor(), x, u),))[1]
    found = slope_of(QuaternionQuadrotor(), start, u)
    np.testing.assert_allclose(found, field, atol=1e-12)
    np.testing.assert_allclose(start[3:7] @ found[3:7], 0.0, atol=1e-15)

    exact = of_angles(drive(Quadrotor(dt=0.3 / 128, method="rk4"), x, u, 128))
    for method, order in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        errors = []
        for steps in (16, 32):
            quadrotor = QuaternionQuadrotor(dt=0.3 / steps, method=method)
            end = drive(quadrotor, start, u, steps)
            errors.append(jnp.linalg.norm(end - exact))
        assert abs(jnp.log2(errors[0] / errors[1]) - order) < 0.3
    assert errors[-1] < 1e-6


def test_both_quadrotors_are_alike_near_hover():
    """Level, the rotation vector is roll, pitch and yaw to first order."""
    quadrotor, u = QuaternionQuadrotor(), jnp.array([0.2, 0.2, 0.2, 0.2])
    x = jnp.zeros(13).at[3].set(1.0).at[7:10].set(jnp.array([0.3, -0.2, 0.1]))
    space, angles = quadrotor.manifold, jnp.zeros(12).at[6:9].set(x[7:10])

    def local(v, u):
        y = quadrotor.dynamics(space.retract(x, v), u, 0)
        return space.difference(y, x)

    found = jax.jit(jax.jacobian(local, (0, 1)))(jnp.zeros(12), u)
    alike = lambda x, u: Quadrotor().dynamics(x, u, 0)
    expected = jax.jit(jax.jacobian(alike, (0, 1)))(angles, u)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_quaternion_quadrotor_spins_freely():
    """Norm, rotation energy and the angular momentum in the world frame stay."""
    quadrotor = QuaternionQuadrotor(dt=1e-3, method="rk4")
    inertia = np.array(quadrotor.inertia)
    x = quadrotor.x0.at[10:].set(jnp.array([4.0, -3.0, 5.0]))
    end = drive(quadrotor, x, jnp.zeros(4), 3000)
    assert jnp.all(jnp.abs(end[10:12] - x[10:12]) > 0.1)
    np.testing.assert_allclose(jnp.linalg.norm(end[3:7]), 1.0, rtol=1e-12)
    energy = lambda x: np.sum(inertia * x[10:] ** 2)
    np.testing.assert_allclose(energy(end), energy(x), rtol=1e-10)
    momentum = lambda x: rotation(x[3:7]) @ (inertia * x[10:])
    np.testing.assert_allclose(momentum(end), momentum(x), rtol=1e-8)


def test_a_steady_turn_keeps_its_axis():
    """By Euler's rule half of the angle has the tangent dt / 2 times the rate."""
    quadrotor = QuaternionQuadrotor(dt=0.1)
    x = quadrotor.x0.at[12].set(2.0)  # about an axis of inertia
    end = drive(quadrotor, x, jnp.zeros(4), 50)
    turn = jnp.array([0.0, 0.0, 50 * 2 * jnp.arctan(0.1)])
    turned = manifolds.UnitQuaternion().retract(x[3:7], turn)
    np.testing.assert_allclose(end[3:7], turned, atol=1e-13)


def test_the_attitude_to_reach_costs_nothing():
    """Nor does it with the other sign, or another length."""
    q = of_angles(jnp.linspace(-0.5, 0.6, 12))[3:7]
    quadrotor = QuaternionQuadrotor(attitude=tuple(-2 * q))
    at = jnp.concatenate([jnp.ones(3), q, jnp.zeros(6)])
    np.testing.assert_allclose(quadrotor.terminal_cost(at), 0.0, atol=1e-28)
    v = jnp.zeros(12).at[3:6].set(jnp.array([0.1, 0.2, -0.2]))
    away = quadrotor.manifold.retract(at, v)
    np.testing.assert_allclose(quadrotor.terminal_cost(away), 50 * 0.09, rtol=1e-12)
    u = jnp.ones(4)
    np.testing.assert_allclose(quadrotor.cost(away, u, 0), 0.0045 + 0.2, rtol=1e-12)


def planar(joints, **options) -> Arm:
    """An arm that hangs, of rods about the y axis: 1 kg, 1 m, moment 1/12."""
    rows = lambda row: np.tile(np.array(row), (joints, 1))
    fields: Any = dict(
        axes=rows([0.0, 1.0, 0.0]),
        offsets=rows([0.0, 0.0, -1.0]) * (np.arange(joints) > 0)[:, None],
        masses=np.ones(joints),
        centers=rows([0.0, 0.0, -0.5]),
        inertias=np.tile(np.diag([1 / 12, 1 / 12, 0.01]), (joints, 1, 1)),
        damping=np.zeros(joints),
        hand=np.array([0.0, 0.0, -1.0]),
    )
    return Arm(**fields | options)


def test_one_joint_is_a_pendulum():
    arm = planar(1, damping=np.array([0.2]))
    angle, rate, torque = 0.7, -0.4, 1.5
    x, u = jnp.array([angle, rate]), jnp.array([torque])
    expected = (torque - 0.2 * rate - 9.81 * 0.5 * math.sin(angle)) * 3
    np.testing.assert_allclose(slope_of(arm, x, u), [rate, expected], rtol=1e-13)
    position, rotation = jax.jit(lambda x: arm.pose(x))(x)
    hand = [-math.sin(angle), 0.0, -math.cos(angle)]
    np.testing.assert_allclose(position, hand, atol=1e-15)
    np.testing.assert_allclose(rotation @ jnp.array([0.0, 0.0, -1.0]), hand, atol=1e-15)


def test_two_joints_obey_the_equations_of_the_textbook():
    """Of a planar arm: M11 = 5/3 + cos, M12 = 1/3 + cos/2, M22 = 1/3."""
    arm, x = planar(2), jnp.array([0.4, -0.9, 1.1, -0.7])
    q1, q2, v1, v2 = map(float, x)
    c, s = math.cos(q2), math.sin(q2)
    M = np.array([[5 / 3 + c, 1 / 3 + c / 2], [1 / 3 + c / 2, 1 / 3]])
    coriolis = np.array([-s / 2 * v2 * (2 * v1 + v2), s / 2 * v1**2])
    fall = 9.81 * 0.5 * math.sin(q1 + q2)
    gravity = np.array([9.81 * 1.5 * math.sin(q1) + fall, fall])
    a = np.array([0.3, -0.8])
    torques = M @ a + coriolis + gravity
    found = torques_of(arm, x, jnp.asarray(a))
    np.testing.assert_allclose(found, torques, rtol=1e-12)
    found = slope_of(arm, x, jnp.asarray(torques))[2:]
    np.testing.assert_allclose(found, a, rtol=1e-12)


POINT = np.random.default_rng(0).normal(size=(4, 7))


def test_the_mass_matrix_of_an_arm_is_symmetric_and_positive():
    arm, (q, qd, a, b) = Arm(), POINT
    x = jnp.concatenate([q, qd])
    inertia = jax.jit(lambda a: arm.torques(x, a) - arm.torques(x, jnp.zeros(7)))
    M = np.stack([inertia(e) for e in jnp.eye(7)])
    np.testing.assert_allclose(M, M.T, atol=1e-12)
    assert np.linalg.eigvalsh(M)[0] > 1e-3
    # Accelerations are the inverse of torques.
    found = slope_of(arm, x, torques_of(arm, x, jnp.asarray(a)))[7:]
    np.testing.assert_allclose(found, a, rtol=1e-10, atol=1e-10)
    # A known product, as the energy needs it: b' M a = a' M b.
    np.testing.assert_allclose(b @ inertia(a), a @ inertia(b), rtol=1e-10)


def test_derivatives_of_an_arm_are_those_of_its_program():
    """Exact rules of the first order, forward and reverse, against differences."""
    arm, (q, qd, u, w) = Arm(), POINT
    fn = jax.jit(lambda z: arm.vector_field(z[:14], z[14:], 0.0)[7:])
    z, e = jnp.concatenate([q, qd, u]), 1e-5
    J = jax.jacfwd(fn)(z)
    differences = [(fn(z + e * v) - fn(z - e * v)) / (2 * e) for v in jnp.eye(21)]
    np.testing.assert_allclose(J, np.stack(differences, 1), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(
        jax.vjp(fn, z)[1](jnp.asarray(w))[0], w @ J, rtol=1e-9, atol=1e-9
    )


def test_slopes_of_torques_of_an_arm_are_the_derivatives_of_its_scan():
    q, qd, _, a = map(jnp.asarray, POINT)
    links = Arm()._links(q)

    def slopes(q, qd, a):
        bodies = rigid._bodies(links, q, qd)
        return *rigid._slopes(links, bodies, qd, a), rigid._mass_matrix(bodies)

    expected = jax.jit(jax.jacrev(ft.partial(rigid.torques, links), (0, 1, 2)))(
        q, qd, a
    )
    found = jax.jit(slopes)(q, qd, a)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.costly
@pytest.mark.parametrize(
    "derivative",
    [
        lambda fn: jax.jacfwd(fn, 1),
        lambda fn: jax.jacrev(fn, (0, 1)),
        lambda fn: jax.jacfwd(jax.jacrev(fn, 1), 1),
    ],
    ids=["forward", "reverse", "second"],
)
def test_derivatives_of_an_arm_in_closed_form_are_those_of_its_scans(derivative):
    """Of accelerations, pose and errors; of second order, and by its fields."""
    q, qd, u, _ = map(jnp.asarray, POINT)
    arm = Arm()
    links, weights = arm._links(q), jnp.array([2.0, 0.3])
    goal = rigid.Goal(arm.hand, arm.position, arm.rotation, weights)

    def plain(links, z):
        q, qd, u = jnp.split(z, 3)
        by = ft.partial(rigid.torques, links, q, qd)
        matrix, bias = jax.jacfwd(by)(q), by(jnp.zeros_like(q))
        found = jnp.linalg.solve(matrix, u - bias), rigid._hand(links, q)[:2]
        return *found, rigid._miss(links, goal, q)

    def closed(links, z):
        q, qd, u = jnp.split(z, 3)
        found = rigid.accelerations(links, q, qd, u), rigid.pose(links, q)[:2]
        return *found, rigid.miss(links, goal, q)

    z = jnp.concatenate([q, qd, u])
    both = [jax.jit(derivative(fn))(links, z) for fn in (closed, plain)]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):
        scale = 1 + float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * scale)


def test_an_arm_that_swings_freely_keeps_its_energy():
    """Up to an error of the order of the method."""

    @eqx.filter_jit
    def energy(arm, x):
        still = jnp.concatenate([x[:7], jnp.zeros(7)])
        held = arm.torques(still, jnp.zeros(7))
        kinetic = x[7:] @ (arm.torques(still, x[7:]) - held) / 2
        height = lambda q: arm.torques(jnp.concatenate([q, jnp.zeros(7)]), jnp.zeros(7))
        # Potential energy is the integral of the torques that hold the arm, on a line.
        nodes, shares = np.polynomial.legendre.leggauss(20)
        points = (nodes[None] + 1) / 2 * x[:7, None]
        return kinetic + x[:7] @ jax.vmap(height)(points.T).T @ shares / 2

    errors = []
    for steps in (50, 100):
        arm = Arm(damping=jnp.zeros(7), dt=0.1 / steps)
        x = jnp.concatenate([arm.x0[:7], 0.3 * jnp.asarray(POINT[1])])
        end = drive(arm, x, jnp.zeros(7), steps)
        errors.append(float(energy(arm, end) - energy(arm, x)))
    assert abs(errors[0]) < 0.5
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, atol=0.2)


def test_an_arm_at_its_pose_costs_nothing():
    arm = Arm()
    x = jnp.concatenate([jnp.asarray(POINT[0]), jnp.zeros(7)])
    position, rotation = jax.jit(lambda x: arm.pose(x))(x)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-14)
    arm = Arm(position=position, rotation=rotation)
    np.testing.assert_allclose(arm.terminal_cost(x), 0.0, atol=1e-25)
    u = jnp.ones(7)
    np.testing.assert_allclose(arm.cost(x, u, 0), 0.5 * 1e-3 * 7, rtol=1e-12)
    away = Arm(position=position + 0.1, rotation=-rotation)
    np.testing.assert_allclose(away.cost(x, 0 * u, 0), 0.5 * (0.03 + 1.2), rtol=1e-12)


def test_tire_force_is_odd_and_limited():
    tire = Tire(stiffness=10.0, shape=1.5, peak=3.0)
    slip = jnp.linspace(-1.5, 1.5, 301)
    force = jax.vmap(tire.force)(slip)
    np.testing.assert_allclose(force, -force[::-1], atol=1e-12)
    assert jnp.max(force) <= 3.0 and jnp.max(force) > 2.999
    np.testing.assert_allclose(jax.grad(tire.force)(jnp.array(0.0)), 45.0)


@pytest.mark.parametrize(
    "car", [Car.miniature(), Car.full_size()], ids=["mini", "full"]
)
def test_car_is_symmetric(car):
    """Steering to the other side gives the mirror image."""
    mirror = jnp.array([1.0, -1.0, -1.0, 1.0, -1.0, -1.0])
    x = jnp.array([0.0, 0.0, 0.2, 12.0, 0.3, -0.1])
    u = jnp.array([0.4, 0.2])
    slope = car.vector_field(x, u, 0.0)
    other = car.vector_field(mirror * x, u * jnp.array([1.0, -1.0]), 0.0)
    np.testing.assert_allclose(other, mirror * slope, rtol=1e-12, atol=1e-12)


def test_full_size_car_has_the_stated_performance():
    car = Car.full_size(squashed=False)
    straight = lambda v, duty: car.vector_field(
        car.state(jnp.zeros(2), jnp.array(0.0), v), jnp.array([duty, 0.0]), 0.0
    )
    speeds = jnp.linspace(10.0, 60.0, 11)
    full = jax.vmap(lambda v: straight(v, 1.0)[3])(speeds)
    assert jnp.all(full > 0) and straight(70.0, 1.0)[3] < 0
    assert jnp.abs(straight(66.6, 1.0)[3]) < 0.02
    brake = jax.vmap(lambda v: straight(v, -1.5)[3])(speeds)
    assert jnp.all(brake < -6.0) and jnp.all(brake > -9.81)
    # The engine gives its 230 kW at 60 m/s, and the grip is one g.
    push = car.drivetrain.max_force - 60.0 * car.drivetrain.fade
    np.testing.assert_allclose(60.0 * push, 230e3, rtol=1e-12)
    grip = (car.front_tire.peak + car.rear_tire.peak) / car.mass
    np.testing.assert_allclose(grip, 9.81, rtol=1e-12)


@pytest.mark.parametrize("speed", [10.0, 30.0, 60.0])
def test_full_size_car_corners_steadily(speed):
    """The axles are neutral: at any speed it turns in by about wheelbase / radius."""
    car = Car.full_size(squashed=False)
    yaw_rate = 4.0 / speed
    u = jnp.array([0.0, (1.6 + 1.4) * yaw_rate / speed / car.max_steer])

    def step(x, _):
        middle = x + 0.005 * car.vector_field(x, u, 0.0)
        x = x + 0.01 * car.vector_field(middle, u, 0.0)
        return x.at[3].set(speed), None

    x = car.state(jnp.zeros(2), jnp.array(0.0), speed)
    x, _ = jax.lax.scan(step, x, length=600)
    np.testing.assert_allclose(x[5], yaw_rate, rtol=0.06)


def test_controls_are_squashed():
    car = Car.miniature()
    drive = jnp.array([-50.0, 0.0, 50.0])
    duty = jax.vmap(car.drivetrain.duty)(drive)
    np.testing.assert_allclose(duty, [-0.1, 0.45, 1.0], atol=1e-12)
    kinematic = KinematicCar(max_steer=0.3)
    x = kinematic.state(jnp.zeros(2), jnp.array(0.0), 1.0)
    fast = kinematic.vector_field(x, jnp.array([0.0, 1e9]), 0.0)
    np.testing.assert_allclose(fast[2], math.tan(0.3) / 0.09, rtol=1e-6)


def limits(owner):
    assert owner.control_bounds is not None
    return owner.control_bounds


@pytest.mark.parametrize(
    "car",
    [Car.miniature(), Car.full_size(), KinematicCar()],
    ids=["mini", "full", "kinematic"],
)
def test_limits_of_a_car_are_what_squashing_allows(car):
    """Squashed inputs drive as the duty and the angle that they mean, to the limits."""
    limited = dataclasses.replace(car, squashed=False)
    assert car.control_bounds is None
    lower, upper = limits(limited)
    assert lower.shape == upper.shape == (2,) and -lower[1] == upper[1] == 1
    part = jnp.array([0.0, 1e-3, 0.3, 0.5, 0.9, 1.0])
    if isinstance(car, KinematicCar):
        np.testing.assert_array_equal([lower[0], upper[0]], [-np.inf, np.inf])
        drive = inputs = jnp.linspace(-3.0, 3.0, 6)
    else:
        span = upper[0] - lower[0]
        inputs = lower[0] + part * span
        drive = span / 4 * jnp.log(part / (1 - part))
    shares = 2 * part[::-1] - 1
    steer = jnp.tan(math.pi / 2 * shares)
    x = car.state(jnp.array([1.0, 2.0]), jnp.array(0.3), 1.5)
    slopes = lambda car: jax.jit(
        jax.vmap(lambda *u: car.vector_field(x, jnp.stack(u), 0.0))
    )
    squashed, direct = slopes(car)(drive, steer), slopes(limited)(inputs, shares)
    np.testing.assert_allclose(squashed, direct, rtol=1e-12, atol=1e-12)


def test_a_problem_has_the_limits_of_its_car():
    track, car = Track.circle(), KinematicCar(max_steer=0.4, squashed=False)
    for system, free in (
        (PathTracking(car, track), 0),
        (Race(car, track), 1),
        (Race.miniature(track, squashed=False), 1),
        (Race.full_size(track, squashed=False), 1),
    ):
        problem = dp.ControlProblem.from_system(system, 4)
        both = limits(problem), limits(system.car), (-np.inf, np.inf)
        for side, own, none in zip(*both, strict=True):
            np.testing.assert_array_equal(side, [*own, *free * [none]])
        assert len(jax.tree.leaves(problem)) == len(jax.tree.leaves(system))
    for system in (PathTracking(KinematicCar(), track), Race.full_size(track)):
        problem = dp.ControlProblem.from_system(system, 4)
        assert problem.control_bounds is system.control_bounds is None


def test_limits_follow_the_numbers_of_the_car():
    """They may be traced, batched, differentiated, and of any dtype."""
    race = Race.miniature(Track.circle(), squashed=False)

    def upper(most):
        car = eqx.tree_at(lambda car: car.drivetrain.max_duty, race.car, most)
        return limits(dataclasses.replace(race, car=car))[1]

    for dtype in (jnp.float32, jnp.float64):
        most = jnp.array([0.2, 0.3], dtype)
        batch = jax.jit(jax.vmap(upper))(most)
        assert batch.dtype == dtype
        expected = [[0.2, 1, np.inf], [0.3, 1, np.inf]]
        np.testing.assert_array_equal(batch, np.asarray(expected, dtype))
        np.testing.assert_array_equal(jax.jacobian(upper)(most[1]), [1, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_race_keeps_the_limits_of_its_car(dtype):
    track = Track.bend().scaled(150.0)
    race = Race.full_size(track, v_ref=60.0, squashed=False)
    problem = dp.ControlProblem.from_system(race, 15)
    x0, us = race.x0.astype(dtype), jnp.zeros((15, 3), dtype)
    solution = dp.solve(problem, dp.DDP(), x0, us, max_steps=30, throw=False)
    lower, upper = (np.asarray(side, dtype) for side in limits(problem))
    us = np.asarray(solution.us)
    assert us.dtype == dtype and np.all((lower <= us) & (us <= upper))
    assert np.any(us[:, 0] == upper[0])  # full throttle
    assert solution.cost < solution.history["cost"][0]


@pytest.mark.parametrize("name", ["tracking", "kinematic race", "full-size race"])
def test_starts_on_the_center_line(name):
    system, _ = systems()[name]
    x = system.start(speed=7.0, s=2.0)
    np.testing.assert_allclose(x[:2], system.track.center(2.0), rtol=1e-12)
    np.testing.assert_allclose(x[2:4], [system.track.heading(2.0), 7.0], rtol=1e-12)
    if name != "tracking":
        np.testing.assert_allclose(x[-2:], [2.0, 7.0])
        np.testing.assert_allclose(system.lateral_error(x), 0.0, atol=1e-12)
        assert system.border_margin(x) > 0
    np.testing.assert_array_equal(system.x0, system.start())


@pytest.mark.parametrize("kind", [Race, PathTracking])
@pytest.mark.usefixtures("unchecked")
def test_a_race_takes_a_car_and_a_track(kind):
    car, track = Car.miniature(), Track.circle()
    with pytest.raises(TypeError, match="`car` is the class Car; something like"):
        kind(Car, track)
    with pytest.raises(TypeError, match="`track` is circle; something like"):
        kind(car, "circle")


@pytest.mark.usefixtures("unchecked")
def test_steps_are_positive_and_methods_known_at_once():
    for dt in (0.0, jnp.array([0.1, -0.1]), np.nan):
        with pytest.raises(ValueError, match="`dt` is .*; positive seconds are expec"):
            Pendulum(dt=dt)
    with pytest.raises(ValueError, match="`method` is 'rk5'; one of euler, midpoint"):
        Race(Car.miniature(), Track.simple(), method="rk5")
    assert Pendulum(dt=jnp.array([0.1, 0.2])).dt.shape == (2,)  # pyright: ignore
    assert jax.jit(lambda dt: CartPole(dt=dt).dt)(0.3) == jnp.float32(0.3)
