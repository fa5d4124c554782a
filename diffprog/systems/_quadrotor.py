from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import diffprog as dp

from ._system import AbstractSystem, check_step, Scalar, Stage, Time


def _accelerations(system: Any, up: Array, rates: Array, u: Array) -> tuple:
    """v' and w', where `up` is the vertical axis of the body in the world frame."""
    f1, f2, f3, f4 = u + system.mass * system.gravity / 4
    lift = (f1 + f2 + f3 + f4) / system.mass
    acceleration = jnp.stack(
        [lift * up[0], lift * up[1], lift * up[2] - system.gravity]
    )
    torque_x = system.arm * (f2 - f4)
    torque_y = system.arm * (f3 - f1)
    torque_z = system.drag_ratio * (f1 - f2 + f3 - f4)
    # w' = I^-1 (torque - w x I w) for a diagonal I.
    (ix, iy, iz), (wx, wy, wz) = system.inertia, rates
    spin = jnp.stack(
        [
            (torque_x - (iz - iy) * wy * wz) / ix,
            (torque_y - (ix - iz) * wz * wx) / iy,
            (torque_z - (iy - ix) * wx * wy) / iz,
        ]
    )
    return acceleration, spin


def _half_squares(weights: Any, errors: list) -> Array:
    squares = [w * jnp.sum(e**2) for w, e in zip(weights, errors, strict=True)]
    return jnp.sum(jnp.stack(squares)) / 2


class Quadrotor(AbstractSystem):
    r"""A quadrotor that flies from a tilted start to `target` and hovers there.

    $$m \dot v = R(\text{angles}) \, (0, 0, F) - (0, 0, m g), \qquad
    I \dot\omega = \tau - \omega \times I \omega$$

    State: position [m], roll, pitch and yaw [rad], velocity in the world frame [m/s],
    rotation rates in the body frame [rad/s], shape `(12,)`; control: the force of each
    rotor above its share m g / 4 of the weight [N], shape `(4,)`. Roll, pitch and yaw
    are singular at a pitch of pi/2: there the rates are infinite.
    Costs: half of the weighted squares of the position error, the angles, the velocity,
    the rates and the control.

    Source: T. Luukkonen, "Modelling and control of quadcopter", Aalto University, 2011,
    for the equations; the numbers are those of a light research quadrotor.
    """

    mass: Scalar = 0.5
    gravity: Scalar = 9.81
    inertia: tuple[Scalar, Scalar, Scalar] = (0.0023, 0.0023, 0.004)
    arm: Scalar = 0.175
    drag_ratio: Scalar = 0.0168
    target: tuple[Scalar, Scalar, Scalar] = (1.0, 1.0, 1.0)
    weights: tuple[Scalar, Scalar, Scalar, Scalar, Scalar] = (0.1, 0.1, 0.01, 0.01, 0.1)
    terminal_weights: tuple[Scalar, Scalar, Scalar, Scalar] = (100.0, 100.0, 10.0, 10.0)
    dt: Scalar = 0.03
    method: Any = eqx.field(static=True, default="euler")

    @property
    def x0(self) -> Float[Array, " 12"]:
        """At the origin, tilted and turned, at rest."""
        return jnp.array([0.0, 0.0, 0.0, 0.6, -0.4, 0.5] + 6 * [0.0])

    def vector_field(self, x, u, t):
        _, (roll, pitch, yaw), velocity, rates = x.reshape(4, 3)
        wx, wy, wz = rates
        sr, cr = jnp.sin(roll), jnp.cos(roll)
        sp, cp = jnp.sin(pitch), jnp.cos(pitch)
        sy, cy = jnp.sin(yaw), jnp.cos(yaw)
        turn = sr * wy + cr * wz
        angle_rates = jnp.stack([wx + turn * sp / cp, cr * wy - sr * wz, turn / cp])
        # The vertical axis of the body, in the world frame.
        up = (cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr)
        accelerations = _accelerations(self, jnp.stack(up), rates, u)
        return jnp.concatenate([velocity, angle_rates, *accelerations])

    def cost(self, x, u, t):
        return _half_squares(self.weights, [*self._errors(x), u])

    def terminal_cost(self, x):
        return _half_squares(self.terminal_weights, self._errors(x))

    def _errors(self, x):
        position, *rest = x.reshape(4, 3)
        return [position - jnp.asarray(self.target, x.dtype), *rest]


