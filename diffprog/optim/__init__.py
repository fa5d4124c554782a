"""Optimizers: methods that step the parameters of a model."""

from ._curvature import (
    Curvature as Curvature,
    LossModel as LossModel,
    Recipe as Recipe,
)
from ._kfac import kfac as kfac, KFACState as KFACState
from ._llqr import llqr as llqr, published as published
from ._llqr_state import LLQRState as LLQRState
from ._model_step import model_step as model_step, ModelStepState as ModelStepState
from ._recipes import (
    feature_metric as feature_metric,
    fisher as fisher,
    ggn as ggn,
    hessian as hessian,
)
from ._recommended import recommended as recommended
from ._refresh import LLQRDiagnostics as LLQRDiagnostics, refresh as refresh
from ._risk_descent import (
    lsvrg as lsvrg,
    LSVRGState as LSVRGState,
    prospect as prospect,
    ProspectState as ProspectState,
    RiskDescent as RiskDescent,
)
from ._rules import (
    Absolute as Absolute,
    AbstractRule as AbstractRule,
    Cauchy as Cauchy,
    Minimize as Minimize,
)
from ._score import score as score
from ._structure_solvers import (
    AbstractProbe as AbstractProbe,
    AbstractStructureSolver as AbstractStructureSolver,
    ExactStep as ExactStep,
    GaussianProbe as GaussianProbe,
    GradientProbe as GradientProbe,
    HeavyBall as HeavyBall,
    LinearCG as LinearCG,
    NormalEquations as NormalEquations,
    RademacherProbe as RademacherProbe,
    StructureObjective as StructureObjective,
)
from ._structures import (
    AbstractStructure as AbstractStructure,
    default_structure as default_structure,
    Dense as Dense,
    Diagonal as Diagonal,
    DiagonalKronecker as DiagonalKronecker,
    EigenKronecker as EigenKronecker,
    Kronecker as Kronecker,
    PSDKronecker as PSDKronecker,
    Scalar as Scalar,
    Stacked as Stacked,
)
from ._tap import tap as tap
