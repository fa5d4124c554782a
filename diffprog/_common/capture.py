"""Trees whose functions are taken apart into the numbers they capture and the code.

To JAX a function is one opaque leaf. Here the cells of a closure, its defaults, the
object of a bound method, the arguments of a `functools.partial` and the attributes of
a callable object are leaves as well, so that a changed number is found. What is in a
module's globals is not watched; a function made anew may see others: see `code`. What
a node holds beside its children, see `changes`, is compared by its contents. JAX sorts
the keys of a dict; one that a function captures keeps its order, part of the program.

There are two ways to split data from code. At the `door` all floats are data, so that a
new number of a problem does not compile again. What is `Frozen` has floats that are
code: a layer asks for the value of its own (the rate of a dropout), and JAX asks that
functions with custom derivatives and static fields can be compared.
"""

import contextlib
import functools as ft
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .changes import (
    check_unchanged,
    contents,
    defaults_of,
    DICTS,
    fields_of,
    Fixed,
    flatten_once,
    held_by,
    is_code,
    is_list,
    is_of_library,
    is_open,
    is_plain,
    is_record,
    is_whole,
    is_wrapper,
    LINKS,
    NUMBERS,
    OF_NUMPY,
    PLAIN,
    refuse,
    Same,
    Unassigned,
)
from .code import first_alike
from .written import taken_back


JITTED = type(jax.jit(lambda: None))
_OPEN = "open"  # the kind of a node that holds more than its children
MANY = 32  # floats in one captured tree, beyond which they are constants


class _Number:
    """Marks the place of a number that is data."""


class _Constant(Fixed):
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


class _Node:
    """What holds other things: rebuilt where numbers are among them, else `original`.

    Equal nodes build things that do the same with the same numbers.
    """

    def __init__(self, original: Any, index: int, key: tuple):
        self.original, self.index, self.key = original, index, key
        self.parts, self.has_numbers, self.hash = (), False, 0

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


class _Again(Fixed):
    """A thing that stands elsewhere in the tree, or around this place."""

    def __init__(self, node: _Node):
        self.node, self.key = node, node.index


def _has_numbers(part) -> bool:
    if type(part) is _Node:
        return part.has_numbers
    return part is _Number or type(part) in (_Again, _Constant)


