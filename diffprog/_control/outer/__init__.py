from .augmented_lagrangian import AugmentedLagrangian as AugmentedLagrangian
from .base import AbstractOuter as AbstractOuter, OuterState as OuterState
