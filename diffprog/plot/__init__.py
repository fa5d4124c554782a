"""Pictures of solutions and races; matplotlib is imported when one is drawn."""

from ._curves import (
    convergence as convergence,
    inputs as inputs,
    trajectory as trajectory,
)
from ._figure import folder as folder
from ._plane import animation as animation, race as race, track as track
