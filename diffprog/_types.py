from typing import Any

import equinox as eqx
from jaxtyping import Array, Float


# A number that may be traced: a new value never compiles again.
Number = float | Array


def number(default: float) -> Any:
    """A field with a number; an int becomes a float, since an int would be static."""
    to_float = lambda value: float(value) if isinstance(value, int) else value
    return eqx.field(default=default, converter=to_float)


def check_positive(name: str, value: Any):
    """Raises for a number that is known and not positive."""
    if isinstance(value, float | int) and not value > 0:
        raise ValueError(f"`{name}` is {value}; a number > 0 is expected.")


def check_count(name: str, value: Any):
    """Raises for what is no positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; a Python int >= 1 is expected.")


# Data with a row per stage: a stacked array for every segment of a chain.
Rows = tuple[Float[Array, "_ _"], ...]
Stacks = tuple[Float[Array, "_ _ _"], ...]
Tensors = tuple[Float[Array, "_ _ _ _"], ...]
