"""What is saved is what is loaded, and files that do not fit are refused by name."""

import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import ml_dtypes
import numpy as np
import optax
import pytest

import diffprog as dp
from diffprog._common import saving

from . import helpers
from .constrained import mass


def bits(leaf):
    """The type of a leaf, and what it holds to the last bit."""
    if not eqx.is_array_like(leaf):
        return type(leaf), leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jr.key_impl(leaf), leaf.dtype, bits(jr.key_data(leaf))
    array, weak = np.asarray(leaf), getattr(leaf, "weak_type", None)
    return type(leaf), array.dtype, array.shape, array.tobytes(), weak


def same(a, b) -> bool:
    """Whether two trees are one, NaNs of their histories included."""
    (a, structure), (b, other) = map(jtu.tree_flatten, (a, b))
    return structure == other and [*map(bits, a)] == [*map(bits, b)]


def with_limits():
    problem, x0, us = mass(horizon=4)
    return problem, dp.solve(problem, dp.ILQR(), x0, us, max_steps=4, throw=False)


def batch():
    problem, x0, us = helpers.spring(T=3)
    x0s, uss = jnp.stack([x0, 2 * x0]), jnp.stack([us, us])
    method = dp.ILQR()
    return dp.solve_batch(problem, method, x0s, uss, max_steps=3, history=True)


def training():
    net = dp.Network([eqx.nn.Linear(3, 2, key=jr.key(0)), jnp.tanh])
    params = eqx.filter(net, eqx.is_inexact_array)
    tx = optax.chain(dp.optim.llqr(dp.optim.Diagonal()), optax.adam(0.1))
    return net, tx.init(params)


@pytest.mark.parametrize(
    "make", [with_limits, pytest.param(batch, marks=pytest.mark.slow), training]
)
def test_what_is_loaded_is_what_was_saved(make, tmp_path):
    tree = make()
    dp.save(tmp_path / "tree", tree)
    other = jtu.tree_map(lambda a: a * 0 if eqx.is_inexact_array(a) else a, tree)
    assert not same(other, tree)
    assert same(dp.load(tmp_path / "tree", tree), tree)
    assert same(dp.load(tmp_path / "tree", other), tree)
    assert same(dp.load(tmp_path / "tree", eqx.filter_eval_shape(lambda: tree)), tree)


def numbers():
    return dict(
        double=jnp.asarray([1.0, -0.0, jnp.nan, jnp.inf]),
        single=jnp.ones((2, 0), jnp.float32),
        half=jnp.asarray([1 / 3, 3e38], jnp.bfloat16),
        quarter=jnp.asarray([1.5, 2.0], jnp.float8_e4m3fn),
        short=jnp.asarray([-8, 7], jnp.int4),
        integer=jnp.asarray(2**40),
        flags=jnp.asarray([True, False]),
        weak=(jnp.full(2, 1 / 3), jnp.full((), 3), jnp.full_like(0.0, 2.5)),
        wave=jnp.asarray(1 + 2j),
        keys=(jr.key(3), jr.split(jr.key(4, impl="rbg"), 2), jr.PRNGKey(5)),
        numpy=[np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.float32(0.1)],
        narrow=(np.ones(2, ml_dtypes.bfloat16), ml_dtypes.bfloat16(0.5)),
        python=(True, 7, -(2**63), 0.1, float("inf"), 1j),
        nothing=None,
        text="rk4",
        function=jnp.tanh,
        nested=[{}, [], {"b": {"c": 1.0}}],
    )


def test_every_kind_of_number_keeps_its_type_and_bits(tmp_path):
    tree = numbers()
    dp.save(str(tmp_path / "numbers.any"), tree)
    assert os.listdir(tmp_path) == ["numbers.any"]
    assert same(dp.load(tmp_path / "numbers.any", tree), tree)


def test_shapes_alone_are_enough(tmp_path):
    tree = dict(x=jnp.arange(3.0), key=jr.key(1, impl="rbg"))
    dp.save(tmp_path / "tree", tree)
    loaded = dp.load(tmp_path / "tree", jax.eval_shape(lambda: tree))
    assert same(loaded, tree)


def test_a_solve_goes_on_from_a_file(tmp_path):
    problem, x0, us = helpers.spring(T=3)
    solution = dp.solve(problem, dp.ILQR(), x0, us)
    dp.save(tmp_path / "solution", (problem, solution))
    made = lambda: dp.solve(problem, dp.ILQR(), x0, us)
    again, found = dp.load(tmp_path / "solution", (problem, jax.eval_shape(made)))
    assert repr(found) == repr(solution)
    further = dp.solve(again, dp.ILQR(), x0, found.us, state=found.state)
    assert further.stats["num_steps"] == 0 and further.cost == solution.cost
    policy = found.policy(1, jnp.ones(2))
    assert jnp.all(policy == solution.policy(1, jnp.ones(2)))


