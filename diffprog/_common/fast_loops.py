"""Loops that XLA compiles into one function: the CPU's fast path.

XLA's CPU runtime starts every operation of a loop body on its own, which costs more
than the arithmetic on a state of ten numbers. A call marked `xla_cpu_small_call` is
compiled into one function instead, loops included. The mark is an internal of XLA, and
some programs do not compile under it, so a program gets it only if every primitive in
it is known to be safe, and its arrays are small enough that XLA neither hands them to
a library nor splits them over threads. Everything else runs as ordinary JAX.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, Literal as OneOf

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.core import eval_jaxpr
from jax.custom_batching import custom_vmap
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType
from jaxtyping import Array, PyTree

from .linalg import eliminate, ELIMINATED
from .primitives import (
    ARITHMETIC,
    CALLS,
    FUNCTIONS,
    inner_programs,
    MOVES,
    REDUCTIONS,
    VARY,
)
from .straight import straight_scan


try:
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:  # pragma: no cover
    set_xla_metadata: Any = None

# The newest JAX whose compiler was tried with all of this.
NEWEST = (0, 12)

# Operations per number. A function counts as what it expands to.
WORK: dict[str, int] = dict.fromkeys(MOVES, 0)
WORK |= dict.fromkeys(ARITHMETIC + REDUCTIONS, 1)
WORK |= dict.fromkeys(FUNCTIONS, 40)

# XLA hands a reduction of 4096 numbers to a library. It splits over threads what moves
# 512 KiB, or has more operations than bytes and costs 200 000, where a byte moved
# counts as 10, after fusing several operations into one. Neither compiles here.
MAX_REDUCED = 4095
MAX_BYTES = 1 << 18
MAX_COMPUTED, MAX_CHEAP, MAX_CHEAP_OPERATIONS = 1024, 4096, 8
MAX_WORK = 100_000
# A larger product of matrices is cut into tiles, up to where the library is as fast: so
# few rows that sums are no more operations than bytes, over this many numbers at once.
MAX_PRODUCTS, SUMMED = 1 << 17, 4
DTYPES = ("bool", "float32", "float64", "int32", "int64", "uint32", "uint64", "uint8")


# How the loops of a program run. "plain": maps at once, scans by XLA's runtime.
# "apart": the same, but each scan as one function ("forced": or an error). "fused":
# maps are loops as well, so that the whole program can be compiled as one function.
Loops = OneOf["plain", "apart", "forced", "fused"]


class FastLoopsError(ValueError):
    """Fast loops were asked for where they are not possible."""


def compiled(fn: Callable[[Loops], PyTree], fast_loops: bool | None) -> PyTree:
    """`fn("fused")` as one function if that is possible; else `fn("apart")`.

    `fn` reads what it needs from its closure. Under `vmap`, differentiation, and on
    other platforms than the CPU `fn("plain")` runs. `fast_loops=True` raises where that
    is known now; `False` always takes `fn("plain")`. Either way small products of
    matrices are sums on the CPU.
    """
    if jax.default_backend() != "cpu" and not fast_loops:
        return fn("plain")
    trace = lambda loops: jax.make_jaxpr(lambda: fn(loops), return_shape=True)()
    elsewhere = _elsewhere()
    if fast_loops or (fast_loops is None and not elsewhere):
        fast, shape = trace("fused")
        reason = elsewhere or obstacle(fast)
        if reason and fast_loops:
            raise FastLoopsError(
                f"`fast_loops=True` is not possible here because of {reason}. "
                "`fast_loops=None` makes as many loops fast as it can."
            )
        if not reason:
            plain, _ = trace("plain")
            return _dispatch(fast, plain, shape, "forced" if fast_loops else "fast")
    program, shape = trace("plain" if fast_loops is False or elsewhere else "apart")
    if program.effects or not _is_known(program):
        outs = eval_jaxpr(program.jaxpr, program.consts)
        return jtu.tree_unflatten(jtu.tree_structure(shape), outs)
    return _dispatch(program, program, shape, "sums")


def scan(fn: Callable, carry: PyTree, rows: PyTree, reverse: bool, loops: Loops):
    """`lax.scan`, with `loops` as above."""
    ordinary = lambda _: lax.scan(fn, carry, rows, reverse=reverse)
    if loops in ("apart", "forced"):
        return compiled(ordinary, loops == "forced" or None)
    return ordinary(loops)


def _elsewhere() -> str | None:
    """What keeps every program from the fast path."""
    if set_xla_metadata is None:
        return f"JAX {jax.__version__}, which has no `xla_metadata`"
    if jax.__version_info__[:2] > NEWEST:
        newest = ".".join(map(str, NEWEST))
        return f"JAX {jax.__version__}: it was tried up to JAX {newest}"
    if jax.default_backend() != "cpu":
        return f"the platform {jax.default_backend()}: they speed up the CPU only"
    return None


def _dispatch(program: ClosedJaxpr, plain: ClosedJaxpr, shape, kind: str) -> PyTree:
    """`program` on the CPU, marked unless its `kind` is "sums"; elsewhere `plain`."""
    # JAX keeps the functions below, which must not keep traced numbers in turn.
    jaxpr, plain_jaxpr = program.jaxpr, plain.jaxpr
    ordinary = lambda consts: eval_jaxpr(plain_jaxpr, consts)

    # XLA aborts on an argument that its function does not use, and finds out more than
    # JAX about what is not used: so a number of each comes back.
    @jax.jit
    def small_call(consts):
        first = [c[(0,) * c.ndim] for c in consts if c.size]
        return _run(jaxpr, consts), first

    def on_cpu(consts, _):
        if kind == "sums":
            return _run(jaxpr, consts, whole=False)
        with set_xla_metadata(inlineable="false", xla_cpu_small_call="true"):
            consts = lax.optimization_barrier(consts)
            return lax.optimization_barrier(small_call(consts))[0]

    @custom_vmap
    def unbatched(consts, plain_consts):
        rules = dict(cpu=on_cpu, default=lambda _, consts: ordinary(consts))
        return lax.platform_dependent(consts, plain_consts, **rules)

    @unbatched.def_vmap
    def _(size, batched, _, plain_consts):
        if kind == "forced":
            raise FastLoopsError(
                "`fast_loops=True` is not possible under `jax.vmap`, which runs all "
                "problems in lock step: use `jax.lax.map`, or `dp.solve_batch`."
            )
        axes = [0 if is_batched else None for is_batched in batched[1]]
        mapped = jax.vmap(ordinary, in_axes=(axes,), axis_size=size)
        out = mapped(plain_consts)
        return out, jtu.tree_map(lambda _: True, out)

    differentiable = jax.custom_jvp(unbatched)

    @differentiable.defjvp
    def _(primals, tangents):
        return jax.jvp(ordinary, primals[1:], tangents[1:])

    outs = differentiable(program.consts, plain.consts)
    return jtu.tree_unflatten(jtu.tree_structure(shape), outs)


def _is_known(closed: ClosedJaxpr) -> bool:
    """Whether all primitives are on the list, whatever the sizes."""
    return all(
        all(map(_is_known, inner_programs(eqn)))
        if eqn.primitive.name in CALLS
        else _is_listed(eqn)
        for eqn in closed.jaxpr.eqns
    )


def _is_listed(eqn) -> bool:
    """Whether a primitive is on the list; between devices nothing may move."""
    name = eqn.primitive.name
    if name == "reshard":  # inside `shard_map` it is the identity
        kinds = eqn.outvars[0].aval.sharding.mesh.axis_types
        return set(kinds) == {AxisType.Manual}
    return name in WORK


def obstacle(closed: ClosedJaxpr) -> str | None:
    """Why a program cannot be compiled as one function; None if it can."""
    try:
        _work(closed)
    except _Obstacle as error:
        return str(error)
    return None


class _Obstacle(Exception):
    pass


def _work(closed: ClosedJaxpr) -> int:
    """Operations of one pass through a program, without the loops in it."""
    total = 0
    for eqn in closed.jaxpr.eqns:
        name = eqn.primitive.name
        if _is_eliminated(eqn):
            continue
        if name in CALLS:
            works = [_work(jaxpr) for jaxpr in inner_programs(eqn)]
            total += 0 if name in ("scan", "while") else sum(works)
        else:
            total += _check(name, eqn)
        if total > MAX_WORK:
            raise _Obstacle(f"a loop body of more than {MAX_WORK} operations")
    return total


def _check(name: str, eqn) -> int:
    """Operations of one primitive, if it is safe."""
    if not _is_listed(eqn):
        raise _Obstacle(f"the primitive `{name}`")
    ins, outs = ([v.aval for v in vs] for vs in (eqn.invars, eqn.outvars))
    for array in (*ins, *outs):
        if array.dtype.name not in DTYPES:
            raise _Obstacle(f"an array of dtype {array.dtype}")
    size = max(array.size for array in outs)
    if name in REDUCTIONS:
        size = max(size, *(array.size for array in ins))
        size = _num_products(eqn) if name == "dot_general" else size
        if name == "dot_general" and _is_tiled(eqn):
            return 0  # a function of its own
        if size > MAX_REDUCED:
            raise _Obstacle(f"`{name}` over {size} numbers")
        return 2 * size
    if name.startswith("scatter") and ins[1].size != ins[1].shape[-1]:
        raise _Obstacle(f"`{name}` with several indices")
    moved = max(array.size * array.dtype.itemsize for array in outs)
    if moved > MAX_BYTES and name != "dynamic_update_slice":
        raise _Obstacle(f"`{name}` to an array of {moved} bytes")
    if WORK[name] and size > (MAX_CHEAP if WORK[name] == 1 else MAX_COMPUTED):
        raise _Obstacle(f"`{name}` of {size} numbers at once")
    # So many of them at most as can be fused without more operations than bytes.
    if WORK[name] and size > MAX_COMPUTED:
        return MAX_WORK // MAX_CHEAP_OPERATIONS
    return size * WORK[name]


def _num_products(eqn) -> int:
    a, b = (var.aval for var in eqn.invars)
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    size = a.size * b.size
    for axis in (*contracted, *batched):
        size //= max(a.shape[axis], 1)
    return size


def _is_tiled(eqn) -> bool:
    """Whether a `dot_general` is one of matrices that is cut into tiles."""
    (_, _), (batched, _) = eqn.params["dimension_numbers"]
    return MAX_REDUCED < _num_products(eqn) <= MAX_PRODUCTS and not batched


def _is_eliminated(eqn) -> bool:
    """Whether it solves with a positive matrix whose size suits `eliminate`.

    Derivatives and batches of that function have its name as well.
    """
    shapes = [v.aval.shape for v in eqn.invars]
    known = eqn.params.get("name") == "solve_factorized"
    return known and [*map(len, shapes)] == [2, 2, 0] and shapes[0][0] in ELIMINATED


def _run(jaxpr: Jaxpr, consts: list, args: tuple = (), whole: bool = True) -> list:
    """Runs a program with its small products of matrices as sums.

    XLA gives a `dot_general` of more than 7 x 7 to a library, and starts each of them
    on its own; a product and a sum stay part of the loop around them. Where the
    program is compiled as a `whole` larger products are cut into tiles.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, args, strict=True)
    sines: dict[Any, tuple] = {}
    for eqn in jaxpr.eqns:
        ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        # Fused, XLA would compute each entry of the matrix for both of its places.
        symmetrized = whole and params.get("name") == "symmetrize"
        if name == "dot_general":
            out: Any = eqn.outvars[0].aval
            ins = [jnp.asarray(a, out.dtype) for a in ins]
        if name == "dot_general" and _num_products(eqn) <= MAX_REDUCED:
            outs = [_product(*ins, params["dimension_numbers"])]
        elif name == "dot_general" and whole and _is_tiled(eqn):
            tiled = ft.partial(_tiled, dimensions=params["dimension_numbers"])
            outs = [jax.jit(tiled)(*ins)]
        elif whole and name == "scan" and (line := straight_scan(eqn, ins)):
            outs = line
        elif name in ("scan", "while", "cond") or symmetrized:
            rewritten = ft.partial(_rewritten, whole=whole)
            params = jtu.tree_map(rewritten, params, is_leaf=_is_program)
            outs = eqn.primitive.bind(*ins, **params)
        elif whole and _is_eliminated(eqn):
            outs = eliminate(*map(jnp.asarray, ins))
        elif name in CALLS:
            (inner,) = inner_programs(eqn)
            outs = _run(inner.jaxpr, inner.consts, tuple(ins), whole)
        # What comes out of a line varies over all devices that any of it does.
        elif name in VARY and jax.typeof(ins[0]) == eqn.outvars[0].aval:
            outs = ins
        # A function is a call of its own: fused into others it would run once for each.
        elif name in ("sin", "cos"):
            if eqn.invars[0] not in sines:
                sines[eqn.invars[0]] = _sin_cos(*ins)
            outs = [sines[eqn.invars[0]][name == "cos"]]
        elif name in FUNCTIONS:
            once = lambda *ins, eqn=eqn: eqn.primitive.bind(*ins, **eqn.params)
            outs = [jax.jit(once)(*ins)]
        else:
            outs = eqn.primitive.bind(*ins, **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        env |= zip(eqn.outvars, outs, strict=True)
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]