class Taken:
    """A tree taken apart: `numbers` are data, and `static` is the rest, hashable.

    With `constants` the numbers that functions capture are part of `static` too, unless
    they are traced; `captured` says that the leaves of the tree are such numbers. Lists
    and tuples of `size` numbers are one of `numbers` each; `traced` says that the tree
    was traced just now.
    """

    def __init__(self, tree, constants=False, captured=False, size=None, traced=False):
        self.floats: list[float] = []
        self.others: list = []
        self._places: list[int] = []  # of the floats
        self.captured = False  # whether a number is one that a function captures
        self._constants, self._depth, self._many = constants, int(captured), False
        self._kept = False  # whether inside of what is not rebuilt
        self._static = False  # whether inside of what a node holds
        self._seen: dict[int, _Node] = {}
        self._size, self._traced = size, traced
        leaves, treedef = self._flatten(tree)
        self.static = treedef, tuple(map(self._take, leaves)), tuple(self._places)

    @property
    def numbers(self) -> list:
        return in_order(self.static, self.floats, self.others)

    def _flatten(self, tree: PyTree, is_leaf: Callable = is_open) -> tuple[list, Any]:
        """Leaves and structure; what is to be looked at as a whole is a leaf."""
        size = None if self._kept else self._size
        either = lambda node: is_list(node, size) or is_leaf(node)
        return jtu.tree_flatten(tree, is_leaf if size is None else either)

    def _take(self, value, holder=None, name: str = ""):
        """A leaf of the tree, or a value that a function or an object holds."""
        kind = type(value)
        if kind in PLAIN:
            return kind, value  # the type stands beside the value: True == 1
        if kind is types.FunctionType:
            return self._code(value)
        if isinstance(value, NUMBERS):
            return self._number(value, holder, name)
        if id(value) in self._seen and (kind in DICTS or not self._static):
            return _Again(self._seen[id(value)])
        if kind in DICTS:
            return self._dict(value, holder, name)
        if holder is not None:
            leaves, treedef = self._flatten(value, is_whole)
            if len(leaves) != 1 or leaves[0] is not value:
                parts = self._parts(leaves, holder, name)
                return _Node(value, -1, (treedef,)).close(parts)
        if is_list(value, self._size) and not self._kept:
            self.others.append(value)
            return _Number
        if is_open(value):
            return self._open(value, holder, name)
        found = self._code(value)
        if found is None and (holder is None or type(holder) is types.MethodType):
            return self._object(value)
        if found is None and not is_of_library(holder, value):
            refuse(value, holder, name)
        return Same(value) if found is None else found

    def _number(self, number, holder, name: str):
        of_numpy = isinstance(number, OF_NUMPY)
        if of_numpy and number.dtype.hasobject:
            refuse(number, holder, name)
        if self._kept:
            return _Constant(number)
        if self._depth:
            self.captured = True
            # NumPy's integers and masks may be sizes and indices, and a long list of
            # floats would be as many arguments.
            fixed = of_numpy and number.dtype.kind in "biu"
            fixed = fixed or (self._many and isinstance(number, float))
            if (fixed or self._constants) and not isinstance(number, Tracer):
                return _Constant(number)
        if of_numpy and (number.dtype.names or number.dtype.kind not in "biufcV"):
            refuse(number, holder, name)
        if isinstance(number, float):  # a NumPy float64 scalar as well
            self._places.append(len(self.floats) + len(self.others))
            self.floats.append(float(number))
        else:
            self.others.append(number)
        return _Number

    def _code(self, value):
        """Functions and what never changes; `None` for any other object."""
        kind = type(value)
        if self._static:
            check_unchanged(value, Frozen, self._traced)
        if kind is types.FunctionType:
            parts, same = contents(value), (kind, first_alike(value))
            return self._holder(value, *same, parts=parts) if parts else same
        if kind is types.MethodType and isinstance(value.__self__, type):
            return Same(value.__self__), value.__name__
        if kind in (types.MethodType, ft.partial):
            return self._holder(value, kind)
        if kind is slice:
            return self._holder(value, kind, str(value))
        if is_code(value) or kind is object:
            return Same(value)
        if isinstance(value, JITTED):  # left out: the function is called as it is
            return self._holder(value, JITTED)
        if is_wrapper(value):
            return self._keep(value, contents(value))
        if is_record(value, frozen=True):
            return self._object(value)
        if kind.__hash__ in (object.__hash__, None) or kind in LINKS:
            return None
        try:
            hash(value)
        except TypeError:  # it compares by value, but something in it has no hash
            return self._keep(value, fields_of(value)) if is_record(value) else None
        return kind, value

    def _keep(self, value, parts: dict[str, Any]):
        """A thing that cannot be rebuilt: the numbers in it are constants."""
        with self._keeping():
            return self._holder(value, Same(value), parts=parts)

    @contextlib.contextmanager
    def _keeping(self):
        before = self._seen, self._kept
        # What stands elsewhere too may be data there.
        self._seen, self._kept = self._seen if self._kept else {}, True
        try:
            yield
        finally:
            self._seen, self._kept = before

    def _open(self, node, holder, name: str):
        """A node of a tree with what it holds beside its children, by contents."""
        before, self._static = self._static, True
        with self._keeping():
            held = [(k, self._take(part, node, k)) for k, part in held_by(node).items()]
        self._static = before
        is_leaf = is_open if holder is None else is_whole
        leaves, treedef = self._flatten(flatten_once(node)[0], is_leaf)
        parts = [self._take(leaf, holder, name) for leaf in leaves]
        return _Node(node, -1, (_OPEN, Same(type(node)), treedef, *held)).close(parts)

    def _dict(self, value: dict, holder, name: str):
        """A dict that a function or an object holds, in its own order."""
        kind, keys = type(value), zip(map(type, value), value)
        if not PLAIN.issuperset(map(type, value)):
            with self._keeping():
                keys = [self._take(key, holder, name) for key in value]
        node = self._seen[id(value)] = _Node(value, len(self._seen), (kind, *keys))
        made = [value.default_factory] if isinstance(value, defaultdict) else []
        return node.close(self._parts([*made, *value.values()], holder, name))

    def _parts(self, values: list, holder, name: str) -> list:
        before, self._many = self._many, self._many or len(values) > MANY
        parts = [self._take(value, holder, name) for value in values]
        self._many = before
        return parts

    def _object(self, value):
        """An object by its attributes."""
        if not is_plain(type(value)):
            refuse(value)
        return self._holder(value, object, Same(type(value)))

    def _holder(self, value, *key, parts: dict[str, Any] | None = None):
        if id(value) in self._seen:
            return _Again(self._seen[id(value)])
        parts = contents(value) if parts is None else parts
        node = self._seen[id(value)] = _Node(value, len(self._seen), (*key, *parts))
        self._depth += 1
        taken = [self._take(part, value, name) for name, part in parts.items()]
        self._depth -= 1
        return node.close(taken)


def in_order(static, floats, others) -> list:
    """The `numbers` of `Taken`, given its floats and the others."""
    numbers = list(others)
    for place, number in zip(static[-1], floats, strict=True):
        numbers.insert(place, number)
    return numbers


def put_together(static, numbers) -> PyTree:
    """The tree of `Taken`, with numbers in their places."""
    treedef, leaves, _ = static
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
        if kind in DICTS:
            new: Any = kind()
            self.built[node.index] = new
            values = map(self.build, node.parts)
            if kind is defaultdict:
                new.default_factory = next(values)
            new.update(zip(map(self.build, node.key[1:]), values, strict=True))
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
            return jtu.tree_unflatten(flatten_once(original)[1], children)
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
        values = dict(zip(node.key[2:], map(self.build, node.parts), strict=True))
        for name, cell in zip(old.__code__.co_freevars, cells, strict=True):
            if values[name] is not Unassigned:
                cell.cell_contents = values[name]
        default = lambda name: values[f"default {name}"]
        new.__defaults__ = tuple(map(default, defaults_of(old))) or None
        new.__kwdefaults__ = {name: default(name) for name in old.__kwdefaults__ or ()}
        new.__dict__.update({k[1:]: v for k, v in values.items() if k[0] == "."})
        return new


class Frozen(Fixed):
    """A tree as part of a program: its numbers, captured ones too, are constants."""

    def __init__(self, tree: PyTree):
        self.__name__ = getattr(tree, "__name__", type(tree).__name__)
        taken = Taken(tree, constants=True, captured=True)
        self.static, self.traced = taken.static, tuple(taken.others)
        self.key, self.held = (self.static, tuple(map(id, self.traced))), tree

    def __call__(self, *args):
        """What a frozen function returns."""
        with taken_back(self):
            return self.tree()(*args)

    def tree(self) -> PyTree:
        return put_together(self.static, self.traced)
