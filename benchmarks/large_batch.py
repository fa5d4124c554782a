"""Many starts of the arm: ours as one batch, Crocoddyl in a loop."""

from . import batch
from .large_problems import arm


TITLE = "Batches of the arm"
COLUMNS = batch.COLUMNS
NOTES = (
    *batch.NOTES,
    "Each solve begins with the torques that hold the arm where it starts.",
)
SIZE = 512


def run() -> list[dict]:
    return batch.one(arm(), SIZE)
