"""One problem with constraints, and what trains on it: the numbers, and our side.

Minimize |x - goal|^2 / 2 + sum cos(x) / 2 such that N x = d, tanh(M x) <= 0.2 and
M x >= -0.5: five unknowns, two equalities and six inequalities.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy
import optax

from diffprog.constrained import (
    Ascent,
    at_most,
    Augmented,
    equal,
    FromOptax,
    Lagrangian,
    minimize,
    Penalty,
    PI,
)


# Limits that can be kept, as those of other numbers need not.
RNG = numpy.random.Generator(numpy.random.PCG64(0))
M, N = RNG.normal(size=(3, 5)), RNG.normal(size=(2, 5))
START = RNG.normal(size=5)
DATA = M, N, numpy.array([0.3, -0.2]), 2 * RNG.normal(size=5)
STEPS = 1000
RATES, MOMENTUM = {"SGD": 0.05, "momentum": 0.03, "Adam": 0.02}, 0.7
# Of multipliers: the step, the gain and its smoothing, the rate of Adam; a penalty.
ETA, GAIN, SMOOTHING, ADAM, PENALTY = 0.03, 0.3, 0.3, 0.01, 1.0
OPTIMIZERS = {
    "SGD": optax.sgd(RATES["SGD"]),
    "momentum": optax.sgd(RATES["momentum"], momentum=MOMENTUM),
    "Adam": optax.adam(RATES["Adam"]),
}
DUALS = {
    "ascent": Ascent(ETA),
    "augmented": Augmented(PENALTY, ETA),
    "nuPI, zeros": PI(ETA, GAIN, SMOOTHING, form="velocity"),
    "nuPI, SGD": PI(ETA, GAIN, SMOOTHING, form="velocity", start="sgd"),
    "Adam": FromOptax(optax.adam(ADAM)),
    "penalty": Penalty(PENALTY),
}
ORDERS = "dual first", "simultaneous", "primal first"
MAIN = "ascent", "augmented", "nuPI, zeros"
PAIRS = [(tx, dual, order) for dual in MAIN for tx in OPTIMIZERS for order in ORDERS]
PAIRS += [("SGD", "Adam", order) for order in ORDERS]
PAIRS += [(tx, "penalty", None) for tx in OPTIMIZERS]  # which has no other order


def terms(np, data, x):
    """Loss, equalities and inequalities by `jax.numpy` or `torch`, with its arrays."""
    M, N, d, goal = data
    loss = np.sum((x - goal) ** 2) / 2 + np.sum(np.cos(x)) / 2
    g = np.concatenate([np.tanh(M @ x) - 0.2, -(M @ x) - 0.5])
    return loss, N @ x - d, g


def measure(x):
    loss, h, g = terms(jnp, DATA, x)
    return loss, {"h": equal(h, 0.0), "g": at_most(g, 0.0)}


def violation() -> float:
    """That of the minimum: the limits can be kept."""
    found = minimize(Lagrangian(measure, Augmented(10.0)), jnp.asarray(START))
    return float(found.report.feasibility)


def forgotten(duals, first):
    """Multipliers whose smoothed error is 0 after the first step, as Cooper's is."""
    error = lambda state: jnp.where(first, 0.0, state.memory["error"])
    forget = lambda state: replace(state, memory=state.memory | {"error": error(state)})
    return {name: forget(state) for name, state in duals.items()}


def run(optimizer: str, dual: str, order: str | None, forget: bool = False) -> Any:
    """`start -> iterates, multipliers` of all steps in one loop, compiled."""
    tx, at_once = OPTIMIZERS[optimizer], order == "simultaneous"
    lagrangian = Lagrangian(
        measure, DUALS[dual], order="simultaneous" if at_once else "dual_first"
    )

    def step(carry, t):
        x, state, duals = carry
        if order == "primal first":
            _, grads = lagrangian.grad(x, duals)
        else:
            _, grads, duals = lagrangian.step(x, duals)
        updates, state = tx.update(grads, state, x)
        x = optax.apply_updates(x, updates)
        if order == "primal first":
            _, duals = lagrangian.update(x, duals)
        if forget:
            duals = forgotten(duals, t == 0)
        multipliers = jnp.concatenate([duals["g"].value, duals["h"].value])
        return (x, state, duals), (x, multipliers)

    def steps(x):
        carry = x, tx.init(x), lagrangian.init(x)
        return jax.lax.scan(step, carry, jnp.arange(STEPS))[1]

    return jax.jit(steps)
