"""Loop bodies written out number by number give what the loops give, or stay."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import diffprog as dp
from diffprog._common import straight
from diffprog._common.fast_loops import compiled
from diffprog._common.primitives import FUNCTIONS

from . import helpers
from .test_fast_loops import agree, both, usual


TWO = "atan2", "nextafter", "pow"


@pytest.fixture
def every_body(monkeypatch):
    """Bodies of any size are written out."""
    monkeypatch.setattr(straight, "LEAST", 0)
    monkeypatch.setattr(straight, "LEAST_PER_NUMBER", 0)


def stage(carry, row):
    """Of every rule."""
    (x, count), (a, t) = carry, row
    first, rest = jnp.split(x, [1])
    product = jnp.outer(x, a) @ jnp.diag(jnp.asarray([1.0, 0.0, 2.0])) @ x
    batch = lax.dot_general(jnp.stack([x, a]), x[None], (((1,), (1,)), ((), ())))
    looked = jnp.where(t > 3, jnp.sin(x), jnp.pad(rest, (0, 1))) + 0.0 * jnp.exp(a)
    bounded = jnp.clip(jnp.flip(a), -0.5, first[0]) ** 3 + jnp.arange(3.0)
    largest = jnp.max(jnp.abs(x)) - jnp.min(a) + jnp.prod(jnp.cos(x))
    known = jnp.logical_and(jnp.isfinite(x), True) & (a < 1.0)
    count = count + (jnp.all(known) | jnp.any(x > a)).astype(jnp.int32)
    x = 0.5 * x + 0.1 * (looked + product / (1 + largest**2) + batch.sum())
    x = jnp.concatenate([x[1:], x[:1] * 1.0]) - jnp.reshape(bounded, (1, 3))[0] / 9
    return (x, count), (x[::2], count, t + t)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_lines_equal_loops(length, reverse, every_body):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(length, 3))), jnp.arange(length)
    start = jnp.asarray(rng.normal(size=3)), jnp.int32(0)
    loop = ft.partial(lax.scan, stage, reverse=reverse)
    fast = usual(lambda *given: compiled(lambda _: loop(*given), True))
    assert "reduce_window" in fast.lower(start, rows).as_text()
    agree(fast(start, rows), loop(start, rows))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_functions_and_compensated_sums_are_as_accurate(dtype, every_body):
    """A sum whose order counts is not put into another."""
    one = [getattr(lax, n) for n in FUNCTIONS if n not in ("acosh", "erfc", *TWO)]
    two = [getattr(lax, n) for n in TWO]

    def every(x):
        large = 0.1 / float(jnp.finfo(dtype).eps)
        out = [f(x) for f in one] + [f(x, 0.7 * x + 0.1) for f in two]
        return jnp.stack([*out, lax.acosh(1 + x), lax.exp(30 * x), (x + large) - large])

    x = jnp.linspace(0.01, 0.99, 40, dtype=dtype)
    loop = lambda x: lax.scan(lambda c, x: (c, every(x)), 0.0, x)[1]
    fast = usual(lambda x: compiled(lambda _: loop(x), True))
    assert "reduce_window" in fast.lower(x).as_text()
    agree(fast(x), jax.jit(every)(x).T, rtol=8 * float(jnp.finfo(dtype).eps), atol=0)


ROWS = jnp.arange(12.0).reshape(6, 2)
NOT_FINITE = jnp.asarray([jnp.inf, jnp.nan, -1.0])
SINGLE = jnp.asarray([7, 9, 200.1], jnp.float32)
WIDE = dict(preferred_element_type=jnp.float64)


@jax.jit
def symmetrize(matrix):
    """A user's function of the same name."""
    return matrix @ matrix + jnp.sin(matrix)


BODIES = dict(
    signs_of_zero=(lambda x, _: (x / 2, (x / 0.0, x / -0.0)), jnp.ones(3), ROWS),
    written_zero=(lambda x, _: (x / 2, 0.0 * x), NOT_FINITE, ROWS),
    not_finite=(
        lambda x, _: (
            x / 2,
            (x.max(), x.min(), x.prod(), jnp.where(x > 0, x, jnp.inf)),
        ),
        NOT_FINITE,
        ROWS,
    ),
    casts=(
        lambda x, _: (x, [x * jnp.full(3, n).astype("uint8") for n in (300, 3e2)]),
        jnp.ones(3, jnp.uint8),
        ROWS,
    ),
    empty_rows=(lambda x, r: (2 * x, (x, r)), jnp.ones(3), jnp.zeros((6, 0))),
    empty_sum=(lambda x, _: (2 * x, jnp.ones((0, 3)).sum(1)), jnp.ones(3), ROWS),
    empty_product=(lambda x, _: (x, x[:0, None] @ x[None, :1]), jnp.ones(3), ROWS),
    weak=(lambda x, _: (2.0 * x, x), 1.0, ROWS),
    precise=(lambda x, _: (2 * x, jnp.matmul(x, x, **WIDE)), SINGLE, ROWS),
    own=(lambda x, _: (symmetrize(x) / 1e4, x[0]), jnp.ones((12, 12)), ROWS),
)


