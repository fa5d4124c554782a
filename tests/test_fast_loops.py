"""Loops compiled as one function give what ordinary loops give, or step aside."""

import functools as ft

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax import lax

import diffprog as dp
from diffprog._common import fast_loops
from diffprog._common.fast_loops import compiled, obstacle
from diffprog._common.linalg import eliminate, product, solve_positive, symmetrize

from . import helpers
from .helpers import DIRECTIONS, name
from .quick import OLD_EMITTERS


MARK = "xla_cpu_small_call"
# XLA generates code as it does for users: fast loops rest on how it does that.
usual = jax.jit
if OLD_EMITTERS:
    usual = ft.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})


def agree(a, b, rtol=1e-9, atol=1e-11):
    compare = lambda x, y: np.testing.assert_allclose(x, y, rtol, atol)
    jtu.tree_map(compare, a, b)


def both(problem, x0, us, method, *args, **options):
    solve = lambda x0, us, fast: dp.solve(
        problem, method, x0, us, *args, fast_loops=fast, **options
    )
    return usual(ft.partial(solve, fast=True))(x0, us), solve(x0, us, False)


@pytest.mark.costly
@pytest.mark.parametrize("method", DIRECTIONS, ids=name)
def test_solutions_equal_those_of_ordinary_loops(method):
    problem, x0, us = helpers.spring()
    steps = dict(throw=False, max_steps=5)
    fast, plain = both(problem, x0, us, method, **steps)
    agree(fast.us, plain.us)
    agree(fast.history, plain.history, atol=1e-9)
    agree(fast.policy, plain.policy, atol=1e-8)
    assert fast.result == plain.result
    assert plain.stats["num_steps"] > 0
    for key in ("num_steps", "num_rollouts", "num_backwards"):
        assert fast.stats[key] == plain.stats[key]


@pytest.mark.slow
def test_float32_solutions_equal_those_of_ordinary_loops():
    problem, x0, us = helpers.spring(dtype=jnp.float32)
    fast, plain = both(problem, x0, us, dp.DDP())
    assert fast.us.dtype == jnp.float32
    agree(fast.cost, plain.cost, rtol=1e-6)


def marked(fn, *args) -> bool:
    return MARK in jax.jit(fn).lower(*args).as_text()


def test_whole_solves_are_marked_and_long_ones_loop_by_loop():
    for T, fast, mark in [(12, None, True), (12, False, False), (12_000, None, True)]:
        problem, x0, us = helpers.spring(T)
        solve = lambda us: dp.solve(problem, dp.ILQR(), x0, us, fast_loops=fast).us
        assert marked(solve, us) == mark
    with pytest.raises(ValueError, match=r"not possible here because of `\w+`"):
        dp.solve(problem, dp.ILQR(), x0, us, fast_loops=True)


def test_long_horizons_equal_ordinary_loops():
    problem, x0, us = helpers.spring(12_000)
    fast, plain = [
        dp.solve(problem, dp.DDP(), x0, us, max_steps=2, throw=False, fast_loops=loops)
        for loops in (None, False)
    ]
    agree(fast.us, plain.us)


@pytest.mark.slow
def test_a_chain_of_phases_equals_ordinary_loops():
    problem, x0, us = helpers.two_phase()
    fast, plain = both(problem, x0, us, dp.GaussNewton())
    agree(fast.us, plain.us, atol=1e-8)
    assert fast.result == plain.result == dp.RESULTS.successful
    assert plain.cost < plain.history["cost"][0]


def test_products_of_matrices_become_sums():
    shapes = [
        ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
        ((2, 3, 4), (4, 2, 5), (((2,), (0,)), ((0,), (1,)))),
        ((4, 3), (3, 4), (((0, 1), (1, 0)), ((), ()))),
        ((3,), (5,), (((), ()), ((), ()))),
    ]
    rng = np.random.default_rng(0)
    for a_shape, b_shape, dimensions in shapes:
        # Of whole numbers, so that no order of the sum rounds.
        a, b = (jnp.asarray(rng.integers(-9, 10, s), float) for s in (a_shape, b_shape))
        dot = lax.dot_general(a, b, dimensions, precision="highest")
        np.testing.assert_array_equal(product(a, b, dimensions), dot)


