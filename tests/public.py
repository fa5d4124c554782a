"""The public functions and methods: which are called, and what a trivial one does.

    pytest --selection

runs the tests of `selection.txt` and fails where a public function is called by none.

    pytest --calls FILE

writes what each test takes in seconds, and the functions that it calls.

    pytest --trivial FILE

runs every test once as it is and then once more for each public function that it
calls, which returns a trivial answer instead: no step, zero, its input, the given
controls, uniform probabilities. A test that still passes says nothing of this function;
all are listed. They are what to look at, not all are faults: a test of messages or of
shapes may pass.
"""

import collections
import functools as ft
import inspect
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
from _pytest.runner import runtestprotocol

import diffprog as dp
from diffprog import manifolds, plot
from diffprog.systems._system import AbstractSystem


MODULES = {
    "": dp, "losses.": dp.losses, "oracles.": dp.oracles, "optim.": dp.optim,
    "plot.": plot, "extend.": dp.extend, "manifolds.": manifolds,
    "constrained.": dp.constrained,
}  # fmt: skip
# Methods that users call, or that decide a result.
METHODS = """
__call__ block_update center conjugate conjugate_prox cost density derivative
difference dual_projection dynamics factor grad gradient grow half_widths heading
hessian_mv left lines minimize normal pose price probabilities propose realized_density
retract right scaled step terminal_cost torques update vector_field
""".split()

called: set[str] = set()
lying: list[str] = []  # the function that answers trivially, if any
lied: set[str] = set()
TRIES = 2
tries: collections.Counter = collections.Counter()


def functions():
    """Owner, attribute and name of everything public that can be called."""
    for prefix, module in MODULES.items():
        for name, item in vars(module).items():
            home = getattr(item, "__module__", None) or ""
            if name[0] == "_" or not home.startswith("diffprog"):
                continue
            if inspect.isclass(item):
                yield from methods(prefix, item)
            elif callable(item):
                yield module, name, prefix + name
    for item in (AbstractSystem, *vars(dp.systems).values()):
        if inspect.isclass(item):
            yield from methods("systems.", item)


def methods(prefix: str, cls: type):
    if issubclass(cls, dp.AbstractSearch | dp.oracles.AbstractDamping):
        return  # a search that never accepts does not end
    for name, item in vars(cls).items():
        abstract = getattr(item, "__isabstractmethod__", False)
        if name in METHODS and inspect.isfunction(item) and not abstract:
            yield cls, name, f"{prefix}{cls.__name__}.{name}"


def watch():
    """From now on calls are noted, and answers can be made trivial."""
    for owner, attribute, name in list(functions()):
        wrapped = watched(getattr(owner, attribute), name)
        if inspect.isclass(owner):
            type.__setattr__(owner, attribute, wrapped)
        else:
            setattr(owner, attribute, wrapped)


def watched(fn: Callable, name: str) -> Callable:
    @ft.wraps(fn)
    def wrapper(*args, **kwargs):
        out = fn(*args, **kwargs)
        called.add(name)
        if name not in lying:
            return out
        lied.add(name)
        return trivial(name, out, *args, **kwargs)

    return wrapper


# Trivial answers ------------------------------------------------------------------


def zeros(tree):
    is_number = lambda a: eqx.is_inexact_array(a) or isinstance(a, float)
    zero = lambda a: 0 * a if isinstance(a, float) else jnp.zeros_like(a)
    return jtu.tree_map(lambda a: zero(a) if is_number(a) else a, tree)


def trivial(name: str, out, *args, **kwargs):
    lie = LIES.get(name.split(".")[-1])
    return lie(out, *args, **kwargs) if lie else zeros(out)


def given_controls(solution, problem, method, x0, us, *_, **__):
    trajectory = dp.rollout(problem, x0, us)
    return guessed(solution, trajectory)


def given_batch(solution, problem, method, x0s, uss, *_, **__):
    roll = lambda x0, us: dp.rollout(problem, x0, us)
    return guessed(solution, jax.vmap(roll)(x0s, uss))


