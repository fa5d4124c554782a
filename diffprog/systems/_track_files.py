import csv
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np


_CSV = ("x_m", "y_m", "w_tr_right_m", "w_tr_left_m")
_JSON = ("X", "Y", "X_i", "Y_i", "X_o", "Y_o")


def read_csv(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center line, shape `(N, 2)`, and distances to the right and left border."""
    names, rows = None, []
    lines = _read(path, "columns x_m,y_m,w_tr_right_m,w_tr_left_m").splitlines()
    for number, cells in enumerate(csv.reader(lines, skipinitialspace=True), start=1):
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        comment = cells[0].startswith("#")
        cells[0] = cells[0].lstrip("# ")
        if names is None and not rows and _is_header(cells, comment):
            names = cells
        elif not comment:
            rows.append((number, cells))
    names = _CSV if names is None else names
    missing = [name for name in _CSV if name not in names]
    if missing:
        raise ValueError(
            f"`path` {path} has the columns {', '.join(names)}; "
            f"missing: {', '.join(missing)}. Name the four columns "
            "x_m,y_m,w_tr_right_m,w_tr_left_m in the header."
        )
    table = np.array([_numbers(path, names, *row) for row in rows]).reshape(-1, 4)
    return table[:, :2], table[:, 2], table[:, 3]


def _is_header(cells: list[str], comment: bool) -> bool:
    # Any other comment is only a remark; a plain line of words must be the header.
    return "x_m" in cells if comment else not any(map(_is_number, cells))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(path, names: Sequence[str], line: int, cells: list[str]) -> list[float]:
    if len(cells) != len(names):
        raise ValueError(
            f"`path` {path}, line {line} has {len(cells)} cells; {len(names)} are "
            f"expected, separated by commas: {','.join(names)}."
        )
    row = []
    for name in _CSV:
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
        raise FileNotFoundError(
            f"`path` is {path}, and there is no such file; give a file with {accepted}."
        )
    with open(path, encoding="utf-8-sig") as file:
        return file.read()