LIKE = dict(a=jnp.zeros((3, 2)), n=1.0, s="rk4")
UNLIKE = {
    "shape": (
        LIKE | dict(a=jnp.zeros((4, 2))),
        "like['a']` is float64 of shape (4, 2) in `like`, and float64 of shape (3, 2) "
        "in the file",
    ),
    "dtype": (LIKE | dict(a=jnp.zeros((3, 2), jnp.float32)), "is float32 of shape"),
    "kind": (LIKE | dict(n=1), "a Python int in `like`, and a Python float in"),
    "no number": (LIKE | dict(a=jnp.tanh), "no number in `like`, and float64"),
    "text": (LIKE | dict(s="euler"), "is the string 'euler' in `like`, and"),
    "absent": (dict(a=LIKE["a"], s="rk4"), "like['n']` is absent in `like`, and"),
    "more": (LIKE | dict(z=jnp.zeros(1)), "of shape (1,) in `like`, and absent in"),
    "many": (dict(b=[0.0] * 6), "and so on for 6 more. Give a `like` that is made as"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_another_tree_is_refused_by_the_name_of_the_leaf(case, tmp_path):
    like, message = UNLIKE[case]
    dp.save(tmp_path / "file", LIKE)
    with pytest.raises(ValueError) as error:
        dp.load(tmp_path / "file", like)
    assert "does not fit `like`: " in str(error.value)
    assert message in str(error.value)


def test_the_solution_of_another_problem_is_refused(tmp_path):
    rolled = lambda T: dp.rollout(*helpers.spring(T))
    dp.save(tmp_path / "file", rolled(3))
    with pytest.raises(ValueError, match=r"`like.xs` is float64 of shape \(5, 2\) in"):
        dp.load(tmp_path / "file", rolled(4))


def test_double_precision_asks_for_its_flag(tmp_path):
    dp.save(tmp_path / "file", jnp.ones(2))
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="update.'jax_enable_x64', True"):
            dp.load(tmp_path / "file", jnp.ones(2))


def test_what_is_no_whole_file_is_refused(tmp_path):
    path = tmp_path / "file"
    dp.save(path, LIKE)
    whole = path.read_bytes()
    line = whole.index(b"\n") + 1
    header = json.loads(whole[:line])
    assert header["version"] == dp.__version__
    assert header["leaves"][0] == dict(path="['a']", dtype="float64", shape=[3, 2])
    later = json.dumps(header | dict(number=2, version="9.1")).encode() + b"\n"
    wrong = json.dumps(header).replace("[3, 2]", "[3, 3]").encode() + b"\n"
    short = json.dumps(dict(format="diffprog", number=1)).encode() + b"\n"
    files = {
        b"": "is empty; a file of `dp.save` is expected",
        b"\x93NUMPY": "not written by `dp.save`: it begins with b'.x93NUMPY'",
        whole[:5]: "it ends within its first line",
        whole[:40]: "it ends within its first line",
        b"{" + whole[1:30] + b"\n": "its first line is not what it should be",
        short: "its first line is not what it should be",
        whole[:line]: r"the numbers of `like\['a'\]` are not whole",
        whole[: line + 140]: r"the numbers of `like\['a'\]` are not whole",
        whole[:-3]: r"the numbers of `like\['n'\]` are not whole",
        whole + b" ": "there is more in it than it says",
        later: "by diffprog 9.1 in format 2; .* up to 1: install diffprog 9.1 or later",
    }
    for content, message in files.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            dp.load(path, LIKE)
    path.write_bytes(wrong + whole[line:])
    with pytest.raises(ValueError, match="are not whole"):
        dp.load(path, LIKE | dict(a=jnp.zeros((3, 3))))
    with pytest.raises(FileNotFoundError):
        dp.load(tmp_path / "none", LIKE)


def test_nothing_is_ever_unpickled(tmp_path):
    path = tmp_path / "file"
    dp.save(path, 1.0)
    line = path.read_bytes().split(b"\n")[0]
    with open(path, "wb") as file:
        file.write(line + b"\n")
        np.save(file, np.asarray([print, 1], dtype=object))  # by pickle
    with pytest.raises(ValueError, match="are not whole") as error:
        dp.load(path, 1.0)
    assert "allow_pickle=False" in str(error.value.__cause__)


REFUSED = {
    "objects": (np.asarray([1, None]), TypeError, "an array of Python objects, for"),
    "long": (2**70, TypeError, "1180591620717411303424, for which NumPy would"),
    "shape": (jax.ShapeDtypeStruct((2,), float), TypeError, "a shape without numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_leaves_the_file_as_it_was(case, tmp_path):
    leaf, kind, message = REFUSED[case]
    dp.save(tmp_path / "file", 1.0)
    with pytest.raises(kind, match=r"`tree\['x'\]` is .*" + message):
        dp.save(tmp_path / "file", dict(x=leaf))
    assert dp.load(tmp_path / "file", 0.0) == 1.0


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    dp.save(tmp_path / "file", jnp.ones(3))

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(saving.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        dp.save(tmp_path / "file", jnp.zeros(3))
    assert os.listdir(tmp_path) == ["file"]
    assert jnp.all(dp.load(tmp_path / "file", jnp.zeros(3)) == 1)
    with pytest.raises(FileNotFoundError, match="There is no folder `.*/none` for"):
        dp.save(tmp_path / "none" / "file", 1.0)


def test_a_link_and_the_permissions_stay(tmp_path):
    dp.save(tmp_path / "file", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.chmod(tmp_path / "file", 0o640)
    dp.save(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert dp.load(tmp_path / "file", 0.0) == 2.0


def test_traced_numbers_are_refused(tmp_path):
    dp.save(tmp_path / "file", jnp.ones(2))
    for call in (
        lambda x: dp.save(tmp_path / "file", x),
        lambda x: dp.load(tmp_path / "file", x),
    ):
        with pytest.raises(TypeError, match="is traced: .* outside of `jax.jit`"):
            jax.jit(call)(jnp.ones(2))