@jax.jit
def _sin_cos(x):
    """Both at once, for little more than the price of one."""
    return jnp.sin(x), jnp.cos(x)


def _is_program(value) -> bool:
    return isinstance(value, ClosedJaxpr)


def _rewritten(value, whole: bool):
    if not isinstance(value, ClosedJaxpr):
        return value
    run = lambda *args: _run(value.jaxpr, value.consts, args, whole)
    return jax.make_jaxpr(run)(*value.in_avals)


def _product(a: Array, b: Array, dimensions) -> Array:
    """`lax.dot_general` as a product and a sum."""
    (a_sum, b_sum), (a_batch, b_batch) = dimensions
    a_free = [i for i in range(a.ndim) if i not in (*a_sum, *a_batch)]
    b_free = [i for i in range(b.ndim) if i not in (*b_sum, *b_batch)]
    # Axes: batch, free of a, free of b, summed.
    a = jnp.transpose(a, (*a_batch, *a_free, *a_sum))
    b = jnp.transpose(b, (*b_batch, *b_free, *b_sum))
    lead, split = len(a_batch), len(a_batch) + len(a_free)
    a = jnp.expand_dims(a, range(split, split + len(b_free)))
    b = jnp.expand_dims(b, range(lead, split))
    return jnp.sum(a * b, axis=range(split + len(b_free), a.ndim))


