"""Receding horizon, manifolds and files.

`controller` is `dp.MPC(problem, dp.ILQR())` for a pendulum with limits, with a plan of
five stages.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp


pendulum = dp.systems.Pendulum()
limits = -jnp.ones(1), jnp.ones(1)
problem = dp.ControlProblem.from_system(pendulum, 5, limits)
x0, us = jnp.ones(2), jnp.zeros((5, 1))
controller = dp.MPC(problem, dp.ILQR())
subtract, add = lambda x, y: x - y, lambda y, v: y + v


def on(manifold, x0=x0):
    other = dp.ControlProblem.from_system(pendulum, 5, manifold=manifold)
    return dp.solve(other, dp.ILQR(), x0, us)


# %% ### `dp.MPC` and `dp.simulate`

# %% Every tick makes the same number of iterations, at least one.
dp.MPC(problem, dp.ILQR(), iterations=0)

# %% Without limits that are arrays nothing says how many controls there are: give `us`.
bare = dp.ControlProblem.from_system(pendulum, 5)
dp.MPC(bare, dp.ILQR()).init(x0)

# %% A tick makes `iterations` iterations; it has no tolerance.
dp.MPC(problem, dp.ILQR(), max_steps=1)

# %% [slow] A controller is called inside of a function that is compiled.
state = controller.init(x0)
jax.jit(controller)(x0, state)

# %% [slow] The state of a tick is one like that which `init` was given.
state = controller.init(x0)
controller(jnp.ones(3), state)

# %% [slow] The horizon of a plan is fixed: give a problem with other numbers, not with
# another horizon.
longer = dp.ControlProblem.from_system(pendulum, 9, limits)
controller(x0, controller.init(x0), longer)

# %% [slow] Constraints of a plan are fixed as well: begin anew with others.
wall = (dp.Inequality(lambda x, u, t: x - 9.0),)
other = dp.ControlProblem.from_system(pendulum, 5, limits, constraints=wall)
controller(x0, dp.MPC(other, dp.ILQR()).init(x0), problem)

# %% [slow] A plan is moved by whole stages.
controller.shift(controller.init(x0), by=0.5)

# %% [slow] Many robots are one `jax.vmap` over states and plans.
states = jax.vmap(controller.init)(jnp.ones((3, 2)))
controller(x0, states)

# %% [slow] Differentiate `dp.solve`; a tick is not finished.
state = controller.init(x0)
jax.grad(lambda x: jnp.sum(controller(x, state)[0]))(x0)

# %% Noise is drawn: give a key.
dp.simulate(controller, pendulum.dynamics, x0, 3, noise=0.1)

# %% [slow] One number for all entries of the state, or a tree like it.
noise, key = {"angle": 0.1}, jax.random.key(0)
dp.simulate(controller, pendulum.dynamics, x0, 3, noise, key)

# %% [slow] A plant has the signature of dynamics: it returns the next state.
dp.simulate(controller, lambda x, u, t: x[:1], x0, 3)

# %% ### Manifolds

# %% Give an object of a manifold.
dp.ControlProblem.from_system(pendulum, 5, manifold="angle")

# %% One manifold serves the whole state.
on([dp.manifolds.Angle(), dp.manifolds.Euclidean()])

# %% `difference` returns as many numbers as the state has dimensions.
on(dp.Manifold(lambda x, y: jnp.zeros(5), add))

# %% `retract` returns a state.
on(dp.Manifold(subtract, lambda y, v: y[:1] + v[:1]))

# %% Both return floating arrays.
on(dp.Manifold(lambda x, y: None, add))

# %% The difference of a state to itself is 0.
on(dp.Manifold(lambda x, y: x - y + 1.0, add))

# %% Write `retract` so that it leads back: `retract(y, difference(x, y))` is x.
on(dp.Manifold(subtract, lambda y, v: y - v))

# %% Scale quaternions to norm 1 where they come in.
dp.manifolds.UnitQuaternion().check("x0", jnp.array([2.0, 0.0, 0.0, 0.0]))

# %% A rotation vector has 3 numbers, a quaternion 4, its real part first.
dp.manifolds.UnitQuaternion().difference(jnp.ones(3), jnp.ones(3))

# %% Give objects: `dp.manifolds.Euclidean()`, with parentheses.
dp.manifolds.Product({"position": dp.manifolds.Euclidean})

# %% States of a product have one part for each of its manifolds.
dp.manifolds.Product((dp.manifolds.Angle(),)).difference({"a": x0}, {"a": x0})

# %% Give the blocks of the state, from its first entry to its last.
dp.manifolds.Blocks()

# %% A block is a number of entries and a manifold.
dp.manifolds.Blocks(dp.manifolds.Angle())

# %% The sizes of the blocks sum up to that of the state.
dp.manifolds.Blocks((3, dp.manifolds.Euclidean())).difference(jnp.ones(2), jnp.ones(2))

# %% Manifolds of blocks take and give one array.
tree = dp.Manifold(lambda x, y: {"v": x - y}, lambda y, v: y + v["v"])
dp.manifolds.Blocks((2, tree)).difference(jnp.ones(2), jnp.ones(2))


# %% [slow] The cheaper maps of `near()` have the same local coordinates.
class Near(dp.AbstractManifold):
    def difference(self, x, y):
        return x - y

    def retract(self, y, v):
        return y + v

    def near(self):
        return dp.Manifold(lambda x, y: x[:1] - y[:1], lambda y, v: y.at[:1].add(v))


on(Near())

# %% ### `dp.save` and `dp.load`

# %% Make the folder first.
dp.save("nowhere/plan.dp", us)

# %% Files are written outside of `jax.jit`, `jax.vmap` and `jax.grad`: return the
# numbers from there.
jax.jit(lambda us: dp.save("plan.dp", us))(us)

# %% Shapes have no numbers: save what they stand for.
dp.save("plan.dp", jax.eval_shape(lambda: us))

# %% Save numbers and strings; of other objects save the numbers in them.
dp.save("plan.dp", np.array([None, "a"], object))

# %% Look at the name of the file: nothing was written to this one.
pathlib.Path("plan.dp").touch()
dp.load("plan.dp", us)

# %% Look at the name of the file: another program wrote it.
np.save("plan.npy", np.zeros(3))
dp.load("plan.npy", us)

# %% Copy the file again, or save anew: a part of it is missing.
dp.save("plan.dp", us)
file = pathlib.Path("plan.dp")
file.write_bytes(file.read_bytes()[:-8])
dp.load("plan.dp", us)

# %% The same of a file that something was added to.
dp.save("plan.dp", us)
with open("plan.dp", "ab") as file:
    file.write(b"more")
dp.load("plan.dp", us)

# %% A file of a later version is read by that version.
dp.save("plan.dp", us)
file = pathlib.Path("plan.dp")
header, numbers = file.read_bytes().split(b"\n", 1)
later = json.dumps(json.loads(header) | {"number": 99, "version": "9.0.0"})
file.write_bytes(later.encode() + b"\n" + numbers)
dp.load("plan.dp", us)

# %% Make `like` by the call that made what was saved; the message names the leaves that
# differ.
dp.save("plan.dp", us)
dp.load("plan.dp", jnp.zeros((6, 1)))
