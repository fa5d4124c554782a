"""Bodies of small loops as straight lines of operations on single numbers.

XLA gives each operation on a small array a loop of its own, and computes what is 0
everywhere like the rest. A body that is written out, number by number, needs only what
is left of it, in registers. Its one operation is a `reduce_window` of windows of one
number each: what XLA has for a program of its user's with many results. Several stages
lie in one line, since numbers go in and out through memory.

What is 0 everywhere is 0 also times what is not finite, where a loop can have NaN: a
unit vector times an infinite derivative. A number 0 that the user's program multiplies
by is no such zero.
"""

import functools as ft
import itertools as it
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array

from .primitives import BY_ENTRY, CALLS, FUNCTIONS, inner_programs
from .tree import vary
from .zeros import MOVES


# Operations of one stage, and of all in a line; stages in a line. What is longer is no
# faster, and takes long to compile.
MAX_STAGE, MAX_LINE, MAX_STAGES = 1000, 2000, 2
# The same of numbers that go in or out of a stage, and of functions; one is too long.
MAX_MOVED, MAX_FUNCTIONS, LONG = 120, 30, "erfc"
# Operations of one stage, also for each number that goes in or out: with fewer, moving
# the numbers costs what is saved. What is kept of every stage counts several times.
LEAST, LEAST_PER_NUMBER, KEPT = 100, 3, 4

NUMBERWISE = {*BY_ENTRY, *"and eq ge gt is_finite le lt ne not or xor".split()} - {LONG}
LOOPS = "cond scan while".split()
REDUCERS: dict[str, Callable] = dict(
    reduce_and=lax.bitwise_and,
    reduce_max=lax.max,
    reduce_min=lax.min,
    reduce_or=lax.bitwise_or,
    reduce_prod=lax.mul,
    reduce_sum=lax.add,
)


class _NotStraight(Exception):
    """A program has to stay as it is."""


