"""What runs on eight fake devices, or in two processes, equals what runs on one."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp

from . import helpers


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import diffprog as dp
from jax.sharding import NamedSharding, PartitionSpec as P
from tests import helpers

problem, _, us = helpers.linear()
limits = jnp.array([-0.3, -1.0]), jnp.array([0.5, 0.4])
problem = dp.ControlProblem.from_system(problem.system, 12, limits)
x0s = jnp.linspace(-1.0, 1.0, 48).reshape(16, 3)
mesh = jax.make_mesh((8,), ("batch",))
sharded = jax.device_put(x0s, NamedSharding(mesh, P("batch")))
stop = dp.Equality(lambda x: x[:2], name="stop")
to_rest = dp.ControlProblem.from_system(
    problem.system, 12, terminal_constraints=stop
)
for given, search, check in (
    (problem, dp.AdaptiveDamping(), True),
    (problem, dp.AdaptiveDamping(), False),
    (to_rest, dp.Backtracking(), True),
):
    solve = jax.vmap(lambda x0: dp.solve(given, dp.DDP(), x0, us, search))
    whole = jax.device_get(jax.jit(solve)(x0s))
    split = jax.shard_map(
        solve, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=check
    )
    compiled = jax.jit(split).lower(sharded).compile()
    assert "all-reduce" not in compiled.as_text()
    parts = jax.device_get(compiled(sharded))
    np.testing.assert_allclose(parts.us, whole.us, atol=1e-13)
    np.testing.assert_array_equal(
        parts.stats["num_rollouts"], whole.stats["num_rollouts"]
    )
    np.testing.assert_array_equal(parts.result._value, whole.result._value)
print("agree")
"""


VOCABULARY = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from diffprog.losses import Alpha, f_loss, f_softargmax, f_softmax, JensenShannon, KL
from jax.sharding import PartitionSpec as P

auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 4), ("batch", "classes"), axis_types=auto)
rng = np.random.default_rng(0)
scores = jnp.asarray(2 * rng.normal(size=(6, 800))).at[2, 100:500].set(-jnp.inf)
labels = jnp.array([0, 799, 5, 600, 200, 199])
prior = jnp.asarray(rng.uniform(size=800))
rows, row, tail = P("batch", "classes"), P("batch"), P("classes")
traced = Alpha(jnp.asarray(1.3))
for f, named in (GENERATORS):
    def outputs(scores, labels, prior, axis_name=None):
        options = dict(reference=named or prior, axis_name=axis_name)
        loss = lambda s: f_loss(s, labels, f, **options)
        value, pull = jax.vjp(loss, scores)
        return (f_softargmax(scores, f, **options), f_softmax(scores, f, **options),
                value, pull(jnp.cos(value))[0])

    whole = jax.jit(outputs)(scores, labels, prior[None])
    for check in (True, False):
        split = jax.shard_map(
            lambda s, l, q: outputs(s, l, q[None], "classes"), mesh=mesh,
            in_specs=(rows, row, tail), out_specs=(rows, row, row, rows),
            check_vma=check,
        )
        if not check:  # the transpose of a sum over devices needs the check
            split_outputs = jax.jit(split)(scores, labels, prior)[:3]
        else:
            split_outputs = jax.jit(split)(scores, labels, prior)
        for a, b in zip(split_outputs, whole):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
