import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._door import door
from ._expand import affine, Model, quadratic
from ._linalg import matmul, solve_positive, symmetrize
from ._result import RESULTS, throw_unless_successful
from ._rollout import Segment, VectorChain, VectorTrajectory
from ._tree import all_finite, Layout, norm
from ._types import Stacks


def bellman(F: Array, W: Array, V: Array, m: int, damping: Array):
    """One stage of the backward pass, in the blocks of `_expand`.

    Minimizes (1, x, u)' Z (1, x, u) / 2 + damping u'u / 2 over u, Z = W + F' V F:
    u = [k K] (1, x). Returns the cost-to-go before the stage, [k K], and whether the
    minimum exists.
    """
    Z = W + matmul(F.T, matmul(V, F))
    u = Z.shape[0] - m
    G = Z[u:, u:] + damping * jnp.eye(m, dtype=Z.dtype)  # R + damping I + B'PB
    H = Z[u:, :u]  # [h H]: h = r + B'(p + Pc), H = B'PA + M'
    gains, positive = solve_positive(G, -H)  # [k K] = -inv(G) [h H]
    return symmetrize(Z[:u, :u] + matmul(H.T, gains)), gains, positive


class Sweep(eqx.Module):
    """What a backward pass leaves behind.

    - `gains`: [k K] of every stage, one stacked array per segment of the chain.
    - `slope`, `curvature`: at a step size s the damped model changes the cost by
        s slope + s^2 curvature / 2.
    - `decrement`: the decrease that the undamped model promises along the direction;
        convergence is judged by it.
    - `gradient`: norm of the gradient of the objective in the controls.
    - `positive`: whether every stage had a minimum.
    """

    gains: Stacks
    slope: Float[Array, ""]
    curvature: Float[Array, ""]
    decrement: Float[Array, ""]
    gradient: Float[Array, ""]
    positive: Bool[Array, ""]


def decrement(slope: Array, damping: Array, squares: Array, gradient: Array) -> Array:
    """The decrease that the model without damping promises along the direction.

    The model along a step size s is s slope + s^2 c / 2 with c = -slope - damping k'k,
    least at -slope^2 / (2 c). Without damping that is -slope / 2, and a large damping
    cannot pass off a short step as convergence. 0 only where the gradient is.
    """
    curvature = -slope - damping * squares
    promised = jnp.where(curvature > 0, slope / curvature * slope / 2, jnp.inf)
    return jnp.where(gradient == 0, 0.0, promised)


def riccati(
    chain: VectorChain,
    trajectory: VectorTrajectory,
    model: Model,
    damping: Float[Array, ""],
) -> Sweep:
    """The backward pass from the last V; the adjoint rides along for the gradient.

    If the model has second derivatives of f_t, the Hessian of p_{t+1}' f_t is added to
    every stage (DDP).
    """

    def stage(_, carry, F, W, u, *tensor):
        V, lam = carry
        new_lam, gradient = jnp.split(W[0] + matmul(lam, F), [W.shape[0] - len(u)])
        if tensor:
            hessian = jnp.einsum("i,ijk->jk", V[0, 1:], *tensor, precision="highest")
            W = W + jnp.pad(hessian, ((1, 0), (1, 0)))
        V, gains, positive = bellman(F, W, V, len(u), damping)
        return (V, new_lam), (gains, gradient, positive)

    tensors = () if model.tensors is None else (model.tensors,)
    data = (model.F, model.W, trajectory.us, *tensors)
    (V, _), rows = chain.scan(stage, (model.V, model.V[0]), *data, reverse=True)
    gains, gradients, positive = zip(*rows, strict=True)
    gradient = norm(gradients)
    slope = V[0, 0]  # = sum of h'k where c = 0
    squares = norm([g[:, :, 0] for g in gains]) ** 2
    positive = jnp.all(jnp.stack([jnp.all(p) for p in positive]))
    return Sweep(
        gains=gains,
        slope=slope,
        curvature=-slope,  # sum of k'Gk, because Gk = -h
        decrement=decrement(slope, damping, squares, gradient),
        gradient=gradient,
        positive=positive & jnp.isfinite(slope),
    )


