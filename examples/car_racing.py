"""A race car laps a circuit: it plans a few seconds ahead, drives a moment, replans.

Run `python examples/car_racing.py --help` for the options. Pictures go to `out/`.
"""

# %%
# Settings. The car is a dynamic bicycle model with tire forces, full-size or 1:43.
import argparse
import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffprog as dp
from diffprog import plot
from diffprog.systems import Race, Track


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--track", help="a .csv or .json file with the user's circuit")
parser.add_argument("--car", choices=["full-size", "miniature"])
parser.add_argument("--borders", choices=["soft", "hard"], default="soft")
parser.add_argument("--out", type=dp.plot.folder, default="out", help="for pictures")
parser.add_argument("--fast", action="store_true", help="a few steps only, as a test")
args = parser.parse_args()
jax.config.update("jax_enable_x64", True)


def load(file):
    read = Track.from_json if file.endswith(".json") else Track.from_csv
    try:
        return read(file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"No circuit from {file}: {error}") from None


user_track = load(args.track) if args.track else None
if args.car is None:
    small = user_track is not None and user_track.length < 100
    args.car = "miniature" if small else "full-size"

# %%
# The race. The state holds the car and its progress along the center line. The cost
# rewards progress and punishes the crossing of a border; little holds the car to the
# center line, so it is free to cut corners. `margin` [m] keeps the sides of the car
# away from the borders. All these numbers are data: change them without recompiling.
# The controls are the duty of the motor, the steering as a share of the largest angle,
# and the acceleration of the progress. The car knows the limits of the first two; they
# come with the race into every problem made from it. Steering weighs more than drive:
# else it pays to brake by sawing at the wheel.
if args.car == "full-size":
    track = Track.chicane() if user_track is None else user_track
    race = dataclasses.replace(
        Race.full_size(track, dt=0.06, v_ref=50.0, squashed=False),
        control_weight=jnp.array([0.1, 10.0]),
        q_contour=1e-3,
        q_border=30.0,
        margin=0.75,
        method="midpoint",
    )
else:
    track = Track.simple() if user_track is None else user_track
    race = dataclasses.replace(
        Race.miniature(track, dt=0.02, v_ref=3.0, squashed=False),
        q_contour=1e-3,
        margin=0.01,
        method="midpoint",
    )
# Soft borders are that cost. Hard ones are constraints, without cost and margin; a plan
# is driven for one step only, so they need to hold to a millimeter. Gradients are held
# to the same number, and those of the miniature are a thousandth.
hard = args.borders == "hard"
if hard:
    race = dataclasses.replace(race, q_border=0.0, margin=0.0)
outer = dp.AugmentedLagrangian(tol=1e-3 if args.car == "full-size" else 1e-6)


def make(race, horizon):
    borders = dp.Inequality(race.borders, name="borders") if hard else ()
    return dp.ControlProblem.from_system(
        race, horizon, constraints=borders, terminal_constraints=borders
    )


num_steps, horizon, max_steps = (8, 5, 2) if args.fast else (4000, 60, 25)
print(f"{args.car} car, track of {track.length:.1f} m, stages of {race.dt} s")
print(f"{args.borders} borders")


# %%
# One control step: a few iterations from the shifted plan of the step before, then the
# first control of the new plan moves the car. What is known of the borders, one row of
# multipliers for each stage, is shifted like the plan. DDP uses the curvature
# of the dynamics; near a solution it needs fewest iterations.
@eqx.filter_jit
def control(race, x, us, state):
    plan = dp.solve(
        make(race, horizon),
        dp.DDP(),
        x,
        us,
        search=dp.Backtracking(),
        max_steps=max_steps,
        throw=False,  # an unfinished solve is what we ask for
        history=False,
        state=state,
        outer=outer,
    )
    shift = lambda rows: jnp.concatenate([rows[1:], rows[-1:]])
    state = plan.state
    if hard:
        rows = lambda state: state.multipliers.constraints["borders"]
        state = eqx.tree_at(rows, state, shift(rows(state)))
    return race.dynamics(x, plan.us[0], 0), shift(plan.us), plan, state


# %%
# The lap, from a plan in the middle between the limits. What a control step computes is
# known at its end, so the loop stops where the car has been round.
lower, upper = map(np.asarray, race.car.control_bounds)
middle = jnp.append((lower + upper) / 2, 0.0)
x = race.x0
us = jnp.tile(middle, (horizon, 1))
state = dp.WarmStart(dp.Backtracking().init(us.dtype))
start = time.perf_counter()
if hard:  # multipliers of 0 at first: with others it is the same program
    found = eqx.filter_eval_shape(control, race, x, us, state)[-1]
    found = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), found)
    penalty = jnp.full_like(found.penalty, outer.penalty)
    state = dp.WarmStart(state.search, found.multipliers, penalty)
