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


# a x b = C b, where C is the sum of a_i times the i-th of these matrices: one product
# is compiled much sooner than a matrix put together from entries.
_CROSS = np.cross(np.eye(3)[:, None], np.eye(3)).transpose(0, 2, 1)
_CROSSES = np.zeros((2, 3, 2, 3, 2, 3))
_CROSSES[0, :, 0, :, 0] = _CROSSES[0, :, 1, :, 1] = _CROSSES[1, :, 1, :, 0] = _CROSS
_FORCES = np.zeros((2, 3, 2, 3, 2, 3))
_FORCES[0, :, 0, :, 0] = _FORCES[1, :, 0, :, 1] = _FORCES[1, :, 1, :, 0] = _CROSS


def _contract(vectors: Array, tensor: np.ndarray) -> Array:
    like = jnp.asarray(tensor, vectors.dtype)
    return jnp.tensordot(vectors, like, 1, precision="highest")


def _skew(vectors: Array) -> Array:
    """The matrices that multiply by a cross product, shape `(..., 3, 3)`."""
    return _contract(vectors, _CROSS)


def _join(a: Array, b: Array, c: Array, d: Array) -> Array:
    """[[a, b], [c, d]] of matrices of 3 x 3."""
    rows = jnp.concatenate([a, b], -1), jnp.concatenate([c, d], -1)
    return jnp.concatenate(rows, -2)


def _crosses(motions: Array) -> Array:
    """The matrices that say how a motion changes which moves along with another.

    Minus their transposes say it of forces.
    """
    return _contract(motions, _CROSSES.reshape(6, 6, 6))


def _crosses_of(forces: Array) -> Array:
    """Of a motion: minus how these forces change that move along with it."""
    return _contract(forces, _FORCES.reshape(6, 6, 6))


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
    w, v = moved[:, :3], moved[:, 3:]
    turned, slid = jnp.cross(w, motions[:, :3]), jnp.cross(v, motions[:, :3])
    slid += jnp.cross(w, motions[:, 3:])
    return outs, (dR, dposition, jnp.concatenate([turned, slid], -1))


class _Bodies(NamedTuple):
    """Every joint, as a motion at the rate 1, and the inertia of its own link."""

    motions: Float[Array, "n 6"]
    inertias: Float[Array, "n 6 6"]


def _bodies(links: Links, q: Array) -> _Bodies:
    R, positions, motions = _places(links, q)
    centers = _skew(positions + _apply(R, links.centers))
    masses = links.masses[:, None, None]
    first = masses * centers
    about = _matmul(_matmul(R, links.inertias), R.mT) - _matmul(first, centers)
    mass = masses * jnp.eye(3, dtype=q.dtype)[None]
    return _Bodies(motions, _join(about, first, -first, mass))


class _Flow(NamedTuple):
    """Of every link: motion, its rate, momentum, and the force on it and all after."""

    v: Float[Array, "n 6"]
    a: Float[Array, "n 6"]
    momentum: Float[Array, "n 6"]
    force: Float[Array, "n 6"]
    turns: Float[Array, "n 6"]  # how joints move along with what is before them


def _flow(links: Links, bodies: _Bodies, qd: Array, qdd: Array) -> _Flow:
    """Recursive Newton-Euler equations."""
    rates, motions = qd[:, None], bodies.motions
    v = _outward(rates * motions)
    crosses = _crosses(v)
    turns = _apply(crosses, motions)
    # Links at rest push as if they were lifted against gravity.
    lift = jnp.concatenate([jnp.zeros_like(links.gravity), -links.gravity])
    a = _outward(qdd[:, None] * motions + rates * turns) + lift[None]
    momentum = _apply(bodies.inertias, v)
    force = _apply(bodies.inertias, a) - _apply(crosses.mT, momentum)
    return _Flow(v, a, momentum, _inward(force), turns)


def _pushes(links: Links, bodies: _Bodies, qd: Array, flow: _Flow) -> Array:
    return jnp.sum(bodies.motions * flow.force, -1) + links.damping * qd


def torques(links: Links, q: Array, qd: Array, qdd: Array) -> Array:
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
    links: Links, bodies: _Bodies, qd: Array, qdd: Array
) -> tuple[Array, Array, Array]:
    """Derivatives of the torques by q, by qd and by qdd, as matrices.

    An entry is a product of two joints with what the later one of them carries.
    Source: S. Singh, R. P. Russell and P. M. Wensing, "Efficient Analytical Derivatives
    of Rigid-Body Dynamics using Spatial Vector Algebra", 2022.
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
def accelerations(links: Links, q: Array, qd: Array, u: Array) -> Array:
    return _driven(links, _bodies(links, q), q, qd, u)


@jax.custom_jvp
def _driven(links: Links, bodies: _Bodies, q: Array, qd: Array, u: Array) -> Array:
    """The accelerations of bodies at q, with derivatives along q and not the bodies."""
    bias = _pushes(links, bodies, qd, _flow(links, bodies, qd, jnp.zeros_like(qd)))
    return _solve_positive(_mass_matrix(bodies), u - bias)


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
    return qdd, _solve_positive(mass, change)


@ft.partial(accelerations.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, q, *rest = primals
    return _moved(links, _bodies(links, q), (q, *rest), tangents)


@ft.partial(_driven.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    links, bodies, *at = primals
    dlinks, _, *rest = tangents
    return _moved(links, bodies, tuple(at), (dlinks, *rest))
