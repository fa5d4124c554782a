"""Energy models of sequences and autoregressive models: one family, two sets of scores.

A state is a prefix y_0 .. y_{t-1}. An energy model adds up rewards r(state, token), an
autoregressive model takes the softmax of logits(state, token) at each state. They agree
where the logits are the rewards plus the value of what comes next:

    logits(s, v) = r(s, v) + V(s + v),    V(s) = log sum_v exp logits(s, v),

with V = 0 at the end: behind `eos`, and at the full length.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer

from .._common.types import came, is_known
from .._operators.call import Divergence
from .._operators.families import KL
from .._operators.softmax import smooth_max
from .._operators.targets import as_array


Tables = Sequence[Float[ArrayLike, "..."]]


def arm_from_ebm(
    rewards: Tables,
    f: Divergence = KL(),
    reference=None,
    *,
    eos: int | None = None,
) -> tuple[list[Array], Array]:
    r"""The logits of the autoregressive model with the distribution of an energy model.

    $$q_t(s, v) = r_t(s, v) + V_{t+1}(s + v), \qquad
    V_t(s) = \max_p\, \langle p, q_t(s, \cdot) \rangle + H_f(p),$$

    backward in t: a Bellman recursion whose maximum is smoothed. For KL, V is the
    logsumexp of the logits, and the probability of a sequence, proportional to
    $\exp \sum_t r_t$, is the product of the softmaxes on its way. Other f give a
    regularized decision process: the policies `f_softargmax(logits[t], f, reference)`
    are optimal in it, but their product is not the f-softargmax of total rewards.

    **Arguments:**

    - `rewards`: for t = 0, ..., T - 1 an array of shape `(V,) * t + (V,)`: the prefix,
        then the token.
    - `f`: a generator.
    - `reference`: the measure over tokens, as in [`diffprog.losses.f_softmax`][]:
        `"unit"`, where $H_f$ is the entropy of f, Shannon's for KL; `"uniform"`; or an
        array that broadcasts to each of `rewards`. Needed but for KL.
    - `eos`: the token that ends a sequence early, if there is one. What the tables have
        for prefixes with it does not matter.

    **Returns:** the logits, in the layout of `rewards`, and V of the empty prefix: the
    log-partition log Z. Its gradient in `rewards` are the probabilities to come by a
    state and choose a token.

    **Raises:** `ValueError` for a layout that does not fit.

    Takes O(V^T) time and memory. For rewards that depend on the last token only, see
    [`diffprog.losses.soft_viterbi`][].

    Source: Blondel, Sander, Vivier-Ardisson, Liu, Roulet, "Autoregressive Language
    Models are Secretly Energy-Based Models", 2025, arXiv 2512.15605.
    """
    rewards = _check_tables("rewards", rewards, eos)
    logits = [rewards[-1]]
    value = smooth_max(logits[0], f, reference)
    for r in reversed(rewards[:-1]):
        logits.append(r + _without_eos(value, eos))
        value = smooth_max(logits[-1], f, reference)
    return logits[::-1], value


def ebm_from_arm(
    logits: Tables,
    f: Divergence = KL(),
    reference=None,
    *,
    eos: int | None = None,
) -> list[Array]:
    r"""The rewards of the energy model with the distribution of logits.

    $$r_t(s, v) = q_t(s, v) - V_{t+1}(s + v),$$

    the inverse of [`diffprog.losses.arm_from_ebm`][]; no recursion. Training does not
    determine what is added to all logits of a state: rewards are defined only up to
    c(s) - c(s + v), which changes no probability.

    **Arguments:** those of [`diffprog.losses.arm_from_ebm`][], with `logits`.

    **Returns:** the rewards, in the layout of `logits`.
    """
    logits = _check_tables("logits", logits, eos)
    following = [_without_eos(smooth_max(q, f, reference), eos) for q in logits[1:]]
    # An impossible token stays so, whatever comes next.
    minus = lambda q, V: jnp.where(q > -jnp.inf, q - jnp.where(q > -jnp.inf, V, 0), q)
    return [*map(minus, logits[:-1], following), logits[-1]]


def rewards_from_logits(
    logits: Float[ArrayLike, "*batch T V"],
    tokens: Integer[ArrayLike, "*batch T"],
    f: Divergence = KL(),
    reference=None,
    *,
    eos: int | None = None,
) -> Float[Array, "*batch T"]:
    r"""The rewards of given sequences, from the logits of a causal model along them.

    $$r_t = q_t(y_t) - V_{t+1}.$$

    Their sum R is the energy of the sequence, and R - V_0 its log-probability, where
    V_0 = `logsumexp(logits[0])` (for KL).

    **Arguments:**

    - `logits`: row t has those of token t given the tokens before.
    - `tokens`: y.
    - `f`, `reference`: as in [`diffprog.losses.arm_from_ebm`][].
    - `eos`: the token that ends a sequence, if there is one. Rewards behind the first
        one are 0, whatever the logits are there; a sequence without it ends at T.

    **Returns:** the reward of every token; NaN for a traced one that there is not.

    **Raises:** `ValueError` for known tokens out of range, but for those behind `eos`.

    Source: that of [`diffprog.losses.arm_from_ebm`][].
    """
    logits, tokens = jnp.asarray(logits), as_array(tokens)
    if logits.ndim < 2:
        raise ValueError(
            f"`logits` has shape {logits.shape}; (T, V), a row for every token, is "
            "expected."
        )
    _check_eos(eos, logits.shape[-1])
    _check_tokens(tokens, logits, eos)
    known, tokens = is_known(tokens), jnp.asarray(tokens)
    last = jnp.zeros_like(tokens, bool) if eos is None else tokens == eos
    ends = jnp.cumsum(last, -1)
    ended = (ends > 1) | (ends == 1) & ~last
    logits = jnp.where(ended[..., None], 0, logits)
    index = jnp.clip(tokens, 0, logits.shape[-1] - 1)[..., None]
    chosen = jnp.take_along_axis(logits, index, -1)[..., 0]
    if not known:
        outside = (tokens != index[..., 0]) & ~ended
        chosen = jnp.where(outside, jnp.nan, 1) * chosen
    values = smooth_max(logits, f, reference)
    following = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], -1)
    return jnp.where(ended, 0, chosen - jnp.where(last, 0, following))


def _without_eos(value: Array, eos: int | None) -> Array:
    """V of the states behind each token: 0 behind `eos`."""
    if eos is None:
        return value
    tokens = jnp.arange(value.shape[-1])
    ends = jnp.broadcast_to(tokens == eos, value.shape)
    return jnp.where(ends, 0, value)


def _check_tables(name: str, tables: Tables, eos: int | None) -> list[Array]:
    if not hasattr(tables, "__len__"):
        raise TypeError(f"`{name}` is {came(tables)}; a list of arrays is expected.")
    if len(tables) == 0:
        raise ValueError(f"`{name}` is empty; one array per token is expected.")
    V = np.shape(tables[0])[-1] if np.ndim(tables[0]) else 0
    for t, table in enumerate(tables):
        if np.shape(table) != (V,) * (t + 1):
            raise ValueError(
                f"`{name}[{t}]` has shape {np.shape(table)}; {t + 1} axes of one "
                f"length, that of `{name}[0]`, are expected: prefix, then token."
            )
    _check_eos(eos, V)
    return [jnp.asarray(table) for table in tables]


def _check_eos(eos: Any, V: int):
    if eos is None or isinstance(eos, int | np.integer) and 0 <= eos < V:
        return
    raise ValueError(f"`eos` is {came(eos)}; a token from 0 to {V - 1} is expected.")


def _check_tokens(tokens: Any, logits: Array, eos: int | None):
    shape, V = logits.shape[:-1], logits.shape[-1]
    if tokens.shape != shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"`tokens` has shape {tokens.shape} and dtype {tokens.dtype}; integers of "
            f"shape {shape} are expected for `logits` of shape {logits.shape}."
        )
    if not is_known(tokens):
        return
    known = np.asarray(tokens)
    behind = False if eos is None else np.cumsum(known == eos, -1) > 0
    outside = ((known < 0) | (known >= V)) & ~np.asarray(behind)
    if outside.any():
        bad = known[outside][0]
        raise ValueError(f"`tokens` contains {bad}; the tokens are 0 to {V - 1}.")
