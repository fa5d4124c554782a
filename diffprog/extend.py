"""For those who write a direction, a roll-out, a search, a loss or an oracle.

The abstract classes stand beside their members: `dp.AbstractDirection`,
`dp.losses.AbstractLoss` and others. Here are the functions and records that ours are
made of. The contract is a weaker one: what stands here may change in any minor version,
with a note in the changelog.
"""

from ._chain.limits import moved as moved, projected as projected
from ._chain.vector import run as run, simulate as simulate
from ._chain.vectorize import vectorize as vectorize
from ._common.linalg import matmul as matmul
from ._common.tree import norm as norm, vdot as vdot
from ._common.types import number as number
from ._control.adjoint import Found as Found, Solved as Solved
from ._control.direction.base import (
    feedforward as feedforward,
    gradients as gradients,
    linear_quadratic as linear_quadratic,
)
from ._control.lqr.expand import (
    AbstractModel as AbstractModel,
    adjoints as adjoints,
    Recomputed as Recomputed,
    Stored as Stored,
    WithTensors as WithTensors,
)
from ._operators.targets import like as like
from .losses._block import (
    majorized_block as majorized_block,
    newton_block as newton_block,
)
from .losses._factor import (
    class_factor as class_factor,
    diagonal_factor as diagonal_factor,
    flat_factor as flat_factor,
    ScaledFactor as ScaledFactor,
)
from .losses._loss import per_example as per_example, total as total
from .oracles._inverses import view as view
from .oracles._rules import run_network as run_network, with_rule as with_rule
