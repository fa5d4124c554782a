"""Learned preconditioners: what a refresh costs, and what training with one costs.

    python -m benchmarks.llqr

`make bench-llqr` prints the tables; the numbers go to `out/benchmarks_llqr.json`. A
refresh is 50 steps of heavy balls on one batch of 128, a dense network 256-256-256-10
with tanh, softmax cross-entropy, float32; beside it stand 50 products with the
Gauss-Newton matrix, and one gradient. Training is SGD with momentum, with the
published schedule of a refresh in 1000 steps; `in update` is training where `update`
asks in every step whether one is due.
"""

import argparse
import json
import pathlib

from . import machine, pin, report
from .losses import keep_memory
from .promises import promise
from .timing import alternate


SIZES, BATCH, STEPS, INTERVAL, LOOP = (256, 256, 256, 10), 128, 50, 1000, 10
ROWS = {
    "structure": "{}",
    "refresh ms": "{:.1f}",
    "x 50 products": "{:.2f}",
    "x gradient": "{:.0f}",
    "step ms": "{:.3f}",
    "training x base": "{:.3f}",
    "in update x base": "{:.3f}",
}
PROMISES = {"promise": "{}", "limit": "{:g}", "measured": "{:.2f}", "verdict": "{}"}
REFRESH = {"scalar": 1.3, "diagonal": 1.3, "Kronecker": 3.5, "eigen-Kronecker": 9}
MODEL_STEPS = {1: 2, 5: 1.3}  # every so many updates
TRAINING = {"diagonal": 1.1, "Kronecker": 1.25, "eigen-Kronecker": 1.6}


def problem():
    """A network, a batch and a recipe."""
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr

    import diffprog as dp

    keys, layers = jr.split(jr.key(0), 5), []
    for key, a, b in zip(keys, SIZES, SIZES[1:]):
        layers += [eqx.nn.Linear(a, b, key=key), jnp.tanh]
    net = dp.Network(layers[:-1])
    x, y = jr.normal(keys[3], (BATCH, 256)), jr.randint(keys[4], (BATCH,), 0, 10)
    return net, (x, y), dp.losses.SoftmaxCrossEntropy()


def products(curvature):
    """A gradient, and 50 products one after another."""
    import jax
    from jax import lax

    model = curvature.linearize()
    step = lambda _, d: jax.tree.map(
        lambda g, Cd: g - 1e-3 * Cd, model.gradient, model.mv(d)
    )
    return lax.fori_loop(0, STEPS, step, model.gradient)


def stepper(optimizer, net, loss, given: bool):
    """Steps of training in one loop, and their first arguments."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax
    from jax import lax

    import diffprog as dp

    params, rest = eqx.partition(net, eqx.is_inexact_array)
    recipe = dp.optim.ggn(loss)

    def step(carry, x, y):
        params, state = carry
        model = eqx.combine(params, rest)
        mean = lambda net: jnp.mean(loss(jax.vmap(net)(x), y))
        g = eqx.filter_grad(mean)(model)
        extra = {"curvature": recipe(model, x, y)} if given else {}
        updates, state = optimizer.update(g, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def steps(params, state, x, y):
        run = lambda _, carry: step(carry, x, y)
        return lax.fori_loop(0, LOOP, run, (params, state))

    return steps, (params, optimizer.init(params))


def compiled(fn, *arguments):
    """A call without arguments, and what it returns."""
    import jax

    program = jax.jit(fn).lower(*arguments).compile()
    call = lambda: jax.block_until_ready(program(*arguments))
    return call, call()


def calls() -> dict:
    import jax
    import jax.numpy as jnp
    import optax

    from diffprog import optim as O

    net, (x, y), loss = problem()
    curvature = O.ggn(loss)(net, x, y)
    structures = {
        "scalar": O.Scalar(),
        "diagonal": O.Diagonal(),
        "Kronecker": O.Kronecker(),
        "eigen-Kronecker": O.EigenKronecker(),
    }
    sgd = optax.sgd(0.01, momentum=0.9)
    step, start = stepper(sgd, net, loss, False)
    found = {
        "gradient": compiled(lambda c: c.linearize().gradient, curvature)[0],
        "products": compiled(products, curvature)[0],
        "base": compiled(step, *start, x, y)[0],
    }
    adam = optax.adam(1e-3)
    step, start = stepper(adam, net, loss, False)
    found["Adam"] = compiled(step, *start, x, y)[0]
    for every in MODEL_STEPS:
        optimizer = O.model_step(optax.adam(1.0), every=every)
        step, start = stepper(optimizer, net, loss, True)
        found[f"model step {every}"] = compiled(step, *start, x, y)[0]
    for name, structure in structures.items():
        learned = O.published(structure)
        optimizer = optax.chain(learned, sgd)
        step, (params, state) = stepper(optimizer, net, loss, False)
        found[f"refresh {name}"], (own, _) = compiled(
            O.refresh, state[0], params, curvature
        )
        later = (own, *jax.tree.map(jnp.asarray, state[1:]))
        found[f"step {name}"] = compiled(step, params, later, x, y)[0]
        step, _ = stepper(optimizer, net, loss, True)
        found[f"asked {name}"] = compiled(step, params, later, x, y)[0]
    return found


def rows(times: dict[str, float]) -> list[dict]:
    table = []
    for name in REFRESH:
        refresh, base = times[f"refresh {name}"], times["base"] / LOOP
        step, asked = (times[f"{kind} {name}"] / LOOP for kind in ("step", "asked"))
        table.append(
            {
                "structure": name,
                "refresh ms": 1e3 * refresh,
                "x 50 products": refresh / times["products"],
                "x gradient": refresh / times["gradient"],
                "step ms": 1e3 * step,
                "training x base": (step + refresh / INTERVAL) / base,
                "in update x base": (asked + refresh / INTERVAL) / base,
            }
        )
    return table


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llqr")
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    pin()
    keep_memory()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_x64", False)
    about, times = machine.describe(), alternate(calls())
    table = rows(times)
    by_name = {row["structure"]: row for row in table}
    promises = [
        promise(
            f"a refresh, {name}, over its products",
            limit,
            by_name[name]["x 50 products"],
        )
        for name, limit in REFRESH.items()
    ]
    promises += [
        promise(
            f"training, {name}, over the base", limit, by_name[name]["training x base"]
        )
        for name, limit in TRAINING.items()
    ]
    promises += [
        promise(
            f"a model step, every {every}, over Adam",
            limit,
            times[f"model step {every}"] / times["Adam"],
        )
        for every, limit in MODEL_STEPS.items()
    ]
    print("\n".join(report.machine_lines(about)))
    times["base"] /= LOOP
    base = ("gradient", "products", "base")
    print(", ".join(f"{name} {1e3 * times[name]:.2f} ms" for name in base))
    print(f"\nRefreshes\n\n{report.text_table(table, ROWS)}")
    print(f"\nPromises\n\n{report.text_table(promises, PROMISES)}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": about, "times": times, "refreshes": table}
    (args.out / "benchmarks_llqr.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
