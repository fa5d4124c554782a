"""Train without a learning rate.

The exact second-order step of a network is a control problem over its layers. The score
says how much of it another step reaches; and a model of the loss says how long a step
should be, so that no learning rate is left to choose.
"""

# %%
import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import diffprog as dp


try:
    from sklearn.datasets import load_digits
except ImportError:
    raise SystemExit("The digits are those of scikit-learn: pip install '.[examples]'")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default="out", help="for the picture")
parser.add_argument("--fast", action="store_true", help="a few epochs, as a test")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_enable_x64", True)
loss = dp.losses.SoftmaxCrossEntropy()


def dense(key, *sizes):
    """Dense layers with tanh between them."""
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        key, own = jr.split(key)
        layers += [eqx.nn.Linear(a, b, key=own), jnp.tanh]
    return dp.Network(layers[:-1])


# %% The exact step is a control problem
# A layer is a stage: what goes in is the state, its parameters are the control. So the
# step of a quadratic model of the loss,
#
# $$d = \operatorname{argmin}_d \; \langle g, d \rangle + \tfrac12 \langle d, (C +
# \rho I) d \rangle = -(C + \rho I)^{-1} g,$$
#
# solves a linear-quadratic problem over the layers, and the Riccati recursion finds it
# from the last layer to the first, without the matrix. This network has 52 parameters,
# so that the matrices of Gauss-Newton and Newton can be written down and solved with.
net = dense(jr.key(0), 3, 6, 4)
inputs, labels = jr.normal(jr.key(1), (20, 3)), jr.randint(jr.key(2), (20,), 0, 4)
problem, rho = dp.NetworkProblem(net, loss, labels), 0.1
flat, unravel = ravel_pytree(net.params)
outputs = lambda w: jax.vmap(net.with_params(unravel(w)))(inputs)
mean = lambda w: jnp.mean(loss(outputs(w), labels))
J, p = jax.jacobian(outputs)(flat), jax.nn.softmax(outputs(flat))
H = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
gauss_newton = jnp.einsum("mip,mij,mjq->pq", J, H, J) / len(labels)
matrices = dp.Newton(), jax.hessian(mean)(flat), dp.GaussNewton(), gauss_newton
for method, C in (matrices[:2], matrices[2:]):
    desired = -jnp.linalg.solve(C + rho * jnp.eye(len(flat)), jax.grad(mean)(flat))
    exact = dp.layerwise_lqr(
        problem, inputs, net.params, method, damping=rho, throw=False
    )
    error = jnp.max(jnp.abs(ravel_pytree(exact.step)[0] - desired))
    assert error < 1e-10
    print(
        f"{type(method).__name__:12} equal to 1e-10, "
        f"{exact.num_negative} negative eigenvalues of {len(flat)}"
    )

# Newton's matrix has negative eigenvalues, so its step leads to no minimum of the model,
# and without `throw=False` the call would say so. Gauss-Newton has none, ever, for a
# loss that is convex in the outputs.

# %% The score
# On larger networks the exact step is too dear, and others stand in for it. The *score*
# of a step is the share of the best decrease of the model that it reaches: 1 for the
# exact step, below 0 for a step that raises the model. On digits, for a first batch, and
# on another one:
images, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(digits))
images, digits = jnp.asarray(images[order] / 16), jnp.asarray(digits[order])
start = dense(jr.key(3), 64, 64, 10)
curvature, rho, size, n = dp.optim.ggn(loss), 0.01, 128, 1280
own, other = (
    curvature(start, images[i : i + size], digits[i : i + size]) for i in (0, size)
)
model = own.linearize()
gradient = model.gradient
slope = optax.tree.vdot(gradient, gradient)
bend = 2 * (model.change(gradient) - slope)
scaled = lambda length: jax.tree.map(lambda g: -length * g, gradient)
vd = dp.value_and_direction(loss, dp.oracles.GaussNewton(rho, dp.oracles.CG(10, 0.0)))
_, direction = vd(start, images[:size], digits[:size])
steps = {
    "gradient": scaled(1.0),
    "gradient, best length": scaled(slope / bend),
    "gradient, ten times that": scaled(10 * slope / bend),
    "Gauss-Newton, 10 products": jax.tree.map(
        jnp.negative, eqx.filter(direction, eqx.is_inexact_array)
    ),
}
scores = [dp.optim.score(batch, steps, rho) for batch in (own, other)]
print("score of a step            own batch  another")
for name in steps:
    print(f"{name:26}", *(f"{score[name]:9.2f}" for score in scores))

