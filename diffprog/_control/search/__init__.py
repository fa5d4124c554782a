from .adaptive_damping import AdaptiveDamping as AdaptiveDamping
from .backtracking import Backtracking as Backtracking
from .base import (
    AbstractSearch as AbstractSearch,
    SearchState as SearchState,
    Trial as Trial,
    Verdict as Verdict,
)
from .fixed_step import FixedStep as FixedStep
