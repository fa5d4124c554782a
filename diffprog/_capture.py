"""Trees whose functions are taken apart into the numbers they capture and the code.

To JAX a function is one opaque leaf. Here the cells of a closure, its defaults, the
object of a bound method, the arguments of a `functools.partial` and the attributes of
a callable object are leaves as well, so that a changed number is found. What is in a
module's globals is not watched, hence a function is the same one only if it is the
same object: a `lambda` written anew may see other globals.
"""

import dataclasses
import functools as ft
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
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
JITTED = type(jax.jit(lambda: None))
# Closures written there may hold what they like.
LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | set(
    "beartype chex diffrax diffprog equinox flax haiku jax jaxlib jaxtyping lineax "
    "numpy optax optimistix scipy typing_extensions".split()
)


class _Number:
    """Marks the place of a number that is data."""


class _Constant:
    """A number that is part of the program: equal where type and bits are."""

    def __init__(self, number):
        self.number = number
        if isinstance(number, jax.Array):  # never changes, and may be far away
            self.key = (jax.Array, id(number))
            return
        if isinstance(number, np.ndarray):  # may change in place
            self.number = number.copy()
        array = np.asarray(number)
        self.key = (type(number), array.dtype, array.shape, array.tobytes())

    def __eq__(self, other):
        return isinstance(other, _Constant) and self.key == other.key

    def __hash__(self):
        return hash(self.key)


