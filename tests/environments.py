"""Published control problems, written from their papers, and their step rules.

Independent of `diffprog.systems` on purpose. Sources: Roulet, Srinivasa, Fazel,
Harchaoui, "Iterative Linear Quadratic Optimization for Nonlinear Control", 2022,
arXiv 2207.06362, with the numbers of its code; Liniger, Domahidi, Morari,
"Optimization-Based Autonomous Racing of 1:43 Scale RC Cars", 2015, arXiv 1711.07300.

Every function returns `(problem, x0, us)`. The numbers are leaves of the problem, so
all problems of one class and horizon share a compilation. The published costs begin at
the states of t = 1: a stage costs c_x(x) 1[t >= 1] + c_u(u), the last state c_x(x).
"""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import diffprog as dp


def _problem(system, x0, horizon: int, m: int):
    x0 = jnp.asarray(x0, float)
    problem = dp.ControlProblem.from_system(system, horizon)
    return problem, x0, jnp.zeros((horizon, m))


def _index(t) -> Array:
    return jnp.asarray(t, jnp.int32)


class Pendulum(eqx.Module):
    """Swing-up by an Euler step; x = (angle from upright, velocity)."""

    dt: Any
    control_weight: Any
    start: Any  # the first stage whose state counts
    gravity: float = 10.0
    friction: float = 0.01
    velocity_weight: float = 0.1

    def dynamics(self, x, u, t):
        acceleration = self.gravity * jnp.sin(x[0]) - self.friction * x[1] + u[0]
        return x + self.dt * jnp.stack([x[1], acceleration])

    def cost(self, x, u, t):
        state = jnp.where(t >= self.start, self.terminal_cost(x), 0)
        return state + self.control_weight * u[0] ** 2

    def terminal_cost(self, x):
        return x[0] ** 2 + self.velocity_weight * x[1] ** 2


def pendulum(T: int = 50, dt=None, control_weight: float = 1e-6, stay_put: float = 0):
    dt = 2 / T if dt is None else dt
    start = _index(T - int(stay_put / dt))
    return _problem(Pendulum(dt, control_weight, start), [np.pi, 0.0], T, 1)


class CartPole(eqx.Module):
    """Swing-up by an Euler step; x = (position, angle, and their velocities).

    The dynamics of the published runs took the second and third entry of the state for
    each other (the returned derivative and the costs did not): `as_run`.
    """

    dt: Any
    control_weight: Any
    start: Any
    as_run: Any
    gravity: float = 10.0
    cart: float = 0.5
    mass: float = 0.2
    friction: float = 0.1
    inertia: float = 0.006
    length: float = 0.3
    limit: float = 2.0

    def dynamics(self, x, u, t):
        m, length = self.mass, self.length
        xd, angle = jnp.where(self.as_run, x[1:3], x[2:0:-1])
        angled = x[3]
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        total, inertia = self.cart + m, self.inertia + m * length**2
        off = m * length * cos
        b1 = m * length * angled**2 * sin - self.friction * xd + u[0]
        b2 = -m * self.gravity * length * sin
        det = self.inertia * total + self.cart * m * length**2 + (m * length * sin) ** 2
        xdd = (inertia * b1 - off * b2) / det
        angledd = (total * b2 - off * b1) / det
        return x + self.dt * jnp.stack([xd, angled, xdd, angledd])

    def state_cost(self, x):
        out = jnp.maximum(-self.limit - x[0], 0) ** 3
        return out + jnp.maximum(x[0] - self.limit, 0) ** 3

    def target_cost(self, x):
        return (x[1] + jnp.pi) ** 2 + 0.1 * x[3] ** 2

    def cost(self, x, u, t):
        state = jnp.where(t >= 1, self.state_cost(x), 0)
        state = state + jnp.where(t >= self.start, self.target_cost(x), 0)
        return state + self.control_weight * u[0] ** 2

    def terminal_cost(self, x):
        return self.state_cost(x) + self.target_cost(x)


