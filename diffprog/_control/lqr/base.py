import abc
import functools as ft
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..._chain.problem import check_horizon
from ..._chain.vector import VectorChain, VectorTrajectory
from ..._common.linalg import matmul, solve_positive, symmetrize
from ..._common.result import RESULTS
from ..._common.tree import norm
from ..._common.types import AbstractPart, Rows, Stacks
from .box import solve_in_box
from .expand import AbstractModel, affine, quadratic
from .policy import Policy


NEVER = np.int32(np.iinfo(np.int32).max)  # no stage


def bellman(
    F: Array,
    W: Array,
    VF: Array,
    m: int,
    damping: Array,
    valid: Array | bool = True,
    box: tuple[Array, ...] = (),
):
    """One stage of the backward pass, in the blocks of `expand`, from the product V F.

    Minimizes (1, x, u)' Z (1, x, u) / 2 + damping u'u / 2 over u, Z = W + F' V F:
    u = [k K] (1, x), with k in a `box` (lower, upper) if there is one. Returns the
    cost-to-go before the stage, [k K], the terms h'k, k'Gk and k'k of the change along
    k, and whether the minimum exists. Where it does not, k has negative curvature and K
    is 0; both are 0 if V is not `valid`.
    """
    Z = W + matmul(F.T, VF)
    u = Z.shape[0] - m
    G = Z[u:, u:]  # R + B'PB
    H = Z[u:, :u]  # [h H]: h = r + B'(p + Pc), H = B'PA + M'
    damped = G + damping * jnp.eye(m, dtype=Z.dtype)
    if box:
        lower, upper = box
        gains, positive = solve_in_box(damped, H, lower, upper, valid)
    else:  # [k K] = -inv(damped) [h H]
        gains, positive = solve_positive(damped, -H, valid)
    k = gains[:, 0]
    change = matmul(jnp.stack([H[:, 0], matmul(G, k), k]), k)
    saved = matmul(H.T, gains)
    if box:  # of K'h = H'k, which hold without limits, only the second is p
        saved = jnp.concatenate([saved[:, :1].T, saved[1:]])
    return symmetrize(Z[:u, :u] + saved), gains, change, positive


class Sweep(eqx.Module):
    """What a backward pass leaves behind.

    - `gains`: [k K] of every stage, one stacked array per segment of the chain.
    - `slope`, `curvature`: at a step size s the damped model changes the cost by
        s slope + s^2 curvature / 2.
    - `decrement`: the decrease that the undamped model promises along the direction;
        convergence is judged by it.
    - `gradient`: norm of the gradient of the objective in the controls, as far as they
        are free to move.
    - `positive`: whether every stage had a minimum.
    - `first_nonfinite`: first stage from which the pass finds no finite numbers; a
        large one, the default, if there is none.
    - `largest`: the largest entry of that gradient, where there are constraints.
    """

    gains: Stacks
    slope: Float[Array, ""]
    curvature: Float[Array, ""]
    decrement: Float[Array, ""]
    gradient: Float[Array, ""]
    positive: Bool[Array, ""]
    first_nonfinite: Int[Array | np.number, ""] = NEVER
    largest: Float[Array, ""] | None = None

    @property
    def largest_entry(self) -> Float[Array, ""]:
        """At least the largest entry of the gradient."""
        return self.gradient if self.largest is None else self.largest

    @property
    def promised(self) -> Float[Array, ""]:
        """The decrement; infinite, so that nothing has converged, where the step
        ascends, or promises nothing although there is a gradient.
        """
        limits = jnp.finfo(self.decrement.dtype)
        none = (self.decrement == 0) & (self.gradient**2 > limits.tiny / limits.eps)
        wrong = none | (self.slope > 0) | (self.decrement < 0)
        return jnp.where(wrong, jnp.inf, self.decrement)


def summarize(
    gains: Stacks,
    gradients: Rows,
    change: Sequence[Array] | Float[Array, "3"],
    damping: Array,
    positive: Array,
    first_nonfinite: Array | np.number = NEVER,
    limited: bool = False,
    priced: bool = False,
) -> Sweep:
    """The `Sweep` of gains, from the sums of what `bellman` says of the `change`.

    The model without damping, s h'k + s^2 k'Gk / 2 in sum, promises a decrease of
    (h'k)^2 / (2 k'Gk): so a large damping cannot pass off a short step as convergence.
    A step that leads nowhere promises nothing. Where controls are `limited` a pass
    without damping goes to its minimum at s = 1, and no further.
    """
    slope, curvature, squares = change
    promised = jnp.where(curvature > 0, slope / curvature * slope / 2, jnp.inf)
    if limited:
        at_limits = (damping == 0) & (curvature < -slope)
        promised = jnp.where(at_limits, -(slope + curvature / 2), promised)
    model = slope, curvature + damping * squares, jnp.where(slope == 0, 0.0, promised)
    known = norm(gradients), positive & jnp.isfinite(slope), first_nonfinite
    return Sweep(gains, *model, *known, largest(gradients) if priced else None)