print("agree")
"""

IN_CLOSED_FORM, BY_ITERATION = (
    VOCABULARY.replace("GENERATORS", generators)
    for generators in (
        '(KL(), "unit"), (Alpha(1.5), "unit"), (Alpha(1.5), None)',
        '(JensenShannon(), "uniform"), (traced, "unit")',
    )
)

CURVATURES = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_enable_x64", True)
import diffprog as dp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
wave = lambda *shape: jnp.sin(jnp.arange(float(np.prod(shape))).reshape(shape))
W, x = {"a": wave(4, 5), "b": wave(5, 3)}, wave(16, 4)
predict = lambda W, x: checkpoint_name(jnp.tanh(x @ W["a"]), "hidden") @ W["b"]
labels = (jnp.arange(16) % 3).at[2].set(-1)
loss = dp.losses.SoftmaxCrossEntropy(ignore_label=-1)
D = jax.tree.map(lambda a: jnp.stack([a, a**2]), W)
hidden = dp.optim.tap("hidden", predict)
recipes = dict(
    ggn=lambda **o: dp.optim.ggn(loss, predict, **o),
    total=lambda **o: dp.optim.ggn(loss, predict, reduction="sum", **o),
    hessian=lambda **o: dp.optim.hessian(loss, predict, **o),
    features=lambda **o: dp.optim.feature_metric(hidden, loss, predict, **o),
)
optimizer = dp.optim.model_step(optax.sgd(1.0), groups="leaf", every=2)
for recipe in recipes.values():
    def answers(W, D, x, labels, **options):
        at = recipe(**options)(W, x, labels)
        model = at.linearize()
        one = jax.tree.map(lambda a: a[0], D)
        step, _ = optimizer.update(model.gradient, optimizer.init(W), W, curvature=at)
        return model.value, model.gradient, model.mv(one), model.gram(D), step

    whole = jax.jit(answers)(W, D, x, labels)
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
    found = [jax.jit(answers)(W, D, put(x), put(labels))]
    for check in (True, False):
        one = lambda *args: answers(*args, axis_name="data")
        specs = dict(in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
        split = jax.shard_map(one, mesh=mesh, check_vma=check, **specs)
        found.append(jax.jit(split)(W, D, x, labels))
        try:
            jax.shard_map(answers, mesh=mesh, check_vma=check, **specs)(W, D, x, labels)
        except ValueError as error:
            assert "axis_name='data'" in str(error), error
        else:
            raise AssertionError("a wrong scale")
    for other in found:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(whole)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * abs(b).max())
print("agree")
"""


FACTORS = """
import equinox as eqx, jax, jax.numpy as jnp, jax.random as jr, numpy as np
jax.config.update("jax_enable_x64", True)
import diffprog as dp
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
keys = jr.split(jr.key(0), 7)
layers = [eqx.nn.Linear(4, 3, use_bias=False, key=keys[0])]
for key in keys[1:5]:
    layers += [eqx.nn.Linear(3, 3, key=key), jnp.tanh]
net = dp.Network(layers)
params, rest = eqx.partition(net, eqx.is_inexact_array)
x, labels = jr.normal(keys[6], (16, 4)), (jnp.arange(16) % 3).at[2].set(-1)
loss = dp.losses.SoftmaxCrossEntropy(ignore_label=-1)
for form in ("exact", "sampled"):
    optimizer = dp.optim.kfac(factors=form)

    def answers(params, x, labels, **options):
        at = dp.optim.ggn(loss, **options)(eqx.combine(params, rest), x, labels)
        g = at.linearize().gradient
        for _ in range(2):
            step, state = optimizer.update(g, optimizer.init(params), curvature=at)
        return step, (state.A, state.G, state.refused)

    whole = jax.jit(answers)(params, x, labels)
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
    found = [jax.jit(answers)(params, put(x), put(labels))]
    for check in (True, False):
        split = jax.shard_map(
            lambda *args: answers(*args, axis_name="data"), mesh=mesh,
            in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=check,
        )
        found.append(jax.jit(split)(params, x, labels))
    assert not whole[1][2]
    for other in found if form == "exact" else found[:1]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(whole)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * abs(b).max())
    # Every device draws signs of its own; what does not depend on them is the same.
    for other in found:
        for a, b in zip(other[1][0], whole[1][0]):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
        for a, b in zip(other[1][1], whole[1][1]):
            assert np.abs(a - b).max() < 0.9 * np.abs(b).max()
print("agree")
"""


