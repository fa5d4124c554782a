import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.core import eval_jaxpr
from jaxtyping import Array, Float, Int, PyTree

from ._door import door
from ._tree import all_finite, float_dtype, Layout
from ._types import Rows


class Phase(eqx.Module):
    """`horizon` equal stages of a chain, each with a dynamics and a cost."""

    dynamics: Callable
    cost: Callable
    horizon: int = eqx.field(static=True)

    def __check_init__(self):
        _check_functions(self, "dynamics", "cost")
        _check_horizon(self.horizon)


Phase.__init__.__doc__ = """**Arguments:**

- `dynamics`: `(x, u, t) -> x` of the next stage, with `t` the int32 index of the stage
    in the whole chain. In a phase of one stage the next state may have another shape.
- `cost`: `(x, u, t) ->` scalar.
- `horizon`: number of stages, at least 1.
"""


class AbstractChain(eqx.Module):
    """A chain of stages x_{t+1} = f_t(x_t, u_t) with costs h_t and a terminal cost."""

    phases: eqx.AbstractVar[tuple[Phase, ...]]  # in order, runs of equal stages
    terminal_cost: eqx.AbstractVar[Any]  # a function (x) -> scalar

    @abc.abstractmethod
    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        """The controls of each phase, from the controls as the user holds them."""

    @abc.abstractmethod
    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        """The inverse of `split`; also joins anything else that has a row per stage."""

    @abc.abstractmethod
    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        """All states, as the user holds them: the stages' and the last one."""


class _Functions(eqx.Module):
    dynamics: Callable
    cost: Callable
    terminal_cost: Callable


class ControlProblem(AbstractChain):
    r"""An optimal control problem over `horizon` equal stages.

    $$\min_{u_0, \dots, u_{T-1}} \sum_{t=0}^{T-1} h_t(x_t, u_t) + h_T(x_T)
    \quad \text{subject to} \quad x_{t+1} = f_t(x_t, u_t), \; x_0 \text{ given}.$$

    States and controls are any pytrees of floating arrays. The numbers inside the
    functions (fields of an [`equinox.Module`][], say) are leaves of the problem: new
    values never compile again.
    """

    system: Any
    horizon: int = eqx.field(static=True)

    def __init__(
        self,
        dynamics: Callable,
        cost: Callable,
        terminal_cost: Callable,
        horizon: int,
    ):
        self.system = _Functions(dynamics, cost, terminal_cost)
        self.horizon = horizon

    def __check_init__(self):
        _check_functions(self.system, "dynamics", "cost", "terminal_cost")
        _check_horizon(self.horizon)

    @classmethod
    def from_system(cls, system: Any, horizon: int) -> "ControlProblem":
        """A problem from one object with methods `dynamics`, `cost`, `terminal_cost`.

        The problem holds one copy of the numbers of `system`, so a derivative with
        respect to the problem is one with respect to the system. (Three bound methods
        given to the constructor hold three copies.)
        """
        _check_functions(system, "dynamics", "cost", "terminal_cost")
        problem = cls(system.dynamics, system.cost, system.terminal_cost, horizon)
        return eqx.tree_at(lambda p: p.system, problem, system)

    @property
    def dynamics(self) -> Callable:
        return self.system.dynamics

    @property
    def cost(self) -> Callable:
        return self.system.cost

    @property
    def terminal_cost(self) -> Callable:
        return self.system.terminal_cost

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(self.dynamics, self.cost, self.horizon),)

    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        return (us,)

    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        return us[0]

    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        return jtu.tree_map(lambda a, b: jnp.concatenate([a, b[None]]), xs[0], final)


ControlProblem.__init__.__doc__ = """**Arguments:**

- `dynamics`: `(x, u, t) -> x`, the next state; `t` is the int32 index of the stage.
- `cost`: `(x, u, t) ->` scalar, the cost of a stage.
- `terminal_cost`: `(x) ->` scalar, the cost of the last state.
- `horizon`: the number T of stages, at least 1.

**Raises:** `TypeError` for something that is no function, `ValueError` for a horizon
below 1.
"""


class Chain(AbstractChain):
    """Phases one after another, each with its own functions, sizes and horizon.

    A phase of one stage may change the shape of the state, so it also serves as the
    joint between two phases whose states differ, or as one layer of a network.
    Controls are a tuple with an entry per phase (leading axis: the stages of the
    phase); states come back as such a tuple, followed by the last state.
    """

    phases: tuple[Phase, ...]
    terminal_cost: Callable

    def __check_init__(self):
        if not self.phases or not all(isinstance(p, Phase) for p in self.phases):
            raise TypeError(
                f"`phases` is {self.phases!r:.200}; a non-empty tuple of `dp.Phase` is "
                "expected."
            )
        _check_functions(self, "terminal_cost")

    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        if not isinstance(us, tuple | list) or len(us) != len(self.phases):
            came = len(us) if isinstance(us, tuple | list) else type(us).__name__
            raise ValueError(
                f"`us` has {came} entries; the chain has {len(self.phases)} phases: "
                "give a tuple with the stacked controls of each."
            )
        return tuple(us)

    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        return us

    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        return (*xs, final)


