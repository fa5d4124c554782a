"""What a manifold costs a solve: processor time of compiling, and of an iteration.

.venv/bin/python docs/programs/manifold.py
"""

import time

import jax
import jax.numpy as jnp

import diffprog as dp


jax.config.update("jax_enable_x64", True)
quad = dp.systems.QuaternionQuadrotor()
functions = quad.dynamics, quad.cost, quad.terminal_cost
x0, us = quad.x0, jnp.zeros((60, 4))


def measured(method, manifold):
    problem = dp.ControlProblem(*functions, 60, manifold=manifold)
    times = []
    for _ in range(15):
        start = time.process_time()
        solution = jax.block_until_ready(
            dp.solve(problem, method, x0, us, max_steps=100, throw=False)
        )
        times.append(time.process_time() - start)
    return times[0], int(solution.stats["num_steps"]), min(times[1:]), solution.cost


print(f"JAX {jax.__version__}, cpu, float64, QuaternionQuadrotor, 60 stages\n")
print("                      first call  iterations  each iteration      cost")
for method in (dp.ILQR(), dp.DDP()):
    for name, manifold in (("no manifold", None), ("manifold", quad.manifold)):
        first, steps, later, cost = measured(method, manifold)
        label = f"{type(method).__name__:5} {name}"
        each = 1e6 * later / steps
        print(f"{label:21} {first:9.1f} s {steps:11d} {each:12.0f} us {cost:9.4f}")
