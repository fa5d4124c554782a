"""How the suite runs: precision, compiler flags, seeds, and programs that go in time.

pytest --all              runs what is slow too, and every set of parameters
pytest --default-flags    compiles as users do
pytest --seed 3           draws other random numbers, wherever a test draws some
pytest --plain-loops      runs as if fast loops did not exist
pytest --selection        tests of every public function once: `selection.txt`
pytest --site FOLDER      also reads the built site: `make docs browser`
pytest --calls FILE       lists what each test calls: `public.py`
pytest --trivial FILE     lists tests that trivial answers pass: `public.py`
"""

import collections
import ctypes
import gc
import os
import pathlib
import resource
import sys
import zlib

import jax
import jaxtyping
import numpy as np
import pytest

from .quick import compile_quickly


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs are large and live long: it does not pay to look for garbage often.
gc.set_threshold(50_000, 20, 100)

# Modules that ask for fast loops.
FAST = ("test_fast_loops.py",)
# The memory at which a process drops its programs within a module.
MAX_MEMORY = 1.9e9


def pytest_addoption(parser):
    parser.addoption(
        "--plain-loops", action="store_true", help="run as if fast loops did not exist"
    )
    parser.addoption("--all", action="store_true", help="with what is slow or costly")
    parser.addoption("--default-flags", action="store_true", help="compile as users do")
    parser.addoption("--seed", type=int, default=0, help="draw other random numbers")
    parser.addoption(
        "--selection", action="store_true", help="every public function once"
    )
    parser.addoption("--site", help="folder of the built site, for `make browser`")
    parser.addoption("--calls", help="file for what each test calls")
    parser.addoption("--trivial", help="file for tests that trivial answers pass")


def pytest_configure(config):
    if not config.getoption("--default-flags"):
        compile_quickly()
    if config.getoption("--plain-loops"):
        from diffprog._common import fast_loops

        fast_loops.NEWEST = (0, 0)
    calls, trivial = config.getoption("--calls"), config.getoption("--trivial")
    selection = config.getoption("--selection")
    if calls or trivial or selection:
        from . import public

        public.watch()
        plugin = public.Trivial(trivial) if trivial else public.Calls(calls, selection)
        config.pluginmanager.register(plugin)
    if config.getoption("--seed"):
        shift_seeds(100_003 * config.getoption("--seed"))


def shift_seeds(shift: int):
    """Every generator starts elsewhere, also those made while modules are imported."""
    key, default_rng = jax.random.key, np.random.default_rng
    jax.random.key = lambda seed, **options: key(seed + shift, **options)
    np.random.default_rng = lambda seed=0: default_rng(seed + shift)


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--plain-loops") and collection_path.name in FAST:
        return True


def pytest_collection_modifyitems(config, items):
    if config.getoption("--selection"):
        path = pathlib.Path(__file__).with_name("selection.txt")
        chosen = set(path.read_text().splitlines())
        absent = chosen - {item.nodeid for item in items}
        if absent:
            raise pytest.UsageError(f"no such tests: {absent}; see tests/selection.txt")
        drop(config, items, {item for item in items if item.nodeid not in chosen})
        return
    if config.getoption("--all"):
        return
    costly = collections.defaultdict(lambda: collections.defaultdict(list))
    dropped = {item for item in items if item.get_closest_marker("slow")}
    for item in items:
        mark = item.get_closest_marker("costly")
        if mark and item not in dropped:
            values = tuple(id(item.callspec.params[name]) for name in mark.args)
            costly[item.nodeid.split("[")[0]][values].append(item)
    # Other tests, and other seeds, take other parameters: together they see every
    # direction, loss and solver.
    for name, groups in costly.items():
        first = zlib.crc32(name.encode()) + config.getoption("--seed")
        for kept, group in enumerate(groups.values(), first):
            dropped |= {item for i, item in enumerate(group) if i != kept % len(group)}
    if len(dropped) < len(items):  # else they were asked for by name
        drop(config, items, dropped)


def drop(config, items, dropped):
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def memory() -> float:
    """Bytes that the process occupies now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the most so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def drop_programs():
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module():
    yield
    drop_programs()


def pytest_runtest_teardown():
    if memory() > MAX_MEMORY:
        drop_programs()


@pytest.fixture
def getkey():
    rng = np.random.default_rng(0)
    return lambda: jax.random.key(int(rng.integers(2**31)))


@pytest.fixture
def mixed_dtypes():
    """As optax and Flax mix them: counts in int32, say."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def unchecked():
    """As users run it: no run-time types, which would object first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips what XLA cannot compile for old processors: numbers of 16 bits."""
    try:
        return (yield)
    except jax.errors.JaxRuntimeError as error:
        old = "max_isa=SSE4_2" in os.environ.get("XLA_FLAGS", "")
        if old and "Failed to materialize symbols" in str(error):
            pytest.skip("XLA does not compile 16 bits for these instructions")
        raise
