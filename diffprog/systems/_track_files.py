import codecs
import contextlib
import csv
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


_CSV = ("x_m", "y_m", "w_tr_right_m", "w_tr_left_m")
_WHOLE = re.compile(r"\s*[-+]?\d+(\s*,\s*[-+]?\d+){3}\s*,?\s*(#.*)?")
_TWO = re.compile(r"\s*[-+]?\d+,\d+\s*,\s*[-+]?\d+,\d+\s*,?\s*(#.*)?")
_SEPARATOR = re.compile('"?sep=.?"?', re.IGNORECASE)  # what spreadsheets begin with
_REMARK = re.compile('("[^"]*")|#.*')
_PREFIX = re.compile(r"^[#\s]*(\w+:)?")  # of a comment
_NUMBER = re.compile(
    r"[-+]?((\d+\.?\d*|\.\d+)(e[-+]?\d+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE
)
_GROUPED = re.compile(r"[-+]?[1-9]\d?\d?(,\d{3})+", re.ASCII)
_WORD = re.compile("[a-z]+")
_SMALL = re.compile(r"[-+]?\d{1,3}", re.ASCII)  # too small to have a group
_JSON = ("X", "Y", "X_i", "Y_i", "X_o", "Y_o")


class _Row(NamedTuple):
    """A line of a file, its cells as they are written there."""

    line: int
    cells: list[str]
    commas: bool  # whether a comma may be a decimal point

    def number(self, index: int) -> float | None:
        cell = self.cells[index]
        text = re.sub(r"(?<=\d),(?=\d)", ".", cell) if self.commas else cell
        return float(text) if _NUMBER.fullmatch(text) else None


def read_csv(
    path: str | os.PathLike, with_widths: bool
) -> tuple[np.ndarray, np.ndarray, list[int], str]:
    """Center line, shape `(N, 2)`, distances to the borders, lines of the file, doubt.

    The distances are those to the right and to the left, shape `(N, 2)`; without
    widths they are not looked for, shape `(N, 0)`. The doubt says that the same file
    may hold two columns with decimal commas; it is empty where it cannot.
    """
    wanted = _CSV if with_widths else _CSV[:2]
    header, comments, rows = None, [], []
    text = _read(path, f"columns {','.join(wanted)}")
    # Not `splitlines`: it also cuts at characters that stand in remarks.
    lines = re.split(r"\r\n|\r|\n", text)
    for number, line in enumerate(lines, start=1):
        if number == 1 and _SEPARATOR.fullmatch(line.strip()):
            continue
        if line.lstrip().startswith("#"):
            comments += [] if rows else [(number, _PREFIX.sub("", line))]
            continue
        row = _row(number, line)
        if header is None and not rows and _is_header(row):
            header = row
        elif any(row.cells):
            rows.append(row)
    if header is None and rows:
        header = _in_comments(comments, rows[0], lines[rows[0].line - 1])
    columns = _CSV[:2] if rows and len(rows[0].cells) == 2 else _CSV
    columns = columns if header is None else _filled(header)
    names = [column.lower() for column in columns]
    written = [lines[row.line - 1] for row in rows]
    doubt = (
        f"`path` {path} may have two columns with decimal commas or four of whole "
        "numbers: separate cells by semicolons, or name the columns in a header."
    )
    nameless = header is None and len(names) == 4 and bool(rows)
    if nameless and _may_be_decimal(written, with_widths):
        raise ValueError(doubt)
    doubt = doubt if nameless and all(map(_TWO.fullmatch, written)) else ""
    missing = [name for name in wanted if name not in names]
    if missing:
        has_points = "x_m" in names and "y_m" in names
        line = lines[header.line - 1] if header else ""
        quoted = f" (line {header.line}, {line!r:.99})" if header else ""
        advice = _header_for(columns, wanted, line)
        raise ValueError(
            f"`path` {path} has the columns {', '.join(columns)}{quoted}; missing: "
            f"{', '.join(missing)}. {advice}{', or pass `half_width`' * has_points}."
        )
    rows = [_complete(path, columns, header is not None, wanted, row) for row in rows]
    indices = [names.index(name) for name in wanted]
    table = [_numbers(path, columns, indices, row) for row in rows]
    _check_commas(path, columns, indices, rows)
    table = np.array(table).reshape(-1, len(wanted))
    return table[:, :2], table[:, 2:], [row.line for row in rows], doubt


