"""f-softargmax and its losses beside softmax, optax, and entmax on PyTorch.

    python -m benchmarks.losses [--write docs]

`make bench-losses` installs the peers and prints the tables. The numbers go to
`out/benchmarks_losses.json`, and with `--write docs` the tables to
`docs/benchmarks-losses.md`.
"""

import argparse
import ctypes
import json
import pathlib
import shlex
import sys

from . import machine, pin, report
from .timing import alternate


SHAPES = (64, 1000), (64, 32_000), (8, 256_000)
INTRODUCTION = """\
# Benchmarks of the losses

The operators of `diffprog.losses` beside `jax.nn.softmax`, the cross-entropy of optax,
and the entmax package on PyTorch: float32, scores 2 N(0, 1), reference "unit" unless
said. The command

```bash
{command}
```

measured and wrote this page; `make bench-losses` prints the tables. Methods take
turns, one thread each; the figures are medians of the processor time, and the memory of
results stays with the process. Backward passes have a fixed random cotangent, losses
are means over rows with labels.

"""
PROBABILITIES = {
    "shape": "{}",
    "method": "{}",
    "forward ms": "{:.3f}",
    "x softmax": "{:.2f}",
    "forward + backward ms": "{:.3f}",
    "x softmax, both": "{:.2f}",
    "L1 error": "{:.0e}",
    "evaluations": "{}",
}
LOSSES = {"shape": "{}", "method": "{}", "ms": "{:.3f}", "x optax": "{:.2f}"}
PROMISES = {"promise": "{}", "limit": "{}", "measured": "{:.2f}", "verdict": "{}"}


def families():
    import jax.numpy as jnp

    from diffprog import losses as L

    found = {
        "alpha = 1.5": L.Alpha(1.5),
        "alpha = 2": L.ChiSquare(),
        "alpha = 1.25": L.Alpha(1.25),
        "alpha = 1.7": L.Alpha(1.7),
        "alpha = 0.5": L.Alpha(0.5),
        "alpha = 0.75": L.Alpha(0.75),
        "alpha = 1.5, traced": L.Alpha(jnp.asarray(1.5, jnp.float32)),
        "KL": L.KL(),
        "reverse KL": L.ReverseKL(),
        "Neyman": L.Neyman(),
        "squared Hellinger": L.SquaredHellinger(),
        "Jensen-Shannon": L.JensenShannon(),
        "Jeffreys": L.Jeffreys(),
        "Le Cam": L.LeCam(),
    }
    return {name: (f, "unit") for name, f in found.items()} | {
        f"{name}, uniform": (found[name], "uniform")
        for name in ("alpha = 1.5", "Jensen-Shannon", "Le Cam")
    }


def data(shape):
    import numpy

    rng = numpy.random.default_rng(0)
    scores = (2 * rng.normal(size=shape)).astype("f4")
    cotangent = rng.normal(size=shape).astype("f4")
    return scores, cotangent, rng.integers(0, shape[1], shape[0])


def jax_calls(fn, *arguments):
    import jax

    compiled = jax.jit(fn).lower(*arguments).compile()
    call = lambda: jax.block_until_ready(compiled(*arguments))
    call()
    return call


def torch_calls(fn, scores, cotangent):
    """Forward, and forward with backward."""
    import torch

    constant, leaf = torch.tensor(scores), torch.tensor(scores, requires_grad=True)
    weights = torch.tensor(cotangent)

    def both():
        leaf.grad = None
        fn(leaf).backward(weights)

    def forward():
        with torch.no_grad():
            fn(constant)

    both(), forward()
    return forward, both


def probabilities(shape) -> list[dict]:
    import entmax
    import jax
    import jax.numpy as jnp
    import torch

    from diffprog import losses as L

    scores, cotangent, _ = data(shape)
    x, g = jnp.asarray(scores), jnp.asarray(cotangent)
    forward, both, found = {}, {}, {}
    ours = families()
    functions = {"jax softmax": jax.nn.softmax}
    for name, (f, q) in ours.items():
        functions[name] = lambda x, f=f, q=q: L.f_softargmax(x, f, q)
        found[name] = L.diagnose(x, f, q)
    for name, fn in functions.items():
        forward[name] = jax_calls(fn, x)

        def pulled(x, g, fn=fn):
            p, pull = jax.vjp(fn, x)
            return p, pull(g)

        both[name] = jax_calls(pulled, x, g)
    peers = {
        "torch softmax": lambda x: torch.softmax(x, -1),
        "entmax15, full sort": lambda x: entmax.entmax15(x, -1),
        "entmax15, k = 512": lambda x: entmax.entmax15(x, -1, 512),
        "sparsemax, full sort": lambda x: entmax.sparsemax(x, -1),
        "sparsemax, k = 512": lambda x: entmax.sparsemax(x, -1, 512),
    }
    for name, fn in peers.items():
        forward[name], both[name] = torch_calls(fn, scores, cotangent)
    times, all_times, rows = alternate(forward), alternate(both), []
    for name in forward:
        row = {"shape": f"{shape[0]}, {shape[1]}", "method": name}
        row["forward ms"] = 1e3 * times[name]
        row["x softmax"] = times[name] / times["jax softmax"]
        row["forward + backward ms"] = 1e3 * all_times[name]
        row["x softmax, both"] = all_times[name] / all_times["jax softmax"]
        if name in found:
            row["L1 error"] = float(found[name].residual.max())
            row["evaluations"] = int(found[name].evaluations)
        rows.append(row)
    return rows


