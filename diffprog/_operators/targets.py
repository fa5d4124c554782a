"""What the second argument of a loss may hold.

One rule for what is outside of the domain of a loss, such as a label that does not
exist: it raises where the targets are known; where they are traced the loss of its
example is NaN, and so are its derivatives. Probabilities are the exception: nothing is
asked of them where they are traced, since even their signs took a tenth of the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._common.types import came, is_known
from .call import Axis, batch_shape


SLACK = 1e-2  # of a sum of probabilities: they may have been rounded to 8 bits


def check_floats(outputs: Any):
    """Raises for what is no array of floats whose first axis counts examples."""
    expected = "an array of floats whose first axis is the example is expected"
    if not isinstance(outputs, jax.Array | np.ndarray) or outputs.ndim == 0:
        raise TypeError(f"`outputs` is {came(outputs)}; {expected}.")
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(f"`outputs` has dtype {outputs.dtype}; {expected}.")


def as_array(targets: Any) -> Any:
    """Lists as arrays of NumPy, and arrays as they are: none is traced by this."""
    return targets if hasattr(targets, "dtype") else np.asarray(targets)


# One target per output ------------------------------------------------------------


class Domain(NamedTuple):
    """The numbers that are accepted: a test, and what a message says of them."""

    has: Callable
    expected: str


SIGNS = Domain(
    lambda y: abs(y) == 1,
    "binary targets are 1.0 and -1.0: of zeros and ones make `2.0 * targets - 1.0`",
)
COUNTS = Domain(lambda y: y >= 0, "counts are >= 0")
WEIGHTS = Domain(lambda y: (y >= 0) & (y < np.inf), "weights are finite and >= 0")


def check_alike(outputs: Any, targets: Any):
    """Raises for what is no real number for every output."""
    check_floats(outputs)
    targets = as_array(targets)
    if outputs.shape != targets.shape:
        raise ValueError(
            f"`targets` has shape {targets.shape}, and `outputs` {outputs.shape}; "
            "both must agree."
        )
    if jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise TypeError(f"`targets` has dtype {targets.dtype}; floats are expected.")


def like(outputs: Array, targets: Any) -> Array:
    """Targets of the shape of the outputs, in their dtype."""
    check_alike(outputs, targets)
    return jnp.asarray(targets, outputs.dtype)


def comparable(known: np.ndarray) -> np.ndarray:
    """16-bit floats as float32: NaN in bfloat16 warns where it is compared."""
    small = jnp.issubdtype(known.dtype, jnp.floating) and known.dtype.itemsize < 4
    return known.astype(np.float32) if small else known


def check_within(domain: Domain, outputs: Any, targets: Any):
    """Raises for targets outside of a domain, where they are known."""
    check_alike(outputs, targets)
    if not is_known(targets):
        return
    known = np.asarray(targets)
    outside = known[~domain.has(comparable(known))]
    if outside.size:
        raise ValueError(f"`targets` contains {outside[0]}; {domain.expected}.")


def within(domain: Domain, outputs: Array, targets: Any) -> tuple[Array, Array]:
    """Targets like the outputs, and a factor for the loss of each.

    It is 1, or NaN where a traced target is outside of the domain. NaN in the targets
    themselves took XLA up to five times as long on the CPU.
    """
    check_within(domain, outputs, targets)
    y = jnp.asarray(targets, outputs.dtype)
    one = jnp.ones((), y.dtype)
    return y, one if is_known(targets) else jnp.where(domain.has(y), one, jnp.nan)


# Labels and probabilities ---------------------------------------------------------


def is_labels(targets: Any) -> bool:
    return bool(jnp.issubdtype(as_array(targets).dtype, jnp.integer))


def short(labels: Array) -> Array:
    """Labels as int32, none of which is that of another label."""
    least, most = -(2**31), 2**31 - 1
    if jnp.iinfo(labels.dtype).max > most:
        labels = jnp.clip(labels, max(least, jnp.iinfo(labels.dtype).min), most)
    return labels.astype(jnp.int32)


def check_targets(targets: Any, shape: tuple, axes: tuple[int, ...]) -> bool:
    """Whether they are labels, not probabilities."""
    labels = jnp.issubdtype(targets.dtype, jnp.integer)
    batch = batch_shape(shape, axes)
    floats = jnp.issubdtype(targets.dtype, jnp.floating)
    if targets.shape != (batch if labels else shape) or not (labels or floats):
        other = "int" if targets.shape == batch else "float"
        convert = f" Convert them with `targets.astype({other})`."
        raise ValueError(
            f"`targets` has shape {targets.shape} and dtype {targets.dtype}; labels "
            f"are integers of shape {batch}, probabilities floats of shape {shape}."
            + (convert if targets.shape in (batch, shape) else "")
        )
    return bool(labels)


def check_classes(outputs: Any, targets: Any):
    """Raises for outputs without an axis of classes, and for labels of one class."""
    check_floats(outputs)
    targets = as_array(targets)
    if outputs.ndim < 2:
        raise ValueError(
            f"`outputs` has shape {outputs.shape}; (examples, classes) is expected: "
            "for one example give `outputs[None]` and `targets[None]`."
        )
    if is_labels(targets) and outputs.shape[-1] == 1:
        raise ValueError(
            f"`outputs` has shape {outputs.shape} and `targets` holds labels, of which "
            "there is one: with one output per example use `dp.losses.Logistic()` or "
            "`dp.losses.Hinge()`, with targets 1.0 and -1.0 of the shape of `outputs`."
        )
    check_targets(targets, outputs.shape, (outputs.ndim - 1,))


def check_labels(labels: Any, k: int, counted: Callable = lambda: True):
    """Raises for labels out of range, where they are known.

    If there is one `counted` is asked which rows have a loss.
    """
    if not is_known(labels):
        return
    known = np.asarray(labels)
    outside = (known < 0) | (known >= k)
    outside = outside & counted() if outside.any() else outside
    if outside.any():
        raise ValueError(
            f"`targets` contains the label {known[outside][0]}; the {k} classes are 0 "
            f"to {k - 1}."
        )


def check_probabilities(targets: Any, axis: Axis, counted: Callable = lambda: True):
    """Raises for rows that are no probabilities, where they are known."""
    if not is_known(targets):
        return
    known = comparable(np.asarray(targets))
    sums = known.sum(axis)
    least = known.min(axis, initial=0)
    outside = ~((least >= 0) & (abs(sums - 1) <= SLACK))
    outside = outside & counted() if outside.any() else outside
    if outside.any():
        least, sums = least[outside][0], sums[outside][0]
        found = f"a row of sum {sums:.3g}" if least >= 0 else f"the entry {least:.3g}"
        raise ValueError(
            f"`targets` contains {found}; probabilities are >= 0, and sum up to 1."
        )


def check_ignored(label: Any):
    """Raises for what is no label."""
    if label is None or isinstance(label, int) and not isinstance(label, bool):
        return
    raise TypeError(
        f"`ignore_label` is {came(label)}; a Python int such as -100, or None, is "
        "expected."
    )


def counting(labels: Any, ignored: int | None) -> Any:
    """Which labels count, with an axis for the classes; None for all."""
    if ignored is None or not is_labels(labels):
        return None
    if is_known(labels):
        return np.asarray(labels)[..., None] != ignored
    return short(labels)[..., None] != ignored


def heard(outputs: Array, targets: Any, ignored: int | None) -> Array:
    """The outputs, but 0 where the label does not count: they may be NaN there."""
    counted = counting(targets, ignored)
    return outputs if counted is None else jnp.where(counted, outputs, 0)


def count_labels(outputs: Any, labels: Any, ignored: int | None) -> int | Array:
    """The number of examples with a label that counts. Raises for others."""
    check_classes(outputs, labels)
    check_labels(labels, outputs.shape[-1], lambda: np.asarray(labels) != ignored)
    counted = counting(labels, ignored)
    if counted is None:
        return outputs.shape[0]
    some = counted.any(tuple(range(1, counted.ndim)))
    return int(some.sum()) if is_known(labels) else jnp.sum(some)


def one_hot(
    outputs: Array, labels: Any, ignored: int | None = None
) -> tuple[Array, Array]:
    """Rows of zeros and a one, and a factor for the loss of every row.

    It is 1, but 0 for a label that does not count, and NaN for one out of range.
    """
    k = outputs.shape[-1]
    check_classes(outputs, labels)
    check_labels(labels, k, lambda: np.asarray(labels) != ignored)
    known, counted = is_known(labels), counting(labels, ignored)
    labels = short(jnp.asarray(labels))[..., None]
    y = jax.nn.one_hot(labels[..., 0], k, dtype=outputs.dtype)
    row = jnp.ones(labels.shape, outputs.dtype)
    if not known:
        row = jnp.where((labels >= 0) & (labels < k), row, jnp.nan)
    if counted is None:
        return y, row
    return jnp.where(counted, y, 0), jnp.where(counted, row, 0)
