"""What is data in a tree, what never changes, and what else may change unseen.

A node of a pytree holds things beside its children: the static fields of a module, the
`aux_data` of other nodes. JAX compares these by `==` and by reference, so where one can
change (a dict, an ordinary object, a function that captures one) a program of before
would give the old answer. Such a node is open, and what is known never to change fixed.
"""

import contextvars
import dataclasses
import functools as ft
import sys
import types
import weakref
from collections import defaultdict, OrderedDict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree


# Types whose objects are the same program as long as they are the same object.
CODE = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    np.ufunc,
)
# What has a hash and leads to something that can change.
LINKS = types.BuiltinFunctionType, weakref.ref, contextvars.ContextVar, memoryview
# Closures written there may hold what they like.
LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | set(
    "beartype chex diffrax diffprog equinox flax haiku jax jaxlib jaxtyping lineax "
    "numpy optax optimistix scipy typing_extensions".split()
)
# What they define does not change, such as the marks of options that were not given.
TRUSTED = ("jax", "jaxlib", "equinox", "typing", "diffrax", "optimistix", "lineax")

OF_NUMPY = np.ndarray, np.generic
NUMBERS = float, *OF_NUMPY, jax.Array
PLAIN = frozenset({bool, int, str, bytes, complex, type(None), type(...)})
FIXED = PLAIN | {float, object}


class Fixed:
    """What never changes: equal where the `key` is."""

    key: Any
    held: PyTree = None  # what a function in it may write to

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


class Same(Fixed):
    """A part of the program that is looked at no further: equal if identical."""

    def __init__(self, value):
        self.value, self.key = value, id(value)


def is_data(leaf) -> bool:
    return type(leaf) not in PLAIN and isinstance(leaf, NUMBERS)


def flatten_once(node) -> tuple[list, Any]:
    return jtu.tree_flatten(node, is_leaf=lambda part: part is not node)


DICTS = frozenset({dict, OrderedDict, defaultdict})
CONTAINERS = DICTS | {tuple, list, type(None)}
_ANY = ("aux_data",)  # JAX's name, where the static fields have no known ones
_STATIC: dict[type, tuple[str, ...]] = {}  # names of static fields


def _static_names(node) -> tuple[str, ...]:
    kind = type(node)
    if kind in CONTAINERS or jtu.all_leaves([node]):
        return ()
    if isinstance(node, eqx.Module):
        fields = dataclasses.fields(node)  # pyright: ignore
        return tuple(f.name for f in fields if f.metadata.get("static"))
    if isinstance(node, tuple) and flatten_once(node)[1].node_data()[1] is None:
        return ()  # with names
    known = is_a_library(kind.__module__) and kind is not jtu.Partial
    return () if known else _ANY


def held_by(node) -> dict[str, Any]:
    """What a node of a tree holds beside its children."""
    kind = type(node)
    names = _STATIC.get(kind)
    if names is None:
        names = _STATIC[kind] = _static_names(node)
    if not names:
        return {}
    if names is _ANY:
        return dict.fromkeys(names, flatten_once(node)[1].node_data()[1])
    values = object.__getattribute__(node, "__dict__")  # past the slow one of a module
    return {name: values[name] for name in names if name in values}


def is_open(node) -> bool:
    """Whether a node holds beside its children what can change."""
    if not _STATIC.get(type(node), True):
        return False
    for value in held_by(node).values():
        if type(value) not in FIXED and not is_fixed(value):
            return True
    return False


def is_whole(node) -> bool:
    """Whether what a function captures is not for JAX to flatten."""
    return type(node) in DICTS or is_open(node)


def is_fixed(value) -> bool:
    """Whether a value is known never to change, without a closer look."""
    kind = type(value)
    if kind in FIXED:
        return True
    if kind is tuple:
        return all(map(is_fixed, value))
    if kind is types.FunctionType:
        if value.__closure__ and value.__code__.co_freevars != ("__class__",):
            return False
        return all(map(is_fixed, _in_function(value).values()))
    if is_record(value, frozen=True):
        return all(map(is_fixed, attributes(value).values()))
    return is_code(value) or isinstance(value, (np.dtype, np.generic, Fixed))


def is_code(value) -> bool:
    """Whether it is code alone, and no built-in method of what can change."""
    if isinstance(value, types.BuiltinFunctionType):
        owner = value.__self__  # a module; a capsule in extensions
        return is_fixed(owner) or type(owner).__name__ == "PyCapsule"
    return isinstance(value, CODE)


def is_record(value, frozen: bool = False) -> bool:
    """Whether it is a dataclass, or a frozen one."""
    params = getattr(type(value), "__dataclass_params__", None)
    return params is not None and (params.frozen or not frozen)


