"""Draws the rooms of the package from their imports: docs/images/rooms.svg.

    .venv/bin/python docs/programs/rooms.py

A test fails where the picture is not that of the imports.
"""

import pathlib
import textwrap

from tests.test_style import CONTROL, FLOORS, OUTSIDE, place, relative_imports, sources


FILE = pathlib.Path(__file__).parents[1] / "images" / "rooms.svg"
DOOR = "__init__"
NAMING = {DOOR: "import diffprog as dp", "extend": "for those who write parts"}
NAMING |= {"manifolds": "ready-made, for states"}
HERE = {place(path)[0] for path in sources()}
HEIGHTS = {room: floor for room, floor in FLOORS.items() if room in HERE}
COLUMNS = {"_operators": 0, "losses": 0, "optim": 0, "systems": 0, "_chain": 2}
COLUMNS |= {
    "_control": 2,
    "extend": 2,
    "manifolds": 0,
    "plot": 2,
}  # the others stand in the middle
WIDE, GAP_X, GAP_Y, LINE, TITLE = 270, 40, 34, 15, 24
PUBLIC, PRIVATE, INK = "#dbe7fb", "#eeeeee", "#33415c"


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports from, but for those it reaches by others."""
    found = {room: set() for room in HEIGHTS}
    for path in sources():
        home = place(path)[0]
        found[home] |= {there[0] for there, _ in relative_imports(path)} - {home}
    found[DOOR] -= set(OUTSIDE)
    found |= {room: {DOOR} for room in OUTSIDE}  # `import diffprog as dp`
    below = {}
    for room in sorted(found, key=HEIGHTS.__getitem__):
        below[room] = found[room].union(*(below[other] for other in found[room]))
    return {
        room: {o for o in others if not any(o in below[other] for other in others)}
        for room, others in found.items()
    }


def contents(room: str) -> list[str]:
    """The files of a room; for a room with parts these, from the lowest."""
    if room in NAMING:
        return [NAMING[room]]
    if room == "_control":
        return [" < ".join(", ".join(parts) for parts in CONTROL)]
    names = [
        place(path)[1]
        for path in sources()
        if place(path)[:1] == (room,) != place(path)
    ]
    return [", ".join(name.lstrip("_") for name in names)]


def boxes() -> dict[str, tuple[float, float, float, list[str]]]:
    """Left, top, height and lines of each room."""
    out, top = {}, 12.0
    for floor in sorted(set(HEIGHTS.values()), reverse=True):
        rooms = [room for room, height in HEIGHTS.items() if height == floor]
        lines = {
            room: [line for text in contents(room) for line in textwrap.wrap(text, 42)]
            for room in rooms
        }
        height = TITLE + 10 + LINE * max(map(len, lines.values()))
        for room in rooms:
            left = 12 + COLUMNS.get(room, 1) * (WIDE + GAP_X)
            out[room] = left, top, height, lines[room]
        top += height + GAP_Y
    return out


def way(room: str, other: str, found) -> str:
    """An arrow: down one of the two columns, and across in a gap."""
    (a, top, high, _), (b, end, _, _) = found[room], found[other]
    start = top + high
    others = [box for name, box in found.items() if start < box[1] < end]
    if all(box[0] != b for box in others):  # the column of `other` is free
        bends = [(a, start + GAP_Y / 2), (b, start + GAP_Y / 2)]
    else:
        bends = [(a, end - GAP_Y / 2), (b, end - GAP_Y / 2)]
    points = [(a, start), *bends, (b, end - 5)]
    shift = WIDE / 2 + (HEIGHTS[room] - 4.5) * 7 * (a != b)
    return " ".join(f"{x + shift:.0f},{y:.0f}" for x, y in points)


def picture() -> str:
    found = boxes()
    wide = 24 + 3 * WIDE + 2 * GAP_X
    high = max(top + height for _, top, height, _ in found.values()) + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high:.0f}" '
        f'width="{wide}" font-family="sans-serif" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<marker id="head" orient="auto" markerWidth="8" markerHeight="8" refX="4" '
        f'refY="4"><path d="M0,1 L7,4 L0,7 z" fill="{INK}"/></marker>',
    ]
    for room, others in arrows().items():
        for other in sorted(others):
            out.append(
                f'<polyline points="{way(room, other, found)}" fill="none" '
                f'stroke="{INK}" marker-end="url(#head)"/>'
            )
    for room, (left, top, height, lines) in found.items():
        color = PRIVATE if room[0] == "_" != room[1] else PUBLIC
        name = "diffprog" if room == DOOR else room
        out += [
            f'<rect x="{left}" y="{top:.0f}" width="{WIDE}" height="{height}" rx="6" '
            f'fill="{color}" stroke="{INK}"/>',
            f'<text x="{left + 10}" y="{top + 18:.0f}" font-size="14" '
            f'font-weight="bold">{name}</text>',
        ]
        for i, line in enumerate(lines):
            y = top + TITLE + 10 + i * LINE
            text = line.replace("<", "&lt;")
            out.append(
                f'<text x="{left + 10}" y="{y:.0f}" font-size="11">{text}</text>'
            )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(picture())