@contextlib.contextmanager
def doubted(doubt: str):
    """Adds the doubt about a file to the error of the track that it was read as."""
    try:
        yield
    except ValueError as error:
        if not doubt:
            raise
        raise ValueError(f"{error} {doubt}") from error


def _row(number: int, line: str, like: str = "") -> _Row:
    """The cells of a line without its comment, separated as those of a line `like`."""
    line, like = (_REMARK.sub(r"\1", text) for text in (line, like or line))
    separator = next((mark for mark in (";", ",\t", "\t", ",") if mark in like), None)
    if separator is None:
        # No other kind of space: it may stand inside a number.
        return _Row(number, re.findall("[^ ]+", line.strip()), False)
    (cells,) = csv.reader([line], delimiter=separator[0], skipinitialspace=True)
    return _Row(number, [cell.strip() for cell in cells], separator[0] != ",")


def _may_be_decimal(lines: Sequence[str], with_widths: bool) -> bool:
    """Whether 0,5,-1,25 may be 0.5 and -1.25: without widths, any whole numbers may.

    With them, those that four columns seldom hold: negative widths, and 00 or 05. One
    decimal looks like a width; such a file is only doubted, if no track comes of it.
    """
    if not all(map(_WHOLE.fullmatch, lines)):
        return False
    strange = [line for line in lines if re.search(r"\b0\d|,.*,\s*-", line)]
    return not with_widths or len(strange) > 1


def _is_header(row: _Row) -> bool:
    numbers = any(row.number(i) is not None for i in range(len(row.cells)))
    return not numbers and any(cell[:1].isalpha() for cell in row.cells)


def _in_comments(comments: list[tuple], first: _Row, line: str) -> _Row | None:
    """The last one that names a known column, or else as many as there are cells."""
    own, alike = ([_row(i, text, like) for i, text in comments] for like in ("", line))
    named = lambda row: "x_m" in map(str.lower, row.cells)
    fits = lambda row: _is_header(row) and len(_filled(row)) == len(_filled(first))
    found = [*filter(fits, alike), *filter(named, own)]
    return found[-1] if found else None


def _filled(row: _Row) -> list[str]:
    return row.cells if row.cells[-1] else row.cells[:-1]  # behind a last separator


def _header_for(columns: Sequence[str], wanted: Sequence[str], line: str) -> str:
    """What the header should be, in the order of the file if its words tell it."""
    header = list(columns)
    for name in wanted:
        (word,) = {"x", "y", "right", "left"} & {*name.split("_")}
        found = [i for i, c in enumerate(columns) if word in _WORD.findall(c.lower())]
        if len(found) == 1:
            header[found[0]] = name
    if not line or not {*wanted} <= {*header}:
        names = f"Name the columns {', '.join(wanted)} in the header"
        return f"{names}, in the order in which the file has them"
    mark = next((mark for mark in ";\t," if mark in line), " ")
    return f"Write the header {mark.join(header)}"


def _complete(
    path, columns: Sequence[str], known: bool, wanted: Sequence[str], row: _Row
) -> _Row:
    """The row without the empty cell behind a last separator; a cell per column."""
    cells = row.cells if len(row.cells) == len(columns) else _filled(row)
    if len(cells) != len(columns):
        expected = f"{len(columns)} are expected: {','.join(columns)}"
        if not known:
            either = "" if len(wanted) == 4 or len(columns) == 2 else "2 or "
            expected = f"without a header that names them {either}{expected}"
        raise ValueError(
            f"`path` {path}, line {row.line} has {len(cells)} cells; {expected}. "
            "Separate them by commas, semicolons, tabs or spaces, and numbers with a "
            "decimal comma by semicolons or tabs; leave out thousands separators."
        )
    return row._replace(cells=cells)


