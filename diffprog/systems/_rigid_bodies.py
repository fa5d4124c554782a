"""Chains of rigid bodies on revolute joints: torques, accelerations, derivatives.

A motion (w, v) turns at the rate w, and what is at the origin of the world frame moves
at v; a force is a torque about the origin, and a force. An inertia is a matrix of 6 x 6
that makes momentum of a motion.
"""

import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


class Links(NamedTuple):
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


_EYE = np.eye(3)
_CROSS = np.cross(_EYE[:, None], _EYE).transpose(0, 2, 1)  # a x b = sum_i a_i C_i b


def _joined(w: Array, v: Array) -> Array:
    return jnp.concatenate([w, v], -1)


def _parts(rows: Array) -> tuple[Array, Array]:
    return rows[..., :3], rows[..., 3:]


def _crosses(vectors: Array, rows: Array) -> tuple[Array, Array]:
    """Products of vectors with both parts of rows."""
    both = jnp.cross(vectors[:, None], rows.reshape(-1, 2, 3))
    return both[:, 0], both[:, 1]


def _moves(motions: Array, rows: Array) -> Array:
    """How motions change other motions that move along with them."""
    w, v = _parts(motions)
    turned, slid = _crosses(w, rows)
    return _joined(turned, slid + jnp.cross(v, rows[:, :3]))


def _moves_forces(motions: Array, forces: Array) -> Array:
    """How motions change forces that move along with them."""
    w, v = _parts(motions)
    torque, force = _crosses(w, forces)
    return _joined(torque + jnp.cross(v, forces[:, 3:]), force)


def _apply(matrices: Array, vectors: Array) -> Array:
    return jnp.sum(matrices * vectors[..., None, :], -1)


def _outward(rows: Any, reverse: bool = False) -> Any:
    """Sums over a joint and those before it."""
    add = lambda total, row: 2 * (jax.tree.map(jnp.add, total, row),)
    start = jax.tree.map(lambda a: jnp.zeros_like(a[0]), rows)
    return jax.lax.scan(add, start, rows, reverse=reverse)[1]


def _inward(rows: Any) -> Any:
    """Sums over a joint and those after it."""
    return _outward(rows, reverse=True)


def _turn(axis: Array, q: Array) -> Array:
    """Rotation by q about the axis, by the formula of Rodrigues."""
    K = jnp.tensordot(axis, jnp.asarray(_CROSS, q.dtype), 1, precision="highest")
    eye = jnp.eye(3, dtype=q.dtype)
    square = axis[:, None] * axis[None] - jnp.sum(axis**2) * eye
    return eye + jnp.sin(q) * K + (1 - jnp.cos(q)) * square


def _places(links: Links, q: Array) -> tuple[Array, Array, Array]:
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


def _hand(links: Links, q: Array) -> tuple[Array, Array, Array]:
    """Rotation of the last link, position of its joint, motions of all."""
    rotations, positions, motions = _places(links, q)
    return rotations[-1], positions[-1], motions


def _is_fixed(tangents: Links) -> bool:
    return all(isinstance(t, SymbolicZero) for t in tangents)


def _dense(primals: Any, tangents: Any) -> Any:
    zero = lambda a, t: jnp.zeros_like(a) if isinstance(t, SymbolicZero) else t
    return jax.tree.map(zero, primals, tangents)


pose = jax.custom_jvp(_hand)


