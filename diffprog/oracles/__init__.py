"""Rules that turn a loss on a batch into a step of the parameters."""

from .._common.inner import (
    AbstractInner as AbstractInner,
    InnerGaussNewton as InnerGaussNewton,
    InnerGradient as InnerGradient,
    InnerNewton as InnerNewton,
)
from ._augmented_lagrangian import AugmentedLagrangian as AugmentedLagrangian
from ._base import (
    AbstractOracle as AbstractOracle,
    Layers as Layers,
    Linearization as Linearization,
    Proposal as Proposal,
)
from ._damping import (
    AbstractDamping as AbstractDamping,
    Constant as Constant,
    DampingState as DampingState,
    GradientNorm as GradientNorm,
    MadsenNielsen as MadsenNielsen,
    OUTCOMES as OUTCOMES,
    Threshold as Threshold,
)
from ._gauss_newton import (
    DualGaussNewton as DualGaussNewton,
    GaussNewton as GaussNewton,
)
from ._gradient import Gradient as Gradient
from ._interior_point import InteriorPoint as InteriorPoint
from ._model_solver import (
    AbstractModelSolver as AbstractModelSolver,
    Found as Found,
)
from ._moreau import (
    AbstractMessageRule as AbstractMessageRule,
    ChainRule as ChainRule,
    InverseRule as InverseRule,
    MoreauBackprop as MoreauBackprop,
    MoreauRule as MoreauRule,
    prox_prop as prox_prop,
)
from ._prox_linear import (
    CoordinateAscent as CoordinateAscent,
    NewtonSteps as NewtonSteps,
    ProximalGradient as ProximalGradient,
    ProxLinear as ProxLinear,
)
from ._rules import AbstractRule as AbstractRule
from ._solvers import (
    AbstractSolver as AbstractSolver,
    Auto as Auto,
    CG as CG,
    Cholesky as Cholesky,
    DualCG as DualCG,
    RandomSubspace as RandomSubspace,
    Solved as Solved,
)
from ._target_propagation import TargetPropagation as TargetPropagation
