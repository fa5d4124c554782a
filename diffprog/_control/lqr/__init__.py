from .base import (
    AbstractRiccati as AbstractRiccati,
    LQR as LQR,
    LQRSolution as LQRSolution,
    Sweep as Sweep,
    Value as Value,
)
from .parallel import ParallelRiccati as ParallelRiccati
from .policy import Policy as Policy
from .riccati import Riccati as Riccati, solve_lqr as solve_lqr
