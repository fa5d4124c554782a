from typing import TypeAlias

from jaxtyping import Array, Float, Int


# A number of a model: a Python float follows the dtype of the state.
Scalar: TypeAlias = float | Float[Array, ""]
Time: TypeAlias = float | Float[Array, ""]
Stage: TypeAlias = int | Int[Array, ""]
