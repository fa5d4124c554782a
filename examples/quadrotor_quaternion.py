"""A quadrotor flips over and flies through a slit that is narrower than it is.

Its attitude is a unit quaternion, which nothing is wrong with upside down.
"""

# %%
import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

import diffprog as dp
from diffprog.manifolds import UnitQuaternion


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default="out", help="for the pictures")
parser.add_argument("--fast", action="store_true", help="few frames, as a test")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_enable_x64", True)

# %%
# The state has position [m], attitude q, velocity [m/s] and rates [rad/s]: 13 numbers.
# Four are those of q, but attitudes have three dimensions: q + dq is none of them, and
# q and -q are the same. A manifold says how to get from one to another, by a rotation
# vector. With it each iterate has unit quaternions, and the gains, the gaps and the
# error at the goal have 12 entries. `from_system` finds it by its name.
quad = dp.systems.QuaternionQuadrotor(dt=0.03)
share = quad.mass * quad.gravity / 4  # of the weight that a rotor carries [N]
horizon, wall, half_slit, radius = 80, 3.0, 0.12, 0.25  # [m], rotors included
t = quad.dt * np.arange(horizon + 1)
around = np.linspace(0.0, 2 * np.pi, 9)
rim = radius * np.stack([np.cos(around), np.sin(around), 0 * around], axis=1)
x0 = jnp.zeros(13).at[3].set(1.0)
goal = x0.at[0].set(4.0)
smooth_step = lambda s: s - jnp.sin(2 * jnp.pi * s) / (2 * jnp.pi)


def rim_of(x):  # in the frame of the world
    w, axis = x[3], x[4:7]
    cross = jnp.cross(axis[None], rim)
    return x[:3] + rim + 2 * (w * cross + jnp.cross(axis[None], cross))


def flip(t):
    """A full turn about the pitch axis: from q to -q, which is the same attitude."""
    half = jnp.pi * smooth_step(jnp.clip((t - 0.3) / 0.9, 0.0, 1.0))
    return jnp.stack([jnp.cos(half), 0.0, jnp.sin(half), 0.0])


class Flight(eqx.Module):
    quad: dp.systems.QuaternionQuadrotor
    manifold = property(lambda self: self.quad.manifold)
    control_bounds = (-share, 2 * share)  # each rotor pushes with 0 to 3 shares

    def dynamics(self, x, u, t):
        return self.quad.dynamics(x, u, t)

    def cost(self, x, u, t):
        time = self.quad.dt * t
        turn = UnitQuaternion().difference(x[3:7], flip(time))
        flips = jnp.where((time > 0.3) & (time < 1.2), jnp.sum(turn**2), 0.0)
        cost = jnp.sum(u**2) / 2 + jnp.sum(x[1:3] ** 2) / 2 + flips
        speeds = 0.02 * jnp.sum(x[7:10] ** 2) + 0.01 * jnp.sum(x[10:] ** 2)
        return self.quad.dt / 2 * (cost + speeds)

    def terminal_cost(self, x):
        return 0 * x[0]  # where it ends is a constraint

    def touching(self, x, *_):  # at most 0 where eight points of the rim are free
        # An hourglass, 1 cm less than the slit: stages are up to 9 cm apart.
        ahead, side = rim_of(x)[:8, :2].T
        return side**2 - (half_slit - 0.01) ** 2 - (ahead - wall) ** 2

    def left(self, x):
        return self.manifold.difference(x, goal)


flight = Flight(quad)
wall_is_free = dp.Inequality(flight.touching, name="wall")
arrive = dp.Equality(flight.left, name="arrive")
problem = dp.ControlProblem.from_system(
    flight, horizon, constraints=wall_is_free, terminal_constraints=arrive
)

# %%
# The first guess is one of states: straight to the goal, and over on the way. We know
# no controls that fly so. The solve closes the gaps between the states.
guess = jnp.zeros((horizon + 1, 13)).at[:, 3:7].set(jax.vmap(flip)(t))
guess = guess.at[:, 0].set(4 * smooth_step(t / t[-1]))
guess = guess.at[:-1, 7].set(jnp.diff(guess[:, 0]) / quad.dt)
solution = dp.solve(problem, dp.DDP(), x0, jnp.zeros((horizon, 4)), xs=guess)
print(solution)
xs, pushes = np.asarray(solution.xs), np.asarray(solution.us) + share
rims, ups = np.asarray(jax.vmap(rim_of)(xs)), 1 - 2 * np.sum(xs[:, 4:6] ** 2, axis=1)
tilt, norms = np.degrees(np.arccos(ups.clip(-1, 1))), np.linalg.norm(xs[:, 3:7], axis=1)
middle = np.argmin(abs(xs[:, 0] - wall))
print(f"gaps: at first up to {solution.history['gap'][0]:.2f}, at last 0")
print(f"tilt: up to {tilt.max():.0f} degrees, {tilt[middle]:.0f} in the slit")
print(f"rotors: {pushes.min():.3f} to {pushes.max():.3f} N of {3 * share:.3f} N")


