import math

import numpy as np


# The miniature tracks are drawn in units of which 172 make a meter, of pieces (length,
# curvature, number of steps): corners have the radius 50, a quarter circle 79 steps.
# Source: V. Roulet, S. Srinivasa, M. Fazel, Z. Harchaoui, 2022, arXiv:2207.06362.
_UNIT, _RADIUS = 1 / 172, 50
_QUARTER = _RADIUS * math.pi / 2
_LEFT = (_QUARTER, 1 / _RADIUS, math.ceil(_QUARTER))
_RIGHT = (_QUARTER, -1 / _RADIUS, math.ceil(_QUARTER))


def _straight(length: int) -> tuple[float, float, int]:
    """In steps of one unit."""
    return float(length), 0.0, length


def _draw(*pieces: tuple[float, float, int]) -> np.ndarray:
    """Points [m] along pieces, from the origin in the direction of x."""
    states = [np.zeros(3)]
    for length, curvature, num in pieces:
        start, parts = states[-1], length * np.arange(1, num + 1) / num
        states += [_advance(start, part, curvature) for part in parts]
    return np.stack(states)[:, :2] * _UNIT


def line() -> np.ndarray:
    """A straight of 0.7 m."""
    return _draw((120.0, 0.0, 6))


def bend() -> np.ndarray:
    """A straight, a left bend and a straight."""
    return _draw(_straight(50), _LEFT, _straight(50))


def circle() -> np.ndarray:
    """A circle of radius 0.29 m."""
    return _draw(_LEFT, _LEFT, _LEFT, _LEFT)


def simple() -> np.ndarray:
    """A circuit of 5.6 m with five left bends and a right one."""
    first = _straight(100), _LEFT, _straight(100), _LEFT, _straight(50), _LEFT
    return _draw(*first, _RIGHT, _straight(100), _LEFT, _LEFT, _straight(150))


def rounded(
    corners: np.ndarray, radii: np.ndarray, spacing: float, blend: int = 0
) -> np.ndarray:
    """A closed path of straights and arcs: a polygon whose corners are rounded off.

    **Arguments:**

    - `corners`: corners of the polygon, shape `(N, 2)`.
    - `radii`: radius of the arc in each corner, shape `(N,)`.
    - `spacing`: about the distance between two points of the result.
    - `blend`: each point is averaged with so many points on either side: the curvature
        rises steadily from straight to arc, as on a road, instead of jumping.

    **Returns:** points along the path, shape `(M, 2)`, the first one not repeated. It
    lies in the middle of the edge from the first to the second corner.

    **Raises:** `ValueError` if the two arcs of an edge do not fit on it.
    """
    edges = np.roll(corners, -1, axis=0) - corners
    headings = np.arctan2(edges[:, 1], edges[:, 0])
    turns = (headings - np.roll(headings, 1) + np.pi) % (2 * np.pi) - np.pi
    # An arc of radius r that turns by w touches both edges r tan(w/2) from the corner.
    cuts = radii * np.tan(np.abs(turns) / 2)
    straights = np.linalg.norm(edges, axis=1) - cuts - np.roll(cuts, -1)
    if np.any(straights < 0):
        raise ValueError(
            f"The arcs do not fit on the edge after corner {np.argmin(straights)}: "
            "lower the radii of its two corners, or move these apart."
        )
    # Pieces (length, curvature): half a straight, arc, straight, ..., the other half.
    pieces = [(straights[0] / 2, 0.0)]
    for i in np.roll(np.arange(len(corners)), -1):
        pieces.append((radii[i] * abs(turns[i]), np.sign(turns[i]) / radii[i]))
        pieces.append((straights[i] if i else straights[0] / 2, 0.0))
    along = edges[0] / np.linalg.norm(edges[0])
    start = corners[0] + along * (cuts[0] + straights[0] / 2)
    points = _walk(pieces, start, headings[0], spacing)
    shifts = range(-blend, blend + 1)
    return np.mean([np.roll(points, shift, axis=0) for shift in shifts], axis=0)


def _walk(pieces, start, heading, spacing):
    lengths = np.array([length for length, _ in pieces])
    ends = np.cumsum(lengths)
    # The state (x, y, heading) at the start of each piece, then within it.
    states = [np.array([*start, heading])]
    for length, curvature in pieces:
        states.append(_advance(states[-1], length, curvature))
    num = round(ends[-1] / spacing)
    points = []
    for s in np.arange(num) * ends[-1] / num:
        i = int(np.searchsorted(ends, s, side="right"))
        within = s - (ends[i] - lengths[i])
        points.append(_advance(states[i], within, pieces[i][1])[:2])
    return np.stack(points)


def _advance(state, length, curvature):
    x, y, heading = state
    turn = length * curvature
    # The chord of an arc has length 2 sin(turn / 2) / curvature and half of its turn.
    chord = length * np.sinc(turn / (2 * np.pi))
    middle = heading + turn / 2
    return np.array(
        [x + chord * np.cos(middle), y + chord * np.sin(middle), heading + turn]
    )


def oval(straight: float, radius: float) -> np.ndarray:
    """Points of two straights joined by two half circles [m]."""
    x, y = straight / 2 + radius, radius
    corners = np.array([[-x, -y], [x, -y], [x, y], [-x, y]])
    return rounded(corners, np.full(4, radius), math.pi * radius / 50, blend=3)


def _circuit(table, spacing, blend):
    x, y, radii = np.array(table).T
    return rounded(np.stack([x, y], axis=1), radii, spacing, blend)


def chicane() -> np.ndarray:
    """Points [m] of a circuit whose straight is broken by a chicane."""
    # Corner x, corner y and radius of the arc [m].
    table = [
        (0.0, 0.0, 40.0),
        (110.0, 0.0, 25.0),
        (135.0, 20.0, 25.0),
        (165.0, 20.0, 25.0),
        (190.0, 0.0, 25.0),
        (300.0, 0.0, 45.0),
        (300.0, 110.0, 45.0),
        (0.0, 110.0, 40.0),
    ]
    return _circuit(table, 2.5, 2)


def grand_prix() -> tuple[np.ndarray, np.ndarray]:
    """Points and half widths [m] of a long circuit."""
    # Corner x, corner y and radius of the arc [m].
    table = [
        (0.0, 0.0, 40.0),
        (640.0, 0.0, 30.0),
        (700.0, 130.0, 60.0),
        (590.0, 215.0, 50.0),
        (650.0, 330.0, 70.0),
        (560.0, 430.0, 45.0),
        (215.0, 440.0, 23.0),
        (205.0, 385.0, 23.0),
        (450.0, 340.0, 35.0),
        (400.0, 150.0, 45.0),
        (240.0, 120.0, 60.0),
        (90.0, 300.0, 80.0),
        (-80.0, 290.0, 60.0),
        (-60.0, 130.0, 120.0),
        (-130.0, 50.0, 30.0),
    ]
    points = _circuit(table, 4.0, 2)
    turn = np.linspace(0.0, 2 * math.pi, len(points), endpoint=False)
    return points, 5.5 + 0.5 * np.cos(turn)
