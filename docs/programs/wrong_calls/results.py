"""Results.

`solution.result` says why a computation stopped, and is one of the codes below. Where
all inputs are known and `throw=True`, which is the default, one that is not successful
is raised as [`SolveError`](api/solution.md); `error.solution` is the best that was
found. Under `jax.jit`, `jax.vmap` and `jax.grad`, and in a batch, nothing is raised and
the code is returned: `jnp.where(solution.success, ...)`. What is said after the
sentence of the code is the place, and what helps there.

Below, `solve(J)` is `dp.solve` with `dp.ILQR()` on one stage, x + u, from 0, where only
the terminal cost J counts, and `direction(oracle, loss)` is that of a linear model on
four examples.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import diffprog as dp


x0, us = jnp.zeros(1), jnp.zeros((1, 1))
nothing = lambda x, u, t: 0.0


def to_the_end(terminal_cost, **more):
    step = lambda x, u, t: x + u
    return dp.ControlProblem(step, nothing, terminal_cost, 1, **more)


def solve(
    terminal_cost, us=us, x0=x0, method=dp.ILQR(), search=dp.Backtracking(), **options
):
    return dp.solve(to_the_end(terminal_cost), method, x0, us, search, **options)


model = eqx.nn.Linear(2, 3, key=jax.random.key(0))


def direction(oracle, loss, inputs=jnp.ones((4, 2)), targets=jnp.zeros((4, 3))):
    return dp.value_and_direction(loss, oracle)(model, inputs, targets)


# %% ### `successful`. The result is finite, feasible and stationary to tolerance.

# %% [slow] Where `solution.stats["minimum"]` is False it may be a maximum or a saddle,
# and printing the solution says so.
result = solve(lambda x: jnp.sum((x - 1.0) ** 2)).result

# %% ### `max_steps_reached`. The best iterate so far is returned: go on from there.

# %% [slow] Raise `max_steps`, or go on from `solution.us` with `state=solution.state`.
solve(lambda x: jnp.sum((x - 1.0) ** 4), max_steps=2)

# %% [slow] In `dp.constrained.minimize` the limits are `max_outer` and `max_inner`.
measure = lambda x: (jnp.sum(x**4), {"sum": dp.constrained.equal(jnp.sum(x), 1.0)})
lagrangian = dp.constrained.Lagrangian(measure, dp.constrained.Augmented(0.1))
dp.constrained.minimize(lagrangian, jnp.zeros(3), max_outer=1)

# %% ### `no_descent`. Not even the shortest steps lower the cost: a search is at its
# end.

# %% [slow] Look for functions whose derivatives are not theirs: kinks, rounding,
# `jax.lax.stop_gradient`.
solve(lambda x: jnp.sum(x) + jax.lax.stop_gradient(2.0 * jnp.sum(jnp.abs(x))))

# %% ### `damping_limit`. The model is a poor one even where steps are short.

# %% [slow] Start elsewhere, or take a direction whose model is convex: `dp.ILQR()`
# where the costs are convex.
search = dp.Backtracking(max_damping=1e-3)
solve(lambda x: -jnp.sum(x**2), us + 1.0, search=search)

# %% ### `nonfinite_rollout`. A state or a cost is NaN or infinite at the start, or in
# every trial.

# %% [slow] Look into `x0` and `us` first: the message says at which stage.
solve(lambda x: jnp.sum(x**2), us * jnp.nan)

# %% [slow] Start where the cost is defined.
solve(lambda x: jnp.sum(jnp.sqrt(x - 1.0)))

# %% [slow] Start from a shorter horizon or from controls that keep the states bounded.
grow = lambda x, u, t: x + x**3 + u
growing = dp.ControlProblem(grow, nothing, lambda x: jnp.sum(x**2), 8)
dp.solve(growing, dp.ILQR(), jnp.full(1, 2.0), jnp.zeros((8, 1)))

# %% [slow] In training look into the batch and the parameters.
direction(dp.oracles.GaussNewton(), dp.losses.Squared(), jnp.full((4, 2), jnp.nan))

# %% ### `nonfinite_derivative`. The value is finite, and its derivative is not.

# %% [slow] Write `jnp.sqrt(eps + x**2)` for a norm, and put the `jnp.where` inside of
# what may fail.
solve(lambda x: jnp.sum(jnp.sqrt(x)) + jnp.sum(x))

# %% ### `factorization_failed`. A matrix is not positive definite, and no damping was
# allowed.

# %% [slow] Give `dp.direction` a positive `damping`; searches raise it by themselves.
dp.direction(to_the_end(lambda x: -jnp.sum(x**2)), dp.ILQR(), x0, us)

# %% [slow] In a linear-quadratic problem raise R.
one, zero = jnp.ones((4, 1, 1)), jnp.zeros((4, 1))
dp.solve_lqr(dp.LQR(one, one, zero, one, -9.0 * one), jnp.ones(1))

# %% [slow] In training raise the damping, or take a convex loss.
saddle = lambda outputs, targets: -jnp.sum(outputs**2, 1)
direction(dp.oracles.GaussNewton(damping=1e-6), saddle)

# %% ### `cost_unbounded`. The cost falls for ever.

# %% [slow] Look for a sign, or add a cost that grows faster.
solve(lambda x: -jnp.sum(x**4), us + 1.0, method=dp.DDP())

# %% ### `infeasible`. No controls satisfy the constraints, as far as could be found.

# %% [slow] Loosen the constraint that the message names.
walls = dp.Inequality(lambda x: 1.0 - x, "above"), dp.Inequality(lambda x: x, "below")
bounded = to_the_end(lambda x: jnp.sum(x**2), terminal_constraints=walls)
dp.solve(bounded, dp.ILQR(), x0, us)

# %% ### `gradient_unreliable`. Returned by `dp.check_gradient(problem, solution)` only.

# %% [slow] Solve to a tighter `rtol`, or look for controls that are about to leave
# their limits.
problem = to_the_end(lambda x: jnp.sum((x - 1.0) ** 4))
early = dp.solve(problem, dp.ILQR(), x0, us, max_steps=2, throw=False)
result = dp.check_gradient(problem, early).result