Quadrotor.__init__.__doc__ = """**Arguments:**

- `mass`: mass m [kg].
- `gravity`: acceleration g of gravity [m/s^2].
- `inertia`: moments of inertia about the axes of the body [kg m^2].
- `arm`: distance from the center to a rotor [m].
- `drag_ratio`: torque about the vertical axis per force of a rotor [m].
- `target`: position to reach [m].
- `weights`: of position error, angles, velocity, rates and control at each stage.
- `terminal_weights`: of position error, angles, velocity and rates at the end.
- `dt`: duration of a stage [s].
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""


def _moved(x: Array, z: Array) -> Array:
    """The state at z, which has 2 tan(angle / 2) axis in the place of a turn."""
    q, g = x[3:7], z[3:6] / 2
    real, imaginary = q[:1], q[1:]
    new = real - jnp.sum(imaginary * g, keepdims=True)
    turned = [new, imaginary + real * g + jnp.cross(imaginary, g)]
    q = jnp.concatenate(turned) / jnp.sqrt(1 + jnp.sum(g**2))
    return jnp.concatenate([x[:3] + z[:3], q, x[7:] + z[6:]])


class QuaternionQuadrotor(eqx.Module):
    r"""A [`diffprog.systems.Quadrotor`][] at any attitude, by a unit quaternion.

    $$m \dot v = R(q) \, (0, 0, F) - (0, 0, m g), \qquad
    \dot q = \tfrac{1}{2} q \, (0, \omega), \qquad
    I \dot\omega = \tau - \omega \times I \omega$$

    State: position [m], attitude as a unit quaternion with its real part first,
    velocity in the world frame [m/s], rotation rates in the body frame [rad/s], shape
    `(13,)`; control as there, `(4,)`. Its `manifold` has 12 local coordinates, with a
    rotation vector in the place of roll, pitch and yaw.
    Costs: half of the weighted squares of the position error, the rotation vector from
    the attitude to reach, the velocity, the rates and the control.

    A step of `method` is one of coordinates around the attitude that it begins at, 2
    tan(angle / 2) times the axis, so that q keeps its norm.

    Source: that of `Quadrotor`; H. Munthe-Kaas, "Runge-Kutta methods on Lie groups",
    1998, for the steps.
    """

    mass: Scalar = 0.5
    gravity: Scalar = 9.81
    inertia: tuple[Scalar, Scalar, Scalar] = (0.0023, 0.0023, 0.004)
    arm: Scalar = 0.175
    drag_ratio: Scalar = 0.0168
    target: tuple[Scalar, Scalar, Scalar] = (1.0, 1.0, 1.0)
    attitude: tuple[Scalar, Scalar, Scalar, Scalar] = (1.0, 0.0, 0.0, 0.0)
    weights: tuple[Scalar, Scalar, Scalar, Scalar, Scalar] = (0.1, 0.1, 0.01, 0.01, 0.1)
    terminal_weights: tuple[Scalar, Scalar, Scalar, Scalar] = (100.0, 100.0, 10.0, 10.0)
    dt: Scalar = 0.03
    method: Any = eqx.field(static=True, default="euler")

    __check_init__ = check_step

    @property
    def manifold(self) -> Any:
        """Vectors, but for the attitude: [`diffprog.manifolds.Blocks`][]."""
        of = dp.manifolds
        return of.Blocks(
            (3, of.Euclidean()), (4, of.UnitQuaternion()), (6, of.Euclidean())
        )

    @property
    def x0(self) -> Float[Array, " 13"]:
        """That of `Quadrotor`: at the origin, tilted and turned, at rest."""
        half = jnp.array([0.6, -0.4, 0.5]) / 2
        (sr, sp, sy), (cr, cp, cy) = jnp.sin(half), jnp.cos(half)
        q = [
            cr * cp * cy + sr * sp * sy,
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
        ]
        return jnp.concatenate([jnp.zeros(3), jnp.stack(q), jnp.zeros(6)])

    def vector_field(
        self, x: Float[Array, " 13"], u: Float[Array, " 4"], t: Time
    ) -> Float[Array, " 13"]:
        """The time derivative of the state."""
        zero = jnp.zeros(12, x.dtype)
        move = self._local_field(x)(zero, u, t)
        return jax.jvp(lambda z: _moved(x, z), (zero,), (move,))[1]

    def dynamics(
        self, x: Float[Array, " 13"], u: Float[Array, " 4"], t: Stage
    ) -> Float[Array, " 13"]:
        """The state `dt` later."""
        step = dp.discretize(self._local_field(x), self.dt, self.method)
        return _moved(x, step(jnp.zeros(12, x.dtype), u, t))

    def _local_field(self, start: Array) -> Callable:
        """The time derivative of what `_moved` takes."""

        def field(z, u, t):
            x, turn = _moved(start, z), z[3:6]
            (w, i, j, k), velocity, rates = x[3:7], x[7:10], x[10:]
            up = [2 * (i * k + w * j), 2 * (j * k - w * i), 1 - 2 * (i**2 + j**2)]
            acceleration, spin = _accelerations(self, jnp.stack(up), rates, u)
            turning = rates + jnp.cross(turn, rates) / 2
            turning += jnp.sum(turn * rates) * turn / 4
            return jnp.concatenate([velocity, turning, acceleration, spin])

        return field

    def cost(
        self, x: Float[Array, " 13"], u: Float[Array, " 4"], t: Stage
    ) -> Float[Array, ""]:
        """The cost of a stage."""
        return _half_squares(self.weights, [*self._errors(x), u])

    def terminal_cost(self, x: Float[Array, " 13"]) -> Float[Array, ""]:
        """The cost of the last state."""
        return _half_squares(self.terminal_weights, self._errors(x))

    def _errors(self, x):
        position, attitude = (
            jnp.asarray(goal, x.dtype) for goal in (self.target, self.attitude)
        )
        origin = jnp.concatenate([position, attitude, jnp.zeros(6, x.dtype)])
        return list(self.manifold.difference(x, origin).reshape(4, 3))


QuaternionQuadrotor.__init__.__doc__ = """**Arguments:**

- `mass`: mass m [kg].
- `gravity`: acceleration g of gravity [m/s^2].
- `inertia`: moments of inertia about the axes of the body [kg m^2].
- `arm`: distance from the center to a rotor [m].
- `drag_ratio`: torque about the vertical axis per force of a rotor [m].
- `target`: position to reach [m].
- `attitude`: quaternion of the attitude to reach, of any length but 0.
- `weights`: of position error, rotation vector, velocity, rates and control at each
    stage.
- `terminal_weights`: of position error, rotation vector, velocity and rates at the end.
- `dt`: duration of a stage [s].
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""
