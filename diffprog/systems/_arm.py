from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._rigid_bodies import accelerations, Goal, Links, miss, pose, torques
from ._system import AbstractSystem, Scalar


def _rows(*rows: Any) -> Any:
    return eqx.field(converter=jnp.asarray, default_factory=lambda: jnp.array(rows))


class Arm(AbstractSystem):
    r"""An arm of revolute joints that brings its hand to a pose, and stops there.

    $$M(q) \ddot q + C(q, \dot q) + G(q) + \mu \dot q = u$$

    The frames of all links are parallel to that of the world where all angles are 0;
    link i is carried by joint i. State: angles q [rad], then rates [rad/s], shape
    `(2 n,)` for n joints; control: torques of the joints [N m], shape `(n,)`. The
    default is an arm of seven joints, about 20 kg, with a reach of 1 m.
    Costs: half of the weighted squares of the position error of the hand, of the
    entries of its rotation minus those of the target's, of the rates and of the
    torques.

    O(n^2) operations for the torques, O(n^3) for the accelerations. Derivatives of the
    accelerations are those of the torques, as matrices in closed form, times the
    inverse of the mass matrix. A mass matrix that is singular, as of a link without
    mass, gives infinite accelerations.

    Source: R. Featherstone, "Rigid Body Dynamics Algorithms", 2008, chapters 5 and 6;
    the numbers are our own.
    """

    axes: Float[Array, "n 3"] = _rows(
        *3 * [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0)], (0.0, 0.0, 1.0)
    )
    offsets: Float[Array, "n 3"] = _rows(
        (0.0, 0.0, 0.1), *5 * [(0.0, 0.0, 0.2)], (0.0, 0.0, 0.1)
    )
    masses: Float[Array, " n"] = _rows(5.0, 4.0, 4.0, 3.0, 2.0, 1.5, 0.5)
    centers: Float[Array, "n 3"] = _rows(
        (0.0, 0.0, 0.1),
        *2 * [(0.0, 0.02, 0.1), (0.0, -0.02, 0.1)],
        (0.0, 0.0, 0.05),
        (0.0, 0.0, 0.05),
    )
    inertias: Float[Array, "n 3 3"] = _rows(
        *(
            ((i, 0.0, 0.0), (0.0, i, 0.0), (0.0, 0.0, 0.01))
            for i in (0.05, 0.04, 0.04, 0.03, 0.02, 0.02, 0.01)
        )
    )
    damping: Float[Array, " n"] = _rows(*7 * [0.1])
    gravity: Float[Array, " 3"] = _rows(0.0, 0.0, -9.81)
    hand: Float[Array, " 3"] = _rows(0.0, 0.0, 0.1)
    position: Float[Array, " 3"] = _rows(0.5, 0.3, 0.4)
    rotation: Float[Array, "3 3"] = _rows(
        (-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)
    )
    weights: tuple[Scalar, Scalar, Scalar, Scalar] = (1.0, 0.1, 0.1, 1e-3)
    terminal_weights: tuple[Scalar, Scalar, Scalar] = (1000.0, 100.0, 10.0)
    dt: Scalar = 0.02
    method: Any = eqx.field(static=True, default="euler")

    @property
    def x0(self) -> Float[Array, " states"]:
        """Bent, at rest; of another number of joints: all angles 0."""
        n = len(self.masses)
        bent = [0.0, 0.5, 0.0, 1.2, 0.0, 0.8, 0.0] if n == 7 else n * [0.0]
        return jnp.array(bent + n * [0.0])

    def vector_field(self, x, u, t):
        q, qd = x.reshape(2, -1)
        return jnp.concatenate([qd, accelerations(self._links(x), q, qd, u)])

    def torques(
        self, x: Float[Array, " states"], accelerations: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        """The torques [N m] under which the joints accelerate so [rad/s^2].

        Those of zero hold the arm at rest, where x is at rest.
        """
        q, qd = x.reshape(2, -1)
        return torques(self._links(x), q, qd, accelerations)

    def pose(
        self, x: Float[Array, " states"]
    ) -> tuple[Float[Array, " 3"], Float[Array, "3 3"]]:
        """Position of the hand [m] and its rotation, in the world frame."""
        rotation, position, _ = pose(self._links(x), x[: len(self.masses)])
        hand = jnp.asarray(self.hand, x.dtype)
        hand = jnp.matmul(rotation, hand, precision="highest")
        return position + hand, rotation

    def cost(self, x, u, t):
        return self._half_squares(self.weights, x, u)

    def terminal_cost(self, x):
        return self._half_squares(self.terminal_weights, x)

    def _half_squares(self, weights, x, *controls):
        q, qd = x.reshape(2, -1)
        cast = lambda a: jnp.asarray(a, x.dtype)
        first = jnp.stack([cast(w) for w in weights[:2]])
        goal = Goal(cast(self.hand), cast(self.position), cast(self.rotation), first)
        squares = [jnp.sum(e**2) for e in (qd, *controls)]
        rest = sum(w * e for w, e in zip(weights[2:], squares, strict=True)) / 2
        return miss(self._links(x), goal, q) + rest

    def _links(self, x: Array) -> Links:
        fields = (getattr(self, name) for name in Links._fields)
        return Links(*(jnp.asarray(field, x.dtype) for field in fields))


Arm.__init__.__doc__ = """**Arguments:**

- `axes`: axis of each joint where all angles are 0, of length 1.
- `offsets`: from the joint before, or the origin, to each joint where all angles are 0
    [m].
- `masses`: mass of each link [kg].
- `centers`: from each joint to the center of mass of its link [m].
- `inertias`: moments of inertia of each link about its center of mass [kg m^2].
- `damping`: viscous friction mu of each joint [N m s].
- `gravity`: acceleration of gravity [m/s^2].
- `hand`: from the last joint to the hand [m].
- `position`: that the hand is to reach [m].
- `rotation`: that the hand is to reach.
- `weights`: of position error, rotation error, rates and torques at each stage.
- `terminal_weights`: of position error, rotation error and rates at the end.
- `dt`: duration of a stage [s].
- `method`: how a stage is integrated, see [`diffprog.discretize`][].
"""
