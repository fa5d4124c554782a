"""Five directions on one problem.

One problem, one first guess, and five rules that flow backward through it: gradient,
Gauss-Newton, Newton, iLQR and DDP. What each of them knows shows in iterations and in
seconds.
"""

# %%
import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a short horizon, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% One problem
# The pendulum of [the first tutorial](pendulum.md), with more friction, and stages by
# the rule of Runge and Kutta. A direction sees only what the chain shows: dynamics
# $x_{t+1} = f(x_t, u_t)$, and costs.
horizon, most = (20, 60) if args.fast else (50, 300)
pendulum = dp.systems.Pendulum(dt=0.05, control_weight=1e-4, friction=0.1, method="rk4")
problem = dp.ControlProblem.from_system(pendulum, horizon)
us = jnp.full((horizon, 1), 0.1)

# %% Five rules
# Each is the same three moves: expand the chain around the current states, send one
# message backward through the stages, roll out. They differ in what is expanded and in
# how they roll out:
#
# - `Gradient` takes both dynamics and costs as linear; the message is a vector.
# - `GaussNewton` takes the dynamics as linear and the costs as quadratic. The message
#   is a quadratic function, of a Riccati recursion. It steps along the linear model.
# - `Newton` has the curvature of the dynamics, too, weighted by the adjoint states.
# - `ILQR` is Gauss-Newton that rolls out the true dynamics, with feedback.
# - `DDP` has the curvature of the dynamics, weighted by the gradient of the value, and
#   rolls out the true dynamics.
#
# A search, backtracking here, decides how long a step is. The first call compiles; the
# shortest of five more shows what the computing takes.
solutions, seconds = {}, {}
print(f"{'':12} {'iterations':>10} {'cost':>10} {'later':>10}  result")
for method in (dp.Gradient(), dp.GaussNewton(), dp.Newton(), dp.ILQR(), dp.DDP()):
    times = []
    for _ in range(6):
        start = time.perf_counter()
        found = dp.solve(problem, method, pendulum.x0, us, max_steps=most, throw=False)
        jax.block_until_ready(found)
        times.append(time.perf_counter() - start)
    took = min(times[1:])
    name = type(method).__name__
    solutions[name], seconds[name] = found, took
    steps, result = int(found.stats["num_steps"]), repr(found).split()[1]
    print(f"{name:12} {steps:10d} {found.cost:10.6f} {1e3 * took:7.2f} ms  {result}")

# Four of them end at the same cost. The gradient is on its way: nothing tells it that
# torques of early stages and of late ones act on each other, and its steps are as short
# as the stiffest of them asks for. That its iterations are the cheapest does not help.
#
# This run shared its core with other programs; alone on one the times were 3.2, 1.3,
# 1.8, 1.0 and 1.1 ms.

# %% What is seen
# Iterations on the left, time on the right: each curve on the left is stretched by how
# long an iteration of its rule takes.
figure = Figure((11.0, 4.2), layout="constrained")
left, right = figure.subplots(1, 2, sharey=True)
best = min(float(found.cost) for found in solutions.values())
plot.convergence(solutions, best=best, ax=left)
left.set(xlim=(0, 45))
left.get_legend().remove()
for name, found in solutions.items():
    steps = int(found.stats["num_steps"])
    above = np.maximum(np.asarray(found.history["cost"])[: steps + 1] - best, 1e-16)
    right.semilogy(
        1e3 * seconds[name] * np.arange(steps + 1) / max(steps, 1), above, label=name
    )
right.set(xlabel="time [ms]", xlim=(0, 2e3 * seconds["Newton"]), ylim=(1e-12, None))
right.grid(True, color="0.9", linewidth=0.8)
right.legend(frameon=False)
figure.savefig(args.out / "five_directions.png", dpi=110)

# Gauss-Newton and iLQR have the same model, and the true dynamics with feedback lead
# further than the linear ones: 23 iterations instead of 27. At the end both lines are
# straight, which is linear convergence. Newton and DDP fall off: the number of right
# digits doubles. But far from the solution Newton's model is often indefinite, and
# damping shortens its steps; DDP weighs the same curvature by the gradient of a value
# that knows what feedback will do. An iteration of DDP takes longer than one of iLQR,
# for its second derivatives, and here it needs half as many.
#
# ![Cost above the best, against iterations and against time, for five
# directions](five_directions.png)

# %% What must hold, and what to change next
# No iteration that is accepted raises the cost: that is what a search promises.
#
# - A step by itself is [`dp.direction`][diffprog.direction]; here `dp.GaussNewton()`
#   and `dp.ILQR()` begin with the same slope.
# - `search=dp.AdaptiveDamping()` shortens steps by damping alone.
# - Write a [direction of your own](../extending.md): three methods.
# - [How to choose](../how-to-choose.md) measures six larger problems.
ilqr, ddp = solutions["ILQR"], solutions["DDP"]
assert ilqr.success and ddp.success and np.isclose(ilqr.cost, ddp.cost, rtol=1e-6)
assert ddp.stats["num_steps"] < ilqr.stats["num_steps"]
for name, found in solutions.items():
    costs = found.history["cost"][: int(found.stats["num_steps"]) + 1]
    assert np.all(np.diff(costs) <= 1e-12), f"{name} goes up"
