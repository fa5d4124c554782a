"""The state of a learned preconditioner: its parameters, and what they are made of."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int, PyTree, UInt32
from optax import MaskedNode

from .._chain.network import Stack
from .._common.tree import add, working_dtype
from .._common.types import came, Number
from ._checks import is_masked
from ._curvature import LossModel
from ._structure_solvers import (
    AbstractProbe,
    AbstractStructureSolver,
    StructureObjective,
)
from ._structures import AbstractStructure, Diagonal, MATRICES, Scalar, Stacked


class Place(NamedTuple):
    """A leaf of the parameters; `group` is the place of its numbers in U."""

    path: str
    shape: tuple[int, ...]
    structure: AbstractStructure
    group: int


class Plan(NamedTuple):
    """All that is static: which leaf has which structure. `None` where one is masked.

    `size` parts of U are apart from each other. `treedef` is that of the parameters
    with a leaf for what is masked.
    """

    treedef: Any
    places: tuple[Place | None, ...]
    size: int
    dtype: Any
    graft: str
    warm_start: bool

    def take(self, name: str, tree: PyTree) -> list[Array]:
        """The leaves that are not masked. Raises where the tree is another one."""
        try:
            nodes = self.treedef.flatten_up_to(tree)
        except ValueError as error:
            self._check_shapes(name, tree)
            raise ValueError(
                f"`{name}` is arranged as {jtu.tree_structure(tree)!s:.200}; one like "
                "the parameters that `init` was given is expected, "
                f"{self.treedef!s:.200}."
            ) from error
        self._check_shapes(name, tree)
        return self._known(nodes)

    def _check_shapes(self, name: str, tree: PyTree):
        leaves, _ = jtu.tree_flatten_with_path(tree)
        found = {jtu.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
        for place in self.known:
            if found.get(place.path, place.shape) != place.shape:
                raise ValueError(
                    f"`{name}{place.path}` has shape {found[place.path]}; that of the "
                    f"parameter that `init` was given is {place.shape}."
                )

    def _known(self, nodes: list) -> list:
        pairs = zip(self.places, nodes, strict=True)
        return [node for place, node in pairs if place is not None]

    @property
    def known(self) -> list[Place]:
        return [place for place in self.places if place is not None]

    def tree(self, leaves: list) -> PyTree:
        """A tree like the parameters; it is masked where these are."""
        rest = iter(leaves)
        nodes = [MaskedNode() if place is None else next(rest) for place in self.places]
        return self.treedef.unflatten(nodes)

    def numbers(self, U: PyTree) -> tuple:
        """The numbers of U, those of a group once."""
        nodes = self.treedef.flatten_up_to(U)
        pairs = [(p.group, U) for p, U in zip(self.places, nodes) if p is not None]
        found = dict(reversed(pairs))
        return tuple(found[group] for group in range(self.size))

    def spread(self, numbers: tuple) -> PyTree:
        """U, arranged like the parameters."""
        return self.tree([numbers[place.group] for place in self.known])

    def init(self) -> tuple:
        """The numbers of U = I."""
        made = {p.group: p.structure.init(p.shape, self.dtype) for p in self.known}
        return tuple(made[group] for group in range(self.size))

    def apply(self, numbers: tuple, leaves: list[Array]) -> list[Array]:
        """U X for every leaf, in its dtype."""

        def one(place, X):
            X = jnp.asarray(X)
            UX = place.structure.apply(numbers[place.group], X.astype(self.dtype))
            return UX.astype(X.dtype)

        return [one(*pair) for pair in zip(self.known, leaves, strict=True)]

    def floored(self, numbers: tuple, floor: Any) -> tuple:
        """U with its eigenvalues at least this."""
        structures = {place.group: place.structure for place in self.known}
        return tuple(structures[i].floored(U, floor) for i, U in enumerate(numbers))

    def diagonals(self, numbers: tuple) -> list[Array]:
        """The entries on the diagonal of U, those of a group once."""
        structures = {place.group: place.structure for place in self.known}
        return [structures[i].diagonal(U) for i, U in enumerate(numbers)]

    def restricted(self, model: LossModel) -> LossModel:
        """The model of the leaves that are not masked, as a list; others stay 0."""
        gradient = self.treedef.flatten_up_to(model.gradient)

        def whole(leaves):
            rest = iter(leaves)
            fill = lambda node: jtu.tree_map(jnp.zeros_like, node)
            pairs = zip(self.places, gradient, strict=True)
            nodes = [fill(node) if p is None else next(rest) for p, node in pairs]
            return self.treedef.unflatten(nodes)

        take = lambda tree: self._known(self.treedef.flatten_up_to(tree))
        return LossModel(
            value=model.value,
            gradient=take(model.gradient),
            push=lambda leaves: model.push(whole(leaves)),
            weigh=model.weigh,
            pull=lambda z: take(model.pull(z)),
            join=model.join,
        )

    def objective(
        self, models: list[LossModel], probe: AbstractProbe, damping: Any, key: Any
    ) -> StructureObjective:
        """What U minimizes on some batches."""
        keys = jr.split(key, len(models))
        draw = lambda model, key: probe.draw(model.gradient, key)
        stacks = [draw(*pair) for pair in zip(models, keys, strict=True)]
        rows = [jtu.tree_leaves(stack)[0].shape[0] for stack in stacks]
        # A row alone is not mapped over: that is faster.
        lift = lambda n, fn: fn if n == 1 else jax.vmap(fn)
        one = lambda n, V: V if n > 1 else jtu.tree_map(lambda a: a[0], V)
        vectors = tuple(map(one, rows, stacks))

        def step(numbers):
            move = lambda V: [-UV for UV in self.apply(numbers, V)]
            return tuple(lift(n, move)(V) for n, V in zip(rows, vectors))

        def product(u):
            damped = lambda model: lambda u: add(model.mv(u), u, damping)
            each = zip(rows, models, u, strict=True)
            return tuple(lift(n, damped(model))(part) for n, model, part in each)

        weights = tuple(1 / (n * len(rows)) for n in rows)
        linear = all(place.structure.linear for place in self.known)
        return StructureObjective(vectors, step, product, weights, linear)


class Settings(eqx.Module):
    """The numbers of [`diffprog.optim.llqr`][], which may be traced."""

    damping: Number
    ema: Number
    floor: Number | None
    interval: int | Array
    solver: AbstractStructureSolver
    probe: AbstractProbe

    def arrays(self, dtype: Any) -> "Settings":
        """All of them as arrays, so that a new number is the same program."""
        number: Any = lambda a: None if a is None else jnp.asarray(a, dtype)
        is_float = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
        inside = lambda a: number(a) if is_float(a) else jnp.asarray(a)
        return Settings(
            damping=number(self.damping),
            ema=number(self.ema),
            floor=number(self.floor),
            interval=jnp.asarray(self.interval, jnp.int32),
            solver=jtu.tree_map(inside, self.solver),
            probe=jtu.tree_map(inside, self.probe),
        )


class LLQRState(eqx.Module):
    r"""What [`diffprog.optim.llqr`][] remembers.

    - `U`: the numbers of the preconditioner, arranged like the parameters: an array or
        a tuple of arrays in the place of each, as its structure says.
    - `count`: how many updates were made.
    - `since`: how many since the last refresh.
    - `refreshes`, `refused`: how often U was fitted, and how often that was refused
        since it was not finite: U is then kept.
    - `overdue`: whether `since` is more than the interval.
    - `key`: for random probes.
    - `settings`: the numbers of the last update: damping, average, floor, interval,
        solver and probe.
    - `plan`: all that is static, such as the structure of every parameter.
    """

    U: PyTree
    count: Int[Array, ""]
    since: Int[Array, ""]
    refreshes: Int[Array, ""]
    refused: Int[Array, ""]
    overdue: Bool[Array, ""]
    key: UInt32[Array, "2"]
    settings: Settings
    plan: Plan = eqx.field(static=True)


def make_plan(
    params: PyTree, structure: Any, needs_linear: bool, graft: str, warm_start: bool
) -> Plan:
    """The structure of every leaf."""
    nodes, treedef = jtu.tree_flatten_with_path(params, is_leaf=is_masked)
    loops = _loops(params)
    places: list[Place | None] = []
    groups: dict[Any, int] = {}
    for path, leaf in nodes:
        if is_masked(leaf):
            places.append(None)
            continue
        name, stacked = jtu.keystr(path), any(path[: len(p)] == p for p in loops)
        check_leaf(name, leaf)
        found = _structure(structure, name, leaf, stacked)
        U = _fitting(found, name, leaf.shape)
        if needs_linear and not found.linear:
            raise ValueError(
                f"`params{name}` has the structure {found}, which is not linear in its "
                "numbers; take the solver `ExactStep()`, or structures such as "
                "`Diagonal()`."
            )
        key = _group(found, path, U)
        group = groups.setdefault(key, len(groups))
        places.append(Place(name, leaf.shape, found, group))
    arrays = [leaf for _, leaf in nodes if not is_masked(leaf)]
    if not arrays:
        raise ValueError("`params` has no floating array: there is nothing to train.")
    dtype = working_dtype(arrays)
    return Plan(treedef, tuple(places), len(groups), dtype, graft, warm_start)


def check_leaf(name: str, leaf: Any):
    """Raises for what is no floating array."""
    if not eqx.is_array_like(leaf):
        raise TypeError(f"`params{name}` is {came(leaf)}; an array is expected.")
    dtype = jnp.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"`params{name}` has dtype {dtype}; floats are expected: give "
            "`eqx.filter(model, eqx.is_inexact_array)`, or leave the leaf out by "
            "`optax.masked`."
        )


def _loops(params: PyTree) -> list[tuple]:
    """Where the parameters of a `dp.Network` have a leading axis for equal stages."""
    is_loop = lambda node: isinstance(node, Stack) and node.size > 1
    nodes, _ = jtu.tree_flatten_with_path(params, is_leaf=is_loop)
    return [path for path, node in nodes if is_loop(node)]


def _structure(rule: Any, name: str, leaf: Any, stacked: bool) -> AbstractStructure:
    """That of a leaf, which may have a leading axis for the stages of a loop."""
    shape = leaf.shape[1:] if stacked else leaf.shape
    one = jax.ShapeDtypeStruct(shape, leaf.dtype)
    if isinstance(rule, AbstractStructure):
        found = rule
        if isinstance(rule, MATRICES) and len(shape) <= rule.rows:
            found = Diagonal()
    else:
        found = rule(name, one)
        if not isinstance(found, AbstractStructure):
            raise TypeError(
                f"`structure({name!r}, ...)` returned {came(found)}; a structure such "
                "as `dp.optim.Diagonal()` is expected."
            )
    everywhere = isinstance(found, Scalar) and found.groups == "all"
    return Stacked(found) if stacked and not everywhere else found


def _fitting(structure: AbstractStructure, name: str, shape: tuple) -> PyTree:
    """The shapes of its numbers."""
    try:
        return jax.eval_shape(lambda: structure.init(shape, jnp.float32))
    except ValueError as error:
        raise ValueError(
            f"`params{name}` does not fit the structure {structure}: {error}."
        ) from error


def _group(structure: AbstractStructure, path: tuple, U: PyTree) -> Any:
    """Equal for leaves that share their numbers."""
    inner = structure
    while isinstance(inner, Stacked):
        inner = inner.structure
    if isinstance(inner, Scalar) and inner.groups != "leaf":
        return inner.groups, path[:-1] if inner.groups == "layer" else (), U.shape
    return path
