import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._system import AbstractSystem, Scalar


class Pendulum(AbstractSystem):
    r"""A pendulum with a torque at its pivot, to be swung up and stopped upright.

    $$m l^2 \ddot\theta = -m l g \sin\theta - \mu \dot\theta + u$$

    The angle is 0 hanging and `target` (pi) upright. State: angle [rad] and angular
    velocity [rad/s], shape `(2,)`; control: torque [N m], shape `(1,)`.
    Costs: `control_weight` u^2 at each stage, and at the end
    (target - angle)^2 + `velocity_weight` velocity^2 (no factor 1/2).

    Source: V. Roulet, S. Srinivasa, M. Fazel, Z. Harchaoui, "Iterative Linear
    Quadratic Optimization for Nonlinear Control: Differentiable Programming
    Algorithmic Templates", 2022, arXiv:2207.06362; the defaults are its swing-up in
    50 stages of 0.04 s.
    """

    gravity: Scalar = 10.0
    mass: Scalar = 1.0
    length: Scalar = 1.0
    friction: Scalar = 0.01
    target: Scalar = math.pi
    control_weight: Scalar = 1e-6
    velocity_weight: Scalar = 0.1
    dt: Scalar = 0.04
    method: Any = eqx.field(static=True, default="euler")

    @property
    def x0(self) -> Float[Array, " 2"]:
        """Hanging at rest."""
        return jnp.zeros(2)

    def vector_field(self, x, u, t):
        angle, velocity = x
        inertia = self.mass * self.length**2
        torque = (
            -self.mass * self.length * self.gravity * jnp.sin(angle)
            - self.friction * velocity
            + u[0]
        )
        return jnp.stack([velocity, torque / inertia])

    def cost(self, x, u, t):
        return self.control_weight * jnp.sum(u**2)

    def terminal_cost(self, x):
        angle, velocity = x
        return (self.target - angle) ** 2 + self.velocity_weight * velocity**2


Pendulum.__init__.__doc__ = """**Arguments:**

- `gravity`: acceleration g of gravity [m/s^2].
- `mass`: mass m at the end of the rod [kg].
- `length`: length l of the rod [m].
- `friction`: viscous friction mu of the pivot [N m s].
- `target`: angle to reach [rad]; 0 hangs.
- `control_weight`: weight of the squared torque.
- `velocity_weight`: weight of the squared final velocity.
- `dt`: duration of a stage [s].
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""