def test_what_makes_a_matrix_symmetric_stays_a_function():
    square = lambda m: symmetrize(m @ m)
    rewritten = lambda m: fast_loops._run(jax.make_jaxpr(square)(m).jaxpr, [], (m,))
    names = [e.params.get("name") for e in jax.make_jaxpr(rewritten)(jnp.eye(3)).eqns]
    assert names.count("symmetrize") == 1


def test_products_keep_the_precision_asked_for():
    a = jnp.full(3, 1.1, jnp.float32)
    wide = lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float64)
    fast = usual(lambda a: compiled(lambda _: wide(a), True))
    np.testing.assert_array_equal(fast(a), wide(a), strict=True)


def test_every_primitive_of_the_list_compiles():
    one = {name: getattr(lax, name) for name in fast_loops.FUNCTIONS if name != "pow"}
    two = ("atan2", "nextafter", "pow")
    rest = "abs ceil floor neg round sign sqrt square".split()

    def every(x, i):
        y = x[::-1] + 0.05
        out = [f(x) for n, f in one.items() if n not in two]
        out += [getattr(lax, n)(x) for n in rest]
        out += [getattr(lax, n)(x, y) for n in (*two, "div", "rem", "max", "min")]
        out += [jnp.cumsum(x), jnp.cumprod(x), x.at[i].set(1.0), x.at[i].add(y[i])]
        out += [jnp.clip(x, 0.2, 0.5), x**3, jnp.roll(x, 1), jnp.tile(x, 2)[:7]]
        out += [lax.reduce_precision(x, 5, 10), jnp.where(x > y, x, y), jnp.pad(x, 1)]
        row = jnp.stack([x, y]) @ jnp.outer(x, y)
        out += [row, jnp.take(x, jnp.asarray([i, 0])), x[i]]
        out += [lax.cond(x[0] > 0.5, jnp.sin, jnp.cos, x), jnp.prod(x), jnp.max(x)]
        out += [jax.hessian(lambda x: x[i] ** 3 * x.at[0].set(x[1] ** 2).sum())(x)]
        out += [jnp.argmax(x), jnp.argmin(x), jnp.all(x > 0), jnp.any(x > 0.5), i << 2]
        return lax.scan(lambda c, a: (c + a, c * a), x, jnp.stack([x, y])), out

    for dtype in (jnp.float32, jnp.float64):
        x, i = jnp.linspace(0.1, 0.9, 7, dtype=dtype), jnp.int32(2)
        fast = usual(lambda x, i: compiled(lambda _: every(x, i), True))
        close = dict(rtol=2e-5, atol=1e-6) if dtype == jnp.float32 else {}
        agree(fast(x, i), jax.jit(every)(x, i), **close)


