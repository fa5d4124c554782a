from jaxtyping import Array, Float


# Data with a row per stage: a stacked array for every segment of a chain.
Rows = tuple[Float[Array, "_ _"], ...]
Stacks = tuple[Float[Array, "_ _ _"], ...]
Tensors = tuple[Float[Array, "_ _ _ _"], ...]
