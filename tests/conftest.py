import gc
import os

import jax
import jax.random as jr
import jaxtyping
import numpy as np
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is what costs here, not running.
jax.config.update("jax_disable_most_optimizations", True)
# XLA's older way to generate code, in one piece: it compiles in half the time. Later
# versions no longer have it, and stop at flags that they do not know. XLA reads the
# variable when it compiles for the first time.
OLD_EMITTERS = jax.__version_info__ < (0, 11)
if OLD_EMITTERS:
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
# Programs are large and live long: it does not pay to look for garbage often.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def getkey():
    rng = np.random.default_rng(0)
    return lambda: jr.key(int(rng.integers(2**31)))


FAST = ("test_fast_loops.py",)


@pytest.fixture
def unchecked():
    """As users run it: no run-time types, which would object first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser):
    parser.addoption(
        "--plain-loops", action="store_true", help="run as if fast loops did not exist"
    )


def pytest_ignore_collect(collection_path, config):
    # These ask for fast loops.
    if config.getoption("--plain-loops") and collection_path.name in FAST:
        return True


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    if config.getoption("--plain-loops"):
        from diffprog import _fast_loops

        _fast_loops.NEWEST = (0, 0)
