"""What a direction costs, in gradients, and what stacking saves a compiler.

    .venv/bin/python docs/programs/oracles.py

Processor time of one thread, inside a jit of the caller, the calls of a column in
turns, the medians of their rounds.
"""

import math
import pathlib
import sys
import time


sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from benchmarks import pin
from benchmarks.timing import alternate


pin()
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import diffprog as dp
from diffprog.oracles import (
    CG,
    Cholesky,
    DualCG,
    GaussNewton,
    Gradient,
    ProxLinear,
    RandomSubspace,
)


jax.config.update("jax_enable_x64", False)
LOSS = dp.losses.SoftmaxCrossEntropy()
SIZES = (256, 64, 16)
ORACLES = {
    "Gradient()": Gradient(),
    "GaussNewton, CG(1)": GaussNewton(0.1, CG(1, 0.0)),
    "GaussNewton, CG(10)": GaussNewton(0.1, CG(10, 0.0)),
    "  the same, in_outputs=True": GaussNewton(0.1, CG(10, 0.0, in_outputs=True)),
    "GaussNewton, DualCG(10)": GaussNewton(0.1, DualCG(10, 0.0)),
    "GaussNewton, RandomSubspace(32)": GaussNewton(0.1, RandomSubspace(32)),
    "GaussNewton, Cholesky()": GaussNewton(0.1, Cholesky()),
    "  the same, a Network": GaussNewton(0.1, Cholesky()),
    "ProxLinear()": ProxLinear(0.1),
}


def layers(sizes):
    keys, found = jr.split(jr.key(0), len(sizes)), []
    for key, a, b in zip(keys, sizes, sizes[1:]):
        found += [eqx.nn.Linear(a, b, key=key), jnp.tanh]
    return found[:-1]


def costs():
    net = dp.Network(layers((256, 512, 512, 10)))
    size = sum(map(jnp.size, jax.tree.leaves(net.params)))
    print(f"256-512-512-10, {size} parameters: time in gradients")
    columns = [column(net, m) for m in SIZES]
    print(f"{'examples':<34}" + "".join(f"{m:9d}" for m in SIZES))
    for name in ORACLES:
        row = [times.get(name, math.nan) for times in columns]
        print(f"{name:<34}" + "".join(f"{a:9.1f}" for a in row).replace("nan", "  -"))


def column(net, m):
    inputs = jr.normal(jr.key(1), (m, 256))
    labels, calls = jr.randint(jr.key(2), (m,), 0, 10), {}
    for name, oracle in ORACLES.items():
        if name == "GaussNewton, Cholesky()" and m > 16:
            continue  # many times as long as the others
        # With a `predict` nobody knows that the model is a chain of dense layers.
        predict = None if "a Network" in name else apply_to_batch
        vd = dp.value_and_direction(LOSS, oracle, predict)
        key = jr.key(3) if "Random" in name else None
        direction = eqx.filter_jit(
            lambda net, x, vd=vd, key=key: vd(net, x, labels, key=key)
        )
        call = lambda direction=direction: jax.block_until_ready(direction(net, inputs))
        call()
        calls[name] = call
    times = alternate(calls)
    one = times["Gradient()"]
    print(f"{m} examples: a gradient takes {1e3 * one:.1f} ms")
    return {name: found / one for name, found in times.items()}


def apply_to_batch(model, inputs, **_):
    return jax.vmap(model)(inputs)


def compile_times():
    print("\nseconds to trace and compile a Gauss-Newton direction, CG(10)")
    print("layers   stacked   stack=False")
    inputs, labels = jnp.ones((8, 16)), jnp.zeros(8, int)
    for depth in (8, 32):
        row = []
        for stack in (True, False):
            net = dp.Network(layers((16,) * (depth + 1)), stack=stack)
            vd = dp.value_and_direction(LOSS, GaussNewton(0.1, CG(10)))
            start = time.process_time()
            vd(net, inputs, labels)
            row.append(time.process_time() - start)
        print(f"{depth:6d} {row[0]:9.1f} {row[1]:13.1f}")


if __name__ == "__main__":
    print(f"JAX {jax.__version__}, {jax.default_backend()}, float32, one thread\n")
    costs()
    compile_times()
