"""Directions for training.

`model` is an `eqx.nn.Linear(2, 3)`, and `direction(oracle)` calls
`dp.value_and_direction(dp.losses.Squared(), oracle)` on it and a batch of four
examples.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import diffprog as dp


keys = jax.random.split(jax.random.key(0), 4)
model = eqx.nn.Linear(2, 3, key=keys[0])
net = dp.Network(
    (eqx.nn.Linear(2, 4, key=keys[1]), jnp.tanh, eqx.nn.Linear(4, 3, key=keys[2]))
)
inputs, targets = jnp.ones((4, 2)), jnp.zeros((4, 3))
gradient, newton = dp.oracles.Gradient(), dp.oracles.GaussNewton()


def direction(
    oracle=gradient,
    model=model,
    inputs=inputs,
    targets=targets,
    loss=None,
    key=None,
    **options,
):
    loss = loss or dp.losses.Squared()
    vd = dp.value_and_direction(loss, oracle, **options)
    return vd(model, inputs, targets, key=key)


# %% ### Models

# %% Give an object of the model.
direction(model=eqx.nn.Linear)

# %% A tree of parameters is called by `predict(params, inputs)`; with Flax that is
# `module.apply`.
direction(model={"weight": jnp.ones((3, 2))})

# %% With Flax linen and haiku the parameters are the model.
direction(model=jnp.tanh)

# %% Keep integers out of the parameters: in Equinox they are static fields, or behind
# `jax.lax.stop_gradient` as floats.
direction(model={"w": jnp.ones(2), "steps": jnp.arange(2)}, predict=lambda p, x: x)

# %% Give real and imaginary part as two arrays.
direction(model={"w": jnp.ones(2) * 1j}, predict=lambda p, x: x)

# %% [slow] A module computes outputs by `module.apply(params, inputs)`.
from flax import linen


direction(model={"params": {"kernel": jnp.ones((3, 2))}}, predict=linen.Dense(2))

# %% [slow] `module.apply` takes what `module.init` returns, whole.
from flax import linen


direction(model={"kernel": jnp.ones((2, 3))}, predict=linen.Dense(3).apply)

# %% [slow] Give the parameters of a `TrainState`.
import optax
from flax import linen
from flax.training.train_state import TrainState


module, params = linen.Dense(3), {"params": {"kernel": jnp.ones((2, 3))}}
state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.sgd(1.0))
direction(model=state, predict=lambda state, x: state.apply_fn(state.params, x))

# %% Write `predict` of the model and the inputs of the batch.
direction(predict=lambda x: jax.vmap(model)(x))

# %% Use the first argument of `predict`: it has the parameters to differentiate in.
direction(predict=lambda _, inputs: jax.vmap(model)(inputs))

# %% With Flax linen hand running means on by `init(model, model_state)`.
params = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}}
direction(model=params, predict=lambda p, x: x)

# %% [slow] Only parameters of Flax NNX are trained: split the model as the message
# says.
from flax import nnx


bn = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
direction(model=nnx.state(bn), predict=lambda p, x: x)

# %% [slow] A parameter that two layers share comes once.
from flax import nnx


weight = nnx.Param(jnp.ones(2))
direction(model={"first": weight, "second": weight}, predict=lambda p, x: x)

# %% With a state of the model `predict` takes it and returns the new one.
vd = dp.value_and_direction(dp.losses.Squared(), gradient)
vd.step(model, vd.init(model, jnp.zeros(2)), inputs, targets)

# %% Return the outputs and the new state.
predict = lambda model, inputs, state: jax.vmap(model)(inputs)
vd = dp.value_and_direction(dp.losses.Squared(), gradient, predict)
vd.step(model, vd.init(model, jnp.zeros(2)), inputs, targets)

# %% [slow] Examples are independent for most oracles: use layers that do not mix them.
centered = lambda model, x: jax.vmap(model)(x - jnp.mean(x, 0))
direction(model=model, inputs=jnp.eye(4, 2), predict=centered, check=True)

# %% Check outside of `jax.jit`.
jax.jit(lambda inputs: direction(inputs=inputs, check=True)[0])(inputs)

# %% Models with layers that only go backward take oracles that only go backward.
backward = jax.custom_vjp(lambda x: x)
backward.defvjp(lambda x: (x, None), lambda _, g: (g,))
wide = jnp.zeros((1, 2**14))
direction(newton, {"w": wide}, wide, wide, predict=lambda p, x: backward(p["w"] + x))

# %% ### Batches and outputs

# %% Make an array of it.
direction(inputs=[1.0, 2.0])

# %% Skip an empty batch.
direction(inputs=jnp.zeros((0, 2)), targets=jnp.zeros((0, 3)))

# %% Inputs have one row for every example; for others give a `predict`.
direction(inputs=(jnp.ones((4, 2)), jnp.ones((3, 2))))

# %% Real losses are of real outputs.
direction(predict=lambda model, x: jax.vmap(model)(x) * 1j)

# %% A model returns one array, with a row for every example.
direction(predict=lambda model, x: (x, x))

# %% A model has at least one output.
direction(predict=lambda model, x: x[:, :0])

# %% The first axis of the targets is the example.
direction(targets=jnp.zeros((5, 3)))

# %% The first axis of what `predict` returns is the example.
direction(predict=lambda model, x: jax.vmap(model)(x)[:2])

# %% Begin with `state = vd.init(model)`.
vd = dp.value_and_direction(dp.losses.Squared(), gradient)
vd.step(model, None, inputs, targets)

# %% A state belongs to its model: begin anew.
warm = dp.oracles.GaussNewton(0.1, dp.oracles.CG(warm_start=0.95))
vd = dp.value_and_direction(dp.losses.Squared(), warm)
vd.step(model, vd.init(eqx.nn.Linear(2, 5, key=jax.random.key(0))), inputs, targets)

# %% Take one of the names.
dp.value_and_direction(dp.losses.Squared(), gradient, scale="newton")

# %% Losses are averaged or added.
dp.value_and_direction(dp.losses.Squared(), gradient, reduction="none")

# %% ### Oracles and their solvers

# %% A damping is positive.
dp.oracles.GaussNewton(damping=-1.0)

# %% The rate belongs to the optimizer that takes the direction.
dp.oracles.GaussNewton(learning_rate=0.1)

# %% Weights of a metric are arranged as the parameters are.
direction(dp.oracles.GaussNewton(metric={"w": 1.0}))

# %% Take the solver of the loss: the message names it.
prox = dp.oracles.ProxLinear(1.0, dp.oracles.InteriorPoint())
direction(prox)

# %% A function has no conjugate: take a loss of `dp.losses`.
absolute = lambda outputs, targets: jnp.sum(jnp.abs(outputs - targets), 1)
direction(dp.oracles.ProxLinear(1.0, dp.oracles.CoordinateAscent()), loss=absolute)

# %% Steps of Newton solve linear systems by one of these.
dp.oracles.NewtonSteps(solver=dp.oracles.DualCG())

# %% A loss is not inverted: give another rule as `seed`.
dp.oracles.MoreauBackprop(seed=dp.oracles.InverseRule())

# %% Layers that a network runs itself take neither `predict` nor `key`.
direction(dp.oracles.MoreauBackprop(), net, predict=lambda net, x: jax.vmap(net)(x))

# %% Mark the layers, or make the model a `dp.Network`.
direction(dp.oracles.TargetPropagation())

# %% Random directions need a key, another one at each call.
direction(dp.oracles.GaussNewton(solver=dp.oracles.RandomSubspace()))

# %% Take one of the names.
dp.oracles.TargetPropagation(inverse="exact")

# %% The head is a number of stages.
dp.oracles.TargetPropagation(head=-1)

# %% Only a `dp.Network` counts stages: leave `head` out.
marked = dp.rule_boundary(model)
direction(dp.oracles.TargetPropagation(head=1), marked)

# %% The head is shorter than the network.
direction(dp.oracles.TargetPropagation(head=9), net)
