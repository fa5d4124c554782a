"""Values inside of a model, taken out by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, PyTree

from .._chain.network import Network
from .._common.types import came, check_callable


def tap(place: str | int, predict: Callable | None = None) -> Callable:
    r"""A function that takes a value out of a model: `features(model, inputs)`.

    ```python
    from jax.ad_checkpoint import checkpoint_name

    class Model(eqx.Module):
        def __call__(self, x):
            return self.head(checkpoint_name(self.body(x), "features"))

    curvature = dp.optim.feature_metric(dp.optim.tap("features"), loss)
    ```

    **Arguments:**

    - `place`: the name that the model gives a value by
        `jax.ad_checkpoint.checkpoint_name`; or for a [`diffprog.Network`][] the number
        of a stage, whose outputs are taken. A name inside of a `scan` gives those of
        all iterations, on an axis behind that of the examples.
    - `predict`: that of [`diffprog.value_and_direction`][]; the first axis of the value
        counts examples.

    **Returns:** the function. It fails with `ValueError` where the model has no such
    name, has it more than once, or has it inside of a `while` or `cond`.

    Costs the part of the model before the value, under `jax.jit`.
    """
    if isinstance(place, bool) or not isinstance(place, str | int):
        raise TypeError(
            f"`place` is {came(place)}; a name that the model gives by "
            '`jax.ad_checkpoint.checkpoint_name(x, "name")`, or the number of a stage '
            "of a `dp.Network`, is expected."
        )
    if predict is not None:
        check_callable("predict", predict, "something like `lambda model, inputs: ...`")
    if isinstance(place, int):
        return lambda model, inputs, **options: _stage(model, place, inputs)
    return lambda model, inputs, **options: _named(
        model, place, predict, inputs, **options
    )


def _stage(model: Any, i: int, inputs: PyTree) -> Array:
    """The outputs of a stage for all examples."""
    if not isinstance(model, Network):
        raise TypeError(
            f"`place` is {i}, the number of a stage, and the model is a "
            f"{type(model).__name__}; a `dp.Network` is expected, or a name."
        )
    stages = [stack.row(row) for stack in model.stacks for row in range(stack.size)]
    if not 0 <= i < len(stages):
        raise ValueError(
            f"`place` is {i}; the network has the stages 0 to {len(stages) - 1}."
        )

    def run(x):
        for stage in stages[: i + 1]:
            x = stage(x)
        return x

    return jax.vmap(run)(inputs)


def _named(
    model: Any, name: str, predict: Callable | None, inputs: PyTree, key: Any = None
) -> Array:
    """Mapped from outside without a `predict`: the axis of the examples comes first."""
    if predict is not None:
        options = {} if key is None else {"key": key}
        return _collected(lambda: predict(model, inputs, **options), name)
    run = lambda x, *keys: model(x, key=keys[0]) if keys else model(x)
    keys = () if key is None else (jr.split(key, jtu.tree_leaves(inputs)[0].shape[0]),)
    one = lambda *example: _collected(lambda: run(*example), name)
    return jax.vmap(one)(inputs, *keys)


def _collected(fn: Callable[[], PyTree], name: str) -> Array:
    """The one value of this name that the function computes."""
    closed = jax.make_jaxpr(fn)()
    _, found = _run(closed.jaxpr, closed.consts, [], name)
    if len(found) == 1:
        return found[0]
    known = sorted(_names(closed.jaxpr))
    if not found:
        such = f"there are {', '.join(map(repr, known))}" if known else "there is none"
        raise ValueError(
            f"The model gives no value the name {name!r} by "
            f"`jax.ad_checkpoint.checkpoint_name`: {such}."
        )
    raise ValueError(
        f"The model gives the name {name!r} to {len(found)} values; one is expected."
    )


def _inner(eqn) -> list[Any]:
    """The programs inside of an operation."""
    leaves = jtu.tree_leaves(eqn.params, is_leaf=_is_program)
    return [leaf for leaf in leaves if _is_program(leaf)]


def _is_program(leaf) -> bool:
    return isinstance(leaf, ClosedJaxpr | Jaxpr)


def _names(program: Any) -> set[str]:
    """All names in a program."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    names = {eqn.params["name"] for eqn in jaxpr.eqns if eqn.primitive.name == "name"}
    return names.union(*(_names(p) for eqn in jaxpr.eqns for p in _inner(eqn)))


def _run(jaxpr: Jaxpr, consts: list, args: list, name: str) -> tuple[list, list]:
    """What a program returns, and its values of this name."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.invars, args, strict=True)
    found: list[Array] = []
    for eqn in jaxpr.eqns:
        ins = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        inside = any(name in _names(program) for program in _inner(eqn))
        outs, more = _enter(eqn, ins, name) if inside else (_bind(eqn, ins), [])
        if eqn.primitive.name == "name" and eqn.params["name"] == name:
            more = ins
        found += more
        env |= zip(eqn.outvars, outs, strict=True)
    return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars], found


def _bind(eqn, ins: list) -> list:
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    outs = eqn.primitive.bind(*functions, *ins, **params)
    return outs if eqn.primitive.multiple_results else [outs]


def _enter(eqn, ins: list, name: str) -> tuple[list, list]:
    """The same of an operation that has the name inside."""
    kind = eqn.primitive.name
    if kind in ("while", "cond"):
        raise ValueError(
            f"The model names {name!r} inside of a `{kind}`, whose values cannot be "
            "taken out: name the result of the loop or branch."
        )
    if kind == "scan":
        return _scan(eqn, ins, name)
    program, *_ = _inner(eqn)
    if isinstance(program, Jaxpr):  # of `jax.checkpoint`
        return _run(program, [], ins, name)
    return _run(program.jaxpr, program.consts, ins, name)


def _scan(eqn, ins: list, name: str) -> tuple[list, list]:
    """A loop whose values of every iteration are stacked."""
    params, program = eqn.params, eqn.params["jaxpr"]
    fixed, carried = params["num_consts"], params["num_carry"]
    consts, carried_in = ins[:fixed], ins[fixed:]
    carry, rows = carried_in[:carried], carried_in[carried:]

    def body(carry, row):
        args = [*consts, *carry, *row]
        outs, found = _run(program.jaxpr, program.consts, args, name)
        return outs[:carried], (outs[carried:], found)

    options = dict(length=params["length"], reverse=params["reverse"])
    last, (outs, found) = lax.scan(body, carry, rows, **options)
    return [*last, *outs], found
