"""`dp.ILQR`, `dp.DDP` and `dp.Newton` on the problems of the benchmarks.

    .venv/bin/python docs/programs/second_order.py

Inside `jax.jit`, float64, one thread; processor time, the median of calls in turns.
"""

import jax

import diffprog as dp
from benchmarks import ours, timing
from benchmarks.problems import PROBLEMS, UNSEEN


def counts(solver):
    stats = solver.solution.stats
    return int(stats["num_steps"]), int(stats["num_backwards"])


def newton(problem):
    solve = jax.jit(ours.solver(problem, dp.Newton()))
    solution = solve(*ours.start(problem))
    result = repr(solution).splitlines()[0].split()[-1]
    return f"{int(solution.stats['num_steps']):6}  {result}"


def main():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    print(f"JAX {jax.__version__}, {jax.devices()[0].platform}, float64\n")
    print("                        ILQR                 DDP                Newton")
    print("problem           T  iter. backs     ms  iter. backs     ms   iter.")
    for problem in PROBLEMS + UNSEEN:
        solvers = [ours.Solver(problem, method) for method in (dp.ILQR(), dp.DDP())]
        times = timing.alternate(dict(enumerate(solvers)))
        row = f"{problem.name:<15}{problem.horizon:4}"
        for i, solver in enumerate(solvers):
            steps, backs = counts(solver)
            row += f"{steps:7}{backs:6}{1e3 * times[i]:7.2f}"
        print(f"{row}  {newton(problem)}", flush=True)


if __name__ == "__main__":
    main()
