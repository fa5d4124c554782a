import abc
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._common.types import came, with_other_names
from .constraints import as_constraints
from .limits import as_bounds
from .manifold import AbstractManifold, as_manifold


_OF_CHAINS = dict(
    manifold="that of `dp.Chain` serves all phases",
    terminal_cost="that of `dp.Chain` is one of the last state",
    terminal_constraints="those of `dp.Chain` are of the last state",
)
_OF_PROBLEMS = dict(
    bounds="`control_bounds` are the limits of controls",
    state_bounds="limits of states are `constraints=dp.StateBounds(lo, hi)`",
    x0="`dp.solve(problem, method, x0, us)` takes it",
    dt="a stage is what `dynamics` says: `dp.discretize(vector_field, dt)`",
)


class Phase(eqx.Module):
    """`horizon` equal stages of a chain, each with a dynamics and a cost."""

    dynamics: Callable
    cost: Callable
    horizon: int = eqx.field(static=True)
    control_bounds: Any = eqx.field(converter=as_bounds)
    constraints: Any = eqx.field(converter=ft.partial(as_constraints, "constraints"))

    @with_other_names(_OF_CHAINS)
    def __init__(
        self,
        dynamics: Callable,
        cost: Callable,
        horizon: int,
        control_bounds: Any = None,
        constraints: Any = (),
    ):
        self.dynamics, self.cost, self.horizon = dynamics, cost, horizon
        self.control_bounds, self.constraints = control_bounds, constraints

    def __check_init__(self):
        _check_functions(self, "dynamics", "cost")
        check_horizon(self.horizon)


Phase.__init__.__doc__ = """**Arguments:**

- `dynamics`: `(x, u, t) -> x` of the next stage, with `t` the int32 index of the stage
    in the whole chain. In a phase of one stage the next state may have another shape.
- `cost`: `(x, u, t) ->` scalar.
- `horizon`: number of stages, at least 1.
- `control_bounds`: as in [`diffprog.ControlProblem`][]; T is the number of stages of
    the phase.
- `constraints`: as in [`diffprog.ControlProblem`][].
"""


class AbstractChain(eqx.Module):
    """A chain of stages x_{t+1} = f_t(x_t, u_t) with costs h_t and a terminal cost.

    - `phases`: the runs of equal stages, in order.
    - `terminal_cost`: a function `(x) ->` scalar.
    - `terminal_constraints`: those of the last state.
    - `manifold`: a [`diffprog.Manifold`][], or `None` where states are vectors.
    """

    phases: eqx.AbstractVar[tuple[Phase, ...]]
    terminal_cost: eqx.AbstractVar[Any]
    terminal_constraints: eqx.AbstractVar[tuple]
    manifold: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        """The controls of each phase, from the controls as the user holds them."""

    @abc.abstractmethod
    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        """The inverse of `split`; also joins anything else that has a row per stage."""

    @abc.abstractmethod
    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        """All states, as the user holds them: the stages' and the last one."""

    @abc.abstractmethod
    def split_states(self, xs: PyTree) -> tuple[PyTree, ...]:
        """The inverse of `join_states`: the states of each phase, and the last one."""


class _Functions(eqx.Module):
    dynamics: Callable
    cost: Callable
    terminal_cost: Callable


class ControlProblem(AbstractChain):
    r"""An optimal control problem over `horizon` equal stages.

    $$\min_{u_0, \dots, u_{T-1}} \sum_{t=0}^{T-1} h_t(x_t, u_t) + h_T(x_T)
    \quad \text{subject to} \quad x_{t+1} = f_t(x_t, u_t), \; x_0 \text{ given}, \;
    l_t \le u_t \le h_t,$$

    and constraints h(x, u) = 0 or g(x, u) <= 0 of any stages and of the last state.

    States and controls are any pytrees of floating arrays, dicts with sorted keys. The
    numbers inside the functions (fields of an [`equinox.Module`][], say) are leaves of
    the problem: new values never compile again.

    - `system`: the object that holds the three functions and their numbers.
    - `bounds`: the limits that were given, a pair, or else `None`.
    - `constraints`, `terminal_constraints`: tuples of constraints.
    - `given_manifold`: the manifold that was given, or else `None`.
    """

    system: Any
    horizon: int = eqx.field(static=True)
    bounds: Any
    constraints: tuple
    terminal_constraints: tuple
    given_manifold: Any

    @with_other_names(_OF_PROBLEMS)
    def __init__(
        self,
        dynamics: Callable,
        cost: Callable,
        terminal_cost: Callable,
        horizon: int,
        control_bounds: tuple[PyTree, PyTree] | None = None,
        constraints: Any = (),
        terminal_constraints: Any = (),
        manifold: AbstractManifold | None = None,
    ):
        self.system = _Functions(dynamics, cost, terminal_cost)
        self.horizon = horizon
        self.bounds = as_bounds(control_bounds)
        self.constraints = as_constraints("constraints", constraints)
        name = "terminal_constraints"
        self.terminal_constraints = as_constraints(name, terminal_constraints)
        self.given_manifold = as_manifold(manifold)

    def __check_init__(self):
        _check_functions(self.system, "dynamics", "cost", "terminal_cost")
        check_horizon(self.horizon)

    @classmethod
    @with_other_names(_OF_PROBLEMS)
    def from_system(
        cls,
        system: Any,
        horizon: int,
        control_bounds: tuple[PyTree, PyTree] | None = None,
        constraints: Any = (),
        terminal_constraints: Any = (),
        manifold: AbstractManifold | None = None,
    ) -> "ControlProblem":
        """A problem from one object with methods `dynamics`, `cost`, `terminal_cost`.

        Where it has `control_bounds` or a `manifold`, a field or property, these are
        the limits of the controls and how states differ unless others are given. The
        problem holds one copy of the numbers of `system`, so a derivative with respect
        to the problem is one with respect to the system. (Three bound methods given to
        the constructor hold three copies.)
        """
        of = f" of {type(system).__name__}"
        _check_functions(system, "dynamics", "cost", "terminal_cost", of=of)
        functions = system.dynamics, system.cost, system.terminal_cost
        rows = constraints, terminal_constraints
        problem = cls(*functions, horizon, control_bounds, *rows, manifold)
        object.__setattr__(problem, "system", system)  # itself, not a copy
        _ = problem.phases  # raises for limits that are wrong
        return problem

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
    def control_bounds(self) -> tuple[PyTree, PyTree] | None:
        """The limits of the controls: those given, or else those of the system."""
        return self.bounds or getattr(self.system, "control_bounds", None)

    @property
    def manifold(self) -> AbstractManifold | None:
        """How states differ: what was given, or else that of the system."""
        given = self.given_manifold
        return given or as_manifold(getattr(self.system, "manifold", None))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All stages as one phase."""
        limits = self.control_bounds, self.constraints
        return (Phase(self.dynamics, self.cost, self.horizon, *limits),)

    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        return (us,)

    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        return us[0]

    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        return jtu.tree_map(lambda a, b: jnp.concatenate([a, b[None]]), xs[0], final)

    def split_states(self, xs: PyTree) -> tuple[PyTree, ...]:
        return jtu.tree_map(lambda a: a[:-1], xs), jtu.tree_map(lambda a: a[-1], xs)


ControlProblem.__init__.__doc__ = """**Arguments:**

