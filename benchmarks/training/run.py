"""Runs of an optimizer on a task: losses on the way, and processor seconds."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import diffprog as dp

from .methods import Method
from .tasks import Task


EVERY = 10  # steps between two looks at the loss of the whole training set
TUNING, SEEDS = 1000, (0, 1, 2)  # no seed that chose a setting is reported


class Run(NamedTuple):
    """Losses of the training set after 0, 10, 20 ... steps, and what they cost."""

    setting: Any
    losses: np.ndarray
    seconds: np.ndarray
    test: float

    @property
    def final(self) -> float:
        return float(self.losses[-1]) if np.all(np.isfinite(self.losses)) else np.inf

    def steps_to(self, goal: float) -> float:
        below = np.flatnonzero(self.losses <= goal)
        return EVERY * below[0] if len(below) else np.inf

    def seconds_to(self, goal: float) -> float:
        below = np.flatnonzero(self.losses <= goal)
        return self.seconds[below[0]] if len(below) else np.inf


def batches_of(task: Task, seed: int) -> list:
    x, y = task.train
    rng = np.random.default_rng(seed)
    rows = [rng.choice(len(x), task.batch, False) for _ in range(task.steps)]
    return [(x[some], y[some]) for some in rows]


class Programs:
    """The compiled programs of a method on a task, for all settings and seeds."""

    def __init__(self, task: Task, method: Method):
        self.task, self.method, self.settings = task, method, method.grid
        model = task.model(jr.key(0))
        self.rest = eqx.filter(model, eqx.is_inexact_array, inverse=True)
        self.recipe = dp.optim.ggn(task.loss)
        self.programs: dict = {}
        self.mean_loss = jax.jit(
            lambda params, x, y: jnp.mean(self.losses(params, x, y))
        )

    def losses(self, params, inputs, targets):
        return self.task.loss(jax.vmap(eqx.combine(params, self.rest))(inputs), targets)

    def of(self, setting):
        """Start and step for a setting: rates are data, all else is code."""
        rate, fixed = setting, None
        if isinstance(setting, tuple):
            rate, *fixed = setting
        key = tuple(fixed) if fixed else None
        if key not in self.programs:
            whole = lambda rate: (rate, *fixed) if fixed else rate
            make = lambda rate: self.method.make(whole(rate), self.task.steps)

            def start(params, rate):
                return make(rate).init(params)

            def step(params, state, rate, x, y):
                mean = lambda p: jnp.mean(self.losses(p, x, y))
                g, extra = jax.grad(mean)(params), {}
                if self.method.objective:
                    extra["obj_fn"] = mean
                if self.method.curvature:
                    model = eqx.combine(params, self.rest)
                    extra["curvature"] = self.recipe(model, x, y)
                optimizer = optax.with_extra_args_support(make(rate))
                updates, state = optimizer.update(g, state, params, **extra)
                return optax.apply_updates(params, updates), state

            self.programs[key] = jax.jit(start), jax.jit(step)
        return *self.programs[key], rate if rate is not None else 0.0

    def run(self, setting, seed: int) -> Run:
        task, (start, step, rate) = self.task, self.of(setting)
        params = eqx.filter(task.model(jr.key(seed)), eqx.is_inexact_array)
        state = start(params, rate)
        x, y = task.train
        batches = batches_of(task, seed)
        losses, seconds, spent = [float(self.mean_loss(params, x, y))], [0.0], 0.0
        jax.block_until_ready(step(params, state, rate, *batches[0]))  # compiles
        for i, batch in enumerate(batches):
            before = time.process_time()
            params, state = jax.block_until_ready(step(params, state, rate, *batch))
            spent += time.process_time() - before
            if (i + 1) % EVERY == 0:
                losses.append(float(self.mean_loss(params, x, y)))
                seconds.append(spent)
        test = float(self.mean_loss(params, *task.test))
        return Run(setting, np.array(losses), np.array(seconds), test)


def tuned(programs: Any) -> list:
    """Settings and final losses, rates widened until the best is not at an edge."""
    settings = programs.settings
    if len(settings) == 1:
        return [(settings[0], None)]
    found = {setting: programs.run(setting, TUNING).final for setting in settings}
    while not isinstance(settings[0], tuple) and len(found) < 9:
        best, known = min(found, key=found.__getitem__), sorted(found)
        if best == known[0]:
            new = best / 3
        elif best == known[-1]:
            new = best * 3
        else:
            break
        found[new] = programs.run(new, TUNING).final
    return sorted(found.items(), key=lambda item: item[1])


def study(task: Task, methods: dict[str, Callable], say=print) -> dict[str, dict]:
    """Three runs of every method, each with the best of its settings."""
    results = {}
    for name, make in methods.items():
        programs = make(task)
        settings = tuned(programs)
        best = settings[0][0]
        runs = [programs.run(best, seed) for seed in SEEDS]
        final = np.median([run.final for run in runs])
        test = np.median([run.test for run in runs])
        ms = 1e3 * np.median([run.seconds[-1] for run in runs]) / task.steps
        results[name] = {"settings": settings, "runs": runs}
        about = f"{task.name}, {name}: {best}, the best of {len(settings)}; loss"
        say(f"{about} {final:.3g}, test {test:.3g}; {ms:.2f} ms a step", flush=True)
        jax.clear_caches()
    return results