def _numbers(path, columns: Sequence[str], indices: list[int], row: _Row):
    numbers = []
    for i in indices:
        number = row.number(i)
        if number is None:
            raise ValueError(
                f"`path` {path}, line {row.line}: {row.cells[i]!r} in column "
                f"{columns[i]} is no number; write a decimal number such as 1.5, "
                "without thousands separators."
            )
        numbers.append(number)
    return numbers


def _check_commas(path, columns, indices, rows: Sequence[_Row]) -> None:
    """A `ValueError` where commas may separate thousands: 5,150 may be 5.15 or 5150.

    They do where decimal points occur as well, and may where all of them stand before
    three digits, while numbers of their column below 1000 have none.
    """
    cells = [
        [(row.cells[i], row.line) for row in rows if row.number(i) is not None]
        for i in range(len(columns))
    ]
    named = lambda cell, line: f"{cell!r} in line {line}"
    flat = [cell for column in cells for cell in column]
    commas = [cell for cell in flat if "," in cell[0]]
    points = [cell for cell in flat if "." in cell[0]]
    if commas and points:
        raise ValueError(
            f"`path` {path} has both decimal commas, {named(*commas[0])}, and decimal "
            f"points, {named(*points[0])}: write all numbers with one of them, without "
            "thousands separators."
        )
    if not all(_GROUPED.fullmatch(cell) for cell, _ in commas):
        return
    for i in indices:
        grouped = [cell for cell in cells[i] if "," in cell[0]]
        whole = [cell for cell in cells[i] if "," not in cell[0]]
        if grouped and whole and all(_SMALL.fullmatch(cell) for cell, _ in whole):
            raise ValueError(
                f"`path` {path}: the commas of column {columns[i]} may be decimal ones "
                f"or separate thousands, {named(*grouped[0])} beside "
                f"{named(*whole[0])}: write decimal points, or leave them out."
            )


def read_json(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center line, left and right border, shape `(N, 2)` each."""
    text = _read(path, f"an object with the columns {', '.join(_JSON)}")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`path` {path} is not valid JSON: {error}.") from error
    found = list(data) if isinstance(data, dict) else []
    missing = [name for name in _JSON if name not in found]
    if missing:
        raise ValueError(
            f"`path` {path} has the columns {', '.join(found) or 'none'}; "
            f"missing: {', '.join(missing)}. Give an object with the columns "
            f"{', '.join(_JSON)}."
        )
    columns = [_column(path, name, data[name]) for name in _JSON]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(
            f"{name} {len(column)}" for name, column in zip(_JSON, columns, strict=True)
        )
        raise ValueError(
            f"`path` {path} has columns of different lengths ({lengths}); give each "
            "one number per point."
        )
    x, y, x_i, y_i, x_o, y_o = map(np.array, columns)
    pair = lambda a, b: np.stack([a, b], axis=1)
    return pair(x, y), pair(x_i, y_i), pair(x_o, y_o)


def _column(path, name: str, values: Any) -> list[float]:
    if isinstance(values, dict):
        bad = [key for key in values if not key.isdecimal()]
        if bad:
            raise ValueError(
                f"`path` {path}, column {name} has the key {bad[0]!r}; the keys of a "
                'column are indices "0", "1", ...'
            )
        values = [values[key] for key in sorted(values, key=int)]
    if not isinstance(values, list):
        raise ValueError(
            f"`path` {path}, column {name} is a {type(values).__name__}; give a list "
            "of numbers, or an object from indices to numbers."
        )
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"`path` {path}, column {name}, row {row}: {value!r} is no number."
            )
    return [float(value) for value in values]


def _read(path, accepted: str) -> str:
    if not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "and there is no such file"
        raise FileNotFoundError(
            f"`path` is {path}, {what}; give a file with {accepted}."
        )
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # any bytes; only words can come out wrong
