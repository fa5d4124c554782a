"""What functions capture is data: a changed number never gives the old answer."""

import collections
import contextvars
import dataclasses
import functools as ft
import gc
import math
import types
import typing
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import diffprog as dp
from diffprog._common.capture import Frozen, put_together, Taken
from diffprog._common.door import door

from . import helpers


X0, US = jnp.ones(1), jnp.zeros((3, 1))
ILQR = dp.ILQR()


class Plain:
    """An ordinary object, as a newcomer writes it."""

    def __init__(self, weight):
        self.weight = weight
        self.gain = np.ones(1)
        self.shape = (1, "name", None)
        self.step = self.dynamics  # leads back to itself

    def dynamics(self, x, u, t):
        return x + self.gain * u

    def cost(self, x, u, t):
        return jnp.sum(self.weight * u**2 + x**2)

    def terminal_cost(self, x):
        return jnp.sum(self.weight * x**2)

    __call__ = cost


@dataclasses.dataclass(frozen=True)
class Fixed:
    weight: float

    def cost(self, x, u, t):
        return jnp.sum(self.weight * u**2 + x**2)


def dynamics(x, u, t):
    return x + u


def terminal_cost(x):
    return jnp.sum(x**2)


def effort(weight, x, u, t):
    return jnp.sum(weight * u**2 + x**2)


def problem(cost):
    return dp.ControlProblem(dynamics, cost, terminal_cost, 3)


def cell():
    weight = 1.0

    def change():
        nonlocal weight
        weight = 3.0

    return problem(lambda x, u, t: effort(weight, x, u, t)), change


def array():
    weights = np.ones(1)
    return problem(lambda x, u, t: effort(weights, x, u, t)), lambda: weights.fill(3.0)


def tree():
    weights = {"w": [1.0], "name": "effort"}
    change = lambda: weights.update(w=[3.0])
    return problem(lambda x, u, t: effort(weights["w"][0], x, u, t)), change


def partial():
    weights = np.ones(1)
    return problem(ft.partial(effort, weights)), lambda: weights.fill(3.0)


def default():
    weights = np.ones(1)
    cost = lambda x, u, t, w=weights, *, scale=1.0: effort(scale * w, x, u, t)
    return problem(cost), lambda: weights.fill(3.0)


def method():
    plain = Plain(1.0)
    change = lambda: setattr(plain, "weight", 3.0)
    return problem(plain.cost), change


def called():
    plain = Plain(1.0)
    return problem(plain), lambda: setattr(plain, "weight", 3.0)


def system():
    plain = Plain(1.0)
    chain = dp.ControlProblem.from_system(plain, 3)
    return chain, lambda: setattr(plain, "weight", 3.0)


def in_place():
    plain = Plain(1.0)
    change = lambda: plain.gain.fill(3.0)
    return dp.ControlProblem.from_system(plain, 3), change


def nested():
    weights = np.ones(1)
    inner = lambda: weights
    cost = jax.jit(lambda x, u, t: effort(inner(), x, u, t))
    return problem(cost), lambda: weights.fill(3.0)


def asked():
    weights = np.ones(1)
    return problem(
        lambda x, u, t: effort(np.sqrt(weights) if weights > 2 else weights, x, u, t)
    ), lambda: weights.fill(3.0)


def wrapped():
    weights = np.ones(1)
    inner = lambda u: jnp.sum(weights * u**2)
    outer = jax.custom_jvp(inner)  # cannot be rebuilt, unlike `inner` itself
    outer.defjvp(lambda primals, tangents: (inner(*primals), tangents[0][0]))
    return problem(lambda x, u, t: inner(u) + outer(u)), lambda: weights.fill(3.0)


def recursive():
    weights = np.ones(1)

    def cost(x, u, t, depth=2):
        return cost(x, u, t, depth - 1) if depth else effort(weights, x, u, t)

    return problem(cost), lambda: weights.fill(3.0)


def index():
    place = np.array([0])
    weights = jnp.array([1.0, 3.0])
    mask = np.array([True])
    cost = lambda x, u, t: effort(weights[place], x, u[mask], t)
    return problem(cost), lambda: place.fill(1)


def long_list():
    weights = [1.0] * 100
    change = lambda: weights.__setitem__(7, 3.0)
    return problem(lambda x, u, t: effort(jnp.array(weights)[7], x, u, t)), change


KINDS = [cell, array, tree, partial, default, method, called, system, in_place]
KINDS += [nested, asked, wrapped, recursive, index, long_list]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_changed_capture_is_seen(kind):
    chain, change = kind()
    cost = lambda: dp.rollout(chain, X0, US + 0.3).cost
    old = cost()
    change()
    new = cost()
    with jax.disable_jit():
        right = cost()
    np.testing.assert_allclose(new, right, rtol=1e-12)
    assert abs(new - old) > 0.1


def by_hand(chain):
    state = dp.init(chain, ILQR, X0, US)
    return dp.finish(chain, dp.step(chain, state), throw=False).us


ENTRIES = dict(
    solve=lambda chain: dp.solve(chain, ILQR, X0, US).us,
    direction=lambda chain: dp.direction(chain, ILQR, X0, US)[0],
    rollout=lambda chain: dp.rollout(chain, X0, US + 1.0).cost,
    linearize=lambda chain: dp.linearize(chain, X0, US).B,
    quadratize=lambda chain: dp.quadratize(chain, X0, US).R,
    costates=lambda chain: dp.costates(chain, X0, US),
    solve_batch=lambda chain: dp.solve_batch(chain, ILQR, X0[None], US[None]).us,
    by_hand=by_hand,
)


@pytest.mark.costly
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_sees_the_change(entry):
    plain = Plain(1.0)
    chain = dp.ControlProblem.from_system(plain, 3)
    old = ENTRIES[entry](chain)
    plain.weight, plain.gain[0] = 3.0, 2.0
    new = ENTRIES[entry](chain)
    assert np.linalg.norm(new - old) > 0.1
    right = ENTRIES[entry](dp.ControlProblem.from_system(plain, 3))
    np.testing.assert_array_equal(new, right)