class Same:
    """A part of the program that is looked at no further: equal if identical."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self):
        return id(self.value)


class _Node:
    """What holds other things: rebuilt where numbers are among them, else `original`.

    Equal nodes build things that do the same with the same numbers.
    """

    def __init__(self, original: Any, index: int, key: tuple):
        self.original, self.index, self.key = original, index, key
        self.parts: tuple = ()
        self.has_numbers = False
        self.hash = 0

    def close(self, parts: list) -> "_Node":
        self.parts = tuple(parts)
        self.has_numbers = any(map(_has_numbers, parts))
        self.hash = hash((self.key, self.parts))
        return self

    def __eq__(self, other):
        return self is other or (
            isinstance(other, _Node)
            and self.key == other.key
            and self.parts == other.parts
        )

    def __hash__(self):
        return self.hash


class _Again:
    """A thing that stands elsewhere in the tree, or around this place."""

    def __init__(self, node: _Node):
        self.node = node

    def __eq__(self, other):
        return isinstance(other, _Again) and self.node.index == other.node.index

    def __hash__(self):
        return hash(self.node.index)


def _has_numbers(part) -> bool:
    if isinstance(part, _Node):
        return part.has_numbers
    return part is _Number or isinstance(part, _Again | _Constant)


MANY = 32  # floats in one captured tree, beyond which they are constants
NUMBERS = (float, jax.Array, np.ndarray, np.generic)
PLAIN = frozenset({bool, int, str, bytes, complex, type(None), type(...)})


def is_data(leaf) -> bool:
    return type(leaf) not in PLAIN and isinstance(leaf, NUMBERS)


class Taken:
    """A tree taken apart: `numbers` are data, and `static` is the rest, hashable.

    With `constants` the numbers that functions capture are part of `static` too, unless
    they are traced; `captured` says that the leaves of the tree are such numbers.
    """

    def __init__(self, tree: PyTree, constants: bool = False, captured: bool = False):
        self.numbers: list = []
        self.captured = False  # whether a number is one that a function captures
        self._constants, self._depth, self._many = constants, int(captured), False
        self._seen: dict[int, _Node] = {}
        leaves, treedef = jtu.tree_flatten(tree)
        self.static = treedef, tuple([self._leaf(leaf) for leaf in leaves])

    def _leaf(self, leaf):
        """A leaf of the tree itself."""
        if is_data(leaf):
            return self._number(leaf)
        return self._code(leaf) or self._object(leaf)

    def _number(self, number):
        if self._depth:
            self.captured = True
            # NumPy's integers and masks may be sizes and indices, and a long list of
            # floats would be as many arguments.
            of_numpy = isinstance(number, np.ndarray | np.generic)
            fixed = of_numpy and number.dtype.kind in "biu"
            fixed = fixed or (self._many and isinstance(number, float))
            if (fixed or self._constants) and not isinstance(number, Tracer):
                return _Constant(number)
        if isinstance(number, np.ndarray) and number.dtype.kind not in "biufcV":
            raise TypeError(
                f"A NumPy array of dtype {number.dtype} is no array of numbers."
            )
        # A NumPy float64 scalar is a Python float and counts as one.
        self.numbers.append(float(number) if isinstance(number, float) else number)
        return _Number

    def _code(self, value):
        """Functions and what never changes; `None` for any other object."""
        kind = type(value)
        if kind in PLAIN:
            return kind, value  # the type stands beside the value: True == 1
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return self._method(value)
        if kind is ft.partial:
            return self._partial(value)
        if kind is slice:
            return self._holder(value, (slice, str(value)), {})
        if isinstance(value, CODE) or kind is object:
            return Same(value)
        if callable(value) and hasattr(value, "__wrapped__"):
            return self._wrapper(value)
        record = dataclasses.is_dataclass(value)
        if record and value.__dataclass_params__.frozen:  # pyright: ignore
            return self._object(value)
        if kind.__hash__ in (object.__hash__, None):
            return None
        try:
            hash(value)
        except TypeError:  # it compares by value, but something in it has no hash
            return self._kept(value, _values(value)) if record else None
        return kind, value

    def _function(self, fn: types.FunctionType):
        names = fn.__code__.co_freevars
        parts = {}
        for name, cell in zip(names, fn.__closure__ or (), strict=True):
            try:
                parts[name] = cell.cell_contents
            except ValueError:  # nothing was assigned yet
                parts[name] = None
        defaults, named = fn.__defaults__ or (), fn.__kwdefaults__ or {}
        parts |= {f"default {i}": value for i, value in enumerate(defaults)}
        parts |= {f"default {name}": value for name, value in named.items()}
        return self._holder(fn, (types.FunctionType, Same(fn)), parts)

    def _method(self, method: types.MethodType):
        owner = method.__self__
        if isinstance(owner, type):
            return Same(owner), method.__name__
        return self._holder(
            method, (types.MethodType,), dict(function=method.__func__, owner=owner)
        )

    def _partial(self, partial: ft.partial):
        func, args, keywords = partial.func, partial.args, partial.keywords
        parts = dict(function=func, args=args, keywords=keywords)
        return self._holder(partial, (ft.partial,), parts)

    def _wrapper(self, wrapper: Any):
        """A function behind one of JAX's or Python's wrappers."""
        parts = dict(function=getattr(wrapper, "__wrapped__"))  # noqa: B009
        # Only `jax.jit` can be left out and the function called as it is.
        if isinstance(wrapper, JITTED):
            return self._holder(wrapper, (JITTED,), parts)
        return self._kept(wrapper, parts)

    def _kept(self, value, parts: dict[str, Any]):
        """A thing that cannot be rebuilt: the numbers in it are constants."""
        before, self._constants = self._constants, True
        node = self._holder(value, (Same(value),), parts)
        self._constants = before
        return node

    def _object(self, value):
        """An object by its attributes."""
        kind = type(value)
        if not _is_plain(kind):
            self._refuse(value, "")
        fields = {name: getattr(value, name) for name in _names(value)}
        return self._holder(value, (object, Same(kind), *fields), fields)

    def _holder(self, value, key: tuple, parts: dict[str, Any]):
        if id(value) in self._seen:
            return _Again(self._seen[id(value)])
        node = self._seen[id(value)] = _Node(value, len(self._seen), key)
        self._depth += 1
        taken = [self._captured(part, value, name) for name, part in parts.items()]
        self._depth -= 1
        return node.close(taken)

    def _captured(self, value, holder, name: str):
        """A value that a function or an object holds."""
        if is_data(value):
            return self._number(value)
        try:
            leaves, treedef = jtu.tree_flatten(value)
        except (TypeError, ValueError):  # such as keys of a dict without an order
            leaves, treedef = [value], None
        if len(leaves) != 1 or leaves[0] is not value:
            before, self._many = self._many, len(leaves) > MANY
            parts = [self._captured(leaf, holder, name) for leaf in leaves]
            self._many = before
            return _Node(value, -1, (treedef,)).close(parts)
        if isinstance(holder, types.MethodType) and name == "owner":
            return self._code(value) or self._object(value)
        found = self._code(value)
        if found is None and not _is_of_library(holder, value):
            self._refuse(value, _describe(holder, name))
        return Same(value) if found is None else found

    def _refuse(self, value, where: str):
        kind = type(value)
        place = where or "A part of what was given is"
        raise TypeError(
            f"{place} an object of type `{kind.__name__}`: it can change without "
            "notice, and a program that was compiled before would give the old answer. "
            "Give an `equinox.Module` or a frozen dataclass in its place, or the "
            "numbers in it. What never changes may also be a global, or a field "
            "`equinox.field(static=True)` of a module."
        )


def _describe(holder, name: str) -> str:
    if isinstance(holder, types.FunctionType):
        code = holder.__code__
        where = f"`{holder.__qualname__}` (line {code.co_firstlineno})"
        verb = "has as a default" if name.startswith("default ") else "captures"
        return f"{where} {verb} `{name.removeprefix('default ')}`,"
    if isinstance(holder, ft.partial):
        called = getattr(holder.func, "__qualname__", holder.func)
        return f"A `functools.partial` of `{called}` holds"
    return f"An object of type `{type(holder).__name__}` holds `{name}`,"


def _is_of_library(holder, value) -> bool:
    if isinstance(holder, types.FunctionType):
        if holder.__globals__.get("__name__", "").split(".")[0] in LIBRARIES:
            return True
    module = type(value).__module__
    return module.split(".")[0] in ("jax", "jaxlib", "equinox", "typing")


@ft.cache
def _is_plain(kind: type) -> bool:
    """Whether the attributes of an object are all that it is."""
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _names(value) -> Iterator[str]:
    yield from getattr(value, "__dict__", ())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name


def _values(value) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def put_together(static, numbers) -> PyTree:
    """The tree of `Taken`, with numbers in their places."""
    treedef, leaves = static
    builder = _Builder(iter(numbers))
    return jtu.tree_unflatten(treedef, [builder.build(leaf) for leaf in leaves])


class _Builder:
    def __init__(self, numbers: Iterator):
        self.numbers = numbers
        self.built: dict[int, Any] = {}

    def build(self, part):
        if part is _Number:
            return next(self.numbers)
        if isinstance(part, _Constant):
            return part.number
        if isinstance(part, Same):
            return part.value
        if isinstance(part, _Again):
            return self.built.get(part.node.index, part.node.original)
        if not isinstance(part, _Node):
            owner, value = part
            return getattr(owner.value, value) if isinstance(owner, Same) else value
        if not part.has_numbers:
            return part.original
        return self._node(part)

    def _node(self, node: _Node):
        kind, original = node.key[0], node.original
        if kind is types.FunctionType:
            return self._function(node)
        if kind is object:
            new = self.built[node.index] = object.__new__(type(original))
            for name, part in zip(node.key[2:], node.parts, strict=True):
                object.__setattr__(new, name, self.build(part))
            return new
        parts: list[Any] = [self.build(part) for part in node.parts]
        if kind is types.MethodType:
            new = types.MethodType(*parts)
        elif kind is ft.partial:
            new = ft.partial(parts[0], *parts[1], **parts[2])
        elif kind is JITTED:
            (new,) = parts
        elif isinstance(kind, Same):
            new = original
        else:
            return jtu.tree_unflatten(kind, parts)
        self.built[node.index] = new
        return new

    def _function(self, node: _Node):
        old = node.original
        cells = tuple(types.CellType() for _ in old.__closure__ or ())
        new = types.FunctionType(
            old.__code__, old.__globals__, old.__name__, None, cells or None
        )
        self.built[node.index] = new
        new.__qualname__, new.__module__ = old.__qualname__, old.__module__
        new.__dict__.update(old.__dict__)
        values = [self.build(part) for part in node.parts]
        for cell, before in zip(cells, old.__closure__ or (), strict=True):
            value = values.pop(0)
            try:
                before.cell_contents
            except ValueError:
                continue
            cell.cell_contents = value
        num = len(old.__defaults__ or ())
        new.__defaults__ = tuple(values[:num]) or None
        if old.__kwdefaults__:
            named = zip(old.__kwdefaults__, values[num:], strict=True)
            new.__kwdefaults__ = dict(named)
        return new


class Frozen:
    """A tree as part of a program: its numbers, captured ones too, are constants."""

    def __init__(self, tree: PyTree):
        self.__name__ = getattr(tree, "__name__", type(tree).__name__)
        taken = Taken(tree, constants=True, captured=True)
        self.static, self.traced = taken.static, tuple(taken.numbers)

    def _key(self):
        return self.static, tuple(map(id, self.traced))

    def __hash__(self):
        return hash(self._key())

    def __eq__(self, other):
        return isinstance(other, Frozen) and self._key() == other._key()

    def __call__(self, *args):
        """What a frozen function returns."""
        return self.tree()(*args)

    def tree(self) -> PyTree:
        return put_together(self.static, self.traced)