@pytest.mark.slow
@pytest.mark.parametrize("size, terms", [(1024, 35), (16, 2400), (4096, 3)])
def test_what_is_just_small_enough_compiles(size, terms):
    """Loop bodies at the limits, where XLA would fuse them into one operation."""

    def program(x):
        def body(_, x):
            for _ in range(terms):
                x = 1.01 * x + 0.3
            small = x[:15] @ jnp.ones((15, 15)) @ jnp.ones((15, 18))
            return x - jnp.pad(small @ jnp.ones((18, 4095 // 18)), (0, size))[:size]

        return lax.fori_loop(0, 3, body, x)

    x = jnp.linspace(0.0, 1.0, size)
    assert obstacle(jax.make_jaxpr(program)(x)) is None
    agree(usual(lambda x: compiled(lambda _: program(x), True))(x), program(x))


SIZES = [(1, 1), (15, 6), (16, 7), (20, 8), (24, 12), (32, 16), (40, 20), (41, 21)]


@pytest.mark.costly("dtype")
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("size", SIZES)
def test_recursions_of_every_size_compile_and_equal_ordinary_loops(size, dtype):
    n, m = size
    rng = np.random.default_rng(0)
    array = lambda a: jnp.asarray(np.asarray(a, dtype))
    normal = lambda *shape: rng.standard_normal(shape)
    A, B, c, x0 = normal(4, n, n) / n**0.5, normal(4, n, m), normal(4, n), normal(n)
    Q, R = np.tile(np.eye(n), (4, 1, 1)), np.tile(np.eye(m), (4, 1, 1))
    lqr = dp.LQR(*map(array, (A, B, c, Q, R)), Q_final=array(np.eye(n)))
    x0 = array(x0)
    fast = usual(ft.partial(dp.solve_lqr, fast_loops=True))(lqr, x0)
    plain = dp.solve_lqr(lqr, x0, fast_loops=False)
    tolerance = 1e-11 if dtype == jnp.float64 else 1e-3
    agree(fast.us, plain.us, rtol=tolerance, atol=tolerance)
    agree(fast.policy.K, plain.policy.K, rtol=tolerance, atol=tolerance)


@pytest.mark.costly
@pytest.mark.parametrize("limited", [False, True])
def test_many_states_and_controls_equal_ordinary_loops(limited):
    """Tiles, elimination and, for DDP, second derivatives that each pass finds."""
    n, m = 20, 9

    def dynamics(x, u, t):
        force = jnp.sin(jnp.roll(x, 1)) - x
        return x + 0.1 * force + 0.1 * jnp.tile(u, 3)[:n]

    bounds = (jnp.full(m, -0.3), jnp.full(m, 0.3)) if limited else None
    problem = dp.ControlProblem(
        dynamics, lambda x, u, t: x @ x + 0.1 * u @ u, lambda x: 5 * x @ x, 6,
        control_bounds=bounds,
    )  # fmt: skip
    x0, us = jnp.linspace(-1.0, 2.0, n), jnp.zeros((6, m))
    fast, plain = both(problem, x0, us, dp.DDP())
    agree(fast.us, plain.us, rtol=1e-9, atol=1e-9)
    assert fast.stats["num_steps"] == plain.stats["num_steps"] > 0


def test_derivatives_and_batches_of_a_solve_with_a_positive_matrix_compile():
    size = 7
    G = jnp.eye(size) + jnp.ones((size, size)) / size
    solve = lambda z: solve_positive(G + z[0] ** 2 * jnp.eye(size), z[:, None])[0][:, 0]

    def program(z):
        return jax.vmap(solve)(jnp.stack([z, 2 * z])), jax.jacfwd(solve)(z)

    z = jnp.linspace(-1.0, 1.0, size)
    fast = usual(lambda z: compiled(lambda _: program(z), True))
    agree(fast(z), jax.jit(program)(z))


def test_a_matrix_that_is_eliminated_shows_a_way_down():
    rng, compiled = np.random.default_rng(0), jax.jit(eliminate)
    for m in (7, 21):
        factor = rng.normal(size=(m, m))
        G = factor @ factor.T + np.eye(m)
        rhs = rng.normal(size=(m, 3))
        x, positive = compiled(G, rhs, np.asarray(True))
        assert positive
        agree(x, np.linalg.solve(G, rhs), rtol=1e-9, atol=1e-9)
        x, positive = compiled(G - 2 * np.eye(m), rhs, np.asarray(True))
        x = np.asarray(x)
        assert not positive
        assert x[:, 0] @ (G - 2 * np.eye(m)) @ x[:, 0] <= 0 < np.max(np.abs(x))
        x, positive = compiled(G, rhs, np.asarray(False))
        assert not positive
        assert not np.any(x)


def test_ordinary_loops_are_traced_for_what_needs_them_only():
    def traced(transformed, *args):
        asked = []

        def program(loops, x):
            asked.append(loops)
            return jnp.sum(jnp.sin(x))

        transformed(lambda x: compiled(program, None, x))(*args)
        return asked

    x = jnp.linspace(0.0, 1.0, 3)
    assert traced(lambda fn: fn, x) == traced(jax.jit, x) == ["fused"]
    for transformed in (jax.vmap, jax.grad, lambda fn: jax.jit(jax.grad(fn))):
        x = jnp.ones((2, 3)) if transformed is jax.vmap else x
        assert traced(transformed, x) == ["fused", "plain"]


def test_a_function_that_holds_traced_numbers_has_batches_and_derivatives():
    held = lambda y, x: compiled(lambda _, x: jnp.sin(x) * y, None, x)
    x, y = jnp.linspace(0.0, 1.0, 3), jnp.linspace(1.0, 2.0, 3)
    agree(jax.vmap(held)(y, x), jnp.sin(x) * y)
    slopes = jax.jit(jax.vmap(jax.grad(held, (0, 1))))(y, x)
    agree(slopes, (jnp.sin(x), jnp.cos(x) * y))


OBSTACLES = {
    "`sort`": (lambda x: jnp.sort(x), 4),
    "`top_k`": (lambda x: lax.top_k(x, 2)[0], 4),
    "`cholesky`": (lambda x: jnp.linalg.cholesky(jnp.outer(x, x) + jnp.eye(4)), 4),
    "`debug_callback`": (lambda x: jax.debug.callback(print, x) or x, 4),
    "`scatter` with several": (lambda x: x.at[jnp.asarray([0, 2])].set(0.0), 4),
    "dtype bfloat16": (lambda x: x.astype(jnp.bfloat16).astype(x.dtype), 4),
    "`reduce_max` over 4096": (jnp.max, 4096),
    "`dot_general` over 132651": (
        lambda x: jnp.ones((51, 51)) @ jnp.ones((51, 51)), 4,
    ),
    "`dot_general` over 5120": (
        lambda x: jax.vmap(jnp.dot)(jnp.ones((20, 4, 8)), jnp.ones((20, 8, 8))), 4,
    ),
    "`sin` of 1025 numbers": (jnp.sin, 1025),
    "`add` of 4097 numbers": (lambda x: x + 1.0, 4097),
    "to an array of 262152 bytes": (lambda x: x[::-1], 32_769),
    "a loop body of more": (lambda x: [x := x + 1.0 for _ in range(9)][-1], 1025),
    "more than 100000 operations": (
        lambda x: [x := jnp.tanh(x) for _ in range(40)][-1], 64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_is_not_known_to_compile_is_said_and_runs_anyway(reason):
    fn, size = OBSTACLES[reason]
    x = jnp.linspace(1.0, 2.0, size)
    with pytest.raises(ValueError, match=reason) as error:
        compiled(lambda _: fn(x), True)
    assert "`fast_loops=None`" in str(error.value)
    agree(compiled(lambda _: fn(x), None), fn(x))


@pytest.mark.slow
def test_dynamics_with_lapack_still_solve():
    def dynamics(x, u, t):
        mass = jnp.diag(1.0 + 0.1 * x**2)
        return x + 0.1 * jnp.linalg.solve(mass, jnp.stack([x[1], u[0] - x[0]]))

    cost = lambda x, u, t: x @ x + u @ u
    problem = dp.ControlProblem(dynamics, cost, lambda x: x @ x, 12)
    x0, us = jnp.asarray([1.0, 0.0]), jnp.zeros((12, 1))
    with pytest.raises(ValueError, match="the primitive `lu`"):
        dp.solve(problem, dp.ILQR(), x0, us, fast_loops=True)
    mixed = dp.solve(problem, dp.ILQR(), x0, us)
    plain = dp.solve(problem, dp.ILQR(), x0, us, fast_loops=False)
    agree(mixed.us, plain.us)
    assert plain.cost < plain.history["cost"][0]


def test_verbose_takes_the_ordinary_loops():
    problem, x0, us = helpers.spring()
    with pytest.raises(ValueError, match="callback"):
        dp.solve(problem, dp.ILQR(), x0, us, verbose=print, fast_loops=True)


@pytest.mark.slow
@pytest.mark.parametrize("search", [dp.FixedStep(), dp.Backtracking()], ids=name)
def test_a_missing_minimum_has_the_same_code(search):
    saddle = lambda x, u, t: x[0] ** 2 - u[0] ** 2
    step = lambda x, u, t: x + u
    problem = dp.ControlProblem(step, saddle, lambda x: 0.1 * x[0] ** 2, 3)
    args = problem, jnp.ones(1), 0.1 * jnp.ones((3, 1)), dp.ILQR(), search
    fast, plain = both(*args, throw=False)
    assert fast.result == plain.result != dp.RESULTS.successful


@pytest.mark.slow
def test_a_missing_minimum_of_many_controls_is_no_bad_derivative():
    """More second derivatives than are stored, and more controls than written out."""
    mixing = jax.random.normal(jax.random.key(0), (8, 8))
    problem = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * jnp.tanh(mixing @ u) + 0.1 * jnp.sin(x),
        lambda x, u, t: 0.01 * u @ u + 0.1 * jnp.sum(1 - jnp.cos(x - 2)),
        lambda x: 5 * jnp.sum((x - 2) ** 2),
        20,
    )
    start = jnp.zeros(8), jnp.full((20, 8), 0.3)
    solution = dp.solve(problem, dp.DDP(), *start, fast_loops=False)
    assert solution.stats["num_backwards"] > solution.stats["num_steps"] + 1


@pytest.mark.parametrize("n", [2, 9])  # a straight line, and a loop
def test_passes_that_fail_leave_the_right_gradient(n):
    """Of a solve that ends with such a pass, and of one that only begins with it."""
    problem = dp.ControlProblem(
        lambda x, u, t: x + 0.1 * jnp.concatenate([x[1:], u]),
        lambda x, u, t: 0.1 * jnp.sum(jnp.cos(x)) - 0.2 * u @ u + 0.1 * jnp.sum(u**4),
        lambda x: x @ x,
        10,
    )
    x0, us = jnp.linspace(0.0, 1.0, n), jnp.full((10, 1), 0.1)
    gradient = jax.grad(lambda us: dp.rollout(problem, x0, us).cost)(us)

    def solve(max_damping, fast=False):
        search = dp.Backtracking(max_damping=max_damping)
        given = problem, dp.ILQR(), x0, us, search
        return dp.solve(*given, throw=False, max_steps=3, fast_loops=fast)

    compiled = usual(ft.partial(solve, fast=True))
    for max_damping in (1e-3, 1e10):
        fast, plain = compiled(max_damping), solve(max_damping)
        assert plain.stats["num_backwards"] > plain.stats["num_steps"] + 2
        agree(fast.us, plain.us)
        agree(fast.history, plain.history)
        agree(fast.stats["gradient"], plain.stats["gradient"])
        assert fast.result == plain.result
        agree(plain.history["gradient"][0], jnp.linalg.norm(gradient))


def test_a_second_derivative_that_is_not_finite_has_the_same_code():
    step = lambda x, u, t: x + jnp.sign(u) * jnp.abs(u) ** 1.5
    cost = lambda x, u, t: x[0] ** 2 + 0.1 * (u[0] - 1.0) ** 2
    problem = dp.ControlProblem(step, cost, lambda x: (x[0] - 2.0) ** 2, 4)
    us = jnp.ones((4, 1)).at[2].set(0.0)
    fast, plain = both(problem, jnp.ones(1), us, dp.DDP(), throw=False)
    assert fast.result == plain.result == dp.RESULTS.nonfinite_derivative
    assert fast.stats["first_nonfinite"] == plain.stats["first_nonfinite"] == 2


@pytest.mark.slow
def test_vmap_takes_the_ordinary_loops():
    problem, x0, us = helpers.spring()
    x0s = jnp.stack([x0, -x0, 0.5 * x0])
    solve = lambda x0, fast=None: (
        dp.solve(problem, dp.ILQR(), x0, us, fast_loops=fast).us
    )
    batch = jax.jit(jax.vmap(solve))
    assert MARK not in batch.lower(x0s).as_text()
    looped = jax.jit(lambda x0s: lax.map(solve, x0s))
    assert MARK in looped.lower(x0s).as_text()
    agree(batch(x0s), looped(x0s))
    with pytest.raises(ValueError, match=r"under `jax.vmap`.*`dp.solve_batch`"):
        jax.vmap(lambda x0: solve(x0, True))(x0s)


def test_linear_quadratic_problems_and_their_derivatives(getkey):
    lqr = helpers.random_lqr(getkey())
    x0 = jnp.asarray([1.0, -1.0, 0.5])
    cost = lambda fast: lambda lqr: dp.solve_lqr(lqr, x0, fast_loops=fast).cost
    solve = lambda lqr, fast: dp.solve_lqr(lqr, x0, throw=False, fast_loops=fast)
    fast, plain = solve(lqr, True), solve(lqr, False)
    assert fast.result == dp.RESULTS.successful
    assert marked(cost(None), lqr) and not marked(cost(False), lqr)
    agree(fast, plain)
    agree(jax.jit(jax.grad(cost(None)))(lqr), jax.jit(jax.grad(cost(False)))(lqr))
    # More negative than what any cost-to-go could make up for.
    wrong = helpers.eqx.tree_at(lambda l: l.R, lqr, -1e6 * lqr.R)
    assert solve(wrong, True).result == dp.RESULTS.factorization_failed


def test_other_platforms_and_versions_take_the_ordinary_loops(monkeypatch):
    problem, x0, us = helpers.spring()
    solve = lambda fast: dp.solve(problem, dp.ILQR(), x0, us, fast_loops=fast)
    for name_, value, reason in (
        ("NEWEST", (0, 9), r"tried up to JAX 0\.9"),
        ("set_xla_metadata", None, "no `xla_metadata`"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(fast_loops, name_, value)
            with pytest.raises(ValueError, match=reason):
                solve(True)
            assert not marked(lambda us: dp.rollout(problem, x0, us).cost, us)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(ValueError, match="the platform gpu"):
            solve(True)
