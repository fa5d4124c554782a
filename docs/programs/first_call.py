"""Times the first call of `dp.solve` in fresh processes, without and with a cache.

.venv/bin/python docs/programs/first_call.py
"""

import os
import subprocess
import sys
import tempfile


PROGRAM = """
import time
import jax
import jax.numpy as jnp
import diffprog as dp
from diffprog.systems import Pendulum

system = Pendulum()
problem = dp.ControlProblem.from_system(system, 50)
us = jnp.zeros((50, 1))

def seconds():
    start = time.perf_counter()
    jax.block_until_ready(dp.solve(problem, dp.DDP(), system.x0, us))
    return time.perf_counter() - start

first = seconds()
later = 1e3 * min(seconds() for _ in range(5))
print(f"first call {first:5.2f} s, later {later:6.2f} ms")
"""


def run(label, **variables):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"{label:<22} {done.stdout}", end="", flush=True)


with tempfile.TemporaryDirectory() as folder:
    cache = dict(
        JAX_COMPILATION_CACHE_DIR=folder,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    run("no cache")
    run("cache, first process", **cache)
    run("cache, second process", **cache)
