"""Parts of one's own.

`own(dp.ILQR, backward=...)` is a class with the methods of `dp.ILQR`, except this one.
What each method returns is on the page [Extending](extending.md).
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp

import diffprog as dp


def own(cls, **methods):
    hidden = ("__dict__", "__weakref__", "__init__", "_abc_impl")
    body = {k: v for k, v in vars(cls).items() if k not in hidden} | methods
    return type("Own", cls.__bases__, body)


problem = dp.ControlProblem.from_system(dp.systems.Pendulum(), 5)
x0, us = jnp.ones(2), jnp.zeros((5, 1))
limited = dp.ControlProblem.from_system(dp.systems.Pendulum(), 5, (-1.0, 1.0))
model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
inputs, targets = jnp.ones((4, 2)), jnp.zeros((4, 3))

# %% ### Searches, directions and roll-outs


# %% Write the method that is missing.
class Own(dp.AbstractSearch):
    def init(self, dtype):
        return dp.SearchState.first(dtype)


# %% The memory of a search is a `dp.SearchState`.
search = own(dp.Backtracking, init=lambda self, dtype: 1.0)()
dp.solve(problem, dp.ILQR(), x0, us, search)

# %% Its numbers have the dtype that `init` is given.
first = lambda self, dtype: dp.SearchState.first(jnp.float32)
dp.solve(problem, dp.ILQR(), x0, us, own(dp.Backtracking, init=first)())

# %% [slow] Return the memory and the verdict.
search = own(dp.Backtracking, step=lambda self, state, trial: state)()
dp.solve(problem, dp.ILQR(), x0, us, search)

# %% [slow] A roll-out that keeps limits says so with `keeps_limits = True`.
rollout = own(dp.LinearRollout, keeps_limits=False)()
dp.solve(limited, own(dp.ILQR, rollout=rollout)(), x0, us)

# %% [slow] Return the trajectory, and the change of the controls.
rollout = own(dp.Feedback, roll=lambda self, chain, trajectory, *rest: trajectory)()
dp.solve(problem, own(dp.ILQR, rollout=rollout)(), x0, us)


# %% [slow] Gains have the shape (m, 1 + n) at every stage: k and K.
def backward(self, *given):
    sweep = dp.Gradient().backward(*given)
    return dataclasses.replace(sweep, gains=(jnp.zeros((5, 1, 1)),))


dp.solve(problem, own(dp.Gradient, backward=backward)(), x0, us)

# %% Recursions over all stages at once need models that are stored.
parallel = lambda self, *given: dp.ParallelRiccati().backward(*given)
dp.solve(problem, own(dp.DDP, backward=parallel)(), x0, us)

# %% ### Losses, divergences and oracles

# %% A generator answers for every entry.
f = own(dp.losses.ReverseKL, link=lambda self, u: jnp.sum(u))()
dp.losses.f_softargmax(jnp.zeros((2, 3)), f, "unit")

# %% A loss answers for every example.
loss = own(dp.losses.Absolute, gradient=lambda self, outputs, targets: 0.0)()
dp.value_and_direction(loss, dp.oracles.Gradient())(model, inputs, targets)

# %% Sum up over all axes but the first, and leave the mean to the library.
loss = lambda outputs, targets: jnp.mean((outputs - targets) ** 2)
dp.value_and_direction(loss, dp.oracles.GaussNewton())(model, inputs, targets)


# %% A step is arranged as the parameters are.
def propose(self, at, damping, memory, key):
    return dp.oracles.Proposal(jnp.zeros(3), 0.0)


oracle = own(dp.oracles.Gradient, propose=propose)()
dp.value_and_direction(dp.losses.Squared(), oracle)(model, inputs, targets)

# %% Return what was asked for.
oracle = own(dp.oracles.Gradient, propose=lambda self, *given: None)()
dp.value_and_direction(dp.losses.Squared(), oracle)(model, inputs, targets)
