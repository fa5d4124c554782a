"""Rotations: a flip and a slit.

A quadrotor, 50 cm wide, flips over and flies through a slit of 24 cm. Its attitude is a
unit quaternion: there is nothing special about flying upside down.
"""

# %%
import argparse

import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog.manifolds import UnitQuaternion


try:
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'diffprog[examples]'") from None

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="few frames, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)

# %% Attitudes are a manifold
# The state has position [m], attitude q, velocity [m/s] and rates [rad/s]: 13 numbers.
# Four are those of q, but attitudes have three dimensions: q + dq is none of them, and
# q and -q are the same. A manifold says how to get from one to another, by a rotation
# vector. With it each iterate has unit quaternions, and the gains, the gaps and the
# error at the goal have 12 entries.
#
# Each rotor pushes with a quarter to seven quarters of its share of the weight. No
# reference says that the quadrotor tilts in the slit: points of its rim must be free,
# in an hourglass around the slit, smooth and as narrow as it has to be at the wall
# only.
quad = dp.systems.QuaternionQuadrotor(dt=0.03)
share = quad.mass * quad.gravity / 4  # of the weight that a rotor carries [N]
horizon, wall, half_slit, radius = 80, 3.0, 0.12, 0.25  # [m], rotors included
t = quad.dt * np.arange(horizon + 1)
circle = np.exp(2j * np.pi * np.linspace(0.0, 1.0, 65))
rim = radius * np.stack([circle.real, circle.imag, 0 * circle.real], axis=1)
x0 = jnp.zeros(13).at[3].set(1.0)
goal = x0.at[0].set(4.0)
smooth_step = lambda s: s - jnp.sin(2 * jnp.pi * s) / (2 * jnp.pi)


def rim_of(x):  # in the frame of the world
    cross = jnp.cross(x[None, 4:7], rim)
    return x[:3] + rim + 2 * (x[3] * cross + jnp.cross(x[None, 4:7], cross))


def flip(t):  # about the pitch axis, from q to -q, which is the same attitude
    half = jnp.pi * smooth_step(jnp.clip((t - 0.3) / 0.9, 0, 1))
    return jnp.stack([jnp.cos(half), 0.0, jnp.sin(half), 0.0])


def cost(x, u, t):
    time = quad.dt * t
    turn = jnp.sum(UnitQuaternion().difference(x[3:7], flip(time)) ** 2)
    speeds = 0.02 * jnp.sum(x[7:10] ** 2) + 0.01 * jnp.sum(x[10:] ** 2)
    effort = jnp.sum(u**2) / 2 + jnp.sum(x[1:3] ** 2) / 2
    flips = (time > 0.3) & (time < 1.2)
    return quad.dt / 2 * (jnp.where(flips, turn, 0.0) + speeds + effort)


def touching(x, *_):  # at most 0 where 16 points of the rim are free
    # An hourglass, 1 cm less than the slit: stages are up to 9 cm apart.
    ahead, side = rim_of(x)[:64:4, :2].T
    return side**2 - (half_slit - 0.01) ** 2 - (ahead - wall) ** 2


arrive = dp.Equality(lambda x: quad.manifold.difference(x, goal), name="arrive")
problem = dp.ControlProblem(
    *(quad.dynamics, cost, lambda x: 0 * x[0], horizon),
    control_bounds=(-0.75 * share, 0.75 * share),
    constraints=dp.Inequality(touching, name="wall"),
    terminal_constraints=arrive,
    manifold=quad.manifold,
)

# %% The solve
# The first guess is [one of states](../starting-from-states.md): straight to the goal,
# and over on the way. We know no controls that fly so. The solve closes the gaps
# between the states.
way = 4 * smooth_step(t / t[-1])
guess = jnp.zeros((horizon + 1, 13)).at[:, 3:7].set(jax.vmap(flip)(t))
guess = guess.at[:, 0].set(way).at[:-1, 7].set(jnp.diff(way) / quad.dt)
solution = dp.solve(problem, dp.DDP(), x0, jnp.zeros((horizon, 4)), xs=guess)
print(solution)
xs, pushes = np.asarray(solution.xs), np.asarray(solution.us) + share
rims = np.asarray(jax.jit(jax.vmap(rim_of))(xs))
ups = 1 - 2 * np.sum(xs[:, 4:6] ** 2, axis=1)
tilt, norms = np.degrees(np.arccos(ups.clip(-1, 1))), np.linalg.norm(xs[:, 3:7], axis=1)
middle = np.argmin(abs(xs[:, 0] - wall))
print(f"tilt: up to {tilt.max():.0f} degrees, {tilt[middle]:.0f} in the slit")