Chain.__init__.__doc__ = """**Arguments:**

- `phases`: a tuple of [`diffprog.Phase`][]s.
- `terminal_cost`: `(x) ->` scalar, the cost of the last state.
"""


_CALLS = {
    "dynamics": "(x, u, t) -> x",
    "cost": "(x, u, t) -> scalar",
    "terminal_cost": "(x) -> scalar",
}


def _check_functions(owner: Any, *names: str):
    for name in names:
        function = getattr(owner, name, None)
        if not callable(function):
            raise TypeError(
                f"`{name}` is {function!r} in {type(owner).__name__}; a function "
                f"`{_CALLS[name]}` is expected."
            )


def _check_horizon(horizon):
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise TypeError(
            f"`horizon` is {horizon!r}; the number of stages is a Python int."
        )
    if horizon < 1:
        raise ValueError(f"`horizon` is {horizon}; at least 1 stage is needed.")


class Segment(eqx.Module):
    """One phase as functions of vectors, traced once."""

    dynamics: Callable = eqx.field(static=True)  # (x, u, t) -> x
    cost: Callable = eqx.field(static=True)  # (x, u, t) -> scalar
    start: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)


class VectorChain(eqx.Module):
    """A chain whose states and controls are vectors: what the recursions run on.

    Data that have a row per stage are tuples with one stacked array per segment.
    `scan` and `map` are the only loops over stages in this library.
    """

    segments: tuple[Segment, ...]
    terminal_cost: Callable = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

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
        outs: list[Any] = [None] * len(self.segments)
        order = range(len(self.segments))
        for i in reversed(order) if reverse else order:
            rows, segment = tuple(d[i] for d in data), self.segments[i]
            if segment.horizon == 1:
                row = jtu.tree_map(lambda a: a[0], rows)
                carry, out = fn(segment, carry, *row)
                outs[i] = jtu.tree_map(lambda a: a[None], out)
            else:
                body = lambda c, row, segment=segment: fn(segment, c, *row)
                carry, outs[i] = lax.scan(body, carry, rows, reverse=reverse)
        return carry, tuple(outs)

    def map(self, fn: Callable, *data: tuple) -> tuple:
        """`out = fn(segment, *row)` at every stage, all at once."""
        return tuple(
            jax.vmap(lambda *row, segment=segment: fn(segment, *row))(*rows)
            for segment, *rows in zip(self.segments, *data, strict=True)
        )


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
        stacks = tuple(
            jax.vmap(layout.ravel)(u)
            for layout, u in zip(self.u_layouts, self.problem.split(us), strict=True)
        )
        return self.x_layouts[0].ravel(x0), stacks

    def states(self, trajectory: VectorTrajectory) -> PyTree:
        *layouts, last = self.x_layouts
        xs = tuple(
            jax.vmap(layout.unravel)(x)
            for layout, x in zip(layouts, trajectory.xs, strict=True)
        )
        return self.problem.join_states(xs, last.unravel(trajectory.final))

    def controls(self, us: tuple) -> PyTree:
        return self.problem.join_controls(
            tuple(
                jax.vmap(layout.unravel)(u)
                for layout, u in zip(self.u_layouts, us, strict=True)
            )
        )


def vectorize(problem: AbstractChain, x0: PyTree, us: PyTree) -> Vectorized:
    """Traces each function of the problem once, on vectors, and checks its results."""
    if not isinstance(problem, AbstractChain):
        raise TypeError(
            f"`problem` is a {type(problem).__name__}; a `dp.ControlProblem` or "
            "`dp.Chain` is expected."
        )
    dtype = float_dtype(x0=x0, us=us)
    x_layouts, u_layouts, segments, start = [Layout.of(x0, dtype)], [], [], 0
    if x_layouts[0].size == 0:
        raise ValueError("`x0` has no entries; a state has at least one.")
    for phase, u in zip(problem.phases, problem.split(us), strict=True):
        u_layouts.append(_stage_layout(u, phase.horizon, dtype))
        segment, x_layout = _trace(phase, start, x_layouts[-1], u_layouts[-1])
        x_layouts.append(x_layout)
        segments.append(segment)
        start += phase.horizon
    terminal = _traced(
        lambda x: _scalar(
            "terminal_cost", problem.terminal_cost(x_layouts[-1].unravel(x)), dtype
        ),
        jax.ShapeDtypeStruct((x_layouts[-1].size,), dtype),
    )
    chain = VectorChain(tuple(segments), terminal, dtype)
    return Vectorized(chain, problem, tuple(x_layouts), tuple(u_layouts))


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


def _traced(fn: Callable, *shapes: jax.ShapeDtypeStruct) -> Callable:
    """`fn` as a fixed program: derivatives and loops never run its Python again."""
    closed = jax.make_jaxpr(fn)(*shapes)
    return lambda *args: eval_jaxpr(closed.jaxpr, closed.consts, *args)[0]


