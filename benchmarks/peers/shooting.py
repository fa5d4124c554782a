"""Quasi-Newton solvers of JAX, which see the cost as a function of all controls."""

import jax
import jax.numpy as jnp
import jaxopt
import optimistix


STEPS = 500


def objective(problem):
    def cost(us, _):
        def stage(x, u):
            return problem.dynamics(jnp, x, u), problem.cost(jnp, x, u)

        last, costs = jax.lax.scan(stage, jnp.array(problem.x0), us)
        return costs.sum() + problem.terminal_cost(jnp, last)

    return cost


class Solver:
    """At most 500 iterations from zero controls, compiled."""

    def __init__(self, problem, run):
        self.us = jnp.zeros((problem.horizon, problem.controls))
        self.run = jax.jit(lambda us: run(objective(problem), us))
        self()

    def __call__(self):
        self.answer = jax.block_until_ready(self.run(self.us))

    @property
    def cost(self) -> float:
        return float(self.answer[0])

    @property
    def steps(self) -> int:
        return int(self.answer[1])


def lbfgs(cost, us):
    solver = jaxopt.LBFGS(cost, maxiter=STEPS, tol=1e-6)
    us, state = solver.run(us, None)
    return cost(us, None), state.iter_num


def bfgs(cost, us):
    solver = optimistix.BFGS(rtol=1e-9, atol=1e-9)
    answer = optimistix.minimise(cost, solver, us, max_steps=STEPS, throw=False)
    return cost(answer.value, None), answer.stats["num_steps"]


SOLVERS = {"jaxopt LBFGS": lbfgs, "optimistix BFGS": bfgs}
