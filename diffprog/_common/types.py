import dataclasses
import functools as ft
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, cast, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree


Fn = TypeVar("Fn", bound=Callable)

# A number that may be traced: a new value never compiles again.
Number = float | Array


def _check_fields(owner: Any):
    for field in _fields_with_checks(type(owner)):
        value, known = getattr(owner, field.name), field.metadata
        if "check" in known:
            known["check"](field.name, value)
        else:
            check_kind(field.name, value, field.type, known["example"])


@ft.cache
def _fields_with_checks(cls: Any) -> list[dataclasses.Field]:
    """Those that `checked` and `component` made."""
    has_check = lambda field: {"check", "example"} & field.metadata.keys()
    return list(filter(has_check, dataclasses.fields(cls)))


# What other libraries have as an option of such classes.
_LENGTH = "the optimizer scales its steps, such as `optax.sgd(0.5)`"
_ELSEWHERE = dict(
    learning_rate=_LENGTH,
    lr=_LENGTH,
    reduction="`dp.value_and_direction` takes it",
)


@ft.cache
def _arguments(cls: Any) -> dict[str, inspect.Parameter]:
    """Those that a class is made with."""
    return dict([*inspect.signature(cls.__init__).parameters.items()][1:])


class AbstractPart(eqx.Module):
    """What users may write themselves: a class that lacks a method is told so at once.

    Classes are abstract, with a name that says so, or can be instantiated.
    """

    __check_init__ = _check_fields  # Equinox calls that of a class too, and before

    def __new__(cls, *_, **options):
        own = _arguments(cls)
        any_name = any(one.kind == one.VAR_KEYWORD for one in own.values())
        if not any_name and options.keys() - own.keys():
            instead = lambda name, _, known: _ELSEWHERE.get(name, known)
            _refuse(cls.__name__, own, options, instead)
        return eqx.Module.__new__(cls)

    def __init_subclass__(cls):
        if "Abstract" in cls.__name__:
            return
        inherited = [base.__abstractmethods__ for base in cls.__bases__]
        for name in sorted({*vars(cls)}.union(*inherited)):
            method = inspect.getattr_static(cls, name)
            if getattr(method, "__isabstractmethod__", False):
                signature, doc = inspect.signature(method), inspect.getdoc(method) or ""
                given = ", ".join([*signature.parameters][1:])
                found = inspect.formatannotation(signature.return_annotation)
                raise TypeError(
                    f"`{cls.__name__}` has no method `{name}({given})`, which returns "
                    f"`{re.sub(r'[a-z_.]+[.]', '', found)}`: {doc.splitlines()[0]}"
                )


def checked(check: Callable[[str, Any], None] | None, **options: Any) -> Any:
    """A field of an `AbstractPart`, whose name and value `check` is given."""
    return eqx.field(metadata={"check": check} if check else {}, **options)


def number(default: float, check: Callable[[str, Any], None] | None = None) -> Any:
    """A field with a number; an int becomes a float, since an int would be static."""
    return checked(check, default=default, converter=to_float)


def number_or_none() -> Any:
    """A field with a positive number, or `None` for what fits the dtype."""

    def check(name, value):
        if value is not None:
            check_positive(name, value)

    return checked(check, default=None, converter=to_float)


def to_float(value: Any) -> Any:
    """The same number; an int would be part of the program."""
    return float(value) if isinstance(value, int) else value


def positive_int(default: int) -> Any:
    """A field with a number of steps and the like, which is part of the program."""
    return checked(check_count, default=default, static=True)


def component(default: Any, example: str) -> Any:
    """A field of the class in its annotation, with an example for who gives another."""
    return eqx.field(metadata={"example": example}, default=default)


def came(value: Any) -> str:
    """What a user gave, in the words of a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    text = repr(value)
    return text if len(text) < 200 and "\n" not in text else f"a {type(value).__name__}"


def check_kind(name: str, value: Any, kind: Any, example: str):
    """Raises for what is no instance of `kind`: another object, or a class."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` is {came(value)}; something like `{example}` is expected."
        )


def check_function(name: str, value: Any, call: str):
    """Raises for what cannot be called, and for a class."""
    check_callable(name, value, f"a function `{call}`")