class Policy(eqx.Module):
    r"""The feedback u = us + k + K (x - xs) around states `xs` and controls `us`.

    `policy(t, x)` takes and returns states and controls as the problem has them. In the
    fields they lie raveled, leaf after leaf in the order of `jax.tree.leaves`
    (dictionaries by sorted key).

    - `K`: feedback gains, shape `(T, m, n)`.
    - `k`: feedforward terms, shape `(T, m)`; near 0 at an optimum.
    - `xs`, `us`: the trajectory, shapes `(T, n)` and `(T, m)`.
    """

    K: Float[Array, "*batch T m n"]
    k: Float[Array, "*batch T m"]
    xs: Float[Array, "*batch T n"]
    us: Float[Array, "*batch T m"]
    _x: Layout = eqx.field(static=True)
    _u: Layout = eqx.field(static=True)
    _start: int = eqx.field(static=True)

    def __repr__(self) -> str:
        return f"Policy(K={self.K!r}, k={self.k!r})"

    def __call__(self, t: int | Int[Array, ""], x: PyTree) -> PyTree:
        """The control at stage `t` in state `x`."""
        layout, stages = Layout.of(x, self._x.dtype), self.us.shape[0]
        if layout != self._x:
            raise ValueError(
                f"`x` has the shapes {layout.describe()}; a state of the problem has "
                f"{self._x.describe()}."
            )
        t = t - self._start
        if isinstance(t, int) and not 0 <= t < stages:
            raise ValueError(
                f"`t` is {t + self._start}; this policy has the stages {self._start} "
                f"to {self._start + stages - 1}."
            )
        y = self._x.ravel(x) - self.xs[t]
        return self._u.unravel(self.us[t] + self.k[t] + matmul(self.K[t], y))


class Value(eqx.Module):
    r"""The optimal cost-to-go $\frac12 x^\top P x + p^\top x + \text{constant}$.

    - `P`: shape `(T + 1, n, n)`.
    - `p`: shape `(T + 1, n)`.
    - `constant`: shape `(T + 1,)`.
    """

    P: Float[Array, "states n n"]
    p: Float[Array, "states n"]
    constant: Float[Array, " states"]


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
        A, B = jnp.asarray(A), jnp.asarray(B)
        if A.ndim != 3 or A.shape[1] != A.shape[2] or A.shape[0] < 1:
            raise ValueError(
                f"`A` has shape {A.shape}; (T, n, n) with T >= 1 is expected. Terms "
                "that do not change with time: `dp.LQR.constant(..., horizon=T)`."
            )
        T, n, _ = A.shape
        if B.ndim != 3 or B.shape[:2] != (T, n):
            raise ValueError(
                f"`B` has shape {B.shape}; (T, n, m) = ({T}, {n}, m) is expected."
            )
        m = B.shape[2]
        shapes = dict(
            A=(T, n, n), B=(T, n, m), c=(T, n), Q=(T, n, n), R=(T, m, m), M=(T, n, m),
            q=(T, n), r=(T, m), Q_final=(n, n), q_final=(n,),
        )  # fmt: skip
        given = (A, B, c, Q, R, M, q, r, Q_final, q_final)
        for (name, shape), array in zip(shapes.items(), given, strict=True):
            array = jnp.zeros(shape, A.dtype) if array is None else jnp.asarray(array)
            if array.shape != shape or array.dtype != A.dtype:
                raise ValueError(
                    f"`{name}` has shape {array.shape} and dtype {array.dtype}; "
                    f"{shape} and {A.dtype}, as `A`, are expected."
                )
            setattr(self, name, array)
        if not jnp.issubdtype(A.dtype, jnp.floating):
            raise TypeError(f"`A` has dtype {A.dtype}; float32 or float64 is expected.")

    @classmethod
    def constant(
        cls, A, B, c, Q, R, M=None, q=None, r=None, Q_final=None, q_final=None, *,
        horizon: int,
    ) -> "LQR":  # fmt: skip
        """The problem whose terms are the same at each of `horizon` stages."""
        repeat = lambda a: None if a is None else jnp.stack([jnp.asarray(a)] * horizon)
        stages = map(repeat, (A, B, c, Q, R, M, q, r))
        return cls(*stages, Q_final=Q_final, q_final=q_final)  # pyright: ignore

    def cost(self, xs: Float[Array, "states n"], us: Float[Array, "T m"]):
        """The objective at states and controls."""
        z = jnp.concatenate([jnp.ones_like(us[:, :1]), xs[:-1], us], 1)
        F, W, V = self.blocks()
        last = jnp.concatenate([jnp.ones_like(xs[-1, :1]), xs[-1]])
        stages = jnp.einsum("ti,tij,tj->", z, W, z, precision="highest")
        return (stages + matmul(last, matmul(V, last))) / 2

    def blocks(self):
        """F and W of every stage and the last V, see `_expand`."""
        cat = jnp.concatenate
        AB = cat([self.A, self.B], 2)
        hessian = cat(
            [cat([self.Q, self.M], 2), cat([self.M.swapaxes(1, 2), self.R], 2)], 1
        )
        F = jax.vmap(affine)(self.c, AB)
        W = jax.vmap(quadratic)(cat([self.q, self.r], 1), hessian)
        return F, W, quadratic(self.q_final, self.Q_final)


