"""Linear-quadratic problems: `dp.solve_lqr` and one iteration of Crocoddyl."""

import functools

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy

import diffprog as dp

from . import ours
from .peers import load
from .timing import alternate, samples


TITLE = "Linear-quadratic problems"
COLUMNS = {
    "n, m, T": "{}",
    "solver": "{}",
    "ms": "{:.3f}",
    "call ms": "{:.3f}",
    "cost": "{:.9g}",
    "ours / this": "{:.3f}",
    "Gflop / s": "{:.2f}",
    "share of the peak": "{:.2f}",
}
NOTES = (
    "Random problems that change with time; n states, m controls, T stages. Crocoddyl: "
    "one iteration of FDDP with its built-in linear-quadratic model in C++.",
    "`call ms` is what a call with these arguments and results costs where nothing is "
    "computed: each result is filled with one number. It is part of our time, and what "
    "bounds it on the smallest problems.",
    "Counted are the sums and products of one sweep and its roll-out with symmetric "
    "products formed once, 2 n^2 (n + m) + n (n + m)^2 + m^3 / 3 + 2 m^2 n + m n^2 + "
    "2 n (n + m) + 2 m n a stage, whatever a solver does. The peak is that of NumPy's "
    "product of two matrices of 200 x 200, on one thread.",
)
SIZES = ((4, 2, 100), (12, 4, 100), (12, 4, 1000), (32, 16, 500))
SAME_COST = 1e-9


def terms(n: int, m: int, T: int) -> tuple[dict[str, numpy.ndarray], numpy.ndarray]:
    """The terms of `dp.LQR` and a first state: stable, convex, with a drift."""
    rng = numpy.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape)
    square = lambda W: W @ W.swapaxes(-1, -2) / W.shape[-1]
    A = normal(T, n, n) / numpy.sqrt(n)
    radius = numpy.abs(numpy.linalg.eigvals(A)).max(-1)[:, None, None]
    lqr = dict(
        A=A * numpy.minimum(1.0, 0.95 / radius),
        B=0.5 * normal(T, n, m),
        c=0.1 * normal(T, n),
        Q=square(normal(T, n, n)) + 0.1 * numpy.eye(n),
        R=square(normal(T, m, m)) + 1.1 * numpy.eye(m),
        M=numpy.zeros((T, n, m)),
        q=0.1 * normal(T, n),
        r=0.1 * normal(T, m),
        Q_final=square(normal(n, n)) + 0.1 * numpy.eye(n),
        q_final=0.1 * normal(n),
    )
    return lqr, normal(n)


def operations(n: int, m: int, T: int) -> float:
    """Sums and products of a sweep and its roll-out."""
    z = n + m
    products = 2 * n**2 * z + n * z**2 + 2 * n * z + 2 * m * n
    return T * (products + m**3 / 3 + 2 * m**2 * n + m * n**2)


@functools.cache
def peak() -> float:
    """Operations per second of a product of matrices."""
    a = numpy.random.default_rng(0).normal(size=(200, 200))
    times = samples({"product": lambda: a @ a})["product"]
    return 2 * 200**3 / min(times)


class Solver:
    """`dp.solve_lqr`, compiled."""

    def __init__(self, lqr: dict, x0: numpy.ndarray, **options):
        terms = {name: jnp.asarray(value) for name, value in lqr.items()}
        self.arguments = dp.LQR(**terms), jnp.asarray(x0)
        self.solve = jax.jit(lambda lqr, x0: dp.solve_lqr(lqr, x0, **options))
        self()

    def __call__(self):
        self.solution = jax.block_until_ready(self.solve(*self.arguments))

    def empty_call(self):
        """A call with the same arguments and results, where nothing is computed."""
        fill = lambda x0: lambda a: jnp.full(a.shape, x0[0].astype(a.dtype))
        fn = jax.jit(lambda lqr, x0: jtu.tree_map(fill(x0), self.solution))
        call = lambda: jax.block_until_ready(fn(*self.arguments))
        call()
        return call

    @property
    def cost(self) -> float:
        return float(self.solution.cost)


def one(n: int, m: int, T: int) -> list[dict]:
    problem = terms(n, m, T)
    found = {
        f"diffprog{suffix}": Solver(*problem, **options)
        for suffix, options in ours.LOOPS.items()
    }
    if crocoddyl := load("crocoddyl"):
        found["Crocoddyl, one iteration"] = crocoddyl.OneIteration(*problem)
    calls = {"call": found["diffprog"].empty_call()}
    times = alternate(found | calls)
    mine, rows = found["diffprog"], []
    for name, solver in found.items():
        row = {"n, m, T": f"{n}, {m}, {T}", "solver": name, "cost": solver.cost}
        row["ms"] = 1e3 * times[name]
        row["call ms"] = 1e3 * times["call"] if solver is mine else None
        same = abs(mine.cost - solver.cost) <= SAME_COST * abs(solver.cost)
        peer = not name.startswith("diffprog")
        row["ours / this"] = times["diffprog"] / times[name] if peer and same else None
        rate = operations(n, m, T) / times[name]
        row |= {"Gflop / s": rate / 1e9, "share of the peak": rate / peak()}
        rows.append(row)
    return rows


def run() -> list[dict]:
    return [row for size in SIZES for row in one(*size)]
