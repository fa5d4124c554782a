"""Trees whose functions are taken apart into the numbers they capture and the code.

To JAX a function is one opaque leaf. Here the cells of a closure, its defaults, the
object of a bound method, the arguments of a `functools.partial` and the attributes of
a callable object are leaves as well, so that a changed number is found. What is in a
module's globals is not watched, hence a function is the same one only if it is the
same object: a `lambda` written anew may see other globals.

What a pytree holds beside its children, as in static fields, JAX compares by `==` and
by reference. Where it can change it is compared by its contents at the time instead.
"""

import contextlib
import dataclasses
import functools as ft
import sys
import types
import weakref
from collections import defaultdict, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
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


_OPEN = "open"  # the kind of a node that holds more than its children


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
FIXED = PLAIN | {float, object}


def is_data(leaf) -> bool:
    return type(leaf) not in PLAIN and isinstance(leaf, NUMBERS)


def _flatten_once(node) -> tuple[list, Any]:
    return jtu.tree_flatten(node, is_leaf=lambda part: part is not node)


CONTAINERS = tuple, list, dict, OrderedDict, defaultdict, type(None)
_ANY = ("aux_data",)  # JAX's name, where the static fields have no known ones
_STATIC: dict[type, tuple[str, ...]] = {}  # names of static fields


def _static_names(node) -> tuple[str, ...]:
    kind = type(node)
    if kind in CONTAINERS or jtu.all_leaves([node]):
        return ()
    if isinstance(node, eqx.Module):
        fields = dataclasses.fields(node)  # pyright: ignore
        return tuple(f.name for f in fields if f.metadata.get("static"))
    if isinstance(node, tuple) and _flatten_once(node)[1].node_data()[1] is None:
        return ()  # with names
    is_library = _root(kind) in LIBRARIES and kind is not jtu.Partial
    return () if is_library else _ANY


def _held(node) -> dict[str, Any]:
    """What a node of a tree holds beside its children."""
    kind = type(node)
    names = _STATIC.get(kind)
    if names is None:
        names = _STATIC[kind] = _static_names(node)
    if not names:
        return {}
    if names is _ANY:
        return dict.fromkeys(names, _flatten_once(node)[1].node_data()[1])
    values = object.__getattribute__(node, "__dict__")  # past the slow one of a module
    return {name: values[name] for name in names if name in values}


def _is_open(node) -> bool:
    """Whether a node holds beside its children what can change."""
    if _STATIC.get(type(node)) == ():
        return False
    for value in _held(node).values():
        if type(value) not in FIXED and not _is_fixed(value):
            return True
    return False


def _is_fixed(value) -> bool:
    """Whether a value is known never to change, without a closer look."""
    kind = type(value)
    if kind in FIXED:
        return True
    if kind is tuple:
        return all(map(_is_fixed, value))
    if kind is types.FunctionType:
        if value.__closure__ and value.__code__.co_freevars != ("__class__",):
            return False
        defaults = value.__defaults__, *(value.__kwdefaults__ or {}).values()
        return all(map(_is_fixed, (*defaults, *_own(value).values())))
    if dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen:  # pyright: ignore
        return all(_is_fixed(getattr(value, name)) for name in _names(value))
    return isinstance(value, (*CODE, np.dtype, np.generic, Same, Frozen))


def _own(fn: types.FunctionType) -> dict[str, Any]:
    """The attributes of a function, but for those that decorators leave there."""
    return {f".{k}": v for k, v in fn.__dict__.items() if not k.startswith("_")}


FUNCTIONS = types.FunctionType, types.MethodType, ft.partial
_FIRST = weakref.WeakKeyDictionary()  # what a function captured at first


def _check_unchanged(fn: Callable, traced: bool):
    """Refuses a function that is not rebuilt and captures what it did not at first.

    `jax.lax.scan` and others keep what they traced of the same function. It may change
    what it captures itself, while it is traced.
    """
    if _is_fixed(fn):
        return
    now = hash(Frozen(fn))
    if traced:
        _FIRST[fn] = now
    elif _FIRST.setdefault(fn, now) != now:
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(
            f"The function `{name}` is in a static field or a `jax.tree_util.Partial`, "
            "and what it captures has changed: what was traced of it before would give "
            "the old answer. Make what changes a field of the module, or the function "
            "a field that is not static (without `static=True`), or an "
            "`equinox.Partial`."
        )


def is_list(node, size: int | None) -> bool:
    """Whether a node of a tree is a list or tuple of so many numbers."""
    if type(node) not in (list, tuple) or len(node) != size:
        return False
    is_number = lambda part: isinstance(part, (int, *NUMBERS)) and np.ndim(part) == 0
    return all(is_number(part) and not isinstance(part, bool) for part in node)


def can_change(tree: PyTree) -> bool:
    """Whether a node of the tree holds beside its children what can change."""
    return any(map(_is_open, jtu.tree_leaves(tree, is_leaf=_is_open)))


def check_held(tree: PyTree):
    """Refuses nodes that hold what `jax.jit` alone would not see when it changes."""
    for node in filter(_is_open, jtu.tree_leaves(tree, is_leaf=_is_open)):
        for name, value in _held(node).items():
            if not _is_fixed(value):
                _refuse(value, _describe(node, name), static=True)
        check_held(_flatten_once(node)[0])


