"""Optimizers.

`net` is a `dp.Network` of dense layers, `params` its parameters, and `at` is
`dp.optim.ggn(dp.losses.Squared())(net, inputs, targets)`, the curvature of a batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import diffprog as dp
from diffprog import optim


keys = jax.random.split(jax.random.key(0), 4)
dense = lambda n, m, key: eqx.nn.Linear(n, m, key=key)
net = dp.Network((dense(2, 4, keys[0]), jnp.tanh, dense(4, 3, keys[1])))
inputs, targets = jnp.ones((5, 2)), jnp.zeros((5, 3))
parameters = lambda model: eqx.filter(model, eqx.is_inexact_array)
params = parameters(net)
recipe = optim.ggn(dp.losses.Squared())
at = recipe(net, inputs, targets)
conv = dp.Network((eqx.nn.Conv1d(1, 1, 2, key=keys[2]), jnp.ravel))
wider = dp.Network((dense(2, 5, keys[0]), jnp.tanh, dense(5, 3, keys[1])))
bowl = lambda params, example: (params - example) ** 2
thirds = dp.losses.spectrum("superquantile", 3, 0.5)

# %% ### Curvatures

# %% Call the recipe on the batch: `recipe(model, inputs, targets)`.
optim.score(recipe, params)

# %% Steps are arranged as the parameters are.
optim.score(at, {"w": inputs})

# %% [slow] Steps have the shapes of the parameters.
optim.score(at, jax.tree.map(lambda a: a[:1], params))

# %% [slow] Give one curvature, or a list of them.
optim.refresh(optim.llqr().init(params), params, [])

# %% [slow] Give update the gradient of the loss, the model and the batch of its
# curvature.
tx = optim.model_step(optax.sgd(1.0), check=True)
tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, curvature=at)

# %% Inputs without an axis of examples are not split: leave `batch_size` out.
pieces = optim.ggn(dp.losses.Squared(), lambda net, x: x[1], batch_size=2)
optim.score(pieces(net, (inputs[:3], inputs), targets), params)

# %% Say over which devices the batch is split.
mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
run = lambda x, y: recipe(net, x, y).linearize().value
along = PartitionSpec("data")
specs = dict(in_specs=(along, along), out_specs=PartitionSpec(), check_vma=True)
jax.jit(jax.shard_map(run, mesh=mesh, **specs))(inputs, targets)

# %% Of this loss no likelihood is known: give a metric, or take `dp.optim.ggn`.
optim.fisher(dp.losses.Hinge())

# %% ### Taps

# %% A place is a name, or the number of a stage.
optim.tap(1.5)

# %% Stages are those of a `dp.Network`.
optim.tap(1)(eqx.nn.MLP(2, 3, 4, 1, key=keys[0]), inputs)

# %% Stages count from 0.
optim.tap(7)(net, inputs)

# %% [slow] Name the value in the model, by `jax.ad_checkpoint.checkpoint_name`.
optim.tap("hidden")(net, inputs)

# %% Give each value its own name.
model = lambda x: checkpoint_name(checkpoint_name(x, "hidden") + 1.0, "hidden")
optim.tap("hidden")(model, inputs)

# %% Name what comes out of a loop, not what is inside.
step = lambda i, x: checkpoint_name(x + 1.0, "hidden")
model = lambda x: jax.lax.while_loop(lambda x: x[0] < 9.0, lambda x: step(0, x), x)
optim.tap("hidden")(model, inputs)

# %% ### `dp.optim.kfac` and `dp.optim.recommended`

# %% Kronecker factors turn a gradient; `optax` scales it.
optim.kfac(learning_rate=0.1)

# %% An optimizer is what `optax.adam` returns.
optim.recommended(optax.adam)

# %% A number of updates is an int.
optim.kfac(burn_in=-1)

# %% Take one of the names.
optim.kfac(factors="kron")

# %% A key is one of `jax.random`.
optim.kfac(key=3)

# %% K-FAC is of a `dp.Network` of dense layers; `dp.optim.recommended` takes any model.
optim.kfac().init({"w": inputs})

# %% Mask what comes behind K-FAC in the chain, and not K-FAC.
nothing = lambda params: jax.tree.map(lambda _: False, params)
optax.masked(optim.kfac(), nothing).init(params)

# %% Other layers have no factors: take `dp.optim.recommended`.
optim.kfac().init(parameters(conv))

# %% [slow] Factors are those of a Gauss-Newton or Fisher matrix.
tx = optim.kfac()
tx.update(
    params,
    tx.init(params),
    curvature=optim.hessian(dp.losses.Squared())(net, inputs, targets),
)

# %% [slow] Leave `predict` out.
tx, predict = optim.kfac(), lambda net, x: jax.vmap(net)(x)
own = optim.ggn(dp.losses.Squared(), predict)(net, inputs, targets)
tx.update(params, tx.init(params), curvature=own)

# %% Begin with the parameters that are trained.
tx, other = optim.kfac(), parameters(wider)
tx.update(other, tx.init(params), curvature=recipe(wider, inputs, targets))

# %% Say whether to use K-FAC, or give one.
optim.recommended(kfac=3)

# %% Give the direction, or K-FAC.
optim.recommended(optax.sgd(1.0), kfac=True)

# %% ### `dp.optim.llqr` and `dp.optim.refresh`

# %% Write True or False.
optim.llqr(warm_start=1)

# %% Take one of the names.
optim.llqr(graft="Norm")

# %% [slow] Give the updates of the parameters that `init` was given.
tx = optim.llqr()
tx.update({"w": inputs}, tx.init(params))

# %% Parameters keep their shapes: begin anew with others.
tx = optim.llqr()
tx.update(jax.tree.map(lambda a: a[:1], params), tx.init(params))

# %% Take the solver `ExactStep()` for such structures.
optim.llqr(optim.Kronecker(), solver=optim.LinearCG()).init(params)

# %% Give floating parameters.
optim.llqr().init({})

# %% Leave out what is no array: `eqx.filter(model, eqx.is_inexact_array)`.
optim.llqr().init({"w": "weights"})

# %% Leave integers out: `eqx.filter(model, eqx.is_inexact_array)`.
optim.llqr().init({"w": jnp.arange(3)})

# %% Return an object of a structure.
optim.llqr(lambda path, leaf: "diagonal").init(params)

# %% Give vectors a structure of vectors.
optim.llqr(lambda path, leaf: optim.Kronecker()).init(params)

# %% The leaf has fewer axes than the structure stacks.
optim.llqr(lambda path, leaf: optim.Stacked(optim.Diagonal(), axes=3)).init(params)

# %% Give the state of an optimizer with an `llqr` in it.
optim.refresh(optax.sgd(0.1).init(params), params, at)

# %% [slow] Larger structures are fitted by `LinearCG()`.
tx = optim.llqr(optim.Diagonal(), solver=optim.NormalEquations(3))
optim.refresh(tx.init(params), params, at)

# %% [slow] Start from K-FAC of the same parameters.
start = optim.kfac().init(parameters(wider))
optim.refresh(optim.llqr().init(params), params, at, start=start)


# %% Structures of one's own do not start from factors.
class Own(optim.AbstractStructure):
    linear = True

    def init(self, shape, dtype):
        return jnp.ones(shape, dtype)

    def apply(self, U, X):
        return U * X

    def diagonal(self, U):
        return U

    def floored(self, U, floor):
        return U


state = optim.llqr(lambda path, leaf: Own()).init(params)
optim.refresh(state, params, at, start=optim.kfac().init(params))

# %% A number of steps is an int.
optim.HeavyBall(num_steps=2.0)

# %% A momentum is at least 0 and below 1.
optim.HeavyBall(momentum=-1.0)

# %% Take one of the names.
optim.Scalar("net")

# %% ### `dp.optim.model_step`

# %% The first step is counted by an int.
optim.model_step(optax.sgd(1.0), start=0.5)

# %% Parameters are floats.
optim.model_step(optax.sgd(1.0)).init({"w": jnp.arange(3)})

# %% Give an optimizer.
optim.model_step(0.1)

# %% Take one of the names, or a function of paths.
optim.model_step(optax.sgd(1.0), groups="layers")

# %% ### `dp.optim.prospect` and `dp.optim.lsvrg`

# %% The loss is one of one example, and calls the model itself.
optim.lsvrg(dp.losses.Squared, thirds, learning_rate=0.1)

# %% A spectrum has an entry for every example.
optim.lsvrg(bowl, jnp.ones((3, 3)), learning_rate=0.1)

# %% Parameters are floats.
optim.lsvrg(bowl, thirds, learning_rate=0.1).init(jnp.array(1), jnp.ones(3))

# %% The data has as many examples as the spectrum has entries.
optim.lsvrg(bowl, thirds, learning_rate=0.1).init(jnp.array(1.0), jnp.ones(4))
