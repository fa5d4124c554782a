"""Optimizers of the study, each with the settings that it is given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import diffprog as dp


class Method(NamedTuple):
    """An optimizer by its setting.

    - `make`: `make(setting, steps)`, where a setting is a number or a tuple of such.
    - `grid`: settings, the best of which is reported.
    - `curvature`: whether `update` is given one.
    - `objective`: whether it is given the loss of the batch as a function.
    - `dense_only`: whether it is for networks of dense layers.
    """

    make: Callable
    grid: tuple = (None,)
    curvature: bool = False
    objective: bool = False
    dense_only: bool = False


def decayed(optimizer: Callable) -> Callable:
    """An optimizer with a rate that falls linearly to 0."""
    return lambda rate, steps: optimizer(optax.linear_schedule(rate, 0.0, steps))


def muon(rate: Any):
    return optax.contrib.muon(rate, adam_learning_rate=rate)


def kfac(setting: tuple, steps: int):
    rate, damping = setting
    return optax.chain(
        dp.optim.kfac(damping=damping),
        optax.trace(0.9),
        optax.scale_by_learning_rate(optax.linear_schedule(rate, 0.0, steps)),
    )


def published(rate: Any, steps: int):
    """The published settings, but for an interval that fits short runs."""
    learned = dp.optim.llqr(
        dp.optim.Diagonal(),
        damping=0.0,
        solver=dp.optim.HeavyBall(),
        ema=0.95,
        floor=1e-8,
        interval=60,
    )
    return optax.chain(learned, decayed(momentum)(rate, steps))


def momentum(rate: Any):
    return optax.sgd(rate, momentum=0.9)


def sized_muon(every: int) -> Callable:
    base = optax.contrib.muon(1.0, adam_learning_rate=0.3)
    return lambda _, steps: dp.optim.model_step(base, every=every)


KFAC_SETTINGS = tuple(
    (rate, damping)
    for damping in (1e-2, 1e-1, 1.0)
    for rate in (3e-3, 1e-2, 3e-2, 1e-1)
)
METHODS = {
    "SGD, momentum": Method(decayed(momentum), (0.03, 0.1, 0.3, 1.0)),
    "Adam": Method(decayed(optax.adam), (1e-3, 3e-3, 1e-2, 3e-2)),
    "Muon": Method(decayed(muon), (0.01, 0.02, 0.05, 0.1)),
    "Muon, constant rate": Method(
        lambda rate, _: muon(rate), (0.005, 0.01, 0.02, 0.05)
    ),
    "Sophia": Method(
        decayed(optax.contrib.sophia), (1e-3, 3e-3, 1e-2, 3e-2), objective=True
    ),
    "K-FAC, fixed rate": Method(kfac, KFAC_SETTINGS, curvature=True, dense_only=True),
    "published diagonal": Method(published, (0.03, 0.1, 0.3, 1.0), curvature=True),
    "model step of Muon": Method(sized_muon(1), curvature=True),
    "model step of Muon, every 5": Method(sized_muon(5), curvature=True),
    "recommended": Method(
        lambda *_: dp.optim.recommended(), curvature=True, dense_only=True
    ),
}
