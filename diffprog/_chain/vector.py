"""Chains of vectors, traced once: what every recursion of the library runs on."""

import functools as ft
import re
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import eval_jaxpr, Tracer
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._common.capture import put_together, Taken
from .._common.door import door
from .._common.fast_loops import Loops, scan
from .._common.loops import chained
from .._common.tree import all_finite, float_dtype, Layout, strong, vary
from .._common.types import Rows
from .._common.written import taken_back
from .calls import about_state, call, check_dtype, scalar
from .limits import cut_off, like_controls
from .problem import AbstractChain, ControlProblem, Phase


class Segment(eqx.Module):
    """One phase as functions of vectors, traced once."""

    dynamics: Callable = eqx.field(static=True)  # (x, u, t) -> x
    cost: Callable = eqx.field(static=True)  # (x, u, t) -> scalar
    start: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)

    @staticmethod
    def difference(x: Array, y: Array) -> Array:
        """x minus y, two states of the segment."""
        return x - y


class VectorChain(eqx.Module):
    """A chain whose states and controls are vectors: what the recursions run on.

    Data that have a row per stage are tuples with one stacked array per segment.
    `scan` and `map` are the only loops over its stages. `limits` are the lower and the
    upper ones of the controls; empty if there are none.
    """

    segments: tuple[Segment, ...]
    terminal_cost: Callable = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    limits: tuple[Rows, ...] = ()
    loops: Loops = eqx.field(static=True, default="plain")

    @property
    def recomputes(self) -> bool:
        """Whether finding derivatives again costs no more than reading them."""
        return self.loops == "fused"

    @property
    def horizon(self) -> int:
        return sum(segment.horizon for segment in self.segments)

    @property
    def ts(self) -> tuple[Int[Array, " stages"], ...]:
        """The index of every stage."""
        return tuple(
            jnp.arange(s.start, s.start + s.horizon, dtype=jnp.int32)
            for s in self.segments
        )

    def scan(self, fn: Callable, carry: PyTree, *data: tuple, reverse: bool = False):
        """`carry, out = fn(segment, carry, *row)` from stage to stage.

        A segment of one stage is called directly, so its carry may change shape.
        """

        def run(segment, carry, *rows):
            if segment.horizon > 1:
                body = lambda carry, row: fn(segment, carry, *row)
                return scan(body, carry, rows, reverse, self.loops)
            row = jtu.tree_map(lambda a: a[0], rows)
            carry, out = fn(segment, carry, *row)
            return carry, jtu.tree_map(lambda a: a[None], out)

        return chained(run, self.segments, carry, data, reverse)

    def map(self, fn: Callable, *data: tuple) -> tuple:
        """`out = fn(segment, *row)` at every stage: all at once, or one by one."""
        if self.loops == "fused":
            step = lambda segment, carry, *row: (carry, fn(segment, *row))
            return self.scan(step, None, *data)[1]
        return tuple(
            jax.vmap(lambda *row, segment=segment: fn(segment, *row))(*rows)
            for segment, *rows in zip(self.segments, *data, strict=True)
        )

    def within(self, us: Rows) -> Rows:
        """The controls, cut off at their limits; NaN where these are crossed."""
        if not self.limits:
            return us
        return self.map(lambda _, *row: cut_off(*row), us, *self.limits)

    @property
    def is_crossed(self) -> Bool[Array, ""]:
        """Whether a lower limit is above the upper one, or one of them NaN."""
        crossed = lambda _, lower, upper: ~jnp.all(lower <= upper)
        return jnp.any(jnp.concatenate(self.map(crossed, *self.limits)))


class VectorTrajectory(eqx.Module):
    """States, controls and cost of a roll-out of a `VectorChain`."""

    xs: Rows
    final: Float[Array, " _"]
    us: Rows
    cost: Float[Array, ""]
    first_nonfinite: Int[Array, ""]


