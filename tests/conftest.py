import jax
import jax.random as jr
import numpy as np
import pytest


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is what costs here, not running.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def getkey():
    rng = np.random.default_rng(0)
    return lambda: jr.key(int(rng.integers(2**31)))
