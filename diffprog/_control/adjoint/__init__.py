from .base import (
    AbstractAdjoint as AbstractAdjoint,
    Found as Found,
    NoAdjoint as NoAdjoint,
    Solved as Solved,
    still as still,
)
from .implicit import ImplicitAdjoint as ImplicitAdjoint
from .unrolled import UnrolledAdjoint as UnrolledAdjoint
