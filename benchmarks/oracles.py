"""Directions for training beside the gradient: times of one direction, and compiling.

    python -m benchmarks.oracles [--write docs]

`make bench-oracles` prints the tables. The numbers go to
`out/benchmarks_oracles.json`, and with `--write docs` the tables to
`docs/benchmarks-oracles.md`.
"""

import argparse
import json
import pathlib
import shlex
import sys
import time

from . import machine, pin, report
from .losses import keep_memory
from .promises import promise
from .timing import alternate


SIZES, BATCH = (256, 256, 256, 10), 128
INTRODUCTION = """\
# Benchmarks of directions for training

One direction of an oracle beside `equinox.filter_value_and_grad`: a dense network
256-256-256-10 with tanh, a batch of 128, softmax cross-entropy, float32. The command

```bash
{command}
```

measured and wrote this page; `make bench-oracles` prints the tables. Methods take
turns, one thread each, inside a jit of the caller; the figures are medians of the
processor time. Of compilation it is the time that passes, in the network of equal
blocks with the gradient and ten products of conjugate gradients. Prox-linear models
are those of hinges of labels for networks 32-64-5 and 64-128-10 with 128 and 512
examples; for the larger one the matrix of the interior point method would have 26
million entries. A step of it is one of Newton's method, of coordinate ascent a pass
over the examples, else a product with the Jacobian and one with its transpose.

"""
DIRECTIONS = {
    "direction": "{}",
    "ms": "{:.3f}",
    "x gradient": "{:.2f}",
    "compile s": "{:.2f}",
}
COMPILATION = {"blocks": "{:d}", "seconds": "{:.2f}", "x 6 blocks": "{:.2f}"}
MODELS = {
    "outputs": "{:d}",
    "damping": "{:g}",
    "gap": "{:g}",
    "solver": "{}",
    "ms": "{:.2f}",
    "steps": "{:d}",
    "gap / decrease": "{:.1e}",
}
PROMISES = {"promise": "{}", "limit": "{:g}", "measured": "{:.2f}", "verdict": "{}"}
LIMITS = {
    "Gauss-Newton, 10 products": 30,
    "target propagation": 4,
    "Moreau, one inner gradient step": 3,
}


def oracles() -> dict:
    from diffprog import oracles as O

    return {
        "gradient oracle": O.Gradient(),
        "Gauss-Newton, 10 products": O.GaussNewton(1e-3, O.CG(rtol=0.0)),
        "the same in the space of outputs": O.GaussNewton(
            1e-3, O.CG(rtol=0.0, in_outputs=True)
        ),
        "dual Gauss-Newton, 10 products": O.DualGaussNewton(1e-3, O.DualCG(rtol=0.0)),
        "Gauss-Newton, exact": O.GaussNewton(1e-3, O.Cholesky()),
        "Gauss-Newton, random subspace of 32": O.GaussNewton(1e-3, O.RandomSubspace()),
        "prox-linear, gap 0.1": O.ProxLinear(1e-1),
        "target propagation": O.TargetPropagation(),
        "Moreau, one inner gradient step": O.MoreauBackprop(
            state=O.MoreauRule(O.InnerGradient(1)),
            weights=O.MoreauRule(O.InnerGradient(1)),
        ),
        "ProxProp": O.prox_prop(),
    }


def compiled(fn, net, *arguments):
    """A call without arguments, and the seconds it took to compile."""
    import equinox as eqx
    import jax

    arrays, rest = eqx.partition(net, eqx.is_array)
    jitted = jax.jit(lambda arrays, *args: fn(eqx.combine(arrays, rest), *args))
    start = time.perf_counter()
    program = jitted.lower(arrays, *arguments).compile()
    seconds = time.perf_counter() - start
    call = lambda: jax.block_until_ready(program(arrays, *arguments))
    call()
    return call, seconds


def baseline(loss):
    import equinox as eqx
    import jax

    def gradient(net, x, y):
        return eqx.filter_value_and_grad(lambda net: loss(jax.vmap(net)(x), y).mean())(
            net
        )

    return gradient


def directions() -> list[dict]:
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr

    import diffprog as dp

    keys, layers = jr.split(jr.key(0), 5), []
    for key, a, b in zip(keys, SIZES, SIZES[1:]):
        layers += [eqx.nn.Linear(a, b, key=key), jnp.tanh]
    net = dp.Network(layers[:-1])
    x, y = jr.normal(keys[3], (BATCH, 256)), jr.randint(keys[4], (BATCH,), 0, 10)
    loss = dp.losses.SoftmaxCrossEntropy()
    calls = {"gradient": compiled(baseline(loss), net, x, y)}
    for name, oracle in oracles().items():
        vd = dp.value_and_direction(loss, oracle)
        options = {"key": jr.key(0)} if "random" in name else {}
        run = lambda net, x, y, vd=vd, options=options: vd(net, x, y, **options)
        calls[name] = compiled(run, net, x, y)
    times = alternate({name: call for name, (call, _) in calls.items()})
    return [
        {
            "direction": name,
            "ms": 1e3 * times[name],
            "x gradient": times[name] / times["gradient"],
            "compile s": seconds,
        }
        for name, (_, seconds) in calls.items()
    ]