@pytest.mark.parametrize("name", BODIES)
def test_bodies_give_what_loops_give(name, every_body):
    body, x, rows = BODIES[name]
    loop = ft.partial(lax.scan, body)
    fast = usual(lambda *given: compiled(lambda _: loop(*given), True))(x, rows)
    agree(fast, jax.jit(loop)(x, rows))
    like = lambda tree: [(a.dtype, a.weak_type) for a in jax.tree.leaves(tree)]
    assert like(fast) == like(jax.jit(loop)(x, rows))


def test_keys_pass_through_loops(every_body):
    body = lambda carry, r: ((2 * carry[0], carry[1]), r * 2)
    loop = ft.partial(lax.scan, body, (jnp.ones(3), jax.random.key(1)))
    (x, key), rows = usual(lambda r: compiled(lambda _: loop(r), True))(ROWS)
    agree((x, rows), (64 * jnp.ones(3), 2 * ROWS))
    assert key == jax.random.key(1)


def test_lines_on_devices_vary_as_a_whole(every_body):
    """Also what the loop itself finds alike on all of them."""
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("devices",), axis_types=kinds)

    def loop(x):
        body = lambda carry, row: ((carry[0] * x, carry[1] + 1), row > 0)
        (x, count), flags = lax.scan(body, (x, 0), ROWS)
        return x + count, jnp.where(flags[:, :1], x, 0)

    fast = lambda x: compiled(lambda _: loop(x), True)
    parts = jax.sharding.PartitionSpec("devices")
    split = jax.shard_map(
        fast,
        mesh=mesh,
        in_specs=parts,
        out_specs=(parts, jax.sharding.PartitionSpec(None, "devices")),
    )
    agree(usual(split)(jnp.ones(3)), loop(jnp.ones(3)))


def test_what_is_0_everywhere_is_0_times_infinity():
    """So a column of a Jacobian does not spoil others."""
    body = lambda x, _: (x / 2, jnp.eye(3) @ jnp.exp(x))
    count = straight._operations(jax.make_jaxpr(body)(jnp.ones(3), None))
    assert count == 3 + 3


def test_large_constants_do_not_take_long_to_trace(monkeypatch):
    table = jnp.ones(20_000)
    body = lambda x, _: (table[:3] + x, x)
    monkeypatch.setattr(straight, "_Line", None)  # would unpack all numbers
    assert not lines(lambda x: body(x, None)[0], jnp.ones(3))


def lines(body, x, kept=1) -> bool:
    loop = lambda x: lax.scan(lambda x, _: (body(x), [x] * kept), x, None, length=8)
    fast = jax.jit(lambda x: compiled(lambda _: loop(x), True))
    return "reduce_window" in fast.lower(x).as_text()


def test_bodies_that_are_long_or_move_numbers_only_stay_loops():
    x = jnp.ones(4)
    line = lambda x, k: x[::-1] * x + k
    repeated = lambda n: lambda x: ft.reduce(line, map(float, range(n)), x)
    assert not lines(repeated(2), x)
    assert lines(repeated(30), x)
    assert not lines(repeated(30), x, kept=8)
    assert not lines(repeated(300), x)
    assert not lines(repeated(30), jnp.ones(60))
    assert not lines(lambda x: repeated(30)(lax.erfc(x)), x)
    many = lambda x: repeated(30)(ft.reduce(lambda x, _: jnp.sin(x), range(8), x))
    assert not lines(many, x)
    looped = lambda x: lax.while_loop(lambda x: x[0] < 0, repeated(30), x)
    assert not lines(looped, x)


def test_what_is_known_needs_no_operation():
    known = np.diag([1.0, 0.0, 1.0])
    count = lambda fn: straight._operations(jax.make_jaxpr(fn)(jnp.ones((3, 3))))
    assert count(lambda x: jnp.asarray(known) @ x + jnp.zeros((3, 3))) == 0
    assert count(lambda x: jnp.where(jnp.eye(3) > 0, x, x.T)) == 0
    assert count(lambda x: x @ x) == 9 * 5
    assert count(lambda x: jnp.sum(x + x) + jnp.sum(x + x)) == 9 + 8 + 1


@pytest.mark.costly
@pytest.mark.parametrize("method", [dp.ILQR(), dp.DDP()], ids=helpers.name)
def test_solves_equal_those_of_ordinary_loops(method):
    problem, x0, us = helpers.pendulum(24)
    lowered = jax.jit(lambda us: dp.solve(problem, method, x0, us).us).lower(us)
    assert "reduce_window" in lowered.as_text()
    fast, plain = both(problem, x0, us, method)
    agree(fast.us, plain.us, atol=1e-8)
    agree(fast.policy, plain.policy, atol=1e-6)
    for key in ("num_steps", "num_rollouts", "num_backwards"):
        assert fast.stats[key] == plain.stats[key]


def test_a_derivative_that_is_not_finite_has_the_same_code():
    root = lambda x, u, t: x + 0.1 * u + jnp.sqrt(jnp.abs(x)) * 0.01
    squares = lambda x, u, t: jnp.sum(x**2) + jnp.sum(u**2)
    problem = dp.ControlProblem(root, squares, lambda x: jnp.sum(x**2), 8)
    solve = lambda: both(
        problem, jnp.zeros(2), jnp.zeros((8, 2)), dp.DDP(), throw=False
    )
    fast, plain = solve()
    assert fast.result == plain.result != dp.RESULTS.successful
    assert fast.stats["first_nonfinite"] == plain.stats["first_nonfinite"]
