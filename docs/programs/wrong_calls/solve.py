"""Solve and batches.

`problem` is that of the section above, and `method` is `dp.ILQR()`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import diffprog as dp


def dynamics(x, u, t):
    return jnp.stack([x[0] + 0.1 * x[1], x[1] + 0.1 * u[0]])


def cost(x, u, t):
    return 0.05 * jnp.sum(x**2) + 0.05 * jnp.sum(u**2)


def terminal_cost(x):
    return jnp.sum(x**2)


def control_problem(dynamics=dynamics, cost=cost, terminal_cost=terminal_cost, **more):
    return dp.ControlProblem(dynamics, cost, terminal_cost, 5, **more)


problem, method = control_problem(), dp.ILQR()
x0, us = jnp.ones(2), jnp.zeros((5, 1))
wall = (dp.Inequality(lambda x, u, t: x[0] - 9.0),)
limited = control_problem(control_bounds=(-1.0, 1.0))
constrained = control_problem(constraints=wall)
A, B, c = np.ones((5, 2, 2)), np.ones((5, 2, 1)), np.zeros((5, 2))
Q, R = np.stack([np.eye(2)] * 5), np.ones((5, 1, 1))
lqr = dp.LQR(A, B, c, Q, R)


class Scaled(eqx.Module):
    scale: jax.Array

    def dynamics(self, x, u, t):
        return dynamics(self.scale * x, u, t)

    cost, terminal_cost = staticmethod(cost), staticmethod(terminal_cost)


scaled = dp.ControlProblem.from_system(Scaled(jnp.ones(3)), 5)

# %% ### `dp.solve`

# %% Directions are objects: `dp.ILQR()`, with parentheses.
dp.solve(problem, dp.ILQR, x0, us)

# %% Options that belong elsewhere are told, with the place where they belong.
dp.solve(problem, method, x0, us, damping=0.1)

# %% [Least squares](how-to/least-squares.md) has such a problem.
dp.GaussNewton(lambda p: p - 1.0)

# %% The number of iterations is a Python int, since it is part of the program.
dp.solve(problem, method, x0, us, max_steps=1e3)

# %% 0 returns the roll-out of the given controls.
dp.solve(problem, method, x0, us, max_steps=-1)

# %% Tolerances are at least 0; 0 asks for all that rounding allows.
dp.solve(problem, method, x0, us, rtol=-1e-6)

# %% A tolerance is one number.
dp.solve(problem, method, x0, us, atol=jnp.zeros(2))

# %% Give True, False, or a function that takes arrays by name.
dp.solve(problem, method, x0, us, verbose="all")

# %% [slow] Of a batch of solutions the memory of one solve is `solution[i].state`.
x0s = jnp.ones((3, 2))
state = dp.solve_batch(problem, method, x0s, jnp.zeros((3, 5, 1))).state
dp.solve(problem, method, x0, us, state=state)

# %% [slow] Loops are made fast where they can be; ask for it only to find out what
# hinders them.
dynamic = control_problem(terminal_cost=lambda x: jnp.sum(jnp.sort(x)))
dp.solve(dynamic, method, x0, us, fast_loops=True)

# %% [slow] Under `jax.vmap` loops run in lock step: leave `fast_loops` out, or call
# `dp.solve_batch`.
solve = lambda x0: dp.solve(problem, method, x0, us, fast_loops=True)
jax.vmap(solve)(jnp.ones((3, 2)))

# %% [slow] Index batches only: the trajectory of one solution is `solution.xs`.
dp.solve(problem, method, x0, us)[0]

# %% [slow] A batch of three has the solutions 0 to 2.
batch = dp.solve_batch(problem, method, jnp.ones((3, 2)), jnp.zeros((3, 5, 1)))
batch[3]

# %% ### Policies

# %% [slow] A policy is for states of its problem.
policy = dp.solve(problem, method, x0, us).policy
policy(0, jnp.ones(3))

# %% [slow] The stage is an integer: for a time in seconds write `int(time / dt)`.
policy = dp.solve(problem, method, x0, us).policy
policy(0.5, x0)

# %% [slow] Behind the last stage there is no control.
policy = dp.solve(problem, method, x0, us).policy
policy(5, x0)

# %% [slow] Map over the policies of a batch and their states together.
x0s = jnp.ones((3, 2))
policy = dp.solve_batch(problem, method, x0s, jnp.zeros((3, 5, 1))).policy
policy(0, x0s)

# %% [slow] A policy is data: hand it over as an argument.
policy = dp.solve(problem, method, x0, us).policy
jax.jit(policy)(0, x0)

# %% ### Directions, searches and stepping by hand

# %% The step of one direction knows no multipliers; a solve of one iteration does.
dp.direction(constrained, method, x0, us)

# %% Constants of a search are numbers in their range.
dp.Backtracking(decrease=1.5)

# %% [slow] Take another direction for constraints.
dp.solve(constrained, dp.MoreauGradient(), x0, us)

# %% [slow] Take another direction for first guesses of states.
dp.solve(problem, dp.MoreauGradient(), x0, us, xs=jnp.zeros((6, 2)))

# %% [slow] Take another direction for limits.
dp.solve(limited, dp.MoreauGradient(), x0, us)

# %% [slow] The recursion over all stages at once knows no limits: leave `riccati` out.
dp.solve(limited, dp.ILQR(riccati=dp.ParallelRiccati()), x0, us)

# %% [slow] It knows no gaps between states either.
parallel = dp.ILQR(riccati=dp.ParallelRiccati())
dp.solve(problem, parallel, x0, us, xs=jnp.zeros((6, 2)))

# %% Local models are those of one stage repeated: of a chain take them phase by phase.
phase = dp.Phase(dynamics, cost, 5)
dp.linearize(dp.Chain((phase, phase), terminal_cost), x0, (us, us))

# %% ### Gradients

# %% [slow] Leave `adjoint` out to differentiate a solution.
no = dp.NoAdjoint()
jax.grad(lambda x0: dp.solve(problem, method, x0, us, adjoint=no).cost)(x0)

# %% "nan" marks derivatives of what has not converged; "accept" takes them as they are.
dp.ImplicitAdjoint(on_unconverged="raise")

# %% The number of corrections is a Python int.
dp.ImplicitAdjoint(refine=True)

# %% 0 leaves the corrections out.
dp.ImplicitAdjoint(refine=-1)

# %% [slow] Limits and constraints take derivatives of what has converged.
unrolled = dp.UnrolledAdjoint()
jax.grad(lambda x0: dp.solve(limited, method, x0, us, adjoint=unrolled).cost)(x0)

# %% [slow] Start unrolled solves from controls.
unrolled, xs = dp.UnrolledAdjoint(), jnp.zeros((6, 2))
call = lambda x0: dp.solve(problem, method, x0, us, xs=xs, adjoint=unrolled)
jax.grad(lambda x0: call(x0).cost)(x0)

# %% [slow] Check one solution of a batch at a time.
batch = dp.solve_batch(problem, method, jnp.ones((3, 2)), jnp.zeros((3, 5, 1)))
dp.check_gradient(problem, batch)

# %% ### `dp.solve_batch`

# %% Skip a batch without problems.
dp.solve_batch(problem, method, jnp.zeros((0, 2)), jnp.zeros((0, 5, 1)))

# %% Give every problem its own row of `x0s` and `uss`.
dp.solve_batch(problem, method, jnp.ones((3, 2)), us)

# %% Name the axis along which the numbers of the problems lie, as in `jax.vmap`.
x0s, uss = jnp.ones((3, 2)), jnp.zeros((3, 5, 1))
dp.solve_batch(scaled, method, x0s, uss, in_axes=1)

# %% An axis is an int.
axes = jax.tree.map(lambda _: "first", scaled)
dp.solve_batch(scaled, method, jnp.ones((3, 2)), jnp.zeros((3, 5, 1)), in_axes=axes)

# %% A tree of axes has the arrangement of the problem.
dp.solve_batch(problem, method, x0[None], us[None], in_axes=(0, None))

# %% Numbers that differ from problem to problem are arrays in fields of modules.
dp.solve_batch(problem, method, x0[None], us[None], in_axes=0)


# %% Say what is meant where both are possible: one row for each problem, or one array
# for all.
class Weighted(eqx.Module):
    weights: jax.Array

    def cost(self, x, u, t):
        return jnp.sum(self.weights) * jnp.sum(x**2)

    dynamics, terminal_cost = staticmethod(dynamics), staticmethod(terminal_cost)


weighted = dp.ControlProblem.from_system(Weighted(jnp.ones(3)), 5)
dp.solve_batch(weighted, method, jnp.ones((3, 2)), jnp.zeros((3, 5, 1)))

# %% The same of an array that a function holds: make it a field of a module.
weights = jnp.ones(3)


def make_cost(weights):
    return lambda x, u, t: jnp.sum(weights) * jnp.sum(x**2)


held = control_problem(cost=make_cost(weights))
dp.solve_batch(held, method, jnp.ones((3, 2)), jnp.zeros((3, 5, 1)))

# %% Devices come as a mesh.
dp.solve_batch(problem, method, x0[None], us[None], mesh=2)

# %% A mesh has devices.
empty = Mesh(np.empty((0,), object), ("problems",))
dp.solve_batch(problem, method, x0[None], us[None], mesh=empty)

# %% Inside of `jax.shard_map` every device has its problems already: leave `mesh` out.
mesh = Mesh(np.asarray(jax.devices()[:1]), ("problems",))
solve = lambda x0s: dp.solve_batch(problem, method, x0s, us[None], mesh=mesh).us
along = PartitionSpec("problems")
jax.shard_map(solve, mesh=mesh, in_specs=along, out_specs=along)(x0[None])

# %% ### Linear-quadratic problems. A to R are the matrices of five stages.

# %% Matrices are arrays of floats.
dp.LQR("A", B, c, Q, R)

# %% Write 1.0 for 1.
dp.LQR(A.astype(int), B, c, Q, R)

# %% All matrices have one dtype.
dp.LQR(A, B.astype(np.float32), c, Q, R)

# %% Matrices have the stage first; `dp.LQR.constant(..., horizon=5)` repeats one of
# them.
dp.LQR(A[0], B[0], c[0], Q[0], R[0])

# %% B has a row for each number of the state.
dp.LQR(A, np.ones((5, 3, 1)), c, Q, R)

# %% The weights have the sizes that A and B say.
dp.LQR(A, B, c, Q, Q)

# %% The start has a number for each row of A.
dp.solve_lqr(lqr, np.ones(3))

# %% `dp.solve_lqr` takes a `dp.LQR`; any other problem goes to `dp.solve`.
dp.solve_lqr(problem, x0)

# %% The method is an object: `dp.Riccati()`, with parentheses.
dp.solve_lqr(lqr, np.ones(2), method=dp.Riccati)

# %% Fast loops take the stages one after the other.
dp.solve_lqr(lqr, np.ones(2), method=dp.ParallelRiccati(), fast_loops=True)


# %% ### What functions hold


# %% Numbers that change belong into a module, whose fields are data.
class Settings:
    weight = 2.0


settings = Settings()


def make_cost(settings):
    return lambda x, u, t: settings.weight * jnp.sum(x**2)


dp.solve(control_problem(cost=make_cost(settings)), method, x0, us)

# %% Only arrays of numbers are data.
names = np.array(["a", "b"], object)


def make_cost(names):
    return lambda x, u, t: len(names) * jnp.sum(x**2)


dp.solve(control_problem(cost=make_cost(names)), method, x0, us)


# %% [slow] What a fixed function holds is not looked at again: make it a field that is
# not static.
class Weighted(eqx.Module):
    price: object = eqx.field(static=True)

    def cost(self, x, u, t):
        return self.price(x)

    dynamics, terminal_cost = staticmethod(dynamics), staticmethod(terminal_cost)


def make_price(weight):
    def price(x):
        return weight * jnp.sum(x**2)

    def change(new):
        nonlocal weight
        weight = new

    return price, change


price, change = make_price(1.0)
weighted = dp.ControlProblem.from_system(Weighted(price), 5)
dp.rollout(weighted, x0, us)
change(2.0)
dp.rollout(weighted, x0, us)
