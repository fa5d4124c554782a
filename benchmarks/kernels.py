"""What the fast loops, the small kernels and their limits bring.

    .venv/bin/python -m benchmarks.kernels

Processor time, the calls of a row in turns, the medians of their rounds. The variants
change a constant of the library and clear JAX's caches. They are no options for users.
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog._common import fast_loops, linalg
from diffprog._control.lqr import riccati

from . import ours, timing
from .problems import PROBLEMS


SIZES = [(2, 1), (4, 2), (8, 3), (12, 4), (14, 5), (16, 8), (24, 12), (40, 20)]


@contextlib.contextmanager
def changed(module, **constants):
    before = {name: vars(module)[name] for name in constants}
    vars(module).update(constants)
    jax.clear_caches()
    yield
    vars(module).update(before)
    jax.clear_caches()


def compiled(fn, *arguments):
    start = time.perf_counter()
    program = jax.jit(fn).lower(*arguments).compile()
    call = lambda: jax.block_until_ready(program(*arguments))
    return call, time.perf_counter() - start


def lqr(n, m, growth=1.0, dtype=float, T=100):
    """Random, another at every stage; the open loop changes like growth^t."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    eye = lambda n: jnp.broadcast_to(jnp.eye(n, dtype=dtype), (T, n, n))
    dynamics = growth / n**0.5 * normal(T, n, n), normal(T, n, m), normal(T, n)
    return dp.LQR(*dynamics, eye(n), eye(m), Q_final=eye(n)[0]), jnp.ones(n, dtype)


def one_pass(size, fast, module=fast_loops, **constants):
    with changed(module, **constants):
        return compiled(
            lambda *a: dp.solve_lqr(*a, throw=False, fast_loops=fast), *lqr(*size)
        )


def medians(calls):
    [call() for call in calls]
    return [1e6 * t for t in timing.alternate(dict(enumerate(calls))).values()]


def solves():
    print("\ndp.solve, dp.ILQR(), microseconds; the last with MAX_REDUCED = 0\n")
    print("fast_loops=       True     False    False, dot_general")
    for problem in (PROBLEMS[i] for i in (0, 1, 3)):
        calls = []
        for fast, limit in ((True, 4095), (False, 4095), (False, 0)):
            with changed(fast_loops, MAX_REDUCED=limit):
                solve = ours.solver(problem, dp.ILQR(), fast_loops=fast)
                calls.append(compiled(solve, *ours.start(problem))[0])
        print("{:<12}{:10.0f}{:10.0f}{:23.0f}".format(problem.name, *medians(calls)))


def passes():
    print("\ndp.solve_lqr, T = 100, microseconds. fast: fast_loops=None. The others:")
    print("ordinary loops, products as sums up to MAX_REDUCED = 4095, 0 and 10**6\n")
    print("   n   m       fast       sums   dot_general   all sums")
    for size in SIZES:
        call = lambda k, size=size: one_pass(size, False, MAX_REDUCED=k)[0]
        times = medians([one_pass(size, None)[0], *map(call, (4095, 0, 10**6))])
        print("{:4}{:4}{:11.0f}{:11.0f}{:14.0f}{:11.0f}".format(*size, *times))


def factorizations():
    print("\ndp.solve_lqr, n = 8, T = 100, microseconds, and seconds to compile.")
    print("lapack: UNROLLED = 0; written: UNROLLED = 8; eliminated: m in ELIMINATED\n")
    print("     fast_loops=None               fast_loops=False   compile, None")
    print("  m  lapack  written  eliminated   lapack  written    written  eliminated")
    row = "{:3}{:8.0f}{:9.0f}{:12.0f}{:9.0f}{:9.0f}{:11.1f}{:12.1f}"
    for m in range(2, 9):
        found = []
        for fast, eliminated in ((None, ()), (None, (m,)), (False, ())):
            for limit in (8,) if eliminated else (0, 8):
                with changed(fast_loops, ELIMINATED=eliminated):
                    run = one_pass((8, m), fast, module=linalg, UNROLLED=limit)
                found.append(run)
        times = medians([call for call, _ in found])
        print(row.format(m, *times, found[1][1], found[2][1]))


def symmetry():
    print("\ndp.solve_lqr, n = 4, m = 2, T = 100, float32: relative error of P\n")
    print("growth of the open loop    symmetrized    not symmetrized")
    for growth in (0.5, 1.0, 2.0, 4.0):
        exact, errors = dp.solve_lqr(*lqr(4, 2, growth)).value.P, []
        for symmetrize in (riccati.symmetrize, lambda matrix: matrix):
            with changed(riccati, symmetrize=symmetrize):
                P = dp.solve_lqr(*lqr(4, 2, growth, "f4"), throw=False).value.P
            error = jnp.abs(P - exact).max((1, 2)) / jnp.abs(exact).max((1, 2))
            errors.append(float(error.max()))
        print("{:22.1f}{:15.1e}{:19.1e}".format(growth, *errors))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    print(f"JAX {jax.__version__}, {jax.devices()[0].platform}, float64, one thread")
    for table in (solves, passes, factorizations, symmetry):
        table()
