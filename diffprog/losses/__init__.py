"""Losses and operators of f-divergences."""

from ._alpha import Alpha as Alpha
from ._bellman import (
    arm_from_ebm as arm_from_ebm,
    ebm_from_arm as ebm_from_arm,
    rewards_from_logits as rewards_from_logits,
)
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
from ._energy import (
    Enumeration as Enumeration,
    exact_objective as exact_objective,
    minmin_objective as minmin_objective,
    Normalization as Normalization,
    Permutations as Permutations,
    Subsets as Subsets,
)
from ._generated import generator as generator
from ._operators import (
    f_loss as f_loss,
    f_softargmax as f_softargmax,
    f_softmax as f_softmax,
)
from ._viterbi import soft_viterbi as soft_viterbi, viterbi as viterbi
