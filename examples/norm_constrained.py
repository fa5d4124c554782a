"""Say the limit, not a weight.

A constraint in learning: two numbers first, then a classifier whose weights have at
most the norm 1. Training finds the multiplier, which is the price of the limit.
"""

# %%
# A penalty asks for a weight, and the weight decides what comes out. A limit says what
# shall come out, and training finds the weight.
import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffprog as dp


try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_breast_cancer
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="few steps, as a test")
args = parser.parse_args()


# %% Two numbers
# Of all x with x1 + x2 = 1 the one closest to the origin. A function returns the loss,
# and what is limited, by name. `step` of the Lagrangian returns the gradient for x, and
# moves the multiplier, which rises while the limit is violated.
def closest(x):
    return x @ x, {"sum": dp.constrained.equal(x[0] + x[1], 1.0)}


lagrangian = dp.constrained.Lagrangian(closest, dp.constrained.Ascent(0.5))
x = jnp.zeros(2)
duals = lagrangian.init(x)
for _ in range(100):
    _, slope, duals = lagrangian.step(x, duals)
    x = x - 0.1 * slope
print("x =", x.round(4), " multiplier =", duals["sum"].value.round(4))
assert jnp.allclose(x, 0.5, atol=1e-5)
assert jnp.allclose(duals["sum"].value, -1.0, atol=1e-5)

# %% The same with data
# A logistic regression whose weights have at most the norm 1, for the tumors of 569
# people by 30 measurements each.
steps = 100 if args.fast else 600
data, healthy = load_breast_cancer(return_X_y=True)
inputs = jnp.asarray((data - data.mean(0)) / data.std(0), jnp.float32)
sign = jnp.asarray(np.where(healthy, -1, 1), jnp.float32)


def measure(params, inputs, sign):
    w, b = params
    loss = jnp.mean(jax.nn.softplus(-sign * (inputs @ w + b)))
    return loss, {"norm": dp.constrained.at_most(w @ w, 1.0)}


# %% How the multiplier moves
# That is the *dual*. [`Ascent`][diffprog.constrained.Ascent] adds the violation at each
# step, [`PI`][diffprog.constrained.PI] looks at its change as well, and a penalty, for
# comparison, has a fixed weight. The loop is that of any training: `lagrangian.step`
# stands where `value_and_grad` would.
tx = optax.adam(0.02)
first = jnp.zeros(30), jnp.zeros(())


@jax.jit
def train(dual):
    lagrangian = dp.constrained.Lagrangian(measure, dual)

    def step(carry, _):
        params, state, duals = carry
        (loss, report), grads, duals = lagrangian.step(params, duals, inputs, sign)
        updates, state = tx.update(grads, state)
        seen = loss, report.violations["norm"], report.multipliers["norm"]
        return (optax.apply_updates(params, updates), state, duals), seen

    carry = first, tx.init(first), lagrangian.init(first, inputs, sign)
    (params, _, _), history = jax.lax.scan(step, carry, length=steps)
    return params, history


runs = {
    "ascent": dp.constrained.Ascent(0.03),
    "PI": dp.constrained.PI(0.03, gain=0.5),
    "penalty 0.1": dp.constrained.Penalty(0.1),
}
histories = {name: train(dual)[1] for name, dual in runs.items()}

# %% What comes out
# Beside them the solution, by the method of multipliers with full minimizations.
exact = dp.constrained.minimize(
    dp.constrained.Lagrangian(measure, dp.constrained.Augmented(10.0)),
    first,
    inputs,
    sign,
)
price = float(exact.multipliers["norm"])
print(f"{'':12} loss     norm^2 - 1  multiplier")
for name, (loss, excess, m) in histories.items():
    print(f"{name:12} {loss[-1]:.5f}  {excess[-1]:10.5f}  {m[-1]:.5f}")
print(
    f"{'minimize':12} {exact.loss:.5f}  {exact.report.feasibility:10.5f}  {price:.5f}"
)

# The multiplier 0.066 is the price: so much less loss for one unit more of the squared
# norm. Ascent pushes while the limit is violated and lets go too late; together with
# Adam it swings forever. `PI` brakes as soon as the violation falls, and ends where
# `minimize` does. A penalty settles at once, and outside.

# %% What is seen
figure = Figure((10.0, 3.2), layout="constrained")
axes = figure.subplots(1, 3)
titles = "loss", "violation: |w|^2 - 1", "multiplier"
for axis, title, place, goal in zip(
    axes, titles, range(3), (exact.loss, 0, price), strict=True
):
    axis.axhline(goal, color="0.35", linewidth=1.0, linestyle="--")
    for name, history in histories.items():
        axis.plot(history[place], label=name)
    axis.set(xlabel="step", title=title)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
figure.savefig(args.out / "norm_constrained.png", dpi=110)

# ![Loss, violation and multiplier against the step](norm_constrained.png)
#
# Dashed is the solution.

# %% What must hold, and what to change next
# Change the limit, and look how the price follows; add a second limit to the dict. Then
# limit [a rate](rates.md), or the loss of every example.
# [All duals](../constrained-learning.md) have a page.
if not args.fast:
    loss, excess, m = (float(values[-1]) for values in histories["PI"])
    assert abs(loss / float(exact.loss) - 1) < 1e-3
    assert abs(excess) < 1e-3 and abs(m / price - 1) < 0.01
    assert histories["penalty 0.1"][1][-1] > 0.05, "a penalty does not keep a limit"
