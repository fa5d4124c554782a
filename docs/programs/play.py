"""Computes what the page `play.md` draws, and writes `docs/play-data.js`.

    .venv/bin/python docs/programs/play.py

Optimal controls and gains of a pendulum from a grid of starts, and optimal controls of
a car for a grid of places of an obstacle. `docs/play.js` has the same dynamics and the
same costs.
"""

import base64
import json
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp


jax.config.update("jax_enable_x64", True)

PENDULUM = {"dt": 0.05, "gravity": 9.81, "friction": 0.1}
ANGLES = np.linspace(-np.pi, np.pi, 13)
VELOCITIES = np.linspace(-6.0, 6.0, 7)
CAR = {"dt": 0.1, "goal": [6.0, 0.0], "radius": 1.0, "weight": 20.0}
CAR_START = [0.0, 0.0, 0.0, 1.0]
PLACES = np.linspace(0.75, 5.25, 10), np.linspace(-1.6, 1.6, 9)


def pendulum():
    def dynamics(x, u, t):
        gravity, friction = PENDULUM["gravity"], PENDULUM["friction"]
        acceleration = u[0] - friction * x[1] - gravity * jnp.sin(x[0])
        return x + PENDULUM["dt"] * jnp.stack([x[1], acceleration])

    def cost(x, u, t):
        return 0.05 * (x[0] - jnp.pi) ** 2 + 0.005 * x[1] ** 2 + 0.025 * u[0] ** 2

    def terminal_cost(x):
        return 50 * (x[0] - jnp.pi) ** 2 + 5 * x[1] ** 2

    return dp.ControlProblem(dynamics, cost, terminal_cost, horizon=60)


class Drive(eqx.Module):
    """A car that passes an obstacle."""

    obstacle: jax.Array

    def dynamics(self, x, u, t):
        speed = x[3]
        rates = speed * jnp.cos(x[2]), speed * jnp.sin(x[2]), speed * u[0], u[1]
        return x + CAR["dt"] * jnp.stack(rates)

    def cost(self, x, u, t):
        distance = jnp.sum((x[:2] - self.obstacle) ** 2)
        inside = jax.nn.relu(CAR["radius"] ** 2 - distance)
        return 0.05 * jnp.sum(u**2) + CAR["weight"] * inside**2

    def terminal_cost(self, x):
        rest = jnp.stack([x[2], x[3] - 1.0])
        goal = jnp.asarray(CAR["goal"])
        return 50 * jnp.sum((x[:2] - goal) ** 2) + 5 * jnp.sum(rest**2)


def packed(array) -> str:
    """Numbers of 32 bits, little-endian, in letters."""
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def swings():
    """Controls and gains, shape (angles, velocities, stages, 3), and the costs."""
    starts = np.stack(np.meshgrid(ANGLES, VELOCITIES, indexing="ij"), -1).reshape(-1, 2)
    guesses = jnp.zeros((len(starts), 60, 1))
    solutions = dp.solve_batch(pendulum(), dp.DDP(), jnp.asarray(starts), guesses)
    print(solutions)
    K = solutions.policy.K[:, :, 0]
    return np.concatenate([solutions.us, K], -1), solutions.cost


def drives():
    """Controls, shape (places, stages, 2): the better of passing left and right."""
    x, y = np.meshgrid(*PLACES, indexing="ij")
    places = jnp.asarray(np.stack([x, y], -1).reshape(-1, 2))
    starts = jnp.broadcast_to(jnp.asarray(CAR_START), (len(places), 4))
    found = []
    for side in (-1.0, 1.0):
        bend = side * jnp.repeat(jnp.array([0.6, -0.6, -0.6, 0.6]), 13)[:50]
        guess = jnp.stack([bend, jnp.full(50, 0.1)], -1)
        guesses = jnp.broadcast_to(guess, (len(places), 50, 2))
        problems = dp.ControlProblem.from_system(Drive(places), 50)
        method, search = dp.ILQR(), dp.AdaptiveDamping()
        found.append(
            dp.solve_batch(problems, method, starts, guesses, search, in_axes=0)
        )
        print(found[-1])
    left = np.asarray(found[0].cost) < np.asarray(found[1].cost)
    us = np.where(left[:, None, None], found[0].us, found[1].us)
    return us, np.minimum(found[0].cost, found[1].cost)


def main():
    plans, costs = swings()
    controls, car_costs = drives()
    data = {
        "pendulum": PENDULUM
        | {
            "angles": ANGLES.tolist(),
            "velocities": VELOCITIES.tolist(),
            "plans": packed(plans),
            "costs": packed(costs),
        },
        "car": CAR
        | {
            "start": CAR_START,
            "xs": PLACES[0].tolist(),
            "ys": PLACES[1].tolist(),
            "plans": packed(controls),
            "costs": packed(car_costs),
        },
    }
    path = pathlib.Path(__file__).parents[1] / "play-data.js"
    path.write_text(f"const PLAY = {json.dumps(data)};\n")
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