class Taken:
    """A tree taken apart: `numbers` are data, and `static` is the rest, hashable.

    With `constants` the numbers that functions capture are part of `static` too, unless
    they are traced; `captured` says that the leaves of the tree are such numbers. Lists
    and tuples of `size` numbers are one of `numbers` each; `traced` says that the tree
    was traced just now.
    """

    def __init__(
        self,
        tree: PyTree,
        constants: bool = False,
        captured: bool = False,
        size: int | None = None,
        traced: bool = False,
    ):
        self.numbers: list = []
        self.captured = False  # whether a number is one that a function captures
        self._constants, self._depth, self._many = constants, int(captured), False
        self._kept = False  # whether inside of what is not rebuilt
        self._static = False  # whether inside of what a node holds
        self._seen: dict[int, _Node] = {}
        self._size, self._traced = size, traced
        leaves, treedef = self._flatten(tree)
        self.static = treedef, tuple([self._leaf(leaf) for leaf in leaves])

    def _flatten(self, tree: PyTree) -> tuple[list, Any]:
        """Leaves and structure; what is to be looked at as a whole is a leaf."""
        if self._size is None:
            return jtu.tree_flatten(tree, is_leaf=_is_open)
        is_leaf = lambda node: is_list(node, self._size) or _is_open(node)
        return jtu.tree_flatten(tree, is_leaf=is_leaf)

    def _leaf(self, leaf):
        """A leaf of the tree itself."""
        if is_data(leaf):
            return self._number(leaf)
        if is_list(leaf, self._size):
            return self._list(leaf)
        if _is_open(leaf):
            return self._open(leaf, self._leaf)
        return self._code(leaf) or self._object(leaf)

    def _number(self, number):
        if isinstance(number, np.ndarray) and number.dtype.hasobject:
            _refuse_array(number)
        if self._kept:
            return _Constant(number)
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
            _refuse_array(number)
        # A NumPy float64 scalar is a Python float and counts as one.
        self.numbers.append(float(number) if isinstance(number, float) else number)
        return _Number

    def _list(self, numbers: Sequence):
        if self._kept:
            return tuple, tuple(map(_Constant, numbers))
        self.numbers.append(numbers)
        return _Number

    def _code(self, value):
        """Functions and what never changes; `None` for any other object."""
        kind = type(value)
        if kind in PLAIN:
            return kind, value  # the type stands beside the value: True == 1
        if self._static and kind in FUNCTIONS:
            _check_unchanged(value, self._traced)
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
            return self._keep(value, _values(value)) if record else None
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
        own = _own(fn)
        return self._holder(fn, (types.FunctionType, Same(fn), *own), parts | own)

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
        return self._keep(wrapper, parts)

    def _keep(self, value, parts: dict[str, Any]):
        """A thing that cannot be rebuilt: the numbers in it are constants."""
        with self._keeping():
            return self._holder(value, (Same(value),), parts)

    @contextlib.contextmanager
    def _keeping(self):
        if self._kept:
            yield
            return
        # What stands elsewhere too may be data there.
        before, self._seen, self._kept = self._seen, {}, True
        try:
            yield
        finally:
            self._seen, self._kept = before, False

    def _open(self, node, take: Callable):
        """A node of a tree with what it holds beside its children, by contents."""
        before, self._static = self._static, True
        with self._keeping():
            held = {
                name: self._captured(value, node, name)
                for name, value in _held(node).items()
            }
        self._static = before
        leaves, treedef = self._flatten(_flatten_once(node)[0])
        key = _OPEN, Same(type(node)), treedef, *held.items()
        return _Node(node, -1, key).close([take(leaf) for leaf in leaves])

    def _object(self, value):
        """An object by its attributes."""
        kind = type(value)
        if not _is_plain(kind):
            _refuse(value, "")
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
            leaves, treedef = self._flatten(value)
        except (TypeError, ValueError):  # such as keys of a dict without an order
            leaves, treedef = [value], None
        if len(leaves) != 1 or leaves[0] is not value:
            before, self._many = self._many, len(leaves) > MANY
            parts = [self._captured(leaf, holder, name) for leaf in leaves]
            self._many = before
            return _Node(value, -1, (treedef,)).close(parts)
        if is_list(value, self._size):
            return self._list(value)
        if _is_open(value):
            return self._open(value, lambda part: self._captured(part, holder, name))
        if isinstance(holder, types.MethodType) and name == "owner":
            return self._code(value) or self._object(value)
        found = self._code(value)
        if found is None and not _is_of_library(holder, value):
            _refuse(value, _describe(holder, name), name in _held(holder))
        return Same(value) if found is None else found


def _refuse(value, where: str, static: bool = False):
    kind = type(value)
    place = where or "A part of what was given is"
    advice = (
        "Make it a field that is not static (without `static=True`), or give a tuple "
        "or a frozen dataclass in its place."
        if static
        else "Give an `equinox.Module` or a frozen dataclass in its place, or the "
        "numbers in it. What never changes may also be a global."
    )
    raise TypeError(
        f"{place} an object of type `{kind.__name__}`: it can change without "
        "notice, and a program that was compiled before would give the old answer. "
        + advice
    )


def _refuse_array(array: np.ndarray):
    raise TypeError(f"A NumPy array of dtype {array.dtype} is no array of numbers.")


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
    return _root(type(value)) in ("jax", "jaxlib", "equinox", "typing")


def _root(kind: type) -> str:
    return kind.__module__.split(".")[0]


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
        if isinstance(kind, Same):  # kept
            return original
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
        elif kind is _OPEN:
            children = jtu.tree_unflatten(node.key[2], parts)
            return jtu.tree_unflatten(_flatten_once(original)[1], children)
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
            new.__kwdefaults__ = dict(zip(old.__kwdefaults__, values[num:]))
        names = [name.removeprefix(".") for name in node.key[2:]]
        new.__dict__.update(zip(names, values[len(values) - len(names) :]))
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
