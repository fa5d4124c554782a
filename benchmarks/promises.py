"""The limits that the measurements are held against."""

from . import ours, single, states


TITLE = "Promises"
NOTE = (
    "What we want to hold, and what was measured here. `time over` is our time divided "
    "by that of the other solver, for the better of our methods. Fatrop stands twice "
    "because it is much faster on the expanded program."
)
COLUMNS = {
    "promise": "{}",
    "limit": "{:g}",
    "measured": "{:.3f}",
    "verdict": "{}",
}
CROCODDYL_NAME = "Crocoddyl FDDP, C++"
FATROP = {"pendulum": 0.4, "cart-pole": 0.15, "quadrotor": 0.5, "car parking": 0.05}
CROCODDYL = {"pendulum": 0.6, "cart-pole": 0.6, "car parking": 0.6, "quadrotor": 1.0}
LIMITS = {"pendulum with limits": 0.35, "pendulum, limits that change": 0.45}
FIRST_CALL = 1.5
CONSTRAINTS = {"mass": 0.5, "swing up": 0.25, "obstacles": 0.4, "short rail": 2.5}
RAIL, FIRST_CALL_WITH_ROWS = 1.0, 2.5
STATES, LINE = {"quadrotor": 1.0}, 1.0
LQR = {"4, 2, 100": 1.0, "12, 4, 100": 0.5, "12, 4, 1000": 0.5, "32, 16, 500": 1.3}
LARGE = {
    "chain of 14": 0.6,
    "chain of 20": 0.6,
    "chain of 28": 0.8,
    "chain of 40": 1.0,
    "arm": 0.8,
    "pendulums in a row": 0.9,
    "tied drones": 0.9,
    "reacting rod": 0.9,
}
DERIVATIVE, LIMITED_BATCH = 4.0, 3.0
ARM_BATCH, ARM_FIRST_CALL = 2.0, {"ILQR": 6.0, "DDP": 10.0}
LARGE_LQR = {"14, 7, 100": 0.6, "24, 12, 200": 0.8, "40, 20, 200": 1.0}
TICKS = {"ILQR": 1.0, "DDP": 3.0}
PLAIN_LOOPS, DOOR, BATCH = 2.5, 150.0, 6.0
COMPILATION = {"ILQR": 4.0, "DDP": 6.0}


def promise(text: str, limit: float, measured: float | None, most: bool = True) -> dict:
    if measured is None:
        verdict = "not measured"
    else:
        holds = measured <= limit if most else measured >= limit
        verdict = "holds" if holds else "does not hold"
    return dict(promise=text, limit=limit, measured=measured, verdict=verdict)


def times(rows: list[dict], peer: str, limits: dict, key: str = "problem"):
    """Our time over a peer's, for every problem with a limit."""
    measured = {row[key]: row["ours / this"] for row in rows if row["solver"] == peer}
    for name, limit in limits.items():
        yield promise(f"time over {peer}: {name}", limit, measured.get(name))


def plain_loops(rows: list[dict]):
    """The same with fast loops switched off."""
    suffix = list(ours.LOOPS)[-1]
    for peer in (row for row in rows if row["solver"] == CROCODDYL_NAME):
        same = [row for row in rows if row["problem"] == peer["problem"]]
        measured = single.ratio(single.best(same, suffix), peer)
        text = f"time without fast loops over {CROCODDYL_NAME}: {peer['problem']}"
        yield promise(text, PLAIN_LOOPS, measured)


def of_single(rows: list[dict]):
    yield from times(rows, "Fatrop", FATROP)
    yield from times(rows, "Fatrop, expanded", FATROP)
    yield from times(rows, CROCODDYL_NAME, CROCODDYL)
    yield from plain_loops(rows)


def of_limits(rows: list[dict]):
    yield from times(rows, "Fatrop", LIMITS)
    yield from times(rows, "Fatrop, expanded", LIMITS)
    parking = [row for row in rows if row["problem"] == "car parking with limits"]
    steps = {row["solver"]: row["ms / iteration"] for row in parking}
    for name, ms in steps.items():
        if name.startswith("Crocoddyl"):
            text = f"time per iteration over {name}: car parking with limits"
            yield promise(text, 1.0, steps["diffprog DDP"] / ms)
    largest = max(row["first call x"] or 0.0 for row in rows)
    yield promise("time of a first call over one without limits", FIRST_CALL, largest)


