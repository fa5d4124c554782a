"""Prox-linear models solved in NumPy alone, with a certificate: what to compare with.

    P(d) = c sum_i l_i(z_i) + damping |d|^2 / 2,  z = f + J d.

A method of multipliers, whose problems have continuous gradients, each solved by
Newton's method with a search on the line. Any alpha in the domain of the conjugates
bounds the least P from below, by

    P - c sum_i (l_i(z_i) + l_i*(alpha_i) - <alpha_i, z_i>)
      - |damping d + c J' alpha|^2 / 2 damping.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Loss(NamedTuple):
    """Losses of a batch, written without a line of the library.

    - `value`, `conjugate`: of z and of alpha, one number per example.
    - `gradient`: `(z, alpha, t) -> a, H`, the a that is largest in
        <a, z> - l*(a) - |a - alpha|^2 / 2t, and its derivatives in z. Without kinks t
        is infinite.
    - `number`: of the examples, by which a mean divides.
    """

    value: Callable
    conjugate: Callable
    gradient: Callable
    kinks: bool
    number: int


def diagonal(rows):
    return rows[..., None] * np.eye(rows.shape[-1])


def inside(excess, values):
    """Conjugates, infinite outside of their domain by more than rounding."""
    return np.where(excess <= 1e-12, values, np.inf)


def projected(slope, project):
    """Where l* is linear: the projection of alpha + t (z - slope) on the domain."""

    def gradient(z, alpha, t):
        a, H = project(alpha + t * (z - slope))
        return a, t * H

    return gradient


def absolute(y):
    project = lambda v: (np.clip(v, -1, 1), diagonal(1.0 * (np.abs(v) < 1)))
    value = lambda z: np.abs(z - y).sum(1)
    conjugate = lambda a: inside(np.abs(a).max(1) - 1, (a * y).sum(1))
    return Loss(value, conjugate, projected(y, project), True, len(y))


def euclidean(y):
    length = lambda a: np.sqrt((a**2).sum(1))

    def project(v):
        size = np.maximum(length(v), 1)[:, None]
        u = v / size
        out = (size > 1) * u
        return u, (np.eye(y.shape[1]) - out[:, :, None] * out[:, None]) / size[
            ..., None
        ]

    conjugate = lambda a: inside(length(a) - 1, (a * y).sum(1))
    return Loss(lambda z: length(z - y), conjugate, projected(y, project), True, len(y))


def huber(y, delta):
    def value(z):
        r = np.abs(z - y)
        return np.where(r <= delta, r**2 / 2, delta * (r - delta / 2)).sum(1)

    def gradient(z, alpha, t):
        r = z - y
        return np.clip(r, -delta, delta), diagonal(1.0 * (np.abs(r) <= delta))

    quadratic = lambda a: (a**2 / 2 + a * y).sum(1)
    conjugate = lambda a: inside(np.abs(a).max(1) - delta, quadratic(a))
    return Loss(value, conjugate, gradient, False, len(y))


def hinge(y):
    low, high = np.minimum(-y, 0), np.maximum(-y, 0)

    def project(v):
        return np.clip(v, low, high), diagonal(1.0 * ((low < v) & (v < high)))

    value = lambda z: np.maximum(1 - y * z, 0).sum(1)
    excess = lambda a: np.maximum(low - a, a - high).max(1)
    conjugate = lambda a: inside(excess(a), (y * a).sum(1))
    return Loss(value, conjugate, projected(y, project), True, len(y))


def on_simplex(p, mass):
    return np.maximum(np.abs(p.sum(1) - mass), -p.min(1))


def to_simplex(v):
    """The projections of the rows on the simplex, and their derivatives."""
    ordered = -np.sort(-v, 1)
    tau = (np.cumsum(ordered, 1) - 1) / np.arange(1, v.shape[1] + 1)
    number = (ordered > tau).sum(1, keepdims=True)
    p = np.maximum(v - np.take_along_axis(tau, number - 1, 1), 0)
    on = 1.0 * (p > 0)
    mean = on[:, :, None] * on[:, None] / on.sum(1)[:, None, None]
    return p / p.sum(1, keepdims=True), diagonal(on) - mean


def hinge_of_labels(labels, k, ignored):
    own, row = np.eye(k)[labels], 1.0 * (labels != ignored)
    margins = lambda z: z - (own * z).sum(1, keepdims=True) + 1 - own

    def project(v):
        p, H = to_simplex(v + own)
        return row[:, None] * (p - own), row[:, None, None] * H

    def conjugate(a):
        p = a + row[:, None] * own
        return inside(on_simplex(p, row), -((1 - own) * p).sum(1))

    value = lambda z: row * margins(z).max(1)
    number = int(row.sum())
    return Loss(value, conjugate, projected(own - 1, project), True, number)


class Generator(NamedTuple):
    """f, f', the inverse of f' from f'(0) on, and f''."""

    f: Callable
    slope: Callable
    inverse: Callable
    curvature: Callable