def test_new_numbers_do_not_compile_again(caplog):
    weight = 1.0
    cost = lambda x, u, t: effort(weight, x, u, t)
    costs = [float(dp.rollout(problem(cost), X0, US).cost)]
    table: dict = {"z": 1.0, "a": [np.ones(1)]}
    of_table = lambda x, u, t: effort(table["z"] * table["a"][0], x, u, t)
    for weight in (1.0, 2.0):  # the loop assigns the cell of the function above
        plain = Plain(weight)
        dp.rollout(problem(of_table), X0, US)
        dp.rollout(problem(plain.cost), X0, US)
        dp.rollout(problem(ft.partial(effort, weight)), X0, US)
    with jax.log_compiles(True):
        for weight in (3.0, 4.0):
            plain.weight = weight
            costs.append(float(dp.rollout(problem(plain.cost), X0, US + 1.0).cost))
            dp.rollout(problem(cost), X0, US + 1.0)
            table.update(z=weight, a=[np.full(1, weight)])
            table_cost = dp.rollout(problem(of_table), X0, US + 1.0).cost
            assert table_cost == 3 * weight**2 + 1.0 + 4.0 + 9.0 + 16.0
            dp.rollout(problem(ft.partial(effort, weight)), X0, US + 1.0)
        messages = lambda: [record.getMessage() for record in caplog.records]
        compiled = lambda: [m for m in messages() if "Compiling" in m and "jitted" in m]
        assert not compiled()
        # A function written anew would say so.
        dp.rollout(problem(lambda x, u, t: effort(weight, x, u, t)), X0, US)
        assert compiled()
    assert len(set(costs)) == 3


def weighted(weights, x, u, t):
    position, control = weights.values()
    return position * jnp.sum(x**2) + control * jnp.sum(u**2)


class Weights(Plain):
    def cost(self, x, u, t):
        return weighted(self.weight, x, u, t)


def held_in_closure(weights):
    return lambda x, u, t: weighted(weights, x, u, t)


def held_in_default(weights):
    return lambda x, u, t, w=weights: weighted(w, x, u, t)


def held_in_list(weights):
    held = [{"z": 1, "deep": (weights, "a")}]
    return lambda x, u, t: weighted(held[0]["deep"][0], x, u, t)


def held_by_name(weights):
    return ft.partial(
        lambda x, u, t, weights: weighted(weights, x, u, t), weights=weights
    )


def held_in_static_field(weights):
    cost = lambda self, x, u, t: weighted(self.held["deep"], x, u, t)
    return ft.partial(cost, Static({"z": 1, "deep": weights}))


ORDERED = [held_in_closure, held_in_default, held_in_list, held_by_name]
ORDERED += [held_in_static_field, ft.partial(ft.partial, weighted)]
ORDERED += [lambda weights: Weights(weights).cost]
DICTS = [dict, collections.OrderedDict, ft.partial(collections.defaultdict, lambda: 1)]


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize("kind", DICTS, ids=["dict", "OrderedDict", "defaultdict"])
@pytest.mark.parametrize("hold", ORDERED, ids=range(len(ORDERED)))
def test_a_dict_that_a_function_holds_keeps_its_order(hold, kind):
    """x is 1, 2, 3 and u is 1: 14 position + 3 control, and 16 at the end."""
    for numbers in ((10.0, 1.0), (10, 1), (np.array(10.0), np.array(1.0))):
        weights = kind(dict(zip(("position", "control"), numbers, strict=True)))
        chain = problem(hold(weights))
        assert dp.rollout(chain, X0, US + 1.0).cost == 159.0
        weights["position"] = weights.pop("position")  # to the end
        assert dp.rollout(chain, X0, US + 1.0).cost == 60.0


@pytest.mark.parametrize("key", ["b", 1.5, None, (1, "a"), jnp.sin])
def test_keys_of_captured_dicts_may_be_of_all_types(key):
    weights = {1: 2.0, "a": "name", key: 3.0}
    cost = lambda x, u, t: jnp.sum(u**2) * weights[1] * [*weights.values()][2]
    for weights[1] in (2.0, 4.0):
        found = dp.rollout(problem(cost), X0, US + 1.0).cost
        assert found == 3 * weights[1] * weights[key] + 16.0


def test_the_type_of_a_key_is_part_of_the_program():
    weights: dict = {1: 1.0}

    def cost(x, u, t):
        return jnp.sum(u**2) * (3.0 if True is next(iter(weights)) else weights[1])

    chain = problem(cost)
    assert dp.rollout(chain, X0, US + 1.0).cost == 19.0
    weights.clear()
    weights[True] = 1.0
    assert dp.rollout(chain, X0, US + 1.0).cost == 25.0
    with pytest.raises(TypeError, match="captures `thing`, an object of type `Motor`"):
        dp.rollout(problem(captured({Motor(): 1.0})), X0, US)


def test_a_dict_that_two_functions_hold_is_one_and_may_hold_itself():
    shared: dict = {"w": 2.0}
    shared["me"] = shared
    same = lambda: shared
    cost = lambda x, u, t: effort(shared["me"]["w"], x, u, t) * float(same() is shared)
    for shared["w"] in (2.0, 3.0):
        found = dp.rollout(problem(cost), X0, US + 1.0).cost
        assert found == 3 * shared["w"] + 1.0 + 4.0 + 9.0 + 16.0


def test_a_function_written_anew_sees_the_globals_of_now():
    costs = []
    for value in (1.0, 3.0):
        namespace = dict(weight=value, effort=effort)
        exec("cost = lambda x, u, t: effort(weight, x, u, t)", namespace)
        costs.append(float(dp.rollout(problem(namespace["cost"]), X0, US + 1.0).cost))
    assert costs[1] - costs[0] == 6.0


