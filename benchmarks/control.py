"""Times of single solves: `make bench`.

Prints, for each problem and direction, the first call (trace and compile included), a
later call through the public door, and one inside the user's own `jax.jit`; medians,
single thread. Nothing here decides whether a test passes.
"""

import os


os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import platform
import statistics
import time

import jax
import jax.numpy as jnp

import diffprog as dp
from diffprog.systems import CartPole, Pendulum, Quadrotor


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_enable_async_dispatch", False)

REPEATS = 30
METHODS = [dp.ILQR(), dp.DDP()]


def problems():
    pendulum, cart_pole, quadrotor = Pendulum(), CartPole(), Quadrotor()
    yield "pendulum, T=50", pendulum, 50, 1
    yield "cart-pole, T=50", cart_pole, 50, 1
    yield "quadrotor, T=100", quadrotor, 100, 4


def median_ms(call) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main():
    print(
        f"jax {jax.__version__}, {platform.processor() or platform.machine()}, float64"
    )
    print(
        f"{'problem':18} {'direction':9} {'cost':>14} {'iter':>5} {'first s':>8} "
        f"{'door ms':>8} {'jit ms':>8} {'us/iter':>8}"
    )
    for name, system, horizon, controls in problems():
        problem = dp.ControlProblem.from_system(system, horizon)
        x0, us = system.x0, jnp.zeros((horizon, controls))
        for method in METHODS:
            door = lambda: dp.solve(problem, method, x0, us, throw=False)
            start = time.perf_counter()
            solution = jax.block_until_ready(door())
            first = time.perf_counter() - start
            inside = jax.jit(lambda x0, us: dp.solve(problem, method, x0, us))
            jax.block_until_ready(inside(x0, us))
            steps = int(solution.stats["num_steps"])
            later = median_ms(lambda: inside(x0, us))
            print(
                f"{name:18} {type(method).__name__:9} {float(solution.cost):14.8g} "
                f"{steps:5d} {first:8.2f} {median_ms(door):8.3f} {later:8.3f} "
                f"{1e3 * later / max(steps, 1):8.1f}"
            )


if __name__ == "__main__":
    main()
