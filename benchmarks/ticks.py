"""Ticks of a receding horizon: how long they take, and how evenly."""

import dataclasses
import gc
import time

import jax
import jax.numpy as jnp
import numpy

import diffprog as dp
from diffprog.systems import Race, Track

from . import ours
from .problems import PROBLEMS, UNSEEN


TITLE = "Ticks of a receding horizon"
COLUMNS = {
    "problem": "{}",
    "method": "{}",
    "iterations": "{}",
    "p50 ms": "{:.3f}",
    "p90 ms": "{:.3f}",
    "p99 ms": "{:.3f}",
    "longest ms": "{:.3f}",
    "jit p50 ms": "{:.3f}",
    "jit p99 ms": "{:.3f}",
}
NOTES = (
    "Times that pass, not those of the processor, of single calls "
    "`u, state = controller(x, state)` in a Python loop with a plant, float64, one "
    "core: what a program of a robot sees, other programs of the machine included. "
    "`jit` is the same loop where the controller is called in the user's `jax.jit`. "
    "Both run in the thread that calls: `jax_cpu_enable_async_dispatch` is off. "
    "Garbage is collected before the loop, and as Python likes within it.",
    "The quadrotor has 12 states, 50 stages and limits of its rotors; its plant is the "
    "model with each state off by 1e-3 (normal noise), and it starts from a solve. The "
    "race car, 8 states and 40 stages, drives the miniature track with limits.",
)
TICKS = 400


def quadrotors(methods) -> list[tuple]:
    (problem,) = (p for p in PROBLEMS + UNSEEN if p.name == "quadrotor")
    problem = dataclasses.replace(problem, horizon=50)
    free, (x0, us) = ours.chain(problem), ours.start(problem)
    most = jnp.full(4, 1.2)
    limited = dp.ControlProblem(
        free.dynamics, free.cost, free.terminal_cost, 50, (-most, most)
    )
    solution = dp.solve(limited, dp.ILQR(), x0, us, throw=False)

    def plant(x, u, t):
        key = jax.random.fold_in(jax.random.key(0), t)
        return free.dynamics(x, u, t) + 1e-3 * jax.random.normal(key, x.shape)

    def begin(controller):
        state = controller.init(x0, solution.us, state=solution.state)
        return "quadrotor", controller, plant, x0, state

    return [begin(dp.MPC(limited, method)) for method in methods]


def race(method) -> tuple:
    car = Race.miniature(Track.simple(), squashed=False)
    controller = dp.MPC(dp.ControlProblem.from_system(car, 40), method)
    return "race car", controller, car.dynamics, car.x0, controller.init(car.x0)


def latencies(controller, plant, x, state) -> numpy.ndarray:
    """Milliseconds of each tick."""
    step, found = jax.jit(lambda x, u, t: plant(x, u, t)), []
    jax.block_until_ready(controller(x, controller(x, state)[1]))
    gc.collect()
    gc.freeze()
    for tick in range(TICKS):
        x = jax.block_until_ready(x)
        start = time.perf_counter()
        u, state = jax.block_until_ready(controller(x, state))
        found.append(1e3 * (time.perf_counter() - start))
        x = step(x, u, tick)
    return numpy.array(found)


def percentiles(times: numpy.ndarray, *which: int) -> dict[str, float]:
    return {f"p{p} ms": float(numpy.percentile(times, p)) for p in which}


def one(name, controller, plant, x, state) -> dict:
    times = latencies(controller, plant, x, state)
    return dict(
        problem=name,
        method=type(controller.method).__name__,
        iterations=controller.iterations,
        **percentiles(times, 50, 90, 99),
        **{"longest ms": float(times.max())},
    )


def in_a_jit(_, controller, *start) -> dict:
    call = jax.jit(lambda x, state: controller(x, state))
    found = percentiles(latencies(call, *start), 50, 99)
    return {f"jit {name}": ms for name, ms in found.items()}


def run() -> list[dict]:
    rows = [one(*made) | in_a_jit(*made) for made in quadrotors(ours.METHODS)]
    return [*rows, one(*race(ours.DDP))]
