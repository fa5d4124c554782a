"""How good preconditioned gradients are, on the batch that made them and on others."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

import diffprog as dp

from .tasks import classifier


BATCH, DAMPING, OTHERS = 128, 0.01, 4


def negative(tree):
    return jtu.tree_map(jnp.negative, tree)


def learned(structure, solver):
    """-U g of one batch, with the U that several batches taught."""
    optimizer = dp.optim.llqr(structure, damping=DAMPING, solver=solver)

    def step(at, batches):
        state, _ = dp.optim.refresh(optimizer.init(at.params), at.params, batches)
        gradient = at.linearize().gradient
        return negative(optimizer.update(gradient, state, at.params)[0])

    return step


def transformed(*parts):
    """The update of a chain of other transformations."""
    optimizer = optax.with_extra_args_support(optax.chain(*parts))

    def step(at, batches):
        gradient, state = at.linearize().gradient, optimizer.init(at.params)
        return optimizer.update(gradient, state, at.params, curvature=at)[0]

    return step


def rescaled(*parts):
    """The same at its best length."""
    rule = dp.optim.Minimize(DAMPING, jitter=0.0)
    base = optax.chain(*parts)
    return transformed(dp.optim.model_step(base, rule=rule, scale=1.0, ema=0.0))


def structures() -> dict:
    O = dp.optim
    exact, cg = O.ExactStep, O.LinearCG
    down, polar = optax.scale(-1.0), optax.contrib.muon(1.0, beta=0.0, nesterov=False)
    kfac = O.kfac(damping=DAMPING)
    return {
        "identity": transformed(down),
        "one scalar": rescaled(down),
        "scalar per layer": learned(O.Scalar("layer"), O.NormalEquations()),
        "published diagonal": learned(O.Diagonal(), O.HeavyBall()),
        "diagonal, 5 steps": learned(O.Diagonal(), cg(5)),
        "diagonal, 20 steps": learned(O.Diagonal(), cg(20)),
        "Kronecker": learned(O.Kronecker(), exact(10)),
        "orthogonal + length": rescaled(polar),
        "K-FAC": transformed(kfac, down),
        "K-FAC + length": rescaled(kfac, down),
    }


def scores() -> list[dict]:
    """At the start and after 60 steps of SGD with momentum."""
    task = classifier()
    x, y = task.train
    order = np.random.default_rng(3).permutation(len(x))[: 16 * (len(x) // 16)]
    recipe = dp.optim.ggn(task.loss)
    rows = []
    for when, net in (
        ("start", task.model(jr.key(3))),
        ("after 60 steps", trained(task)),
    ):
        batch = lambda i, net=net: recipe(
            net,
            x[order[i * BATCH : (i + 1) * BATCH]],
            y[order[i * BATCH : (i + 1) * BATCH]],
        )
        own, others = batch(0), [batch(i + 1) for i in range(OTHERS)]
        many = [recipe(net, x[part], y[part]) for part in np.split(order, 16)]
        whole = recipe(net, x, y)
        for name, step in structures().items():
            one = jax.jit(lambda at, step=step: step(at, [at]))(own)
            full = jax.jit(step)(whole, many)
            judge = lambda at, step: float(dp.optim.score(at, step, DAMPING, rtol=1e-5))
            rows.append(
                {
                    "structure": name,
                    "when": when,
                    "own batch": judge(own, one),
                    "other batches": float(
                        np.median([judge(at, one) for at in others])
                    ),
                    "16 batches, full set": judge(whole, full),
                }
            )
    return rows


def trained(task):
    """The classifier after 60 steps."""
    net, optimizer = task.model(jr.key(3)), optax.sgd(0.1, momentum=0.9)
    params, rest = eqx.partition(net, eqx.is_inexact_array)
    state, rng = optimizer.init(params), np.random.default_rng(4)

    @jax.jit
    def step(params, state, x, y):
        mean = lambda p: jnp.mean(task.loss(jax.vmap(eqx.combine(p, rest))(x), y))
        updates, state = optimizer.update(jax.grad(mean)(params), state)
        return optax.apply_updates(params, updates), state

    x, y = task.train
    for _ in range(60):
        rows = rng.choice(len(x), BATCH, False)
        params, state = step(params, state, x[rows], y[rows])
    return eqx.combine(params, rest)