@ft.partial(pose.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    """What comes after a joint moves along with it."""
    links, q = primals
    if not _is_fixed(tangents[0]):
        return jax.jvp(_hand, primals, _dense(primals, tangents))
    R, position, motions = outs = pose(links, q)
    moved = _outward(_dense(q, tangents[1])[:, None] * motions)
    w, v = moved[-1, :3], moved[-1, 3:]
    dR, dposition = jnp.cross(w[None], R.T).T, jnp.cross(w, position) + v
    return outs, (dR, dposition, _moves(moved, motions))


class _Inertias(NamedTuple):
    """Of bodies, about the origin: they add up, and make momentum of a motion."""

    turning: Float[Array, "n 3 3"]
    first: Float[Array, "n 3"]  # mass times center
    mass: Float[Array, "n 1"]

    def times(self, motions: Array) -> Array:
        w, v = _parts(motions)
        turned, slid = _crosses(self.first, motions)
        return _joined(_apply(self.turning, w) + slid, self.mass * v - turned)


class _Bodies(NamedTuple):
    """What is known of every link before its acceleration."""

    motions: Float[Array, "n 6"]  # of its joint at the rate 1
    inertias: _Inertias
    carried: _Inertias  # of it and of all after it, as of one body
    v: Float[Array, "n 6"]
    turns: Float[Array, "n 6"]  # how joints move along with what is before them
    momentum: Float[Array, "n 6"]


def _around(vectors: Array, others: Array) -> Array:
    """The matrices (a' b) I - a b'."""
    eye = jnp.asarray(_EYE[None], vectors.dtype)
    inner = jnp.sum(vectors * others, -1)[:, None, None]
    return inner * eye - vectors[:, :, None] * others[:, None, :]


def _bodies(links: Links, q: Array, qd: Array) -> _Bodies:
    R, positions, motions = _places(links, q)
    centers, mass = positions + _apply(R, links.centers), links.masses[:, None]
    first = mass * centers
    turning = _matmul(_matmul(R, links.inertias), R.mT) + _around(first, centers)
    own = _Inertias(turning, first, mass)
    v = _outward(qd[:, None] * motions)
    return _Bodies(motions, own, _inward(own), v, _moves(v, motions), own.times(v))


def _flow(links: Links, bodies: _Bodies, qd: Array, qdd: Array) -> tuple[Array, Array]:
    """Accelerations of links, and forces on each and all after it: Newton-Euler."""
    # Links at rest push as if they were lifted against gravity.
    lift = jnp.concatenate([jnp.zeros_like(links.gravity), -links.gravity])
    gained = qdd[:, None] * bodies.motions + qd[:, None] * bodies.turns
    a = _outward(gained) + lift[None]
    force = bodies.inertias.times(a) + _moves_forces(bodies.v, bodies.momentum)
    return a, _inward(force)


def _pushes(links: Links, bodies: _Bodies, qd: Array, qdd: Array) -> Array:
    _, force = _flow(links, bodies, qd, qdd)
    return jnp.sum(bodies.motions * force, -1) + links.damping * qd


def torques(links: Links, q: Array, qd: Array, qdd: Array) -> Array:
    """The torques of an acceleration qdd."""
    return _pushes(links, _bodies(links, q, qd), qd, qdd)


def _mass_matrix(bodies: _Bodies) -> Array:
    mass = _matmul(bodies.carried.times(bodies.motions), bodies.motions.T)
    return _halves(mass, mass.T)


def _divide(rhs: Array, matrix: Array) -> Array:
    """Gauss-Jordan elimination, which needs no pivots for a positive matrix.

    Rows and columns go round: each in turn is the first.
    """

    def eliminate(rows, _):
        row = rows[0] / rows[0, 0]
        rows = jnp.concatenate([rows[1:] - rows[1:, :1] * row[None], row[None]])
        return jnp.roll(rows, -1, 1), None

    rows = jnp.concatenate([matrix, rhs], 1)
    return jax.lax.scan(eliminate, rows, length=len(matrix))[0][:, : rhs.shape[1]]


def _drags(bodies: _Bodies) -> tuple[Array, Array]:
    """Twice what a velocity adds to the force on links that move already.

    It is ((a, 0), (-2 C, 0)) of these a and c, where C b = c x b.
    """
    (w, v), (spin, momentum) = _parts(bodies.v), _parts(bodies.momentum)
    turning, first, _ = bodies.inertias
    twisted = jnp.cross(turning, w[:, None, :])
    outer = _around(first, v)
    K = jnp.tensordot(spin, jnp.asarray(_CROSS, v.dtype), 1, precision="highest")
    drags = outer + outer.mT - twisted - twisted.mT - K
    return _inward((drags, momentum))


def _slopes(
    links: Links, bodies: _Bodies, qd: Array, qdd: Array
) -> tuple[Array, Array, Array]:
    """Derivatives of the torques by q, by qd and by qdd, as matrices.

    An entry is a product of two joints with what the later one of them carries.
    Source: S. Singh, R. P. Russell and P. M. Wensing, "Efficient Analytical Derivatives
    of Rigid-Body Dynamics using Spatial Vector Algebra", 2022.
    """
    motions, _, inertias, v, turns, _ = bodies
    a, force = _flow(links, bodies, qd, qdd)
    drags, momentum = _drags(bodies)

    def dragging(rows):
        w = rows[:, :3]
        return _joined(_apply(drags, w), -2 * jnp.cross(momentum, w))

    # What a joint moves along with: the link before.
    rates = qd[:, None]
    pull = a - qdd[:, None] * motions - rates * turns
    bends = _moves(pull, motions) + _moves(v - rates * motions, turns)
    carried = inertias.times(motions)
    dragged = _apply(drags.mT, motions[:, :3])
    dragged += 2 * jnp.cross(momentum, motions[:, 3:])
    after = dragging(turns) + inertias.times(bends) + _moves_forces(motions, force)
    by_q = _matmul(dragged, turns[:, :3].T) + _matmul(carried, bends.T)
    by_q = _halves(by_q, _matmul(motions, after.T))
    by_qd = _matmul(dragged, motions[:, :3].T) + 2 * _matmul(carried, turns.T)
    after = dragging(motions) + 2 * inertias.times(turns)
    by_qd = _halves(by_qd, _matmul(motions, after.T)) + jnp.diag(links.damping)
    mass = _matmul(carried, motions.T)
    return by_q, by_qd, _halves(mass, mass.T)


def _halves(lower: Array, upper: Array) -> Array:
    """One matrix up to the diagonal, the other above it."""
    return jnp.tril(lower) + jnp.triu(upper, 1)


@jax.custom_jvp
def accelerations(links: Links, q: Array, qd: Array, u: Array) -> Array:
    return _driven(links, _bodies(links, q, qd), q, qd, u)


@jax.custom_jvp
def _driven(links: Links, bodies: _Bodies, q: Array, qd: Array, u: Array) -> Array:
    """The accelerations of bodies: with no derivatives along the bodies themselves."""
    bias = _pushes(links, bodies, qd, jnp.zeros_like(qd))
    return _divide((u - bias)[:, None], _mass_matrix(bodies))[:, 0]


def _moved(links: Links, bodies: _Bodies, at: tuple, tangents: tuple):
    """That of torques(q, qd, qdd) = u, whose derivative by qdd is the mass matrix."""
    q, qd, _ = at
    qdd = _driven(links, bodies, *at)
    dlinks, *rest = tangents
    dq, dqd, du = _dense(at, tuple(rest))
    by_q, by_qd, mass = _slopes(links, bodies, qd, qdd)
    change = du - _matmul(by_q, dq) - _matmul(by_qd, dqd)
    if not _is_fixed(dlinks):
        of_links = lambda links: torques(links, q, qd, qdd)
        change -= jax.jvp(of_links, (links,), (_dense(links, dlinks),))[1]
    # One elimination for all tangents.
    inverse = _divide(jnp.eye(len(q), dtype=q.dtype), mass)
    return qdd, _matmul(inverse, change)


@ft.partial(accelerations.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, q, qd, u = primals
    return _moved(links, _bodies(links, q, qd), (q, qd, u), tangents)


@ft.partial(_driven.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, bodies, *at = primals
    dlinks, _, *rest = tangents
    return _moved(links, bodies, tuple(at), (dlinks, *rest))
