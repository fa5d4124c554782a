"""Spectral risks: weighted sums of sorted losses, plain and smoothed."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._common.types import came, check_positive, is_known
from .._operators.call import Divergence
from .._operators.divergence import AbstractDivergence, has_numbers
from .._operators.generated import as_divergence
from .._operators.root import weighted
from ._isotonic import block_ratios, blocks


Vector = Float[Array, " n"]
Number = int | float | Float[Array, ""]
Kind = Literal["superquantile", "extremile", "esrm"]

# Which parameters are accepted, and which mean the plain average.
ACCEPTED = {
    "superquantile": (lambda p: 0 <= p < 1, "a number in [0, 1); 0 is the mean"),
    "extremile": (lambda p: 1 <= p < np.inf, "a number >= 1; 1 is the mean"),
    "esrm": (lambda p: 0 < p < np.inf, "a number > 0"),
}


def spectrum(kind: Kind, n: int, parameter: int | float) -> Float[Array, " n"]:
    r"""The weights of a spectral risk: $\sigma_i = \int_{(i-1)/n}^{i/n} s(t)\, dt$.

    | `kind` | $s(t)$ | `parameter` | the risk is |
    | --- | --- | --- | --- |
    | `"superquantile"` | $1[t \ge q] / (1 - q)$ | $0 \le q < 1$ | the mean of the worst share $1 - q$ (CVaR) |
    | `"extremile"` | $r t^{r-1}$ | $r \ge 1$ | the mean of the worst of r draws |
    | `"esrm"` | $\rho e^{\rho t} / (e^\rho - 1)$ | $\rho > 0$ | an exponential weighting |

    **Arguments:**

    - `kind`: one of the three names.
    - `n`: how many losses there are.
    - `parameter`: a Python number. 0.5, 2 and 1 are common.

    **Returns:** sigma, shape `(n,)`: not negative, nondecreasing, of sum 1.

    **Raises:** `ValueError` for a name, number of losses or parameter out of range.

    Source: Mehta, Roulet, Pillutla, Liu, Harchaoui, "Stochastic Optimization for
    Spectral Risk Measures", 2023, arXiv 2212.05149.
    """  # noqa: E501
    if kind not in ACCEPTED:
        names = ", ".join(f'"{name}"' for name in ACCEPTED)
        raise ValueError(f"`kind` is {kind!r}; {names} are accepted.")
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"`n` is {n!r}; an integer >= 1 is expected.")
    if isinstance(parameter, bool) or not isinstance(
        parameter, (int, float, np.number)
    ):
        raise TypeError(
            f"`parameter` is {came(parameter)}; a Python number is expected."
        )
    accepts, expected = ACCEPTED[kind]
    p = float(parameter)
    if not accepts(p):
        raise ValueError(f"`parameter` of {kind} is {p:g}; {expected} is expected.")
    i = np.arange(1, n + 1)
    if kind == "superquantile":
        sigma = np.clip(i - n * p, 0, 1) / (n * (1 - p))
    elif kind == "extremile":
        log = np.log1p(-1 / i[1:])  # (i^r - (i-1)^r) / n^r without cancellation
        sigma = (i / n) ** p * np.concatenate([[1.0], -np.expm1(p * log)])
    else:
        sigma = np.exp(p * (i - n) / n) * (np.expm1(-p / n) / np.expm1(-p))
    return jnp.asarray(np.maximum.accumulate(sigma / sigma.sum()), float)


def spectral_risk(
    losses: Float[Array, " n"],
    sigma: Float[Array, " n"],
    f: Divergence | None = None,
    *,
    smoothing: Number | None = None,
) -> Float[Array, ""]:
    r"""A weighted sum of sorted losses, the largest with the largest weight.

    $$R_\sigma(\ell) = \sum_i \sigma_i\, \ell_{(i)}
    = \max_{q \in P(\sigma)} \langle q, \ell \rangle,$$

    where $P(\sigma)$ is the convex hull of all orders of sigma. With `f` and
    `smoothing` it is smooth,

    $$h_\nu(\ell) = \max_{q \in P(\sigma)} \langle q, \ell \rangle
    - \nu D_f(q, \tfrac1n), \quad
    0 \le R_\sigma - h_\nu \le \nu D_f(\sigma, \tfrac1n),$$

    if f(0) is finite or no entry of sigma is 0.

    **Arguments:**

    - `losses`: l, one per example, shape `(n,)`; `jax.vmap` for several tables.
    - `sigma`: the spectrum, shape `(n,)`: see [`diffprog.losses.spectrum`][].
    - `f`: a generator such as [`diffprog.losses.ChiSquare`][], or any convex function
        of one number; without it the risk is not smoothed.
    - `smoothing`: nu > 0, needed with `f`. The larger, the nearer to the mean.

    **Returns:** the risk. Its gradient in the losses is
    [`diffprog.losses.spectral_weights`][]. Smoothed, it is differentiable in
    `losses`, `sigma`, `smoothing` and a traced alpha, and twice in `losses` where the
    blocks of equal level do not change.

    **Raises:** `ValueError` for shapes that do not fit, a sigma that falls, or a nu
    that is not positive, where known; `TypeError` if only one of `f` and `smoothing`
    is given.

    Costs one sort, and with `f` what the weights cost.

    Sources: that of [`diffprog.losses.spectrum`][]; Mehta, Roulet, Pillutla, Harchaoui,
    "Distributionally Robust Optimization with Bias and Variance Reduction", 2024, arXiv
    2310.13863.
    """
    losses, sigma, known, nu, dtype = _prepare(losses, sigma, f, smoothing)
    if known is None:
        order, _ = _ranks(losses)
        return jnp.sum(weighted(sigma, losses[order])).astype(dtype)
    return _smoothed_compiled(known, losses, sigma, nu).astype(dtype)


def spectral_weights(
    losses: Float[Array, " n"],
    sigma: Float[Array, " n"],
    f: Divergence | None = None,
    *,
    smoothing: Number | None = None,
) -> Float[Array, " n"]:
    r"""The weights of the losses in a spectral risk: the q that attains the maximum.

    $$q = \operatorname{argmax}_{q \in P(\sigma)} \langle q, \ell \rangle
    - \nu D_f(q, \tfrac1n), \quad
    q_i = \tfrac1n (f^*)'(\ell_i / \nu - v_{B(i)}),$$

    where the weights of a block B of neighbors among the sorted losses sum up to those
    of sigma. Without `f`, sigma at the ranks of the losses; equal losses are then
    ranked as they come.

    **Arguments:** those of [`diffprog.losses.spectral_risk`][].

    **Returns:** q, shape `(n,)`, of sum 1. With `f` it changes with the losses by
    $dq_i = \frac{w_i}{\nu}(d\ell_i - \bar{d\ell}_{B(i)})$, $w_i = \frac1n f^{*\prime\prime}$,
    the mean being weighted by w.

    **Raises:** as [`diffprog.losses.spectral_risk`][].

    A sort, then blocks: for KL and chi-square by pool-adjacent-violators, O(n) time in
    2 n steps one after the other; for other f by splitting all blocks at once, O(n) per
    round. 9 to 18 rounds were seen with nu as large as the spread of 442 to 5000 losses,
    26 to 130 with a hundredth of it; n is the worst case. O(n) memory. For a superquantile, [`diffprog.losses.capped_f_softargmax`][] needs no sort.

    Source: Blondel, Teboul, Berthet, Djolonga, "Fast Differentiable Sorting and
    Ranking", 2020, arXiv 2002.08871, for chi-square and KL.
    """  # noqa: E501
    losses, sigma, known, nu, dtype = _prepare(losses, sigma, f, smoothing)
    if known is None:
        _, rank = _ranks(losses)
        return sigma[rank].astype(dtype)
    return _weights(known, losses, sigma, nu)[0].astype(dtype)


def _ranks(losses: Vector):
    """Which loss has a rank, and which rank a loss."""
    order = jnp.argsort(jax.lax.stop_gradient(losses))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(losses.shape[0]))
    return order, rank


@jax.jit
def _weights(f: AbstractDivergence, losses: Vector, sigma: Vector, nu):
    """q, and l - nu f'(n q) at every rank: one number per block."""
    order, rank = _ranks(losses)
    ordered = losses[order]
    ids = blocks(f, *jax.lax.stop_gradient((ordered, sigma, nu)))
    u, levels = block_ratios(f, ordered, sigma, nu, ids)
    return u[rank] / losses.shape[0], levels - nu * f.origin


