"""The primitives of JAX that programs are made of here, by what they do."""

from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


VARY = "pcast", "pvary"  # they change the type only
CALLS = "closed_call cond custom_jvp_call custom_vjp_call jit pjit scan while".split()
MOVES = """
and bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy copy_p
dynamic_slice dynamic_update_slice eq eq_to gather ge gt iota is_finite le le_to lt
lt_to ne not or pad pcast population_count pvary reshape reshard rev scatter scatter-add
select_n shift_left shift_right_arithmetic shift_right_logical slice split squeeze
stack stop_gradient tile transpose unstack xor
""".split()
ARITHMETIC = """
abs add add_any ceil clamp div floor integer_pow max min mul neg reduce_precision rem
round sign sqrt square sub
""".split()
FUNCTIONS = """
acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erfc exp exp2 expm1 log log1p
logistic nextafter pow rsqrt sin sinh tan tanh
""".split()
REDUCTIONS = """
argmax argmin cumprod cumsum dot_general reduce_and reduce_max reduce_min reduce_or
reduce_prod reduce_sum
""".split()
# What makes each number from the numbers at its place.
BY_ENTRY = {
    *ARITHMETIC,
    *FUNCTIONS,
    *"convert_element_type copy copy_p select_n".split(),
}


def inner_programs(eqn) -> Iterator[ClosedJaxpr]:
    for value in eqn.params.values():
        for jaxpr in value if isinstance(value, tuple) else (value,):
            if isinstance(jaxpr, ClosedJaxpr):
                yield jaxpr


def dependence(jaxpr: Jaxpr) -> list[set[int]]:
    """The numbers of the inputs that each output is computed from."""
    known: dict[Any, set[int]] = {v: {i} for i, v in enumerate(jaxpr.invars)}

    def of(atoms) -> set[int]:
        variables = (v for v in atoms if not isinstance(v, Literal))
        return set().union(*(known.get(v, ()) for v in variables))

    for equation in jaxpr.eqns:
        known |= dict.fromkeys(equation.outvars, of(equation.invars))
    return [of([v]) for v in jaxpr.outvars]
