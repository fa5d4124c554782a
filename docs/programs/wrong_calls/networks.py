"""Networks and layers.

`net` is `dp.Network((eqx.nn.Linear(3, 4, ...), jnp.tanh, eqx.nn.Linear(4, 2, ...)))`,
`training` is `dp.NetworkProblem(net, dp.losses.Squared(), targets)`, and there are six
inputs of three numbers.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import diffprog as dp


keys = jax.random.split(jax.random.key(0), 8)
net = dp.Network((
    eqx.nn.Linear(3, 4, key=keys[0]), jnp.tanh, eqx.nn.Linear(4, 2, key=keys[1])
))  # fmt: skip
inputs, targets = jnp.ones((6, 3)), jnp.zeros((6, 2))
training = dp.NetworkProblem(net, dp.losses.Squared(), targets)
layer = eqx.nn.Linear(2, 2, key=keys[2])


def layerwise(method=dp.GaussNewton(), problem=training, params=net.params, **options):
    return dp.layerwise_lqr(problem, inputs, params, method, **options)


# %% ### `dp.Network` and `dp.NetworkProblem`

# %% Layers are a tuple, or an `eqx.nn.Sequential`.
dp.Network(layer)

# %% A layer is called with one array: give a module, or a function such as `jnp.tanh`.
dp.Network((layer, 3.0))

# %% Layers with running means are trained by `dp.value_and_direction`, which hands
# their state on.
dp.Network((layer, eqx.nn.BatchNorm(2, "batch", mode="ema")))

# %% Give at least one layer with parameters.
dp.Network((jnp.tanh,))

# %% [slow] Equal layers run in a loop, which keeps the shape; `stack=False` writes them
# out.
halve = [eqx.nn.Conv1d(1, 1, 2, stride=2, key=key) for key in keys[:4]]
dp.Network(halve)(jnp.ones((1, 16)))

# %% Parameters come as a tuple like `net.params`.
net.with_params(net.params[:1])

# %% Give `net.params` as the controls.
dp.direction(training, dp.GaussNewton(), inputs, net)

# %% A metric counts the stages of the network from 0.
euclidean = lambda reference, outputs: jnp.sum((outputs - reference) ** 2, -1)
metric = dp.StageMetric(7, euclidean)
dp.NetworkProblem(net, dp.losses.Squared(), targets, metric=metric)

# %% The number of a stage is an int.
dp.StageMetric(1.0, lambda reference, outputs: 0.0)

# %% Count from the first stage, 0.
dp.StageMetric(-1, lambda reference, outputs: 0.0)

# %% A metric returns one number for every example.
total = lambda reference, outputs: jnp.sum(outputs)
metric = dp.NetworkProblem(net, dp.losses.Squared(), targets, metric=total)
layerwise(problem=metric)

# %% Leave one of the names, or give a function that draws the matrix.
dp.RNNCell(3, 4, key=keys[0], init="zeros")

# %% [slow] A cell sees one example at one time.
dp.RNNCell(3, 4, key=keys[0])(jnp.ones(2), jnp.ones(4))

# %% [slow] Give the number of hidden units, or the state to begin with.
dp.Recurrent(dp.RNNCell(3, 4, key=keys[0]), "zeros")

# %% A recurrent network takes one sequence; `jax.vmap` is for many.
dp.Recurrent(dp.RNNCell(3, 4, key=keys[0]), 4)(jnp.ones(()))

# %% A cell returns a state like the one that it was given.
dp.Recurrent(lambda h, x: (h[:1], x), 4)(jnp.ones((5, 3)))

# %% ### `dp.layerwise_lqr`

# %% Take `dp.direction` for other methods.
layerwise(dp.Gradient())

# %% Leave `riccati` out.
layerwise(dp.GaussNewton(dp.ParallelRiccati()))

# %% Take one of the names.
layerwise(form="dual")

# %% Newton's method runs over the stages: leave `form` out.
layerwise(dp.Newton(), form="information")

# %% A damping is at least 0.
layerwise(damping=-1.0)

# %% In the span of the inputs the damping is needed: give a positive one.
layerwise(form="information", damping=0.0)

# %% Give `net.params`.
layerwise(params=net)

# %% [slow] Parameters have the shapes of those of the network.
layerwise(params=jax.tree.map(lambda a: a[:1], net.params))

# %% [slow] Leave `form` out for other layers.
conv = dp.Network((eqx.nn.Conv1d(1, 1, 2, key=keys[0]), jnp.ravel))
other = dp.NetworkProblem(conv, dp.losses.Squared(), targets)
layerwise(problem=other, params=conv.params, form="information", damping=1.0)

# %% Leave `form` out where the outputs are a tree.
pair = dp.Network((layer, lambda x: (x, x)))
loss = lambda outputs, targets: jnp.sum(outputs[0] ** 2, -1)
other = dp.NetworkProblem(pair, loss, targets)
options = dict(form="information", damping=1.0)
dp.layerwise_lqr(other, jnp.ones((6, 2)), pair.params, **options)

# %% ### Bounds of networks

# %% Constants are upper bounds, from 0 to infinity.
dp.LayerConstants((-1.0, 0.0), (0.0, 0.0, 0.0))

# %% The width of the rounding is positive.
dp.SmoothRelu(0.0)

# %% Bounds are those of a network that does not draw.
dp.smoothness(dp.Network((layer, eqx.nn.Dropout())), input_norm=1.0)

# %% Say what is known of a layer of one's own by `rules`.
dp.smoothness(dp.Network((layer, lambda x: x**2)), input_norm=1.0)

# %% A rule returns `dp.LayerConstants`.
square = lambda x: x**2
dp.smoothness(
    dp.Network((layer, square)), input_norm=1.0, rules={square: lambda *_: 1.0}
)

# %% The accuracy of the smoothing is positive.
dp.smooth_relus(dp.Network((layer, jax.nn.relu)), 0.0, input_norm=1.0)

# %% Derivatives are taken of floating arrays.
dp.jacobian_norm(lambda p: p, jnp.arange(3), key=keys[0])

# %% Look at the sizes of the layers, or at `input_shape`.
dp.smoothness(dp.Network((layer,)), input_norm=1.0, input_shape=(5,))

# %% A norm is at least 0.
dp.smoothness(net, input_norm=-1.0)

# %% Give one radius, or one for each layer with parameters.
dp.smoothness(net, jnp.ones(3), input_norm=1.0)

# %% Say the shape of one input.
conv = dp.Network((eqx.nn.Conv1d(1, 1, 2, key=keys[0]), jnp.ravel))
dp.smoothness(conv, input_norm=1.0)
