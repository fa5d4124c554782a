import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._system import AbstractSystem, Scalar


class CartPole(AbstractSystem):
    r"""A pole hinged to a cart, to be swung up by pushing the cart.

    $$(M + m)\ddot x + m l \cos\theta \, \ddot\theta
    = m l \dot\theta^2 \sin\theta - b \dot x + u$$
    $$m l \cos\theta \, \ddot x + (I + m l^2)\ddot\theta = -m g l \sin\theta$$

    The angle is 0 hanging and `target` (-pi) upright. State: position [m], angle [rad],
    velocity [m/s], angular velocity [rad/s], shape `(4,)`; control: force on the cart
    [N], shape `(1,)`.
    Costs: `control_weight` u^2; (angle - target)^2 + `velocity_weight` (angular
    velocity)^2 at the end and at the stages from `settle_start` on; and the cube of the
    distance by which the position leaves `limits`, at all stages.

    Source: V. Roulet, S. Srinivasa, M. Fazel, Z. Harchaoui, "Iterative Linear
    Quadratic Optimization for Nonlinear Control: Differentiable Programming
    Algorithmic Templates", 2022, arXiv:2207.06362; the defaults are its swing-up in
    50 stages of 0.05 s, with a control weight of 1e-2 instead of 1e-6.
    """

    gravity: Scalar = 10.0
    cart_mass: Scalar = 0.5
    pole_mass: Scalar = 0.2
    inertia: Scalar = 0.006
    length: Scalar = 0.3
    friction: Scalar = 0.1
    target: Scalar = -math.pi
    limits: tuple[Scalar, Scalar] = (-2.0, 2.0)
    limit_weight: Scalar = 1.0
    control_weight: Scalar = 1e-2
    velocity_weight: Scalar = 0.1
    settle_start: int = 39
    dt: Scalar = 0.05
    method: Any = eqx.field(static=True, default="euler")

    @property
    def x0(self) -> Float[Array, " 4"]:
        """In the middle, hanging at rest."""
        return jnp.zeros(4)

    def vector_field(self, x, u, t):
        _, angle, velocity, rate = x
        moment = self.pole_mass * self.length
        inertia = self.inertia + moment * self.length
        # The two equations above, [[M + m, a12], [a12, I + m l^2]] (x'', angle'') = b.
        a12 = moment * jnp.cos(angle)
        b1 = moment * rate**2 * jnp.sin(angle) - self.friction * velocity + u[0]
        b2 = -moment * self.gravity * jnp.sin(angle)
        mass = self.cart_mass + self.pole_mass
        det = mass * inertia - a12**2
        acceleration = (inertia * b1 - a12 * b2) / det
        angular_acceleration = (mass * b2 - a12 * b1) / det
        return jnp.stack([velocity, rate, acceleration, angular_acceleration])

    def cost(self, x, u, t):
        swing = jnp.where(t >= self.settle_start, self._upright(x), 0.0)
        return self.control_weight * jnp.sum(u**2) + swing + self._limit(x)

    def terminal_cost(self, x):
        return self._upright(x) + self._limit(x)

    def _upright(self, x):
        return (x[1] - self.target) ** 2 + self.velocity_weight * x[3] ** 2

    def _limit(self, x):
        low, high = self.limits
        below, above = jnp.maximum(low - x[0], 0.0), jnp.maximum(x[0] - high, 0.0)
        return self.limit_weight * (below**3 + above**3)


CartPole.__init__.__doc__ = """**Arguments:**

- `gravity`: acceleration g of gravity [m/s^2].
- `cart_mass`, `pole_mass`: masses M and m [kg].
- `inertia`: moment of inertia I of the pole about its center of mass [kg m^2].
- `length`: distance l from the hinge to the center of mass of the pole [m].
- `friction`: viscous friction b of the cart [N s/m].
- `target`: angle to reach [rad]; 0 hangs.
- `limits`: lowest and highest position [m]; infinities switch the penalty off.
- `limit_weight`: weight of the cubed distance outside the limits.
- `control_weight`: weight of the squared force.
- `velocity_weight`: weight of the squared angular velocity.
- `settle_start`: index of the first stage at which the pole is penalized for not being
    upright; the horizon (or more) penalizes the last state only.
- `dt`: duration of a stage [s].
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""