def losses(shape) -> list[dict]:
    import entmax
    import jax
    import jax.numpy as jnp
    import optax
    import torch

    from diffprog import losses as L

    scores, _, labels = data(shape)
    x, y = jnp.asarray(scores), jnp.asarray(labels, jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    functions = {"optax cross-entropy": lambda x, y: cross_entropy(x, y).mean()}
    for name, (f, q) in families().items():
        functions[name] = lambda x, y, f=f, q=q: L.f_loss(
            x, y, f, q, constant=False
        ).mean()
    calls = {n: jax_calls(jax.value_and_grad(f), x, y) for n, f in functions.items()}
    leaf, target = torch.tensor(scores, requires_grad=True), torch.tensor(labels)
    peers = {
        "torch cross-entropy": torch.nn.functional.cross_entropy,
        "entmax15 loss, full sort": lambda x, y: entmax.entmax15_loss(x, y).mean(),
        "entmax15 loss, k = 512": lambda x, y: entmax.entmax15_loss(x, y, 512).mean(),
        "sparsemax loss, k = 512": lambda x, y: entmax.sparsemax_loss(x, y, 512).mean(),
    }
    for name, fn in peers.items():

        def call(fn=fn):
            leaf.grad = None
            fn(leaf, target).backward()

        call()
        calls[name] = call
    times = alternate(calls)
    return [
        {
            "shape": f"{shape[0]}, {shape[1]}",
            "method": name,
            "ms": 1e3 * seconds,
            "x optax": seconds / times["optax cross-entropy"],
        }
        for name, seconds in times.items()
    ]


def promises(first: list[dict], second: list[dict]) -> list[dict]:
    def row(promise, limit, measured, at_least=False):
        holds = measured >= limit if at_least else measured <= limit
        verdict = "holds" if holds else "does not hold"
        return dict(promise=promise, limit=limit, measured=measured, verdict=verdict)

    rows, sparse = [], ("alpha = 1.5", "alpha = 2")
    table = {(r["shape"], r["method"]): r for r in first}
    for shape in dict.fromkeys(r["shape"] for r in first):
        of = lambda name, shape=shape: table[shape, name]
        for name in sparse:
            label = f"{shape}: {name}"
            rows.append(
                row(f"{label}, forward over softmax", 2.5, of(name)["x softmax"])
            )
            both = of(name)["x softmax, both"]
            rows.append(row(f"{label}, forward and backward over softmax", 3.5, both))
        others = [n for n in families() if "uniform" not in n and n not in sparse]
        worst = max(others, key=lambda n: of(n)["x softmax"])
        label = f"{shape}: other families, the slowest is {worst}, over softmax"
        rows.append(row(label, 10, of(worst)["x softmax"]))
        for peer, limit in (("full sort", 8), ("k = 512", 1)):
            ratio = of(f"entmax15, {peer}")["forward ms"] / of(sparse[0])["forward ms"]
            rows.append(
                row(f"{shape}: faster than entmax15, {peer}", limit, ratio, True)
            )
        loss = {r["method"]: r["x optax"] for r in second if r["shape"] == shape}
        for name in sparse:
            rows.append(row(f"{shape}: loss of {name} over optax", 4, loss[name]))
    return rows


def keep_memory():
    """Results of megabytes would else go back to the system after each call (glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses")
    parser.add_argument("--write", choices=["docs"])
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    pin()
    keep_memory()
    import jax
    import torch

    torch.set_num_threads(1)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    command = shlex.join(["python", "-m", "benchmarks.losses", *sys.argv[1:]])
    about = machine.describe() | {"command": command}
    first = [row for shape in SHAPES for row in probabilities(shape)]
    second = [row for shape in SHAPES for row in losses(shape)]
    tables = (
        ("Probabilities", first, PROBABILITIES),
        ("Loss and gradient, labels", second, LOSSES),
        ("Promises", promises(first, second), PROMISES),
    )
    lines = [report.machine_list(about), ""]
    for title, rows, columns in tables:
        print(f"\n{title}\n\n{report.text_table(rows, columns)}", flush=True)
        lines += [f"## {title}", "", report.markdown_table(rows, columns), ""]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": about, "probabilities": first, "losses": second}
    (args.out / "benchmarks_losses.json").write_text(json.dumps(results, indent=1))
    if args.write == "docs":
        page = INTRODUCTION.format(command=command) + "\n".join(lines)
        (report.DOCS / "benchmarks-losses.md").write_text(page)


if __name__ == "__main__":
    main()