def straight_scan(eqn: Any, ins: list) -> list[Array] | None:
    """The results of a `scan`, its body as straight lines; None if it has to stay."""
    params = eqn.params
    body, length, reverse = params["jaxpr"], params["length"], params["reverse"]
    operations, carried = _operations(body), params["num_carry"]
    kept = sum(aval.size for aval in body.out_avals[carried:])
    least = LEAST_PER_NUMBER * (_moved(body) + (KEPT - 1) * kept)
    if operations < max(LEAST, least, 1):
        return None
    ins = [jnp.asarray(n, a.dtype) for n, a in zip(ins, body.in_avals, strict=True)]
    most = min(MAX_STAGES, max(MAX_LINE // operations, 1))
    together = max(d for d in range(1, most + 1) if length % d == 0)
    first = params["num_consts"]
    last = first + carried
    consts, rows = ins[:first], ins[last:]
    carry = vary(ins[first:last], like=ins)  # as the line does
    stages = range(together)[:: -1 if reverse else 1]
    count = length // together
    blocks = [row.reshape(count, together, *row.shape[1:]) for row in rows]
    step = lambda carry, block: _run_line(body, stages, consts, carry, block)
    carry, outs = lax.scan(step, carry, blocks, length=count, reverse=reverse)
    return [*carry, *(out.reshape(length, *out.shape[2:]) for out in outs)]


def _moved(closed: ClosedJaxpr) -> int:
    """How many numbers go in or out."""
    return sum(aval.size for aval in (*closed.in_avals, *closed.out_avals))


def _operations(closed: ClosedJaxpr) -> int:
    """Those on single numbers; none if the program has to stay."""
    avals = *closed.in_avals, *closed.out_avals
    keys = any(jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in avals)
    # A number of a line is not weakly typed.
    weak = any(aval.weak_type for aval in closed.out_avals)
    if keys or weak or _moved(closed) > MAX_MOVED:
        return 0

    line = _Line(MAX_STAGE, counts=True)
    ins = [_filled(aval.shape, lambda _: _Unknown()) for aval in closed.in_avals]
    try:
        line.run(closed.jaxpr, closed.consts, ins)
    except _NotStraight:
        return 0
    made = [k[0] for k, (out, _) in line.found.items() if not _is_known(out)]
    functions = sum(name in FUNCTIONS for name in made)
    return len(made) if functions <= MAX_FUNCTIONS else 0


def _run_line(
    body: ClosedJaxpr, stages: range, consts: list, carry: list, block: list
) -> tuple[list[Array], list[Array]]:
    """The next carry, and the results of some stages in a line."""
    ins, last = [*consts, *carry, *block], len(carry)
    results = [
        *((aval.shape, aval.dtype) for aval in body.out_avals[:last]),
        *(((len(stages), *a.shape), a.dtype) for a in body.out_avals[last:]),
    ]

    def program(numbers):
        left = iter(numbers)
        arrays = [_objects(a.shape, list(it.islice(left, a.size))) for a in ins]
        line = _Line(math.inf)
        fixed, rows = arrays[: len(consts)], arrays[len(consts) + last :]
        carry, outs = arrays[len(consts) : len(consts) + last], {}
        for k in stages:
            row = [*fixed, *carry, *(row[k] for row in rows)]
            out = line.run(body.jaxpr, body.consts, row)
            carry, outs[k] = out[:last], out[last:]
        columns = zip(*(outs[k] for k in sorted(outs)), strict=True)
        return [n for a in (*carry, *map(np.stack, columns)) for n in a.flat]

    cells = [a.reshape(-1)[i : i + 1] for a in ins for i in range(a.size)]
    sizes = [math.prod(shape) for shape, _ in results]
    pairs = zip(results, sizes, strict=True)
    dtypes = [dtype for (_, dtype), size in pairs for _ in range(size)]
    left = iter(_apply(program, cells, dtypes))
    found = []
    for (shape, dtype), size in zip(results, sizes, strict=True):
        own = [*it.islice(left, size)] or [jnp.zeros(0, dtype)]
        found.append(jnp.concatenate(own).reshape(shape))
    return found[:last], found[last:]


def _apply(program: Callable, cells: list[Array], dtypes: list) -> list[Array]:
    """A program of numbers, of arrays of one number each, as one operation.

    Operands and results of a `reduce_window` are alike: what has no partner is padded.
    """
    operands, taken, given = [], {}, {}
    for dtype in sorted({c.dtype for c in cells} | {*map(np.dtype, dtypes)}, key=str):
        mine = [i for i, cell in enumerate(cells) if cell.dtype == dtype]
        asked = [i for i, other in enumerate(dtypes) if other == dtype]
        for k in range(max(len(mine), len(asked))):
            if k < len(mine):
                taken[mine[k]] = len(operands)
            if k < len(asked):
                given[asked[k]] = len(operands)
            operands.append(cells[mine[k]] if k < len(mine) else jnp.zeros(1, dtype))

    def computation(starts, numbers):
        outs, new = program([numbers[taken[i]] for i in range(len(cells))]), [*starts]
        for i, out in enumerate(outs):
            new[given[i]] = jnp.asarray(out, dtypes[i])
        return tuple(new)

    starts = tuple(np.zeros((), operand.dtype) for operand in operands)
    windows: Any = (1,), (1,), "VALID"
    found = lax.reduce_window(tuple(operands), starts, computation, *windows)
    return [found[given[i]] for i in range(len(dtypes))]


def _objects(shape: tuple, numbers: list) -> np.ndarray:
    """An array of objects, with one more axis of length 1 at the end as in `MOVES`."""
    out = np.empty(len(numbers), object)
    for i, number in enumerate(numbers):
        out[i] = number
    return out.reshape(*shape, 1)


def _filled(shape: tuple, fn: Callable) -> np.ndarray:
    """The same of what `fn` says of each index."""
    return _objects(shape, [fn(index) for index in np.ndindex(*shape)])


class _Unknown:
    """A number whose operations are counted only."""


def _is_known(number: Any) -> bool:
    return not isinstance(number, Tracer | _Unknown)


class _Line:
    """Runs a program on arrays of numbers, of which some are known.

    The same operation is done once; `most` is how many there may be.
    """

    def __init__(self, most: int | float, counts: bool = False):
        self.most, self.counts = most, counts
        self.found: dict[tuple, tuple] = {}

    def run(self, jaxpr: Jaxpr, consts: list, ins: list[np.ndarray]) -> list:
        known = lambda value: np.asarray(value)[..., None].astype(object)
        if any(isinstance(c, Tracer) or np.size(c) > MAX_STAGE for c in consts):
            raise _NotStraight
        env: dict[Any, np.ndarray] = dict(zip(jaxpr.constvars, map(known, consts)))
        env |= zip(jaxpr.invars, ins, strict=True)
        read = lambda v: known(v.val) if isinstance(v, Literal) else env[v]
        for eqn in jaxpr.eqns:
            outs = self.apply(eqn, [read(v) for v in eqn.invars])
            env |= zip(eqn.outvars, outs, strict=True)
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn: Any, ins: list[np.ndarray]) -> list[np.ndarray]:
        name, params, aval = eqn.primitive.name, eqn.params, eqn.outvars[0].aval
        sizes = [v.aval.size for v in (*eqn.invars, *eqn.outvars)]
        if name in (*REDUCERS, "dot_general") and 0 in sizes:
            raise _NotStraight
        if name in CALLS and name not in LOOPS:
            (inner,) = inner_programs(eqn)
            return self.run(inner.jaxpr, inner.consts, ins)
        if name == "iota":
            index = range(params["shape"][params["dimension"]])
            return [_filled(aval.shape, lambda i: index[i[params["dimension"]]])]
        if name in NUMBERWISE:
            ins = list(np.broadcast_arrays(*ins))
            dtypes = tuple(v.aval.dtype for v in eqn.invars)
            bind = lambda *ns: eqn.primitive.bind(*ns, **params)
            op = name, bind, dtypes, aval.dtype, str(params)
            written = name == "mul" and any(isinstance(v, Literal) for v in eqn.invars)
            make = self.operation if written else self.number
            return [_filled(aval.shape, lambda i: make(op, *_at(ins, i)))]
        if name in REDUCERS:
            kept = [i for i in range(ins[0].ndim - 1) if i not in params["axes"]]
            a = ins[0][..., 0].transpose(*kept, *params["axes"])
            a = a.reshape(*aval.shape, -1)
            return [_filled(aval.shape, lambda i: self.reduced(name, aval, list(a[i])))]
        if name == "dot_general":
            if {v.aval.dtype for v in eqn.invars} != {aval.dtype}:
                raise _NotStraight
            a, b = ins
            return [self.product(aval, a, b, params["dimension_numbers"])]
        if name in MOVES:
            return MOVES[name](ins, params, [v.aval.shape for v in eqn.outvars])
        raise _NotStraight(name)

    def number(self, op: tuple, *numbers: Any) -> Any:
        """One operation, unless something makes it none."""
        known = _without(op[0], numbers)
        return known[0] if known else self.operation(op, *numbers)

    def operation(self, op: tuple, *numbers: Any) -> Any:
        name, fn, dtypes, dtype, params = op
        # 0 and -0 are equal, but not written alike.
        named = [repr(n) if _is_known(n) else id(n) for n in numbers]
        key = name, dtypes, dtype, params, *named
        if key not in self.found:
            if len(self.found) >= self.most:
                raise _NotStraight
            pairs = zip(numbers, dtypes, strict=True)
            typed = [d.type(n) if _is_known(n) else n for n, d in pairs]
            if not all(map(_is_known, numbers)):
                out = _Unknown() if self.counts else fn(*typed)
            else:
                with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
                    out = fn(*map(jnp.asarray, typed)).item()
            self.found[key] = out, numbers
        return self.found[key][0]

    def reduced(self, name: str, aval: Any, numbers: list) -> Any:
        alike = (aval.dtype,) * 2
        op = name.removeprefix("reduce_"), REDUCERS[name], alike, aval.dtype, ""
        return ft.reduce(ft.partial(self.number, op), numbers)

    def product(self, aval: Any, a: np.ndarray, b: np.ndarray, dims) -> np.ndarray:
        """`lax.dot_general`."""
        (a_sum, b_sum), (a_batch, b_batch) = dims
        a_free = [i for i in range(a.ndim - 1) if i not in (*a_sum, *a_batch)]
        b_free = [i for i in range(b.ndim - 1) if i not in (*b_sum, *b_batch)]
        lead, split = len(a_batch), len(a_batch) + len(a_free)
        summed = [a.shape[i] for i in a_sum]
        a = a[..., 0].transpose(*a_batch, *a_free, *a_sum)
        b = b[..., 0].transpose(*b_batch, *b_free, *b_sum)
        a = a.reshape(*a.shape[:split], *([-1] if summed else [1]))
        b = b.reshape(*b.shape[: lead + len(b_free)], *([-1] if summed else [1]))
        mul = "mul", lax.mul, (aval.dtype,) * 2, aval.dtype, ""

        def entry(index):
            rows = a[index[:split]], b[(*index[:lead], *index[split:])]
            products = [self.number(mul, *pair) for pair in zip(*rows, strict=True)]
            return self.reduced("reduce_sum", aval, products)

        return _filled(aval.shape, entry)


def _at(arrays: list, index: tuple) -> list:
    return [array[(*index, 0)] for array in arrays]


def _without(name: str, numbers: tuple) -> tuple:
    """The result of an operation that is none; empty if it is one."""
    if name == "select_n":
        which, *cases = numbers
        return (cases[int(which)],) if _is_known(which) else ()
    for one, other in (numbers, numbers[::-1]) if len(numbers) == 2 else ():
        if not _is_known(one):
            continue
        if name in ("add", "add_any", "sum") and one == 0:
            return (other,)
        if name == "mul" and one in (0, 1):
            return (other if one else one,)
        if name == "and" and one is True:
            return (other,)
    if name == "sub" and _is_known(numbers[1]) and numbers[1] == 0:
        return (numbers[0],)
    return ()
