"""K-FAC factors: golden scores, dense references, and what stays out of the state."""

import functools as ft
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import Logistic, SoftmaxCrossEntropy, Squared
from diffprog.optim import fisher, ggn, hessian, kfac

from .helpers import close


IDENTITY = lambda z: z


def golden(widths, activation, shift, loss, batch):
    """A network of the golden values, its inputs and its targets."""
    layers = []
    for i, (n, k) in enumerate(zip(widths, widths[1:])):
        layer = eqx.nn.Linear(n, k, key=jr.key(0))
        a, b = np.arange(1, k + 1), np.arange(1, n + 1)
        W = np.sin(1.7 * a[:, None] + 0.9 * b + i + shift) / np.sqrt(n)
        bias = 0.1 * np.cos(1.3 * a + i + shift)
        where = lambda layer: (layer.weight, layer.bias)
        layers.append(eqx.tree_at(where, layer, (jnp.array(W), jnp.array(bias))))
        if i < len(widths) - 2:
            layers.append(activation)
    i, k = np.arange(1, batch + 1)[:, None], np.arange(1, widths[-1] + 1)
    inputs = jnp.array(np.cos(0.7 * i * np.arange(1, widths[0] + 1) + 0.3 * i))
    if isinstance(loss, Squared):
        return dp.Network(layers), inputs, jnp.array(np.sin(i + 2 * k + shift))
    return dp.Network(layers), inputs, jnp.arange(batch) % widths[-1]


NETS = {
    "G1": ([5, 6, 4, 3], jnp.tanh, 0, SoftmaxCrossEntropy(), 7),
    "G2": ([3, 5, 2], jax.nn.sigmoid, 1, Squared(), 4),
    "G3": ([4, 4, 4, 4], jax.nn.softplus, 2, SoftmaxCrossEntropy(), 5),
    "G4": ([6, 3], IDENTITY, 3, SoftmaxCrossEntropy(), 8),
    "G5": ([2, 12, 12, 2], jnp.sin, 4, Squared(), 3),
}
# damping, J of the step, and J of its best length
SCORES = {
    "G1": (0.1, -0.3174435444072, -0.3448849619553),
    "G2": (0.05, -0.1174983914941, -0.1270419356805),
    "G3": (0.01, -0.3707572866095, -0.3721386063178),
    "G4": (0.02, -1.014538609998, -1.253613003212),
    "G5": (0.001, 0.6781781518645, -0.4703358008895),
}


@ft.cache
def problem(name):
    net, inputs, targets = golden(*NETS[name])
    return net, inputs, targets, NETS[name][3]


def parameters(net):
    return eqx.filter(net, eqx.is_inexact_array)


@jax.jit
def gradient(at):
    return at.linearize().gradient


def update(at, grads=None, state=None, **options):
    """The first update of K-FAC, or the next one."""
    optimizer = kfac(**options)
    grads = gradient(at) if grads is None else grads
    state = optimizer.init(at.params) if state is None else state
    run = jax.jit(lambda g, s, at: optimizer.update(g, s, curvature=at))
    return run(grads, state, at)


@jax.jit
def judge(at, step, rho):
    """J of a step, and the slope along it."""
    model = at.linearize()
    return model.change(step, rho), model.slopes(jax.tree.map(lambda a: a[None], step))[0]


@pytest.mark.parametrize("name", NETS)
def test_scores_of_the_golden_networks(name):
    net, inputs, targets, loss = problem(name)
    rho, J, best = SCORES[name]
    at = ggn(loss)(net, inputs, targets)
    V, state = update(at, damping=rho)
    found, slope = judge(at, jax.tree.map(jnp.negative, V), rho)
    close(found, J, 1e-9)
    close(-(slope**2) / (4 * (found - slope)), best, 1e-9)
    assert state.refused == 0 and state.count == 1
