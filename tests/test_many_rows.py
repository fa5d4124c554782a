"""Thousands of rows in float32 against float64, above all where rows share something.

XLA's CPU compiler of jaxlib 0.10.2 returns wrong numbers, silently, for float32
programs such as `jax.vmap(lambda v: s * jnp.sum(s * v, -1, keepdims=True))(vs)`: a sum
of a product in which one argument is shared by the rows, and which something
elementwise follows, over 32768 numbers and more. Nothing here may depend on it. The
module says something about the compiler of users only with `--default-flags`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog import losses
from diffprog.losses import Alpha, ChiSquare, JensenShannon, KL

from .test_loss_interface import CASES, GENERATORS
from .test_losses import FAMILIES, INFINITE


pytestmark = pytest.mark.slow

ROWS = 8192
RNG = np.random.default_rng(0)
# A row next to a kink may fall on either side of it. Wrong programs are wrong in a
# third of the rows and more.
KINKS = 5e-4


def agree(low, high, tolerance=1e-3):
    leaves = jtu.tree_leaves_with_path(low)
    for (path, a), b in zip(leaves, jtu.tree_leaves(high), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype in (np.float32, np.bool_), path
        # Rows are all but the last axis.
        size = np.abs(b).max(axis=-1, keepdims=True) if b.ndim else np.abs(b)
        wrong = ~(np.abs(a - b) <= tolerance * (1 + size))
        assert wrong.mean() <= KINKS, (jtu.keystr(path), wrong.mean())


def in_both(fn, *args):
    """`fn` compiled in float32 and in float64."""
    low = lambda a: a.astype(np.float32) if a.dtype == np.float64 else a
    args = jtu.tree_map(np.asarray, args)
    return jax.jit(fn)(*jtu.tree_map(low, args)), jax.jit(fn)(*args)


def test_the_compiler_is_right():
    """With jaxlib 0.10.2 this fails, and shows that the tests below would see it."""
    s, vs = RNG.normal(size=(5, 4)), RNG.normal(size=(ROWS, 5, 4))
    fn = lambda s, vs: jax.vmap(lambda v: s * jnp.sum(s * v, -1, keepdims=True))(vs)
    agree(*in_both(fn, s, vs))


# The f-operators ------------------------------------------------------------------

# A traced alpha has the one precision of its array.
OPERATORS = {name: f for name, f in FAMILIES.items() if not name.startswith("traced")}
OPERATORS |= {"1.7": Alpha(1.7)}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    f = OPERATORS[name]
    shared, scores = RNG.normal(size=(5, 4)), RNG.normal(size=(ROWS, 5, 4))
    measure, mask = RNG.uniform(0.5, 1.0, (5, 4)), RNG.uniform(size=(5, 4)) < 0.7
    mask[:, 0] = True
    labels = np.arange(ROWS * 5, dtype=np.int32).reshape(ROWS, 5) % 4
    targets, few = (
        RNG.dirichlet(np.ones(4), (ROWS, 5)),
        RNG.normal(size=(4, ROWS, 5, 4)),
    )
    # Labels carry no mass that a generator with f(0) infinite would need.
    smooth = dict(smoothing=0.1) if name in INFINITE else {}

    def run(shared, scores, measure, targets, few):
        softargmax = lambda x, **o: losses.f_softargmax(x, f, measure, **o)
        softmax = lambda x, **o: losses.f_softmax(x, f, measure, **o)
        loss = lambda x, y, **o: losses.f_loss(x, y, f, measure, **o)
        jvp = lambda fn, x: jax.vmap(lambda v: jax.jvp(fn, (x,), (v,))[1])
        vjp = lambda fn, x: jax.vmap(lambda v: jax.vjp(fn, x)[1](v)[0])
        second = jax.grad(lambda x: jnp.sum(loss(x, targets[0])))
        return {
            "probabilities": softargmax(scores),
            "masked": softargmax(scores, where=mask),
            "value": softmax(scores),
            "loss": loss(scores, labels, **smooth),
            "soft targets": loss(scores, targets),
            "gradient": jax.grad(lambda x: jnp.sum(loss(x, targets)))(scores),
            "jvp": jvp(softargmax, shared)(scores),
            "vjp": vjp(softargmax, shared)(scores),
            "jvp of the value": jvp(softmax, shared)(scores),
            "Hessian": jvp(second, shared)(scores),
            "few tangents": jvp(softargmax, scores)(few),
        }

    agree(*in_both(run, shared, scores, measure, targets, few))


def test_other_operators():
    scores, shared = RNG.normal(size=(ROWS, 5, 4)), RNG.normal(size=(5, 4))
    jvp = lambda fn, x, vs: jax.vmap(lambda v: jax.jvp(fn, (x,), (v,))[1])(vs)
    capped = lambda x: losses.capped_f_softargmax(x, KL(), "uniform", cap=0.4)

    def run(scores, shared):
        fns = dict(
            sparsemax=losses.sparsemax,
            entmax15=losses.entmax15,
            entmax=lambda x: losses.entmax(x, 1.3),
            capped=capped,
            sigmoid=lambda x: losses.f_sigmoid(x, KL()),
            softplus=lambda x: losses.f_softplus(x, JensenShannon(), "unit"),
        )
        return {name: (fn(scores), jvp(fn, shared, scores)) for name, fn in fns.items()}

    agree(*in_both(run, scores, shared))


def test_risk():
    values = RNG.normal(size=ROWS)
    sigma = losses.spectrum("superquantile", ROWS, 0.5)

    def run(values):
        options: Any = dict(sigma=sigma.astype(values.dtype), f=KL(), smoothing=0.1)
        risk = lambda values: losses.spectral_risk(values, **options)
        weights = losses.spectral_weights(values, **options)
        return risk(values), ROWS * weights, ROWS * jax.grad(risk)(values)

    agree(*in_both(run, values))


# Losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CASES, *GENERATORS])
def test_losses(name):
    loss, u, y = {**CASES, **GENERATORS}[name]
    u, y = np.asarray(u), np.asarray(y)
    m, repeat = len(u), -(-ROWS // len(u))
    noise = RNG.normal(size=(repeat * m, *u.shape[1:]))
    many = np.concatenate([u / 4] * repeat) + noise / 4
    many_y = np.concatenate([y] * repeat)
    tangents = RNG.normal(size=(ROWS, *u.shape))
    cast = lambda a, like: a.astype(like.dtype) if eqx.is_inexact_array(a) else a

    def run(u, many, y, many_y, tangents, few):
        own = jtu.tree_map(lambda a: cast(a, u), loss)
        factor, rows = own.factor(u, y), own.factor(many, many_y)
        out = {
            "value": own(many, many_y),
            "gradient": own.gradient(many, many_y),
            "Hv": own.hessian_mv(many, many_y, many),
            # R itself is one of many where it comes from eigenvectors.
            "RR'v": rows.mv(rows.transpose_mv(many)),
            "shared Hv": jax.vmap(lambda v: own.hessian_mv(u, y, v))(tangents),
            "shared RR'v": jax.vmap(lambda v: factor.mv(factor.transpose_mv(v)))(
                tangents
            ),
            "few Hv": jax.vmap(lambda v: own.hessian_mv(many, many_y, v))(few),
            "few RR'v": jax.vmap(lambda v: rows.mv(rows.transpose_mv(v)))(few),
        }
        if isinstance(own, losses.AbstractDualLoss):
            alpha = own.gradient(many, many_y)
            out |= {
                "conjugate": own.conjugate(own.dual_projection(alpha, many_y), many_y),
                "projection": own.dual_projection(many, many_y),
                "prox": own.prox(many, 0.7, many_y),
                "conjugate prox": own.conjugate_prox(many, 0.7, many_y),
                "shared projection": jax.vmap(lambda v: own.dual_projection(v, y))(
                    tangents
                ),
                "shared conjugate prox": jax.vmap(
                    lambda v: own.conjugate_prox(v, 0.7, y)
                )(tangents),
            }
        return out

    few = RNG.normal(size=(4, *many.shape))
    agree(*in_both(run, u / 4, many, y, many_y, tangents, few))


# Oracles --------------------------------------------------------------------------

ORACLES = {
    "gradient": (dp.oracles.Gradient(), "softmax"),
    "Gauss-Newton": (dp.oracles.GaussNewton(1.0), "softmax"),
    "Gauss-Newton, sparsemax": (dp.oracles.GaussNewton(1.0), "sparsemax"),
    "dual": (dp.oracles.DualGaussNewton(1.0), "softmax"),
    "prox-linear": (dp.oracles.ProxLinear(1.0, gap=1e-3), "softmax"),
    "prox-linear, hinge": (dp.oracles.ProxLinear(1.0, gap=1e-3), "hinge"),
    "targets": (dp.oracles.TargetPropagation(), "softmax"),
    "Moreau": (dp.oracles.MoreauBackprop(0.1), "softmax"),
}
LOSSES = dict(
    softmax=losses.SoftmaxCrossEntropy(),
    sparsemax=losses.FLoss(ChiSquare(), "unit"),
    hinge=losses.Hinge(),
)


@pytest.mark.parametrize("name", ORACLES)
def test_oracles(name):
    oracle, loss = ORACLES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [
        eqx.nn.Linear(3, 8, key=keys[0]),
        jnp.tanh,
        eqx.nn.Linear(8, 4, key=keys[1]),
    ]
    net = dp.Network(layers)
    inputs = jax.random.normal(keys[2], (ROWS, 3))
    labels = jax.random.randint(keys[3], (ROWS,), 0, 4)
    vd = dp.value_and_direction(LOSSES[loss], oracle, has_aux=True)
    low = lambda tree: jtu.tree_map(
        lambda a: a.astype("f4") if eqx.is_inexact_array(a) else a, tree
    )
    (value, aux), direction = vd(net, inputs, labels)
    (value32, aux32), direction32 = vd(low(net), low(inputs), labels)
    np.testing.assert_allclose(value32, value, rtol=1e-5)
    a, b = ravel_pytree(direction32)[0], ravel_pytree(direction)[0]
    assert a.dtype == jnp.float32 and jnp.linalg.norm(b) > 0
    # A subproblem with damping 1 that is solved up to a gap leaves its step within
    # sqrt(2 gap) of the best one.
    gaps = [max(np.nan_to_num(float(found.gap)), 0.0) for found in (aux, aux32)]
    slack = sum(np.sqrt(2 * gap) for gap in gaps)
    assert slack < 0.1 * jnp.linalg.norm(b)
    assert jnp.linalg.norm(a.astype(float) - b) < 1e-3 * jnp.linalg.norm(b) + slack


# Control --------------------------------------------------------------------------


def test_solves_of_many_problems_at_once():
    """All in lock step, with the numbers of the problem shared by all."""
    from . import helpers

    problem, x0, us = helpers.linear(T=3)
    starts = np.asarray(x0) + 0.1 * RNG.normal(size=(ROWS, 3))
    start = np.zeros((3, 2))

    def run(problem, starts, start):
        solve = lambda x0: dp.solve(
            problem, dp.ILQR(), x0, start, max_steps=3, fast_loops=False
        )
        solution = jax.vmap(solve)(starts)
        return solution.us, solution.xs, solution.cost

    agree(*in_both(run, problem, starts, start))
