import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
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


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


# The cross product a x b = C b, and C = sum of a_i times the i-th of these matrices;
# so XLA compiles one product of a, and no matrix that is put together from entries.
_CROSS = np.cross(np.eye(3)[:, None], np.eye(3)).transpose(0, 2, 1)
_CROSSES = np.zeros((2, 3, 2, 3, 2, 3))
_CROSSES[0, :, 0, :, 0] = _CROSSES[0, :, 1, :, 1] = _CROSSES[1, :, 1, :, 0] = _CROSS
_FORCES = np.zeros((2, 3, 2, 3, 2, 3))
_FORCES[0, :, 0, :, 0] = _FORCES[1, :, 0, :, 1] = _FORCES[1, :, 1, :, 0] = _CROSS


def _skew(vectors: Array) -> Array:
    """The matrices that multiply by a cross product, shape `(..., 3, 3)`."""
    return jnp.tensordot(vectors, jnp.asarray(_CROSS, vectors.dtype), 1, precision="highest")


# A motion (w, v) turns at the rate w, and what is at the origin of the world frame
# moves at v; a force is a torque about the origin, and a force. An inertia is a matrix
# of 6 x 6 that makes momentum of a motion.


def _join(a: Array, b: Array, c: Array, d: Array) -> Array:
    """[[a, b], [c, d]] of matrices of 3 x 3."""
    rows = jnp.concatenate([a, b], -1), jnp.concatenate([c, d], -1)
    return jnp.concatenate(rows, -2)


def _crosses(motions: Array) -> Array:
    """The matrices that say how a motion changes which moves along with another.

    Minus their transposes say it of forces.
    """
    tensor = jnp.asarray(_CROSSES.reshape(6, 6, 6), motions.dtype)
    return jnp.tensordot(motions, tensor, 1, precision="highest")


def _crosses_of(forces: Array) -> Array:
    """Of a motion: minus how these forces change that move along with it."""
    tensor = jnp.asarray(_FORCES.reshape(6, 6, 6), forces.dtype)
    return jnp.tensordot(forces, tensor, 1, precision="highest")


def _apply(matrices: Array, vectors: Array) -> Array:
    return jnp.sum(matrices * vectors[..., None, :], -1)


def _outward(rows: Array) -> Array:
    """Sums over a joint and those before it."""
    return _matmul(jnp.tri(len(rows), dtype=rows.dtype), rows)


def _inward(rows: Array) -> Array:
    """Sums over a joint and those after it."""
    n = len(rows)
    sums = _matmul(jnp.tri(n, dtype=rows.dtype).T, rows.reshape(n, -1))
    return sums.reshape(rows.shape)


def _turn(axis: Array, q: Array) -> Array:
    """Rotation by q about the axis, by the formula of Rodrigues."""
    K, eye = _skew(axis), jnp.eye(3, dtype=q.dtype)
    square = axis[:, None] * axis - jnp.sum(axis**2) * eye
    return eye + jnp.sin(q) * K + (1 - jnp.cos(q)) * square


def _places(links: _Links, q: Array) -> tuple[Array, Array, Array]:
    """Rotation of every link, position of its joint, motion at the rate 1."""

    def outward(before, row):
        R, position = before
        axis, offset, angle = row
        position = position + _matmul(R, offset)
        R = _matmul(R, _turn(axis, angle))
        w = _matmul(R, axis)
        motion = jnp.concatenate([w, jnp.cross(position, w)])
        return (R, position), (R, position, motion)

    origin = jnp.eye(3, dtype=q.dtype), jnp.zeros(3, q.dtype)
    return jax.lax.scan(outward, origin, (links.axes, links.offsets, q))[1]


def _hand(links: _Links, q: Array) -> tuple[Array, Array, Array]:
    """Rotation of the last link, position of its joint, motions of all."""
    rotations, positions, motions = _places(links, q)
    return rotations[-1], positions[-1], motions


def _is_fixed(tangents: _Links) -> bool:
    return all(isinstance(t, SymbolicZero) for t in tangents)


def _dense(primals: Any, tangents: Any) -> Any:
    zero = lambda a, t: jnp.zeros_like(a) if isinstance(t, SymbolicZero) else t
    return jax.tree.map(zero, primals, tangents)


_pose = jax.custom_jvp(_hand)


