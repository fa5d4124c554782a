import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._common.types import check_number


TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # tau, gamma, zeta
EDGE = 1e-6  # uniform numbers stay away from 0 and 1


class HardConcrete(eqx.Module):
    r"""Gates z in [0, 1] that are 0 or 1 with positive probability, and trainable.

    $$z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \quad
    s = \sigma\left(\frac{\log u - \log(1 - u) + a}{\tau}\right),$$

    with u uniform, tau = 2/3, gamma = -0.1, zeta = 1.1, and
    $P(z > 0) = \sigma(a - \tau \log(-\gamma / \zeta))$. Multiply what may be left
    out, a weight, a unit, a channel, by its gate; divide the first weights by 1 - drop,
    so that outputs keep their scale; and limit the `density`. Gates need a rate of
    their own, ten to a hundred times that of weights.

    - `log_odds`: a, the parameters, an array.
    """

    log_odds: Float[Array, "..."]

    def __init__(
        self,
        shape: int | tuple[int, ...],
        drop: float = 0.5,
        *,
        key: PRNGKeyArray | None = None,
        dtype: Any = float,
    ):
        check = lambda d: (0 < d) & (d < 1)
        check_number("drop", drop, "a number between 0 and 1", check)
        mean = math.log1p(-drop) - math.log(drop)
        self.log_odds = jnp.full(shape, mean, dtype)
        if key is not None:
            noise = jax.random.normal(key, self.log_odds.shape, self.log_odds.dtype)
            self.log_odds = self.log_odds + 0.01 * noise

    def __call__(self, key: PRNGKeyArray | None = None) -> Float[Array, "..."]:
        """Sampled gates; without a key those of the median, u = 1/2, for evaluation."""
        logit = self.log_odds
        if key is not None:
            u = jax.random.uniform(key, logit.shape, logit.dtype, EDGE, 1 - EDGE)
            logit = logit + jnp.log(u) - jnp.log1p(-u)
        stretched = jax.nn.sigmoid(logit / TEMPERATURE) * (HIGH - LOW) + LOW
        return jnp.clip(stretched, 0, 1)

    def probabilities(self) -> Float[Array, "..."]:
        """P(z > 0) of every gate."""
        return jax.nn.sigmoid(self.log_odds - TEMPERATURE * math.log(-LOW / HIGH))

    def density(self, sizes: Any = 1.0) -> Float[Array, ""]:
        """The expected share of what is left: the mean of P(z > 0), by `sizes`.

        `sizes` is how much lies behind every gate, such as the weights of a unit; a
        number, or an array that broadcasts to the gates.
        """
        return self._share(self.probabilities(), sizes)

    def realized_density(self, sizes: Any = 1.0) -> Float[Array, ""]:
        """The share of what is left by the gates of the median, which has no gradient.

        Some points below the `density`.
        """
        return self._share((self() > 0).astype(self.log_odds.dtype), sizes)

    def _share(self, open_: Array, sizes: Any) -> Array:
        sizes = jnp.asarray(sizes).astype(open_.dtype)
        sizes = jnp.broadcast_to(sizes, open_.shape)
        return jnp.sum(sizes * open_) / jnp.sum(sizes)


HardConcrete.__init__.__doc__ = """**Arguments:**

- `shape`: that of the gates.
- `drop`: a number in (0, 1); gates start at a = log((1 - drop) / drop).
- `key`: adds a little noise to `log_odds`, so that gates differ.
- `dtype`: of `log_odds`.

Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0
Regularization", 2018, arXiv 1712.01312.
"""