# %%
# Pictures: the flight, the slit as seen along it, rotors and tilt.
def scene(ax):
    for y in (-0.7, 0.7):
        edge = np.copysign(half_slit, y)
        corners = [(wall, a, b) for a, b in zip((edge, y, y, edge), (-0.4, -0.4, 1, 1))]
        ax.add_collection3d(Poly3DCollection([corners], color="0.5", alpha=0.35))
    ax.set(xlim=(-0.3, 4.3), ylim=(-0.7, 0.7), zlim=(-0.4, 1.0), xlabel="x [m]")
    ax.set(yticks=[-0.5, 0.5], zticks=[0, 0.5, 1], box_aspect=(4.6, 1.4, 1.4))
    ax.view_init(22, -62)


def draw(ax, i):
    """The rim, four arms, of which the first is red, and the push of each rotor."""
    parts = [ax.add_collection3d(Poly3DCollection([rims[i]], alpha=0.35))]
    arms = 0.7 * (rims[i, :8:2] - xs[i, :3])
    up = 0.12 * np.cross(arms[0], arms[1]) / np.sum(arms[0] ** 2) / share
    for arm, push, color in zip(arms, pushes[min(i, horizon - 1)], ("C3", *3 * ["0.2"])):
        ends = xs[i, :3] + np.stack([0 * arm, arm, arm + push * up])
        parts += ax.plot(*ends[:2].T, color=color, lw=1.5)
        parts += ax.plot(*ends[1:].T, color="C1", lw=1.2)
    return parts


figure = Figure((11.0, 7.6), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
ax, (slit, rotors, tilts) = top.add_subplot(projection="3d"), bottom.subplots(1, 3)
scene(ax)
for i in range(0, horizon + 1, 5):
    draw(ax, i)
for y in (-0.5, 0.5):
    slit.axvspan(*sorted((y, np.copysign(half_slit, y))), color="0.7")
for i in range(middle - 3, middle + 4):
    slit.plot(*rims[i, :, 1:].T, color="C0", alpha=1.0 if i == middle else 0.3)
slit.set(aspect="equal", xlim=(-0.4, 0.4), xlabel="y [m]", ylabel="z [m]")
rotors.plot(t[:-1], pushes, drawstyle="steps-post", lw=1.0)
rotors.set(xlabel="time [s]", ylabel="pushes of the rotors [N]", ylim=(0, 3 * share))
tilts.plot(t, tilt)
tilts.axvline(t[middle], color="0.5")
tilts.set(xlabel="time [s]", ylabel="tilt [degrees]", yticks=range(0, 181, 45))
figure.savefig(args.out / "quadrotor_quaternion.png", dpi=110)

# %%
# The flight as an animation.
movie = Figure((7.0, 3.4))
ax = movie.add_axes((-0.05, -0.05, 1.1, 1.15), projection="3d")
scene(ax)
writer = PillowWriter(fps=12)
with writer.saving(movie, str(args.out / "quadrotor_quaternion.gif"), dpi=75):
    for i in [*range(0, horizon + 1, 20 if args.fast else 2), *[horizon] * 8]:
        ax.set_title(f"{t[i]:.2f} s, tilt {tilt[i]:.0f} degrees", y=0.9)
        parts = draw(ax, i)
        writer.grab_frame()
        for part in parts:
            part.remove()

# %%
# What must hold. Between stages, too: where do edges of the rim cross the wall?
steps = jax.vmap(flight.manifold.difference)(xs[1:], xs[:-1])
at = lambda s: jax.vmap(flight.manifold.retract)(xs[:-1], s * steps)
fine = np.concatenate([jax.vmap(rim_of)(at(s)) for s in np.linspace(0.0, 1.0, 9)])
a, b = fine[:, :-1, :2], fine[:, 1:, :2]
crossing = (a[..., 0] - wall) * (b[..., 0] - wall) < 0
a, b = a[crossing], b[crossing]
sides = a[:, 1] + (wall - a[:, 0]) / (b - a)[:, 0] * (b - a)[:, 1]
print(f"the rim: up to {abs(sides).max():.3f} m from the middle of the slit")
assert abs(sides).max() < half_slit < radius, "it touches the wall"
assert solution.stats["violation"] < 1e-8 and abs(norms - 1).max() < 1e-12
assert ups.min() < -0.99 and ups[-1] > 1 - 1e-12, "it does not fly upside down"
assert np.all(pushes >= 0) and np.all(pushes <= 3 * share + 1e-12)
