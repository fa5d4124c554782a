"""The exact step of a network is a control problem.

Gauss-Newton's and Newton's step for all parameters, by a Riccati recursion over the
layers, and a score that says how much of it a cheaper step reaches.
"""

# %%
# A second-order step asks for a matrix as large as the parameters squared. Its inverse
# is never needed: a network is a chain, and a chain has a recursion.
import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree

import diffprog as dp


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="fewer lengths, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% A network small enough to check
# Four classes of points in space, and a network 3-6-4 with tanh: 52 parameters, so that
# the matrices of Gauss-Newton and Newton can be written down.
keys = jr.split(jr.key(0), 4)
layers = eqx.nn.Linear(3, 6, key=keys[0]), jnp.tanh, eqx.nn.Linear(6, 4, key=keys[1])
net, loss = dp.Network(layers), dp.losses.SoftmaxCrossEntropy()
points = jr.normal(keys[2], (2, 40, 3))
classes = jnp.argmax(points @ jr.normal(keys[3], (3, 4)), -1)
(inputs, other), (labels, other_labels) = points, classes
flat, unravel = ravel_pytree(net.params)


def outputs(flat):
    return jax.vmap(net.with_params(unravel(flat)))(inputs)


def mean_loss(flat):
    return jnp.mean(loss(outputs(flat), labels))


J, p = jax.jacobian(outputs)(flat), jax.nn.softmax(outputs(flat))
H = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None]
matrices = {
    dp.Newton(): jax.hessian(mean_loss)(flat),
    dp.GaussNewton(): jnp.einsum("mip,mij,mjq->pq", J, H, J) / len(labels),
}

# %% The same step, layer by layer
# A layer is a stage of a control problem,
# [`dp.NetworkProblem`][diffprog.NetworkProblem]: what goes in is the state, the
# parameters are the control. The step of its quadratic model is
#
# $$d = \operatorname{argmin}_d \; J(d) = -(C + \rho I)^{-1} g, \quad
# J(d) = \langle g, d \rangle + \tfrac12 \langle d, (C + \rho I) d \rangle,$$
#
# which [`dp.layerwise_lqr`][diffprog.layerwise_lqr] finds from the last layer to the
# first, one block at a time. Each block also tells its eigenvalues' signs.
problem, rho, gradient = dp.NetworkProblem(net, loss, labels), 0.02, jax.grad(mean_loss)
print(" " * 12, "equal to the dense step    negative eigenvalues    J of the step")
for method, C in matrices.items():
    dense = -jnp.linalg.solve(C + rho * jnp.eye(len(flat)), gradient(flat))
    exact = dp.layerwise_lqr(
        problem, inputs, net.params, method, damping=rho, throw=False
    )
    error = jnp.max(jnp.abs(ravel_pytree(exact.step)[0] - dense))
    assert error < 1e-10
    text = f"{type(method).__name__:12} {str(error < 1e-10):>23}"
    print(f"{text} {exact.num_negative:12} of {len(flat)} {exact.value:16.4f}")

# Newton's matrix has negative eigenvalues, so its step leads to a saddle of the model,
# and without `throw=False` the call would raise an error that says so. Gauss-Newton's
# has none, whatever the parameters are, where the loss is convex in the outputs.

# %% The score
# The exact step is for small networks. How good is another? Its *score* is
# $J(d) / \min J$, the share of the best decrease of the model: 1 for the exact step,
# below 0 for a step that raises the model. A curvature is a recipe,
# [`dp.optim.ggn`][diffprog.optim.ggn] here, and a batch.
curvature = dp.optim.ggn(loss, lambda params, x: jax.vmap(net.with_params(params))(x))
own = curvature(net.params, inputs, labels)
g = unravel(gradient(flat))
steps = {"gradient": g, "signs, as in Adam": jax.tree.map(jnp.sign, g)}
steps = {name: jax.tree.map(jnp.negative, step) for name, step in steps.items()}
steps["Gauss-Newton"] = exact.step
for name, score in dp.optim.score(own, steps, rho, value=exact.value).items():
    print(f"{name:18} {score:10.3f}")

# As they are, the gradient has a third of the decrease, and the signs raise the model.

# %% All lengths
# A step has a direction and a length, and the best length needs one product with the
# Jacobian,
#
# $$t = -\frac{\langle g, d \rangle}{\langle d, (C + \rho I) d \rangle}.$$
#
# Here are all, judged by the batch that made the step, and by another one.
lengths = jnp.logspace(-2, 2, 9 if args.fast else 81)
batches = own, curvature(net.params, other, other_labels)
curves = {}
for name, step in steps.items():
    for batch in batches:
        score = lambda t: dp.optim.score(
            batch, jax.tree.map(lambda a: t * a, step), rho
        )
        curves.setdefault(name, []).append(np.asarray(jax.vmap(score)(lengths)))
    best = [max(curve) for curve in curves[name]]
    print(f"{name:18} {best[0]:.2f} of its batch, {best[1]:.2f} of another")

# %% What is seen
figure = Figure(figsize=(8, 4), layout="constrained")
axis = figure.subplots()
for color, (name, (mine, others)) in enumerate(curves.items()):
    axis.semilogx(lengths, mine, f"C{color}", label=name)
    axis.semilogx(lengths, others, f"C{color}--")
axis.axhline(0, color="gray", linewidth=0.8)
axis.set(xlabel="length of the step", ylabel="score", ylim=(-0.5, 1.05))
axis.legend(frameon=False, title="dashed: on another batch")
figure.savefig(args.out / "layerwise_lqr.png", dpi=110)

# ![Scores of three steps against their length](layerwise_lqr.png)
#
# A step that is twice as long as the best one changes nothing, and longer ones do harm:
# that is what a learning rate decides, and what the model knows.

# %% What must hold, and what to change next
# Change `rho`, or the number of examples, and look at the dashed curve of Gauss-Newton:
# with few examples and little damping the exact step fits its batch alone. Then
# [train without a learning rate](no_learning_rate.md), by the lengths of the model.
scores = dp.optim.score(own, steps, rho)
assert abs(scores["Gauss-Newton"] - 1) < 1e-8 and exact.num_negative == 0
assert all(max(mine) <= 1 + 1e-8 for mine, _ in curves.values())