def made_anew(weight):
    """A problem of functions that are other objects each time."""
    square = lambda v: jnp.sum(weight * v**2)

    def cost(x, u, t, power=2.0):
        return square(u) + jnp.sum(x**power)

    return dp.ControlProblem(dynamics, cost, lambda x: weight * square(x), 3)


def test_functions_made_anew_by_the_same_lines_do_not_compile_again(caplog):
    cost = lambda weight: float(dp.rollout(made_anew(weight), X0, US + 1.0).cost)
    first = cost(1.0)
    with jax.log_compiles(True):
        costs = [cost(weight) for weight in (2.0, 3.0)]
        assert not [r for r in caplog.records if "jitted" in r.getMessage()]
        assert cost(2) == costs[0]  # an int is part of the program
        assert [r for r in caplog.records if "jitted" in r.getMessage()]
    sums = lambda w: 3 * w + 1.0 + 4.0 + 9.0 + 16.0 * w**2
    assert [first, *costs] == [*map(sums, (1.0, 2.0, 3.0))]


# What the lines of a cost read from the globals of their module, and how it changes.
WRITTEN = """
import types
import jax.numpy as jnp
import numpy as np

class Car:
    weight = 1.0

def read():
    return {expression}

def inner():
    return read()

def make():
    def cost(x, u, t):
        return [jnp.sum(inner() * u**2) for _ in range(1)][0]
    return cost

weight, pair, double = 1.0, (1.0, "name"), lambda weight: weight
own, car = types.ModuleType("own"), Car()
own.weight, many, few, box = 1.0, np.ones(1000), np.ones(2), [1.0]
"""
CHANGES = {
    "weight": "weight = 2.0",
    "pair[0]": "pair = (2.0, 'name')",
    "double(1.0)": "double = lambda weight: 2.0 * weight",
    "own.weight": "own.weight = 2.0",
    "car.weight": "car.weight = 2.0",
    "Car.weight": "Car.weight = 2.0",
    "many[0]": "many[0] = 2.0",
    "few[1]": "few[1] = 2.0",
    "box[0]": "box[0] = 2.0",
    "globals()['weight']": "weight = 2.0",
    "eval('weight')": "weight = 2.0",
    "(lambda: weight)()": "weight = 2.0",
}


@pytest.mark.parametrize("expression", CHANGES)
def test_a_function_made_anew_sees_what_its_module_holds_now(expression):
    module: dict[str, Any] = dict(__name__="robot")
    exec(WRITTEN.format(expression=expression), module)
    cost = lambda: float(dp.rollout(problem(module["make"]()), X0, US + 1.0).cost)
    assert cost() == 3.0 + 16.0
    exec(CHANGES[expression], module)
    assert cost() == 6.0 + 16.0


def test_what_is_known_by_its_code_is_not_kept():
    first = made_anew(1.0).cost
    for _ in range(3):
        dp.rollout(problem(first), X0, US)
    again = made_anew(1.0).cost
    dp.rollout(problem(again), X0, US)
    gone = weakref.ref(again)
    del again
    gc.collect()
    assert gone() is None


