"""How long the first call takes: tracing and compiling every problem."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time

import jax

from . import ours
from .constrained import CONSTRAINED
from .problems import LIMITED, PROBLEMS, UNSEEN
from .timing import once


TITLE = "Compilation"
COLUMNS = {
    "problem": "{}",
    "method": "{}",
    "trace s": "{:.2f}",
    "compile s": "{:.2f}",
    "total s": "{:.2f}",
    "total from the cache s": "{:.2f}",
}
NOTES = (
    "Tracing and compiling a solve, in a process of its own whose caches are cleared "
    "before each. The last column: the same with JAX's persistent compilation cache, "
    "already filled.",
)


def first_call(problem, method, clock=time.perf_counter) -> tuple[float, float]:
    """Seconds to trace and to compile."""
    jax.clear_caches()
    found = []
    solve, arguments = jax.jit(ours.solver(problem, method)), ours.start(problem)
    trace = once(lambda: found.append(solve.lower(*arguments)), clock)
    return trace, once(found[0].compile, clock)


def one(problem, method) -> dict:
    trace, compile = first_call(problem, method)
    return {
        "problem": problem.name,
        "method": type(method).__name__,
        "trace s": trace,
        "compile s": compile,
        "total s": trace + compile,
        "total from the cache s": sum(first_call(problem, method)),
    }


def measure() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        problems = PROBLEMS + UNSEEN
        # Loads what every compilation needs, with a program that is none of these.
        first_call(dataclasses.replace(problems[0], horizon=10), ours.METHODS[0])
        return [one(problem, method) for problem in problems for method in ours.METHODS]


def over(problems, methods, **without) -> dict[str, dict[str, float]]:
    """First calls over those `without` something, by problem and solver."""
    first_call(dataclasses.replace(PROBLEMS[0], horizon=10), ours.METHODS[0])
    found = {}
    for problem in problems:
        pair = problem, dataclasses.replace(problem, **without)
        for method in methods:
            times = (first_call(p, method, time.process_time) for p in pair)
            with_it, free = map(sum, times)
            solver = f"diffprog {type(method).__name__}"
            found.setdefault(problem.name, {})[solver] = with_it / free
    return found


# Where a first call with limits or constraints takes most beside one without.
ARRIVAL = "obstacles, arrival"


def measure_limits():
    return over(LIMITED[:1], ours.METHODS, limits=None)


def measure_constraints():
    arrival = [problem for problem in CONSTRAINED if problem.name == ARRIVAL]
    return over(arrival, [ours.DDP], rows=None, last_rows=None, goal=None)


MEASURE = {
    "all": measure,
    "limits": measure_limits,
    "constraints": measure_constraints,
}


def in_a_process(what: str):
    command = [sys.executable, "-m", "benchmarks.compilation", what]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def with_limits() -> dict[str, dict[str, float]]:
    return in_a_process("limits")


def with_constraints() -> dict[str, dict[str, float]]:
    return in_a_process("constraints")


def run() -> list[dict]:
    return in_a_process("all")


if __name__ == "__main__":
    print(json.dumps(MEASURE[sys.argv[1]]()))