PRECONDITIONERS = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import diffprog as dp
from diffprog.optim import (
    ExactStep, ggn, Kronecker, llqr, NormalEquations, refresh, Scalar,
)
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
net = eqx.nn.MLP(4, 3, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
params, rest = eqx.partition(net, eqx.is_inexact_array)
x, y = jax.random.normal(jax.random.key(1), (16, 4)), jnp.arange(16) % 3
learned = llqr(Kronecker(), solver=ExactStep(2))
scalar = llqr(Scalar("layer"), solver=NormalEquations())
state = {"learned": learned.init(params), "scalar": scalar.init(params)}

def run(axis_name, state, params, x, y):
    recipe = ggn(dp.losses.SoftmaxCrossEntropy(), axis_name=axis_name)
    c = recipe(eqx.combine(params, rest), x, y)
    g, fresh = c.linearize().gradient, state["learned"]
    return refresh(state, params, c), learned.update(g, fresh, params, curvature=c)

whole = jax.jit(lambda *args: run(None, *args))(state, params, x, y)
put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
found = [jax.jit(lambda *args: run(None, *args))(state, params, put(x), put(y))]
for check in (True, False):
    split = jax.shard_map(
        lambda *args: run("data", *args), mesh=mesh, check_vma=check,
        in_specs=(P(), P(), P("data"), P("data")), out_specs=P(),
    )
    found.append(jax.jit(split)(state, params, x, y))
for other in found:
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
print("agree")
"""

PROBLEMS = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import diffprog as dp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests import helpers

stiffness, T = jnp.linspace(0.1, 0.6, 16), 6
problems = dp.ControlProblem.from_system(
    helpers.Spring(stiffness=stiffness, weight=jnp.array(0.1)), T
)
x0s = jnp.stack([jnp.linspace(-1.0, 1.0, 16), jnp.linspace(0.0, 0.5, 16)], axis=1)
uss = jnp.full((16, T, 1), 0.1)
none = jax.tree.map(lambda _: None, problems)
axes = eqx.tree_at(lambda p: p.system.stiffness, none, 0, is_leaf=lambda a: a is None)
flat = jax.make_mesh((8,), ("problems",), axis_types=(AxisType.Auto,))
grid = jax.make_mesh((2, 4), ("hosts", "cores"))  # has explicit axes

def given(stiffness, weight=0.1):
    numbers = lambda p: (p.system.stiffness, p.system.weight)
    return eqx.tree_at(numbers, problems, (stiffness, jnp.asarray(weight)))

def solve(x0s=x0s, n=16, **options):
    call = dict(in_axes=axes, history=True) | options
    return dp.solve_batch(given(stiffness[:n]), dp.ILQR(), x0s[:n], uss[:n], **call)

def agree(found, expected):
    found, expected = jax.device_get((found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    for name in ("num_steps", "num_rollouts", "num_backwards"):
        np.testing.assert_array_equal(found.stats[name], expected.stats[name])
    np.testing.assert_array_equal(found.result._value, expected.result._value)

whole = solve()
some = lambda n: jax.tree.map(lambda a: a[:n], whole)
assert np.ptp(whole.cost) > 0.01 and np.ptp(whole.stats["num_steps"]) > 0
"""


BATCH = (
    PROBLEMS
    + """
found = solve(mesh=flat)
agree(found, whole)
assert {a.data.shape for a in found.us.addressable_shards} == {(2, T, 1)}
lines = []
receive = lambda problems, **_: lines.append(problems)
agree(solve(n=11, mesh=grid, batch_size=1, verbose=receive), some(11))
assert lines == [6, 5], lines
inside = jax.jit(lambda x0s: solve(x0s, mesh=flat))
there = jax.device_put(x0s, NamedSharding(flat, P("problems")))
compiled = inside.lower(there).compile()
agree(compiled(there), whole)
moves = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
assert not [move for move in moves if move in compiled.as_text()]

def loss(numbers, x0s, mesh=None):
    some = dp.solve_batch(
        given(*numbers), dp.ILQR(), x0s, uss, in_axes=axes, mesh=mesh
    )
    return jnp.sum(some.us**2) + jnp.sum(some.xs**3) + jnp.sum(some.cost)

at = (stiffness, jnp.array(0.1)), x0s
for a, b in zip(*(
    jax.tree.leaves(jax.jit(jax.grad(lambda *at: loss(*at, mesh), (0, 1)))(*at))
    for mesh in (flat, None)
)):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * abs(b).max())
    assert np.all(np.abs(b) > 0)
print("agree")
"""
)


BATCHES = (
    PROBLEMS
    + """
for mesh in (flat, grid):
    found = solve(mesh=mesh)
    agree(found, whole)
    assert len(found.us.sharding.device_set) == 8
    agree(found[3], whole[3])
    for n in (3, 11):
        agree(solve(n=n, mesh=mesh), some(n))
agree(solve(mesh=flat, fast_loops=False), whole)
lines = []
receive = lambda problems, **_: lines.append(problems)
agree(solve(mesh=flat, batch_size=1, verbose=receive), whole)
assert lines == [8, 8], lines
state = dict(state=whole.state, xss=whole.xs, max_steps=3)
agree(solve(mesh=flat, **state), solve(**state))

moves = ("all-reduce", "all-gather", "collective-permute", "all-to-all")
text = lambda compiled: compiled.as_text()
alone = text(jax.jit(solve).lower(x0s).compile())
for mesh in (flat, grid):
    there = jax.device_put(x0s, NamedSharding(mesh, P(mesh.axis_names)))
    for size in (None, 1):
        inside = jax.jit(lambda x0s: solve(x0s, mesh=mesh, batch_size=size))
        compiled = inside.lower(there).compile()
        assert not [move for move in moves if move in text(compiled)]
        fast = "xla_cpu_small_call"  # loops are as fast as without a mesh
        assert (fast in text(compiled)) == (fast in alone)
        agree(compiled(there), whole)
    agree(solve(there, mesh=mesh), whole)
    agree(solve(jax.device_put(x0s, jax.devices()[3]), mesh=mesh), whole)
agree(jax.jit(lambda x0s: solve(x0s, n=11, mesh=flat))(x0s), some(11))
with jax.set_mesh(grid):
    agree(solve(mesh=grid), whole)
    agree(solve(n=11, mesh=grid), some(11))
    agree(jax.jit(lambda x0s: solve(x0s, mesh=grid))(there), whole)

stop = dp.Equality(lambda x: x, name="stop")
limits = jnp.array([-3.0]), jnp.array([3.0])
to_rest = dp.ControlProblem.from_system(
    helpers.Spring(), T, limits, terminal_constraints=stop
)
rest = lambda **options: dp.solve_batch(
    to_rest, dp.DDP(), 0.1 * x0s[:5], uss[:5], outer=dp.AugmentedLagrangian(), **options
)
agree(rest(mesh=grid), rest())
assert np.all(rest().success)
inner = lambda x0s, uss: dp.solve_batch(to_rest, dp.DDP(), x0s, uss, mesh=flat).us
try:
    jax.shard_map(inner, mesh=flat, in_specs=P("problems"), out_specs=P("problems"))(
        x0s, uss
    )
except ValueError as error:
    assert "inside of `jax.shard_map` over" in str(error), error
else:
    raise AssertionError("a mesh in a mesh")
print("agree")
"""
)


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)
process = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, process)
import diffprog as dp
from jax.sharding import NamedSharding, PartitionSpec as P
from tests import helpers

