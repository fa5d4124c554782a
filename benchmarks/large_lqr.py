"""Linear-quadratic problems of 14 to 40 states."""

from . import lqr


TITLE = "Large linear-quadratic problems"
COLUMNS, NOTES = lqr.COLUMNS, lqr.NOTES
SIZES = ((14, 7, 100), (24, 12, 200), (40, 20, 200))


def run() -> list[dict]:
    return [row for size in SIZES for row in lqr.one(*size)]
