"""Losses and operators of f-divergences."""

from ._alpha import Alpha as Alpha
from ._capped import capped_f_softargmax as capped_f_softargmax
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
from ._operators import (
    f_loss as f_loss,
    f_softargmax as f_softargmax,
    f_softmax as f_softmax,
)
from ._risk import (
    spectral_risk as spectral_risk,
    spectral_weights as spectral_weights,
    spectrum as spectrum,
)
from ._risk_descent import (
    lsvrg as lsvrg,
    LSVRGState as LSVRGState,
    prospect as prospect,
    ProspectState as ProspectState,
    RiskDescent as RiskDescent,
)