@ft.partial(_pose.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    """What comes after a joint moves along with it."""
    links, q = primals
    if not _is_fixed(tangents[0]):
        return jax.jvp(_hand, primals, _dense(primals, tangents))
    R, position, motions = outs = _pose(links, q)
    moved = _outward(_dense(q, tangents[1])[:, None] * motions)
    w, v = moved[-1, :3], moved[-1, 3:]
    dR, dposition = jnp.cross(w, R, axisb=0, axisc=0), jnp.cross(w, position) + v
    w, v = moved[:, :3], moved[:, 3:]
    turned, slid = jnp.cross(w, motions[:, :3]), jnp.cross(v, motions[:, :3])
    slid += jnp.cross(w, motions[:, 3:])
    return outs, (dR, dposition, jnp.concatenate([turned, slid], -1))


class _Bodies(NamedTuple):
    """Every joint, as a motion at the rate 1, and the inertia of its own link."""

    motions: Float[Array, "n 6"]
    inertias: Float[Array, "n 6 6"]


def _bodies(links: _Links, q: Array) -> _Bodies:
    R, positions, motions = _places(links, q)
    centers = _skew(positions + _apply(R, links.centers))
    masses = links.masses[:, None, None]
    first = masses * centers
    about = _matmul(_matmul(R, links.inertias), R.mT) - _matmul(first, centers)
    mass = masses * jnp.eye(3, dtype=q.dtype)
    return _Bodies(motions, _join(about, first, -first, mass))


class _Flow(NamedTuple):
    """Of every link: motion, its rate, momentum, and the force on it and all after."""

    v: Float[Array, "n 6"]
    a: Float[Array, "n 6"]
    momentum: Float[Array, "n 6"]
    force: Float[Array, "n 6"]
    turns: Float[Array, "n 6"]  # how joints move along with what is before them


def _flow(links: _Links, bodies: _Bodies, qd: Array, qdd: Array) -> _Flow:
    """Recursive Newton-Euler equations."""
    rates, motions = qd[:, None], bodies.motions
    v = _outward(rates * motions)
    crosses = _crosses(v)
    turns = _apply(crosses, motions)
    # Links at rest push as if they were lifted against gravity.
    lift = jnp.concatenate([jnp.zeros_like(links.gravity), -links.gravity])
    a = _outward(qdd[:, None] * motions + rates * turns) + lift
    momentum = _apply(bodies.inertias, v)
    force = _apply(bodies.inertias, a) - _apply(crosses.mT, momentum)
    return _Flow(v, a, momentum, _inward(force), turns)


def _pushes(links: _Links, bodies: _Bodies, qd: Array, flow: _Flow) -> Array:
    return jnp.sum(bodies.motions * flow.force, -1) + links.damping * qd


def _torques(links: _Links, q: Array, qd: Array, qdd: Array) -> Array:
    """The torques of an acceleration qdd."""
    bodies = _bodies(links, q)
    return _pushes(links, bodies, qd, _flow(links, bodies, qd, qdd))


def _mass_matrix(bodies: _Bodies) -> Array:
    """A joint moves all that it carries as one body."""
    motions, inertias = bodies
    mass = _matmul(_apply(_inward(inertias), motions), motions.T)
    return _halves(mass, mass.T)


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


def _slopes(
    links: _Links, bodies: _Bodies, qd: Array, qdd: Array
) -> tuple[Array, Array, Array]:
    """Derivatives of the torques by q, by qd and by qdd, as matrices.

    An entry is a product of two joints with what the later one of them carries.
    """
    motions, inertias = bodies
    v, a, momentum, force, turns = _flow(links, bodies, qd, qdd)
    # Twice what a velocity adds to the force on a link that moves already.
    crosses = _crosses(v)
    drags = _matmul(inertias, crosses)
    drags = -drags - drags.mT - _crosses_of(momentum)
    inertias, drags = _inward(inertias), _inward(drags)
    # What a joint moves along with: the link before.
    rates = qd[:, None]
    pull = a - qdd[:, None] * motions - rates * turns
    bends = _apply(_crosses(pull), motions)
    bends += _apply(_crosses(v - rates * motions), turns)
    carried = _apply(inertias, motions)
    turned = _apply(inertias, turns)
    after = _apply(drags, turns) + _apply(inertias, bends)
    after -= _apply(_crosses(motions).mT, force)
    dragged = _apply(drags.mT, motions)
    by_q = _matmul(dragged, turns.T) + _matmul(carried, bends.T)
    by_q = _halves(by_q, _matmul(motions, after.T))
    by_qd = _matmul(dragged, motions.T) + 2 * _matmul(carried, turns.T)
    after = _apply(drags, motions) + 2 * turned
    by_qd = _halves(by_qd, _matmul(motions, after.T)) + jnp.diag(links.damping)
    mass = _matmul(carried, motions.T)
    return by_q, by_qd, _halves(mass, mass.T)


def _halves(lower: Array, upper: Array) -> Array:
    """One matrix up to the diagonal, the other above it."""
    return jnp.tril(lower) + jnp.triu(upper, 1)


@jax.custom_jvp
def _accelerations(links: _Links, q: Array, qd: Array, u: Array) -> Array:
    return _driven(links, _bodies(links, q), q, qd, u)


@jax.custom_jvp
def _driven(links: _Links, bodies: _Bodies, q: Array, qd: Array, u: Array) -> Array:
    """The accelerations of bodies at q, with derivatives along q and not the bodies."""
    bias = _pushes(links, bodies, qd, _flow(links, bodies, qd, jnp.zeros_like(qd)))
    return _solve_positive(_mass_matrix(bodies), u - bias)


def _moved(links: _Links, bodies: _Bodies, at: tuple, tangents: tuple):
    """That of torques(q, qd, qdd) = u, whose derivative by qdd is the mass matrix."""
    q, qd, _ = at
    qdd = _driven(links, bodies, *at)
    dlinks, *rest = tangents
    dq, dqd, du = _dense(at, tuple(rest))
    by_q, by_qd, mass = _slopes(links, bodies, qd, qdd)
    change = du - _matmul(by_q, dq) - _matmul(by_qd, dqd)
    if not _is_fixed(dlinks):
        torques = lambda links: _torques(links, q, qd, qdd)
        change -= jax.jvp(torques, (links,), (_dense(links, dlinks),))[1]
    return qdd, _solve_positive(mass, change)


@ft.partial(_accelerations.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, q, *rest = primals
    return _moved(links, _bodies(links, q), (q, *rest), tangents)


@ft.partial(_driven.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, bodies, *at = primals
    dlinks, _, *rest = tangents
    return _moved(links, bodies, tuple(at), (dlinks, *rest))


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
        rotation, position, _ = _pose(self._links(x), x[: len(self.masses)])
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
