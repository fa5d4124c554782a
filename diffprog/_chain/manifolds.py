"""Ready-made manifolds: vectors, angles, attitudes, and products of them."""

import functools as ft
import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._common.types import came, check_count, is_known, is_number
from .manifold import AbstractManifold


class Euclidean(AbstractManifold):
    """Vectors, whose difference is ordinary subtraction: v = x - y.

    A state is any pytree of floating arrays, and its local coordinates are one alike.
    """

    def difference(self, x, y):
        return jtu.tree_map(jnp.subtract, x, y)

    def retract(self, y, v):
        return jtu.tree_map(jnp.add, y, v)


class Angle(AbstractManifold):
    r"""Angles [rad], whose difference is the shorter way round.

    $$v = d - 2 \pi \, \text{round}(d / 2 \pi), \quad d = x - y$$

    A state is an array, each of whose entries is an angle of its own; v has its shape,
    and entries from -pi to pi. `retract(y, v)` is y + v, which is not wrapped: it gives
    back x up to whole turns. Half a turn away from y the difference jumps.
    """

    def difference(self, x, y):
        d = x - y
        return d - 2 * math.pi * jnp.round(d / (2 * math.pi))

    def retract(self, y, v):
        return y + v


# Of atan(z) / z, cos(z) and sin(z) / z in powers of z^2. They reach the precision of
# float64 in third derivatives too: the first up to z = tan(pi / 16), the others to 1.
_ATAN = [(-1) ** k / (2 * k + 1) for k in range(14)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(12)]
_SINC = [(-1) ** k / math.factorial(2 * k + 1) for k in range(12)]


class UnitQuaternion(AbstractManifold):
    r"""Attitudes as unit quaternions, with rotation vectors in the frame of the body.

    $$v = \log(\bar y \, x), \qquad x = y \, \exp(v / 2) = y \,
    \Bigl(\cos \frac{|v|}{2}, \; \frac{v}{|v|} \sin \frac{|v|}{2}\Bigr)$$

    A state is an array (..., 4) with the real part first and Hamilton's product; v is
    (..., 3), the axis times the angle [rad], which is at most pi. q and -q are the same
    attitude, so the difference takes the shorter way; at half a turn it jumps. All
    derivatives are exact, at v = 0 and x = y too.

    Nothing is normalized. The difference only depends on the directions of x and y, and
    `retract` keeps the norm of y up to rounding: over ten thousand of them to 1e-12 in
    float64, and to 3e-4 in float32.

    Source: J. Sola, J. Deray, D. Atchuthan, "A micro Lie theory for state estimation in
    robotics", 2018, arXiv:1812.01537.
    """

    def difference(self, x, y):
        _check_entries("x", x, 4)
        _check_entries("y", y, 4)
        real = jnp.sum(y * x, -1, keepdims=True)
        x = jnp.where(real < 0, -x, x)
        # The real part and the norm of inverse * x; its other entries are those of
        # inverse * (x - y), which are 0 where x = y, and as precise as x - y nearby.
        inverse = jnp.concatenate([y[..., :1], -y[..., 1:]], -1)
        real, norm = jnp.abs(real), jnp.sqrt(_square(x) * _square(y))
        v = _product(inverse, x - y)[..., 1:]
        v = v / (norm + real)  # the axis times the tangent of a quarter of the angle
        return 4 * _of_number(_arc, _square(v)) * v

    def retract(self, y, v):
        _check_entries("y", y, 4)
        _check_entries("v", v, 3)
        square = _square(v) / 4
        cos, sinc = (_of_number(fn, square) for fn in (_cos, _sinc))
        return _product(y, jnp.concatenate([cos, sinc * v / 2], -1))

    def check(self, name, x):
        _check_entries(name, x, 4)
        if not is_known(x):
            return
        norms = np.linalg.norm(np.asarray(x, float), axis=-1)
        most = 1e-6 if jnp.result_type(x) == jnp.float64 else 1e-3
        wrong = ~(np.abs(norms - 1) <= most)
        if np.any(wrong):
            index = "".join(f"[{i}]" for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"`{name}{index}` is a quaternion of norm {norms[wrong][0]:.9g}; one "
                f"of norm 1, up to {most}, is expected: "
                "`q / jnp.linalg.norm(q, axis=-1, keepdims=True)`."
            )

    def near(self):
        return _NearQuaternion()


class _NearQuaternion(AbstractManifold):
    """Unit quaternions, with tan and a series in the place of log and exp."""

    def difference(self, x, y):
        inverse = jnp.concatenate([y[..., :1], -y[..., 1:]], -1)
        imaginary = _product(inverse, x - y)[..., 1:]
        return 2 * imaginary / jnp.sum(y * x, -1, keepdims=True)

    def retract(self, y, v):
        return _product(y, jnp.concatenate([1 - _square(v) / 8, v / 2], -1))


