"""What the operators ask of a generator of an f-divergence.

A generator f is strictly convex on (0, inf) with f(1) = f'(1) = 0. Four functions of
the ratio u = p / q or of v = f'(u) are all that the operators need:

    f(u),  link(u) = f'(u),  its inverse u(v) = (f*)'(v),
    conjugate(v) = f*(v),    curvature(u) = (f*)''(v) = 1 / f''(u).

v is counted from an `origin`: w = v - origin. Where f' has a pole at v_inf the origin
is the pole, and where it begins at a finite v_0, below which the ratio is 0, the origin
is v_0: next to these points v itself has lost its digits in float32.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._common.types import AbstractPart, came, counted, noted


class AbstractDivergence(AbstractPart):
    r"""A generator f of the divergence $D_f(p, q) = \sum_j q_j f(p_j / q_j)$.

    `value(u)` is f(u). Instances are passed to the operators of `diffprog.losses`.

    - `sparse`: whether ratios can be exactly 0.
    - `convex_ratio`: whether f''' <= 0, so that Newton's method needs no safeguard.
    - `origin`: the point from which v is counted.
    - `at_zero`: f(0), possibly infinite.
    - `lift`: a number that `conjugate` contains, f(0) where that is moderate. Off the
        support f* is -f(0); summed over many classes it would swallow the others.

    Arrays among the fields are data, and derivatives flow to them. Some generators have
    more, without which the operators do:

    | | |
    | --- | --- |
    | `scale_free` | whether f'(c u) = f'(u) + ln c, as for KL alone |
    | `support_known` | whether `sparse` says what is, not only what may be |
    | `drift(df, u)` | the change of u with the fields where w stays; else from `link` |
    | `closed_root(total, q, y)` | the s with sum_j q_j u(s + y_j) = 1; `total` sums up |
    | `closed_share(q, s, tau)` | p = q u with tau w + q u = s, and dp/ds |
    | `closed_blocks(z, sigma)` | the level v(a, b) of a block of z's, how to add up a, and a and b of every member |
    | `both(w)` | `pair` in one array, (..., 2, classes), where that is faster |
    | `for_ratios(at_most_one)` | the same for ratios that are at most 1, or any |
    """  # noqa: E501

    sparse: eqx.AbstractVar[bool]
    convex_ratio: eqx.AbstractVar[Any]
    origin: eqx.AbstractVar[Any]
    at_zero: eqx.AbstractVar[Any]
    lift: eqx.AbstractVar[Any]

    scale_free: ClassVar[bool] = False
    support_known: ClassVar[bool] = True
    # None: the operators do without.
    drift: ClassVar[Callable | None] = None
    closed_root: ClassVar[Callable | None] = None
    closed_share: ClassVar[Callable | None] = None
    closed_blocks: ClassVar[Callable | None] = None
    both: ClassVar[Callable | None] = None
    for_ratios: ClassVar[Callable | None] = None

    @abc.abstractmethod
    def value(self, u: Array) -> Array:
        """f(u) for u >= 0."""

    @abc.abstractmethod
    def link(self, u: Array) -> Array:
        """f'(u) - origin."""

    @abc.abstractmethod
    def pair(self, w: Array) -> tuple[Array, Array]:
        """u with f'(u) = origin + w, 0 below the range of f'; and its curvature."""

    @abc.abstractmethod
    def curvature(self, u: Array) -> Array:
        """1 / f''(u), and 0 at u = 0: the derivative of u in v."""

    @abc.abstractmethod
    def conjugate(self, w: Array) -> Array:
        """f*(origin + w) + lift."""

    @abc.abstractmethod
    def mean_step(self, S: Array, Q: Array) -> Array:
        """Q (f'(S / Q) - f'(1 / Q)) / f''(S / Q), accurate where S is near 1.

        Divided by -dS/dtau it is Newton's step for f'(S / Q) = f'(1 / Q), where S is
        the mass of all classes and Q that of their reference.
        """


@ft.lru_cache(maxsize=256)
def check_answers(structure: Any):
    """Raises where a method of a divergence does not answer entry by entry."""
    number, some = (jax.ShapeDtypeStruct(s, jnp.result_type(float)) for s in ((), (3,)))
    shapes = lambda tree: jtu.tree_map(jnp.shape, tree)

    def ask(f, u):
        for name in ("value", "link", "pair", "curvature", "conjugate", "mean_step"):
            method = f"`{type(f).__name__}.{name}`"
            given = (u, u) if name == "mean_step" else (u,)
            with noted(lambda: f"{method} was given {counted(len(given), 'array')}."):
                found = getattr(f, name)(*given)
            two = name == "pair"
            if shapes(found) != shapes((u, u) if two else u):
                raise ValueError(
                    f"{method} returned {came(found)} for shape (3,); "
                    f"{'two arrays' if two else 'an array'} of that shape is "
                    "expected: a generator answers for every entry by itself."
                )

    jax.eval_shape(ask, structure.unflatten([number] * structure.num_leaves), some)


def has_numbers(f: AbstractDivergence) -> bool:
    """Whether derivatives flow to fields of f."""
    return bool(jtu.tree_leaves(f))


def drift(f: AbstractDivergence, df: AbstractDivergence, u: Array) -> Array:
    """The change of u with the fields of f where w = f'(u) - origin stays."""
    if f.drift is not None:
        return f.drift(df, u)
    return -f.curvature(u) * jax.jvp(lambda f: f.link(u), (f,), (df,))[1]
