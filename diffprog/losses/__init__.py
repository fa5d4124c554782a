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
from ._operators import (
    f_loss as f_loss,
    f_softargmax as f_softargmax,
    f_softmax as f_softmax,
)