def _tiled(a: Array, b: Array, dimensions) -> Array:
    """`lax.dot_general` of matrices, some rows at a time."""
    (a_sum, b_sum), _ = dimensions
    a_free = [i for i in range(a.ndim) if i not in a_sum]
    b_free = [i for i in range(b.ndim) if i not in b_sum]
    shape = tuple(a.shape[i] for i in a_free) + tuple(b.shape[i] for i in b_free)
    a, b = jnp.transpose(a, (*a_free, *a_sum)), jnp.transpose(b, (*b_sum, *b_free))
    summed = math.prod(b.shape[: len(b_sum)])
    a, b = a.reshape(-1, summed), b.reshape(summed, -1)
    height = min(len(a), a.dtype.itemsize // 2)
    matrices = (((1,), (0,)), ((), ()))

    def step(i, out):
        first = jnp.minimum(i * height, len(a) - height)
        rows = lax.dynamic_slice_in_dim(a, first, height)
        parts = [slice(k, k + SUMMED) for k in range(0, summed, SUMMED)]
        products = [_product(rows[:, k], b[k], matrices) for k in parts]
        return lax.dynamic_update_slice_in_dim(out, sum(products), first, 0)

    out = jnp.zeros((len(a), b.shape[1]), a.dtype)
    return lax.fori_loop(0, -(-len(a) // height), step, out).reshape(shape)