class Vectorized(eqx.Module):
    """A problem as a `VectorChain`, with the way back to the pytrees of the user."""

    chain: VectorChain
    problem: AbstractChain
    x_layouts: tuple[Layout, ...] = eqx.field(static=True)  # one per segment, and last
    u_layouts: tuple[Layout, ...] = eqx.field(static=True)

    def ravel(self, x0: PyTree, us: PyTree):
        stacks = _rows(Layout.ravel, self.u_layouts, self.problem.split(us))
        return self.x_layouts[0].ravel(x0), stacks

    def states(self, xs: tuple, final: Array) -> PyTree:
        *layouts, last = self.x_layouts
        rows = _rows(Layout.unravel, layouts, xs)
        return self.problem.join_states(rows, last.unravel(final))

    def controls(self, us: tuple) -> PyTree:
        return self.problem.join_controls(_rows(Layout.unravel, self.u_layouts, us))


def _rows(convert: Callable, layouts: Sequence[Layout], stacks: tuple) -> tuple:
    """`convert(layout, row)` for every row of the stack of every segment."""
    pairs = zip(layouts, stacks, strict=True)
    return tuple(jax.vmap(ft.partial(convert, a))(stack) for a, stack in pairs)


def vectorize(problem: AbstractChain, x0: PyTree, us: PyTree) -> Vectorized:
    """Traces each function of the problem once, on vectors, and checks its results."""
    if not isinstance(problem, AbstractChain):
        raise TypeError(
            f"`problem` is a {type(problem).__name__}; a `dp.ControlProblem` or "
            "`dp.Chain` is expected."
        )
    if isinstance(us, list) and not any(map(np.ndim, jtu.tree_leaves(us))):
        raise TypeError(
            "`us` is a list of numbers, which is no array: give `jnp.asarray(us)`."
        )
    parts = problem.split(us)  # which knows best what `us` should be
    dtype = float_dtype(x0=x0, us=us)
    zeros = lambda layout: vary(jnp.zeros(layout.size, dtype), like=(x0, us))
    x_layouts, u_layouts, segments, start = [Layout.of(x0, dtype)], [], [], 0
    if x_layouts[0].size == 0:
        raise ValueError("`x0` has no entries; a state has at least one.")
    for phase, u in zip(problem.phases, parts, strict=True):
        u_layouts.append(_stage_layout(u, phase.horizon, dtype))
        segment, x_layout = _trace(phase, start, x_layouts[-1], u_layouts[-1], zeros)
        x_layouts.append(x_layout)
        segments.append(segment)
        start += phase.horizon
    if isinstance(problem, ControlProblem):
        _check_next(x_layouts[-1], x_layouts[0])
    terminal = _traced(
        lambda x: scalar(
            "terminal_cost", problem.terminal_cost, dtype, x_layouts[-1].unravel(x)
        ),
        zeros(x_layouts[-1]),
    )
    limits = _limits(problem, parts, u_layouts, dtype)
    chain = VectorChain(tuple(segments), terminal, dtype, limits)
    return Vectorized(chain, problem, tuple(x_layouts), tuple(u_layouts))


def _limits(
    problem: AbstractChain, parts: tuple, layouts: Sequence[Layout], dtype
) -> tuple[Rows, ...]:
    """The limits of the controls of every stage, if any phase has some."""
    bounds = [phase.control_bounds for phase in problem.phases]
    if not any(bounds):
        return ()
    pairs = [like_controls(b, us, dtype) for b, us in zip(bounds, parts, strict=True)]
    sides = zip(*pairs, strict=True)
    return tuple(_rows(Layout.ravel, layouts, side) for side in sides)


def _stage_layout(us: PyTree, horizon: int, dtype) -> Layout:
    leaves = jtu.tree_leaves_with_path(us)
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != horizon:
            raise ValueError(
                f"`us{jtu.keystr(path)}` has shape {jnp.shape(leaf)}; its first axis "
                f"is the stage, and the horizon is {horizon}."
            )
    layout = Layout.of(jtu.tree_map(lambda leaf: leaf[0], us), dtype)
    if layout.size == 0:
        raise ValueError("`us` has no entries; a stage has at least one control.")
    return layout