assert jax.device_count() == 8 and jax.local_device_count() == 4
problem, _, us = helpers.spring(6)
x0s = np.random.default_rng(0).normal(size=(16, 2))
uss = np.full((16, 6, 1), 0.1)
alone = dp.solve_batch(problem, dp.ILQR(), x0s, uss)
mesh = jax.make_mesh((8,), ("problems",))
mine = slice(8 * process, 8 * process + 8)
rows = NamedSharding(mesh, P("problems"))
split = lambda a: jax.make_array_from_process_local_data(rows, a[mine])
solve = lambda *pair, **options: dp.solve_batch(
    problem, dp.ILQR(), *pair, mesh=mesh, **options
)

def agree(found, n=16):
    for shard in found.us.addressable_shards:
        own = alone.us[:n][shard.index]
        np.testing.assert_allclose(shard.data, own, rtol=1e-12, atol=1e-12)

lines = []
receive = lambda problems, **_: lines.append(problems)
first = solve(split(x0s), split(uss))
assert {shard.index[0].start // 8 for shard in first.us.addressable_shards} == {process}
agree(first)
agree(solve(split(x0s), first.us, state=first.state))
verbose = receive if process == 0 else False
agree(solve(split(x0s), split(uss), batch_size=1, verbose=verbose))
assert lines == [4, 4] * (process == 0), lines
agree(solve(x0s, uss))  # of which each process has all
agree(solve(x0s[:13], uss[:13]), 13)
np.testing.assert_allclose(jnp.sum(first.cost), jnp.sum(alone.cost), rtol=1e-12)
print("agree")
"""


@pytest.mark.costly
@pytest.mark.parametrize(
    "program",
    (
        PROGRAM,
        IN_CLOSED_FORM,
        BY_ITERATION,
        pytest.param(CURVATURES, marks=pytest.mark.slow),
        FACTORS,
        PRECONDITIONERS,
        BATCH,
        pytest.param(BATCHES, marks=pytest.mark.slow),
    ),
    ids=(
        "solves",
        "vocabulary in closed form",
        "vocabulary by iteration",
        "curvatures",
        "factors",
        "preconditioners",
        "batch",
        "batches",
    ),
)
def test_what_is_split_over_devices_equals_what_is_on_one(program):
    run = started(program, " --xla_force_host_platform_device_count=8")
    agrees(run)


@pytest.mark.slow
def test_what_is_split_over_processes_equals_what_is_on_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [started(PROCESS, "", str(process), str(port)) for process in range(2)]
    for run in runs:
        agrees(run)


def started(program, flags, *arguments):
    flags = os.environ.get("XLA_FLAGS", "") + flags
    env = {"XLA_FLAGS": flags, "PATH": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def agrees(run):
    try:
        out, error = run.communicate(timeout=280)
    finally:
        run.kill()  # JAX does not end at a request where another process is awaited
    assert out.strip().endswith("agree"), error


MESH = jax.make_mesh((1,), ("problems",), devices=jax.devices()[:1])


def test_wrong_meshes(unchecked):
    problem, x0, us = helpers.spring()

    def call(mesh):
        dp.solve_batch(problem, dp.ILQR(), x0[None], us[None], mesh=mesh)

    for mesh, came in (
        (8, "8"),
        (jax.devices(), r"\[.*"),
        (MESH.abstract_mesh, "Abs.*"),
    ):
        with pytest.raises(TypeError, match=f"`mesh` is {came}; a `jax.sharding.Mesh`"):
            call(mesh)
    with pytest.raises(ValueError, match="`mesh` has no devices; at least one .*make_"):
        call(jax.sharding.Mesh(np.array([], object), "problems"))
    with pytest.raises(
        TypeError, match="takes no `mesh`: `dp.solve_batch` solves many"
    ):
        dp.solve(problem, dp.ILQR(), x0, us, mesh=MESH)  # pyright: ignore


def test_a_mesh_of_one_device_changes_nothing():
    problem, x0, us = helpers.spring()
    x0s, uss = jnp.stack([x0, 0.5 * x0, -x0]), jnp.stack([us] * 3)
    solve = lambda **mesh: dp.solve_batch(problem, dp.ILQR(), x0s, uss, **mesh)
    helpers.close(solve(mesh=MESH), solve(), rtol=1e-12)
