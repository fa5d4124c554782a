"""mpc.pytorch: iLQR in PyTorch, for quadratic costs."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy
import torch
from mpc.mpc import GradMethods, MPC, QuadCost


# What the dynamics use of `jax.numpy`; a batch rides along in the last axis.
MODULE = types.SimpleNamespace(
    array=torch.stack, concatenate=torch.cat, sin=torch.sin, cos=torch.cos
)


class Dynamics(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self, x, u):
        return self.problem.dynamics(MODULE, x.T, u.T).T


def quadratic(problem) -> tuple[QuadCost, float]:
    """The cost in (x, u) of every stage, the last with controls that it ignores."""
    n, m = len(problem.x0), problem.controls
    stage = lambda z: problem.cost(jnp, z[:n], z[n:])
    last = lambda z: problem.terminal_cost(jnp, z[:n]) + z[n:] @ z[n:]
    zero = jnp.zeros(n + m)
    stack = lambda of: numpy.stack([of(stage)] * problem.horizon + [of(last)])
    C = stack(lambda cost: jax.hessian(cost)(zero))
    c = stack(lambda cost: jax.grad(cost)(zero))
    constant = problem.horizon * stage(zero) + last(zero)
    return QuadCost(torch.tensor(C)[:, None], torch.tensor(c)[:, None]), float(constant)


class Solver:
    """A few iterations from zero controls."""

    def __init__(self, problem, steps: int):
        self.steps, self.x0 = steps, torch.tensor([problem.x0], dtype=torch.float64)
        self.quadratic, self.constant = quadratic(problem)
        self.dynamics = Dynamics(problem)
        self.solver = MPC(
            len(problem.x0),
            problem.controls,
            problem.horizon + 1,
            lqr_iter=steps,
            grad_method=GradMethods.AUTO_DIFF,
            exit_unconverged=False,
            backprop=False,
            verbose=-1,
        )

    def __call__(self):
        with warnings.catch_warnings(action="ignore"):
            *_, self.costs = self.solver(self.x0, self.quadratic, self.dynamics)

    @property
    def cost(self) -> float:
        return float(self.costs[0]) + self.constant
