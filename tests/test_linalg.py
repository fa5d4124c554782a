"""The small pieces below the recursions, on varying inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from diffprog._common.linalg import solve_positive
from diffprog._common.tree import all_finite, Layout


solve = jax.jit(solve_positive)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), m=st.sampled_from([1, 2, 4, 6, 8]))
def test_solve_positive_equals_numpy_and_knows_what_is_positive(seed, m):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(m, m))
    matrix, rhs = factor @ factor.T + 0.1 * np.eye(m), rng.normal(size=(m, 3))
    x, positive = solve(matrix, rhs)
    assert positive
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=1e-8, atol=1e-8)
    lowest = np.linalg.eigvalsh(matrix)[0]
    x, positive = solve(matrix - 2 * lowest * np.eye(m), rhs)
    assert not positive and np.all(np.isfinite(x))


@pytest.mark.parametrize("m", [1, 3, 6, 8])
def test_nan_and_zero_are_not_positive(m):
    for matrix in (jnp.full((m, m), jnp.nan), jnp.zeros((m, m)), -jnp.eye(m)):
        assert not solve(matrix, jnp.ones((m, 3)))[1]


shapes = st.lists(st.sampled_from([(), (1,), (2,), (2, 3)]), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 2**31))
def test_layouts_bring_pytrees_back(shapes, seed):
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    tree = {f"leaf{i}": (leaf,) for i, leaf in enumerate(leaves)}
    layout = Layout.of(tree, np.dtype(np.float64))
    vector = layout.ravel(tree)
    assert vector.shape == (layout.size,) == (sum(leaf.size for leaf in leaves),)
    back = layout.unravel(vector)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_all_finite_sees_one_bad_entry():
    good = dict(a=jnp.ones(3), b=(jnp.zeros(2),))
    assert all_finite(good)
    assert not all_finite(good, jnp.asarray([1.0, jnp.inf]))
