"""Constraints in learning.

`limited(make)` begins with a Lagrangian whose `measure` returns the loss and one
constraint: `make` of the five parameters.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffprog.constrained import (
    Ascent,
    at_most,
    Augmented,
    equal,
    FromOptax,
    Lagrangian,
    minimize,
    PI,
    Restart,
)


params = jnp.linspace(0.1, 0.5, 5)


def begin(measure, dual=Ascent(0.1), **options):
    return Lagrangian(measure, dual, **options).init(params)


def limited(make, dual=Ascent(0.1), **options):
    return begin(lambda x: (jnp.sum(x), {"limit": make(x)}), dual, **options)


bounded = Lagrangian(lambda x: (x @ x, {"limit": at_most(x, 0.0)}), Ascent(0.1))

# %% ### `measure`

# %% [slow] Return the loss and the constraints by name.
begin(lambda x: x[0])

# %% The loss is one floating number.
begin(lambda x: (x, {"limit": at_most(x, 0.0)}))

# %% Without constraints any optimizer will do.
begin(lambda x: (x[0], {}))

# %% Say what the value must be: `at_most(value, limit)`, `at_least` or `equal`.
limited(lambda x: x - 1.0)

# %% One constraint is one array.
limited(lambda x: at_most({"x": x}, 0.0))

# %% What has no gradient is measured by `strict=`, beside a smooth value.
limited(lambda x: at_most(x > 0, 0.0))

# %% What is a step function of the parameters needs a smooth value as well.
limited(lambda x: at_most(jnp.mean((x > 0).astype(float)), 0.0))

# %% A limit is a number or an array.
limited(lambda x: at_most(x, None))

# %% A limit has the shape of its value, or one that broadcasts to it.
limited(lambda x: at_most(x, jnp.zeros(4)))

# %% A mask is booleans.
limited(lambda x: at_most(x, 0.0, mask=x))

# %% A mask has the shape of the value.
limited(lambda x: at_most(x, 0.0, mask=jnp.ones(3, bool)))

# %% Multipliers of examples are a table: give both `index=` and `rows=`.
limited(lambda x: at_most(x, 0.0, rows=5))

# %% The table has a number of rows.
limited(lambda x: at_most(x, 0.0, rows=5.0, index=jnp.arange(5)))

# %% Rows are found by integers.
limited(lambda x: at_most(x, 0.0, rows=5, index=x))

# %% Give the row of every value.
limited(lambda x: at_most(x, 0.0, rows=5, index=jnp.arange(3)))

# %% Floating parameters are trained.
bounded.init(jnp.arange(5))

# %% ### Lagrangians and duals

# %% Take one of the names; to step the parameters first call `grad` and then `update`.
begin(lambda x: x[0], order="primal_first")

# %% Leave out the dual of a constraint that there is not.
limited(lambda x: at_most(x, 0.0), {"limit": Ascent(1.0), "other": Ascent(1.0)})

# %% Give every constraint its dual, or one for all.
limited(lambda x: at_most(x, 0.0), {})

# %% [slow] Begin with `duals = lagrangian.init(params, *args)`.
bounded.step(params, None)

# %% The same constraints come at every step.
bounded.step(params, {"other": bounded.init(params)["limit"]})

# %% A name means one constraint: another shape or kind has another name.
other = Lagrangian(lambda x: (x @ x, {"limit": equal(x, 0.0)}), Ascent(0.1))
other.step(params, bounded.init(params))

# %% Take one of the names.
PI(0.1, 0.5, form="speed")

# %% Take one of the names.
PI(0.1, 0.5, start="ones")

# %% Start from zeros in position form.
PI(0.1, 0.5, start="sgd")

# %% Give a transformation of optax.
FromOptax(0.1)

# %% Give a dual.
Restart(0.1)

# %% Over several devices name the axis of the batch.
mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
measure = lambda p, x: (jnp.mean(p @ x), {"limit": at_most(p, 0.0)})
split = Lagrangian(measure, Ascent(0.1))
run = lambda x: split.step(params, split.init(params, x), x)[0][0]
along = PartitionSpec(None, "data")
jax.shard_map(run, mesh=mesh, in_specs=along, out_specs=PartitionSpec())(
    jnp.ones((5, 2))
)

# %% [slow] Leave the check of `jax.shard_map` on.
mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
measure = lambda p, x: (jnp.mean(p @ x), {"limit": at_most(p, 0.0)})
split = Lagrangian(measure, Ascent(0.1), axis_name="data")
run = lambda x: split.step(params, split.init(params, x), x)[0][0]
along, options = PartitionSpec(None, "data"), dict(check_vma=False)
jax.shard_map(run, mesh=mesh, in_specs=along, out_specs=PartitionSpec(), **options)(
    jnp.ones((5, 2))
)

# %% ### `dp.constrained.minimize`

# %% Other duals are for single steps.
minimize(bounded, params)

# %% Its limits are those of updates of multipliers and of steps between two.
measure = lambda x: (x @ x, {"limit": at_most(x, 0.0)})
minimize(Lagrangian(measure, Augmented(1.0)), params, maxiter=100)

# %% Leave `axis_name` out.
measure = lambda x: (x @ x, {"limit": at_most(x, 0.0)})
minimize(Lagrangian(measure, Augmented(1.0), axis_name="data"), params)

# %% Give a minimizer of optimistix or a transformation of optax.
measure = lambda x: (x @ x, {"limit": at_most(x, 0.0)})
minimize(Lagrangian(measure, Augmented(1.0)), params, inner="BFGS")

# %% Strict measures belong to single steps.
measure = lambda x: (x @ x, {"limit": at_most(x, 0.0, strict=x)})
minimize(Lagrangian(measure, Augmented(1.0)), params)

# %% [slow] [Gradients](gradients.md) differentiates what `dp.solve` returns.
augmented = Lagrangian(lambda x, a: (x @ x, {"limit": at_most(x, a)}), Augmented(1.0))
jax.grad(lambda a: minimize(augmented, params, a).loss)(0.2)
