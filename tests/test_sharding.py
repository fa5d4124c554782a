"""Solves inside `shard_map`, on eight fake devices, equal those on one."""

import subprocess
import sys


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import diffprog as dp
from jax.sharding import NamedSharding, PartitionSpec as P
from tests import helpers

problem, _, us = helpers.spring()
x0s = jnp.linspace(-1.0, 1.0, 32).reshape(16, 2)
mesh = jax.make_mesh((8,), ("batch",))
sharded = jax.device_put(x0s, NamedSharding(mesh, P("batch")))
solve = jax.vmap(lambda x0: dp.solve(problem, dp.DDP(), x0, us, dp.AdaptiveDamping()))
whole = jax.device_get(jax.jit(solve)(x0s))
for check in (True, False):
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


def test_solves_split_over_devices_equal_solves_on_one():
    flags = "--xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={"XLA_FLAGS": flags, "PATH": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert run.stdout.strip() == "agree", run.stderr
