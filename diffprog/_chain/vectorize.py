"""A problem as a chain of vectors, each of its functions traced once."""

import functools as ft
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array, PyTree

from .._common.primitives import dependence
from .._common.tree import float_dtype, Layout, vary
from .._common.types import noted, Rows as Stacked, shapes
from .calls import about_state, call, check_dtype, scalar
from .constraints import AbstractConstraint, Duals, Rows, value_of
from .limits import like_controls
from .manifold import AbstractManifold, Chart, local_difference, local_retraction
from .problem import AbstractChain, ControlProblem, Phase
from .program import Program
from .segment import End, Segment
from .vector import VectorChain


class Vectorized(eqx.Module):
    """A problem as a `VectorChain`, with the way back to the pytrees of the user."""

    chain: VectorChain
    problem: AbstractChain
    x_layouts: tuple[Layout, ...] = eqx.field(static=True)  # one per segment, and last
    v_layouts: tuple[Layout, ...] = eqx.field(static=True)  # of local coordinates
    u_layouts: tuple[Layout, ...] = eqx.field(static=True)

    def ravel(self, x0: PyTree, us: PyTree):
        stacks = _rows(Layout.ravel, self.u_layouts, self.problem.split(us))
        return self.x_layouts[0].ravel(x0), stacks

    def ravel_states(self, x0: PyTree, xs: PyTree) -> tuple[tuple, Array]:
        """Those of the stages and the last one; the first of all counts as x0."""
        float_dtype(x0=x0, xs=xs)
        sizes = [layout.size for layout in self.x_layouts]
        rows = [segment.horizon for segment in self.chain.segments]
        struct = lambda *shape: jax.ShapeDtypeStruct(shape, self.chain.dtype)
        stacks = tuple(map(struct, rows, sizes))
        expected = shapes(jax.eval_shape(self.states, stacks, struct(sizes[-1])))
        if shapes(xs) != expected:
            raise ValueError(
                f"`xs` has the shapes {shapes(xs):.200}; {expected:.200} is expected, "
                "as in `solution.xs`: the states x_0 to x_T."
            )
        *parts, final = self.problem.split_states(xs)
        head, *tail = _rows(Layout.ravel, self.x_layouts[:-1], tuple(parts))
        head = jnp.concatenate([self.x_layouts[0].ravel(x0)[None], head[1:]])
        return (head, *tail), self.x_layouts[-1].ravel(final)

    def states(self, xs: tuple, final: Array) -> PyTree:
        return self._states(self.x_layouts, xs, final)

    def differences(self, vs: tuple, final: Array) -> PyTree:
        """Local coordinates, or gradients in them, arranged like the states."""
        return self._states(self.v_layouts, vs, final)

    def _states(self, layouts: Sequence[Layout], xs: tuple, final: Array) -> PyTree:
        *layouts, last = layouts
        rows = _rows(Layout.unravel, layouts, xs)
        return self.problem.join_states(rows, last.unravel(final))

    def controls(self, us: tuple) -> PyTree:
        return self.problem.join_controls(_rows(Layout.unravel, self.u_layouts, us))

    def duals(self, multipliers: Any, penalty: Any) -> Duals:
        """From those of an earlier solution, if there was one."""
        none, dtype = self.chain.no_duals, self.chain.dtype
        if multipliers is None:
            return none
        stages = self.problem.split(multipliers.constraints)
        given = none.given(self.chain.names, stages, multipliers.terminal)
        given = replace(given, penalty=penalty)
        return jtu.tree_map(lambda a: jnp.asarray(a).astype(dtype), given)


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
    charts = Charts(problem.manifold, zeros)
    if x_layouts[0].size == 0:
        raise ValueError(
            "`x0` has no entries; a state has at least one: `jnp.zeros(1)` for a "
            "problem without a state."
        )
    names = []
    for phase, u in zip(problem.phases, parts, strict=True):
        u_layouts.append(_stage_layout(u, phase.horizon, dtype))
        layouts = x_layouts[-1], u_layouts[-1]
        segment, x_layout = _trace(phase, start, *layouts, zeros, names, charts)
        x_layouts.append(x_layout)
        segments.append(segment)
        start += phase.horizon
    if isinstance(problem, ControlProblem):
        _check_next(x_layouts[-1], x_layouts[0])
    terminal = Program.of(
        lambda x: scalar(
            "terminal_cost", problem.terminal_cost, dtype, x_layouts[-1].unravel(x)
        ),
        zeros(x_layouts[-1]),
    )
    limits = _limits(problem, parts, u_layouts, dtype)
    last, given = x_layouts[-1], problem.terminal_constraints
    rows = _rows_of("terminal_constraints", given, names, dtype, [last], zeros(last))
    end = End(terminal, rows, charts.of(last, start))
    chain = VectorChain(tuple(segments), end, dtype, limits, tuple(names))
    layouts = x_layouts, map(charts.coordinates, x_layouts), u_layouts
    return Vectorized(chain, problem, *map(tuple, layouts))


def _limits(
    problem: AbstractChain, parts: tuple, layouts: Sequence[Layout], dtype
) -> tuple[Stacked, ...]:
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


