from .base import AbstractDirection as AbstractDirection, Expansion as Expansion
from .ddp import DDP as DDP
from .gauss_newton import GaussNewton as GaussNewton
from .gradient import Gradient as Gradient
from .ilqr import ILQR as ILQR
from .moreau import MoreauGradient as MoreauGradient
from .newton import Newton as Newton
from .rollouts import (
    AbstractRollout as AbstractRollout,
    Feedback as Feedback,
    LinearRollout as LinearRollout,
)
