"""`dp.ParallelRiccati` against `dp.Riccati`, and the identities of its scans."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

import diffprog as dp
from diffprog._control.lqr.expand import WithTensors
from diffprog._control.lqr.parallel import combine, combine_affine

from . import helpers
from .test_lqr import close, close_costs, random_lqr, skewed


METHODS = dp.Riccati(), dp.ParallelRiccati()


@ft.partial(jax.jit, static_argnums=2)
def solved(lqr, x0, method):
    return dp.solve_lqr(lqr, x0, method=method)


def numbers(solution):
    value, policy = solution.value, solution.policy
    return dict(
        xs=solution.xs, us=solution.us, cost=solution.cost, K=policy.K, k=policy.k,
        P=value.P, p=value.p, constant=value.constant,
    )  # fmt: skip


def agree(actual, desired, rtol=1e-11):
    assert actual.result == desired.result
    found, expected = numbers(actual), numbers(desired)
    parts = expected["xs"], expected["us"]
    assert np.any(expected["us"])
    close_costs(found.pop("cost"), expected.pop("cost"), *parts, rtol=rtol)
    for name, a in found.items():
        close(np.asarray(a), np.asarray(expected[name]), rtol)


# The combinations of two stages.


def closed_stages(*shape: int):
    rng = np.random.default_rng(len(shape))
    Phi, N = jnp.asarray(rng.standard_normal((2, *shape)))
    return Phi, N + N.swapaxes(-1, -2)


def affine_maps(count: int, n: int):
    rng = np.random.default_rng(count)
    Phi, w = rng.standard_normal((count, n, n)), rng.standard_normal((count, n))
    return jnp.asarray(Phi), jnp.asarray(w)


@pytest.mark.parametrize(
    "fn, stages",
    [(combine, closed_stages(3, 4, 4)), (combine_affine, affine_maps(3, 4))],
)
def test_combining_is_associative(fn, stages):
    first, second, third = [tuple(a[i] for a in stages) for i in range(3)]
    left = fn(third, fn(second, first))
    right = fn(fn(third, second), first)
    for a, b in zip(left, right, strict=True):
        close(a, b, 1e-14)
    # The identity, and a stage that forgets its state.
    same = jnp.eye(4), jnp.zeros_like(stages[1][0])
    for a, b, c in zip(fn(same, first), fn(first, same), first, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)
    reset = jnp.zeros((4, 4)), stages[1][0]
    for a, b in zip(fn(second, reset), reset, strict=True):
        np.testing.assert_array_equal(a, b)


def test_combining_scalars():
    a1, q1, a2, q2 = (jnp.full((1, 1), number) for number in (2.0, -3.0, 5.0, 7.0))
    Phi, N = combine((a2, q2), (a1, q1))
    assert Phi == 10 and N == -3 + 2**2 * 7


# The same problem both ways.


@pytest.mark.costly
@pytest.mark.parametrize(
    "T, chunk",
    [(1, None), (2, None), (3, None), (7, 1), (7, 4), (64, None)],
)
def test_equals_the_sequential_recursion(T, chunk):
    lqr, x0 = random_lqr(T, 3, 2)
    sequential, parallel = METHODS[0], dp.ParallelRiccati(chunk=chunk)
    solution = solved(lqr, x0, parallel)
    agree(solution, solved(lqr, x0, sequential))
    assert solution.result == dp.RESULTS.successful


@pytest.mark.slow
def test_many_controls():
    lqr, x0 = random_lqr(9, 2, 6)  # more than the Cholesky factors written out
    agree(*(solved(lqr, x0, method) for method in METHODS))


def charged_before(terms, price):
    """Moves `price` |x|^2 / 2 from every stage after the first to the one before it.

    The total changes by a constant only; the Hessians of the states become indefinite.
    """
    A, B, c = terms["A"], terms["B"], terms["c"][:, :, None]
    At, Bt, eye = A.swapaxes(1, 2), B.swapaxes(1, 2), np.eye(A.shape[2])
    first = (np.arange(len(A)) == 0)[:, None, None]
    return dict(
        Q=terms["Q"] + price * (At @ A - eye * ~first),
        R=terms["R"] + price * Bt @ B,
        M=terms["M"] + price * At @ B,
        q=terms["q"] + price * (At @ c)[:, :, 0],
        r=terms["r"] + price * (Bt @ c)[:, :, 0],
        Q_final=terms["Q_final"] - price * eye,
    )


def special_problems(dtype):
    """Problems with 16 stages, most of them not convex; and which have a minimum."""
    lqr, x0 = random_lqr(16, 3, 2)
    terms = {name: np.asarray(getattr(lqr, name)) for name in lqr.__dataclass_fields__}
    Q, R, M, x, u = terms["Q"], terms["R"], terms["M"], np.eye(3), np.eye(2)
    t, rng = np.arange(16)[:, None, None], np.random.default_rng(0)
    H = rng.standard_normal((16, 5, 1))
    H = H * H.swapaxes(1, 2)
    solvable = dict(
        convex={},
        singular_R=dict(R=0 * R, M=0 * M),
        # There B'PB is at least B'QB, with Q of at least 0.1.
        indefinite_R=dict(
            B=np.where(t == 4, np.eye(3, 2), terms["B"]),
            R=np.where(t == 4, -0.01 * u, R),
            M=0 * M,
        ),
        indefinite_Q=charged_before(terms, 2.0),
        semidefinite=dict(Q=H[:, :3, :3], M=H[:, :3, 3:], R=H[:, 3:, 3:] + 1e-3 * u),
        no_running_cost=dict(Q=0 * Q, M=0 * M),
        no_state_cost=dict(Q=0 * Q, M=0 * M, Q_final=0 * x),
    )
    not_solvable = dict(
        negative_R=dict(R=R - 1e3 * u * (t == 12)),
        negative_end=dict(Q_final=-1e3 * x),
        negative_Q=dict(Q=Q - 1e3 * x),
    )
    stack = {
        name: jnp.asarray([changes.get(name, term) for changes in
                           (*solvable.values(), *not_solvable.values())], dtype)
        for name, term in terms.items()
    }  # fmt: skip
    return stack, jnp.asarray(x0, dtype), np.arange(10) < len(solvable)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_indefinite_and_singular_problems_in_a_batch(dtype):
    """The same verdicts and numbers; and what `vmap` gives is what one call gives."""
    stack, x0, solvable = special_problems(dtype)
    solve = lambda method: lambda terms: solved(dp.LQR(**terms), x0, method)
    batches = [jax.device_get(jax.vmap(solve(method))(stack)) for method in METHODS]
    for batch in batches:
        np.testing.assert_array_equal(batch.result._value == 0, solvable)
        assert np.all(np.isfinite(batch.us[solvable]))
    assert np.all(np.isnan(batches[1].us[~solvable]))
    if dtype == np.float64:
        sequential, parallel = map(numbers, batches)
        single = numbers(solve(METHODS[1])({k: a[3] for k, a in stack.items()}))
        for name, a in parallel.items():
            close(a[3], np.asarray(single[name]), 1e-12)
            for i in np.flatnonzero(solvable):
                close(a[i], sequential[name][i], 1e-9)
        # Problem 3 is problem 0 with its costs at other stages.
        for batch in (sequential, parallel):
            close(batch["us"][3], batch["us"][0], 1e-9)


def stiff_lqr(T: int, n: int, m: int, smallest: float):
    """Cross terms, and control costs of about `smallest`."""
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((T + 1, n + m, n + m)) / np.sqrt(n + m)
    scale = np.concatenate([np.ones(n), np.full(m, np.sqrt(smallest))])
    hessian = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(n + m)
    hessian *= scale * scale[:, None]
    lqr = dp.LQR(
        A=rng.standard_normal((T, n, n)) / np.sqrt(n),
        B=rng.standard_normal((T, n, m)),
        c=rng.standard_normal((T, n)) / 10,
        Q=hessian[:-1, :n, :n],
        R=hessian[:-1, n:, n:],
        M=hessian[:-1, :n, n:],
        q=rng.standard_normal((T, n)),
        r=rng.standard_normal((T, m)) * np.sqrt(smallest),
        Q_final=hessian[-1, :n, :n],
    )
    return lqr, jnp.asarray(rng.standard_normal(n))


@pytest.mark.costly
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6])
def test_float32_is_as_accurate_as_the_sequential_recursion(smallest):
    lqr, x0 = stiff_lqr(256, 4, 2, smallest)
    exact = numbers(solved(lqr, x0, METHODS[0]))
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (lqr, x0))
    sequential, parallel = (solved(*single, method) for method in METHODS)
    assert parallel.result == dp.RESULTS.successful
    assert all(a.dtype in (np.float32, np.int32) for a in jax.tree.leaves(parallel))

    def errors(solution):
        for name, a in numbers(solution).items():
            b = np.asarray(exact[name])
            yield np.max(np.abs(np.asarray(a, float) - b)) / np.max(np.abs(b))

    for error, usual in zip(errors(parallel), errors(sequential), strict=True):
        assert error <= 20 * max(usual, np.finfo(np.float32).eps)


def test_too_few_policies_are_a_failure_and_no_wrong_answer():
    lqr, x0 = random_lqr(16, 3, 2)
    method = dp.ParallelRiccati(max_policies=1)
    solution = dp.solve_lqr(lqr, x0, method=method, throw=False)
    assert solution.result == dp.RESULTS.factorization_failed
    assert np.all(np.isnan(solution.us))


# Derivatives.


@pytest.mark.slow
def test_first_and_second_derivatives():
    lqr, x0 = random_lqr(5, 2, 1)
    symmetric = lambda a: a + a.swapaxes(-1, -2) if a.shape[-2:] == (2, 2) else a
    way = jax.tree.map(lambda a: symmetric(jnp.cos(a)), (lqr, x0))

    def derivatives(method):
        def loss(problem):
            solution = dp.solve_lqr(*problem, method=method)
            value, policy = solution.value, solution.policy
            parts = policy.K, policy.k, value.P, value.p, value.constant, solution.xs
            return sum(jnp.sum(jnp.sin(a)) for a in parts) + solution.cost

        derivative = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (way,)))
        # Of the derivative in a Hessian only the symmetric part is defined.
        return map(symmetric, jax.tree.leaves(derivative((lqr, x0))))

    moved = 0
    for a, b in zip(*map(derivatives, METHODS), strict=True):
        close(a, b, 1e-11)
        moved += bool(jnp.any(a != 0))
    assert moved > 10


# Chains and solves.


@pytest.mark.costly
@pytest.mark.parametrize("chain", ["two_phase", "ragged"])
def test_sweep_over_a_chain(chain):
    problem, x0, us = helpers.PROBLEMS[chain]()

    @jax.jit
    def sweeps(x0, us, damping):
        vectors = helpers.vectors(problem, x0, us)
        model = dp.Newton().expand(*vectors).model
        return [method.backward(*vectors, model, damping) for method in METHODS]

    positives = []
    # The Hessian of the network is indefinite, by less than 30.
    for damping in (0.0, 30.0, 100.0):
        sequential, parallel = sweeps(x0, us, jnp.asarray(damping))
        positives.append(bool(sequential.positive))
        assert positives[-1] == bool(parallel.positive)
        if positives[-1]:
            for a, b in zip(*map(jax.tree.leaves, (parallel, sequential)), strict=True):
                close(a, b, 1e-11)
    assert positives == [chain == "two_phase", True, True]


@pytest.mark.slow
def test_only_the_symmetric_part_of_a_hessian_counts():
    """Of what a direction hands over: W, V, and second derivatives of the dynamics."""
    problem, x0, us = helpers.two_phase()
    skew = lambda tree: jax.tree.map(lambda a: skewed(a, 0), tree)
    hessians = lambda model: [
        getattr(model, a) for a in ("W", "V", "tensors") if hasattr(model, a)
    ]

    @jax.jit
    def sweeps(x0, us, damping):
        vectors = helpers.vectors(problem, x0, us)
        newton, ddp = (d.expand(*vectors).model for d in (dp.Newton(), dp.DDP()))
        pairs = []
        passes = [(method.backward, newton) for method in METHODS]
        for backward, model in [*passes, (METHODS[0].backward, ddp)]:
            given = eqx.tree_at(hessians, model, replace_fn=skew)
            pairs.append([backward(*vectors, m, damping) for m in (given, model)])
        return pairs

    for given, symmetric in sweeps(x0, us, jnp.asarray(100.0)):
        for a, b in zip(*map(jax.tree.leaves, (given, symmetric)), strict=True):
            close(a, b, 1e-11)
        assert given.slope < 0 and given.positive


@pytest.mark.slow
@pytest.mark.parametrize(
    "direction, chain, chunk",
    [
        (dp.ILQR, "spring", None),
        (dp.Newton, "spring", 5),
    ],
)
def test_solves_take_the_same_steps(direction, chain, chunk):
    problem, x0, us = helpers.PROBLEMS[chain]()
    sequential, parallel = (
        dp.solve(problem, direction(riccati), x0, us, fast_loops=False)
        for riccati in (dp.Riccati(), dp.ParallelRiccati(chunk=chunk))
    )
    close(ravel_pytree(parallel.us)[0], ravel_pytree(sequential.us)[0], 1e-9)
    for count in ("num_steps", "num_backwards"):
        assert parallel.stats[count] == sequential.stats[count] > 0


@pytest.mark.slow
def test_inside_shard_map():
    lqr, x0 = random_lqr(7, 3, 2)
    batch = jax.tree.map(lambda a: a[None], (lqr, x0))
    mesh, spec = jax.make_mesh((1,), ("batch",)), PartitionSpec("batch")
    batch = jax.device_put(batch, NamedSharding(mesh, spec))
    solve = jax.vmap(lambda lqr, x0: dp.solve_lqr(lqr, x0, method=METHODS[1]).us)
    split = jax.shard_map(solve, mesh=mesh, in_specs=spec, out_specs=spec)
    us = solved(lqr, x0, METHODS[0]).us
    close(jax.jit(split)(*batch)[0], us)
    assert jnp.linalg.norm(us) > 0.1


# Errors.


def test_wrong_arguments(unchecked):
    for name in ("chunk", "max_policies"):
        with pytest.raises(ValueError, match=f"`{name}` is 0; a Python int >= 1"):
            dp.ParallelRiccati(**{name: 0})
    lqr, x0 = random_lqr(6, 3, 2)
    with pytest.raises(TypeError, match="`method` is 'parallel'; `dp.Riccati"):
        dp.solve_lqr(lqr, x0, method="parallel")  # pyright: ignore
    with pytest.raises(ValueError, match="`fast_loops=True` is not possible"):
        dp.solve_lqr(lqr, x0, method=METHODS[1], fast_loops=True)
    problem, x0, us = helpers.spring()
    with pytest.raises(ValueError, match="`fast_loops=True` is not possible"):
        dp.solve(problem, dp.ILQR(METHODS[1]), x0, us, fast_loops=True)


def test_second_order_models_are_refused():
    F, W, V, tensor = map(jnp.zeros, ((2, 3, 4), (2, 4, 4), (3, 3), (2, 2, 3, 3)))
    model = WithTensors(V, (F,), (W,), (tensor,))
    with pytest.raises(ValueError, match="sequential: use `dp.Riccati"):
        METHODS[1].backward(None, None, model, jnp.zeros(()))  # pyright: ignore