CHI_SQUARE = Generator(
    lambda u: (u - 1) ** 2 / 2,
    lambda u: u - 1,
    lambda v: 1 + v,
    lambda u: np.ones_like(u),
)
ALPHA_1_5 = Generator(
    lambda u: (u**1.5 - 1 - 1.5 * (u - 1)) / 0.75,
    lambda u: 2 * np.sqrt(u) - 2,
    lambda v: (1 + v / 2) ** 2,
    lambda u: u**-0.5,
)
LE_CAM = Generator(
    lambda u: (u - 1) ** 2 / (u + 1),
    lambda u: 1 - 4 / (1 + u) ** 2,
    lambda v: 2 / np.sqrt(1 - v) - 1,
    lambda u: 8 / (1 + u) ** 3,
)


def f_loss(y, g, q, temperature=1.0):
    """The Fenchel-Young loss of a generator, for probabilities y."""
    divergence = lambda p: temperature * (q * g.f(p / q)).sum(1)

    def probabilities(z):
        theta, least = z / temperature, g.slope(0.0)
        ratio = lambda tau: g.inverse(np.maximum(theta - tau[:, None], least))
        # All are 0 at `high`, and one alone has 1 at `low`.
        high = theta.max(1) - least
        low = (theta - g.slope(1 / q)).max(1)
        for _ in range(60):
            middle = (low + high) / 2
            above = (q * ratio(middle)).sum(1) > 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        p = q * ratio(low)
        return p / p.sum(1, keepdims=True)

    def gradient(z, alpha, t):
        p = probabilities(z)
        u = np.where(p > 0, p / q, 1)
        w = np.where(p > 0, q / g.curvature(u), 0) / temperature
        H = diagonal(w) - w[:, :, None] * w[:, None] / w.sum(1)[:, None, None]
        return p - y, H

    def value(z):
        p = probabilities(z)
        return ((p - y) * z).sum(1) - divergence(p) + divergence(y)

    def conjugate(a):
        p = a + y
        values = divergence(np.maximum(p, 0)) - divergence(y)
        return inside(on_simplex(p, 1), values)

    return Loss(value, conjugate, gradient, False, len(y))


class Minimum(NamedTuple):
    """The step, the least P that is known, and what it is at least."""

    d: np.ndarray
    above: float
    below: float


def minimize(loss: Loss, f, J, damping) -> Minimum:
    """The minimum of a model: f (m, k), J (m, k, n)."""
    c, d, alpha = 1 / loss.number, np.zeros(J.shape[-1]), np.zeros_like(f)
    P = model(loss, f, J, damping, d)
    best = Minimum(d, P, -np.inf)
    for t in 10.0 ** np.minimum(np.arange(40) / 2, 5) if loss.kinks else (np.inf,):
        d, alpha, r = multipliers(loss, f, J, damping, d, alpha, t)
        z = f + J @ d
        value = loss.value(z)
        P = c * value.sum() + damping * d @ d / 2
        left = value + loss.conjugate(alpha) - (alpha * z).sum(1)
        below = max(best.below, P - c * left.sum() - r @ r / (2 * damping))
        best = Minimum(d, P, below) if P < best.above else best._replace(below=below)
        if best.above - below <= 1e-9 * (model(loss, f, J, damping, 0 * d) - P):
            break
    return best


def multipliers(loss, f, J, damping, d, alpha, t):
    """The least point of one problem by Newton's method, its alpha and gradient."""
    c, n = 1 / loss.number, J.shape[-1]
    flat = J.reshape(-1, n)

    def look(d):
        a, H = loss.gradient(f + J @ d, alpha, t)
        return a, H, damping * d + c * flat.T @ a.ravel()

    a, H, g = look(d)
    for _ in range(300):
        matrix = c * flat.T @ (H @ J).reshape(-1, n) + damping * np.eye(n)
        size = 1 / np.sqrt(np.diag(matrix))
        scaled = matrix * size * size[:, None] + 1e-15 * np.eye(n)
        step = -size * np.linalg.solve(scaled, size * g)
        decrease, s = -step @ g, 1.0
        if decrease <= 1e-16:
            break
        # Not far beyond the least point on the line.
        while step @ look(d + s * step)[2] > decrease / 2 and s > 1e-12:
            s = s / 2
        d = d + s * step
        a, H, g = look(d)
    return d, a, g


def model(loss: Loss, f, J, damping, d) -> float:
    """P(d)."""
    return loss.value(f + J @ d).sum() / loss.number + damping * d @ d / 2