def largest(rows: Rows) -> Float[Array, ""]:
    """The largest absolute value."""
    return ft.reduce(jnp.maximum, [jnp.max(jnp.abs(row)) for row in rows])


class Value(eqx.Module):
    r"""The optimal cost-to-go $\frac12 x^\top P x + p^\top x + \text{constant}$.

    - `P`: shape `(T + 1, n, n)`.
    - `p`: shape `(T + 1, n)`.
    - `constant`: shape `(T + 1,)`.
    """

    P: Float[Array, "states n n"]
    p: Float[Array, "states n"]
    constant: Float[Array, " states"]


def float_array(name: str, value, like: Array | None = None) -> Array:
    """`value` as an array of floats, of the dtype of `like`; weak types follow it."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` is {value!r:.100}; an array of floats is expected."
        ) from error
    dtype = array.dtype if like is None else like.dtype
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"`{name}` has dtype {dtype}; float32 or float64 is expected: convert it "
            "with `.astype(float)`, or write 1.0 for 1."
        )
    weak = array.weak_type and jnp.issubdtype(array.dtype, jnp.floating)
    if array.dtype != dtype and not weak:
        raise ValueError(
            f"`{name}` has dtype {array.dtype}; {dtype}, as `A`, is expected: convert "
            "it with `.astype`."
        )
    return array.astype(dtype)


def _check_terms(given: tuple, advice: str, *time: str) -> dict[str, Array]:
    """The terms of an `LQR` by name; with `time`, a row for each stage."""
    A = float_array("A", given[0])
    B = float_array("B", given[1], A)
    T, ndim = A.shape[: len(time)], len(time) + 2
    named = lambda *shape: f"({', '.join((*time, *shape))})"
    if A.ndim != ndim or A.shape[-1] != A.shape[-2] or 0 in A.shape:
        least = " and ".join(f"{size} >= 1" for size in (*time, "n"))
        raise ValueError(
            f"`A` has shape {A.shape}; {named('n', 'n')} with {least} is expected. "
            f"{advice}."
        )
    n, m = A.shape[-1], B.shape[-1] if B.ndim else 0
    if B.ndim != ndim or B.shape[:-1] != A.shape[:-1] or m == 0:
        sizes = ", ".join(map(str, A.shape[:-1]))
        raise ValueError(
            f"`B` has shape {B.shape}; {named('n', 'm')} = ({sizes}, m) with m >= 1 is "
            "expected."
        )
    shapes = dict(
        A=(*T, n, n), B=(*T, n, m), c=(*T, n), Q=(*T, n, n), R=(*T, m, m),
        M=(*T, n, m), q=(*T, n), r=(*T, m), Q_final=(n, n), q_final=(n,),
    )  # fmt: skip
    arrays = {}
    for (name, shape), term in zip(shapes.items(), given, strict=True):
        array = (
            jnp.zeros(shape, A.dtype) if term is None else float_array(name, term, A)
        )
        if array.shape != shape:
            raise ValueError(
                f"`{name}` has shape {array.shape}; {shape} is expected, as "
                f"`A` has {A.shape} and `B` {B.shape}."
            )
        arrays[name] = array
    return arrays


class LQR(eqx.Module):
    r"""A linear-quadratic control problem, every term stacked over its T stages.

    $$\sum_{t<T} \tfrac12 x_t^\top Q_t x_t + \tfrac12 u_t^\top R_t u_t
    + x_t^\top M_t u_t + q_t^\top x_t + r_t^\top u_t
    + \tfrac12 x_T^\top Q_T x_T + q_T^\top x_T,
    \quad x_{t+1} = A_t x_t + B_t u_t + c_t.$$
    """

    A: Float[Array, "T n n"]
    B: Float[Array, "T n m"]
    c: Float[Array, "T n"]
    Q: Float[Array, "T n n"]
    R: Float[Array, "T m m"]
    M: Float[Array, "T n m"]
    q: Float[Array, "T n"]
    r: Float[Array, "T m"]
    Q_final: Float[Array, "n n"]
    q_final: Float[Array, " n"]

    def __init__(
        self, A, B, c, Q, R, M=None, q=None, r=None, Q_final=None, q_final=None
    ):
        given = (A, B, c, Q, R, M, q, r, Q_final, q_final)
        advice = "Terms that do not change with time: `dp.LQR.constant(..., horizon=T)`"
        for name, array in _check_terms(given, advice, "T").items():
            setattr(self, name, array)

    @classmethod
    def constant(
        cls, A, B, c, Q, R, M=None, q=None, r=None, Q_final=None, q_final=None, *,
        horizon: int,
    ) -> "LQR":  # fmt: skip
        """The problem whose terms are the same at each of `horizon` stages."""
        check_horizon(horizon)
        given = (A, B, c, Q, R, M, q, r, Q_final, q_final)
        advice = "Terms that change with time: `dp.LQR(...)`"
        *stage, Q_final, q_final = _check_terms(given, advice).values()
        stages = [jnp.broadcast_to(a, (horizon, *a.shape)) for a in stage]
        return cls(*stages, Q_final=Q_final, q_final=q_final)  # pyright: ignore

    def cost(self, xs: Float[Array, "states n"], us: Float[Array, "T m"]):
        """The objective at states and controls."""
        z = jnp.concatenate([jnp.ones_like(us[:, :1]), xs[:-1], us], 1)
        F, W, V = self.blocks()
        last = jnp.concatenate([jnp.ones_like(xs[-1, :1]), xs[-1]])
        stages = jnp.einsum("ti,tij,tj->", z, W, z, precision="highest")
        return (stages + matmul(last, matmul(V, last))) / 2

    @property
    def stages(self) -> tuple[Array, ...]:
        """The terms that have a row per stage."""
        return (self.A, self.B, self.c, self.Q, self.R, self.M, self.q, self.r)

    def blocks(self):
        """F and W of every stage and the last V, see `expand`."""

        def stage(A, B, c, Q, R, M, q, r):
            cat = jnp.concatenate
            hessian = cat([cat([Q, M], 1), cat([M.T, R], 1)])
            return affine(c, cat([A, B], 1)), quadratic(cat([q, r]), hessian)

        F, W = jax.vmap(stage)(*self.stages)
        V = quadratic(self.q_final, self.Q_final)
        return F, symmetrize(W), symmetrize(V)


LQR.__init__.__doc__ = """**Arguments:** arrays of one floating dtype; `None` is zero.
NumPy arrays and lists become arrays of JAX, float32 unless `jax_enable_x64` is set.

