"""Measures every direction and search on a pendulum: the tables of "How to choose".

.venv/bin/python docs/programs/how_to_choose.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp


DIRECTIONS = (dp.Gradient(), dp.GaussNewton(), dp.Newton(), dp.ILQR(), dp.DDP())
SEARCHES = (dp.Backtracking(), dp.AdaptiveDamping(), dp.FixedStep())
MAX_STEPS = 500


class Pendulum(eqx.Module):
    """From hanging to upright, explicit Euler."""

    dt: float = 0.05

    def dynamics(self, x, u, t):
        angle, velocity = x
        torque = u[0] - 0.1 * velocity - 9.81 * jnp.sin(angle)
        return x + self.dt * jnp.stack([velocity, torque])

    def cost(self, x, u, t):
        error, velocity = x[0] - jnp.pi, x[1]
        return 0.5 * (0.1 * error**2 + 0.01 * velocity**2 + 0.05 * u[0] ** 2)

    def terminal_cost(self, x):
        return 0.5 * (100 * (x[0] - jnp.pi) ** 2 + 10 * x[1] ** 2)


def name(thing):
    return type(thing).__name__


def solve(direction, search, horizon, dtype=None):
    problem = dp.ControlProblem.from_system(Pendulum(), horizon)
    x0, us = jnp.zeros(2, dtype), jnp.zeros((horizon, 1), dtype)
    return dp.solve(
        problem, direction, x0, us, search, max_steps=MAX_STEPS, throw=False
    )


def result(solution):
    """Its name, from `Solution: successful` and the like."""
    return repr(solution).splitlines()[0].split()[-1]


def all_pairs(horizon):
    print(f"\nEvery pair, {horizon} stages, at most {MAX_STEPS} iterations, float64\n")
    header = ("direction", "search", "cost", "iter.", "rolls", "backs", "result")
    row = "{:<11} {:<15} {:>8} {:>5} {:>5} {:>5}  {}"
    print(row.format(*header))
    for direction in DIRECTIONS:
        for search in SEARCHES:
            solution = solve(direction, search, horizon)
            stats = solution.stats
            counts = (stats["num_steps"], stats["num_rollouts"], stats["num_backwards"])
            cost = f"{float(solution.cost):.4f}"
            words = (name(direction), name(search), cost, *map(int, counts))
            print(row.format(*words, result(solution)), flush=True)


def horizons(*values):
    print("\nIterations to success with Backtracking (- for no success)\n")
    print(f"{'direction':<12}" + "".join(f"{f'T = {T}':>9}" for T in values))
    for direction in DIRECTIONS:
        solutions = [solve(direction, dp.Backtracking(), T) for T in values]
        good = [s.result == dp.RESULTS.successful for s in solutions]
        counts = [int(s.stats["num_steps"]) for s in solutions]
        cells = [str(n) if ok else "-" for n, ok in zip(counts, good, strict=True)]
        print(f"{name(direction):<12}" + "".join(f"{c:>9}" for c in cells), flush=True)


def dtypes(horizon):
    print(f"\nIterations and cost by dtype, {horizon} stages, Backtracking\n")
    for direction in (dp.ILQR(), dp.DDP()):
        for dtype in (jnp.float32, jnp.float64):
            solution = solve(direction, dp.Backtracking(), horizon, dtype)
            steps, cost = int(solution.stats["num_steps"]), float(solution.cost)
            words = (name(direction), jnp.dtype(dtype).name, steps, cost)
            print("{:<12} {:<9} {:>5} {:>12.6f}".format(*words), flush=True)


def starts(horizon, count):
    print(f"\n{count} starts x0 = 0.3 N(0, 1), {horizon} stages, medians\n")
    header = ("direction", "search", "successful", "iter.", "rolls", "backs")
    row = "{:<12} {:<16} {:>10} {:>7} {:>7} {:>7}"
    print(row.format(*header))
    problem = dp.ControlProblem.from_system(Pendulum(), horizon)
    x0s = 0.3 * jnp.asarray(np.random.default_rng(0).standard_normal((count, 2)))
    us = jnp.zeros((horizon, 1))
    for direction in (dp.ILQR(), dp.DDP()):
        for search in SEARCHES:

            @jax.jit
            @jax.vmap
            def solve_from(x0, direction=direction, search=search):
                return dp.solve(problem, direction, x0, us, search, max_steps=MAX_STEPS)

            solution = solve_from(x0s)
            good = int(jnp.sum(solution.result == dp.RESULTS.successful))
            keys = ("num_steps", "num_rollouts", "num_backwards")
            medians = [np.median(solution.stats[key]) for key in keys]
            words = (name(direction), name(search), good, *medians)
            print(row.format(*words), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    all_pairs(100)
    horizons(20, 40, 100)
    dtypes(100)
    starts(100, 64)
