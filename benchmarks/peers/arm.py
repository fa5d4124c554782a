"""`dp.systems.Arm` as symbols of CasADi: the same equations, link by link."""

import casadi
import numpy

from diffprog.systems import Arm


SX = casadi.SX


def known(values) -> SX:
    """Numbers whose zeros cost nothing."""
    return SX(casadi.sparsify(casadi.DM(numpy.asarray(values, float))))


def links(arm: Arm, q):
    """Axes (6), matrices of inertia (6, 6) about the origin, and the hand's pose."""
    R, p, axes, inertias = SX.eye(3), SX.zeros(3), [], []
    fields = arm.axes, arm.offsets, arm.masses, arm.centers, arm.inertias
    for i, (axis, offset, mass, center, inertia) in enumerate(zip(*fields)):
        K, m = casadi.sparsify(casadi.skew(known(axis))), float(mass)
        p = p + R @ known(offset)
        turn = SX.eye(3) + casadi.sin(q[i]) * K + (1 - casadi.cos(q[i])) * (K @ K)
        R = R @ turn
        z, C = R @ known(axis), casadi.skew(p + R @ known(center))
        about = R @ known(inertia) @ R.T + m * (C @ C.T)
        rows = [
            casadi.horzcat(about, m * C),
            casadi.horzcat(m * C.T, m * SX.eye(3)),
        ]
        axes.append(casadi.vertcat(z, casadi.cross(p, z)))
        inertias.append(casadi.vertcat(*rows))
    return axes, inertias, (p + R @ known(arm.hand), R)


def crossed(a, b):
    """What moves with a, for axes."""
    first = casadi.cross(a[:3], b[:3])
    return casadi.vertcat(
        first, casadi.cross(a[:3], b[3:]) + casadi.cross(a[3:], b[:3])
    )


def crossed_force(a, b):
    last = casadi.cross(a[:3], b[3:])
    return casadi.vertcat(casadi.cross(a[:3], b[:3]) + casadi.cross(a[3:], b[3:]), last)


def accelerations(arm: Arm, q, qd, u):
    axes, inertias, _ = links(arm, q)
    n, v, a = len(axes), SX.zeros(6), casadi.vertcat(SX.zeros(3), -known(arm.gravity))
    forces = []
    for i in range(n):
        turn = axes[i] * qd[i]
        v = v + turn
        a = a + crossed(v, turn)
        forces.append(inertias[i] @ a + crossed_force(v, inertias[i] @ v))
    M, bias = SX.zeros(n, n), SX.zeros(n)
    force, carried = SX.zeros(6), SX.zeros(6, 6)
    for i in reversed(range(n)):
        force, carried = force + forces[i], carried + inertias[i]
        bias[i] = casadi.dot(axes[i], force) + float(arm.damping[i]) * qd[i]
        momentum = carried @ axes[i]
        for j in range(i + 1):
            M[i, j] = M[j, i] = casadi.dot(axes[j], momentum)
    return solve_positive(M, u - bias)


def solve_positive(M, rhs):
    """Cholesky factorization without square roots, written out."""
    n = rhs.numel()
    L, D, y = SX.eye(n), [], []
    for i in range(n):
        for j in range(i):
            terms = sum(L[i, k] * L[j, k] * D[k] for k in range(j))
            L[i, j] = (M[i, j] - terms) / D[j]
        D.append(M[i, i] - sum(L[i, k] ** 2 * D[k] for k in range(i)))
        y.append(rhs[i] - sum(L[i, k] * y[k] for k in range(i)))
    x = [None] * n
    for i in reversed(range(n)):
        x[i] = y[i] / D[i] - sum(L[k, i] * x[k] for k in range(i + 1, n))
    return casadi.vertcat(*x)


def dynamics(arm: Arm, x, u):
    n = len(arm.masses)
    return x + arm.dt * casadi.vertcat(x[n:], accelerations(arm, x[:n], x[n:], u))


def cost(arm: Arm, weights, x, *controls):
    n = len(arm.masses)
    position, R = links(arm, x[:n])[2]
    errors = position - known(arm.position), R - known(arm.rotation), x[n:], *controls
    return sum(w * casadi.sumsqr(e) for w, e in zip(weights, errors)) / 2
