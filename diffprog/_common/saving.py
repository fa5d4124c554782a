"""Trees in files: a line of JSON that describes the leaves, and then their numbers."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import uuid
from typing import Any, BinaryIO

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .types import came


START = b'{"format": "diffprog", '
FORMAT = 1  # of files: raised where an older version could not read them
SHOWN = 3  # leaves in a message
SCALARS = bool, int, float, complex
ARRAYS = jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct


def save(path: str | os.PathLike, tree: PyTree):
    """Writes the numbers of a tree to a file, which `dp.load` reads.

    Those are arrays, keys of `jax.random` and Python numbers, to the last bit and each
    in its dtype. Strings are written to be compared. What else the tree holds
    (functions, static fields, how it is arranged) is not in the file: it comes from the
    `like` of [`diffprog.load`][]. What a function captures is not written either:
    numbers of a problem that are to be saved are fields of a module.

    The file is a line of JSON (paths, shapes, dtypes, version of the library) before
    what `equinox.tree_serialise_leaves` writes, without pickle. It is written beside
    `path` and then takes its name, so that an older file stays whole until then, also
    where writing fails.

    **Arguments:**

    - `path`: the file; any suffix. Its folder exists.
    - `tree`: any pytree: a [`diffprog.Solution`][], what a controller or an optimizer
        remembers, a [`diffprog.ControlProblem`][], parameters.

    **Raises:** `TypeError` for traced numbers (inside of `jax.jit` and the like), for
    shapes without numbers and for NumPy arrays of objects; `ValueError` for arrays that
    lie on other machines too; `OSError` where the file cannot be written.
    """
    path = pathlib.Path(os.path.realpath(path))  # the file that a link names
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder `{path.parent}` for `{path}`.")
    leaves = _leaves("tree", tree)
    for name, leaf in leaves:
        _check_saved(name, leaf)
    header = dict(
        format="diffprog",
        number=FORMAT,
        version=importlib.metadata.version("diffprog"),
        leaves=[_entry(name.removeprefix("tree"), leaf) for name, leaf in leaves],
    )
    beside = path.with_name(f".diffprog-{uuid.uuid4().hex}")
    try:
        with open(beside, "xb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            eqx.tree_serialise_leaves(file, tree, _write)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Reads what [`diffprog.save`][] wrote, into a tree that is arranged like `like`.

    **Arguments:**

    - `path`: the file.
    - `like`: a tree with the leaves of the one that was saved, of the same shapes and
        dtypes; what these hold does not matter. Shapes alone are enough, as
        `jax.eval_shape` of the call that made the tree gives them. Functions, static
        fields and other things without numbers are taken from it.

    **Returns:** a tree of the kind of `like`: arrays of NumPy where it has some, Python
    numbers where it has some, else arrays of JAX on the default device.

    **Raises:** `ValueError` for a file that is none of `dp.save`, cut off or damaged,
    of a later format, or with other leaves than `like`: the message names them.
    `TypeError` for a `like` with traced numbers; `OSError` where there is no file.
    """
    leaves, tree = _leaves("like", like), []
    expected = [_entry(n.removeprefix("like"), _checked(n, a)) for n, a in leaves]
    with open(path, "rb") as file:
        saved = _read_header(path, file)
        _compare(path, saved, expected)
        for (name, leaf), entry in zip(leaves, saved, strict=True):
            try:
                tree.append(_read(file, leaf, entry))
            except ValueError as error:
                why = f"the numbers of `{name}` are not whole"
                raise _damaged(path, why) from error
        if file.read(1):
            raise _damaged(path, "there is more in it than it says")
    return jtu.tree_unflatten(jtu.tree_structure(like), tree)


def _leaves(root: str, tree: PyTree) -> list[tuple[str, Any]]:
    """All leaves, and how they are called."""
    pairs = jtu.tree_leaves_with_path(tree)
    return [(root + jtu.keystr(path), leaf) for path, leaf in pairs]


def _entry(path: str, leaf: Any) -> dict[str, Any]:
    """What the header says of a leaf; nothing but the path where it is not saved."""
    entry: dict[str, Any] = dict(path=path)
    if isinstance(leaf, ARRAYS):
        entry |= dict(dtype=str(leaf.dtype), shape=list(leaf.shape))
        if isinstance(leaf, jax.Array) and _is_key(leaf):
            entry["impl"] = str(jax.random.key_impl(leaf))
    elif type(leaf) in SCALARS:
        entry |= dict(dtype=f"Python {type(leaf).__name__}", shape=[])
    elif isinstance(leaf, str):
        entry["text"] = leaf
    return entry


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _checked(name: str, leaf: Any) -> Any:
    """A leaf that is not traced."""
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"`{name}` is traced: files are written and read outside of `jax.jit`, "
            "`jax.vmap` and `jax.grad`. Return the tree from there first."
        )
    return leaf


