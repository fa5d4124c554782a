"""The limits that the measurements are held against."""

from . import single


TITLE = "Promises"
COLUMNS = {
    "promise": "{}",
    "limit": "{:g}",
    "measured": "{:.3f}",
    "verdict": "{}",
}
FATROP = {"pendulum": 0.4, "cart-pole": 0.15, "quadrotor": 0.5, "car parking": 0.05}
CROCODDYL = {"pendulum": 0.6, "cart-pole": 0.6, "car parking": 0.6, "quadrotor": 1.0}
CROCODDYL_LQR = {"4, 2, 100": 1.0, "12, 4, 100": 0.5, "12, 4, 1000": 0.5, "32, 16, 500": 1.3}
PLAIN_LOOPS = 2.5
DOOR_US = 150
COMPILE_S = {"ILQR": 4.0, "DDP": 6.0}
PENDULUM_BATCH = 6.0


def promise(text: str, limit: float, measured: float | None, most: bool = True) -> dict:
    if measured is None:
        verdict = "not measured"
    else:
        holds = measured <= limit if most else measured >= limit
        verdict = "holds" if holds else "does not hold"
    return dict(promise=text, limit=limit, measured=measured, verdict=verdict)


def of_single(rows: list[dict]) -> list[dict]:
    found = []
    for name, limits in (("Fatrop", FATROP), ("Fatrop, expanded", FATROP), ("Crocoddyl FDDP, C++", CROCODDYL)):
        for problem, limit in limits.items():
            pair = [r for r in rows if (r["problem"], r["solver"]) == (problem, name)]
            measured = pair[0]["ours / this"] if pair else None
            found.append(promise(f"time / {name}: {problem}", limit, measured))
    return found


def check(sections: dict) -> list[dict]:
    found = []
    if "single" in sections:
        found += of_single(sections["single"])
    return found
