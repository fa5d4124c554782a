"""Moreau gradients on a pendulum.

The swing-up by gradient descent and by Moreau-gradient descent, with all step sizes at
once: where a small problem at every stage helps, and where it does not.
"""

# %%
# A gradient goes back through a stage as if the stage were affine. The Moreau rule asks
# the stage itself, at the place to which it would be moved: a small problem at each.
import argparse

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp


try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="short horizons, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)
HORIZONS = (10, 15) if args.fast else (50, 100)
NUM_STEPS = 5 if args.fast else 50
ALPHA = 1 / 8  # of 1/128, 1/64, ..., 1/2: larger ones fail, smaller ones are gradients
STEPS = 2.0 ** np.arange(-1, 6, 0.5 if args.fast else 0.25)

# %% The problem and the methods
# The pendulum hangs at rest, and the torque at its pivot shall have it upright at the
# end. There is no cost on the way but 1e-6 times the squared torque. Both methods take
# fixed steps, tried in the same sizes. In Moreau-gradient descent alpha is inside the
# envelopes; the search multiplies what comes out.
pendulum = dp.systems.Pendulum(dt=0.05)
METHODS = {
    "gradient": (dp.Gradient(), 1.0),
    "Moreau": (dp.MoreauGradient(ALPHA, dp.oracles.InnerGradient(3)), ALPHA),
}


def descend(method, horizon, stepsize):
    """The cost before every step, and the best trajectory."""
    solution = dp.solve(
        dp.ControlProblem.from_system(pendulum, horizon),
        method,
        pendulum.x0,
        jnp.zeros((horizon, 1)),
        dp.FixedStep(stepsize),
        max_steps=NUM_STEPS,
        throw=False,
    )
    return solution.history["cost"], solution.xs


# %% All step sizes at once
# A solve under `jax.vmap` is as many solves. The best step size is that of the lowest
# final cost among those with which the cost never rises by more than a percent.
print("horizon  method    step size  final cost    with a step 1.41 times as long")
found = {}
for horizon in HORIZONS:
    for name, (method, unit) in METHODS.items():
        run = jax.jit(jax.vmap(lambda s: descend(method, horizon, s)))
        costs, xs = map(np.asarray, run(jnp.asarray(STEPS / unit)))
        smooth = np.all(np.diff(costs, axis=1) < 1e-2 * costs[:, :-1], axis=1)
        best = np.argmin(np.where(smooth, costs[:, -1], np.inf))
        longer = costs[np.argmin(abs(STEPS - STEPS[best] * np.sqrt(2)))]
        found[horizon, name] = costs[best], longer, xs[best]
        print(
            f"{horizon:7}  {name:8} {STEPS[best]:10.2f} {costs[best, -1]:11.4f}"
            f"    largest rise {np.max(np.diff(longer)):.3g}"
        )

# Over 100 stages the Moreau gradient allows longer steps and comes further; over 50 it
# gains nothing. Both rise with steps that are too long, the Moreau gradient more.

# %% What is seen
figure = Figure(figsize=(12, 3.6), layout="constrained")
axes = figure.subplots(1, 3)
for ax, horizon in zip(axes, HORIZONS):
    for name, color in (("gradient", "C0"), ("Moreau", "C1")):
        best, longer, _ = found[horizon, name]
        ax.semilogy(best, color=color, lw=2, label=f"{name}, best step")
        ax.semilogy(longer, color=color, lw=0.8, ls=":", label="1.41 times as long")
    ax.set(title=f"{horizon} stages", xlabel="iteration", ylabel="cost")
    ax.set_ylim(0.03, 30)
axes[0].legend(frameon=False, fontsize=8)
for name, color in (("gradient", "C0"), ("Moreau", "C1")):
    angles = found[HORIZONS[-1], name][2][:, 0]
    axes[2].plot(pendulum.dt * np.arange(len(angles)), angles, color=color, label=name)
axes[2].axhline(np.pi, color="gray", lw=0.8, ls="--")
axes[2].set(title="the swing", xlabel="time [s]", ylabel="angle [rad]")
axes[2].legend(frameon=False, fontsize=8)
figure.savefig(args.out / "moreau_pendulum.png", dpi=120)

# ![Cost against iteration, and the swing](moreau_pendulum.png)

# %% What must hold, and what to change next
# Set `ALPHA` to 1/4: the small problems are no longer convex, and it fails. Or take
# `dp.DDP()`, as [the first tutorial](pendulum.md) does. In networks the rule is an
# [oracle](../oracles/moreau.md). Here both come down smoothly, and over the long
# horizon Moreau-gradient descent takes longer steps, and comes further.
for best, _, _ in found.values():
    assert np.all(np.diff(best) < 1e-2 * best[:-1]) and best[-1] < 0.9 * best[0]
if not args.fast:
    last = {key: best[-1] for key, (best, _, _) in found.items()}
    assert last[50, "gradient"] < 0.07 and last[50, "Moreau"] < 0.07
    assert last[100, "Moreau"] < 0.8 * last[100, "gradient"] < 0.12