def _trace(phase: Phase, start: int, x_layout: Layout, u_layout: Layout):
    dtype, next_layout = x_layout.dtype, x_layout

    def dynamics(x, u, t):
        nonlocal next_layout
        new = phase.dynamics(x_layout.unravel(x), u_layout.unravel(u), t)
        next_layout = _next_layout(new, phase, x_layout)
        return next_layout.ravel(new)

    def cost(x, u, t):
        value = phase.cost(x_layout.unravel(x), u_layout.unravel(u), t)
        return _scalar("cost", value, dtype)

    shapes = (
        jax.ShapeDtypeStruct((x_layout.size,), dtype),
        jax.ShapeDtypeStruct((u_layout.size,), dtype),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    segment = Segment(
        _traced(dynamics, *shapes), _traced(cost, *shapes), start, phase.horizon
    )
    return segment, next_layout


def _next_layout(x: PyTree, phase: Phase, before: Layout) -> Layout:
    _check_dtype("dynamics", x, before.dtype)
    layout = Layout.of(x, before.dtype)
    if phase.horizon > 1 and layout != before:
        raise ValueError(
            f"`dynamics` returned a state with the shapes {layout.describe()}; the "
            f"state it was given has {before.describe()}, and both must agree."
        )
    return layout


def _check_dtype(name: str, tree: PyTree, dtype):
    for path, leaf in jtu.tree_leaves_with_path(tree):
        leaf = jnp.asarray(leaf)
        if leaf.dtype != dtype and not leaf.weak_type:
            raise TypeError(
                f"`{name}` returned {leaf.dtype}{jtu.keystr(path)} where x0 and us are "
                f"{dtype}: give the arrays inside the problem the dtype of x0, or make "
                "them Python floats, which follow it."
            )


def _scalar(name: str, value, dtype) -> Float[Array, ""]:
    if len(jtu.tree_leaves(value)) != 1 or jnp.shape(jtu.tree_leaves(value)[0]) != ():
        came = jtu.tree_map(jnp.shape, value)
        raise ValueError(
            f"`{name}` returned something of shape {came}; a cost is one scalar: sum "
            "it up, or index the entry that is meant."
        )
    _check_dtype(name, value, dtype)
    return jnp.asarray(jtu.tree_leaves(value)[0]).astype(dtype)


class Trajectory(eqx.Module):
    """States, controls and their cost.

    - `xs`: states, T + 1 rows.
    - `us`: controls, T rows.
    - `cost`: the sum of all stage costs and the terminal cost.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    cost: Float[Array, ""]


def total_cost(chain: VectorChain, xs: tuple, final: Array, us: tuple):
    """The cost, and the first stage where a state or cost is not finite."""
    costs = chain.map(lambda s, *row: s.cost(*row), xs, us, chain.ts)
    last = chain.terminal_cost(final)
    first = first_nonfinite(chain, (xs, costs), (final, last))
    return sum(jnp.sum(h) for h in costs) + last, first


def first_nonfinite(chain: VectorChain, rows: tuple, last: PyTree) -> Int[Array, ""]:
    """The first stage with an entry of `rows` that is not finite; T for `last` only.

    T + 1 if everything is finite.
    """
    T = chain.horizon
    when = lambda tree, t: jnp.where(all_finite(tree), T + 1, t).astype(jnp.int32)
    stages = chain.map(lambda _, t, *row: when(row, t), chain.ts, *rows)
    return jnp.minimum(
        jnp.min(jnp.stack([jnp.min(t) for t in stages])), when(last, jnp.int32(T))
    )


def run(chain: VectorChain, x0: Array, us: tuple) -> VectorTrajectory:
    """x_{t+1} = f_t(x_t, u_t) from x0, and the cost."""
    step = lambda segment, x, u, t: (segment.dynamics(x, u, t), x)
    final, xs = chain.scan(step, x0, us, chain.ts)
    return VectorTrajectory(xs, final, us, *total_cost(chain, xs, final, us))


def _rollout(problem: AbstractChain, x0: PyTree, us: PyTree) -> Trajectory:
    vectorized = vectorize(problem, x0, us)
    trajectory = run(vectorized.chain, *vectorized.ravel(x0, us))
    return Trajectory(vectorized.states(trajectory), us, trajectory.cost)


rollout_door = door(_rollout)


def rollout(problem: AbstractChain, x0: PyTree, us: PyTree) -> Trajectory:
    r"""Runs $x_{t+1} = f_t(x_t, u_t)$ from `x0` and adds up the cost.

    **Arguments:**

    - `problem`: a [`diffprog.ControlProblem`][] or [`diffprog.Chain`][].
    - `x0`: the first state, shape `(n,)` or any pytree of floating arrays.
    - `us`: the controls, shape `(T, m)` or any pytree of arrays with T rows.

    **Returns:** a [`diffprog.Trajectory`][]; differentiable in every argument. What
    overflows comes back as it is, infinite or NaN.

    **Raises:** `ValueError` or `TypeError` for shapes and dtypes that do not fit.
    """
    return rollout_door(problem, x0, us)