# A length that is too long undoes everything, and the best one costs a single product
# with the Jacobian. That is what `model_step` does for any optimizer of optax.


# %% Training without a learning rate
# [`dp.optim.recommended`][diffprog.optim.recommended] takes the Kronecker factors of the
# curvature for the direction, and the length that the model asks for. Its `update` is
# given the curvature of the batch; nothing else is new. Adam has five rates to choose
# from, and the same loop.
@eqx.filter_jit
def train(optimizer, rate, num_epochs):
    params, rest = eqx.partition(start, eqx.is_inexact_array)

    def losses(params, rows):
        outputs = jax.vmap(eqx.combine(params, rest))(images[rows])
        return loss(outputs, digits[rows]), jnp.argmax(outputs, 1) == digits[rows]

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(lambda params: jnp.mean(losses(params, rows)[0]))(params)
        at = curvature(eqx.combine(params, rest), images[rows], digits[rows])
        updates, state = optimizer.update(grads, state, params, curvature=at)
        params = jax.tree.map(lambda w, u: w + rate * u, params, updates)
        return (params, state), None

    def epoch(carry, key):
        rows = jr.permutation(key, n).reshape(-1, size)
        carry, _ = jax.lax.scan(step, carry, rows)
        found, right = losses(carry[0], jnp.arange(len(digits)))
        return carry, (jnp.mean(found[:n]), jnp.mean(right[n:]))

    keys = jr.split(jr.key(4), num_epochs)
    return jax.lax.scan(epoch, (params, optimizer.init(params)), keys)[1]


adam = optax.with_extra_args_support(optax.adam(1.0))
runs = {"no rate": (dp.optim.recommended(), 1.0)}
runs |= {f"Adam, {rate}": (adam, rate) for rate in (0.001, 0.003, 0.01, 0.03, 0.1)}
curves, num_epochs = {}, 3 if args.fast else 20
print("             training loss  right of the unseen  s of computing")
for name, (optimizer, rate) in runs.items():
    run = optimizer, jnp.asarray(rate), num_epochs
    jax.block_until_ready(train(*run))  # compiles
    begin = time.process_time()
    curves[name], right = map(np.asarray, train(*run))
    seconds = time.process_time() - begin
    print(f"{name:12}{curves[name][-1]:14.1e}{100 * right[-1]:19.1f} %{seconds:13.2f}")

# No rate was chosen, and the loss is below that of every Adam. A step costs more, as the
# last column says: [seven networks](../benchmarks-training.md) tell where that pays.

# %% What is seen
figure = Figure(figsize=(8, 4), layout="constrained")
axis = figure.subplots()
for name, losses in curves.items():
    style = {"color": "k", "linewidth": 2} if name == "no rate" else {}
    axis.semilogy(np.arange(1, num_epochs + 1), losses, label=name, **style)
axis.set(xlabel="epoch", ylabel="training loss")
axis.legend(frameon=False)
figure.savefig(args.out / "layerwise_lqr.png", dpi=110)

# ![Training losses of Adam with five rates, and of no rate](layerwise_lqr.png)

# %% What must hold, and what to change next
# Take `dp.optim.model_step(optax.adam(1.0))`, to have the lengths of the model in an
# optimizer that you know, or `recommended(kfac=False)` for any model of Equinox or Flax:
# [the page](../optim/index.md) has their loops.
if not args.fast:
    assert scores[0]["Gauss-Newton, 10 products"] > 0.95
    assert scores[0]["gradient, ten times that"] < 0
    assert 2 * curves["no rate"][-1] < min(
        losses[-1] for name, losses in curves.items() if name != "no rate"
    )
assert all(losses[-1] < losses[0] for losses in curves.values())