LQR.__init__.__doc__ = """**Arguments:** arrays of one floating dtype; `None` is zero.

- `A`, `B`, `c`: dynamics, shapes `(T, n, n)`, `(T, n, m)`, `(T, n)`.
- `Q`, `R`, `M`: symmetric Hessian blocks of the stage cost, `(T, n, n)`, `(T, m, m)`,
    and the mixed one `(T, n, m)`.
- `q`, `r`: gradients of the stage cost, `(T, n)`, `(T, m)`.
- `Q_final`, `q_final`: the terminal cost, `(n, n)`, `(n,)`.

**Raises:** `ValueError` naming the term whose shape or dtype does not fit.
"""


class LQRSolution(eqx.Module):
    """The solution of an [`diffprog.LQR`][] problem.

    - `xs`, `us`: the optimal states `(T + 1, n)` and controls `(T, m)`.
    - `cost`: the optimal cost, equal to the value function at `x0`.
    - `policy`: u = K x + k, see [`diffprog.Policy`][].
    - `value`: the cost-to-go of every stage, see [`diffprog.Value`][].
    - `expected_change`: the optimal cost minus the cost of zero controls.
    - `result`: a [`diffprog.RESULTS`][] code.
    """

    xs: Float[Array, "states n"]
    us: Float[Array, "T m"]
    cost: Float[Array, ""]
    policy: Policy
    value: Value
    expected_change: Float[Array, ""]
    result: RESULTS


def _solve_lqr(lqr: LQR, x0: Float[Array, " n"]) -> LQRSolution:
    F, W, V = lqr.blocks()
    T, n, m = lqr.B.shape
    if x0.shape != (n,) or x0.dtype != F.dtype:
        raise ValueError(
            f"`x0` has shape {x0.shape} and dtype {x0.dtype}; ({n},) and {F.dtype} "
            "are expected."
        )
    none = lambda *_: None
    chain = VectorChain((Segment(none, none, 0, T),), none, F.dtype)

    def backward(_, V, F, W):
        before, gains, positive = bellman(F, W, V, m, jnp.zeros((), F.dtype))
        return before, (before, gains, positive)

    _, ((values, gains, positive),) = chain.scan(backward, V, (F,), (W,), reverse=True)

    def forward(_, x, F, gains):
        u = matmul(gains, x)
        return matmul(F, jnp.concatenate([x, u])), (x, u)

    start = jnp.concatenate([jnp.ones_like(x0[:1]), x0])
    last, ((xs, us),) = chain.scan(forward, start, (F,), (gains,))
    idle, ((xs_idle, _),) = chain.scan(forward, start, (F,), (jnp.zeros_like(gains),))
    xs = jnp.concatenate([xs, last[None]])[:, 1:]
    xs_idle = jnp.concatenate([xs_idle, idle[None]])[:, 1:]
    values = jnp.concatenate([values, V[None]])
    cost = matmul(start, matmul(values[0], start)) / 2
    positive = jnp.all(positive) & all_finite(values)
    return LQRSolution(
        xs,
        us,
        cost,
        Policy(
            K=gains[:, :, 1:],
            k=gains[:, :, 0],
            xs=jnp.zeros_like(xs[:-1]),
            us=jnp.zeros_like(us),
            _x=Layout.of(x0, x0.dtype),
            _u=Layout.of(us[0], x0.dtype),
            _start=0,
        ),
        Value(values[:, 1:, 1:], values[:, 0, 1:], values[:, 0, 0] / 2),
        cost - lqr.cost(xs_idle, jnp.zeros_like(us)),
        RESULTS.where(positive, RESULTS.successful, RESULTS.factorization_failed),
    )


_solve_lqr_door = door(_solve_lqr)


def solve_lqr(lqr: LQR, x0: Float[Array, " n"], *, throw: bool = True) -> LQRSolution:
    r"""Solves a linear-quadratic problem by the Riccati recursion.

    $$G = R + B^\top P B, \; K = -G^{-1}(B^\top P A + M^\top), \;
    k = -G^{-1}(r + B^\top (p + P c)).$$

    **Arguments:**

    - `lqr`: the problem.
    - `x0`: the first state, shape `(n,)`.
    - `throw`: raise [`diffprog.SolveError`][] when the problem has no minimum and all
        inputs are concrete.

    **Returns:** a [`diffprog.LQRSolution`][]. Its `result` is `factorization_failed`,
    and its numbers are not finite, where some G is not positive definite.

    Takes O(T (n + m)^3) time and O(T (n + m)^2) memory. Differentiable.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """
    if not isinstance(lqr, LQR):
        raise TypeError(f"`lqr` is a {type(lqr).__name__}; a `dp.LQR` is expected.")
    return throw_unless_successful(_solve_lqr_door(lqr, jnp.asarray(x0)), throw)