def _traced(fn: Callable, *examples: Array) -> Callable:
    """`fn` as a fixed program: derivatives and loops never run its Python again."""
    closed = jax.make_jaxpr(fn)(*examples)
    return lambda *args: eval_jaxpr(closed.jaxpr, closed.consts, *args)[0]


def _trace(
    phase: Phase, start: int, x_layout: Layout, u_layout: Layout, zeros: Callable
):
    dtype, next_layout = x_layout.dtype, x_layout

    def dynamics(x, u, t):
        nonlocal next_layout
        args = x_layout.unravel(x), u_layout.unravel(u), t
        new = call("dynamics", phase.dynamics, *args)
        check_dtype("dynamics", phase.dynamics, new, dtype)
        next_layout = Layout.of(new, dtype)
        if phase.horizon > 1:
            _check_next(next_layout, x_layout)
        return next_layout.ravel(new)

    def cost(x, u, t):
        args = x_layout.unravel(x), u_layout.unravel(u), t
        return scalar("cost", phase.cost, dtype, *args)

    examples = zeros(x_layout), zeros(u_layout), jnp.zeros((), jnp.int32)
    traced = _traced(dynamics, *examples), _traced(cost, *examples)
    return Segment(*traced, start, phase.horizon), next_layout


def _check_next(layout: Layout, before: Layout):
    if layout != before:
        raise ValueError(
            f"`dynamics` returned a state with the shapes {layout.describe()}; the "
            f"state it was given has {before.describe()}, and both must agree."
            + about_state(before.structs())
        )


