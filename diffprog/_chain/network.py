"""Networks: chains of layers whose shapes may change from one to the next."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from .._common.capture import Frozen
from .._common.changes import can_change
from .._common.door import door
from .._common.flax import found_in
from .._common.loops import chained, scan
from .._common.types import came, noted, shapes


MIN_RUN = 4  # shorter runs of equal stages are cheaper written out


class Stage(eqx.Module):
    """Layers that are called one after another, for one example.

    A `key` is split among the layers that are modules; functions are called without.

    - `layers`: the first with parameters, and what comes before the next of them.
    """

    layers: tuple[Callable, ...]

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree:
        """The output for one example."""
        for i, layer in enumerate(self.layers):
            if key is None or not isinstance(layer, eqx.Module):
                x = layer(x)
            else:
                x = layer(x, key=jr.fold_in(key, i))  # pyright: ignore
        return x


class Stack(eqx.Module):
    """`size` equal stages. If there are several, every array has a row for each."""

    stage: Stage
    size: int = eqx.field(static=True)

    def row(self, i: int) -> Stage:
        """One stage."""
        if self.size == 1:
            return self.stage
        return jtu.tree_map(lambda a: a[i] if eqx.is_array(a) else a, self.stage)


class Network(eqx.Module):
    """Layers called one after another, for one example: `jax.vmap(net)` for a batch.

    A layer is an Equinox module or any function of one array; shapes may change from
    layer to layer. A layer with parameters and the functions that follow it make a
    *stage* of the chain $x_{t+1} = f_t(x_t, u_t)$, with the parameters as $u_t$. Four
    or more equal stages in a row are stored as one whose arrays have a leading axis,
    and run in a loop: compile time does not grow with their number.

    - `stacks`: the stages, runs of equal ones together.

    Properties: `layers`, as they were given; `params`, a tuple with the floating arrays
    of every stage, or of every run of equal stages with a leading axis.
    """

    stacks: tuple[Stack, ...]

    def __init__(
        self,
        layers: Sequence[Callable] | eqx.nn.Sequential,
        *,
        stack: bool = True,
    ):
        stages = _stages(_flat(layers))
        runs: list[list] = []
        for stage in stages:
            if stack and runs and _alike(runs[-1][0], stage):
                runs[-1].append(stage)
            else:
                runs.append([stage])
        stacks = []
        for run in runs:
            if len(run) < MIN_RUN:
                stacks += [Stack(stage, 1) for stage in run]
            else:
                join = lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0]
                stacks.append(Stack(jtu.tree_map(join, *run), len(run)))
        self.stacks = tuple(stacks)

    @property
    def layers(self) -> tuple[Callable, ...]:
        rows = [stack.row(i) for stack in self.stacks for i in range(stack.size)]
        return tuple(layer for row in rows for layer in row.layers)

    @property
    def params(self) -> tuple[PyTree, ...]:
        stages = [stack.stage for stack in self.stacks]
        return tuple(eqx.filter(stage, eqx.is_inexact_array) for stage in stages)

    def with_params(self, params: tuple[PyTree, ...]) -> "Network":
        """The network with other parameters, arranged like `params`."""
        params = tuple(params)
        if jtu.tree_structure(params) != jtu.tree_structure(self.params):
            raise ValueError(
                "`params` is not arranged like those of the network: give a tuple like "
                "`net.params`."
            )
        stages = lambda net: tuple(stack.stage for stack in net.stacks)
        rest = eqx.filter(stages(self), eqx.is_inexact_array, inverse=True)
        return eqx.tree_at(stages, self, eqx.combine(params, rest))

    def scan(
        self, fn: Callable, carry: PyTree, *data: tuple, reverse: bool = False
    ) -> tuple[PyTree, tuple]:
        """`carry, out = fn(stage, carry, *row)` from stage to stage.

        `data` and the outs are tuples arranged like `params`; `stage` is a function of
        one example.
        """

        def run(stack, carry, *rows):
            if stack.size == 1:
                return fn(stack.stage, carry, *rows)
            arrays, rest = eqx.partition(stack.stage, eqx.is_array)

            def body(carry, row):
                arrays, *row = row
                return fn(eqx.combine(arrays, rest), carry, *row)

            _check_constant(body, carry, (arrays, *rows))
            return scan(body, carry, (arrays, *rows), reverse=reverse)

        return chained(run, self.stacks, carry, data, reverse)

    def __call__(self, x: PyTree, *, key: PRNGKeyArray | None = None) -> PyTree:
        """The output for one example. A `key` is split among the layers."""
        keys = tuple(None for _ in self.stacks)
        if key is not None:
            split = jr.split(key, len(self.stacks))
            keys = tuple(
                k if s.size == 1 else jr.split(k, s.size)
                for k, s in zip(split, self.stacks, strict=True)
            )
        given = lambda: (
            f"The network was given x of shape {shapes(x):.200}, as one example: for a "
            "batch there is `jax.vmap(network)(x)`."
        )
        with noted(given):
            if any(stack.size > 1 for stack in self.stacks):
                arrays, rest = eqx.partition(self, eqx.is_array)
                return _run_compiled(arrays, Frozen(rest), x, keys)
            return _run(self, x, keys)


def _run(net: Network, x: PyTree, keys: tuple) -> PyTree:
    return net.scan(lambda stage, x, key: (stage(x, key=key), None), x, keys)[0]


@door
def _run_compiled(arrays, frozen: Frozen, x: PyTree, keys: tuple) -> PyTree:
    """For a loop, which would compile at every call outside of `jax.jit`."""
    return _run(eqx.combine(arrays, frozen.tree()), x, keys)


Network.__init__.__doc__ = """**Arguments:**