def fields_of(record) -> dict[str, Any]:
    """Those that are compared; there may be more inside, as in Flax linen."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


class Unassigned:
    """Stands for the content of a cell to which nothing was assigned yet."""


def is_wrapper(value) -> bool:
    return callable(value) and hasattr(value, "__wrapped__")


def contents(value) -> dict[str, Any]:
    """What a function or an object holds, by name."""
    if isinstance(value, types.FunctionType):
        return _in_function(value)
    if isinstance(value, types.MethodType):
        return dict(function=value.__func__, owner=value.__self__)
    if isinstance(value, ft.partial):
        return dict(function=value.func, args=value.args, keywords=value.keywords)
    if is_wrapper(value):
        return dict(function=getattr(value, "__wrapped__"))  # noqa: B009
    return attributes(value)


def _in_function(fn: types.FunctionType) -> dict[str, Any]:
    """Cells, defaults, and the attributes but for those that decorators leave."""
    parts = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        try:
            parts[name] = cell.cell_contents
        except ValueError:
            parts[name] = Unassigned
    if fn.__defaults__ or fn.__kwdefaults__:
        defaults = defaults_of(fn) | (fn.__kwdefaults__ or {})
        parts |= {f"default {name}": value for name, value in defaults.items()}
    for name, value in fn.__dict__.items():
        if name[0] != "_":
            parts[f".{name}"] = value
    return parts


def defaults_of(fn: types.FunctionType) -> dict[str, Any]:
    """Those of the arguments that may be given by position."""
    code, values = fn.__code__, fn.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return dict(zip(names, values, strict=True))


def attributes(value) -> dict[str, Any]:
    names = [*getattr(value, "__dict__", ()), *_slots(type(value))]
    return {n: getattr(value, n) for n in names if hasattr(value, n)}


@ft.cache
def _slots(kind: type) -> tuple[str, ...]:
    """The names of the attributes that are not in a `__dict__`."""
    found: dict[str, None] = {}
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found |= dict.fromkeys([slots] if isinstance(slots, str) else slots)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


FUNCTIONS = types.FunctionType, types.MethodType, ft.partial
_FIRST = weakref.WeakKeyDictionary()  # what a function captured at first
_LOOKED_AT: set[int] = set()  # functions that may lead back to themselves


def check_unchanged(value, frozen: Callable, traced: bool):
    """Refuses a function that is not rebuilt and captures what it did not at first.

    `jax.lax.scan` and others keep what they traced of the same function. It may change
    what it captures itself, while it is traced.
    """
    again = id(value) in _LOOKED_AT
    if again or type(value) not in FUNCTIONS or is_fixed(value):
        return
    _LOOKED_AT.add(id(value))
    try:
        captured = hash(frozen(value))
    finally:
        _LOOKED_AT.remove(id(value))
    if traced:
        _FIRST[value] = captured
    elif _FIRST.setdefault(value, captured) != captured:
        name = getattr(value, "__qualname__", repr(value))
        raise TypeError(
            f"The function `{name}` is in an `equinox.filter_jit`, a static field or a "
            "`jax.tree_util.Partial`, and what it captures has changed: what was "
            "traced of it before would give the old answer. Make what changes a field "
            "of the module, or the function one without `static=True` or an "
            "`equinox.Partial`; the `filter_jit` may be left out."
        )


def is_list(node, size: int | None) -> bool:
    """Whether a node of a tree is a list or tuple of so many alike, all of numbers."""
    return type(node) in (list, tuple) and len(node) == size and bool(shape_of(node))


def shape_of(part) -> tuple[int, ...] | None:
    """That of an array, of a number, or of lists of these that are alike."""
    if type(part) in (list, tuple):
        shapes = set(map(shape_of, part))
        inner = shapes.pop() if len(shapes) == 1 else None
        return None if inner is None else (len(part), *inner)
    is_number = isinstance(part, (int, *NUMBERS)) and not isinstance(part, bool)
    return np.shape(part) if is_number else None


def can_change(tree: PyTree) -> bool:
    """Whether a node of the tree holds beside its children what can change."""
    return any(map(is_open, jtu.tree_leaves(tree, is_leaf=is_open)))


def check_held(tree: PyTree):
    """Refuses nodes that hold what `jax.jit` alone would not see when it changes."""
    for node in filter(is_open, jtu.tree_leaves(tree, is_leaf=is_open)):
        for name, value in held_by(node).items():
            if not is_fixed(value):
                refuse(value, node, name)
        check_held(flatten_once(node)[0])


def refuse(value, holder: Any = None, name: str = ""):
    what = "A part of what was given is" if holder is None else place(holder, name)
    if isinstance(value, OF_NUMPY):
        raise TypeError(
            f"{what} a NumPy array of dtype {value.dtype}, which is no array of "
            "numbers: give `array.astype(float)`, or each of its fields on its own."
        )
    advice = (
        "Make it a field that is not static (without `static=True`), or give a tuple "
        "or a frozen dataclass in its place."
        if name in held_by(holder)
        else "Give an `equinox.Module` or a frozen dataclass in its place, or the "
        "numbers in it. What never changes may also be a global."
    )
    raise TypeError(
        f"{what} an object of type `{type(value).__name__}`: it can change without "
        "notice, and a program that was compiled before would give the old answer. "
        + advice
    )


def place(holder, name: str) -> str:
    if isinstance(holder, types.FunctionType):
        code = holder.__code__
        where = f"`{holder.__qualname__}` (line {code.co_firstlineno})"
        verb = "has as a default" if name.startswith("default ") else "captures"
        return f"{where} {verb} `{name.removeprefix('default ')}`,"
    if isinstance(holder, ft.partial):
        called = getattr(holder.func, "__qualname__", holder.func)
        return f"A `functools.partial` of `{called}` holds"
    return f"An object of type `{type(holder).__name__}` holds `{name}`,"


def is_of_library(holder, value) -> bool:
    if isinstance(holder, types.FunctionType):
        if is_a_library(holder.__globals__.get("__name__", "")):
            return True
    return _root(type(value).__module__) in TRUSTED


def is_of_a_library(value) -> bool:
    return is_a_library(type(value).__module__)


def is_a_library(module: str) -> bool:
    return _root(module) in LIBRARIES


def _root(module: str) -> str:
    return module.split(".")[0]


@ft.cache
def is_plain(kind: type) -> bool:
    """Whether the attributes of an object are all that it is."""
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True
