from .base import AbstractAdjoint as AbstractAdjoint, Found as Found, still as still
from .implicit import ImplicitAdjoint as ImplicitAdjoint
