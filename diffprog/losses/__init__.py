"""Losses and operators of f-divergences."""

from ._alpha import Alpha as Alpha
from ._divergence import (
    AbstractDivergence as AbstractDivergence,
    ChiSquare as ChiSquare,
    Jeffreys as Jeffreys,
    JensenShannon as JensenShannon,
    KL as KL,
    LeCam as LeCam,
    Neyman as Neyman,
    ReverseKL as ReverseKL,
    SquaredHellinger as SquaredHellinger,
)
from ._generated import generator as generator
from ._hessian import (
    hessian_operator as hessian_operator,
    SoftargmaxJacobian as SoftargmaxJacobian,
)
from ._operators import (
    diagnose as diagnose,
    Diagnostics as Diagnostics,
    entmax as entmax,
    entmax15 as entmax15,
    f_loss as f_loss,
    f_sigmoid as f_sigmoid,
    f_softargmax as f_softargmax,
    f_softmax as f_softmax,
    f_softplus as f_softplus,
    sparsemax as sparsemax,
)
from ._supervised import (
    AbstractLoss as AbstractLoss,
    FLoss as FLoss,
    Hinge as Hinge,
    Huber as Huber,
    Logistic as Logistic,
    SoftmaxCrossEntropy as SoftmaxCrossEntropy,
    Squared as Squared,
)