class Trajectory(eqx.Module):
    """States, controls and their cost.

    - `xs`: states, T + 1 rows.
    - `us`: controls, T rows.
    - `cost`: the sum of all stage costs and the terminal cost.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    cost: Float[Array, ""]


def simulate(chain: VectorChain, control: Callable, x0: Array, memory: PyTree, *data):
    """x_{t+1} = f_t(x_t, u_t) from x0 and its cost: the trajectory, and the `out`s.

    `u, memory, out = control(segment, x, memory, *row)`, with a row of `data` for every
    stage.
    """
    fused = chain.loops == "fused"

    def judge(segment, x, u, t):
        h = segment.cost(x, u, t)
        return h, all_finite(x, u, h)

    def stage(segment, carry, t, *row):
        x, memory, total = carry
        u, memory, out = control(segment, x, memory, *row)
        if fused:  # one loop; else the costs of all stages at once
            h, finite = judge(segment, x, u, t)
            cost, first = total
            total = cost + h, jnp.where(finite, first, jnp.minimum(first, t))
        return (segment.dynamics(x, u, t), memory, total), (x, u, out)

    T, total = chain.horizon, None
    if fused:
        total = jnp.zeros_like(x0[0]), jnp.full_like(chain.ts[0][0], T + 1)
    start = vary((x0, memory, total), like=(x0, data))
    (final, _, total), rows = chain.scan(stage, start, chain.ts, *data)
    xs, us, outs = zip(*rows, strict=True)
    if not fused:
        costs, finite = zip(*chain.map(judge, xs, us, chain.ts), strict=True)
        total = sum(map(jnp.sum, costs)), first_false(chain, finite, True)
    cost, first = total
    last = chain.terminal_cost(final)
    end = jnp.where(all_finite(final, last), first, jnp.minimum(first, T))
    return VectorTrajectory(xs, final, us, cost + last, end), outs


def first_false(chain: VectorChain, flags: tuple, last: Array | bool) -> Int[Array, ""]:
    """The first stage whose flag is false; T for `last` only, T + 1 if all are true."""
    T = chain.horizon
    when = lambda flag, t: jnp.min(jnp.where(flag, T + 1, t).astype(jnp.int32))
    stages = [when(flag, t) for flag, t in zip(flags, chain.ts, strict=True)]
    return ft.reduce(jnp.minimum, [*stages, when(last, T)])


def run(chain: VectorChain, x0: Array, us: tuple) -> VectorTrajectory:
    """x_{t+1} = f_t(x_t, u_t) from x0, and the cost."""
    given = lambda segment, x, memory, u: (u, memory, None)
    return simulate(chain, given, x0, None, us)[0]


@door
def _rollout(problem: AbstractChain, x0: PyTree, us: PyTree) -> Trajectory:
    vectorized = vectorize(problem, x0, us)
    trajectory = run(vectorized.chain, *vectorized.ravel(x0, us))
    xs = vectorized.states(trajectory.xs, trajectory.final)
    return Trajectory(xs, us, trajectory.cost)


def _check_indices(problem: AbstractChain, x0: PyTree, us: PyTree):
    """Raises where a function reads beyond the end of an array."""
    taken = Taken((problem, x0, us))  # a NumPy table takes no traced index
    problem, x0, us = put_together(taken.static, map(jnp.asarray, taken.numbers))
    vectorized = vectorize(problem, x0, us)
    chain = vectorized.chain
    trajectory = run(chain, *vectorized.ravel(x0, us))
    if isinstance(trajectory.cost, Tracer):
        raise ValueError("`check=True` looks at numbers: call outside `jit` for it.")

    def check(name: str, fn: Callable, start: int, *rows: Array):
        error, _ = jax.vmap(checkify.checkify(fn, errors=checkify.index_checks))(*rows)
        if message := error.get():
            first, _, _ = message.partition("\n")
            place, _, what = first.removeprefix("at mapped index ").partition(": ")
            outside = r"index (-?\d+) is out of .* axis (\d+) with size (\d+)"
            index = re.search(outside, what)
            if index and 0 <= int(index[1]) < int(index[3]):
                what = (
                    f"a slice from {index[1]} on ends beyond {index[3]}, the size of "
                    f"axis {index[2]}."
                )
            stage = "" if name == "terminal_cost" else f" at stage {start + int(place)}"
            raise IndexError(
                f"`{name}`{stage} reads beyond the end of an array, where JAX raises "
                "nothing and takes another entry, or a fill value such as NaN: "
                f"{what.strip()} A table that is indexed by the stage needs a row for "
                "each; where the last one should go on, write "
                "`jnp.minimum(t, len(table) - 1)`, also in place of a `mode` of "
                "indexing, which is not seen here."
            )

    data = chain.segments, trajectory.xs, trajectory.us, chain.ts
    for segment, *rows in zip(*data, strict=True):
        check("dynamics", segment.dynamics, segment.start, *rows)
        check("cost", segment.cost, segment.start, *rows)
    check("terminal_cost", chain.terminal_cost, chain.horizon, trajectory.final[None])


def rollout(
    problem: AbstractChain, x0: PyTree, us: PyTree, *, check: bool = False
) -> Trajectory:
    r"""Runs $x_{t+1} = f_t(x_t, u_t)$ from `x0` and adds up the cost.

    **Arguments:**

    - `problem`: a [`diffprog.ControlProblem`][] or [`diffprog.Chain`][].
    - `x0`: the first state, shape `(n,)` or any pytree of floating arrays.
    - `us`: the controls, shape `(T, m)` or any pytree of arrays with T rows.
    - `check`: look for indices beyond the end of an array, such as `table[t]` of a
        table with less rows than stages: JAX reads the last row there, or a fill value,
        without a word. A `mode` that intends this is not seen and refused alike. For
        debugging; outside `jit`.

    **Returns:** a [`diffprog.Trajectory`][]; differentiable in every argument. What
    overflows comes back as it is, infinite or NaN.

    **Raises:** `ValueError` or `TypeError` for shapes and dtypes that do not fit;
    `IndexError`, with `check`, that names the function and the stage.
    """
    (x0, us), _ = strong(x0, us)
    if check:
        with taken_back(problem):
            _check_indices(problem, x0, us)
    return _rollout(problem, x0, us)
