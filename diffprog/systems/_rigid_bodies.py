"""Chains of rigid bodies on revolute joints: torques, accelerations, derivatives.

A motion (w, v) turns at the rate w, and what is at the origin of the world frame moves
at v; a force is a torque about the origin, and a force. An inertia is a matrix of 6 x 6
that makes momentum of a motion.
"""

import functools as ft
from collections.abc import Iterable
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


def _is_fixed(tangents: Iterable) -> bool:
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


class Goal(NamedTuple):
    """Where the hand is to be, and what it costs not to be there."""

    hand: Float[Array, " 3"]  # from the last joint
    position: Float[Array, " 3"]
    rotation: Float[Array, "3 3"]
    weights: Float[Array, " 2"]  # of both errors


def _miss(links: Links, goal: Goal, q: Array) -> Array:
    R, position, _ = _hand(links, q)
    errors = position + _matmul(R, goal.hand) - goal.position, R - goal.rotation
    return jnp.sum(goal.weights * jnp.stack([jnp.sum(e**2) for e in errors])) / 2


miss = jax.custom_jvp(_miss)
miss.__doc__ = "Half the weighted squares of the errors of the hand."


@ft.partial(miss.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    if not _is_fixed((*tangents[0], *tangents[1])):
        return jax.jvp(_miss, primals, _dense(primals, tangents))
    return _miss(*primals), jnp.sum(_pull(*primals) * tangents[2])


class _Lever(NamedTuple):
    """How joints move the hand, and what pulls at it."""

    w: Float[Array, "n 3"]
    v: Float[Array, "n 3"]  # of the hand
    force: Float[Array, " 3"]
    torque: Float[Array, " 3"]
    R: Float[Array, "3 3"]

    def pull(self) -> Array:
        return _matmul(self.v, self.force) + _matmul(self.w, self.torque)


def _lever(links: Links, goal: Goal, q: Array) -> _Lever:
    R, position, motions = _hand(links, q)
    hand = position + _matmul(R, goal.hand)
    w, v = _parts(motions)
    v = v + jnp.cross(w, hand[None])
    force = goal.weights[0] * (hand - goal.position)
    torque = goal.weights[1] * jnp.sum(jnp.cross(goal.rotation.T, R.T), 0)
    return _Lever(w, v, force, torque, R)


def _pulled(links: Links, goal: Goal, q: Array) -> Array:
    return _lever(links, goal, q).pull()


_pull = jax.custom_jvp(_pulled)  # the gradient of `miss`


@ft.partial(_pull.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    """By two joints: the later one moves along with the earlier."""
    links, goal, _ = primals
    if not _is_fixed((*tangents[0], *tangents[1])):
        return jax.jvp(_pulled, primals, _dense(primals, tangents))
    w, v, force, torque, R = lever = _lever(*primals)
    overlap = goal.weights[1] * _matmul(R, goal.rotation.T)
    turned = jnp.trace(overlap) * w - _matmul(w, overlap.T)
    turned += jnp.cross(torque[None], w)
    moved = goal.weights[0] * v + jnp.cross(force[None], w)
    upper = _matmul(moved, v.T) + _matmul(turned, w.T)
    hessian = _halves(upper.T, upper)
    return lever.pull(), _matmul(hessian, tangents[2])


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


def _inverse(matrix: Array) -> Array:
    """That of a positive matrix, grown by a row and a column at a time."""
    found = 1 / matrix[:1, :1]
    for j in range(1, len(matrix)):
        along = _matmul(found, matrix[:j, j : j + 1])
        left = matrix[j : j + 1, j : j + 1] - _matmul(matrix[j : j + 1, :j], along)
        side = -along / left
        found = jnp.block([[found - side * along.T, side], [side.T, 1 / left]])
    return found


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
) -> tuple[Array, Array]:
    """Derivatives of the torques by q and by qd, as matrices.

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
    return by_q, by_qd


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
    return _matmul(_inverse(_mass_matrix(bodies)), u - bias)


def _moved(links: Links, bodies: _Bodies, at: tuple, tangents: tuple):
    """That of torques(q, qd, qdd) = u, whose derivative by qdd is the mass matrix."""
    q, qd, _ = at
    qdd = _driven(links, bodies, *at)
    dlinks, *rest = tangents
    dq, dqd, du = _dense(at, tuple(rest))
    by_q, by_qd = _slopes(links, bodies, qd, qdd)
    change = du - _matmul(by_q, dq) - _matmul(by_qd, dqd)
    if not _is_fixed(dlinks):
        of_links = lambda links: torques(links, q, qd, qdd)
        change -= jax.jvp(of_links, (links,), (_dense(links, dlinks),))[1]
    return qdd, _matmul(_inverse(_mass_matrix(bodies)), change)


@ft.partial(accelerations.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, q, qd, u = primals
    return _moved(links, _bodies(links, q, qd), (q, qd, u), tangents)


@ft.partial(_driven.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, bodies, *at = primals
    dlinks, _, *rest = tangents
    return _moved(links, bodies, tuple(at), (dlinks, *rest))