def _check_entries(name: str, x: Any, size: int):
    """Raises for what is no array with so many entries in its last axis."""
    if not is_number(x) or np.shape(x)[-1:] != (size,):
        raise ValueError(
            f"`{name}` is {came(x)}; an array with {size} entries in its last axis is "
            "expected: a unit quaternion has 4, its real part first, and a rotation "
            "vector has 3."
        )


def _square(v: Float[Array, "*_ n"]) -> Float[Array, "*_ 1"]:
    return jnp.sum(v**2, -1, keepdims=True)


def _series(coefficients: list[float], s: Array) -> Array:
    """The sum of c_k s^k."""
    return ft.reduce(lambda total, c: total * s + c, coefficients[::-1], 0 * s)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_number(fn: Callable, s: Array) -> Array:
    """fn(s), entry by entry, differentiated as a function of one number.

    Each derivative is found once, and not in every direction in which s depends on
    the state: of second derivatives this is most of the work.
    """
    return fn(s)


@_of_number.defjvp
def _(fn, primals, tangents):
    slope = lambda s: jax.jvp(fn, (s,), (jnp.ones_like(s),))[1]
    return _of_number(fn, *primals), _of_number(slope, *primals) * tangents[0]


def _arc(square: Array) -> Array:
    """atan(z) / z of z^2, from 0 to 1."""
    over = jnp.ones_like(square)
    for _ in range(2):  # half of the arc, until the series serves
        halved = 1 + jnp.sqrt(1 + square)
        over, square = over * 2 / halved, square / halved**2
    return over * _series(_ATAN, square)


def _cos(square: Array) -> Array:
    """cos(z) of z^2."""
    small, near, z = _near(square)
    return jnp.where(small, _series(_COS, near), jnp.cos(z))


def _sinc(square: Array) -> Array:
    """sin(z) / z of z^2."""
    small, near, z = _near(square)
    return jnp.where(small, _series(_SINC, near), jnp.sin(z) / z)


def _near(square: Array) -> tuple[Array, Array, Array]:
    """Whether z^2 is small, it where it is, and z where not: both smooth."""
    small = square < 1
    return small, jnp.where(small, square, 0), jnp.sqrt(jnp.where(small, 1, square))


def _product(a: Float[Array, "*_ 4"], b: Float[Array, "*_ 4"]) -> Float[Array, "*_ 4"]:
    """Hamilton's."""
    a0, a1, a2, a3 = jnp.moveaxis(a, -1, 0)
    b0, b1, b2, b3 = jnp.moveaxis(b, -1, 0)
    return jnp.stack(
        [
            a0 * b0 - a1 * b1 - a2 * b2 - a3 * b3,
            a0 * b1 + a1 * b0 + a2 * b3 - a3 * b2,
            a0 * b2 - a1 * b3 + a2 * b0 + a3 * b1,
            a0 * b3 + a1 * b2 - a2 * b1 + a3 * b0,
        ],
        axis=-1,
    )


def _nearer(part: AbstractManifold) -> AbstractManifold:
    return part.near() or part


def _is_manifold(part: Any) -> bool:
    return isinstance(part, AbstractManifold)


def _check_manifold(name: str, part: Any):
    if not _is_manifold(part):
        raise TypeError(
            f"`{name}` is {came(part)}; a manifold such as `dp.manifolds.Euclidean()` "
            "is expected."
        )


class Product(AbstractManifold):
    """A tree of manifolds, for a state that is a tree of their states.

    `Product(dict(position=Euclidean(), attitude=UnitQuaternion()))` is for states that
    are dicts with a `position` and an `attitude`. Local coordinates are arranged alike.
    """

    _parts: tuple[AbstractManifold, ...]
    _structure: Any = eqx.field(static=True)  # hashable, as a dict is not

    def __init__(self, parts: PyTree):
        for path, part in jtu.tree_leaves_with_path(parts, is_leaf=_is_manifold):
            _check_manifold(f"parts{jtu.keystr(path)}", part)
        leaves, self._structure = jtu.tree_flatten(parts, is_leaf=_is_manifold)
        self._parts = tuple(leaves)

    def difference(self, x, y):
        pairs = zip(self._split("x", x), self._split("y", y), strict=True)
        return self._join(lambda part, pair: part.difference(*pair), pairs)

    def retract(self, y, v):
        pairs = zip(self._split("y", y), self._split("v", v), strict=True)
        return self._join(lambda part, pair: part.retract(*pair), pairs)

    def check(self, name, x):
        parts = self._structure.unflatten(self._parts)
        parts = jtu.tree_leaves_with_path(parts, is_leaf=_is_manifold)
        for (path, part), entry in zip(parts, self._split(name, x), strict=True):
            part.check(name + jtu.keystr(path), entry)

    def near(self):
        return Product(self._structure.unflatten(map(_nearer, self._parts)))

    def _split(self, name: str, tree: PyTree) -> list[PyTree]:
        """What belongs to each of the parts."""
        try:
            return self._structure.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                f"`{name}` is arranged as {jtu.tree_structure(tree)}, and the parts of "
                f"its manifold as {self._structure}; a tree that begins like the parts "
                "is expected."
            ) from error

    def _join(self, fn: Callable, pairs: Iterable) -> PyTree:
        return self._structure.unflatten(map(fn, self._parts, pairs))


