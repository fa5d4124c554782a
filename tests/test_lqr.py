"""`dp.solve_lqr` against the dense system of optimality conditions."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

from . import environments as env, helpers


METHODS = [dp.Riccati(), dp.ParallelRiccati()]
SHAPES = [(1, 1, 1), (1, 2, 3), (6, 3, 2), (4, 2, 5)]  # (T, n, m)


def random_lqr(T: int, n: int, m: int, seed: int = 0):
    """A problem with every term, convex stage by stage; returns `(lqr, x0)`."""
    rng = np.random.default_rng(1000 * seed + 100 * T + 10 * n + m)
    factor = rng.standard_normal((T + 1, n + m, n + m)) / np.sqrt(n + m)
    hessian = factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(n + m)
    lqr = dp.LQR(
        A=rng.standard_normal((T, n, n)) / np.sqrt(n),
        B=rng.standard_normal((T, n, m)),
        c=rng.standard_normal((T, n)),
        Q=hessian[:-1, :n, :n],
        R=hessian[:-1, n:, n:],
        M=hessian[:-1, :n, n:],
        q=rng.standard_normal((T, n)),
        r=rng.standard_normal((T, m)),
        Q_final=hessian[-1, :n, :n],
        q_final=rng.standard_normal(n),
    )
    return lqr, jnp.asarray(rng.standard_normal(n))


@ft.cache
def solved(*shape: int):
    lqr, x0 = random_lqr(*shape)
    return lqr, x0, dp.solve_lqr(lqr, x0)


def kkt(lqr: dp.LQR, x0, start: int = 0):
    """Solves all optimality conditions at once, from stage `start` on.

    The unknowns are x_start ... x_T, u_start ... u_{T-1} and a multiplier for the
    first state and for every step. Returns states, controls, multipliers and cost.
    """
    data = jax.tree.map(np.asarray, lqr)
    T, n, m = data.B.shape
    T = T - start
    size = (T + 1) * n + T * m
    H, g = np.zeros((size, size)), np.zeros(size)
    C, d = np.zeros(((T + 1) * n, size)), np.zeros((T + 1) * n)
    C[:n, :n], d[:n] = np.eye(n), x0
    for t in range(T):
        s = start + t
        x, after = slice(t * n, (t + 1) * n), slice((t + 1) * n, (t + 2) * n)
        u = slice((T + 1) * n + t * m, (T + 1) * n + (t + 1) * m)
        H[x, x], H[u, u] = data.Q[s], data.R[s]
        H[x, u], H[u, x] = data.M[s], data.M[s].T
        g[x], g[u] = data.q[s], data.r[s]
        C[after, after], C[after, x], C[after, u] = np.eye(n), -data.A[s], -data.B[s]
        d[after] = data.c[s]
    last = slice(T * n, (T + 1) * n)
    H[last, last], g[last] = data.Q_final, data.q_final
    matrix = np.block([[H, C.T], [C, np.zeros((len(d), len(d)))]])
    z = np.linalg.solve(matrix, np.concatenate([-g, d]))
    z, multipliers = z[:size], z[size:]
    xs, us = z[: (T + 1) * n].reshape(-1, n), z[(T + 1) * n :].reshape(T, m)
    # H z + g + C' multipliers = 0: the multipliers are minus the costates.
    return xs, us, -multipliers.reshape(-1, n), z @ H @ z / 2 + g @ z


close = ft.partial(helpers.close, scale="largest")
cost = jax.jit(dp.LQR.cost)


def close_costs(actual, desired, *parts, rtol=1e-12):
    """The terms of a cost may cancel: it rounds as its states and controls squared."""
    size = sum(np.sum(np.square(part)) for part in parts)
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=1e-14 * size)


def equal(actual, desired, rtol=1e-12):
    """All numbers of two solutions, and that there are any."""
    assert np.any(actual.us)
    helpers.close(actual, desired, rtol)


# Known solutions.


def test_published_numbers_of_two_stages():
    lqr, x0 = env.tiny_lqr()
    solution = dp.solve_lqr(lqr, x0)
    close(np.ravel(solution.us), (10.291753718947263, 10.353009671108413))
    close(np.asarray(solution.xs)[2], (59.74356612897262, 62.34814274113174))
    close(float(solution.cost), -12532.166563364215)
    K, k = map(np.asarray, (solution.policy.K, solution.policy.k))
    close(K[0], [[-0.24323339854564, -0.46155069949430]])
    close(k[0], [-2.53792905392936])


GOLDEN = {
    # rho: J, first row of K_0, k_0, x_T
    1.0: (
        0.2173302959839,
        (-0.663356613352, -0.327832408612, 1.209721848438),
        (0.311223269767, 0.486411772385),
        (0.072722952881, 0.144028946532, 0.084372231109),
    ),
    1e-3: (
        -15.133302820249,
        (-4.066688301405, -1.480484727710, 5.084114681782),
        (-3.685986721964, -3.624232665454),
        (0.772759400046, 0.141601900672, -0.618286893005),
    ),
    1e-6: (
        -15.245738635224,
        (-4.255493329385, -1.394030133731, 5.406135371139),
        (-5.108201092867, -5.039634521879),
        (0.652599878904, 0.114303958897, -0.527625653635),
    ),
}


@pytest.mark.costly
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rho", GOLDEN)
def test_published_numbers_of_three_control_weights(rho, method):
    lqr, x0 = env.golden_lqr(rho)
    solution = dp.solve_lqr(lqr, x0, method=method)
    cost, K, k, last = GOLDEN[rho]
    # The reference has 12 decimals, so it is known up to half of the last one.
    printed = ft.partial(np.testing.assert_allclose, rtol=1e-12, atol=5e-13)
    printed(solution.cost, cost)
    printed(solution.policy.K[0, 0], K)
    printed(solution.policy.k[0], k)
    printed(solution.xs[-1], last)
    xs, us, _, cost = kkt(lqr, x0)
    close(solution.xs, xs)
    close(solution.us, us)
    # Parts of the cost cancel: they have the size of |x|^2.
    np.testing.assert_allclose(solution.cost, cost, rtol=1e-12, atol=1e-12)


# The dense system, term by term.


@pytest.mark.costly
@pytest.mark.parametrize("shape", SHAPES)
def test_solution_is_that_of_the_dense_system(shape):
    lqr, x0, solution = solved(*shape)
    xs, us, costates, cost = kkt(lqr, x0)
    close(solution.xs, xs)
    close(solution.us, us)
    close_costs(solution.cost, cost, xs, us)
    P, p = map(np.asarray, (solution.value.P, solution.value.p))
    close(np.einsum("tij,tj->ti", P, solution.xs) + p, costates)
    assert solution.result == dp.RESULTS.successful


@pytest.mark.parametrize("shape", SHAPES)
def test_stationarity_and_feasibility(shape):
    lqr, x0, solution = solved(*shape)
    d = jax.tree.map(np.asarray, lqr)
    xs, us = np.asarray(solution.xs), np.asarray(solution.us)
    np.testing.assert_array_equal(xs[0], x0)
    lam = d.Q_final @ xs[-1] + d.q_final
    for t in reversed(range(len(us))):
        x, u = xs[t], us[t]
        close(d.A[t] @ x + d.B[t] @ u + d.c[t], xs[t + 1])
        gradient = d.R[t] @ u + d.M[t].T @ x + d.r[t] + d.B[t].T @ lam
        size = np.abs(d.R[t] @ u).max() + np.abs(d.B[t].T @ lam).max()
        assert np.abs(gradient).max() <= 1e-12 * size
        lam = d.Q[t] @ x + d.M[t] @ u + d.q[t] + d.A[t].T @ lam


@pytest.mark.parametrize("shape", SHAPES)
def test_value_is_the_cost_to_go_of_the_policy(shape):
    lqr, x0, solution = solved(*shape)
    d, value = jax.tree.map(np.asarray, (lqr, solution.value))
    K, k = map(np.asarray, (solution.policy.K, solution.policy.k))
    T, n, _ = d.B.shape
    assert value.P.shape == (T + 1, n, n)
    np.testing.assert_array_equal(value.P, value.P.swapaxes(1, 2))
    rng = np.random.default_rng(0)
    for start in range(T + 1):
        first = x = rng.standard_normal(n)
        cost, parts = 0.0, []
        for t in range(start, T):
            u = K[t] @ x + k[t]
            parts += [x, u]
            cost += x @ d.Q[t] @ x / 2 + u @ d.R[t] @ u / 2 + x @ d.M[t] @ u
            cost += d.q[t] @ x + d.r[t] @ u
            x = d.A[t] @ x + d.B[t] @ u + d.c[t]
        cost += x @ d.Q_final @ x / 2 + d.q_final @ x
        to_go = first @ value.P[start] @ first / 2 + value.p[start] @ first
        parts = np.concatenate([*parts, x])
        close_costs(to_go + value.constant[start], cost, parts, rtol=1e-11)
        close_costs(kkt(lqr, first, start)[3], cost, parts, rtol=1e-11)


@pytest.mark.costly
@pytest.mark.parametrize("shape", SHAPES)
def test_costs(shape):
    lqr, x0, solution = solved(*shape)
    value = jax.tree.map(np.asarray, solution.value)
    at_start = x0 @ value.P[0] @ x0 / 2 + value.p[0] @ x0 + value.constant[0]
    parts = solution.xs, solution.us
    close_costs(at_start, solution.cost, *parts)
    close_costs(cost(lqr, *parts), solution.cost, *parts)


def test_policy_reproduces_the_solution():
    _, _, solution = solved(6, 3, 2)
    for t in range(6):
        close(solution.policy(t, solution.xs[t]), solution.us[t])


def test_missing_terms_are_zero():
    lqr, x0 = random_lqr(6, 3, 2)
    zero = jnp.zeros
    given = dp.LQR(
        lqr.A, lqr.B, zero((6, 3)), lqr.Q, lqr.R, zero((6, 3, 2)), zero((6, 3)),
        zero((6, 2)), zero((3, 3)), zero(3),
    )  # fmt: skip
    missing = dp.LQR(lqr.A, lqr.B, None, lqr.Q, lqr.R)
    for a, b in zip(jax.tree.leaves(missing), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(a, b)
    close(dp.solve_lqr(missing, x0).us, kkt(given, x0)[1])


def test_constant_problem():
    lqr, x0 = random_lqr(1, 3, 2)
    A, B, c, Q, R, M, q, r, Q_final, q_final = map(np.asarray, jax.tree.leaves(lqr))
    stage = A[0], B[0], c[0], Q[0], R[0], M[0], q[0], r[0]
    constant = dp.LQR.constant(*stage, Q_final, q_final, horizon=6)
    assert constant.A.shape == (6, 3, 3) and constant.r.shape == (6, 2)
    xs, us, _, cost = kkt(constant, x0)
    solution = dp.solve_lqr(constant, x0)
    close(solution.xs, xs)
    close(solution.us, us)
    close_costs(solution.cost, cost, xs, us)
    # Without drift and linear terms, a long horizon approaches the stationary gain.
    A, B, Q, R = A[0], B[0], Q[0], R[0]
    long = dp.LQR.constant(A, B, None, Q, R, horizon=200)
    P = np.asarray(dp.solve_lqr(long, x0).value.P)[0]
    G = R + B.T @ P @ B
    step = Q + A.T @ P @ A - A.T @ P @ B @ np.linalg.solve(G, B.T @ P @ A)
    close(P, step)


def test_horizon_of_a_constant_problem_costs_nothing():
    """One operation, whatever the horizon: no list of its stages."""

    def constant(horizon):
        build = lambda A, B: dp.LQR.constant(A, B, None, A, A[:1, :1], horizon=horizon)
        return str(jax.make_jaxpr(build)(jnp.eye(2), jnp.ones((2, 1))))

    assert constant(4000).replace("4000", "7") == constant(7)


# Weights that are not symmetric: x'Qx sees only their symmetric part.


def skewed(array, seed):
    """`array` and something that changes no quadratic form."""
    skew = np.random.default_rng(seed).standard_normal(array.shape)
    return array + skew - skew.swapaxes(-1, -2)


def skewed_lqr(T, n, m):
    lqr, x0 = random_lqr(T, n, m)
    names = ("Q", "R", "Q_final")
    weights = {name: skewed(getattr(lqr, name), i) for i, name in enumerate(names)}
    terms = {name: getattr(lqr, name) for name in lqr.__dataclass_fields__}
    return dp.LQR(**(terms | weights)), lqr, x0


@pytest.mark.costly
@pytest.mark.parametrize("method", METHODS)
def test_one_stage_with_a_triangular_weight(method):
    # u'u / 2 + x'Q_final x / 2 at x = (1, u): 1/2 + u/2 + u^2.
    lqr = dp.LQR.constant(
        np.eye(2), np.eye(2)[:, 1:], None, np.zeros((2, 2)), np.eye(1),
        Q_final=np.array([[1.0, 1.0], [0.0, 1.0]]), horizon=1,
    )  # fmt: skip
    solution = dp.solve_lqr(lqr, jnp.array([1.0, 0.0]), method=method)
    close(solution.us, [[-0.25]])
    close(solution.cost, 0.4375)
    close(cost(lqr, solution.xs, solution.us), 0.4375)
    close(solution.value.P[-1], [[1.0, 0.5], [0.5, 1.0]])


@pytest.mark.costly
@pytest.mark.parametrize("fast_loops", [None, False])
@pytest.mark.parametrize("shape", [(6, 3, 2), (3, 2, 8)])
def test_only_the_symmetric_part_of_a_weight_counts(shape, fast_loops):
    given, lqr, x0 = skewed_lqr(*shape)
    xs, us = map(jnp.asarray, kkt(lqr, x0)[:2])
    expected = cost(given, xs, us)
    for method in METHODS:
        solution = dp.solve_lqr(given, x0, method=method, fast_loops=fast_loops)
        close(solution.xs, xs)
        close(solution.us, us)
        close_costs(expected, solution.cost, xs, us)


@pytest.mark.costly
@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_a_weight_is_symmetric(method):
    given, _, x0 = skewed_lqr(6, 3, 2)
    solve = jax.jit(ft.partial(dp.solve_lqr, method=method))
    gradient = jax.grad(lambda lqr: solve(lqr, x0).cost)(given)
    solution = solve(given, x0)
    outer = lambda a: np.einsum("...i,...j->...ij", a, a) / 2
    xs, us = map(np.asarray, (solution.xs, solution.us))
    close(gradient.Q, outer(xs[:-1]))
    close(gradient.R, outer(us))
    close(gradient.Q_final, outer(xs[-1]))


# Transformations.


def test_float32_is_kept():
    lqr, x0, exact = solved(6, 3, 2)
    lqr, x0 = jax.tree.map(lambda a: a.astype(jnp.float32), (lqr, x0))
    solution = dp.solve_lqr(lqr, x0)
    for leaf in jax.tree.leaves(solution):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    close(solution.us, exact.us, rtol=1e-5)
    close(solution.policy.K, exact.policy.K, rtol=1e-5)


def test_vmap_equals_the_loop():
    problems = [random_lqr(6, 3, 2, seed) for seed in range(5)]
    singles = [dp.solve_lqr(*problem) for problem in problems]
    stack = lambda *leaves: np.stack(leaves)
    batch = jax.vmap(dp.solve_lqr)(*jax.tree.map(stack, *problems))
    equal(batch, jax.tree.map(stack, *singles))


def test_jit_equals_eager():
    lqr, x0, eager = solved(6, 3, 2)
    equal(jax.jit(dp.solve_lqr)(lqr, x0), eager, 1e-14)


def test_gradient_is_that_of_central_differences():
    lqr, x0 = random_lqr(3, 2, 2)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2)))

    @jax.jit
    def loss(lqr, x0):
        solution = dp.solve_lqr(lqr, x0)
        return jnp.sum(weights * jnp.sin(solution.us)) + solution.cost

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(lqr, x0))
    leaves, treedef = jax.tree.flatten((lqr, x0))
    rng = np.random.default_rng(2)
    for i, leaf in enumerate(leaves):
        way = rng.standard_normal(leaf.shape)
        if leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2]:
            way = way + way.swapaxes(-1, -2)  # Hessians stay symmetric
        ends = {}
        for step in (1e-4, -1e-4, 2e-4, -2e-4):
            moved = [*leaves[:i], leaf + step * way, *leaves[i + 1 :]]
            ends[step] = float(loss(*jax.tree.unflatten(treedef, moved)))
        # Of fourth order: the third derivative may be large.
        inner, outer = ends[1e-4] - ends[-1e-4], ends[2e-4] - ends[-2e-4]
        difference = (8 * inner - outer) / 12e-4
        np.testing.assert_allclose(
            np.sum(gradients[i] * way), difference, rtol=1e-7, atol=1e-8
        )
        assert abs(difference) > 1e-3


def test_gradient_of_the_cost_in_x0_is_the_costate():
    lqr, x0, solution = solved(6, 3, 2)
    gradient = jax.grad(lambda x0: dp.solve_lqr(lqr, x0).cost)(x0)
    close(gradient, kkt(lqr, x0)[2][0])


# Errors.


def arrays(**changes):
    lqr, _ = random_lqr(6, 3, 2)
    names = ("A", "B", "c", "Q", "R", "M", "q", "r", "Q_final", "q_final")
    return {name: getattr(lqr, name) for name in names} | changes


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("A", (3, 3), r"`A` has shape \(3, 3\); \(T, n, n\) with T >= 1.*constant"),
        ("A", (6, 3, 2), r"`A` has shape \(6, 3, 2\)"),
        ("A", (0, 3, 3), r"`A` has shape \(0, 3, 3\)"),
        ("B", (3, 2), r"`B` has shape \(3, 2\); .*\(6, 3, m\)"),
        ("B", (5, 3, 2), r"`B` has shape \(5, 3, 2\)"),
        ("c", (3,), r"`c` has shape \(3,\).*\(6, 3\)"),
        ("Q", (3, 3), r"`Q` has shape \(3, 3\).*\(6, 3, 3\)"),
        ("R", (6, 2), r"`R` has shape \(6, 2\).*\(6, 2, 2\)"),
        ("M", (6, 2, 3), r"`M` has shape \(6, 2, 3\).*\(6, 3, 2\)"),
        ("q", (7, 3), r"`q` has shape \(7, 3\).*\(6, 3\)"),
        ("r", (6, 3), r"`r` has shape \(6, 3\).*\(6, 2\)"),
        ("Q_final", (1, 3, 3), r"`Q_final` has shape \(1, 3, 3\).*\(3, 3\)"),
        ("q_final", (2,), r"`q_final` has shape \(2,\).*\(3,\)"),
    ],
)
def test_wrong_shape(name, shape, message):
    with pytest.raises(ValueError, match=message):
        dp.LQR(**arrays(**{name: jnp.zeros(shape)}))


def test_wrong_dtype():
    with pytest.raises(ValueError, match="`R` has .* int64.*float64, as `A`"):
        dp.LQR(**arrays(R=jnp.ones((6, 2, 2), int)))
    integers = {name: array.astype(int) for name, array in arrays().items()}
    with pytest.raises(TypeError, match="`A` has dtype int64; float32 or float64"):
        dp.LQR(**integers)


@pytest.mark.parametrize("of_stage", [False, True])
def test_nothing_to_solve(of_stage):
    """No stages, no states, no controls."""
    zeros = lambda *shape: np.zeros(shape if of_stage else (6, *shape))
    build = ft.partial(dp.LQR.constant, horizon=6) if of_stage else dp.LQR
    with pytest.raises(ValueError, match=r"`A` has shape .*0, 0\); .*n >= 1 is expec"):
        build(zeros(0, 0), zeros(0, 2), None, zeros(0, 0), zeros(2, 2))
    with pytest.raises(ValueError, match=r"`B` has shape .*3, 0\); .*m >= 1 is expec"):
        build(zeros(3, 3), zeros(3, 0), None, zeros(3, 3), zeros(0, 0))


def test_wrong_constant_problems(unchecked):
    A, B, c, Q, R, *_ = (a[0] for a in jax.tree.leaves(random_lqr(6, 3, 2)[0]))
    build = lambda *terms, horizon=6: dp.LQR.constant(*terms, horizon=horizon)
    for horizon in (0, -1):
        with pytest.raises(ValueError, match=f"`horizon` is {horizon}; at least 1"):
            build(A, B, c, Q, R, horizon=horizon)
    for horizon in (2.5, True):
        with pytest.raises(TypeError, match=f"`horizon` is {horizon}; .*Python int"):
            build(A, B, c, Q, R, horizon=horizon)  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"`A` has shape \(1, 3, 3\); \(n, n\) .*LQR\("
    ):
        build(A[None], B, c, Q, R)
    with pytest.raises(ValueError, match=r"`Q` has shape \(2, 2\); \(3, 3\) is expec"):
        build(A, B, c, R, R)


def test_what_is_no_array_of_floats(unchecked):
    lqr, x0 = random_lqr(6, 3, 2)
    for dtype in ("int64", "float16", "bfloat16", "complex128"):
        terms = {name: term.astype(dtype) for name, term in arrays().items()}
        with pytest.raises(TypeError, match=f"`A` has dtype {dtype}; float32 or float"):
            dp.LQR(**terms)
    with pytest.raises(TypeError, match="`Q` is 'eye'; an array of floats is expected"):
        dp.LQR(**arrays(Q="eye"))
    with pytest.raises(TypeError, match="`x0` is None; an array of floats is expected"):
        dp.solve_lqr(lqr, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match="`x0` has dtype int64; float64, as `A`, .*ast"
    ):
        dp.solve_lqr(lqr, [1, 2, 3])  # pyright: ignore[reportArgumentType]
    listed = dp.solve_lqr(lqr, x0.tolist())  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(listed.us, solved(6, 3, 2)[2].us)


def test_weak_types_follow():
    """One program for weak and strong arrays, and no float32 problem gets wider."""
    terms = {name: term.astype(jnp.float32) for name, term in arrays().items()}
    weak = jnp.broadcast_to(jnp.asarray(0.5), (6, 3))
    assert weak.weak_type and weak.dtype == jnp.float64
    lqr = dp.LQR(**(terms | dict(q=weak)))
    assert lqr.q.dtype == jnp.float32 and not lqr.q.weak_type
    assert dp.solve_lqr(lqr, weak[0]).us.dtype == jnp.float32


# Policies.


def test_stages_that_a_policy_does_not_have(unchecked):
    policy, x = solved(6, 3, 2)[2].policy, jnp.ones(3)
    for t in (-1, 6, np.int64(6)):
        with pytest.raises(ValueError, match=f"`t` is {t}; .* the stages 0 to 5"):
            policy(t, x)
    us = jax.jit(jax.vmap(policy, (0, None)))(jnp.arange(-1, 7), x)
    assert np.all(np.isnan(us[np.array([0, 7])]))
    for t in range(6):
        close(us[1 + t], policy(t, x), 1e-14)


def test_policies_of_a_batch_are_mapped():
    lqr, x0, solution = solved(6, 3, 2)
    policies = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), solution.policy)
    with pytest.raises(ValueError, match=r"batch of shape \(2,\), .*`jax.vmap\(lambda"):
        policies(0, x0)
    mapped = jax.vmap(lambda policy, x: policy(0, x))
    us = mapped(policies, jnp.stack([x0, x0]))
    close(us, jnp.stack([solution.us[0], 2 * solution.us[0]]))


def test_compiling_a_policy():
    _, x0, solution = solved(6, 3, 2)
    with pytest.raises(TypeError, match=r"use `equinox.filter_jit\(policy\)`, or hand"):
        jax.jit(solution.policy)(0, x0)
    close(eqx.filter_jit(solution.policy)(0, x0), solution.us[0])


def test_wrong_arguments(unchecked):
    lqr, x0 = random_lqr(6, 3, 2)
    with pytest.raises(ValueError, match=r"`x0` has shape \(2,\).*\(3,\)"):
        dp.solve_lqr(lqr, x0[:2])
    with pytest.raises(ValueError, match="`x0` has .* float32.*float64"):
        dp.solve_lqr(lqr, x0.astype(jnp.float32))
    with pytest.raises(TypeError, match="`lqr` is a tuple; a `dp.LQR` is expected"):
        dp.solve_lqr((lqr,), x0)  # pyright: ignore[reportArgumentType]


@pytest.mark.costly
@pytest.mark.parametrize("shape", [(6, 3, 2), (4, 2, 5)])
def test_indefinite_control_cost(shape):
    lqr, x0 = random_lqr(*shape)
    m = shape[2]
    R = np.array(lqr.R)
    R[1] = np.diag([*np.ones(m - 1), -1e3])
    bad = dp.LQR(lqr.A, lqr.B, lqr.c, lqr.Q, jnp.asarray(R))
    with pytest.raises(dp.SolveError, match="not positive definite") as error:
        dp.solve_lqr(bad, x0)
    failed = dp.RESULTS.factorization_failed
    assert error.value.solution.result == failed
    assert dp.solve_lqr(bad, x0, throw=False).result == failed
    assert jax.jit(dp.solve_lqr)(bad, x0).result == failed
    assert not jnp.all(jnp.isfinite(dp.solve_lqr(bad, x0, throw=False).us))