def guessed(solution, trajectory):
    parts = lambda s: (s.xs, s.us, s.cost)
    return eqx.tree_at(parts, solution, parts(trajectory))


def uniform(out, *_, **__):
    return jtu.tree_map(lambda p: jnp.full_like(p, 1 / max(p.shape[-1:] or (1,))), out)


def state_as_it_was(state, *args, **kwargs):
    """Of `dp.step`, and of the steps of directions and of Lagrangians."""
    if isinstance(args[0], dp.ValueAndDirection | dp.constrained.Lagrangian):
        found, direction, state = state
        return found, zeros(direction), state
    same = [a for a in (*args, *kwargs.values()) if isinstance(a, dp.SolverState)]
    return same[0]


first_argument = lambda out, self, first, *_, **__: first
LIES: dict[str, Callable[..., Any]] = dict(
    solve=given_controls,
    solve_batch=given_batch,
    direction=lambda out, *_, **__: (zeros(out[0]), *out[1:]),
    step=state_as_it_was,
    f_softargmax=uniform,
    capped_f_softargmax=uniform,
    sparsemax=uniform,
    entmax=uniform,
    entmax15=uniform,
    spectral_weights=uniform,
    f_sigmoid=lambda out, *_, **__: jnp.full_like(out, 0.5),
    conjugate_prox=first_argument,
    dual_projection=first_argument,
    block_update=first_argument,
    dynamics=first_argument,
    retract=first_argument,
    propose=lambda out, *_, **__: eqx.tree_at(lambda p: p.step, out, zeros(out.step)),
)


# Plug-ins -------------------------------------------------------------------------


class Calls:
    """Notes what the tests that pass call, over all processes."""

    def __init__(self, path: str | None, complete: bool):
        self.path, self.complete = path, complete
        self.seen: set[str] = set()
        self.missing: list[str] = []

    def pytest_runtest_setup(self):
        called.clear()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" or not report.passed:
            return
        self.seen |= called
        if self.path and called:
            with open(self.path, "a") as file:
                names = " ".join(sorted(called))
                file.write(f"{report.nodeid}\t{report.duration:.2f}\t{names}\n")

    def pytest_testnodedown(self, node):
        self.seen |= set(node.workeroutput["called"])

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["called"] = sorted(self.seen)
        elif self.complete:
            self.missing = sorted({name for *_, name in functions()} - self.seen)
            session.exitstatus = session.exitstatus or int(bool(self.missing))

    def pytest_terminal_summary(self, terminalreporter):
        if self.missing:
            terminalreporter.write_line(f"called by no test: {' '.join(self.missing)}")


class Trivial:
    """Runs tests again with trivial functions."""

    def __init__(self, path: str):
        self.path = path

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        with_trivial_functions(item, nextitem, self.path)
        return True


def forget():
    """What was computed by true functions, or by trivial ones."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            for item in list(vars(module).values()):
                if hasattr(item, "cache_clear"):
                    item.cache_clear()


def with_trivial_functions(item, nextitem, path: str):
    passes = lambda reports: all(report.passed for report in reports)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    called.clear()
    reports = runtestprotocol(item, nextitem=item)
    test = item.nodeid.split("[")[0]
    found = sorted(called) if passes(reports) else []
    open_pairs = [name for name in found if tries[test, name] < TRIES]
    survivors = []
    for name in open_pairs:
        forget()
        lying[:] = [name]
        lied.clear()
        reports = runtestprotocol(item, log=False, nextitem=item)
        if passes(reports) and lied:
            survivors.append(name)
        # One set of parameters that tells a function from a trivial one is enough.
        tries[test, name] += 1 if passes(reports) else TRIES
    lying.clear()
    if open_pairs:
        forget()
    item.session._setupstate.teardown_exact(nextitem)
    with open(path, "a") as file:
        file.write(f"{item.nodeid}\t{' '.join(found)}\t{' '.join(survivors)}\n")
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
