"""Many problems on many devices: each solves its share, and none waits for another."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._common.capture import put_together, Taken
from .._common.types import came, is_known


WHOLE = PartitionSpec()


def check_mesh(mesh: Any):
    """Raises for what is no mesh with devices, and inside of `jax.shard_map`."""
    example = '`jax.make_mesh((jax.device_count(),), ("problems",))`'
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`mesh` is {came(mesh)}; a `jax.sharding.Mesh` is expected, such as "
            f"{example}."
        )
    if not mesh.axis_names or not mesh.size:
        raise ValueError(
            f"`mesh` has no devices; at least one is expected, as in {example}."
        )
    inside = jax.sharding.get_abstract_mesh().manual_axes
    if inside:
        raise ValueError(
            f"`mesh` is given inside of `jax.shard_map` over {inside}, where each "
            "device has its own problems already; `None` is expected there: leave "
            "`mesh` out, or call `dp.solve_batch` outside of `jax.shard_map`."
        )


def mesh_around(mesh: Mesh, *trees: PyTree) -> Mesh:
    """The mesh, with explicit axes where they are in use around the call.

    Elsewhere they are automatic: explicit ones would refuse `solution[0]`.
    """
    leaves = [leaf for leaf in jtu.tree_leaves(trees) if isinstance(leaf, Tracer)]
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in leaves]
    around = jax.sharding.get_abstract_mesh(), *meshes
    explicit = any(AxisType.Explicit in mesh.axis_types for mesh in around)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(mesh.devices, mesh.axis_names, (kind,) * len(mesh.axis_names))


def split(mesh: Mesh, tree: PyTree, num_rows: int) -> PyTree:
    """As many rows for each device, the last one repeated where some are missing."""
    missing = -num_rows % mesh.size
    if missing:
        rows = np.minimum(np.arange(num_rows + missing), num_rows - 1)
        whole = _put(mesh, WHOLE, tree)
        tree = jtu.tree_map(lambda leaf: jnp.asarray(leaf)[rows], whole)
    return _put(mesh, _rows(mesh), tree)


def on_each(fn: Callable, mesh: Mesh | None, shared: PyTree, rows: PyTree) -> PyTree:
    """`fn(shared, rows)`, where each device has its own rows."""
    if mesh is None:
        return fn(shared, rows)
    # Functions hold numbers, too, and what encloses them cannot be split.
    taken, own = Taken(shared), _rows(mesh)

    def run(numbers, rows):
        return fn(put_together(taken.static, numbers), rows)

    # There are no sums over devices, and nothing to check.
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(WHOLE, own), out_specs=own, check_vma=False
    )
    return run(_put(mesh, WHOLE, taken.numbers), _put(mesh, own, rows))


def joined(parts: list, mesh: Mesh | None, share: int, num_rows: int) -> PyTree:
    """Parts of the shares as one tree, without the rows that were repeated."""
    if len(parts) == 1 and (mesh is None or not num_rows % mesh.size):
        return parts[0]
    return _joined(parts, mesh, share, num_rows)


@ft.partial(jax.jit, static_argnums=(1, 2, 3))
def _joined(parts, mesh, share, num_rows):
    def join(_, parts):
        return jtu.tree_map(lambda *a: jnp.concatenate(a)[:share], *parts)

    rows = on_each(join, mesh, None, parts)
    if mesh is None or not num_rows % mesh.size:
        return rows
    # So many cannot be split evenly: each device gets them all.
    whole = _put(mesh, WHOLE, rows)
    return jtu.tree_map(lambda leaf: leaf[:num_rows], whole)


def _rows(mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names)


def _put(mesh: Mesh, spec: PartitionSpec, tree: PyTree) -> PyTree:
    place = NamedSharding(mesh, spec)
    explicit = AxisType.Explicit in mesh.axis_types

    def put(leaf):
        if explicit and isinstance(leaf, Tracer):
            return jax.sharding.reshard(leaf, place)
        if place.is_fully_addressable or not is_known(leaf):
            return jax.device_put(leaf, place)
        rows = np.asarray(leaf)  # `device_put` would compare it between the processes
        return jax.make_array_from_callback(rows.shape, place, rows.__getitem__)

    return jtu.tree_map(put, tree)


def given_rows(batch: range, share: int, num_devices: int, num_rows: int):
    """Which rows of a batch of each share are no repeated ones."""
    rows = np.array(batch) + share * np.arange(num_devices)[:, None]
    return ((np.array(batch) < share) & (rows < num_rows)).ravel()


def own_rows(tree: PyTree, given: np.ndarray) -> PyTree:
    """The rows of this process that are `given`: others are for others to look at."""

    def own(leaf):
        if is_known(leaf):
            return np.asarray(leaf)[given]
        shards = sorted(leaf.addressable_shards, key=lambda own: own.index[0].start)
        rows = [np.asarray(own.data)[given[own.index[0]]] for own in shards]
        return np.concatenate(rows)

    return jtu.tree_map(own, tree)
