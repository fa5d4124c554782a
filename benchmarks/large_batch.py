"""Many starts of the arm: ours as one batch, Crocoddyl in a loop."""

from . import batch
from .large_problems import arm


TITLE = "Batches of the arm"
COLUMNS = batch.COLUMNS
NOTES = (
    *batch.NOTES,
    "Each solve begins with the torques that hold the arm where it starts.",
    "So the ratio is that of single solves. Vectors of eight problems would have to "
    "make up for what waiting costs, `8 in step`, and more: on the pendulum and the "
    "cart-pole they were measured, and gained less than that.",
)
SIZE = 512


def run() -> list[dict]:
    return batch.one(arm(), SIZE)
