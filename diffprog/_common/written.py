"""What functions write into their own objects while they are traced is taken back."""

import contextlib
import types
from typing import Any

import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from . import changes


_OPEN: list[list[str]] = []  # what was lost in the traces that go on


@contextlib.contextmanager
def taken_back(tree: PyTree):
    """Leaves what functions hold as it was, so that a memo or a log works in a trace.

    A number that is added has no place in a program of before, and a traced one is
    lost with its trace: the list that is given says where such were. What is plain
    stays, such as a count of calls, or their shapes and dtypes.
    """
    held = [(*row, _read(row[-1])) for row in _stores(tree)]
    lost: list[str] = []
    _OPEN.append(lost)
    try:
        yield lost
    finally:
        _OPEN.pop()
        for holder, name, store, before in held:
            after = _read(store)
            changed = [k for k in before | after if before.get(k) is not after.get(k)]
            if all(_is_plain((before.get(k), after.get(k))) for k in changed):
                continue
            traced = [name or str(k) for k in changed if _is_traced(after.get(k))]
            for each in (*_OPEN, lost):
                each += [changes.place(holder, where) for where in traced]
            _write(store, before)


def _is_traced(value) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    inside = isinstance(value, list | tuple | dict) and any(map(_is_traced, parts))
    return inside or isinstance(value, Tracer)


def _is_plain(value) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return type(value) in changes.PLAIN or isinstance(value, type | np.dtype)


def _read(store) -> dict[Any, Any]:
    """The entries of a list or dict, the attributes of an object or a cell."""
    if isinstance(store, dict):
        return dict(store)
    if isinstance(store, list):
        return dict(enumerate(store))
    if isinstance(store, types.CellType):
        with contextlib.suppress(ValueError):  # nothing was assigned yet
            return dict(cell_contents=store.cell_contents)
        return {}
    return changes.attributes(store)


def _write(store, before: dict):
    if isinstance(store, list):
        store[:] = before.values()
    elif isinstance(store, dict):
        store.clear()
        store.update(before)
    else:
        for name in _read(store).keys() - before.keys():
            object.__delattr__(store, name)
        for name, value in before.items():
            object.__setattr__(store, name, value)


def _stores(tree: PyTree) -> list[tuple[Any, str, Any]]:
    """What can be written into, behind its holder and the name that it has there."""
    seen: dict[int, Any] = {}  # keeps what it has seen, and so their numbers
    todo: list[tuple[Any, str, Any]] = [(None, "", tree)]
    stores = []
    while todo:
        holder, name, value = row = todo.pop()
        if type(value) in changes.FIXED or changes.is_data(value) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (list, dict, types.CellType)):
            stores.append(row)
            todo += [(holder, name, part) for part in _read(value).values()]
        elif isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            rest = vars(value), value.__defaults__, value.__kwdefaults__
            names = *value.__code__.co_freevars, "", "", ""
            todo += [(value, *part) for part in zip(names, (*cells, *rest))]
        elif isinstance(value, changes.FUNCTIONS) or changes.is_wrapper(value):
            todo += [(value, *part) for part in changes.contents(value).items()]
        elif isinstance(value, changes.Fixed):
            todo.append((holder, name, value.held))
        elif isinstance(value, tuple) or changes.is_of_a_library(value):
            parts = [p for p in changes.flatten_once(value)[0] if p is not value]
            parts += changes.held_by(value).values()
            todo += [(holder, name, part) for part in parts]
        elif not isinstance(value, changes.CODE):
            stores.append((value, "", value))
            todo += [(value, *part) for part in changes.attributes(value).items()]
    return stores
