"""Steps with constraints are those of Cooper, on PyTorch."""

import os
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest


pytest.importorskip("cooper")
with mock.patch.dict(os.environ):  # which they set
    from benchmarks import learning_pairs
    from benchmarks.peers import cooper

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]
PAIRS = [
    ("Adam", "ascent", "simultaneous"),
    ("momentum", "augmented", "dual first"),
    ("SGD", "nuPI, zeros", "primal first"),
]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_steps_are_those_of_cooper(pair):
    theirs = cooper.run(*pair)
    ours = learning_pairs.run(*pair)(jnp.asarray(learning_pairs.START))
    for some, others in zip(ours, theirs):
        assert np.max(np.abs(others)) > 0.1
        assert np.max(np.abs(some - others)) < 1e-11


def test_the_sgd_start_differs_by_the_error_that_cooper_forgets():
    pair = "SGD", "nuPI, SGD", "dual first"
    theirs, _ = cooper.run(*pair)
    start = jnp.asarray(learning_pairs.START)
    ours, _ = learning_pairs.run(*pair)(start)
    forgotten, _ = learning_pairs.run(*pair, forget=True)(start)
    assert np.max(np.abs(ours - theirs)) > 0.1
    assert np.max(np.abs(forgotten - theirs)) < 1e-11


def test_the_limits_of_the_problem_can_be_kept():
    assert learning_pairs.violation() < 1e-8