Product.__init__.__doc__ = """**Arguments:**

- `parts`: any pytree of manifolds. The state has a subtree for each of them.

**Raises:** `TypeError` for a part that is no manifold; `difference`, `retract` and
`check` raise `ValueError` for a tree that does not fit the parts.
"""


class Blocks(AbstractManifold):
    """Manifolds of consecutive entries, for a state that is one array.

    `Blocks((3, Euclidean()), (4, UnitQuaternion()))` is for states (..., 7). Local
    coordinates are one array too, those of the blocks one after another: (..., 6).
    """

    _sizes: tuple[int, ...] = eqx.field(static=True)
    _parts: tuple[AbstractManifold, ...]

    def __init__(self, *blocks: tuple[int, AbstractManifold]):
        if not blocks:
            raise ValueError(
                "There are no blocks; one pair `(size, manifold)` or more are expected."
            )
        for i, block in enumerate(blocks):
            if not isinstance(block, tuple | list) or len(block) != 2:
                raise TypeError(
                    f"`blocks[{i}]` is {came(block)}; a pair `(size, manifold)` such "
                    "as `(4, dp.manifolds.UnitQuaternion())` is expected."
                )
            check_count(f"blocks[{i}][0]", block[0])
            _check_manifold(f"blocks[{i}][1]", block[1])
        self._sizes, self._parts = zip(*blocks, strict=True)

    def difference(self, x, y):
        pairs = zip(self._split("x", x), self._split("y", y), strict=True)
        return self._join(_difference, pairs)

    def retract(self, y, v):
        blocks = self._split("y", y)
        local = [
            jax.eval_shape(lambda y, part=part: _difference(part, (y, y)), block)
            for part, block in zip(self._parts, blocks, strict=True)
        ]
        sizes = tuple(coordinates.shape[-1] for coordinates in local)
        pairs = zip(blocks, _split("v", v, sizes), strict=True)
        return self._join(lambda part, pair: part.retract(*pair), pairs)

    def check(self, name, x):
        start = 0
        for part, block in zip(self._parts, self._split(name, x), strict=True):
            end = start + block.shape[-1]
            part.check(f"{name}[..., {start}:{end}]", block)
            start = end

    def near(self):
        return Blocks(*zip(self._sizes, map(_nearer, self._parts), strict=True))

    def _split(self, name: str, x: Array) -> list[Array]:
        return _split(name, x, self._sizes)

    def _join(self, fn: Callable, pairs: Iterable) -> Array:
        return jnp.concatenate(list(map(fn, self._parts, pairs)), -1)


Blocks.__init__.__doc__ = """**Arguments:**

- `blocks`: pairs `(size, manifold)` in the order of the entries of the last axis, with
    the number of entries and their manifold, whose local coordinates are one array.

**Raises:** `TypeError` and `ValueError` for what is no such pair; `difference`,
`retract` and `check` raise `ValueError` for an array of another size.
"""


def _split(name: str, x: Array, sizes: tuple[int, ...]) -> list[Array]:
    total = sum(sizes)
    if not is_number(x) or np.shape(x)[-1:] != (total,):
        raise ValueError(
            f"`{name}` is {came(x)}; an array with {total} entries in its last axis is "
            f"expected, for blocks of {', '.join(map(str, sizes))}."
        )
    return jnp.split(x, np.cumsum(sizes[:-1]).tolist(), axis=-1)


def _difference(part: AbstractManifold, pair: tuple[Array, Array]) -> Array:
    v = part.difference(*pair)
    if not is_number(v) or not np.ndim(v):
        raise TypeError(
            f"`{type(part).__name__}.difference` returned {came(v)}; in a block one "
            "array is expected."
        )
    return v