def cart_pole(T: int = 50, control_weight: float = 1e-6, as_run: bool = False):
    dt = 2.5 / T
    start = _index(T - int(0.6 / dt))
    system = CartPole(dt, control_weight, start, jnp.asarray(as_run))
    return _problem(system, [0.0] * 4, T, 1)


class Spline(eqx.Module):
    """Natural cubic splines of several columns over the same knots."""

    knots: Any  # (N,)
    coefficients: Any  # (N - 1, 4, columns)
    closed: bool = eqx.field(static=True, default=True)

    def __call__(self, t):
        """The columns at t, and their derivatives."""
        last = self.knots[-1]
        # Open curves end smoothly at the last knot: t - srelu(t - last).
        t = (
            t - last * jnp.floor(t / last)
            if self.closed
            else t - _smooth_relu(t - last)
        )
        below = jnp.sum(self.knots < jax.lax.stop_gradient(t)) - 1
        i = jnp.clip(below, 0, self.knots.shape[0] - 2)
        tau = t - self.knots[i]
        one = jnp.ones_like(tau)
        powers = jnp.stack([one, tau, tau**2, tau**3])
        slopes = jnp.stack([0 * one, one, 2 * tau, 3 * tau**2])
        coefficients = self.coefficients[i]
        return powers @ coefficients, slopes @ coefficients


def _smooth_relu(t, width: float = 1e-6):
    middle = (t + width) ** 3 / (6 * width**2)
    middle = jnp.where(t > 0, t + (width - t) ** 3 / (6 * width**2), middle)
    return jnp.where(t <= -width, 0, jnp.where(t >= width, t, middle))