def _check_saved(name: str, leaf: Any):
    _checked(name, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"`{name}` is {came(leaf)}, a shape without numbers to save.")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(
            f"`{name}` lies on other machines too; gather it first, such as by "
            "`jax.experimental.multihost_utils.process_allgather`."
        )
    of_objects = isinstance(leaf, np.ndarray) and leaf.dtype.hasobject
    if of_objects or (type(leaf) is int and np.asarray(leaf).dtype.hasobject):
        given = "an array of Python objects" if of_objects else f"{leaf!r:.40}"
        raise TypeError(
            f"`{name}` is {given}, for which NumPy would need pickle: numbers of at "
            "most 64 bits are expected, or strings."
        )


def _write(file: Any, leaf: Any):
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, ARRAYS) or type(leaf) in SCALARS:
        np.save(file, np.asarray(leaf), allow_pickle=False)


def _read(file: BinaryIO, like: Any, entry: dict[str, Any]) -> Any:
    """The next leaf; `like` itself where nothing of it is in the file."""
    if "dtype" not in entry:
        return like
    array = np.lib.format.read_array(file, allow_pickle=False)
    if type(like) in SCALARS:
        return type(like)(array.item())
    if _is_key(like):
        impl = jax.random.key_impl(like) if isinstance(like, jax.Array) else None
        bits = jnp.asarray(array)
        return jax.random.wrap_key_data(bits, impl=impl or entry["impl"])
    if array.dtype.kind == "V" and array.dtype != like.dtype:
        array = array.view(like.dtype)  # what NumPy has no name for, such as bfloat16
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(f"{array.dtype} of shape {array.shape} was found.")
    if isinstance(like, np.generic):
        return type(like)(array[()])
    if isinstance(like, np.ndarray):
        return array
    weak = jnp.full(array.shape, np.zeros((), array.dtype).item())
    if like.weak_type and weak.dtype == array.dtype:
        return weak.at[...].set(array)
    return jnp.asarray(array)


def _read_header(path, file: BinaryIO) -> list[dict[str, Any]]:
    start = file.read(len(START))
    if not start:
        raise ValueError(f"`{path}` is empty; a file of `dp.save` is expected.")
    if not START.startswith(start):
        raise ValueError(
            f"`{path}` was not written by `dp.save`: it begins with {start[:12]!r}."
        )
    rest = file.readline()
    if not rest.endswith(b"\n"):
        raise _damaged(path, "it ends within its first line")
    try:
        header = json.loads(start + rest)
        number, version, leaves = (header[k] for k in ("number", "version", "leaves"))
    except (ValueError, KeyError) as error:
        raise _damaged(path, "its first line is not what it should be") from error
    if number > FORMAT:
        own = importlib.metadata.version("diffprog")
        raise ValueError(
            f"`{path}` was written by diffprog {version} in format {number}; this is "
            f"diffprog {own}, which reads formats up to {FORMAT}: install diffprog "
            f"{version} or later."
        )
    return leaves


def _damaged(path, why: str) -> ValueError:
    return ValueError(
        f"`{path}` is cut off or damaged: {why}. Take another copy of it, or save anew."
    )


def _compare(path, saved: list[dict], expected: list[dict]):
    """Raises where the leaves of a file are not those of `like`."""
    ours, theirs = ({e["path"]: e for e in all_of} for all_of in (expected, saved))
    faults = [
        f"{_said(p, 'like')} {_what(ours.get(p))} in `like`, and "
        f"{_what(theirs.get(p))} in the file"
        for p in dict.fromkeys([*theirs, *ours])
        if _what(ours.get(p)) != _what(theirs.get(p))
    ]
    if not faults and [*ours] != [*theirs]:
        faults = ["the leaves come in another order"]
    if faults:
        more = len(faults) - SHOWN
        listed = "; ".join(faults[:SHOWN])
        listed += f"; and so on for {more} more" * (more > 0)
        raise ValueError(
            f"`{path}` does not fit `like`: {listed}. Give a `like` that is made as "
            "what was saved: by the same call, with the same sizes, dtypes and options."
            + _about_64_bits(saved)
        )


def _about_64_bits(entries: list[dict]) -> str:
    wide = any("64" in entry.get("dtype", "") for entry in entries)
    if not wide or jax.config.jax_enable_x64:  # pyright: ignore
        return ""
    return (
        " Numbers of 64 bits need `jax.config.update('jax_enable_x64', True)`, before "
        "`like` is made."
    )


def _said(path: str, root: str) -> str:
    return f"`{root}{path}` is"


def _what(entry: dict[str, Any] | None) -> str:
    """A leaf in the words of a message; alike where they fit each other."""
    if entry is None:
        return "absent"
    if "text" in entry:
        return f"the string {entry['text']!r}"
    if "dtype" not in entry:
        return "no number"
    if entry["dtype"].startswith("Python"):
        return f"a {entry['dtype']}"
    return f"{entry['dtype']} of shape {tuple(entry['shape'])}"
