"""Speed, side by side with peers: `make bench`, or `python -m benchmarks --help`."""

import os


# Before JAX, Torch or OpenMP start: one thread on one core, and calls that return when
# they are done.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
os.environ.setdefault("JAX_ENABLE_X64", "1")


def pin():
    """Keeps this process and its children on one core: threads of XLA take turns."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
