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
are those of hinges of labels for a network 32-64-5 and 128 examples.

"""
DIRECTIONS = {
    "direction": "{}",
    "ms": "{:.3f}",
    "x gradient": "{:.2f}",
    "compile s": "{:.2f}",
}
COMPILATION = {"blocks": "{:d}", "seconds": "{:.2f}", "x 6 blocks": "{:.2f}"}
MODELS = {
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
    """Prox-linear models of hinges: 640 outputs, solved to the same gap."""
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr

    import diffprog as dp
    from diffprog import oracles as O

    keys = jr.split(jr.key(0), 4)
    first, last = eqx.nn.Linear(32, 64, key=keys[0]), eqx.nn.Linear(64, 5, key=keys[1])
    net = dp.Network([first, jnp.tanh, last])
    x, y = jr.normal(keys[2], (BATCH, 32)), jr.randint(keys[3], (BATCH,), 0, 5)
    solvers = {
        "the default": None,
        "interior point": O.InteriorPoint(),
        "augmented Lagrangian": O.AugmentedLagrangian(),
        "coordinate ascent": O.CoordinateAscent(max_steps=3000),
        "proximal gradient": O.ProximalGradient(max_steps=3000),
    }
    rows = []
    for damping, gap in ((1e-1, 1e-1), (1e-3, 1e-3), (1e-5, 1e-1)):
        calls, found = {}, {}
        for name, solver in solvers.items():
            oracle = O.ProxLinear(damping, solver, gap, throw=False)
            vd = dp.value_and_direction(dp.losses.Hinge(), oracle, has_aux=True)
            run = lambda net, x, y, vd=vd: vd(net, x, y)
            calls[name], _ = compiled(run, net, x, y)
            found[name] = calls[name]()[0][1]
        times = alternate(calls)
        for name, aux in found.items():
            row = {"damping": damping, "gap": gap, "solver": name}
            row |= {"ms": 1e3 * times[name], "steps": int(aux.num_inner)}
            rows.append(row | {"gap / decrease": float(aux.gap / aux.decrease)})
    return rows


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
