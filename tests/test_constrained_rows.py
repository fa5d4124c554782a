"""Tables of multipliers, a row for each example, and batches split over devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from scipy.optimize import nnls

from diffprog.constrained import (
    Ascent,
    at_most,
    Augmented,
    Clip,
    equal,
    FromOptax,
    Growth,
    Lagrangian,
    Penalty,
    PI,
    Relaxed,
    Restart,
)


pytestmark = pytest.mark.usefixtures("mixed_dtypes")


RNG = np.random.default_rng(3)
N = 12
X, Y = jnp.asarray(RNG.normal(size=(N, 3))), jnp.asarray(RNG.normal(size=N))
START = jnp.asarray(RNG.normal(size=3))
DUALS = {
    "PI": PI(0.2, gain=1.0, smoothing=0.3),
    "PI, velocity, sgd": PI(0.2, 1.0, 0.3, form="velocity", start="sgd"),
    "augmented, growing": Augmented(1.0, 0.1, Growth(1.05)),
    "Adam": FromOptax(optax.adam(0.1)),
    "restarted and clipped": Clip(Restart(Relaxed(5.0, 0.2)), 2.0),
}


def losses(w, x, y):
    return (x @ w - y) ** 2


gradients = jax.jit(jax.vmap(jax.grad(losses), (None, 0, 0)))


def indexed(w, index, x, y, mask=None):
    """Every example has its own limit."""
    limits = at_most(losses(w, x, y), 0.3, index=index, rows=N, mask=mask)
    return jnp.sum(w**2), {"losses": limits}


def dense(w, x, y):
    return jnp.sum(w**2), {"losses": at_most(losses(w, x, y), 0.3)}


def same(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.costly
@pytest.mark.parametrize("name", DUALS)
def test_a_table_of_which_all_rows_are_seen_is_dense(name):
    of_rows, of_all = (Lagrangian(fn, DUALS[name]) for fn in (indexed, dense))
    order = jnp.arange(N)
    table = of_rows.init(START, order, X, Y)

    (w, duals), (v, table) = (START, of_all.init(START, X, Y)), (START, table)
    for _ in range(4):  # not compiled, where sums would be fused in different ways
        _, grads, duals = of_all.step(w, duals, X, Y)
        _, others, table = of_rows.step(v, table, order, X, Y)
        w, v = w - 0.02 * grads, v - 0.02 * others
    same((w, duals), (v, table))
    assert np.max(table["losses"].value) > 0


@pytest.mark.costly
@pytest.mark.parametrize("name", DUALS)
def test_rows_that_were_not_seen_stay_bit_for_bit(name):
    lagrangian = Lagrangian(indexed, DUALS[name])
    step = jax.jit(lagrangian.step)
    every = jnp.arange(N)
    start = lagrangian.init(START, every, X, Y)
    duals = step(START, start, every, X, Y)[2]
    # Padding, before the table and behind it, and what a mask leaves out.
    index = np.array([3, -1, 7, N, 5, -N])
    mask = jnp.array([True, True, True, True, False, True])
    rows = np.clip(index, 0, N - 1)
    batch = jnp.asarray(index), X[rows], Y[rows], mask
    (_, report), grads, new = step(START, duals, *batch)
    seen = np.isin(np.arange(N), [3, 7])
    for old, now in zip(jax.tree.leaves(duals), jax.tree.leaves(new), strict=True):
        if old.shape[:1] == (N,):
            old, now = np.asarray(old), np.asarray(now)
            np.testing.assert_array_equal(old[~seen], now[~seen])
    before, after = (np.asarray(d["losses"].value) for d in (duals, new))
    assert np.all(before[seen] != after[seen])
    m = np.asarray(report.multipliers["losses"])
    np.testing.assert_array_equal(m[[1, 3, 4, 5]], 0)
    each = gradients(START, X[rows], Y[rows])
    np.testing.assert_allclose(grads, 2 * START + m @ each, atol=1e-13)
    found = jax.jit(jax.grad(lagrangian))(START, new, *batch)
    np.testing.assert_allclose(grads, found, atol=1e-13)
    alone = step(START, duals, jnp.array([7, 3]), X[rows[2::-2]], Y[rows[2::-2]])[2]
    same(new["losses"].value, alone["losses"].value)


def test_rows_that_repeat_count_with_their_mean():
    lagrangian = Lagrangian(indexed, PI(0.2, gain=1.0, smoothing=0.3))
    index = jnp.array([4, 2, 4, 4])
    x, y = X[:4], Y[:4]
    duals = lagrangian.init(START, index, x, y)
    (_, report), grads, duals = jax.jit(lagrangian.step)(START, duals, index, x, y)
    errors = losses(START, x, y) - 0.3
    mean = jnp.mean(errors[np.array([0, 2, 3])])
    np.testing.assert_allclose(
        duals["losses"].value[np.array([2, 4])],
        np.maximum(0.2 * np.array([errors[1], mean]), 0),
    )
    np.testing.assert_allclose(duals["losses"].memory["error"][4], 0.7 * mean)
    m = np.asarray(report.multipliers["losses"])
    assert m[0] == m[2] == m[3]
    each = gradients(START, x, y)
    np.testing.assert_allclose(grads, 2 * START + m @ each, atol=1e-13)


def test_rows_of_several_numbers():
    def measure(w, index, x):
        return jnp.sum(w**2), {
            "rows": equal(x * w[None], 0.5, index=index, rows=N, mask=jnp.abs(x) > 0.1)
        }

    lagrangian, index = Lagrangian(measure, PI(0.2, gain=1.0)), jnp.array([5, 1, 5])
    duals = lagrangian.init(START, index, X[:3])
    (_, report), grads, duals = jax.jit(lagrangian.step)(START, duals, index, X[:3])
    assert duals["rows"].value.shape == (N, 3)
    np.testing.assert_allclose(
        grads, 2 * START + jnp.sum(report.multipliers["rows"] * X[:3], 0)
    )
    assert not np.any(duals["rows"].value[np.array([0, 2, 3, 4, 6])])


# Reference problems ---------------------------------------------------------------


def drawn(n, seed):
    """min |x|^2 such that A x = b or A x <= b, with its solutions."""
    rng = np.random.default_rng(seed)
    U, _, V = np.linalg.svd(rng.normal(size=(5, n)), full_matrices=False)
    A, b = U @ np.diag(rng.uniform(1.5, 2.5, 5)) @ V, rng.normal(size=5)
    b /= np.linalg.norm(b)
    mu = -2 * np.linalg.solve(A @ A.T, b)
    lam = nnls(A.T, -2 * np.linalg.pinv(A) @ b)[0]
    return A, b, mu, lam


def driven(lagrangian, every):
    """One step in every order: dual first, simultaneous, parameters first, twice.

    Multipliers of the rows `seen` are updated.
    """
    move = lambda x, duals, at: x - 3e-2 * lagrangian.grad(at, duals, every)[1]

    def dual_first(x, duals, seen):
        _, duals = lagrangian.update(x, duals, seen)
        return move(x, duals, x), duals

    def simultaneous(x, duals, seen):
        return move(x, duals, x), lagrangian.update(x, duals, seen)[1]

    def parameters_first(x, duals, seen):
        x = move(x, duals, x)
        return x, lagrangian.update(x, duals, seen)[1]

    def extragradient(x, duals, seen):
        half, half_duals = simultaneous(x, duals, seen)
        _, new = lagrangian.update(half, duals, seen)
        return move(x, half_duals, half), new

    return dual_first, simultaneous, parameters_first, extragradient


def solved(lagrangian, every, draw, num_steps, n):
    """By every driver; step i updates the multipliers of `draw(i)`."""
    x, out = jnp.ones(n), []
    for driver in driven(lagrangian, every):
        step = lambda i, carry, driver=driver: driver(*carry, draw(i))
        start = x, lagrangian.init(x, every)
        x_, duals = jax.lax.fori_loop(0, num_steps, step, start)
        out.append((x_, duals["rows"].value))
    return out


KINDS = pytest.mark.parametrize(
    "kind", [equal, at_most], ids=["equalities", "inequalities"]
)


def step_of(n):
    return 0.2 / np.sqrt(n)


def check_solved(found, kind, A, mu, lam, atol=1e-4):
    y = mu if kind is equal else lam
    for x, multipliers in found:
        np.testing.assert_allclose(x, -A.T @ y / 2, atol=atol)
        np.testing.assert_allclose(multipliers, y, atol=atol)


@pytest.mark.costly
@pytest.mark.parametrize("n", [5, 10])
@KINDS
def test_every_driver_solves_the_reference_problems(kind, n):
    order = jnp.array([3, 0, 4, 1, 2])  # of a table, in another order

    @jax.jit
    def run(A, b):
        def measure(x, rows):
            if rows is None:
                return x @ x, {"rows": kind(A @ x, b)}
            return x @ x, {"rows": kind(A[rows] @ x, b[rows], index=rows, rows=5)}

        step, out = step_of(n), []
        for dual in Ascent(step), Augmented(1.0, step, Growth(1.00025)):
            for rows in None, order:
                lagrangian = Lagrangian(measure, dual)
                out += solved(lagrangian, rows, lambda _, rows=rows: rows, 1500, n)
        return out

    A, b, mu, lam = drawn(n, seed=n)
    found = run(jnp.asarray(A), jnp.asarray(b))
    assert len(found) == 16
    check_solved(found, kind, A, mu, lam)


@pytest.mark.costly
@pytest.mark.parametrize("n", [5, 10])
@KINDS
def test_multipliers_of_which_half_are_seen_solve_the_reference_problems(kind, n):
    """An update sees two rows of five, at random; gradients see all."""

    @jax.jit
    def run(A, b):
        def measure(x, rows):
            return x @ x, {"rows": kind(A[rows] @ x, b[rows], index=rows, rows=5)}

        step, out = step_of(n), []
        for dual in Ascent(step), Augmented(1.0, step, Growth(1.00025)):
            lagrangian = Lagrangian(measure, dual)
            out += solved(lagrangian, jnp.arange(5), lambda i: seen[i], 3000, n)
        return out

    draws = [np.random.default_rng(i).permutation(5)[:2] for i in range(3000)]
    seen = jnp.asarray(np.stack(draws))
    A, b, mu, lam = drawn(n, seed=n)
    check_solved(run(jnp.asarray(A), jnp.asarray(b)), kind, A, mu, lam)


@KINDS
def test_penalties_that_grow_solve_the_reference_problems(kind):
    """Without multipliers, to 1e-3; the cap is what gradient descent can follow."""
    A, b, mu, lam = drawn(10, seed=10)
    rate = 1e-4
    schedule = Growth(1.0, 1.75, max_penalty=1 / (rate * 2.5**2))
    measure = lambda x: (x @ x, {"rows": kind(jnp.asarray(A) @ x, jnp.asarray(b))})
    lagrangian = Lagrangian(measure, Penalty(1.0, schedule))

    @jax.jit
    def run(x):
        def step(_, carry):
            x, duals = carry
            _, grads, duals = lagrangian.step(x, duals)
            return x - rate * grads, duals

        carry = jax.lax.fori_loop(0, 45_000, step, (x, lagrangian.init(x)))
        return carry[0], lagrangian.grad(*carry)[0][1].multipliers["rows"]

    found = run(jnp.ones(10))
    check_solved([found], kind, A, mu, lam, atol=1e-3)
    assert np.max(np.abs(found[0] + A.T @ (mu if kind is equal else lam) / 2)) > 1e-5


# Models and devices ---------------------------------------------------------------


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1, param_dtype=float)(jnp.tanh(linen.Dense(4)(x)))[:, 0]


class NNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, param_dtype=float, rngs=rngs)
        self.last = nnx.Linear(4, 1, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))[:, 0]


def of_linen():
    module = Linen()
    return module.init(jax.random.key(0), X), module.apply


def of_nnx():
    graphdef, params = nnx.split(NNX(), nnx.Param)
    return params, lambda params, x: nnx.merge(graphdef, params)(x)


@pytest.mark.costly
@pytest.mark.parametrize("make", [of_linen, of_nnx])
def test_models_of_flax_keep_a_loss_of_every_example(make):
    params, apply = make()

    def measure(params, index, x, y):
        loss = (apply(params, x) - y) ** 2
        return 0.0, {"losses": at_most(loss, 0.2, index=index, rows=N)}

    lagrangian, tx = Lagrangian(measure, Augmented(1.0)), optax.adam(0.02)
    duals, state = lagrangian.init(params, jnp.arange(4), X[:4], Y[:4]), tx.init(params)

    @jax.jit
    def train(params, state, duals):
        def step(carry, key):
            params, state, duals = carry
            index = jax.random.choice(key, N, (4,), replace=False)
            batch = index, X[index], Y[index]
            (_, report), grads, duals = lagrangian.step(params, duals, *batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, duals), report

        keys = jax.random.split(jax.random.key(1), 600)
        return jax.lax.scan(step, (params, state, duals), keys)[0]

    before = jnp.max((apply(params, X) - Y) ** 2)
    params, _, duals = train(params, state, duals)
    after = jnp.max((apply(params, X) - Y) ** 2)
    assert before > 1 and after < 0.5 and np.max(duals["losses"].value) > 0


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from diffprog.constrained import *

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
x, y, w = draw(64, 3), draw(64), draw(3)
# Every device draws half of its own rows, which lie one device after the other.
places = np.stack([rng.permutation(8)[:4] for _ in range(40)])[:, None, :]
local = np.tile(places, (1, 8, 1)).astype(np.int32)
index = local + 8 * np.arange(8, dtype=np.int32)[None, :, None]

def measure(w, place, x, y, counted):
    x, y = x[place], y[place]
    loss = (x @ w - y) ** 2
    return jnp.mean(loss), {
        "each": at_most(loss, 0.3, index=place, rows=2 * len(place)),
        "some": at_most(jnp.mean(x @ w), -0.1, strict=jnp.mean(x @ w > 0)),
        "norm": at_most(w @ w, 0.5),
        "counted": counted(x @ w, y > 0),
    }

def of_device(u, mask):
    return equal(u[:2], 0.2, mask=mask[:2])

def of_all(u, mask):
    u, mask = u.reshape(8, -1)[:, :2], mask.reshape(8, -1)[:, :2]
    number = jnp.sum(mask, 0)
    mean = jnp.sum(jnp.where(mask, u - 0.2, 0), 0) / jnp.maximum(number, 1)
    return equal(mean, 0, mask=number > 0)

DUAL = {"each": PI(0.01, 0.02), "some": Augmented(1.0), "norm": PI(0.1, 0.5, 0.3),
        "counted": Ascent(0.1)}

def run(w, duals, places, x, y, counted=of_device, axis_name=None):
    lagrangian = Lagrangian(measure, DUAL, axis_name=axis_name)
    def step(carry, place):
        w, duals = carry
        args = place.reshape(-1), x, y, counted
        (loss, report), grads, duals = lagrangian.step(w, duals, *args)
        numbers = loss, report.feasibility, report.complementarity, report.finite
        return (w - 0.01 * grads, duals), numbers
    return jax.lax.scan(step, (w, duals), places)

duals = Lagrangian(measure, DUAL).init(w, index[0].reshape(-1), x, y, of_all)
rows, data = P("data"), P(None, "data")
specs = {name: jax.tree.map(lambda _: rows if name == "each" else P(), state)
         for name, state in duals.items()}
mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))

def split(check_vma=True, **options):
    return jax.jit(jax.shard_map(
        lambda *args: run(*args, **options), mesh=mesh, check_vma=check_vma,
        in_specs=(P(), specs, data, rows, rows), out_specs=((P(), specs), P())))

given = w, duals, local, x, y
parts = split(axis_name="data")(*given)
whole = jax.jit(lambda *args: run(*args, of_all))(w, duals, index, x, y)
worst = 0.0
for a, b in zip(*map(jax.tree.leaves, (parts, whole)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)
    worst = max(worst, np.max(np.abs(np.float64(a) - np.float64(b))))
alone = lambda x, y: run(w, duals, local[:, 0], x, y, axis_name="v")
for call, word in (
    (lambda: split()(*given), "axis_name='data'"),
    (lambda: split(False, axis_name="data")(*given), "check_vma=True"),
    (lambda: jax.vmap(alone, axis_name="v")(x[None], y[None]), "check_vma=True"),
):
    try:
        call()
    except ValueError as error:
        assert word in str(error), error
    else:
        raise AssertionError("it was not refused")
print("agree", worst)
"""


def test_a_batch_split_over_devices_is_that_of_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.startswith("agree"), found.stderr
