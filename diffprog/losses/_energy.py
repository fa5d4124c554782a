"""Energy models whose log-partition is learned with them.

The model is p(y | x) = q(y) u(g(x, y) - tau(x)) on a set too large to sum over, for KL
proportional to q(y) exp(g(x, y)). As

    softmax_f(g; q) = min_t t + sum_y q(y) f*(g(y) - t),

a second function t(x) can stand for tau(x): both are found by one minimization, and the
sum is an expectation, of which samples of q are enough.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from .._common.types import check_count, check_function, check_kind, shapes
from .._operators.call import Divergence
from .._operators.divergence import AbstractDivergence
from .._operators.generated import as_divergence
from .._operators.root import conjugate, ratio
from .._operators.softmax import entropy_shift, f_softargmax, smooth_max


MAX_LISTED = 2**20


class Enumeration(eqx.Module):
    """All y of a small set: takes the place of a sampler, and makes sums exact.

    - `candidates`: y, stacked on the first axis of every leaf.
    - `weights`: the probability q(y) of each, shape `(number,)`; None if all are equal.
    """

    candidates: PyTree
    weights: Float[ArrayLike, " number"] | None = None

    def __check_init__(self):
        lengths = {np.shape(leaf)[:1] for leaf in jtu.tree_leaves(self.candidates)}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(
                f"`candidates` has the shapes {shapes(self.candidates):.200}; arrays "
                "whose first axis counts the candidates are expected."
            )
        if self.weights is not None and np.shape(self.weights) not in lengths:
            raise ValueError(
                f"`weights` has shape {np.shape(self.weights)}; one for each of the "
                f"{self.number} candidates is expected."
            )

    @property
    def number(self) -> int:
        """How many candidates there are."""
        return jtu.tree_leaves(self.candidates)[0].shape[0]

    def probabilities(self, dtype) -> Array:
        """q(y), shape `(number,)`."""
        if self.weights is None:
            return jnp.full(self.number, 1 / self.number, dtype)
        return jnp.asarray(self.weights, dtype)


class Subsets(eqx.Module):
    """Subsets of k things, as k zeros and ones, all equally probable.

    An instance is a sampler: `subsets(key, x)` returns an array of shape `(k,)`.

    - `k`: the number of things.
    - `dtype`: that of the zeros and ones.
    """

    k: int = eqx.field(static=True)
    dtype: Any = eqx.field(default=float, static=True)

    def __check_init__(self):
        check_count("k", self.k)

    @property
    def size(self) -> int:
        """How many subsets there are: 2^k."""
        return 2**self.k

    def __call__(self, key: PRNGKeyArray, x: Any = None) -> Array:
        """A subset drawn uniformly, shape `(k,)`. `x` is not used."""
        return jr.bernoulli(key, 0.5, (self.k,)).astype(self.dtype)

    def all(self) -> Enumeration:
        """The list of all subsets."""
        _check_size(self, self.size)
        bits = np.arange(self.size)[:, None] >> np.arange(self.k) & 1
        return Enumeration(jnp.asarray(bits).astype(self.dtype))


class Permutations(eqx.Module):
    """Permutations of 0, ..., k - 1, all equally probable.

    An instance is a sampler: `permutations(key, x)` returns integers of shape `(k,)`.

    - `k`: the number of things.
    """

    k: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("k", self.k)

    @property
    def size(self) -> int:
        """How many permutations there are: k!."""
        return math.factorial(self.k)

    def __call__(self, key: PRNGKeyArray, x: Any = None) -> Array:
        """A permutation drawn uniformly, shape `(k,)`. `x` is not used."""
        return jnp.argsort(jr.bits(key, (self.k,), "uint32"))

    def all(self) -> Enumeration:
        """The list of all permutations."""
        _check_size(self, self.size)
        return Enumeration(jnp.asarray(list(itertools.permutations(range(self.k)))))


class Normalization(NamedTuple):
    """How well t(x) normalizes: the moments over y' of the ratio u(g - t) Q.

    - `mean`: an estimate of the total probability, 1 where t(x) is the log-partition.
    - `variance`: of single samples; large where few samples carry the probability.
    """

    mean: Array
    variance: Array


def minmin_objective(
    energy: Callable,
    log_partition: Callable,
    sampler: Callable | Enumeration,
    f: Divergence,
    *,
    num_samples: int = 16,
    mass: float | ArrayLike = 1.0,
    max_ratio: float | ArrayLike = 1e6,
) -> Callable:
    r"""The loss of one example, jointly in its energy and its log-partition.

    $$t(x) + E_{y' \sim q}[f^*(g(x, y') - t(x))] - g(x, y).$$

    The minimum over t is the Fenchel-Young loss of the scores g(x, .), for KL the
    negative log-likelihood; any other t gives more. Its gradient is an unbiased
    estimate of that of the expectation: with $a_b = u(g(x, y'_b) - t(x))$

    $$\frac1B \sum_b a_b \nabla g(x, y'_b) - \nabla g(x, y), \qquad
    \Bigl(1 - \frac1B \sum_b a_b\Bigr) \nabla t(x).$$

    **Arguments:**

    - `energy`: g, `(params, x, y) -> ()`, the larger the more probable; -inf excludes
        y. It is `vmap`ped over y.
    - `log_partition`: t, `(params, x) -> ()`.
    - `sampler`: `(key, x) -> y`, a sample of the reference q, such as
        [`diffprog.losses.Subsets`][] or [`diffprog.losses.Permutations`][]; or an
        [`diffprog.losses.Enumeration`][] of all y, for the exact expectation.
    - `f`: a generator, or any convex function of one number.
    - `num_samples`: B, the samples per example.
    - `mass`: Q, that of the reference measure, which multiplies the expectation. With
        the number of all y, `subsets.size`, the reference is 1 for every y, as in
        sparsemax. The constant f(0) (Q - 1) is added where it is finite, so that the
        minimum is then 0 at best: no more is lost to rounding, whatever Q.
    - `max_ratio`: the most that p(y) may be, in multiples of the probability of y as a
        sample. Beyond it f* goes on linearly, so that gradients stay bounded, next to
        and past the poles of f* too. Exact for sets of up to `max_ratio` equally
        weighted y; in larger ones such samples are less than one in `max_ratio` where
        t is right.

    **Returns:** `objective(params, x, y, key) -> (value, normalization)` for one
    example; use `jax.vmap(objective, (None, 0, 0, 0))` for more. `params`, x and y are
    any pytrees, and `key` is not needed with an enumeration. The second result is a
    [`diffprog.losses.Normalization`][]: watch that its mean is near 1.

    **Raises:** `ValueError` for an energy or log-partition that is not a float scalar.

    An example costs B + 1 evaluations of the energy.

    Source: Sander, Roulet, Liu, Blondel, "Joint Learning of Energy-based Models and
    their Partition Function", 2025, arXiv 2501.18528.
    """
    f = as_divergence(f)
    check_function("energy", energy, "energy(params, x, y)")
    check_function("log_partition", log_partition, "log_partition(params, x)")
    if not isinstance(sampler, Enumeration):
        check_function("sampler", sampler, "sampler(key, x) -> y")
    _check_options(f, num_samples, mass, max_ratio)

    def objective(params, x, y, key=None) -> tuple[Array, Normalization]:
        t = _one_float("log_partition", log_partition(params, x))
        g = _one_float("energy", energy(params, x, y))
        dtype = g.dtype if jnp.finfo(g.dtype).bits >= 32 else jnp.dtype("float32")
        others, q = _draw(sampler, x, key, num_samples, dtype)
        scores = _energies(energy, params, x, others)
        at = jtu.tree_map(lambda a: jnp.asarray(a, dtype), f)
        v = scores.astype(dtype) - t.astype(dtype)
        terms, ratios, Q = _dual_terms(at, v, mass, max_ratio)
        value = t.astype(dtype) - g.astype(dtype) + jnp.sum(q * terms)
        value = value + entropy_shift(at, Q)
        ratios = lax.stop_gradient(ratios)
        mean = jnp.sum(q * ratios)
        variance = jnp.sum(q * (ratios - mean) ** 2)
        return value.astype(g.dtype), Normalization(mean, variance)

    return objective


def _dual_terms(f: AbstractDivergence, v: Array, mass, max_ratio):
    """Q (f*(v) + lift), linear where Q u > max_ratio; Q u; and Q."""
    Q, most = jnp.asarray(mass, v.dtype), jnp.asarray(max_ratio, v.dtype)
    present = v != -jnp.inf
    v = jnp.where(present, v, 0)
    if f.scale_free:  # Q e^v = e^(v + ln Q), whatever Q is
        v, Q = v + jnp.log(Q), jnp.ones_like(Q)
    w, top = v - f.origin, f.link(most / Q)
    inside = jnp.minimum(w, top)
    line = Q * conjugate(f, top) + most * (w - top)
    terms = jnp.where(w < top, Q * conjugate(f, inside), line)
    ratios = Q * ratio(f, inside)
    return jnp.where(present, terms, 0), jnp.where(present, ratios, 0), Q


def exact_objective(
    energy: Callable,
    enumeration: Enumeration,
    f: Divergence,
    *,
    mass: float | ArrayLike = 1.0,
) -> Callable:
    r"""The minimum of [`diffprog.losses.minmin_objective`][] over t, for small sets.

    $$\operatorname{softmax}_f(g(x, \cdot); q) - g(x, y),$$

    for KL the negative log-likelihood relative to q.

    **Arguments:**

    - `energy`, `f`, `mass`: those of [`diffprog.losses.minmin_objective`][].
    - `enumeration`: all y, as `subsets.all()` has them.

    **Returns:** `objective(params, x, y) -> (value, tau)` for one example, where tau is
    the minimizing t, for KL the log-partition. No derivatives flow to tau.
    """
    f = as_divergence(f)
    check_function("energy", energy, "energy(params, x, y)")
    check_kind("enumeration", enumeration, Enumeration, "subsets.all()")
    _check_options(f, 1, mass, 1.0)

    def objective(params, x, y) -> tuple[Array, Array]:
        g = _one_float("energy", energy(params, x, y))
        scores = _energies(energy, params, x, enumeration.candidates)
        q = enumeration.probabilities(scores.dtype) * jnp.asarray(mass, scores.dtype)
        value = smooth_max(scores, f, q) - g
        scores, q = lax.stop_gradient((scores, q))
        best = jnp.argmax(jnp.where(q > 0, scores, -jnp.inf))
        # p = q u(g - tau)
        u = f_softargmax(scores, f, q)[best] / q[best]
        at = jtu.tree_map(lambda a: jnp.asarray(a, scores.dtype), f)
        return value, lax.stop_gradient(scores[best] - at.origin - at.link(u))

    return objective


def _draw(sampler, x, key, num_samples: int, dtype) -> tuple[PyTree, Array]:
    """Samples of y, and their weights."""
    if isinstance(sampler, Enumeration):
        return sampler.candidates, sampler.probabilities(dtype)
    if key is None:
        raise ValueError(
            "`key` is missing: the objective draws samples. Pass `jax.random.key(0)`, "
            "or make it of an `Enumeration`, which needs none."
        )
    others = jax.vmap(lambda key: sampler(key, x))(jr.split(key, num_samples))
    return others, jnp.full(num_samples, 1 / num_samples, dtype)


def _energies(energy: Callable, params, x, others) -> Array:
    return jax.vmap(lambda y: _one_float("energy", energy(params, x, y)))(others)


def _one_float(name: str, value) -> Array:
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` returns shape {value.shape} and dtype {value.dtype}; one float "
            "for one example is expected: `jax.vmap` the objective over examples."
        )
    return value


def _check_options(f: AbstractDivergence, num_samples: int, mass, max_ratio):
    for name, value in (("mass", mass), ("max_ratio", max_ratio)):
        if isinstance(value, Tracer):
            continue
        if np.shape(value) != () or not 0 < float(value) < math.inf:
            raise ValueError(f"`{name}` is {value}; a positive number is expected.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` is {num_samples}; at least 1 is expected.")
    for leaf in jtu.tree_leaves(f):
        if jnp.shape(leaf) != ():
            raise ValueError(
                f"`f` has an alpha of shape {jnp.shape(leaf)}; a scalar is expected."
            )


def _check_size(family, size: int):
    if size > MAX_LISTED:
        raise ValueError(
            f"{family} has {size} members, too many to list; the limit is {MAX_LISTED}."
        )
