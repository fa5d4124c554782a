"""Functions that are written anew, known again by their code.

A function made by the same lines as another is the same program, but for what it
captures, if all that these lines read of the globals of their module is the same, and
so is what functions among that read. Of numbers, functions and libraries this can be
said. A class, an object or a module of the user's may have changed inside: a function
that reads one is like no other.
"""

import dis
import functools as ft
import types
import weakref
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .changes import contents, is_a_library, is_code, is_wrapper, PLAIN, Same


MANY = 1000  # bytes of a NumPy array, beyond which it is like no other

LOADS = "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"

# Neither keeps a function alive: a program that was compiled with it does.
_FIRST: Any = weakref.WeakValueDictionary()  # functions by their code and its globals
_KNOWN: Any = weakref.WeakKeyDictionary()  # the first one of each function


def first_alike(fn: types.FunctionType) -> types.FunctionType:
    """The first function that does the same as this one with what both capture.

    Globals are read when a function is first seen.
    """
    known = _KNOWN.get(fn)
    first = known and known()
    if first is None:
        try:
            first = _FIRST.setdefault(_written(fn, {}), fn)
        except _Unknown:
            first = fn
        _KNOWN[fn] = weakref.ref(first)
    return first


class _Unknown(Exception):
    """Something may change unseen."""


def _written(fn: types.FunctionType, seen: dict[int, int]) -> tuple:
    """The code of a function, and what it reads, as something to be compared."""
    seen[id(fn)] = len(seen)
    given, own = fn.__globals__, (Same(fn.__code__), Same(fn.__globals__))
    if is_a_library(given.get("__name__", "")):
        return own
    names = [name for name in _names(fn.__code__) if name in given]
    return *own, *((name, _read(given[name], seen)) for name in names)


@ft.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> list[str]:
    """The globals that it reads, and the functions inside of it."""
    names = set()
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME" and not is_a_library(step.argval):
            raise _Unknown
        if step.opname in LOADS:
            names.add(step.argval)
    if names & {"eval", "exec", "globals", "__import__"}:
        raise _Unknown
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return sorted(names.union(*map(_names, inner)))


def _read(value: Any, seen: dict[int, int]) -> Any:
    kind = type(value)
    if kind in PLAIN or kind is float:
        return kind, repr(value)
    if kind is tuple:
        return tuple(_read(part, seen) for part in value)
    if isinstance(value, np.ndarray | np.generic) and value.nbytes <= MANY:
        if not value.dtype.hasobject:
            return value.dtype, value.shape, value.tobytes()
    if id(value) in seen:
        return seen[id(value)]
    is_function = isinstance(value, types.FunctionType)
    if is_function or is_wrapper(value):
        own = _written(value, seen) if is_function else (Same(value),)
        held = contents(value).items()
        return *own, *((name, _read(part, seen)) for name, part in held)
    if isinstance(value, types.ModuleType):
        lasting = is_a_library(value.__name__)
    elif isinstance(value, type):
        lasting = is_a_library(value.__module__)
    else:
        is_array = isinstance(value, jax.Array) and not isinstance(value, Tracer)
        lasting = is_array or is_code(value)
    if lasting:
        return Same(value)
    raise _Unknown
