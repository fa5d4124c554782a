from .base import AbstractDirection as AbstractDirection, Expansion as Expansion
from .gradient import Gradient as Gradient
from .moreau import MoreauGradient as MoreauGradient
from .newton import (
    DDP as DDP,
    GaussNewton as GaussNewton,
    ILQR as ILQR,
    Newton as Newton,
)
from .rollouts import (
    AbstractRollout as AbstractRollout,
    Feedback as Feedback,
    LinearRollout as LinearRollout,
)
