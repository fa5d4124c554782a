"""Constraints in learning: limits that training keeps, by multipliers."""

from ._best import Best as Best
from ._constraint import (
    at_least as at_least,
    at_most as at_most,
    Constraint as Constraint,
    equal as equal,
)
from ._dual import AbstractDual as AbstractDual, DualState as DualState
from ._duals import (
    Ascent as Ascent,
    Augmented as Augmented,
    Penalty as Penalty,
    PI as PI,
    PID as PID,
    Relaxed as Relaxed,
)
from ._gates import HardConcrete as HardConcrete
from ._growth import Growth as Growth
from ._lagrangian import Lagrangian as Lagrangian, Report as Report
from ._minimize import minimize as minimize, Solution as Solution
from ._wrappers import Clip as Clip, FromOptax as FromOptax, Restart as Restart
