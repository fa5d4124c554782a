"""Cooper: constraints in learning on PyTorch."""

import cooper
import numpy
import torch
from cooper import formulations, optim

from ..learning_pairs import (
    ADAM,
    DATA,
    ETA,
    GAIN,
    MOMENTUM,
    PENALTY,
    RATES,
    SMOOTHING,
    START,
    STEPS,
    terms,
)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def ascent(multipliers):
    return torch.optim.SGD(multipliers, lr=ETA, maximize=True)


def nupi(start):
    gains = dict(Kp=number(GAIN / ETA), Ki=number(1.0), ema_nu=SMOOTHING)
    return lambda multipliers: optim.nuPI(
        multipliers, lr=ETA, init_type=start, maximize=True, **gains
    )


def adam(multipliers):
    return torch.optim.Adam(multipliers, lr=ADAM, maximize=True)


OPTIMIZERS = {
    "SGD": lambda x: torch.optim.SGD(x, lr=RATES["SGD"]),
    "momentum": lambda x: torch.optim.SGD(x, lr=RATES["momentum"], momentum=MOMENTUM),
    "Adam": lambda x: torch.optim.Adam(x, lr=RATES["Adam"]),
}
DUALS = {
    "ascent": (formulations.Lagrangian, ascent),
    "augmented": (formulations.AugmentedLagrangian, ascent),
    "nuPI, zeros": (formulations.Lagrangian, nupi(optim.nuPIInitType.ZEROS)),
    "nuPI, SGD": (formulations.Lagrangian, nupi(optim.nuPIInitType.SGD)),
    "Adam": (formulations.Lagrangian, adam),
    "penalty": (formulations.QuadraticPenalty, None),
}
ORDERS = {
    "dual first": optim.AlternatingDualPrimalOptimizer,
    "simultaneous": optim.SimultaneousOptimizer,
    "primal first": optim.AlternatingPrimalDualOptimizer,
}


def constraint(kind, rows: int, formulation) -> cooper.Constraint:
    options = {}
    if formulation is not formulations.QuadraticPenalty:
        options["multiplier"] = cooper.multipliers.DenseMultiplier(
            num_constraints=rows, dtype=torch.float64
        )
    if formulation is not formulations.Lagrangian:
        coefficient = cooper.penalty_coefficients.DensePenaltyCoefficient
        options["penalty_coefficient"] = coefficient(init=number(PENALTY))
    return cooper.Constraint(
        constraint_type=kind, formulation_type=formulation, **options
    )


class Problem(cooper.ConstrainedMinimizationProblem):
    def __init__(self, x, formulation):
        super().__init__()
        self.x, self.data = x, [torch.tensor(array) for array in DATA]
        self.h = constraint(cooper.ConstraintType.EQUALITY, 2, formulation)
        self.g = constraint(cooper.ConstraintType.INEQUALITY, 6, formulation)

    def compute_cmp_state(self):
        loss, h, g = terms(torch, self.data, self.x)
        violations = {self.h: h, self.g: g}
        observed = {
            constraint: cooper.ConstraintState(violation=violation)
            for constraint, violation in violations.items()
        }
        return cooper.CMPState(loss=loss, observed_constraints=observed)

    def both(self):
        """The multipliers of inequalities, then those of equalities."""
        values = [c.multiplier().detach().numpy() for c in (self.g, self.h)]
        return numpy.concatenate(values)


def run(optimizer: str, dual: str, order: str | None, steps: int = STEPS):
    """Iterates and multipliers of all steps."""
    formulation, duals = DUALS[dual]
    x = torch.nn.Parameter(torch.tensor(START))
    problem = Problem(x, formulation)
    parts = dict(cmp=problem, primal_optimizers=OPTIMIZERS[optimizer]([x]))
    if duals is None:
        training = optim.UnconstrainedOptimizer(**parts)
    else:
        parts["dual_optimizers"] = duals(problem.dual_parameters())
        training = ORDERS[order](**parts)
    xs, multipliers = [], []
    for _ in range(steps):
        training.roll()
        xs.append(x.detach().numpy().copy())
        multipliers.append(problem.both() if duals else numpy.zeros(8))
    return numpy.array(xs), numpy.array(multipliers)