def natural_spline(knots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients, shape (N - 1, 4, columns), of the splines through `values`."""
    r = (1 / np.diff(knots))[:, None]
    rise = np.diff(values, axis=0)
    diagonal = np.zeros((len(knots), 1))
    diagonal[:-1] += 2 * r
    diagonal[1:] += 2 * r
    matrix = np.diag(diagonal[:, 0]) + np.diag(r[:, 0], 1) + np.diag(r[:, 0], -1)
    rhs = np.zeros_like(values)
    rhs[:-1] += 3 * rise * r**2
    rhs[1:] += 3 * rise * r**2
    k = np.linalg.solve(matrix, rhs)
    c = (3 * rise * r - 2 * k[:-1] - k[1:]) * r
    d = (-2 * rise * r + k[:-1] + k[1:]) * r**2
    return np.stack([values[:-1], k[:-1], c, d], axis=1)


def chord_lengths(points: np.ndarray) -> np.ndarray:
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _straight(points: list, dx: float, dy: float, count: int):
    for _ in range(count):
        points.append((points[-1][0] + dx, points[-1][1] + dy))


def _arc(points: list, angle: float, sign: int, quarters: int, radius: float = 50):
    per_quarter = int(np.ceil(radius * np.pi / 2))
    x, y = points[-1]
    x, y = x - radius * np.cos(angle), y - radius * np.sin(angle)
    for j in range(1, quarters * per_quarter + 1):
        now = angle + sign * j / per_quarter * np.pi / 2
        points.append((x + radius * np.cos(now), y + radius * np.sin(now)))


@ft.lru_cache
def track_columns(name: str = "simple") -> np.ndarray:
    """Center line, inner (left) and outer (right) border: 100 points, 6 columns."""
    points = [(0.0, 0.0)]
    if name == "simple":
        _straight(points, 1, 0, 100)
        _arc(points, -np.pi / 2, 1, 1)
        _straight(points, 0, 1, 100)
        _arc(points, 0, 1, 1)
        _straight(points, -1, 0, 50)
        _arc(points, np.pi / 2, 1, 1)
        _arc(points, 0, -1, 1)
        _straight(points, -1, 0, 100)
        _arc(points, np.pi / 2, 1, 2)
        _straight(points, 1, 0, 150)
    elif name == "circle":
        _arc(points, -np.pi / 2, 1, 4)
    elif name == "bend":
        _straight(points, 1, 0, 50)
        _arc(points, -np.pi / 2, 1, 1)
        _straight(points, 0, 1, 50)
    else:
        points = [(20.0 * i, 0.0) for i in range(7)]
    raw = np.array(points) / 172
    knots = chord_lengths(raw)
    ts = np.linspace(0, knots[-1], 100)
    i = np.clip(np.searchsorted(knots, ts) - 1, 0, len(knots) - 2)
    tau = (ts - knots[i])[:, None]
    a, b, c, d = np.moveaxis(natural_spline(knots, raw)[i], 1, 0)
    center = a + tau * (b + tau * (c + tau * d))
    slope = b + tau * (2 * c + tau * 3 * d)
    right = np.stack([slope[:, 1], -slope[:, 0]], 1)
    right = 0.185 * right / np.linalg.norm(right, axis=1)[:, None]
    return np.concatenate([center, center - right, center + right], axis=1)


def track(name: str = "simple") -> Spline:
    """Columns: center, inner and outer border, over the length of the center line."""
    columns = track_columns(name)
    columns = columns - np.tile(columns[0, :2], 3)
    knots = chord_lengths(columns[:, :2])
    coefficients = natural_spline(knots, columns)
    closed = name in ("simple", "circle")
    return Spline(jnp.asarray(knots), jnp.asarray(coefficients), closed)


def start_on_track(size: int) -> np.ndarray:
    """On the simple track along its center; car and reference at speed 1."""
    columns = track_columns()
    knots = chord_lengths(columns[:, :2])
    dx, dy = natural_spline(knots, columns)[0, 1, :2]
    x0 = np.zeros(size)
    x0[[2, 3, -1]] = np.arctan2(dy, dx), 1.0, 1.0
    return x0


def _steering(u):
    return jnp.arctan(u) * 2 / 3  # inside -pi/3 ... pi/3


class SimpleCar(eqx.Module):
    """Kinematic car that follows a point of the center line moving at a given speed.

    x = (position, heading, speed, place and speed of the reference), u = (acceleration,
    steering before squashing, acceleration of the reference).
    """

    track: Spline
    dt: Any
    end: Any  # duration of the horizon
    speed: float = 3.0
    control_weight: float = 1e-6
    length: float = 0.09

    def dynamics(self, x, u, t):
        _, _, angle, v, _, rate = x
        turn = v * jnp.tan(_steering(u[1])) / self.length
        forward = (v * jnp.cos(angle), v * jnp.sin(angle))
        return x + self.dt * jnp.stack([*forward, turn, u[0], rate, u[2]])

    def _state_cost(self, x, time):
        return jnp.sum((x[:2] - self.track(self.speed * time)[0][:2]) ** 2)

    def cost(self, x, u, t):
        state = self._state_cost(x, t.astype(x.dtype) * self.dt)
        return jnp.where(t >= 1, state, 0) + self.control_weight * jnp.sum(u**2)

    def terminal_cost(self, x):
        return self._state_cost(x, self.end)


def simple_car(T: int = 50, dt: float | None = None):
    dt = 2 / T if dt is None else dt
    return _problem(SimpleCar(track(), dt, T * dt), start_on_track(6), T, 3)


class BicycleCar(eqx.Module):
    """Car with tire forces that races along a track between its borders.

    x = (position, heading, velocity in the car's frame, yaw rate, place and speed of
    the reference), u = (throttle and steering before squashing, acceleration of the
    reference).
    """

    track: Spline
    dt: Any
    exponent: int = eqx.field(static=True, default=3)
    euler: bool = eqx.field(static=True, default=False)
    speed: float = 3.0
    contouring: float = 0.1
    lag: float = 10.0
    progress: float = 0.1
    border: float = 100.0
    control_weight: float = 1e-6
    width: float = 0.045
    cm1: float = 0.287
    cm2: float = 0.0545
    cr0: float = 0.0518
    cr2: float = 0.00035
    rear: tuple[float, float, float] = (3.3852, 1.2691, 0.1737)  # B, C, D
    front: tuple[float, float, float] = (2.579, 1.2, 0.192)
    mass: float = 0.041
    inertia: float = 27.8e-6
    lf: float = 0.029
    lr: float = 0.033

    def field(self, x, u):
        _, _, angle, vx, vy, yaw, _, rate = x
        steering, throttle = _steering(u[1]), 1.1 * jax.nn.sigmoid(4 * u[0] / 1.1) - 0.1
        tire = lambda b, c, d, slip: d * jnp.sin(c * jnp.arctan(b * slip))
        slip_front = steering - jnp.arctan2(yaw * self.lf + vy, vx)
        slip_rear = jnp.arctan2(yaw * self.lr - vy, vx)
        front, rear = tire(*self.front, slip_front), tire(*self.rear, slip_rear)
        engine = (self.cm1 - self.cm2 * vx) * throttle - self.cr0 - self.cr2 * vx**2
        sin, cos = jnp.sin(steering), jnp.cos(steering)
        return jnp.stack([
            vx * jnp.cos(angle) - vy * jnp.sin(angle),
            vx * jnp.sin(angle) + vy * jnp.cos(angle),
            yaw,
            (engine - front * sin) / self.mass + vy * yaw,
            (rear + front * cos) / self.mass - vx * yaw,
            (front * self.lf * cos - rear * self.lr) / self.inertia,
            rate,
            u[2],
        ])  # fmt: skip

    def dynamics(self, x, u, t):
        dt = self.dt
        k1 = self.field(x, u)
        if self.euler:
            return x + dt * k1
        k2 = self.field(x + dt * k1 / 2, u)
        k3 = self.field(x + dt * k2 / 2, u)
        k4 = self.field(x + dt * k3, u)
        return x + dt * (k1 + 2 * k2 + 2 * k3 + k4) / 6

    def barrier(self, x):
        """The penalty beyond the borders and for a reference that moves backward."""
        return self._barrier(self._errors(x)[1], x[7])

    def _barrier(self, across, rate):
        over = jnp.maximum(self.width / 2 + jnp.stack([-across[1], across[2]]), 0)
        return self.border * jnp.sum(over**self.exponent) - 1e-6 * jnp.log(rate)

    def _errors(self, x):
        """The position along and to the right of the center, inner and outer line."""
        points, slopes = self.track(x[6])
        errors, slopes = x[None, :2] - points.reshape(3, 2), slopes.reshape(3, 2)
        lengths = jnp.sqrt(jnp.sum(slopes**2, axis=1))
        along = jnp.sum(errors * slopes, axis=1) / lengths
        across = errors[:, 0] * slopes[:, 1] - errors[:, 1] * slopes[:, 0]
        return along, across / lengths

    def terminal_cost(self, x):
        along, across = self._errors(x)
        return (
            self.contouring * across[0] ** 2
            + self.lag * along[0] ** 2
            + self.progress * ((x[7] - self.speed) * self.dt) ** 2
            + self._barrier(across, x[7])
        )

    def control_cost(self, u):
        return self.control_weight * jnp.sum(u**2)

    def cost(self, x, u, t):
        return jnp.where(t >= 1, self.terminal_cost(x), 0) + self.control_cost(u)


def bicycle_car(T: int = 25, exponent: int = 3, euler: bool = False):
    system = BicycleCar(track(), 1 / T, exponent, euler)
    return _problem(system, start_on_track(8), T, 3)


class Quadrotor(eqx.Module):
    """Flight to a point; x = (position, roll, pitch, yaw, velocity, body rates).

    The controls are the forces of the four rotors, as offsets from hovering.
    """

    dt: float = 0.03
    mass: float = 0.5
    gravity: float = 9.81
    inertia: tuple[float, float, float] = (0.0023, 0.0023, 0.004)
    arm: float = 0.175
    drag: float = 0.0168

    def dynamics(self, x, u, t):
        roll, pitch, yaw = x[3:6]
        wx, wy, wz = x[9:]
        f1, f2, f3, f4 = u + self.mass * self.gravity / 4
        thrust = (f1 + f2 + f3 + f4) / self.mass
        sr, cr, sp, cp = jnp.sin(roll), jnp.cos(roll), jnp.sin(pitch), jnp.cos(pitch)
        sy, cy = jnp.sin(yaw), jnp.cos(yaw)
        turn = sr * wy + cr * wz
        ix, iy, iz = self.inertia
        field = jnp.stack([
            *x[6:9],
            wx + turn * sp / cp,
            cr * wy - sr * wz,
            turn / cp,
            thrust * (cy * sp * cr + sy * sr),
            thrust * (sy * sp * cr - cy * sr),
            thrust * cp * cr - self.gravity,
            (self.arm * (f2 - f4) - (iz - iy) * wy * wz) / ix,
            (self.arm * (f3 - f1) - (ix - iz) * wz * wx) / iy,
            (self.drag * (f1 - f2 + f3 - f4) - (iy - ix) * wx * wy) / iz,
        ])  # fmt: skip
        return x + self.dt * field

    def _weighted(self, x, *weights: float):
        parts = (x[:3] - 1, x[3:6], x[6:9], x[9:])
        return sum(0.5 * w * jnp.sum(e**2) for w, e in zip(weights, parts, strict=True))

    def cost(self, x, u, t):
        return self._weighted(x, 0.1, 0.1, 0.01, 0.01) + 0.05 * jnp.sum(u**2)

    def terminal_cost(self, x):
        return self._weighted(x, 100.0, 100.0, 10.0, 10.0)


def quadrotor(T: int = 100):
    return _problem(Quadrotor(), [0, 0, 0, 0.6, -0.4, 0.5] + [0] * 6, T, 4)


class LinearQuadratic(eqx.Module):
    """A `dp.LQR` as a problem of general functions."""

    lqr: dp.LQR

    def dynamics(self, x, u, t):
        return self.lqr.A[t] @ x + self.lqr.B[t] @ u + self.lqr.c[t]

    def cost(self, x, u, t):
        lqr = self.lqr
        square = x @ lqr.Q[t] @ x / 2 + u @ lqr.R[t] @ u / 2 + x @ lqr.M[t] @ u
        return square + lqr.q[t] @ x + lqr.r[t] @ u

    def terminal_cost(self, x):
        return x @ self.lqr.Q_final @ x / 2 + self.lqr.q_final @ x


def tiny_lqr():
    """A scalar-input problem of two stages with every term; returns `(lqr, x0)`.

    Source: test of "primal_dual_ilqr", arXiv 2403.00748.
    """
    t = np.arange(2.0)[:, None, None]
    lqr = dp.LQR(
        A=6 * t + np.array([[0.0, 1.0], [2.0, 3.0]]),
        B=6 * t + np.array([[4.0], [5.0]]),
        c=6 * t[:, 0] + np.array([6.0, 7.0]),
        Q=(t + 1) * np.diag([1.0, 2.0]),
        R=3 * (t + 1),
        M=(t + 1) / 100 * np.array([[55.0], [56.0]]),
        q=-(t[:, 0] + 1) * np.array([91.0, 92.0]),
        r=-99 * (t[:, 0] + 1),
        Q_final=3 * np.diag([1.0, 2.0]),
        q_final=-3 * np.array([91.0, 92.0]),
    )
    return lqr, jnp.array([-11.0, -22.0])


def golden_lqr(rho: float):
    """A time-varying problem, T=32, n=3, m=2, whose control weights scale with `rho`.

    Returns `(lqr, x0)`.
    """
    T, n, m = 32, 3, 2
    t, root = np.arange(T)[:, None, None], np.sqrt(rho)
    i, j, k = np.arange(n)[:, None], np.arange(n), np.arange(m)
    Q = (1 + np.cos(np.arange(T + 1)) / 2)[:, None, None] * np.eye(n)
    q = np.cos(0.7 * np.arange(T + 1)[:, None] + np.arange(n))
    lqr = dp.LQR(
        A=0.8 * np.eye(n) + 0.3 * np.sin(1 + i + 2 * j + 0.5 * t),
        B=np.cos(2 + i - 3 * k + 0.3 * t),
        c=0.1 * np.sin(t[:, 0] + np.arange(n)),
        Q=Q[:-1],
        R=rho * (1 + np.sin(t) / 2) * np.eye(m),
        M=0.1 * root * np.sin(i + k + t),
        q=q[:-1],
        r=root * np.sin(0.9 * t[:, 0] - k),
        Q_final=Q[-1],
        q_final=q[-1],
    )
    return lqr, jnp.array([1.0, 2.0, 3.0])


class PublishedDirectional(dp.AbstractSearch):
    """One direction, with the least damping of 0, 1e-6, 1e-5, ... that is feasible.

    Its step sizes are 1, 0.9, 0.81, ... until J(trial) - J < s slope / 2. Nothing is
    remembered from one iteration to the next.
    """

    monotone: ClassVar[bool] = True
    exhausted: ClassVar[dp.RESULTS] = dp.RESULTS.no_descent
    no_minimum: ClassVar[dp.RESULTS] = dp.RESULTS.damping_limit

    def init(self, dtype):
        zero = jnp.zeros((), dtype)
        return dp.SearchState(zero + 1, zero, zero, jnp.zeros((), jnp.int32))

    def begin(self, state, cost_gradient):
        return self.init(state.stepsize.dtype)

    def step(self, state, trial):
        s = state.stepsize
        accept = trial.trial_cost - trial.cost < s * trial.slope / 2
        shorter = jnp.where(accept, s, 0.9 * s)
        state = dp.SearchState(shorter, state.damping, state.scale, state.trials + 1)
        return state, dp.Verdict(accept, jnp.zeros_like(accept), shorter < 1e-12)

    def reject(self, state):
        damping = jnp.maximum(10 * state.damping, 1e-6)
        fail = damping > 1e6
        state = dp.SearchState(state.stepsize, damping, state.scale, state.trials)
        return state, dp.Verdict(jnp.zeros_like(fail), ~fail, fail)


class PublishedGradient(dp.AbstractSearch):
    """Step sizes g = 1 / damping of gradient descent: 8 times the last one, halved.

    Accepts when J(trial) - J < -g |grad J|^2 / 2; the first "last one" is 1.
    """

    monotone: ClassVar[bool] = True
    exhausted: ClassVar[dp.RESULTS] = dp.RESULTS.no_descent
    no_minimum: ClassVar[dp.RESULTS] = dp.RESULTS.damping_limit

    def init(self, dtype):
        one = jnp.ones((), dtype)
        return dp.SearchState(one, one, one, jnp.zeros((), jnp.int32))

    def begin(self, state, cost_gradient):
        none = jnp.zeros_like(state.trials)
        return dp.SearchState(state.stepsize, state.damping / 8, state.scale, none)

    def step(self, state, trial):
        accept = trial.trial_cost - trial.cost < trial.slope / 2
        damping = jnp.where(accept, state.damping, 2 * state.damping)
        state = dp.SearchState(state.stepsize, damping, state.scale, state.trials + 1)
        fail = ~accept & (damping > 1e32)
        return state, dp.Verdict(accept, ~accept & ~fail, fail)

    def reject(self, state):
        fail = jnp.isfinite(state.damping)
        return state, dp.Verdict(~fail, ~fail, fail)


class Either(dp.AbstractSearch):
    """One of two searches, chosen by a number: both share a compilation."""

    first: dp.AbstractSearch
    second: dp.AbstractSearch
    choose_first: Any

    monotone: ClassVar[bool] = True
    exhausted: ClassVar[dp.RESULTS] = dp.RESULTS.no_descent
    no_minimum: ClassVar[dp.RESULTS] = dp.RESULTS.damping_limit

    def _choose(self, method: str, *args):
        outcomes = (getattr(search, method)(*args) for search in self.pair)
        return jax.tree.map(ft.partial(jnp.where, self.choose_first), *outcomes)

    @property
    def pair(self):
        return self.first, self.second

    def init(self, dtype):
        return self._choose("init", dtype)

    def begin(self, state, cost_gradient):
        return self._choose("begin", state, cost_gradient)

    def step(self, state, trial):
        return self._choose("step", state, trial)

    def reject(self, state):
        return self._choose("reject", state)