def test_traced_numbers_and_derivatives_go_through_captures():
    def J(weight):
        plain = Plain(weight)
        return dp.rollout(dp.ControlProblem.from_system(plain, 3), X0, US + 1.0).cost

    plain, h = J(1.0), 1e-6
    slope = (J(1.0 + h) - J(1.0 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(J)(1.0), slope, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(J)(1.0), plain, rtol=1e-12)
    both = jax.vmap(J)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(both, [J(1.0), J(2.0)], rtol=1e-12)


TRAINED = dict(W=jnp.full((2, 1), 0.5))
DATA = jnp.array([[1.0, 2.0], [0.5, -1.0], [2.0, 0.3]]), jnp.ones((3, 1))


def test_losses_and_predictions_see_the_change():
    scale = np.ones(1)
    predict = lambda model, inputs: jnp.tanh(scale[0] * (inputs @ model["W"]))
    loss = lambda outputs, targets: scale[0] * jnp.sum((outputs - targets) ** 2, -1)
    for vd in (
        dp.value_and_direction(dp.losses.Squared(), dp.oracles.Gradient(), predict),
        dp.value_and_direction(
            loss, dp.oracles.Gradient(), lambda model, inputs: inputs @ model["W"]
        ),
    ):
        scale[0] = 1.0
        old = vd(TRAINED, *DATA)
        state = vd.init(TRAINED)
        vd.step(TRAINED, state, *DATA)
        scale[0] = 2.0
        value, direction = vd(TRAINED, *DATA)
        (stepped, _), _, _ = vd.step(TRAINED, state, *DATA)
        np.testing.assert_array_equal(value, stepped)
        with jax.disable_jit():
            right = vd(TRAINED, *DATA)
        np.testing.assert_allclose(value, right[0], rtol=1e-12)
        np.testing.assert_allclose(direction["W"], right[1]["W"], rtol=1e-12)
        assert abs(value - old[0]) > 0.01


def test_functions_inside_a_model_see_the_change():
    scale = np.ones(1)
    net = dp.Network((helpers.Scaled(jnp.ones(2)), lambda x: scale * x))
    vd = dp.value_and_direction(dp.losses.Squared(), dp.oracles.Gradient())
    inputs, targets = DATA[0], jnp.ones((3, 2))
    value, _ = vd(net, inputs, targets)
    scale[0] = 2.0
    changed, _ = vd(net, inputs, targets)
    right = jnp.mean(jnp.sum((2.0 * inputs - targets) ** 2, 1)) / 2
    np.testing.assert_allclose(changed, right, rtol=1e-12)
    assert abs(changed - value) > 0.1


def test_the_generator_of_a_divergence_sees_the_change():
    power = np.array(2.0)
    f = lambda u: u**power / power
    scores = jnp.array([0.3, 0.1, -0.2])
    old = dp.losses.f_softargmax(scores, f, "uniform")
    power[...] = 3.0
    new = dp.losses.f_softargmax(scores, f, "uniform")
    right = dp.losses.f_softargmax(scores, lambda u: u**3 / 3, "uniform")
    np.testing.assert_array_equal(new, right)
    assert np.linalg.norm(new - old) > 1e-3


class Static(eqx.Module):
    """A system whose weight is in a static field."""

    held: Any = eqx.field(static=True)
    gain: Any = 1.0
    weight: Callable = eqx.field(static=True, default=lambda held: held)

    def dynamics(self, x, u, t):
        return x + self.gain * u

    def cost(self, x, u, t):
        return effort(self.weight(self.held), x, u, t)

    def terminal_cost(self, x):
        return jnp.sum(x**2)


@ft.partial(
    jtu.register_dataclass, data_fields=["gain"], meta_fields=["held", "weight"]
)
@dataclasses.dataclass
class Registered:
    held: Any
    gain: Any = 1.0
    weight: Callable = lambda held: held

    dynamics, cost = Static.dynamics, Static.cost
    terminal_cost = Static.terminal_cost


@jtu.register_pytree_node_class
class Node:
    """Its weights are no children, but what JAX calls aux_data."""

    def tree_flatten(self):
        return (self.gain,), (self.held, self.weight)

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        return cls(*aux_data)

    def __init__(self, held, weight=lambda held: held):
        self.held, self.gain, self.weight = held, 1.0, weight

    dynamics, cost = Static.dynamics, Static.cost
    terminal_cost = Static.terminal_cost


@dataclasses.dataclass(frozen=True)
class Pair:
    first: Any
    second: int = 2


def held_dict(value):
    held = dict(w=value)
    return held, lambda held: held["w"], lambda: held.update(w=3.0)


def held_list(value):
    held = dict(w=[("name", value, None)])
    change = lambda: held.update(w=[("name", 3.0, None)])
    return held, lambda held: held["w"][0][1], change


def held_array(value):
    held = np.full(2, value)
    return held, lambda held: jnp.asarray(held)[:1], lambda: held.fill(3.0)


def held_frozen(value):
    held = Pair(np.full(2, value))
    return held, lambda held: held.first[0], lambda: held.first.fill(3.0)


def held_module(value):
    held = Static(np.full(2, value))
    return held, lambda held: held.held[0], lambda: held.held.fill(3.0)


HELD = [held_dict, held_list, held_array, held_frozen, held_module]


# Equinox says so of NumPy's arrays too.
OF_ARRAYS = pytest.mark.filterwarnings("ignore:A JAX array is being set as static")


@OF_ARRAYS
@pytest.mark.parametrize("kind", HELD, ids=lambda kind: kind.__name__[5:])
def test_a_change_in_a_static_field_is_seen(kind):
    def system(value):
        held, weight, change = kind(value)
        return Static(held, 1.0, weight), change

    chain = lambda system: dp.ControlProblem.from_system(system, 3)
    cost = lambda system: dp.rollout(chain(system), X0, US + 0.3).cost
    first, change = system(1.0)
    light, heavy = (cost(Static(w)) for w in (1.0, 3.0))
    assert heavy - light > 0.1
    np.testing.assert_allclose(cost(first), light, rtol=1e-12)
    change()
    np.testing.assert_allclose(cost(first), heavy, rtol=1e-12)
    for value, right in ((3.0, heavy), (1.0, light)):  # all new, of the old contents
        np.testing.assert_allclose(cost(system(value)[0]), right, rtol=1e-12)


def around(system):
    """An ordinary object that holds the system."""
    plain: Any = Plain(1.0)
    plain.system = system
    plain.cost = system.cost
    return plain


PLACES = dict(
    module=lambda held: problem(Static(held, 1.0, first).cost),
    registered=lambda held: problem(Registered(held, 1.0, first).cost),
    registered_system=lambda held: system_of(Registered(held, 1.0, first)),
    node=lambda held: system_of(Node(held, first)),
    bound=lambda held: problem(Static(held, 1.0, first).cost),
    closure=lambda held: problem(captured_cost(Static(held, 1.0, first))),
    of_equinox=lambda held: problem(eqx.Partial(captured_cost(Node(held, first)))),
    object=lambda held: system_of(around(Static(held, 1.0, first))),
    nested=lambda held: problem(eqx.Partial(call_cost, [Static(held, 1.0, first)])),
)


def first(held):
    return held["w"]


def system_of(system):
    return dp.ControlProblem.from_system(system, 3)


def captured_cost(system):
    return lambda x, u, t: effort(first(system.held), x, u, t)


def call_cost(systems, x, u, t):
    return systems[0].cost(x, u, t)


@pytest.mark.costly
@pytest.mark.parametrize("place", PLACES)
def test_a_change_is_seen_wherever_the_static_field_is(place):
    held = dict(w=1.0)
    cost = lambda chain: dp.rollout(chain, X0, US + 0.3).cost
    chain = PLACES[place](held)
    right = {w: cost(problem(lambda x, u, t, w=w: effort(w, x, u, t))) for w in (1, 3)}
    found = [cost(chain)]
    held["w"] = 3.0
    found += [cost(chain), cost(PLACES[place](dict(w=3.0)))]
    found += [cost(PLACES[place](dict(w=1.0)))]
    desired = [right[w] for w in (1, 3, 3, 1)]
    np.testing.assert_allclose(found, desired, rtol=1e-12)


def owned(plain):
    return plain.cost


def partial_of(plain):
    return ft.partial(effort, plain.gain)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.checkpoint, jax.jit])
