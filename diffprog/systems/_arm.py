from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._system import AbstractSystem, Scalar


class _Links(NamedTuple):
    """The numbers of the dynamics, one row for each joint and the link it carries."""

    axes: Float[Array, "n 3"]
    offsets: Float[Array, "n 3"]
    masses: Float[Array, " n"]
    centers: Float[Array, "n 3"]
    inertias: Float[Array, "n 3 3"]
    damping: Float[Array, " n"]
    gravity: Float[Array, " 3"]


class _Body(NamedTuple):
    """A joint and a body that it carries, about the origin of the world frame.

    A body that moves as (w, v) turns at the rate w, and what is at the origin moves
    at v; `axis` and `moment` are w and v of a joint that turns at the rate 1.
    """

    axis: Float[Array, " 3"]
    moment: Float[Array, " 3"]
    mass: Float[Array, ""]
    first: Float[Array, " 3"]  # mass times center of mass
    inertia: Float[Array, "3 3"]

    def momentum(self, w: Array, v: Array) -> tuple[Array, Array]:
        """Angular about the origin, and linear; or torque and force."""
        angular = _matmul(self.inertia, w) + jnp.cross(self.first, v)
        return angular, self.mass * v - jnp.cross(self.first, w)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _square(a: Array) -> Array:
    """The matrix of a x (a x .)."""
    return a[:, None] * a[None] - jnp.sum(a**2) * jnp.eye(3, dtype=a.dtype)


def _turn(axis: Array, q: Array) -> Array:
    """Rotation by q about the axis, by the formula of Rodrigues."""
    x, y, z = axis
    zero = jnp.zeros_like(x)
    K = jnp.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3)
    eye = jnp.eye(3, dtype=q.dtype)
    return eye + jnp.sin(q) * K + (1 - jnp.cos(q)) * _square(axis)


def _pose(links: _Links, q: Array) -> tuple[Array, Array]:
    """The rotation of the last link and the position of its joint."""

    def outward(before, row):
        (R, position), (axis, offset, angle) = before, row
        return (_matmul(R, _turn(axis, angle)), position + _matmul(R, offset)), None

    origin = jnp.eye(3, dtype=q.dtype), jnp.zeros(3, q.dtype)
    return jax.lax.scan(outward, origin, (links.axes, links.offsets, q))[0]


def _bodies(links: _Links, q: Array) -> _Body:
    """Every joint with its own link."""

    def outward(before, row):
        R, position = before
        axis, offset, mass, center, inertia, angle = row
        position = position + _matmul(R, offset)
        R = _matmul(R, _turn(axis, angle))
        axis, center = _matmul(R, axis), position + _matmul(R, center)
        inertia = _matmul(_matmul(R, inertia), R.T) - mass * _square(center)
        moment = jnp.cross(position, axis)
        return (R, position), _Body(axis, moment, mass, mass * center, inertia)

    origin = jnp.eye(3, dtype=q.dtype), jnp.zeros(3, q.dtype)
    return jax.lax.scan(outward, origin, (*links[:5], q))[1]


def _torques(links: _Links, q: Array, qd: Array, qdd: Array) -> Array:
    """Recursive Newton-Euler equations: the torques of an acceleration qdd."""

    def outward(before, row):
        w, v, dw, dv = before
        body, rate, acceleration = row
        turn, slide = rate * body.axis, rate * body.moment
        w, v = w + turn, v + slide
        # Axes move with their links.
        dw += acceleration * body.axis + jnp.cross(w, turn)
        dv += acceleration * body.moment + jnp.cross(w, slide) + jnp.cross(v, turn)
        angular, linear = body.momentum(w, v)
        torque, force = body.momentum(dw, dv)
        torque += jnp.cross(w, angular) + jnp.cross(v, linear)
        return (w, v, dw, dv), (torque, force + jnp.cross(w, linear))

    def inward(after, row):
        body, *own = row
        torque, force = (a + b for a, b in zip(after, own, strict=True))
        push = jnp.sum(body.axis * torque) + jnp.sum(body.moment * force)
        return (torque, force), push

    bodies, zero = _bodies(links, q), jnp.zeros(3, q.dtype)
    # Links at rest push as if they were lifted against gravity.
    start = zero, zero, zero, -links.gravity
    _, pushes = jax.lax.scan(outward, start, (bodies, qd, qdd))
    rows = bodies, *pushes
    _, push = jax.lax.scan(inward, (zero, zero), rows, reverse=True)
    return push + links.damping * qd