@jax.custom_jvp
def _smoothed(f: AbstractDivergence, losses: Vector, sigma: Vector, nu):
    q, _ = _weights(f, losses, sigma, nu)
    return _height(f, losses, q, nu)


@_smoothed.defjvp
def _(primals, tangents):
    # By the envelope theorem q stays.
    (f, losses, sigma, nu), (df, dlosses, dsigma, dnu) = primals, tangents
    q, levels = _weights(f, losses, sigma, nu)
    change = jnp.sum(q * dlosses) - _divergence(f, losses, q) * dnu
    change = change + jnp.sum(jnp.where(jnp.isinf(levels), 0, levels) * dsigma)
    if has_numbers(f):
        by_f = jax.jvp(lambda f: _divergence(f, losses, q), (f,), (df,))[1]
        change = change - nu * by_f
    return _height(f, losses, q, nu), change


_smoothed_compiled = jax.jit(_smoothed)


def _height(f: AbstractDivergence, losses: Vector, q: Vector, nu) -> Array:
    """<q, l> - nu D_f(q, 1/n), infinite where <q, l> is, whatever D is."""
    mean = jnp.sum(weighted(q, losses))
    return jnp.where(mean == jnp.inf, mean, mean - nu * _divergence(f, losses, q))


def _divergence(f: AbstractDivergence, losses: Vector, q: Vector) -> Array:
    """D_f(q, 1/n). What is lost to rounding of a weight counts as next to nothing."""
    u = q.shape[0] * q
    lost = (u == 0) & (losses > -jnp.inf)
    return jnp.mean(f.value(jnp.where(lost, jnp.finfo(u.dtype).tiny, u)))


