"""Loops that XLA compiles into one function: the CPU's fast path.

XLA's CPU runtime starts every operation of a loop body on its own, which costs more
than the arithmetic on a state of ten numbers. A call marked `xla_cpu_small_call` is
compiled into one function instead, loops included. The mark is an internal of XLA, and
some programs do not compile under it, so a program gets it only if every primitive in
it is known to be safe, and its arrays are small enough that XLA neither hands them to
a library nor splits them over threads. Everything else runs as ordinary JAX.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal as OneOf

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.core import eval_jaxpr, Tracer
from jax.custom_batching import custom_vmap
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType
from jaxtyping import PyTree

from .linalg import eliminate, ELIMINATED, product, tiled_product
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
# A larger product of matrices is cut into tiles, up to where the library is as fast.
MAX_PRODUCTS = 1 << 17
DTYPES = ("bool", "float32", "float64", "int32", "int64", "uint32", "uint64", "uint8")


# How the loops of a program run. "plain": maps at once, scans by XLA's runtime.
# "apart": the same, but each scan as one function ("forced": or an error). "fused":
# maps are loops as well, so that the whole program can be compiled as one function.
Loops = OneOf["plain", "apart", "forced", "fused"]


class FastLoopsError(ValueError):
    """Fast loops were asked for where they are not possible."""


def compiled(fn: Callable, fast_loops: bool | None, *args: PyTree) -> PyTree:
    """`fn("fused", *args)` as one function if that is possible; else `fn("apart", ..)`.

    Under `vmap`, differentiation, and on other platforms than the CPU it is
    `fn("plain", *args)`. Where `fn` has its traced numbers from `args` alone, that is
    traced when it is asked for, so `fn` should not hold any. `fast_loops=True` raises
    where fast loops are known to be impossible; `False` always takes `fn("plain", ..)`.
    Either way small products of matrices are sums on the CPU.
    """
    if jax.default_backend() != "cpu" and not fast_loops:
        return fn("plain", *args)
    numbers, rest = eqx.partition(args, eqx.is_array)
    leaves, treedef = jtu.tree_flatten(numbers)

    def trace(loops: Loops, leaves: list) -> tuple[ClosedJaxpr, PyTree]:
        numbers = lambda leaves: jtu.tree_unflatten(treedef, leaves)
        run = lambda *leaves: fn(loops, *eqx.combine(numbers(leaves), rest))
        return jax.make_jaxpr(run, return_shape=True)(*leaves)

    def later(_, leaves: list) -> list:
        made, _ = trace("plain", leaves)
        return eval_jaxpr(made.jaxpr, made.consts, *leaves)

    elsewhere = _elsewhere()
    if fast_loops or (fast_loops is None and not elsewhere):
        program, shape = trace("fused", leaves)
        if kind := _kind(program, fast_loops, elsewhere):
            plain, extra = later, []
            if any(isinstance(const, Tracer) for const in program.consts):
                plain, extra = _split(trace("plain", leaves)[0])
            return _dispatch(program, leaves, kind, shape, plain, extra)
    loops = "plain" if fast_loops is False or elsewhere else "apart"
    program, shape = trace(loops, leaves)
    return _dispatch(program, leaves, "sums", shape, *_split(program))


def scan(fn: Callable, carry: PyTree, rows: PyTree, reverse: bool, loops: Loops):
    """`lax.scan`, with `loops` as above."""
    ordinary = lambda: lax.scan(fn, carry, rows, reverse=reverse)
    on_cpu = jax.default_backend() == "cpu"
    if loops in ("plain", "fused") or (loops == "apart" and not on_cpu):
        return ordinary()
    program, shape = jax.make_jaxpr(ordinary, return_shape=True)()
    kind = _kind(program, loops == "forced", _elsewhere()) or "sums"
    return _dispatch(program, [], kind, shape, *_split(program))


def _kind(program: ClosedJaxpr, forced: bool | None, elsewhere: str | None):
    """How to compile a program as one function; None if that is not possible."""
    reason = elsewhere or obstacle(program)
    if reason and forced:
        raise FastLoopsError(
            f"`fast_loops=True` is not possible here because of {reason}. "
            "`fast_loops=None` makes as many loops fast as it can."
        )
    if reason:
        return None
    return "forced" if forced else "fast"


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


def _split(program: ClosedJaxpr) -> tuple[Callable, list]:
    """`fn(consts, leaves)` of a program, without traced numbers, and its `consts`."""
    jaxpr = program.jaxpr
    return lambda consts, leaves: eval_jaxpr(jaxpr, consts, *leaves), program.consts


def _dispatch(
    program: ClosedJaxpr, leaves: list, kind: str, shape, plain: Callable, extra: list
) -> PyTree:
    """`program` of some numbers on the CPU, marked unless its `kind` is "sums".

    Its batches and derivatives are those of `plain(extra, leaves)`.
    """
    # JAX keeps the functions below, which must not keep traced numbers in turn.
    jaxpr, (ordinary, consts) = program.jaxpr, _split(program)
    if kind == "sums" and (program.effects or not _is_known(program)):
        outs = ordinary(consts, leaves)
        return jtu.tree_unflatten(jtu.tree_structure(shape), outs)

    # XLA aborts on an argument that its function does not use, and finds out more than
    # JAX about what is not used: so a number of each comes back.
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {*map(id, jaxpr.outvars)}
    used = [id(v) in read for v in jaxpr.invars]

    @jax.jit
    def small_call(consts, given):
        first = [c[(0,) * c.ndim] for c in (*consts, *given) if c.size]
        left = iter(given)
        args = tuple(next(left) if is_used else None for is_used in used)
        return _run(jaxpr, consts, args), first

    def on_cpu(consts, leaves):
        if kind == "sums":
            return _run(jaxpr, consts, tuple(leaves), whole=False)
        given = [leaf for leaf, is_used in zip(leaves, used, strict=True) if is_used]
        with set_xla_metadata(inlineable="false", xla_cpu_small_call="true"):
            given = lax.optimization_barrier((consts, given))
            return lax.optimization_barrier(small_call(*given))[0]

    @custom_vmap
    def unbatched(consts, _, leaves):
        rules = dict(cpu=on_cpu, default=ordinary)
        return lax.platform_dependent(consts, leaves, **rules)

    @unbatched.def_vmap
    def _(size, batched, _, *args):
        if kind == "forced":
            raise FastLoopsError(
                "`fast_loops=True` is not possible under `jax.vmap`, which runs all "
                "problems in lock step: use `jax.lax.map`, or `dp.solve_batch`."
            )
        axes = jtu.tree_map(lambda is_batched: 0 if is_batched else None, batched)
        out = jax.vmap(plain, in_axes=tuple(axes[1:]), axis_size=size)(*args)
        return out, jtu.tree_map(lambda _: True, out)

    differentiable = jax.custom_jvp(unbatched)

    @differentiable.defjvp
    def _(primals, tangents):
        return jax.jvp(plain, primals[1:], tangents[1:])

    outs = differentiable(consts, extra, leaves)
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
            outs = [product(*ins, params["dimension_numbers"])]
        elif name == "dot_general" and whole and _is_tiled(eqn):
            tiled = ft.partial(tiled_product, dimensions=params["dimension_numbers"])
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