def _trace(
    phase: Phase,
    start: int,
    x_layout: Layout,
    u_layout: Layout,
    zeros: Callable,
    names: list[str],
    charts: "Charts",
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
    f, h = Program.of(dynamics, *examples), Program.of(cost, *examples)
    layouts, given = (x_layout, u_layout), phase.constraints
    rows = _rows_of("constraints", given, names, dtype, layouts, *examples)
    segment = Segment(
        cost=h,
        rows=rows,
        chart=charts.of(x_layout, start),
        dynamics=f,
        next_chart=charts.of(next_layout, start + phase.horizon),
        start=start,
        horizon=phase.horizon,
    )
    return segment, next_layout


class Charts:
    """The local coordinates of states, traced once for each kind of state."""

    def __init__(self, manifold: AbstractManifold | None, zeros: Callable):
        self.manifold, self.zeros, self.known = manifold, zeros, {}

    def of(self, layout: Layout, stage: int) -> Chart:
        """That of the states of a stage."""
        if self.manifold is None:
            return Chart.flat(layout.size)
        if layout not in self.known:
            with noted(lambda: self._where(layout, stage)):
                self.known[layout] = self._both(self.manifold, layout)
        return self.known[layout][0]

    def coordinates(self, layout: Layout) -> Layout:
        return layout if self.manifold is None else self.known[layout][1]

    def _where(self, layout: Layout, stage: int) -> str:
        """What is to be said of a kind of state that is refused."""
        if not self.known:
            return "The state has the shapes of `x0`."
        first = next(iter(self.known)).describe()
        return (
            f"The state of stage {stage} has the shapes {layout.describe():.200}, and "
            f"`x0` {first:.200}: one manifold serves all phases of a chain, and must "
            "take the states of each. A `dp.Manifold(difference, retract)` may look at "
            "their shapes."
        )

    def _both(self, manifold: AbstractManifold, layout: Layout) -> tuple[Chart, Layout]:
        """With the cheaper maps for derivatives, if there are some."""
        chart, coordinates = self._trace(manifold, layout)
        cheaper = manifold.near()
        if cheaper is None:
            return chart, coordinates
        near, found = self._trace(cheaper, layout)
        if found != coordinates:
            raise ValueError(
                f"`near()` of the manifold has local coordinates of shape "
                f"{found.describe():.200}, and the manifold of "
                f"{coordinates.describe():.200}, where the state has "
                f"{layout.describe():.200}: both must agree."
            )
        return replace(chart, near=near), coordinates

    def _trace(self, manifold: AbstractManifold, x_layout: Layout):
        coordinates = x_layout
        x = self.zeros(x_layout)

        def difference(x, y):
            nonlocal coordinates
            v = local_difference(manifold, *map(x_layout.unravel, (x, y)))
            coordinates = Layout.of(v, x_layout.dtype)
            return coordinates.ravel(v)

        def retract(y, v):
            given = x_layout.unravel(y), coordinates.unravel(v)
            return x_layout.ravel(local_retraction(manifold, *given))

        to = Program.of(difference, x, x)
        back = Program.of(retract, x, self.zeros(coordinates))
        return Chart(coordinates.size, to, back), coordinates


def _rows_of(
    kind: str,
    constraints: Sequence[AbstractConstraint],
    names: list[str],
    dtype,
    layouts: Sequence[Layout],
    *examples: Array,
) -> Rows | None:
    """Constraints as one vector; their names are added to the list."""
    if not constraints:
        return None
    sizes = []

    def values(*args):
        """A vector for each constraint."""
        *vectors, t = args if len(args) > len(layouts) else (*args, None)
        trees = [a.unravel(v) for a, v in zip(layouts, vectors, strict=True)]
        given = trees if t is None else (*trees, t)
        found = [
            value_of(name, constraint, dtype, *given)
            for name, constraint in zip(own, constraints, strict=True)
        ]
        sizes[:] = map(len, found)
        return found

    named = ((getattr(c, "name", None), i) for i, c in enumerate(constraints))
    own = [name or f"{kind}[{i}]" for name, i in named]
    if len(set(own)) < len(own):
        raise ValueError(f"`{kind}` have the names {own}; different ones are expected.")
    closed, first = jax.make_jaxpr(values)(*examples), len(names)
    names += own
    inputs = dependence(closed.jaxpr)
    for name, of in zip(own, inputs, strict=True):
        if not of & {*range(len(layouts))}:
            arguments = "x or u" if len(layouts) > 1 else "x"
            raise ValueError(
                f"`{name}` does not depend on {arguments}, so that no solve can change "
                "it; a function of them is expected."
            )
    each = lambda of: tuple(np.repeat(of, sizes).tolist())
    joined = lambda *args: jnp.concatenate(
        eval_jaxpr(closed.jaxpr, closed.consts, *args)
    )
    return Rows(
        Program.of(joined, *examples),
        equal=each([c.equal for c in constraints]),
        groups=each(range(first, first + len(constraints))),
        free=each([1 in of for of in inputs]),
    )


def _check_next(layout: Layout, before: Layout):
    if layout != before:
        raise ValueError(
            f"`dynamics` returned a state with the shapes {layout.describe()}; the "
            f"state it was given has {before.describe()}, and both must agree."
            + about_state(before.structs())
        )
