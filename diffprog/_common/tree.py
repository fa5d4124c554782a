import functools as ft
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .types import shapes


ARRAYS = jax.Array, np.ndarray


def where(condition, if_true: PyTree, if_false: PyTree) -> PyTree:
    """`jnp.where` on every leaf; what is the same in both stays."""
    choose = lambda a, b: a if a is b else jnp.where(condition, a, b)
    return jtu.tree_map(choose, if_true, if_false)


def no(like: Array) -> Array:
    """False, varying like this array inside `shard_map`."""
    return jnp.zeros_like(like, bool)


def yes(like: Array) -> Array:
    """True, varying like this array inside `shard_map`."""
    return jnp.ones_like(like, bool)


def all_finite(*trees: PyTree) -> Array:
    """Whether every entry of every leaf is finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(trees)]
    return ft.reduce(operator.and_, finite)


def norm(*trees: PyTree) -> Array:
    """The Euclidean norm of all entries together."""
    leaves = jtu.tree_leaves(trees)
    largest = ft.reduce(jnp.maximum, [jnp.max(jnp.abs(leaf)) for leaf in leaves])
    scale = jnp.where(largest > 0, largest, 1)  # squares neither over- nor underflow
    squares = [jnp.sum((leaf / scale) ** 2) for leaf in leaves]
    return scale * jnp.sqrt(ft.reduce(operator.add, squares))


def vary(tree: PyTree, like: PyTree) -> PyTree:
    """Inside `shard_map`: makes arrays vary over all the axes that `like` varies over.

    What a loop carries must vary over the same axes from its start to its end.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    arrays = [leaf for leaf in jtu.tree_leaves(like) if isinstance(leaf, jax.Array)]
    zeros = [jnp.sum(jnp.zeros_like(a, dtype=jnp.int32)) for a in arrays]
    zero = jnp.sum(jnp.stack(zeros), dtype=jnp.int32)

    def add(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        flag = leaf.dtype == bool
        return leaf | (zero > 0) if flag else leaf + zero.astype(leaf.dtype)

    return jtu.tree_map(add, tree)


def varying_axes(tree: PyTree) -> set:
    """The axes of `shard_map` over which arrays vary."""

    def axes(array):
        kind = jax.typeof(array)  # versions of JAX differ in where it has them
        found = getattr(kind, "manual_axis_type", None)
        return kind.vma if found is None else found.varying

    arrays = [leaf for leaf in jtu.tree_leaves(tree) if isinstance(leaf, jax.Array)]
    return set().union(*map(axes, arrays))


def strong(*trees: PyTree) -> tuple[tuple[PyTree, ...], np.dtype]:
    """The trees with weakly typed arrays in the dtype of the others, and that dtype.

    An array like `jnp.full(2, 1.0)` would else be another program.
    """
    arrays = [a for a in jtu.tree_leaves(trees) if isinstance(a, ARRAYS)]
    known = [array.dtype for array in arrays if not _is_weak(array)]
    floating = (dtype for dtype in known if jnp.issubdtype(dtype, jnp.floating))
    dtype = jax.dtypes.canonicalize_dtype(next(floating, float))
    if len(known) < len(arrays):
        cast = lambda leaf: jnp.asarray(leaf, dtype) if _is_weak(leaf) else leaf
        trees = jtu.tree_map(cast, trees)
    return trees, dtype


def _is_weak(leaf) -> bool:
    weak = isinstance(leaf, jax.Array) and leaf.weak_type
    return weak and jnp.issubdtype(leaf.dtype, jnp.floating)


def working_dtype(*trees: PyTree) -> np.dtype:
    """float64 where a floating array has it, else float32: that of the inner work."""
    has_double = any(leaf.dtype == jnp.float64 for leaf in jtu.tree_leaves(trees))
    return jnp.dtype(jnp.float64 if has_double else jnp.float32)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating arrays in this dtype."""

    def convert(leaf):
        floating = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating and leaf.dtype != dtype else leaf

    return jtu.tree_map(convert, tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """The tree with its floating arrays in the dtypes of those of a like tree."""
    convert = lambda leaf, other: cast(leaf, other.dtype)
    return jtu.tree_map(convert, tree, like)


def widened(fn: Callable, dtype: Any, *own: PyTree) -> Callable:
    """`fn` with arguments and values in this dtype, computed in that of its `own`."""
    return lambda *args: cast(fn(*cast_like(args, own)), dtype)


def float_dtype(**trees: PyTree) -> np.dtype:
    """The dtype that the floating leaves of the named trees share."""
    found: dict[np.dtype, str] = {}
    names = " and ".join(f"`{name}`" for name in trees)
    for tree_name, tree in trees.items():
        for path, leaf in jtu.tree_leaves_with_path(tree):
            name = tree_name + jtu.keystr(path)
            dtype = leaf.dtype if isinstance(leaf, jax.Array) else type(leaf).__name__
            if dtype not in ("float32", "float64"):
                if hasattr(tree, "us"):
                    raise TypeError(
                        f"`{tree_name}` is an object of type {type(tree).__name__}; an "
                        "array or a tree of arrays is expected, such as its `us` or a "
                        "row of its `xs`."
                    )
                raise TypeError(
                    f"`{name}` has dtype {dtype}; {names} are float32 or float64: "
                    "convert it with `.astype(float)`, or write 0.0 for 0."
                )
            if not leaf.weak_type:
                found.setdefault(leaf.dtype, name)
    if len(found) > 1:
        listed = " and ".join(f"`{name}` is {dtype}" for dtype, name in found.items())
        raise TypeError(
            f"{listed}; {names} share one dtype: convert one of them with `.astype`."
        )
    return next(iter(found), jnp.result_type(float))


class Layout(NamedTuple):
    """How a pytree of arrays lies in one vector, leaf after leaf."""

    size: int
    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    @staticmethod
    def of(tree: PyTree, dtype) -> "Layout":
        leaves, treedef = jtu.tree_flatten(tree)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        return Layout(sum(map(_count, shapes)), treedef, shapes, dtype)

    def ravel(self, tree: PyTree) -> Array:
        leaves = [jnp.ravel(leaf).astype(self.dtype) for leaf in jtu.tree_leaves(tree)]
        return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)

    def unravel(self, vector: Array) -> PyTree:
        leaves, start = [], 0
        for shape in self.shapes:
            stop = start + _count(shape)
            leaves.append(vector[start:stop].reshape(shape))
            start = stop
        return jtu.tree_unflatten(self.treedef, leaves)

    def structs(self) -> PyTree:
        """The shapes of the tree, in its arrangement."""
        structs = [jax.ShapeDtypeStruct(shape, self.dtype) for shape in self.shapes]
        return jtu.tree_unflatten(self.treedef, structs)

    def describe(self) -> str:
        return shapes(self.structs())


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=int))


def vdot(a: PyTree, b: PyTree) -> Array:
    """The inner product of two trees of arrays."""
    dot = lambda a, b: jnp.vdot(a, b, precision="highest")
    products = jtu.tree_leaves(jtu.tree_map(dot, a, b))
    return jnp.sum(jnp.stack(products))


def normal_like(key: PRNGKeyArray, tree: PyTree, *rows: int) -> PyTree:
    """Standard normal numbers, arranged like the tree, with more axes in front."""
    leaves, treedef = jtu.tree_flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, (*rows, *leaf.shape), leaf.dtype)
    return treedef.unflatten(map(draw, keys, leaves))


def add(a: PyTree, b: PyTree, factor: Any = 1) -> PyTree:
    """a + factor b."""
    return jtu.tree_map(lambda a, b: a + factor * b, a, b)


def scale(factor: Any, tree: PyTree) -> PyTree:
    """factor tree, in the dtype of the tree."""
    return jtu.tree_map(lambda a: (factor * a).astype(a.dtype), tree)