def models() -> list[dict]:
    """Prox-linear models of hinges, solved to the same gap."""
    rows = []
    for examples, sizes in ((128, (32, 64, 5)), (512, (64, 128, 10))):
        for damping, gap in ((1e-1, 1e-1), (1e-3, 1e-3), (1e-5, 1e-1)):
            rows += one_model(examples, sizes, damping, gap)
    return rows


def one_model(examples, sizes, damping, gap) -> list[dict]:
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr

    import diffprog as dp
    from diffprog import oracles as O

    keys = jr.split(jr.key(0), 4)
    first = eqx.nn.Linear(sizes[0], sizes[1], key=keys[0])
    last = eqx.nn.Linear(sizes[1], sizes[2], key=keys[1])
    net = dp.Network([first, jnp.tanh, last])
    x = jr.normal(keys[2], (examples, sizes[0]))
    y = jr.randint(keys[3], (examples,), 0, sizes[2])
    solvers = {
        "the default": None,
        "augmented Lagrangian": O.AugmentedLagrangian(),
        "proximal gradient": O.ProximalGradient(max_steps=3000),
    }
    if examples * sizes[2] <= 1024:
        solvers["interior point"] = O.InteriorPoint()
        solvers["coordinate ascent"] = O.CoordinateAscent(max_steps=3000)
    calls, found = {}, {}
    for name, solver in solvers.items():
        oracle = O.ProxLinear(damping, solver, gap, throw=False)
        vd = dp.value_and_direction(dp.losses.Hinge(), oracle, has_aux=True)
        run = lambda net, x, y, vd=vd: vd(net, x, y)
        calls[name], _ = compiled(run, net, x, y)
        found[name] = calls[name]()[0][1]
    times = alternate(calls)
    numbers = {"outputs": examples * sizes[2], "damping": damping, "gap": gap}
    return [
        numbers
        | {
            "solver": name,
            "ms": 1e3 * times[name],
            "steps": int(aux.num_inner),
            "gap / decrease": float(aux.gap / aux.decrease),
        }
        for name, aux in found.items()
    ]


def compilation() -> list[dict]:
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr

    import diffprog as dp

    rows = []
    for blocks in (6, 24, 96):
        layers = []
        for key in jr.split(jr.key(0), blocks):
            layers += [eqx.nn.Linear(64, 64, key=key), jnp.tanh]
        net = dp.Network([*layers, eqx.nn.Linear(64, 10, key=jr.key(1))])
        x, y = jnp.ones((32, 64)), jnp.zeros(32, jnp.int32)
        oracle = dp.oracles.GaussNewton(1e-3, dp.oracles.CG())
        vd = dp.value_and_direction(dp.losses.SoftmaxCrossEntropy(), oracle)
        _, seconds = compiled(lambda net, x, y, vd=vd: vd(net, x, y), net, x, y)
        rows.append({"blocks": blocks, "seconds": seconds})
    for row in rows:
        row["x 6 blocks"] = row["seconds"] / rows[0]["seconds"]
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oracles")
    parser.add_argument("--write", choices=["docs"])
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    pin()
    keep_memory()
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    command = shlex.join(["python", "-m", "benchmarks.oracles", *sys.argv[1:]])
    about = machine.describe() | {"command": command}
    compile_rows, rows, model_rows = compilation(), directions(), models()
    ratios = {row["direction"]: row["x gradient"] for row in rows}
    promises = [
        promise(f"{name}, over the gradient", limit, ratios[name])
        for name, limit in LIMITS.items()
    ]
    ratio = compile_rows[1]["x 6 blocks"]
    promises.append(promise("compiling 24 blocks, over 6", 2, ratio))
    tables = (
        ("One direction", rows, DIRECTIONS),
        ("Prox-linear models", model_rows, MODELS),
        ("Compiling", compile_rows, COMPILATION),
        ("Promises", promises, PROMISES),
    )
    lines = [report.machine_list(about), ""]
    for title, table, columns in tables:
        print(f"\n{title}\n\n{report.text_table(table, columns)}", flush=True)
        lines += [f"## {title}", "", report.markdown_table(table, columns), ""]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": about, "directions": rows, "compilation": compile_rows}
    results["models"] = model_rows
    (args.out / "benchmarks_oracles.json").write_text(json.dumps(results, indent=1))
    if args.write == "docs":
        page = INTRODUCTION.format(command=command) + "\n".join(lines)
        (report.DOCS / "benchmarks-oracles.md").write_text(page)


if __name__ == "__main__":
    main()
