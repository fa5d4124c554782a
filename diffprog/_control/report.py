import sys
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from .._common.types import counted


def columns(constrained: Any, states: Any) -> tuple[str, ...]:
    """Those of the history, in the order in which a step writes them.

    More of them where there are constraints, and where states were given.
    """
    more = ("violation", "penalty") if constrained else ()
    gap = () if states is None else ("gap",)
    return "cost", "stepsize", "damping", "slope", "trials", "gradient", *more, *gap


_HEADER = (
    f"{'step':>5} {'cost':>18} {'stepsize':>10} {'damping':>10} {'slope':>11} "
    f"{'trials':>6} {'gradient':>10}\n"
)


def _print_row(step, cost, stepsize, damping, slope, trials, gradient, **more):
    if step == 0:
        sys.stdout.write(_HEADER)
    sys.stdout.write(
        f"{int(step):5d} {float(cost):18.10e} {float(stepsize):10.2e} "
        f"{float(damping):10.2e} {float(slope):11.3e} {int(trials):6d} "
        f"{float(gradient):10.2e}"
        + "".join(f" {name} {float(value):.1e}" for name, value in more.items())
        + "\n"
    )


def print_batch(finite, batch, problems, successful, iterations, cost, seconds):
    """One line; the average cost is that of the `finite` problems."""
    which = "" if finite == problems else f" of the {finite} finite ones"
    sys.stdout.write(
        f"batch {batch}: {counted(problems, 'problem')}, {successful} successful, "
        f"{iterations:.1f} iterations, cost {cost:.6g} on average{which}, "
        f"{seconds:.3g} s\n"
    )


def report(
    verbose: bool | Callable,
    step: Int[Array, ""],
    names: tuple[str, ...],
    row: Float[Array, " columns"],
):
    """Prints one row, or hands it to the user's function by name."""
    receive = verbose if callable(verbose) else _print_row
    jax.debug.callback(receive, step=step, **dict(zip(names, row, strict=True)))
