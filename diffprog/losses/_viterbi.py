"""The best path through a lattice, and smoothed."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._common.loops import scan
from .._operators.call import check_temperature, Divergence
from .._operators.families import KL
from .._operators.generated import as_divergence
from .._operators.softmax import f_softargmax, smooth_max


Potentials = Float[ArrayLike, "T S S"]
Scores = Float[ArrayLike, " S"] | None


def soft_viterbi(
    potentials: Potentials,
    f: Divergence = KL(),
    reference=None,
    *,
    start: Scores = None,
    final: Scores = None,
    mask: Bool[ArrayLike, " T"] | None = None,
    temperature: Any = 1.0,
) -> Float[Array, ""]:
    r"""The score of the best path, every maximum on the way smoothed.

    $$v_t(i) = \max_p \sum_j p_j (\theta_{tij} + v_{t-1}(j)) + \beta H_f(p),$$

    from $v_{-1}$ = `start` to the smoothed maximum of $v_{T-1}$ + `final`. Its gradient
    in `potentials` are the marginals: how probable it is to go from j to i at t, in a
    random walk backward through the lattice. For KL and temperature 1 the value is the
    logsumexp over all paths, the log-partition of a linear-chain conditional random
    field. For other f, such as [`diffprog.losses.ChiSquare`][], marginals can be 0.

    **Arguments:**

    - `potentials`: theta; `[t, i, j]` is the score of going from state j to state i in
        move t, -inf if that is impossible.
    - `f`: a generator.
    - `reference`: the measure over the states that one may come from, as in
        [`diffprog.losses.f_softmax`][]: `"unit"`, where $H_f$ is the entropy of f, 0
        for a sure choice; `"uniform"`; or an array of shape `(S,)`. Needed but for KL.
    - `start`, `final`: scores of the first and of the last state, 0 if not given: T
        moves visit T + 1 states. To begin in state s, let all others have -inf.
    - `mask`: false for moves that are skipped, which pads shorter sequences.
    - `temperature`: beta > 0; towards 0 this is [`diffprog.losses.viterbi`][].

    **Returns:** the value; -inf, with gradient 0, if no path is possible.

    **Raises:** `ValueError` for shapes that do not fit, and a temperature of 0.

    Takes O(T S^2) time and memory; use `jax.vmap` for a batch.

    Source: Mensch, Blondel, "Differentiable Dynamic Programming for Structured
    Prediction and Attention", 2018, arXiv 1802.03676.
    """
    check_temperature(temperature, "; for the limit 0 use `viterbi`")
    potentials, first, last, mask = _check_moves(potentials, start, final, mask)
    dtype = potentials.dtype
    named = isinstance(reference, str | None)
    name, q = (reference, None) if named else (None, jnp.asarray(reference, dtype))
    beta, f = jnp.asarray(temperature, dtype), as_divergence(f)
    return _soft_viterbi(name, f, q, beta, first, last, potentials, mask)


@ft.partial(jax.jit, static_argnums=0)
def _soft_viterbi(name, f, q, beta, first, last, potentials, mask) -> Array:
    v = _values_to_go(name, f, q, beta, first, potentials, mask)[-1]
    return _smooth_best(name, f, q, beta, _plus(last, v)[None])[0]


def _smooth_best(name, f, q, beta, scores: Array) -> Array:
    return smooth_max(scores, f, name if q is None else q, temperature=beta)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _values_to_go(name, f, q, beta, start, potentials, mask) -> Array:
    """v_{-1}, ..., v_{T-1}, shape `(T + 1, S)`."""

    def move(v, stage):
        theta, real = stage
        v = jnp.where(real, _smooth_best(name, f, q, beta, _arrive(theta, v)), v)
        return v, v

    _, vs = scan(move, start, (potentials, mask))
    return jnp.concatenate([start[None], vs])


@_values_to_go.defjvp
def _(name, primals, tangents):
    # dv_t = direct_t + Q_t dv_{t-1}. All that is not linear stays outside the loop:
    # in a second derivative `lax.scan` forgets the rules of what is inside.
    f, q, beta, start, potentials, mask = primals
    *moved, dstart, dpotentials, _ = tangents
    vs = _values_to_go(name, *primals)

    def direct(f, q, beta, potentials):
        return _smooth_best(name, f, q, beta, _arrive(potentials, vs[:-1, None]))

    ds = jax.jvp(direct, (f, q, beta, potentials), (*moved, dpotentials))[1]
    scores = _arrive(potentials, vs[:-1, None])
    Q = f_softargmax(scores, f, name if q is None else q, temperature=beta)

    def move(dv, stage):
        d, Q, real = stage
        dv = jnp.where(real, d + Q @ dv, dv)
        return dv, dv

    _, dvs = scan(move, dstart, (ds, Q, mask))
    return vs, jnp.concatenate([dstart[None], dvs])


def viterbi(
    potentials: Potentials,
    *,
    start: Scores = None,
    final: Scores = None,
    mask: Bool[ArrayLike, " T"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, " T+1"]]:
    """The best path: the limit of [`diffprog.losses.soft_viterbi`][] at temperature 0.

    **Arguments:** those of [`diffprog.losses.soft_viterbi`][].

    **Returns:** its score, and its T + 1 states; a move that is skipped stays where it
    is. Of equal paths it is the one of lower states at the end.
    """
    return _viterbi(*_check_moves(potentials, start, final, mask))


@jax.jit
def _viterbi(potentials, first, last, mask) -> tuple[Array, Array]:
    states = jnp.arange(potentials.shape[-1])

    def move(v, stage):
        theta, real = stage
        scores = _arrive(theta, v)
        origin = jnp.where(real, jnp.argmax(scores, -1), states)
        return jnp.where(real, jnp.max(scores, -1), v), origin

    back = lambda state, origin: (origin[state], state)
    v, origins = scan(move, first, (potentials, mask))
    v = v + last
    origin, path = scan(back, jnp.argmax(v), origins, reverse=True)
    return jnp.max(v), jnp.concatenate([origin[None], path])


def _arrive(theta: Array, v: Array) -> Array:
    """theta_ij + v_j."""
    return _plus(theta, jnp.broadcast_to(v, theta.shape))


def _plus(a: Array, b: Array) -> Array:
    """a + b, where -inf stays -inf and passes no derivative on."""
    possible = (a != -jnp.inf) & (b != -jnp.inf)  # as NaN is
    total = jnp.where(possible, a, 0) + jnp.where(possible, b, 0)
    return jnp.where(possible, total, -jnp.inf)


def _check_moves(potentials, start, final, mask) -> tuple[Array, Array, Array, Array]:
    potentials = jnp.asarray(potentials)
    shape = potentials.shape
    if potentials.ndim != 3 or shape[1] != shape[2] or shape[1] == 0:
        raise ValueError(
            f"`potentials` has shape {shape}; (T, S, S), a square of scores per move, "
            "is expected: `jax.vmap` over sequences."
        )
    if not jnp.issubdtype(potentials.dtype, jnp.floating):
        raise TypeError(
            f"`potentials` has dtype {potentials.dtype}; floats are expected: convert "
            "it with `.astype(float)`."
        )
    ends: list[Array] = []
    for name, scores in (("start", start), ("final", final)):
        scores = jnp.zeros(shape[1]) if scores is None else jnp.asarray(scores)
        if scores.shape != shape[1:2]:
            raise ValueError(
                f"`{name}` has shape {scores.shape}; {shape[1:2]} is expected for "
                f"`potentials` of shape {shape}."
            )
        ends.append(scores.astype(potentials.dtype))
    mask = jnp.ones(shape[0], bool) if mask is None else jnp.asarray(mask)
    if mask.shape != shape[:1] or mask.dtype != bool:
        raise ValueError(
            f"`mask` has shape {mask.shape} and dtype {mask.dtype}; booleans of shape "
            f"{shape[:1]} are expected."
        )
    return potentials, ends[0], ends[1], mask