@pytest.mark.parametrize("make", [owned, partial_of])
def test_a_function_in_a_static_field_keeps_what_it_captures(make, wrap):
    class Fixed(eqx.Module):
        fn: Callable = eqx.field(static=True)

        def __call__(self, x, u, t):
            return self.fn(x, u, t)

    plain = Plain(1.0)
    fn = wrap(make(plain))
    chains = [problem(Fixed(fn))]
    chains += [problem(jtu.Partial(fn))] if make is owned else []
    costs = [dp.rollout(chain, X0, US + 0.3).cost for chain in 2 * chains]
    np.testing.assert_allclose(costs, costs[0])
    plain.weight = plain.gain[0] = 3.0
    for chain in chains:
        with pytest.raises(TypeError, match="what it captures has changed.*Make what"):
            dp.rollout(chain, X0, US + 0.3)
    found = dp.rollout(problem(eqx.Partial(fn)), X0, US + 0.3).cost
    right = dp.rollout(problem(make(plain)), X0, US + 0.3).cost
    np.testing.assert_allclose(found, right, rtol=1e-12)


@pytest.mark.parametrize("wrap", [eqx.filter_jit, jtu.Partial, jax.jit])
def test_a_wrapped_method_may_lead_back_to_the_object_that_holds_it(wrap):
    class Own:
        def __init__(self):
            self.weight = 1.0
            self.effort = wrap(self._effort)

        def _effort(self, u):
            return self.weight * u @ u

        def cost(self, x, u, t):
            return self.effort(u)

    own = Own()
    run = lambda: dp.rollout(problem(own.cost), X0, US + 0.3).cost
    before = run()
    np.testing.assert_allclose(run(), before)
    own.weight = 3.0
    if wrap is jax.jit:
        assert run() > before
        return
    with pytest.raises(
        TypeError, match="Own._effort.*`equinox.filter_jit`.*has changed.*Make w"
    ):
        run()


class Ending(Static):
    def dynamics(self, x, u, t):
        return x + self.gain * self.weight(self.held) * u

    def terminal_cost(self, x):
        return self.weight(self.held) * jnp.sum(x**2)


@pytest.mark.costly
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_sees_a_change_in_a_static_field(entry):
    held = dict(w=1.0)
    chain = system_of(Ending(held, 2.0, first))
    old = ENTRIES[entry](chain)
    held["w"] = 3.0
    new = ENTRIES[entry](chain)
    assert np.linalg.norm(new - old) > 0.1
    right = ENTRIES[entry](system_of(Ending(dict(w=3.0), 2.0, first)))
    np.testing.assert_array_equal(new, right)


class Tuned(eqx.Module):
    """A loss or a prediction with a number in a static field."""

    held: Any = eqx.field(static=True)

    def __call__(self, outputs, targets):
        return jnp.sum(self.held["w"] * (outputs - targets) ** 2, -1)

    def predict(self, model, inputs):
        return self.held["w"] * (inputs @ model["W"])


class TunedModel(eqx.Module):
    held: Any = eqx.field(static=True)
    W: Any

    def __call__(self, x):
        return self.held["w"] * (x @ self.W)


