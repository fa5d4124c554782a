from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from ._result import NAMES, RESULTS
from ._search.base import SearchState


class Solution(eqx.Module):
    """What a solve returns, whether it succeeded or not.

    - `xs`: states, T + 1 rows.
    - `us`: controls, T rows.
    - `cost`: their cost.
    - `policy`: the feedback around them, see [`diffprog.Policy`][], from a backward
        pass without damping (with the last damping that worked where there is none);
        zeros if there was no pass. For a [`diffprog.Chain`][], one for each phase.
    - `result`: a [`diffprog.RESULTS`][] code.
    - `stats`: a dictionary: `num_steps` (accepted iterations), `num_rollouts`,
        `num_backwards`, `max_steps`, `gradient` (norm of the gradient in the controls),
        `decrement` (the decrease that the undamped model still promises, which the
        tolerances are about), `first_nonfinite` (horizon + 1 if there is none).
    - `history`: a dictionary of arrays of length `max_steps + 1`: `cost`, `stepsize`,
        `damping`, `slope`, `trials`, `gradient`. Entry i is about iterate i and the
        step from it; NaN after the end. Empty if `history=False`.
    - `state`: the memory of the search, for `state=` of the next solve.
    """

    xs: PyTree[Array]
    us: PyTree[Array]
    cost: Float[Array, "*batch"]
    policy: Any
    result: RESULTS
    stats: dict[str, Any]
    history: dict[str, Float[Array, "*batch rows"]]
    state: SearchState

    def __repr__(self) -> str:
        code = self.result._value
        if isinstance(code, Tracer) or not isinstance(code, jax.Array | np.ndarray):
            return eqx.tree_pformat(self, struct_as_array=True)
        if np.ndim(code):
            return _describe_batch(np.asarray(code), self)
        stats = self.stats
        return "\n".join([
            f"Solution: {NAMES[int(code)]}",
            f"  cost          {float(self.cost):.10g}",
            f"  iterations    {int(stats['num_steps'])} of at most "
            f"{int(stats['max_steps'])} ({int(stats['num_rollouts'])} roll-outs, "
            f"{int(stats['num_backwards'])} backward passes)",
            f"  stationarity  {float(stats['decrement']):.2e} predicted decrease, "
            f"{float(stats['gradient']):.2e} gradient norm",
            f"  {RESULTS[self.result]}",
        ])  # fmt: skip


def _describe_batch(codes: np.ndarray, solution: Solution) -> str:
    names, counts = np.unique([NAMES[c] for c in codes.ravel()], return_counts=True)
    costs, steps = np.asarray(solution.cost), np.asarray(solution.stats["num_steps"])
    return "\n".join([
        f"Solution of {codes.size} problems: "
        + ", ".join(f"{n} {name}" for name, n in zip(names, counts, strict=True)),
        f"  cost          {costs.min():.6g} to {costs.max():.6g}",
        f"  iterations    {steps.min()} to {steps.max()}",
    ])  # fmt: skip