- `A`, `B`, `c`: dynamics, shapes `(T, n, n)`, `(T, n, m)`, `(T, n)`.
- `Q`, `R`, `M`: Hessian blocks of the stage cost, `(T, n, n)`, `(T, m, m)`, and the
    mixed one `(T, n, m)`. Of `Q`, `R` and `Q_final` only the symmetric part counts.
- `q`, `r`: gradients of the stage cost, `(T, n)`, `(T, m)`.
- `Q_final`, `q_final`: the terminal cost, `(n, n)`, `(n,)`.

**Raises:** `ValueError` or `TypeError` naming the term whose shape or dtype does not
fit.
"""


class LQRSolution(eqx.Module):
    """The solution of an [`diffprog.LQR`][] problem.

    - `xs`, `us`: the optimal states `(T + 1, n)` and controls `(T, m)`.
    - `cost`: the optimal cost, equal to the value function at `x0`.
    - `policy`: u = K x + k, see [`diffprog.Policy`][].
    - `value`: the cost-to-go of every stage, see [`diffprog.Value`][].
    - `result`: a [`diffprog.RESULTS`][] code.
    """

    xs: Float[Array, "states n"]
    us: Float[Array, "T m"]
    cost: Float[Array, ""]
    policy: Policy
    value: Value
    result: RESULTS


class AbstractRiccati(AbstractPart):
    """How the Riccati recursion of a linear-quadratic model is run.

    All work on the blocks of `expand`; [k K] are the gains of a stage. `scan`, like
    `lax.scan` with all arguments by position, is the loop to take from stage to stage.

    - `sequential`: whether it goes from stage to stage; else all are taken at once.
    """

    sequential: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def backward(
        self,
        chain: VectorChain,
        trajectory: VectorTrajectory,
        model: AbstractModel,
        damping: Float[Array, ""],
    ) -> Sweep:
        """The backward pass of a direction, over all segments of the chain."""

    @abc.abstractmethod
    def values(
        self, lqr: LQR, scan: Callable
    ) -> tuple[Value, Float[Array, "T m n"], Float[Array, "T m"]]:
        """Costs-to-go, K and k of every stage; NaN before a stage without minimum."""

    @abc.abstractmethod
    def rollout(
        self,
        lqr: LQR,
        K: Float[Array, "T m n"],
        k: Float[Array, "T m"],
        x0: Array,
        scan: Callable,
    ) -> tuple[Float[Array, "states _"], Float[Array, "T _"]]:
        """States and controls of x' = A x + B u + c, u = K x + k."""