@pytest.mark.costly
@pytest.mark.parametrize("place", ["loss", "predict", "model"])
def test_training_sees_a_change_in_a_static_field(place):
    held, gradient = dict(w=1.0), dp.oracles.Gradient()
    W = TRAINED["W"]

    def call():
        loss, model = dp.losses.Squared(), TRAINED
        predict = lambda model, inputs: inputs @ model["W"]
        if place == "loss":
            loss = Tuned(held)
        elif place == "predict":
            predict = Tuned(held).predict
        else:
            model, predict = TunedModel(held, W), None
        vd = dp.value_and_direction(loss, gradient, predict)
        return jtu.tree_leaves(
            (vd(model, *DATA), vd.step(model, vd.init(model), *DATA))
        )

    old = call()
    held["w"] = 3.0
    new = call()
    with jax.disable_jit():
        right = call()
    assert abs(new[0] - old[0]) > 0.1
    for a, b in zip(new, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_layers_that_can_change_apart_are_not_stored_as_one():
    held = [dict(w=1.0) for _ in range(4)]
    net = dp.Network([TunedModel(h, jnp.eye(2)) for h in held])
    assert len(dp.Network([eqx.nn.Identity(), *net.layers]).stacks) == 4
    held[2]["w"] = 3.0
    np.testing.assert_array_equal(net(jnp.ones(2)), [3.0, 3.0])


class Motor:
    def __init__(self):
        self.torque = 1.0


class Holder(Plain):
    def __init__(self, motor):
        super().__init__(1.0)
        self.motor = motor


def captured(thing):
    return lambda x, u, t: effort(1.0, x, u, t) * (thing is not None)


def with_default(x, u, t, motor=Motor()):  # noqa: B008
    return effort(motor.torque, x, u, t)


REFUSED = [
    (
        captured(Motor()),
        r"captured.<locals>.<lambda>` \(line \d+\) captures `thing`, a",
    ),
    (captured({1, 2}), "captures `thing`, an object of type `set`"),
    (captured(np.random.default_rng(0)), "an object of type `Generator`"),
    (
        ft.partial(captured, Motor()),
        "`functools.partial` of `captured` holds an object",
    ),
    (Holder(Motor()).cost, "of type `Holder` holds `motor`, an object of type `Motor`"),
    (Holder([Motor()]), "of type `Holder` holds `motor`, an object of type `Motor`"),
    (
        with_default,
        "`with_default` .* has as a default `motor`, an object of type `Motor`",
    ),
    (captured(memoryview(b"ab")), "captures `thing`, an object of type `memoryview`"),
    (captured(memoryview(bytearray(2))), "captures `thing`, an object of type `memor"),
]
NO_NUMBERS = [
    np.zeros(2, [("mass", float)]),
    np.array([1.0], object),
    np.array(["a"]),
    np.zeros((), [("mass", float)])[()],
    np.datetime64("2020-01-01"),
]


@pytest.mark.parametrize("array", NO_NUMBERS, ids=lambda array: str(array.dtype))
def test_arrays_of_something_else_than_numbers_are_refused_by_name(array):
    advice = r".*is no array of numbers: give `array.astype\(float\)`, or each of its"
    for cost, name in (
        (captured(array), "captures `thing`, a NumPy"),
        (Plain(array).cost, "of type `Plain` holds `weight`, a NumPy"),
    ):
        with pytest.raises(TypeError, match=name + advice):
            dp.rollout(problem(cost), X0, US)


@dataclasses.dataclass
class Record:
    weight: float = 1.0


STATIC_REFUSED = [types.SimpleNamespace(w=1.0), Motor(), Record(), {1, 2}]
STATIC_REFUSED += [np.random.default_rng(0), dict(w=Motor()), (1, [Record()])]


@pytest.mark.parametrize("held", STATIC_REFUSED, ids=range(len(STATIC_REFUSED)))
def test_what_can_change_in_a_static_field_is_refused_by_name(held):
    leaf = jtu.tree_leaves(held)[-1]
    name = type(leaf).__name__
    message = f"type `Static` holds `held`, an object of type `{name}`: it can change"
    advice = "field that is not static .*, or give a tuple or a frozen dataclass"
    for chain in (
        system_of(Static(held, 1.0, lambda held: 1.0)),
        problem(captured_cost(Static(held))),
        system_of(around(Static(held))),
    ):
        with pytest.raises(TypeError, match=f"{message}.*{advice}"):
            dp.rollout(chain, X0, US)
    with pytest.raises(TypeError, match=f"`Node` holds `aux_data`, .* `{name}`"):
        dp.rollout(system_of(Node(held, first)), X0, US)


class Tilted(dp.losses.KL):
    held: Any = eqx.field(static=True)


@OF_ARRAYS
def test_a_divergence_with_what_can_change_in_a_static_field_is_refused():
    scores = jnp.array([0.3, 0.1, -0.2])
    message = "type `Tilted` holds `held`, an object of type `dict`"
    for operator in (dp.losses.f_softargmax, dp.losses.f_softmax):
        with pytest.raises(TypeError, match=message):
            operator(scores, Tilted(dict(w=1.0)), "uniform")
        right = operator(scores, dp.losses.KL(), "uniform")
        for held in ((1.0, np.float64(2.0)), Pair(1.0)):
            found = operator(scores, Tilted(held), "uniform")
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("held", [Pair, Static, int])
def test_a_class_in_a_static_field_never_changes(held):
    chain = problem(Static(held, 1.0, lambda held: 2.0).cost)
    assert dp.rollout(chain, X0, US).cost == 4.0


@dataclasses.dataclass
class Prepared:
    weight: float

    def __post_init__(self):
        self.double = 2 * self.weight  # no field

    def cost(self, x, u, t):
        return effort(self.double, x, u, t)


def test_attributes_of_a_record_that_are_no_fields_are_captured():
    for weight in (1.0, 2.0):
        cost = dp.rollout(problem(Prepared(weight).cost), X0, US + 1.0).cost
        assert cost == 6 * weight + 1.0 + 4.0 + 9.0 + 16.0


@pytest.mark.parametrize("cost, message", REFUSED, ids=range(len(REFUSED)))
def test_what_can_change_unseen_is_refused_by_name(cost, message):
    with pytest.raises(TypeError, match=message) as error:
        dp.rollout(problem(cost), X0, US)
    advice = "Give an `equinox.Module` or a frozen dataclass in its place"
    assert advice in str(error.value)


def test_frozen_dataclasses_modules_and_library_functions_are_captured():
    class Weight(eqx.Module):
        value: float

    cost = lambda fixed, module, act: problem(
        lambda x, u, t: fixed.cost(x, u, t) + module.value * jnp.sum(act(u) ** 2)
    )
    acts = jnp.sin, jax.nn.relu, jax.vmap(jnp.tanh), eqx.filter_jit(jnp.cos)
    for act, fixed in zip(acts, map(Fixed, (1.0, 2.0, 3.0, 4.0)), strict=True):
        found = dp.rollout(cost(fixed, Weight(0.5), act), X0, US + 0.5).cost
        with jax.disable_jit():
            right = dp.rollout(cost(fixed, Weight(0.5), act), X0, US + 0.5).cost
        np.testing.assert_allclose(found, right, rtol=1e-12)


def test_the_door_has_the_type_of_what_is_behind_it():
    hints = typing.get_type_hints(door)
    assert hints["fn"] == hints["return"]
    assert [type(hint) for hint in typing.get_args(hints["fn"])] == [
        typing.ParamSpec, typing.TypeVar
    ]  # fmt: skip


def test_a_listener_may_keep_what_it_hears():
    heard = []
    listen = lambda **row: heard.append(row)
    dp.solve(problem(Plain(1.0)), ILQR, X0, US, verbose=listen)
    assert len(heard) >= 1


def test_numbers_stand_in_the_order_of_the_tree():
    taken = Taken((1.0, np.ones(3), dict(a=2.0, b=jnp.ones(2)), np.float64(3.0)))
    assert [np.shape(number) for number in taken.numbers] == [(), (3,), (), (2,), ()]
    assert taken.floats == [1.0, 2.0, 3.0]


def test_taking_apart_and_putting_together_is_the_identity():
    weight, names = np.ones(2), ["a", "b"]
    functions = [lambda: (weight, names), ft.partial(effort, weight), Plain(2.0).cost]
    made = put_together(*(lambda t: (t.static, t.numbers))(Taken(functions)))
    assert made[0]()[0] is weight and made[0]()[1] == names
    args = jnp.ones(2), jnp.ones(2), 0
    np.testing.assert_array_equal(made[1](*args), functions[1](*args))
    np.testing.assert_array_equal(made[2](*args), functions[2](*args))
    again, other = Taken(functions), Taken(functions[::-1])
    assert again.static == Taken(functions).static != other.static
    assert hash(again.static) == hash(Taken(functions).static)
    frozen = Frozen(functions)
    weight[0] = 5.0
    assert frozen != Frozen(functions) and frozen.tree()[0]()[0][0] == 1.0
    leaves = jtu.tree_leaves(Frozen(dict(a=1.0, b=jnp.ones(2))).tree())
    np.testing.assert_array_equal(leaves[1], np.ones(2))


def test_a_function_that_counts_its_calls_is_traced_once():
    calls, numbers = [], np.ones(1)

    def counted(x, u, t):
        calls.append(len(calls))
        return effort(numbers, x, u, t)

    for i in range(4):
        numbers[0] = i
        found = dp.rollout(problem(counted), X0, US + 1.0).cost
        assert found == 3.0 * i + 1.0 + 4.0 + 9.0 + 16.0 and len(calls) == 1

    class Counting(eqx.Module):
        def cost(self, x, u, t):
            calls.append((len(calls), x.shape, x.dtype))
            return effort(1.0, x, u, t)

    for _ in range(3):
        dp.rollout(problem(Counting().cost), X0, US)
        assert len(calls) == 2
    dp.linearize(problem(Counting().cost), X0, US)


class Plant:
    """A system with a mass, and places to write to."""

    made: Any = None  # a subclass writes it into the object

    def __init__(self):
        self.weight, self.memo, self.log = 1.0, {}, []
        self.nested: dict = {"a": {"b": []}}
        self.waiting = collections.defaultdict(list)

    def mass(self):
        return self.weight

    def dynamics(self, x, u, t):
        return x + u / self.mass()

    def cost(self, x, u, t):
        return jnp.sum(u**2 + x**2)

    def terminal_cost(self, x):
        return jnp.sum(x**2)


class Memo(Plant):
    def mass(self):
        if "one" not in self.memo:
            self.memo["one"] = 1.0
        return self.weight * self.memo["one"]


class TracedMemo(Plant):
    def mass(self):
        if self.memo.get("mass") is None:
            self.memo["mass"] = self.weight * 1.0
        return self.memo["mass"]


class Log(Plant):
    def mass(self):
        self.log.extend([1.0, self.weight * 1.0, {2.0}, collections.deque()])
        return self.weight


class Nested(Plant):
    def mass(self):
        self.nested["a"]["b"].append(np.ones(1))
        self.nested["a"]["c"] = {"d": self.weight}
        return self.weight * self.nested["a"]["b"][0]


class Missing(Plant):
    def mass(self):
        self.waiting["now"].append(self.weight)
        return self.waiting["now"][-1]


class Made(Plant):
    def mass(self):
        if self.made is None:
            self.made = lambda: self.weight
        return self.made()


class Property(Plant):
    @ft.cached_property
    def found(self):
        return 1.0 * self.weight

    def mass(self):
        return self.found


class Slots(Plant):
    __slots__ = ("slot",)

    def mass(self):
        self.slot = self.weight * 1.0
        return self.slot


class Unlike(Plant):
    """Without a number it is not rebuilt: what is written lands in it."""

    def __init__(self):
        pass

    def mass(self):
        self.weight = self.made = [jnp.ones(()) * self.factor]
        return self.made[0]

    factor: float = 0.7


class Shared(TracedMemo):
    """The dynamics and the cost are traced apart, and share a memo."""

    def cost(self, x, u, t):
        return self.mass() * jnp.sum(u**2 + x**2)


class SharedFields(eqx.Module):
    weight: Any
    memo: dict

    mass, dynamics, cost = Shared.mass, Shared.dynamics, Shared.cost
    terminal_cost = Plant.terminal_cost


WRITING = [Memo, TracedMemo, Log, Nested, Missing, Made, Property, Slots]


@pytest.mark.costly
@pytest.mark.parametrize("kind", WRITING, ids=lambda kind: kind.__name__)
def test_a_method_may_write_into_its_object_while_it_is_traced(kind):
    def found(kind):
        plant, costs = kind(), []
        chain, state = system_of(plant), repr(vars(plant))
        for weight in (0.7, 2.3, 2.3):
            plant.weight = weight
            costs += [dp.rollout(chain, X0, US + 1.0).cost]
            costs += [dp.rollout(chain, X0, US + 1.0, check=True).cost]
            costs += [dp.solve(chain, ILQR, X0, US, max_steps=2, throw=False).cost]
        plant.weight = 1.0
        missing = dict(waiting=plant.waiting)
        assert repr(vars(plant)) == state or missing == dict(waiting={"now": []})
        return costs

    np.testing.assert_array_equal(found(kind), found(Plant))


def test_an_object_without_numbers_is_as_before():
    plant, light = Unlike(), Plant()
    light.weight = plant.factor
    right = dp.rollout(system_of(light), X0, US + 1.0).cost
    for _ in range(2):
        cost = dp.rollout(system_of(plant), X0, US + 1.0).cost
        np.testing.assert_array_equal(cost, right)
        dp.linearize(system_of(plant), X0, US)
        assert vars(plant) == {}


class Behind(Plant):
    def mass(self):
        ORIGINAL.made = 2.0  # what is traced is a copy of it
        return self.weight


ORIGINAL = Behind()


def test_a_number_that_appears_behind_the_trace_is_not_taken_for_another():
    plant, chain = Plant(), system_of(ORIGINAL)
    for weight in (0.7, 2.3, 2.3):
        ORIGINAL.weight = plant.weight = weight
        found = dp.rollout(chain, X0, US + 1.0).cost
        right = dp.rollout(system_of(plant), X0, US + 1.0).cost
        np.testing.assert_array_equal(found, right)


@pytest.mark.costly
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("system", [Shared(), SharedFields(1.0, {})], ids=type)
def test_a_number_that_is_lost_with_its_trace_is_named(entry, system):
    name = type(system).__name__
    message = f"type `{name}` holds `memo`, in which .* Compute it before"
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            ENTRIES[entry](system_of(system))
        assert system.memo == {}


def test_a_memo_of_a_prediction_or_of_a_loss_sees_the_change():
    class Predictor:
        def __init__(self):
            self.gain, self.memo = 1.0, {}

        def predict(self, model, inputs):
            self.memo.setdefault("gain", self.gain * 1.0)
            return self.memo["gain"] * (inputs @ model["W"])

        def loss(self, outputs, targets):
            self.memo.setdefault("gains", []).append(self.gain * outputs)
            return self.gain * jnp.sum((outputs - targets) ** 2, 1)

    mine = Predictor()
    vd = dp.value_and_direction(mine.loss, dp.oracles.Gradient(), mine.predict)
    for gain in (1.0, 2.0):
        mine.gain = gain
        value, _ = vd(TRAINED, *DATA)
        vd.step(TRAINED, vd.init(TRAINED), *DATA)
        residual = gain * DATA[0] @ TRAINED["W"] - DATA[1]
        np.testing.assert_allclose(value, gain * jnp.mean(residual**2), rtol=1e-12)
        assert mine.memo == {}


def test_a_generator_may_write_what_it_was_asked():
    asked = []
    f = lambda u: asked.append(u) or u**2 / 2
    scores = jnp.array([0.3, 0.1, -0.2])
    found = [dp.losses.f_softargmax(scores, f, "uniform") for _ in range(2)]
    right = dp.losses.f_softargmax(scores, lambda u: u**2 / 2, "uniform")
    np.testing.assert_array_equal(found, [right, right])
    assert asked == []


class Logger(eqx.Module):
    weights: Any
    log: list = eqx.field(static=True)

    def __call__(self, x, u, t):
        self.log.append(self.weights * 1.0)
        return effort(self.weights, x, u, t)


def logging(place):
    """A cost that writes numbers down, and where it does."""
    weights, log, last = np.ones(1), [], None

    def cost(x, u, t, log=log):
        nonlocal last
        last = x * 2.0
        log.append(last)
        written.memo = last
        return effort(weights, x, u, t)

    written: Any = cost
    held = lambda log, x, u, t: cost(x, u, t, log)
    fn = dict(
        closure=cost,
        partial=ft.partial(held, log),
        static=Logger(weights, log),
        library=jax.checkpoint(cost),
        jitted=jax.jit(cost),
    )[place]
    return fn, weights, lambda: (log, last, vars(cost))


@pytest.mark.parametrize("place", ["closure", "partial", "static", "library", "jitted"])
def test_what_is_written_in_a_trace_is_taken_back_wherever_it_is(place):
    cost, weights, written = logging(place)
    chain, costs = problem(cost), []
    before = written()[1:]
    for weight in (1.0, 3.0):
        weights.fill(weight)
        costs += [dp.rollout(chain, X0, US + 1.0).cost]
        dp.linearize(chain, X0, US)
    np.testing.assert_allclose(costs, [33.0, 39.0])
    assert written() == ([], *before)


def test_attributes_of_functions_are_seen():
    def dynamics(x, u, t):
        return x + u / step.mass

    step: Any = dynamics
    step.mass = 1.0
    problem = dp.ControlProblem(
        step, lambda x, u, t: jnp.sum(u**2), lambda x: jnp.sum((x - 1.0) ** 2), 1
    )
    for mass in (1.0, 2.0, jnp.asarray(3.0), 1.0):
        step.mass = mass
        cost = dp.solve(problem, dp.ILQR(), jnp.zeros(1), jnp.zeros((1, 1))).cost
        # The least of u^2 + (u / m - 1)^2.
        np.testing.assert_allclose(cost, mass**2 / (1 + mass**2), rtol=1e-12)


class Getting:
    """Reads its mass through something that it holds."""

    def __init__(self, get):
        self.get = get

    def dynamics(self, x, u, t):
        return x + 0.1 * u / self.get("mass")

    def cost(self, x, u, t):
        return jnp.sum(u**2)

    def terminal_cost(self, x):
        return jnp.sum(x**2)


@pytest.mark.parametrize(
    "held",
    [
        {"mass": 0.7}.get,
        {"mass": 0.7}.__getitem__,
        ft.partial({"mass": 0.7}.get, "mass"),
        np.array(0.7).item,
        weakref.ref(helpers.Spring()),
        contextvars.ContextVar("mass"),
    ],
    ids=lambda held: type(held).__name__,
)
def test_what_leads_to_something_that_can_change_is_refused(held):
    problem = dp.ControlProblem.from_system(Getting(held), 2)
    with pytest.raises(TypeError, match="can change without notice"):
        dp.rollout(problem, jnp.ones(2), jnp.ones((2, 2)))


def test_built_in_functions_and_methods_of_what_never_changes_are_code():
    for held in (math.sqrt, "0.7".__getitem__, ft.partial(pow, 2.0)):
        system = Getting(lambda name, held=held: 0.7 if held else 1.0)
        problem = dp.ControlProblem.from_system(system, 2)
        dp.rollout(problem, jnp.ones(2), jnp.ones((2, 2)))


def test_an_array_of_numpy_may_change_right_after_a_call():
    """JAX may read it only then, if it lies in memory as JAX wants it."""
    memory = np.zeros(100 + 8)
    start = (-memory.ctypes.data % 64) // 8
    mass = memory[start : start + 100]

    dynamics = lambda x, u, t: x + 0.1 * u + mass[t] * jnp.ones(2)
    cost = lambda x, u, t: jnp.sum(x**2 + u**2)
    problem = dp.ControlProblem(dynamics, cost, lambda x: jnp.sum(x**2), 100)
    x0s, uss = jnp.ones((16, 2)), jnp.zeros((16, 100, 2))
    solve = lambda: dp.solve_batch(problem, dp.ILQR(), x0s, uss).cost
    found = []
    for level in range(8):
        mass[:] = level
        found.append(solve())
    for level in range(8):
        mass[:] = level
        np.testing.assert_array_equal(found[level], np.asarray(solve()))
