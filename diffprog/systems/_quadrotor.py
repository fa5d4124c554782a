from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._system import AbstractSystem, Scalar


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
        _, (roll, pitch, yaw), velocity, (wx, wy, wz) = x.reshape(4, 3)
        f1, f2, f3, f4 = u + self.mass * self.gravity / 4
        sr, cr = jnp.sin(roll), jnp.cos(roll)
        sp, cp = jnp.sin(pitch), jnp.cos(pitch)
        sy, cy = jnp.sin(yaw), jnp.cos(yaw)
        turn = sr * wy + cr * wz
        angle_rates = jnp.stack([wx + turn * sp / cp, cr * wy - sr * wz, turn / cp])
        # The vertical axis of the body, in the world frame.
        up = (cy * sp * cr + sy * sr, sy * sp * cr - cy * sr, cp * cr)
        lift = (f1 + f2 + f3 + f4) / self.mass
        acceleration = jnp.stack(
            [lift * up[0], lift * up[1], lift * up[2] - self.gravity]
        )
        torque_x = self.arm * (f2 - f4)
        torque_y = self.arm * (f3 - f1)
        torque_z = self.drag_ratio * (f1 - f2 + f3 - f4)
        # w' = I^-1 (torque - w x I w) for a diagonal I.
        ix, iy, iz = self.inertia
        spin = jnp.stack(
            [
                (torque_x - (iz - iy) * wy * wz) / ix,
                (torque_y - (ix - iz) * wz * wx) / iy,
                (torque_z - (iy - ix) * wx * wy) / iz,
            ]
        )
        return jnp.concatenate([velocity, angle_rates, acceleration, spin])

    def cost(self, x, u, t):
        *state_weights, control_weight = self.weights
        return self._error(x, state_weights) + control_weight * jnp.sum(u**2) / 2

    def terminal_cost(self, x):
        return self._error(x, self.terminal_weights)

    def _error(self, x, weights):
        position, *rest = x.reshape(4, 3)
        errors = [position - jnp.asarray(self.target, x.dtype), *rest]
        squares = [w * jnp.sum(e**2) for w, e in zip(weights, errors, strict=True)]
        return jnp.sum(jnp.stack(squares)) / 2


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
