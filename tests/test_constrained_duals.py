"""Identities between duals, and runs whose numbers are known."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffprog.constrained import (
    Ascent,
    at_least,
    at_most,
    Augmented,
    Clip,
    equal,
    FromOptax,
    Growth,
    Lagrangian,
    Penalty,
    PI,
    PID,
    Relaxed,
    Restart,
)


# Runs that converge, as those of other problems need not.
RNG = np.random.RandomState(1)
A, B, Q = (RNG.normal(size=shape) / 2 for shape in ((4, 12), (4, 12), (12, 12)))
START = jnp.asarray(RNG.normal(size=12))
ETA, C = 0.1, 2.0


pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def curved(x):
    """A quartic that is not convex, with four nonlinear equalities."""
    loss = jnp.sum((Q @ x) ** 2) / 2 + jnp.sum(x**4) / 4 - jnp.sum(x**2) / 2
    return loss, {"h": equal(A @ x + jnp.sin(B @ x), jnp.array([0.5, -0.5, 1.0, 0.0]))}


def exponential(x):
    """Trajectory A: min x^2 / 2 such that e^x = e."""
    return x**2 / 2, {"h": equal(jnp.exp(x), jnp.exp(1.0))}


def trained(tx, lagrangian, x, duals, num_steps, parameters_first=False) -> Any:
    """All iterates and the multipliers by which constraints entered their gradients."""

    def step(carry, _):
        x, state, duals = carry
        if parameters_first:
            (_, report), grads = lagrangian.grad(x, duals)
        else:
            (_, report), grads, duals = lagrangian.step(x, duals)
        updates, state = tx.update(grads, state, x)
        x = optax.apply_updates(x, updates)
        if parameters_first:
            _, duals = lagrangian.update(x, duals)
        return (x, state, duals), (x, report.multipliers)

    carry = x, tx.init(x), duals
    return jax.lax.scan(step, carry, None, num_steps)[1]


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.02, momentum=0.5),
    "Adam": lambda: optax.adam(0.01),
    "all at once": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(0.02, 4000), weight_decay=1e-3),
    ),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimism_is_the_augmented_lagrangian_in_every_order(name):
    tx = OPTIMIZERS[name]()
    h = curved(START)[1]["h"].violation()
    augmented = Augmented(C, step=ETA)
    rows: dict[
        str, Any
    ] = {  # how the gain, the first multiplier and the start are chosen
        "parameters first": (C, (C - ETA) * h, False),
        "simultaneous": (C - ETA, (C - ETA) * h, False),
        "dual first": (C, 0 * h, True),
        "dual first, sgd": (C, C * h, False),
        "no shift": (C, 0 * h, False),
    }

    def optimistic(gain, value, seen, order: Any = "dual_first"):
        dual = PI(ETA, gain, form="velocity", start="sgd")
        lagrangian = Lagrangian(curved, dual, order=order)
        (state,) = lagrangian.init(START).values()
        seen = jnp.full(4, seen)  # an error of 0 that was seen is the start from zeros
        state = replace(state, value=value, memory={**state.memory, "seen": seen})
        return trained(tx, lagrangian, START, {"h": state}, 2000)

    def augmenting(order: Any, **options):
        lagrangian = Lagrangian(curved, augmented, order=order)
        duals = lagrangian.init(START)
        return trained(tx, lagrangian, START, duals, 2000, **options)

    @jax.jit
    def run():
        columns = map(jnp.stack, zip(*jax.tree.map(jnp.asarray, list(rows.values()))))
        gain, value, seen = rows["simultaneous"]
        late = optimistic(gain, value, seen, order="simultaneous")
        return (
            jax.vmap(optimistic)(*columns),
            late,
            (
                augmenting("dual_first", parameters_first=True),
                augmenting("simultaneous"),
                augmenting("dual_first"),
            ),
        )

    found, late, (parameters_first, same_time, dual_first) = run()
    found = {row: jax.tree.map(lambda a: a[i], found) for i, row in enumerate(rows)}
    distance = lambda a, b: max(
        jnp.max(jnp.abs(u - v)) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )
    assert jnp.max(jnp.abs(dual_first[0][-1] - dual_first[0][-2])) < 1e-4
    assert distance(found["parameters first"], parameters_first) < 1e-12
    assert distance(found["simultaneous"], same_time) < 1e-12
    assert distance(found["dual first"], dual_first) < 1e-12
    assert distance(found["dual first, sgd"], dual_first) < 1e-12
    for wrong, right in (
        (found["no shift"], parameters_first),
        (found["parameters first"], same_time),
        (late, same_time),
    ):
        assert distance(wrong[0], right[0]) > 1e-2


def test_the_trajectory_of_the_exponential():
    lagrangian = Lagrangian(exponential, Augmented(1.0, step=0.1))
    tx, x = optax.sgd(0.01, momentum=0.5), jnp.array(2.0)
    xs, m = jax.jit(
        lambda x: trained(tx, lagrangian, x, lagrangian.init(x), 3000, True)
    )(x)
    known = {
        1: (1.6348738689, 4.67077427),
        2: (1.2999674264, 2.65158215),
        3: (1.0722908349, 1.28703777),
        10: (0.7552844001, -0.51439052),
        50: (1.0080943625, -0.33367088),
        100: (1.0001957288, -0.36745345),
        200: (1.0000000226, -0.36787948),
    }
    for i, (position, multiplier) in known.items():
        np.testing.assert_allclose(xs[i - 1], position, atol=1e-9)
        np.testing.assert_allclose(m["h"][i - 1], multiplier, atol=1e-8)
    np.testing.assert_allclose(xs[-1], 1, atol=1e-12)


def program(x):
    """P2: two active rows and one that is not."""
    loss = (x[0] ** 2 + 2 * x[1] ** 2 + 3 * x[2] ** 2) / 2 - jnp.sum(x)
    return loss, {
        "sum": at_most(jnp.sum(x), 1.0),
        "first": at_least(x[0], 0.7),
        "third": at_most(x[2], 1.0),
    }


def test_proportional_control_is_the_augmented_lagrangian_bit_for_bit():
    tx, x = optax.sgd(0.1), jnp.zeros(3)

    @jax.jit
    def run(dual):
        lagrangian = Lagrangian(program, dual)
        return trained(tx, lagrangian, x, lagrangian.init(x), 20_000)

    control, augmented = run(PI(0.2, gain=1.5)), run(Augmented(1.5, step=0.2))
    for a, b in zip(jax.tree.leaves(control), jax.tree.leaves(augmented)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(control[0][-1], [0.7, 0.18, 0.12], atol=1e-14)
    found = [control[1][name][-1] for name in ("sum", "first", "third")]
    np.testing.assert_allclose(found, [0.64, 0.34, 0], atol=1e-13)


def test_a_proportional_part_is_frozen_until_it_is_refreshed():
    def run(dual, refresh):
        lagrangian = Lagrangian(program, dual)

        def outer(carry, _):
            x, duals = carry
            _, duals = lagrangian.update(x, duals)

            def inner(_, x):
                used = duals
                if refresh:
                    now = {k: c.error() for k, c in program(x)[1].items()}
                    used = {
                        name: replace(state, memory={"error": now[name]})
                        for name, state in duals.items()
                    }
                return x - 0.1 * lagrangian.grad(x, used)[1]

            x = jax.lax.fori_loop(0, 5, inner, x)
            return (x, duals), x

        x = jnp.zeros(3)
        return jax.lax.scan(outer, (x, lagrangian.init(x)), None, 100)[1]

    control = PI(0.2, gain=1.5)
    frozen, refreshed, augmented = jax.jit(
        lambda: (
            run(control, False),
            run(control, True),
            run(Augmented(1.5, step=0.2), False),
        )
    )()
    assert np.max(np.abs(frozen - augmented)) > 1e-2
    np.testing.assert_allclose(refreshed, augmented, atol=1e-14)


# Methods of optax as gains: step a, momentum b.
a, b = 0.05, 0.6
SPECIAL = {
    "gradient": (optax.sgd(a), PI(a, 0.0, form="velocity")),
    "Polyak": (
        optax.sgd(a, momentum=b),
        PI(a / (1 - b), -a * b / (1 - b) ** 2, b, form="velocity"),
    ),
    "Nesterov": (
        optax.sgd(a, momentum=b, nesterov=True),
        PI(a / (1 - b), -a * b**2 / (1 - b) ** 2, b, form="velocity"),
    ),
    "optimistic": (
        optax.optimistic_gradient_descent(a, 1.0, 1.0),
        PI(a, a, form="velocity", start="sgd"),
    ),
    "PI control": (
        optax.optimistic_gradient_descent(a, 0.7, 1.6),
        PI(0.7 * a, 1.6 * a, form="velocity", start="sgd"),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_optimizers_are_special_cases(name):
    """The error is a field of the multipliers, which a method of optax descends."""
    tx, dual = SPECIAL[name]
    matrix = jnp.asarray(RNG.normal(size=(5, 5)))
    field = lambda y: jnp.tanh(matrix @ y - 1) - y / 2

    def control(state, _):
        state = dual.update(state, field(state.value))
        return state, state.value

    def descent(carry, _):
        y, state = carry
        updates, state = tx.update(-field(y), state, y)
        y = optax.apply_updates(y, updates)
        return (y, state), y

    @jax.jit
    def run():
        lagrangian = Lagrangian(lambda x: (0.0, {"h": equal(x, 0)}), dual)
        y = jnp.zeros(5)
        state = lagrangian.init(y)["h"]
        ours = jax.lax.scan(control, state, None, 200)[1]
        return ours, jax.lax.scan(descent, (y, tx.init(y)), None, 200)[1]

    np.testing.assert_allclose(*run(), atol=1e-12)


def product(x):
    """P1: a minimum that the Lagrangian alone has as a saddle."""
    return -x[0] * x[1], {"sum": equal(x[0] + x[1], 2.0)}


def test_a_penalty_above_half_makes_the_saddle_a_minimum():
    tx, x = optax.sgd(0.05), jnp.array([0.3, 0.1])

    @jax.jit
    @jax.vmap
    def run(c):
        lagrangian = Lagrangian(product, Augmented(c, step=0.1))
        return trained(tx, lagrangian, x, lagrangian.init(x), 2000)

    xs, m = run(jnp.array([0.0, 0.4, 0.6, 2.0]))
    error = np.asarray(np.max(np.abs(xs - 1), axis=-1))
    assert error[0, -1] > 1e20 and error[1, -1] > 2 * error[1, 1000] > 1
    np.testing.assert_allclose(error[2, -1], 4.3e-5, rtol=0.02)
    assert error[3, 499] < 1e-10 and abs(m["sum"][3, -1] - 1) < 1e-10

    @jax.jit
    @jax.vmap
    def penalized(c, rate) -> Any:
        lagrangian = Lagrangian(product, Penalty(c))
        duals = lagrangian.init(x)
        return trained(optax.sgd(rate), lagrangian, x, duals, 20_000)[0]

    c = jnp.array([10.0, 100.0])
    found = np.asarray(penalized(c, 0.9 / (2 * c)))[:, -1, 0]
    np.testing.assert_allclose(found - 1, 1 / (2 * c - 1), atol=1e-9)


def test_divergence_is_reported():
    lagrangian = Lagrangian(product, Ascent(0.1))
    tx, x = optax.sgd(0.05), jnp.array([0.3, 0.1])

    @jax.jit
    def run(x):
        state, duals = tx.init(x), lagrangian.init(x)

        def step(carry, _):
            x, state, duals = carry
            (_, report), grads, duals = lagrangian.step(x, duals)
            updates, state = tx.update(grads, state, x)
            return (x + updates, state, duals), report.feasibility

        carry, sizes = jax.lax.scan(step, (x, state, duals), None, 40_000)
        return lagrangian.step(carry[0], carry[2])[0][1], sizes

    report, sizes = run(x)
    assert sizes[2000] > 1e20 and not report.finite
    assert jnp.isfinite(report.multipliers["sum"])


def test_derivatives_act_on_what_gets_worse():
    state = inequalities(PID(0.5, 2.0, 3.0), 2)
    dual = PID(0.5, 2.0, 3.0)
    for error, multiplier in (
        ([1.0, -1.0], [0.5 + 2 + 3, 0]),
        ([2.0, 0.5], [1.5 + 4 + 3, 0.25 + 1 + 4.5]),
        ([0.5, 0.5], [1.75 + 1, 0.5 + 1]),
    ):
        state = dual.update(state, jnp.array(error))
        np.testing.assert_allclose(dual.price(state)[0], multiplier)
    plain, PI_ = PID(0.5, 2.0), PI(0.5, 2.0)
    one, other = inequalities(plain, 2), inequalities(PI_, 2)
    for error in RNG.normal(size=(20, 2)):
        one = plain.update(one, jnp.asarray(error))
        other = PI_.update(other, jnp.asarray(error))
        np.testing.assert_array_equal(plain.price(one)[0], PI_.price(other)[0])


def inequalities(dual, size):
    """The first state of so many."""
    lagrangian = Lagrangian(lambda x: (0.0, {"g": at_most(x, 0)}), dual)
    return lagrangian.init(jnp.zeros(size))["g"]


def test_relaxed_constraints_are_a_quadratic_penalty():
    def measure(x):
        loss = jnp.sum((x - jnp.array([2.0, -1.0, 0.5])) ** 2) / 2 + jnp.prod(x) / 4
        return loss, {
            "sum": at_most(jnp.sum(x), 1.0),
            "sine": equal(jnp.sin(x[0]), 0.3),
            "slack": at_most(x, 3.0),
        }

    def run(dual, num_steps):
        lagrangian, x = Lagrangian(measure, dual), jnp.zeros(3)
        duals = lagrangian.init(x)
        return trained(optax.sgd(0.05), lagrangian, x, duals, num_steps)

    alpha = 4.0
    (x, m), (y, p) = jax.jit(
        lambda: (run(Relaxed(alpha, step=0.2), 4000), run(Penalty(alpha), 4000))
    )()
    np.testing.assert_allclose(x[-1], y[-1], atol=1e-12)
    for name in m:
        np.testing.assert_allclose(m[name][-1], p[name][-1], atol=1e-12)
    assert m["sum"][-1] > 0.1 and np.all(m["slack"][-1] == 0)
    dual, error = Relaxed(alpha), jnp.array([-1.0, 0.3, 7.0])
    state = dual.update(dual.update(inequalities(dual, 3), 3 + error), error)
    np.testing.assert_array_equal(state.value, alpha * jnp.maximum(error, 0))


def test_restarts_clips_and_optimizers_of_multipliers():
    errors = jnp.array([[1.0, 2.0, -1.0], [-0.5, 1.0, 0.5], [0.0, 3.0, 0.5]])

    def run(dual):
        state = inequalities(dual, 3)
        for error in errors:
            state = dual.update(state, error)
        return state

    plain = run(Ascent(0.25))
    np.testing.assert_array_equal(run(FromOptax(optax.sgd(0.25))).value, plain.value)
    np.testing.assert_array_equal(run(Restart(Ascent(0.25))).value, [0, 1.5, 0.25])
    np.testing.assert_array_equal(
        run(Clip(Ascent(0.25), 0.75)).value, [0.125, 0.75, 0.25]
    )
    forgotten = run(Restart(FromOptax(optax.sgd(0.25, momentum=0.5))))
    assert forgotten.memory[0].trace[0] == 0 != forgotten.memory[0].trace[1]
    grown = run(Restart(Augmented(1.0, 0.25, Growth(2.0))))
    np.testing.assert_array_equal(grown.memory["penalty"], [1, 8, 4])
    equality = Lagrangian(lambda x: (0.0, {"h": equal(x, 0)}), Restart(Ascent(0.25)))
    state = equality.init(errors[0])["h"]
    np.testing.assert_array_equal(
        Restart(Ascent(0.25)).update(state, -errors[0]).value, -errors[0] / 4
    )


def test_what_adam_momentum_and_restarts_do_to_multipliers():
    """Of P2, the worst of the last 500 of 10 000 steps."""

    def worst(make, steps):
        def run(step):
            lagrangian, x = Lagrangian(program, make(step)), jnp.zeros(3)
            duals = lagrangian.init(x)
            xs, _ = trained(optax.sgd(0.1), lagrangian, x, duals, 10_000)
            return jnp.max(jnp.abs(xs[-500:] - jnp.array([[0.7, 0.18, 0.12]])))

        return jax.jit(jax.vmap(run))(jnp.array(steps))

    adam = worst(lambda a: FromOptax(optax.adam(a)), [1e-1, 1e-2, 1e-3])
    np.testing.assert_allclose(adam[:2], [0.8, 0.1], rtol=0.3)
    assert adam[2] > 1e-4
    momentum = lambda a: FromOptax(optax.sgd(a, momentum=0.9))
    high, low, slow = worst(momentum, [0.2, 0.02, 0.005])
    assert high > 0.01 and low > 0.01 and slow < 1e-9
    high, low, slow = worst(lambda a: Restart(Ascent(a)), [1.0, 0.2, 0.02])
    assert high > 0.05 and low > 0.05 and slow < 1e-12
    assert worst(Ascent, [0.2])[0] < 1e-14


def test_the_position_form_starts_from_zeros():
    def measure(x):
        return (x - 1) ** 2 / 2, {"x": at_most(x, 1.2)}

    lagrangian, x = Lagrangian(measure, PI(0.1, gain=1.0)), jnp.array(0.2)
    run = lambda x: trained(optax.sgd(0.05), lagrangian, x, lagrangian.init(x), 2000)
    xs, m = jax.jit(run)(x)
    np.testing.assert_allclose(xs[-1], 1, atol=1e-12)
    assert m["x"][-1] == 0


def test_penalties_grow_where_it_does_not_help():
    schedule = Growth(2.0, 1.0, tol=0.1, progress=0.5, max_penalty=6.0)
    dual = Augmented(1.0, 0.0, schedule)
    lagrangian = Lagrangian(lambda x: (0.0, {"g": at_most(x, 0)}), dual)
    state = lagrangian.init(jnp.zeros(4))["g"]
    for error, penalty in (
        ([1.0, -1.0, 0.05, 1.0], [3.0, 1.0, 1.0, 3.0]),
        ([0.6, -1.0, 0.2, 0.5], [6.0, 1.0, 3.0, 3.0]),
        ([0.6, 2.0, 0.0, 0.0], [6.0, 3.0, 3.0, 3.0]),
    ):
        state = dual.update(state, jnp.array(error))
        np.testing.assert_array_equal(state.memory["penalty"], penalty)
