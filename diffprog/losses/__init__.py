"""Losses and operators of f-divergences."""

import typing as _typing

from .._common.types import elsewhere as _elsewhere
from .._operators.alpha import Alpha as Alpha
from .._operators.capped import capped_f_softargmax as capped_f_softargmax
from .._operators.divergence import AbstractDivergence as AbstractDivergence
from .._operators.families import (
    ChiSquare as ChiSquare,
    Jeffreys as Jeffreys,
    JensenShannon as JensenShannon,
    KL as KL,
    LeCam as LeCam,
    Neyman as Neyman,
    ReverseKL as ReverseKL,
    SquaredHellinger as SquaredHellinger,
)
from .._operators.fenchel_young import f_loss as f_loss
from .._operators.generated import generator as generator
from .._operators.hessian import (
    hessian_operator as hessian_operator,
    SoftargmaxJacobian as SoftargmaxJacobian,
)
from .._operators.softmax import (
    diagnose as diagnose,
    Diagnostics as Diagnostics,
    entmax as entmax,
    entmax15 as entmax15,
    f_sigmoid as f_sigmoid,
    f_softargmax as f_softargmax,
    f_softmax as f_softmax,
    f_softplus as f_softplus,
    sparsemax as sparsemax,
)
from ._bellman import (
    arm_from_ebm as arm_from_ebm,
    ebm_from_arm as ebm_from_arm,
    rewards_from_logits as rewards_from_logits,
)
from ._custom import as_loss as as_loss
from ._energy import (
    Enumeration as Enumeration,
    exact_objective as exact_objective,
    minmin_objective as minmin_objective,
    Normalization as Normalization,
    Permutations as Permutations,
    Subsets as Subsets,
)
from ._factor import AbstractFactor as AbstractFactor
from ._interior import (
    AbstractBoundedLoss as AbstractBoundedLoss,
    AbstractDomain as AbstractDomain,
)
from ._loss import (
    AbstractDualLoss as AbstractDualLoss,
    AbstractLoss as AbstractLoss,
)
from ._multiclass import (
    FLoss as FLoss,
    Hinge as Hinge,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
)
from ._risk import (
    spectral_risk as spectral_risk,
    spectral_weights as spectral_weights,
    spectrum as spectrum,
)
from ._supervised import (
    Absolute as Absolute,
    Euclidean as Euclidean,
    Huber as Huber,
    Logistic as Logistic,
    Poisson as Poisson,
    Squared as Squared,
)
from ._viterbi import soft_viterbi as soft_viterbi, viterbi as viterbi


_F_LOSS = '`dp.losses.f_loss(scores, targets, {}, "unit")` is it'
_CLASS = '`dp.losses.FLoss({}, "unit")` is it'
_OTHERS = dict(
    entmax15_loss=_F_LOSS.format("dp.losses.Alpha(1.5)"),
    sparsemax_loss=_F_LOSS.format("dp.losses.ChiSquare()"),
    Entmax15Loss=_CLASS.format("dp.losses.Alpha(1.5)"),
    SparsemaxLoss=_CLASS.format("dp.losses.ChiSquare()"),
    CrossEntropyLoss="`dp.losses.SoftmaxCrossEntropy` is it",
    MSELoss="`dp.losses.Squared` is half the sum of squares",
)
if not _typing.TYPE_CHECKING:  # which would take any name for one that there is
    __getattr__ = _elsewhere(__name__, _OTHERS)