# %% What it looks like
# The flight from the side and from above, with the first arm in red and the push of
# each rotor in orange.
def scene(figure):
    axes = figure.subplots(2, height_ratios=[1.4, 1.1])
    for ax, name, i in zip(axes, ("z [m]", "y [m]"), (2, 1)):
        ax.set(aspect="equal", xlim=(-0.35, 4.35), ylim=(-0.55, 0.55), ylabel=name)
        ax.plot(*xs[:, [0, i]].T, color="0.6", lw=0.8)
    axes[0].set_ylim(-0.4, 1.0)
    axes[0].axvline(wall, color="0.7", lw=4)
    axes[1].vlines([wall, wall], [-0.55, half_slit], [-half_slit, 0.55], "0.4", lw=4)
    return axes


def draw(axes, i):
    parts, arms = [], 0.7 * (rims[i, :64:16] - xs[i, :3])
    up = 0.1 * np.cross(arms[0], arms[1]) / np.sum(arms[0] ** 2) / share
    for ax, pair in zip(axes, ([0, 2], [0, 1])):
        parts += ax.fill(*rims[i][:, pair].T, fc="C0", ec="C0", alpha=0.35)
        for k, arm in reversed([*enumerate(arms)]):
            push = pushes[min(i, horizon - 1), k] * up
            ends = (xs[i, :3] + np.stack([0 * arm, arm, arm + push]))[:, pair]
            parts += ax.plot(*ends[1:].T, color="C1", lw=1.2)
            parts += ax.plot(*ends[:2].T, color="0.2" if k else "C3", lw=1.5)
    return parts


figure = Figure((11.0, 8.6), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[2.1, 1])
views, (rotors, tilts) = scene(top), bottom.subplots(1, 2)
_ = [draw(views, i) for i in range(0, horizon + 1, 4)]
rotors.step(t[:-1], pushes, where="post", lw=1.0)
rotors.set(xlabel="time [s]", ylabel="pushes of the rotors [N]")
tilts.plot(t, tilt)
tilts.set(xlabel="time [s]", ylabel="tilt [degrees]", yticks=range(0, 181, 45))
figure.savefig(args.out / "quadrotor_quaternion.png", dpi=110)

# Pushes reach both limits, in the flip and in the slit.
#
# ![The flight from the side and from above, the pushes of the rotors and the
# tilt](quadrotor_quaternion.png)

# %%
# The flight as an animation.
movie = Figure((8.0, 4.8), layout="constrained")
views, writer = scene(movie), PillowWriter(fps=8)
with writer.saving(movie, str(args.out / "quadrotor_quaternion.gif"), dpi=75):
    for i in [*range(0, horizon + 1, 20 if args.fast else 3), *[horizon] * 5]:
        views[0].set_title(f"{t[i]:.2f} s, tilt {tilt[i]:.0f} degrees")
        parts = draw(views, i)
        writer.grab_frame()
        [part.remove() for part in parts]

# ![The quadrotor flips and flies through the slit](quadrotor_quaternion.gif)

# %% What must hold, and what to change next
# The rim is checked between the stages as well, as it passes the wall. [Angles and
# rotations](../angles-and-rotations.md) explains manifolds, and how to write one:
# `UnitQuaternion` has two functions, `difference` and `retract`.
steps = quad.manifold.difference(xs[1:], xs[:-1])
at = jax.jit(lambda s: jax.vmap(rim_of)(quad.manifold.retract(xs[:-1], s * steps)))
fine = np.concatenate([at(s) for s in np.linspace(0.0, 1.0, 9)])
sides = abs(fine[abs(fine[..., 0] - wall) < 0.01, 1])
print(f"rim: up to {sides.max():.3f} m from the middle of the slit")
assert sides.max() < half_slit < radius, "it touches the wall"
assert solution.stats["violation"] < 1e-8 and abs(norms - 1).max() < 1e-12
assert ups.min() < -0.99 and ups[-1] > 1 - 1e-12, "it does not fly upside down"