def check_callable(name: str, value: Any, expected: str):
    """The same, with other words for what is expected."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"`{name}` is {came(value)}; {expected} is expected.")


def check_takes_two(name: str, fn: Callable, call: str, by_name: tuple[str, ...] = ()):
    """Raises for a function that cannot be called with two arguments.

    What is in `by_name` it may ask for besides.
    """
    try:
        signature = inspect.signature(fn)
    except ValueError:  # some that are written in C have none
        return
    P = inspect.Parameter
    needed = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD)
        and p.default is P.empty
    ]
    try:
        signature.bind_partial(None, None)
        wrong = not set(needed[2:]) <= set(by_name)
    except TypeError:
        wrong = True
    if wrong:
        raise TypeError(f"`{name}` takes `{signature}`; `{call}` is expected.")


def counted(number: int, thing: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number} {thing}" + "s" * (number != 1)


def is_number(value: Any) -> bool:
    """Whether it is a number, or an array of them."""
    return isinstance(value, float | int | np.generic | np.ndarray | jax.Array)


def check_answer(owner: Any, method: str, answer: Any, kind: type, **numbers: Any):
    """Raises for what a method of a user must not return.

    It is a `kind`; `numbers` are the dtypes of those of its fields that are one number.
    """
    name = f"`{type(owner).__name__}.{method}` returned"
    if not isinstance(answer, kind):
        raise TypeError(f"{name} {came(answer)}; one `{kind.__name__}` is expected.")
    for field, dtype in numbers.items():
        value, given = getattr(answer, field), came(getattr(answer, field))
        if is_number(value):
            found = jnp.result_type(value)
            if not np.shape(value) and jnp.issubdtype(found, dtype):
                continue
            given = f"of shape {np.shape(value)} and dtype {found}"
        raise TypeError(
            f"{name} one `{kind.__name__}` whose `{field}` is {given}; one number of "
            f"dtype {getattr(dtype, '__name__', dtype)} is expected."
        )


def check_number(
    name: str,
    value: Any,
    expected: str = "a number",
    holds: Callable[[Any], Any] | None = None,
    otherwise: str = "",
):
    """Raises for what is no number, and for one that is known and of which not `holds`.

    `expected` says it in words, and `otherwise` what else may be given.
    """
    wrong = lambda shown: f"`{name}` is {shown}; {expected} is expected{otherwise}."
    if not is_number(value):
        raise TypeError(wrong(came(value)))
    if holds and is_known(value) and not np.all(holds(np.asarray(value))):
        raise ValueError(wrong(value))


def check_one_number(name: str, value: Any, expected: str = "one number"):
    """Raises for what is no number, and for an array of several."""
    if type(value) is not float and (not is_number(value) or np.ndim(value)):
        raise TypeError(f"`{name}` is {came(value)}; {expected} is expected.")


def check_positive(name: str, value: Any, otherwise: str = ""):
    """Raises for what is no number, and for one that is known and not positive."""
    check_number(name, value, "a number > 0", lambda value: value > 0, otherwise)


def check_not_negative(name: str, value: Any):
    """Raises for what is no number, and for one that is known and negative."""
    check_number(name, value, "a number >= 0", lambda value: value >= 0)


def is_known(array: Any) -> bool:
    """Whether its values can be looked at: not traced, and all on this machine."""
    return not isinstance(array, Tracer) and getattr(
        array, "is_fully_addressable", True
    )


def check_count(name: str, value: Any):
    """Raises for what is no positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; a Python int >= 1 is expected.")


def check_key(key: Any):
    """Raises for what is no key of `jax.random`."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"`key` is {came(key)}; a key such as `jax.random.key(0)` is expected."
        )


def shapes(tree: PyTree) -> str:
    """The shapes of the arrays of a tree, in its arrangement."""
    return str(jax.tree_util.tree_map(np.shape, tree))


@contextmanager
def noted(note: Callable[[], str]):
    """Adds a note to an error that code of the user raises inside."""
    try:
        yield
    except Exception as error:
        error.add_note(note())
        raise


def _refuse(called: str, own: Iterable[str], options: dict, instead: Callable):
    """Raises for an option that is not among the arguments `own`."""
    for name in [name for name in options if name not in own]:
        names = ", ".join(f"`{known}`" for known in own)
        known = f"its arguments are {names}" if names else "it takes none"
        said = instead(name, options[name], known)
        raise TypeError(f"`{called}` takes no `{name}`: {said}.")


def elsewhere(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """`__getattr__` of a module that says where to find what others call so."""

    def missing(name: str):
        said = f"; {names[name]}." if name in names else ""
        raise AttributeError(
            f"module `{module}` has no attribute `{name}`{said}",
            name=name,
            obj=sys.modules[module],
        )

    return missing


def with_advice(instead: Callable[[str, Any, str], str]) -> Callable[[Fn], Fn]:
    """A function that says what there is instead of an option that it does not have.

    `instead(name, value, known)` gets the sentence with the arguments that there are.
    """

    def decorate(fn: Fn) -> Fn:
        own = [*inspect.signature(fn).parameters]
        own = own[own[0] in ("self", "cls") :]
        called = re.sub(r"[.]__(init|call)__$", "", fn.__qualname__)

        @ft.wraps(fn)
        def call(*args, **options):
            _refuse(called, own, options, instead)
            return fn(*args, **options)

        return cast(Fn, call)

    return decorate


def with_other_names(others: dict[str, str]) -> Callable[[Fn], Fn]:
    """A function that says what the options of other libraries are here."""
    return with_advice(lambda name, _, known: others.get(name, known))


# Data with a row per stage: a stacked array for every segment of a chain.
Rows = tuple[Float[Array, "_ _"], ...]
Stacks = tuple[Float[Array, "_ _ _"], ...]
Tensors = tuple[Float[Array, "_ _ _ _"], ...]