def _prepare(losses, sigma, f, smoothing) -> tuple[Any, ...]:
    losses, sigma = jnp.asarray(losses), jnp.asarray(sigma)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"`losses` has dtype {losses.dtype}; floats are expected.")
    if losses.ndim != 1 or losses.shape[0] == 0:
        raise ValueError(
            f"`losses` has shape {losses.shape}; (n,) with n >= 1 is expected: use "
            "`jax.vmap` for several tables of losses."
        )
    if sigma.shape != losses.shape:
        raise ValueError(
            f"`sigma` has shape {sigma.shape}; {losses.shape}, the shape of `losses`, "
            "is expected."
        )
    check_spectral(sigma, f, smoothing)
    dtype = losses.dtype if losses.dtype.itemsize >= 4 else jnp.dtype("float32")
    if f is not None:
        f = jax.tree_util.tree_map(lambda a: jnp.asarray(a, dtype), as_divergence(f))
        nu = jnp.asarray(smoothing, dtype)
        smoothing = jnp.where(nu > 0, nu, jnp.nan)  # where it is traced
    return losses.astype(dtype), sigma.astype(dtype), f, smoothing, losses.dtype


def check_spectral(sigma: Any, f: Any, smoothing: Any):
    """Raises for what makes no spectral risk, as far as it is known."""
    if (f is None) != (smoothing is None):
        missing = "f" if f is None else "smoothing"
        raise TypeError(
            f"`{missing}` is missing: a smoothed risk needs both `f` and `smoothing`, "
            "a plain one neither."
        )
    if smoothing is not None:
        if np.ndim(smoothing):
            raise ValueError(
                f"`smoothing` has shape {np.shape(smoothing)}; one number is expected."
            )
        otherwise = "; for no smoothing leave `f` and `smoothing` out"
        check_positive("smoothing", smoothing, otherwise)
    if not is_known(sigma):
        return
    values = np.asarray(sigma)
    rises = np.all(np.diff(values) >= 0) and values[0] >= 0
    if not rises or not abs(values.sum(dtype=float) - 1) <= 1e-3:
        raise ValueError(
            "`sigma` is not a spectrum: its entries are >= 0, do not fall, and sum up "
            "to 1. `dp.losses.spectrum` makes one."
        )