- `layers`: the layers in order, or an [`equinox.nn.Sequential`][]; sequences inside are
    taken apart. At least one has parameters.
- `stack`: whether equal stages in a row are stored as one. Such stages must keep the
    shape of their input; and on the CPU, convolutions are many times slower in loops.

**Raises:** `TypeError` for something that cannot be called, `ValueError` if there is no
layer or no parameter.
"""


def split_rows(net: Network, heads: list[int]) -> tuple[Network, Network]:
    """The network before its head, and the head: so many stages of each run."""
    body, head = [], []
    for stack, rows in zip(net.stacks, heads, strict=True):
        body += _rows(stack, 0, stack.size - rows)
        head += _rows(stack, stack.size - rows, stack.size)
    part = lambda stacks: eqx.tree_at(lambda net: net.stacks, net, tuple(stacks))
    return part(body), part(head)


def _rows(stack: Stack, start: int, stop: int) -> list[Stack]:
    if start == stop:
        return []
    if stop - start == stack.size:
        return [stack]
    if stop - start == 1:
        return [Stack(stack.row(start), 1)]
    some = lambda a: a[start:stop] if eqx.is_array(a) else a
    return [Stack(jtu.tree_map(some, stack.stage), stop - start)]


def has_parameters(layer: Any) -> bool:
    """Whether a layer holds a floating array."""
    return any(map(eqx.is_inexact_array, jtu.tree_leaves(layer)))


def parametrized(net: Network) -> list[Any]:
    """The layer with parameters of every run of equal stages."""
    stages = [stack.stage for stack in net.stacks]
    return [next(filter(has_parameters, stage.layers)) for stage in stages]


def is_linear(layer: Any) -> bool:
    """Whether a layer is a dense one, of vectors."""
    return isinstance(layer, eqx.nn.Linear) and "scalar" not in (
        layer.in_features,
        layer.out_features,
    )


def _flat(layers) -> list[Callable]:
    if isinstance(layers, eqx.nn.Sequential):
        layers = layers.layers
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"`layers` is a {type(layers).__name__}; a tuple of layers or an "
            "`eqx.nn.Sequential` is expected."
        )
    flat = []
    for i, layer in enumerate(layers):
        if isinstance(layer, eqx.nn.Sequential | tuple | list):
            flat += _flat(layer)
        elif not callable(layer) or inspect.isclass(layer):
            raise TypeError(
                f"Layer {i} is {came(layer)}, which is no function; a module or a "
                "function of one array is expected."
            )
        elif _keeps_a_state(layer):
            raise TypeError(
                f"Layer {i}, a {type(layer).__name__}, keeps a state, and a chain of "
                "examples has none: give the model to `dp.value_and_direction` as it "
                "is, with its state, or use a layer such as `eqx.nn.GroupNorm`."
            )
        else:
            flat.append(layer)
    return flat


def _keeps_a_state(layer: Callable) -> bool:
    if isinstance(layer, eqx.nn.StatefulLayer):
        return layer.is_stateful()
    others = (leaf for _, leaf, parameter in found_in(layer) if not parameter)
    return any(map(has_parameters, others))


def _stages(layers: list[Callable]) -> list[Stage]:
    """Every layer with parameters begins a stage, and the first includes all before."""
    starts = [i for i, layer in enumerate(layers) if has_parameters(layer)]
    if not starts:
        raise ValueError(
            f"`layers` has {len(layers)} entries and no floating array among them; a "
            "network has at least one layer with parameters."
        )
    bounds = [0, *starts[1:], len(layers)]
    return [Stage(tuple(layers[i:j])) for i, j in zip(bounds, bounds[1:])]


def _alike(a: Stage, b: Stage) -> bool:
    """Whether two stages differ in the numbers of their arrays only, for good."""
    if can_change((a, b)):
        return False
    known = lambda leaf: (leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf
    a, b = (jtu.tree_map(known, stage) for stage in (a, b))
    return bool(eqx.tree_equal(a, b))


def _check_constant(body: Callable, carry: PyTree, rows: PyTree):
    first = jtu.tree_map(lambda a: a[0], rows)
    after, _ = eqx.filter_eval_shape(body, carry, first)
    known = lambda a: (jnp.shape(a), jnp.result_type(a))
    if jtu.tree_map(known, after) != jtu.tree_map(known, carry):
        show = lambda tree: [list(jnp.shape(a)) for a in jtu.tree_leaves(tree)]
        raise ValueError(
            f"Equal stages of the network map shapes {show(carry)} to {show(after)}, "
            "so they cannot run in a loop: build it with `dp.Network(layers, "
            "stack=False)`."
        )
