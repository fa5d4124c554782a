"""Optimizers: methods that step the parameters of a model."""

from ._risk_descent import (
    lsvrg as lsvrg,
    LSVRGState as LSVRGState,
    prospect as prospect,
    ProspectState as ProspectState,
    RiskDescent as RiskDescent,
)
