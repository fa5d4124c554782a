"""Chains of differentiable steps, and the rule that flows backward through them."""

import importlib.metadata
import typing as _typing

from ._chain.constraints import (
    Equality as Equality,
    Inequality as Inequality,
    StateBounds as StateBounds,
)
from ._chain.derivatives import (
    FiniteDifferences as FiniteDifferences,
    with_jacobian as with_jacobian,
)
from ._chain.discretize import discretize as discretize
from ._chain.external import external as external
from ._chain.manifold import AbstractManifold as AbstractManifold, Manifold as Manifold
from ._chain.metric import StageMetric as StageMetric
from ._chain.network import Network as Network, Stage as Stage
from ._chain.network_problem import NetworkProblem as NetworkProblem
from ._chain.problem import (
    AbstractChain as AbstractChain,
    Chain as Chain,
    ControlProblem as ControlProblem,
    Phase as Phase,
)
from ._chain.recurrent import Recurrent as Recurrent, RNNCell as RNNCell
from ._chain.rollout import rollout as rollout, Trajectory as Trajectory
from ._common.result import RESULTS as RESULTS, SolveError as SolveError
from ._common.saving import load as load, save as save
from ._common.types import elsewhere as _elsewhere
from ._control.adjoint import (
    AbstractAdjoint as AbstractAdjoint,
    ImplicitAdjoint as ImplicitAdjoint,
    NoAdjoint as NoAdjoint,
    UnrolledAdjoint as UnrolledAdjoint,
)
from ._control.batch import solve_batch as solve_batch
from ._control.closed_loop import simulate as simulate, Simulation as Simulation
from ._control.direction import (
    AbstractDirection as AbstractDirection,
    AbstractRollout as AbstractRollout,
    DDP as DDP,
    Expansion as Expansion,
    Feedback as Feedback,
    GaussNewton as GaussNewton,
    Gradient as Gradient,
    ILQR as ILQR,
    LinearRollout as LinearRollout,
    MoreauGradient as MoreauGradient,
    Newton as Newton,
)
from ._control.gradient_check import (
    check_gradient as check_gradient,
    GradientCheck as GradientCheck,
)
from ._control.layerwise import (
    layerwise_lqr as layerwise_lqr,
    LayerwiseLQR as LayerwiseLQR,
)
from ._control.lqr import (
    AbstractRiccati as AbstractRiccati,
    LQR as LQR,
    LQRSolution as LQRSolution,
    ParallelRiccati as ParallelRiccati,
    Policy as Policy,
    Riccati as Riccati,
    solve_lqr as solve_lqr,
    Sweep as Sweep,
    Value as Value,
)
from ._control.lqr.expand import (
    costates as costates,
    linearize as linearize,
    LinearModel as LinearModel,
    QuadraticModel as QuadraticModel,
    quadratize as quadratize,
)
from ._control.mpc import MPC as MPC
from ._control.outer import AugmentedLagrangian as AugmentedLagrangian
from ._control.plan import MPCState as MPCState
from ._control.search import (
    AbstractSearch as AbstractSearch,
    AdaptiveDamping as AdaptiveDamping,
    Backtracking as Backtracking,
    FixedStep as FixedStep,
    SearchState as SearchState,
    Trial as Trial,
    Verdict as Verdict,
)
from ._control.solution import (
    Multipliers as Multipliers,
    Solution as Solution,
    WarmStart as WarmStart,
)
from ._control.solve import solve as solve
from ._control.stepping import (
    direction as direction,
    finish as finish,
    init as init,
    SolverState as SolverState,
    step as step,
)
from ._training.layer_constants import (
    LayerConstants as LayerConstants,
    SmoothRelu as SmoothRelu,
)
from ._training.smoothness import (
    jacobian_norm as jacobian_norm,
    smooth_relus as smooth_relus,
    Smoothness as Smoothness,
    smoothness as smoothness,
)
from ._training.value_and_direction import (
    DirectionAux as DirectionAux,
    DirectionState as DirectionState,
    value_and_direction as value_and_direction,
    ValueAndDirection as ValueAndDirection,
)
from .oracles._rules import rule_boundary as rule_boundary


from . import constrained as constrained, extend as extend  # isort: skip
from . import losses as losses, manifolds as manifolds  # isort: skip
from . import optim as optim, oracles as oracles  # isort: skip
from . import plot as plot, systems as systems  # isort: skip  (import this door)


__version__ = importlib.metadata.version("diffprog")
_OTHERS = dict(
    LevenbergMarquardt="it is `dp.GaussNewton()` with `search=dp.AdaptiveDamping()`",
    ProjectedGradient="`control_bounds` of a problem are kept exactly",
    iLQR="`dp.ILQR` is it",
    minimize="`dp.constrained.minimize` is it",
    projection_simplex="`dp.losses.sparsemax` is it",
) | dict.fromkeys(
    ("BFGS", "GradientDescent", "LBFGS", "NonlinearCG"), "optax and optimistix have it"
)
if not _typing.TYPE_CHECKING:  # which would take any name for one that there is
    __getattr__ = _elsewhere(__name__, _OTHERS)
