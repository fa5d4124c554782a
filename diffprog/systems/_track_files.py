import csv
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np


_CSV = ("x_m", "y_m", "w_tr_right_m", "w_tr_left_m")
_WHOLE = re.compile(r"\s*[-+]?\d+(\s*,\s*[-+]?\d+){3}\s*,?\s*(#.*)?")
_SEPARATOR = re.compile('"?sep=.?"?', re.IGNORECASE)  # what spreadsheets begin with
_JSON = ("X", "Y", "X_i", "Y_i", "X_o", "Y_o")


def read_csv(
    path: str | os.PathLike, with_widths: bool
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Center line, shape `(N, 2)`, distances to the borders, and lines of the file.

    The distances are those to the right and to the left, shape `(N, 2)`; without
    widths they are not looked for, shape `(N, 0)`.
    """
    wanted = _CSV if with_widths else _CSV[:2]
    header, rows = None, []
    text = _read(path, f"columns {','.join(wanted)}")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if number == 1 and _SEPARATOR.fullmatch(line.strip()):
            continue
        comment = line.lstrip().startswith("#")
        cells = _cells(line.lstrip("# \t") if comment else line)
        if not any(cells):
            continue
        if header is None and not rows and _is_header(cells, comment):
            header = [cell.lower() for cell in cells]
            header = header if header[-1] else header[:-1]
        elif not comment:
            rows.append((number, cells))
    names = header or (_CSV[:2] if rows and len(rows[0][1]) == 2 else _CSV)
    written = [lines[number - 1] for number, _ in rows]
    if header is None and len(names) == 4 and _may_be_decimal(written, with_widths):
        raise ValueError(
            f"`path` {path} may have two columns with decimal commas or four of whole "
            "numbers: separate cells by semicolons, or name the columns in a header."
        )
    missing = [name for name in wanted if name not in names]
    if missing:
        has_points = "x_m" in names and "y_m" in names
        raise ValueError(
            f"`path` {path} has the columns {', '.join(names)}; "
            f"missing: {', '.join(missing)}. Name the columns {','.join(wanted)} in "
            f"the header{', or pass `half_width`' if has_points else ''}."
        )
    known = header is not None
    table = np.array([_numbers(path, names, known, wanted, *row) for row in rows])
    table = table.reshape(-1, len(wanted))
    return table[:, :2], table[:, 2:], [number for number, _ in rows]


def _cells(line: str) -> list[str]:
    """The cells of a line without the comment behind them, whatever separates them."""
    line = re.sub(r'("[^"]*")|#.*', r"\1", line)
    # A comma is also a decimal point where something else separates the cells.
    separator = next((mark for mark in (";", ",\t", "\t", ",") if mark in line), None)
    if separator is None:
        return line.split()
    (cells,) = csv.reader([line], delimiter=separator[0], skipinitialspace=True)
    if separator[0] != ",":
        cells = [re.sub(r"(?<=\d),(?=\d)", ".", cell) for cell in cells]
    return [cell.strip() for cell in cells]


def _may_be_decimal(lines: Sequence[str], with_widths: bool) -> bool:
    """Whether 0,5,-1,25 may be 0.5 and -1.25: without widths, any whole numbers may.

    With them, those that four columns seldom hold: negative widths, and 00 or 05.
    """
    if not all(map(_WHOLE.fullmatch, lines)):
        return False
    strange = [line for line in lines if re.search(r"\b0\d|,.*,\s*-", line)]
    return not with_widths or len(strange) > 1


def _is_header(cells: list[str], comment: bool) -> bool:
    # Any other comment is only a remark; a plain line of words must be the header.
    if comment:
        return "x_m" in map(str.lower, cells)
    return not any(map(_is_number, cells))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(
    path,
    names: Sequence[str],
    known: bool,
    wanted: Sequence[str],
    line: int,
    cells: list[str],
) -> list[float]:
    if len(cells) == len(names) + 1 and not cells[-1]:
        cells = cells[:-1]  # a separator ends the line
    if len(cells) != len(names):
        expected = f"{len(names)} are expected: {','.join(names)}"
        if not known:
            either = "" if len(wanted) == 4 or len(names) == 2 else "2 or "
            expected = f"without a header that names them {either}{expected}"
        raise ValueError(
            f"`path` {path}, line {line} has {len(cells)} cells; {expected}. "
            "Separate them by commas, semicolons, tabs or spaces, and numbers with a "
            "decimal comma by semicolons or tabs."
        )
    row = []
    for name in wanted:
        cell = cells[names.index(name)]
        if not _is_number(cell):
            raise ValueError(
                f"`path` {path}, line {line}: {cell!r} in column {name} is no number; "
                "write a decimal number such as 1.5."
            )
        row.append(float(cell))
    return row


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
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # any bytes; only words can come out wrong
