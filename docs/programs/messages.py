"""Draws what each rule sends back through a chain: docs/images/messages.svg.

    .venv/bin/python docs/programs/messages.py

Dark where the page around it is. A test fails where the picture is not this one.
"""

import pathlib
import re


FILE = pathlib.Path(__file__).parents[1] / "images" / "messages.svg"
VALUE, ENDS = "a cost-to-go (n, n), (n)", "H, ∇h"
# Name, what a message is, the message, that of the end, what a stage does to it, and
# what follows the step forward.
RULES = (
    ("Gradient", "a slope (n)", "λ", "∇h", "A′λ", "nothing"),
    ("Gauss-Newton", VALUE, "P, p", ENDS, "Riccati", "model"),
    ("Newton", "the same, and the slope", "P, p, λ", ENDS, "Riccati, λ·∂²f", "model"),
    ("iLQR", VALUE, "P, p", ENDS, "Riccati", "chain"),
    ("DDP", VALUE, "P, p", ENDS, "Riccati, p·∂²f", "chain"),
    ("Dual Gauss-Newton", "a slope (n)", "λ", "α", "A′λ", "nothing"),
    ("Target propagation", "a shift (n)", "D", "−γ∇h", "inverse of f", "nothing"),
    ("Moreau", "a slope (n)", "μ", "∇env", "argmin", "nothing"),
    ("Layerwise LQR", "a cost-to-go of a batch", "P, p", ENDS, "Riccati", "model"),
)
WIDE, TOP, LANE = 480, 112, 62
COLUMNS = {"t": 62, "t+1": 240, "T": 418}
BLUE = "#5b7fd0"
STYLE = f"""
  svg {{ color: #24292f; font-family: sans-serif; }}
  text {{ fill: currentColor; font-size: 14px; text-anchor: middle; }}
  .name {{ font-weight: bold; text-anchor: start; }}
  .small {{ font-size: 12px; }}
  .forward {{ font-size: 12px; text-anchor: end; }}
  path, circle, rect {{ stroke: currentColor; fill: none; }}
  .back {{ stroke: {BLUE}; stroke-width: 2; }}
  .lane {{ stroke-opacity: 0.25; }}
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words, in which what follows an underscore stands below."""
    words = re.sub(
        r"_(\S+?)(?=[, ]|$)",
        r'<tspan dy="4" font-size="10">\1</tspan><tspan dy="-4">&#8203;</tspan>',
        words,
    )
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{kind}>{words}</text>'


def chain() -> list[str]:
    """x_t -> f_t -> x_{t+1} -> f_{t+1} ... -> x_T -> h, with the controls above."""
    y, out = 70, []
    for name, x in COLUMNS.items():
        out += [f'<circle cx="{x}" cy="{y}" r="20"/>', text(x, y + 4, f"x_{name}")]
    columns = list(COLUMNS.items())
    for i in range(2):
        (name, left), (_, right) = columns[i : i + 2]
        middle = (left + right) / 2
        dots = ' stroke-dasharray="4 3"' if i else ""
        out += [
            f'<rect x="{middle - 24}" y="{y - 16}" width="48" height="32" rx="4"/>',
            text(middle, y + 4, f"f_{name}" + (" …" if i else "")),
            text(middle, 20, f"u_{name}"),
            arrow(middle, 26, middle, y - 18, "ahead"),
            arrow(left + 21, y, middle - 26, y, "ahead"),
            arrow(middle + 25, y, right - 22, y, "ahead", dots),
        ]
    x = COLUMNS["T"]
    return [*out, text(x, 20, "h"), arrow(x, y - 21, x, 26, "ahead")]


def arrow(x, y, to_x, to_y, head: str, more: str = "") -> str:
    kind = ' class="back"' if head == "head" else ""
    line = f"M{x},{y} L{to_x},{to_y}"
    return f'<path d="{line}"{kind} marker-end="url(#{head})"{more}/>'


def lane(i: int, rule: tuple[str, ...]) -> list[str]:
    """One rule: its messages below the states, and what a stage does between them."""
    name, what, message, seed, stage, forward = rule
    top = TOP + i * LANE
    y = top + 46
    title = f'{name}<tspan class="small" font-weight="normal">: {what}</tspan>'
    parts = message.split(", ")
    out = [
        f'<path class="lane" d="M8,{top} L{WIDE - 8},{top}"/>',
        text(12, top + 18, title, "name"),
        text(WIDE - 12, top + 18, f"forward: {forward}", "forward"),
        text(COLUMNS["T"], y, seed),
    ]
    for place in ("t", "t+1"):
        words = ", ".join(f"{part}_{place}" for part in parts)
        out.append(text(COLUMNS[place], y, words))
    half = {1: 20, 2: 36, 3: 48}
    sides = [(COLUMNS["t"], half[len(parts)]), (COLUMNS["t+1"], half[len(parts)])]
    sides.append((COLUMNS["T"], half[1 + seed.count(",")] + 6))
    for (left, a), (right, b) in zip(sides, sides[1:], strict=False):
        out.append(arrow(right - b, y - 5, left + a + 6, y - 5, "head"))
        if right == COLUMNS["t+1"]:
            out.append(text((left + a + right - b) / 2 + 2, y - 11, stage, "small"))
    return out


def picture() -> str:
    high = TOP + LANE * len(RULES) + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high}" '
        f'width="{WIDE}">',
        f"<style>{STYLE}</style>",
    ]
    for name, color in (("head", BLUE), ("ahead", "currentColor")):
        out.append(
            f'<marker id="{name}" orient="auto" markerUnits="userSpaceOnUse" '
            'markerWidth="9" markerHeight="9" refX="5" refY="4"><path d="M0,1 L7,4 '
            f'L0,7 z" style="fill: {color}; stroke: none"/></marker>'
        )
    out += chain()
    for i, rule in enumerate(RULES):
        out += lane(i, rule)
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(picture())
