import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._chain.limits import moved
from ..._chain.vector import simulate, VectorChain, VectorTrajectory
from ..._common.linalg import matmul
from ..._common.types import AbstractPart, Rows, Stacks


class AbstractRollout(AbstractPart):
    """How the gains of a backward pass become a trial trajectory.

    - `keeps_limits`: whether u + v lies within the limits of the controls; only then
        are problems with such ones taken.
    """

    keeps_limits: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def roll(
        self,
        chain: VectorChain,
        trajectory: VectorTrajectory,
        model: Any,
        gains: Stacks,
        stepsize: Float[Array, ""],
    ) -> tuple[VectorTrajectory, Rows]:
        """The trajectory of u + v at `stepsize` s, and v of every stage."""


class Feedback(AbstractRollout):
    """v = s k + K (x_new - x), x_new being the states of the true dynamics.

    u + v is cut off at the limits of the controls. Gaps are 1 - s times as large.
    """

    keeps_limits: ClassVar[bool] = True

    def roll(self, chain, trajectory, model, gains, stepsize):
        def control(segment, x_new, _, x, u, gains, *limits):
            y = segment.difference(x_new, x)
            v = stepsize * gains[:, 0] + matmul(gains[:, 1:], y)
            u, v = moved(u, v, *limits)
            return u, None, v

        x0, data = trajectory.xs[0][0], (trajectory.xs, trajectory.us, gains)
        gaps = trajectory.left(chain, stepsize)
        return simulate(chain, control, x0, None, *data, *chain.limits, gaps=gaps)


class LinearRollout(AbstractRollout):
    """v = s k + K y along the linear model, y' = s c + A y + B v from y = 0.

    u + v is cut off at the limits of the controls, and v is what is left. Gaps, which
    are the c of the model, are 1 - s times as large.
    """

    keeps_limits: ClassVar[bool] = True

    def roll(self, chain, trajectory, model, gains, stepsize):
        def control(segment, x_new, y, u, gains, F, *limits):
            v = stepsize * gains[:, 0] + matmul(gains[:, 1:], y)
            u, v = moved(u, v, *limits)
            c = stepsize * F[1:, 0] if local.has_gaps else F[1:, 0]
            return u, c + matmul(F[1:, 1:], jnp.concatenate([y, v])), v

        local, at = chain.around(trajectory)
        x0, y0 = trajectory.xs[0][0], jnp.zeros(at.xs[0].shape[1], chain.dtype)
        data = (trajectory.us, gains, model.dynamics(local, at), *chain.limits)
        gaps = trajectory.left(chain, stepsize)
        return simulate(chain, control, x0, y0, *data, gaps=gaps)