jax.block_until_ready(control(race, x, us, state))
print(f"compiled one control step in {time.perf_counter() - start:.1f} s")

states, controls, plans, iterations = [x], [], [], []
start = time.perf_counter()
while len(controls) < num_steps and states[-1][-2] <= track.length:
    x, us, plan, state = control(race, x, us, state)
    states.append(np.asarray(x))
    controls.append(np.asarray(plan.us[0]))
    plans.append(np.asarray(plan.xs[:, :2]))
    iterations.append(int(plan.stats["num_steps"]))
    if len(controls) % 100 == 0:
        print(f"  {len(controls) * race.dt:5.1f} s  {x[-2]:7.1f} m  {x[3]:5.1f} m/s")
seconds = (time.perf_counter() - start) / len(controls)
states, controls = np.stack(states), np.stack(controls)
speed = np.hypot(states[:, 3], states[:, 4])
lateral = np.asarray(jax.vmap(race.lateral_error)(states))
margins = np.asarray(jax.vmap(race.border_margin)(states))
at_limit = (controls[:, :2] <= lower) | (controls[:, :2] >= upper)

print(f"{len(controls)} control steps of {1e3 * seconds:.1f} ms each")
print(f"{np.mean(iterations):.1f} iterations per step")
print(f"lap time {len(controls) * race.dt:.2f} s, mean speed {speed.mean():.2f} m/s")
print(f"speed {speed.min():.2f} to {speed.max():.2f} m/s")
print(
    "at a limit: drive in {:.0f} % of the steps, steering in {:.0f} %".format(
        *100 * at_limit.mean(0)
    )
)
print(f"least distance of the car's side to a border {margins.min():.3f} m")
print(f"center of the car {lateral.min():.2f} to {lateral.max():.2f} m off the middle")

# %%
# Pictures.
units = np.array([1.0, np.degrees(race.car.max_steer)])


def save(name, ax):
    ax.figure.savefig(args.out / name, dpi=120)


save("race.png", plot.race(states, speed, track))
axes = plot.inputs(
    units * controls[:, :2],
    speed,
    dt=race.dt,
    names=["drive [duty]", "steering [deg]"],
    limits=[units * limit for limit in (lower, upper)],
)
save("inputs.png", axes[0])
if not args.fast:
    plot.animation(
        args.out / "race.gif",
        states[:-1],
        track,
        dt=race.dt,
        length=race.car.length,
        width=race.car.width,
        speed=speed[:-1],
        plans=plans,
        every=max(1, len(plans) // 110),
    )
print(f"pictures in {args.out}/")

# %%
# One long problem, solved to the end from a straight drive by each direction; not on a
# circuit of the user. `later` is the time of a second call, which does not compile.
long_horizon, most = (5, 3) if args.fast else (100, 300)
problem = make(race, long_horizon)
cases = [
    (dp.Gradient(), dp.Backtracking()),
    (dp.GaussNewton(), dp.Backtracking()),
    (dp.Newton(), dp.Backtracking()),
    (dp.ILQR(), dp.Backtracking()),
    (dp.DDP(), dp.Backtracking()),
    (dp.ILQR(), dp.AdaptiveDamping()),
]
cases = cases[3:4] if args.fast else [] if user_track else cases
solutions = {}
if cases:
    print(f"\n{long_horizon} stages, at most {most} iterations")
    print(
        f"{'direction':<12} {'search':<16} {'iterations':>10} {'cost':>11} "
        f"{'stationarity':>12} {'first call':>10} {'later':>10}  result"
    )
for method, search in cases:
    guess = jnp.tile(middle, (long_horizon, 1))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        solution = jax.block_until_ready(
            dp.solve(
                problem,
                method,
                race.x0,
                guess,
                search,
                max_steps=most,
                throw=False,
                outer=outer,
            )
        )
        times.append(time.perf_counter() - start)
    names = type(method).__name__, type(search).__name__
    solutions[f"{names[0]}, {names[1]}"] = solution
    print(
        f"{names[0]:<12} {names[1]:<16} {solution.stats['num_steps']:10d} "
        f"{solution.cost:11.6f} {solution.stats['decrement']:12.1e} "
        f"{times[0]:8.1f} s {1e3 * times[1]:7.1f} ms  {repr(solution).split()[1]}"
    )
if solutions and not hard:  # where a cost below the best one is that of a way beyond
    save("convergence.png", plot.convergence(solutions))

# %%
# What must hold.
assert np.all(margins > -1e-3), "the car left the track"
assert np.all((lower <= controls[:, :2]) & (controls[:, :2] <= upper))
for label, solution in solutions.items():
    assert hard or solution.cost < solution.history["cost"][0], label
if not args.fast:
    assert states[-1, -2] > track.length, "the lap is not complete"
if not args.fast and args.car == "full-size" and user_track is None:
    assert solutions["DDP, Backtracking"].result == dp.RESULTS.successful