- `dynamics`: `(x, u, t) -> x`, the next state; `t` is the int32 index of the stage.
- `cost`: `(x, u, t) ->` scalar, the cost of a stage.
- `terminal_cost`: `(x) ->` scalar, the cost of the last state.
- `horizon`: the number T of stages, at least 1.
- `control_bounds`: a pair `(lo, hi)`, lo <= u <= hi. Each is a number for all controls,
    a tree like one control, or like `us` with T rows; what can be broadcast to that is,
    `-jnp.inf`, `jnp.inf` and `None` are no limit, and lo = hi fixes a control. The
    numbers are leaves, so that new ones never compile again. [`diffprog.solve`][] keeps
    them exactly, also on the way; [`diffprog.rollout`][] runs what it is given.
- `constraints`: [`diffprog.Equality`][], [`diffprog.Inequality`][] and
    [`diffprog.StateBounds`][] at all stages t = 0 to T - 1; one, or a tuple.
- `terminal_constraints`: those of the last state.
- `manifold`: how states differ where subtraction is not meant, a
    [`diffprog.Manifold`][] or one of `dp.manifolds`; `None` where states are vectors.

**Raises:** `TypeError` for something that is no function or no pair of limits,
`ValueError` for a horizon below 1, and for limits that are NaN or crossed.
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
    terminal_constraints: Any = eqx.field(
        default=(), converter=ft.partial(as_constraints, "terminal_constraints")
    )
    manifold: Any = eqx.field(default=None, converter=as_manifold)

    def __check_init__(self):
        several = isinstance(self.phases, tuple | list) and self.phases
        if not several or not all(isinstance(p, Phase) for p in self.phases):
            raise TypeError(
                f"`phases` is {self.phases!r:.200}; a non-empty tuple of `dp.Phase` is "
                "expected."
            )
        _check_functions(self, "terminal_cost")

    def split(self, us: PyTree) -> tuple[PyTree, ...]:
        if not isinstance(us, tuple | list) or len(us) != len(self.phases):
            came = (
                f"{len(us)} entries" if isinstance(us, tuple | list) else "no entries"
            )
            raise ValueError(
                f"`us` has {came}; the chain has {len(self.phases)} phases: give a "
                "tuple with the stacked controls of each."
            )
        return tuple(us)

    def join_controls(self, us: tuple[PyTree, ...]) -> PyTree:
        return us

    def join_states(self, xs: tuple[PyTree, ...], final: PyTree) -> PyTree:
        return (*xs, final)

    def split_states(self, xs: PyTree) -> tuple[PyTree, ...]:
        return xs


Chain.__init__.__doc__ = """**Arguments:**

- `phases`: a tuple of [`diffprog.Phase`][]s.
- `terminal_cost`: `(x) ->` scalar, the cost of the last state.
- `terminal_constraints`, `manifold`: as in [`diffprog.ControlProblem`][]. One manifold
    takes the states of all phases: where these have different shapes the functions of
    a [`diffprog.Manifold`][] may look at them.
"""


_CALLS = {
    "dynamics": "(x, u, t) -> x",
    "cost": "(x, u, t) -> scalar",
    "terminal_cost": "(x) -> scalar",
}


def _check_functions(owner: Any, *names: str, of: str = ""):
    if isinstance(owner, type):
        raise TypeError(
            f"`system` is the class {owner.__name__}; an object of it is expected: "
            f"`{owner.__name__}(...)`."
        )
    for name in names:
        function = getattr(owner, name, None)
        if not callable(function):
            raise TypeError(
                f"`{name}`{of} is {came(function)}; a function `{_CALLS[name]}` is "
                "expected."
            )


def check_horizon(horizon):
    if isinstance(horizon, bool) or not isinstance(horizon, int):
        raise TypeError(
            f"`horizon` is {horizon!r}; the number of stages is a Python int."
        )
    if horizon < 1:
        raise ValueError(f"`horizon` is {horizon}; at least 1 stage is needed.")