def of_constraints(rows: list[dict]):
    for peer in ("Fatrop", "Fatrop, expanded"):
        yield from times(rows, peer, CONSTRAINTS)
        rail = {row["solver"]: row for row in rows if row["problem"] == "short rail"}
        mine = rail["diffprog DDP, penalty 1000"]
        good = peer in rail and mine["converged"]
        measured = single.ratio(mine, rail[peer]) if good else None
        text = f"time over {peer}: short rail, first penalty 1000"
        yield promise(text, RAIL, measured)
    largest = max(row["first call x"] or 0.0 for row in rows)
    text = "time of a first call over one without constraints"
    yield promise(text, FIRST_CALL_WITH_ROWS, largest)


def of_states(rows: list[dict]):
    line = [row for row in rows if row["start"] == states.LINE]
    for row in times(line, CROCODDYL_NAME, STATES):
        yield row | {"promise": f"{row['promise']}, {states.LINE}"}
    for row in line:
        key = row["problem"], row["solver"]
        if key[1].startswith("diffprog"):
            both = [r for r in rows if (r["problem"], r["solver"]) == key]
            plain = next(r for r in both if r["start"] == states.CONTROLS)
            text = f"median of iterations over that from {states.CONTROLS}"
            measured = row["median"] / plain["median"]
            yield promise(f"{text}: {', '.join(key)}", LINE, measured)


def of_door(rows: list[dict]):
    largest = max(row["difference us"] for row in rows)
    yield promise("microseconds of the public door, at most", DOOR, largest)


def of_lqr(rows: list[dict]):
    yield from times(rows, "Crocoddyl, one iteration", LQR, "n, m, T")


def of_large(rows: list[dict]):
    yield from times(rows, CROCODDYL_NAME, LARGE)
    arm = [row for row in rows if row["problem"] == "arm"]
    seconds = {row["solver"]: row["first call s"] for row in arm}
    for method, limit in ARM_FIRST_CALL.items():
        text = f"seconds of the first call of dp.{method}: arm"
        yield promise(text, limit, seconds.get(f"diffprog {method}"))


def of_large_lqr(rows: list[dict]):
    yield from times(rows, "Crocoddyl, one iteration", LARGE_LQR, "n, m, T")


def of_batch(rows: list[dict], name: str = "pendulum", limit: float = BATCH):
    peer = (row for row in rows if row["solver"] == CROCODDYL_NAME)
    measured = {(r["problem"], r["batch"]): r["times as many"] for r in peer}
    text = f"solves per second and core over {CROCODDYL_NAME}: 512 {name}s, at least"
    yield promise(text, limit, measured.get((name, 512)), most=False)


def of_gradients(rows: list[dict]):
    for row in rows:
        text = f"iterations of DDP that a derivative takes: {row['problem']}"
        yield promise(text, DERIVATIVE, row["in iterations"])


def of_gradients_batch(rows: list[dict]):
    for row in rows:
        if not row["solver"].startswith("Fatrop"):
            text = f"solves per second and core over Fatrop, at least: {row['solver']}"
            yield promise(text, LIMITED_BATCH, row.get("times Fatrop"), most=False)


def of_large_batch(rows: list[dict]):
    yield from of_batch(rows, "arm", ARM_BATCH)


def of_ticks(rows: list[dict]):
    for row in rows:
        if row["problem"] == "quadrotor":
            text = f"median milliseconds of a tick of dp.{row['method']}: quadrotor"
            yield promise(text, TICKS[row["method"]], row["p50 ms"])


def of_compilation(rows: list[dict]):
    for method, limit in COMPILATION.items():
        slowest = max(row["total s"] for row in rows if row["method"] == method)
        yield promise(f"seconds to compile dp.{method}, at most", limit, slowest)


PARTS = {
    "single": of_single,
    "limits": of_limits,
    "constraints": of_constraints,
    "states": of_states,
    "door": of_door,
    "lqr": of_lqr,
    "large": of_large,
    "large_lqr": of_large_lqr,
    "batch": of_batch,
    "large_batch": of_large_batch,
    "ticks": of_ticks,
    "gradients": of_gradients,
    "gradients_batch": of_gradients_batch,
    "compilation": of_compilation,
}


def check(sections: dict) -> list[dict]:
    """Every promise about the sections that were measured."""
    parts = [PARTS[name](rows) for name, rows in sections.items() if name in PARTS]
    return [row for part in parts for row in part]
