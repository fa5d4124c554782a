import jax.numpy as jnp
from jaxtyping import Array, Float

from .._door import door
from .._expand import curved, linear
from .._fast_loops import compiled, Loops, scan
from .._linalg import matmul
from .._result import RESULTS, throw_unless_successful
from .._tree import all_finite, Layout, vary
from .base import (
    AbstractRiccati,
    bellman,
    LQR,
    LQRSolution,
    Policy,
    summarize,
    Value,
)


class Riccati(AbstractRiccati):
    """The Riccati recursion from stage to stage: the default.

    Takes O(T (n + m)^3) time and O(T (n + m)^2) memory. Every stage needs
    R + damping I + B'PB positive definite, and nothing else.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """

    def backward(self, chain, trajectory, model, damping, second_order=False):
        """The backward pass from the last V; the adjoint rides along for the gradient.

        With `second_order` the Hessian of p_{t+1}' f_t is added to every stage (DDP),
        from the second derivatives in the model if it has them.
        """

        def stage(segment, carry, x, u, t, *stored):
            # The costate lam is one more row below V.
            rows, positive, found = carry
            p = rows[0, 1:]
            if model.F is None:
                weight = (p,) if second_order else ()
                F, W = linear(segment, x, u, t), curved(segment, x, u, t, *weight)
            else:
                F, W, *tensor = stored
                if tensor:
                    hessian = jnp.einsum("i,ijk->jk", p, *tensor, precision="highest")
                    W = W + jnp.pad(hessian, ((1, 0), (1, 0)))
            product = matmul(rows, F)
            V, gains, minimum = bellman(F, W, product[:-1], len(u), damping)
            lam = W[0] + product[-1]  # and the gradient in u
            rows = jnp.concatenate([V, lam[None, : len(V)]])
            if model.F is None:
                # Sums over columns are finite if everything is. W of a second-order
                # pass depends on V: what is not finite there spreads over a row of
                # V F, where F[:, 0] is (1, 0), so V is finite down to stage `fine`.
                first, fine = found
                own = jnp.sum(F, 0), W[0] if second_order else jnp.sum(W, 0)
                first = jnp.where(all_finite(own), first, t)
                found = first, jnp.where(all_finite(product[:, 0]), t, fine)
            return (rows, positive & minimum, found), (gains, lam[len(V) :])

        end = jnp.concatenate([model.V, model.V[:1]])
        stored = [a for a in (model.F, model.W, model.tensors) if a is not None]
        data = (trajectory.xs, trajectory.us, chain.ts, *stored)
        T, found = chain.horizon, None
        if model.F is None:
            found = tuple(jnp.full_like(chain.ts[0][0], t) for t in (T + 1, T))
        start = vary((end, jnp.isfinite(end[0, 0]), found), like=trajectory)
        (V, positive, found), rows = chain.scan(stage, start, *data, reverse=True)
        gains, gradients = zip(*rows, strict=True)
        first = None
        if found is not None:
            lost = jnp.where(all_finite(V), T + 1, found[1])
            first = jnp.where(found[0] > T, lost, found[0]).astype(jnp.int32)
        # Where c = 0, V[0, 0] is the sum of h'k.
        return summarize(gains, gradients, V[0, 0], damping, positive, first)

    def values(self, F, W, V, loops):
        def stage(V, row):
            F, W = row
            m = W.shape[0] - V.shape[0]
            step = bellman(F, W, matmul(V, F), m, jnp.zeros((), F.dtype))
            before, gains, positive = step
            before, gains = [jnp.where(positive, a, jnp.nan) for a in (before, gains)]
            return before, (before, gains, positive)

        _, (values, gains, positive) = scan(stage, V, (F, W), True, loops)
        return jnp.concatenate([values, V[None]]), gains, jnp.all(positive)

    def rollout(self, F, gains, x0, loops):
        def stage(x, row):
            F, gains = row
            u = matmul(gains, x)
            return matmul(F, jnp.concatenate([x, u])), (x[1:], u)

        start = jnp.concatenate([jnp.ones_like(x0[:1]), x0])
        last, (xs, us) = scan(stage, start, (F, gains), False, loops)
        return jnp.concatenate([xs, last[None, 1:]]), us


def _solve_lqr(
    lqr: LQR, x0: Float[Array, " n"], method: AbstractRiccati, loops: Loops
) -> LQRSolution:
    F, W, V = lqr.blocks()
    n = lqr.B.shape[1]
    if x0.shape != (n,) or x0.dtype != F.dtype:
        raise ValueError(
            f"`x0` has shape {x0.shape} and dtype {x0.dtype}; ({n},) and {F.dtype} "
            "are expected."
        )
    values, gains, positive = method.values(F, W, V, loops)
    xs, us = method.rollout(F, gains, x0, loops)
    start = jnp.concatenate([jnp.ones_like(x0[:1]), x0])
    cost = matmul(start, matmul(values[0], start)) / 2
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
        RESULTS.where(
            positive & all_finite(values),
            RESULTS.successful,
            RESULTS.factorization_failed,
        ),
    )


@door
def _solve_lqr_door(lqr, x0, method, fast_loops) -> LQRSolution:
    solved = lambda loops: _solve_lqr(lqr, x0, method, loops)
    if fast_loops is False:
        return compiled(solved, False)
    return solved("forced" if fast_loops else "apart")


def solve_lqr(
    lqr: LQR,
    x0: Float[Array, " n"],
    *,
    method: AbstractRiccati = Riccati(),
    throw: bool = True,
    fast_loops: bool | None = None,
) -> LQRSolution:
    r"""Solves a linear-quadratic problem by the Riccati recursion.

    $$G = R + B^\top P B, \; K = -G^{-1}(B^\top P A + M^\top), \;
    k = -G^{-1}(r + B^\top (p + P c)).$$

    **Arguments:**

    - `lqr`: the problem.
    - `x0`: the first state, shape `(n,)`.
    - `method`: how the recursion is run: [`diffprog.Riccati`][] from stage to stage,
        or [`diffprog.ParallelRiccati`][] over all stages at once.
    - `throw`: raise [`diffprog.SolveError`][] when the problem has no minimum and all
        inputs are concrete.
    - `fast_loops`: `None` compiles each loop into one function on the CPU where that is
        known to work; `False` never does, `True` raises where it is not possible.

    **Returns:** a [`diffprog.LQRSolution`][]. Its `result` is `factorization_failed`,
    and its numbers are not finite, where some G is not positive definite.

    Takes O(T (n + m)^3) time and O(T (n + m)^2) memory. Differentiable.

    Source: Roulet, Srinivasa, Fazel, Harchaoui, "Iterative Linear Quadratic
    Optimization for Nonlinear Control", 2022, arXiv 2207.06362.
    """
    if not isinstance(lqr, LQR):
        raise TypeError(f"`lqr` is a {type(lqr).__name__}; a `dp.LQR` is expected.")
    if not isinstance(method, AbstractRiccati):
        raise TypeError(
            f"`method` is a {type(method).__name__}; `dp.Riccati()` or "
            "`dp.ParallelRiccati()` is expected."
        )
    solution = _solve_lqr_door(lqr, jnp.asarray(x0), method, fast_loops)
    return throw_unless_successful(solution, throw)
