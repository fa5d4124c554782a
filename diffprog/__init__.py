"""Chains of differentiable steps, and the rule that flows backward through them."""

import importlib.metadata

from ._chain import (
    AbstractChain as AbstractChain,
    Chain as Chain,
    ControlProblem as ControlProblem,
    Phase as Phase,
    rollout as rollout,
    Trajectory as Trajectory,
)
from ._direction import (
    AbstractDirection as AbstractDirection,
    DDP as DDP,
    GaussNewton as GaussNewton,
    Gradient as Gradient,
    ILQR as ILQR,
    Newton as Newton,
)
from ._discretize import discretize as discretize
from ._lqr import (
    LQR as LQR,
    LQRSolution as LQRSolution,
    Policy as Policy,
    solve_lqr as solve_lqr,
    Value as Value,
)
from ._result import RESULTS as RESULTS, SolveError as SolveError
from ._search import (
    AbstractSearch as AbstractSearch,
    AdaptiveDamping as AdaptiveDamping,
    Backtracking as Backtracking,
    FixedStep as FixedStep,
)
from ._solution import Solution as Solution
from ._solve import (
    direction as direction,
    finish as finish,
    init as init,
    solve as solve,
    SolverState as SolverState,
    step as step,
)


from . import systems as systems  # isort: skip  (imports this door)


__version__ = importlib.metadata.version("diffprog")