def _mass_matrix(links: _Links, q: Array) -> Array:
    """A joint moves all that it carries as one body."""
    bodies = _bodies(links, q)

    def inward(after, body):
        mass, first, inertia = (a + b for a, b in zip(after, body[2:], strict=True))
        carried = _Body(body.axis, body.moment, mass, first, inertia)
        angular, linear = carried.momentum(body.axis, body.moment)
        column = _matmul(bodies.axis, angular) + _matmul(bodies.moment, linear)
        return (mass, first, inertia), column

    nothing = jax.tree.map(lambda rows: jnp.zeros_like(rows[0]), tuple(bodies[2:]))
    # What is below the diagonal is of joints that are carried themselves.
    upper = jnp.triu(jax.lax.scan(inward, nothing, bodies, reverse=True)[1].T)
    return upper + jnp.triu(upper, 1).T


def _solve_positive(matrix: Array, rhs: Array) -> Array:
    """Gauss-Jordan elimination, which needs no pivots here."""

    def eliminate(rows, unit):
        matrix, rhs = rows
        column, row = _matmul(matrix, unit), _matmul(unit, matrix)
        factor = (column - unit) / jnp.sum(column * unit)
        rhs = rhs - factor * jnp.sum(rhs * unit)
        return (matrix - factor[:, None] * row[None], rhs), None

    units = jnp.eye(len(rhs), dtype=rhs.dtype)
    return jax.lax.scan(eliminate, (matrix, rhs), units)[0][1]


@jax.custom_jvp
def _accelerations(links: _Links, q: Array, qd: Array, u: Array) -> Array:
    bias = _torques(links, q, qd, jnp.zeros_like(q))
    return _solve_positive(_mass_matrix(links, q), u - bias)


@_accelerations.defjvp
def _(primals, tangents):
    """That of torques(q, qd, qdd) = u, whose derivative by qdd is the mass matrix."""
    links, q, qd, u = primals
    *moved, du = tangents
    qdd = _accelerations(*primals)
    torques = lambda links, q, qd: _torques(links, q, qd, qdd)
    dtorques = jax.jvp(torques, (links, q, qd), tuple(moved))[1]
    return qdd, _solve_positive(_mass_matrix(links, q), du - dtorques)


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

    O(n) operations for the torques, O(n^3) for the accelerations. Derivatives of the
    accelerations are those of the torques, times the inverse of the mass matrix. A mass
    matrix that is singular, as of a link without mass, gives infinite accelerations.

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
        return jnp.concatenate([qd, _accelerations(self._links(x), q, qd, u)])

    def torques(
        self, x: Float[Array, " states"], accelerations: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        """The torques [N m] under which the joints accelerate so [rad/s^2].

        Those of zero hold the arm at rest, where x is at rest.
        """
        q, qd = x.reshape(2, -1)
        return _torques(self._links(x), q, qd, accelerations)

    def pose(
        self, x: Float[Array, " states"]
    ) -> tuple[Float[Array, " 3"], Float[Array, "3 3"]]:
        """Position of the hand [m] and its rotation, in the world frame."""
        rotation, position = _pose(self._links(x), x[: len(self.masses)])
        hand = _matmul(rotation, jnp.asarray(self.hand, x.dtype))
        return position + hand, rotation

    def cost(self, x, u, t):
        return self._half_squares(self.weights, x, u)

    def terminal_cost(self, x):
        return self._half_squares(self.terminal_weights, x)

    def _half_squares(self, weights, x, *controls):
        position, rotation = self.pose(x)
        goals = (jnp.asarray(a, x.dtype) for a in (self.position, self.rotation))
        rates = x[len(self.masses) :]
        errors = [
            *(a - b for a, b in zip((position, rotation), goals, strict=True)),
            rates,
        ]
        squares = [jnp.sum(e**2) for e in (*errors, *controls)]
        parts = [w * e for w, e in zip(weights, squares, strict=True)]
        return jnp.sum(jnp.stack(parts)) / 2

    def _links(self, x: Array) -> _Links:
        fields = (getattr(self, name) for name in _Links._fields)
        return _Links(*(jnp.asarray(field, x.dtype) for field in fields))


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
