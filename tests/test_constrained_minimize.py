"""The method of multipliers, the best parameters of a run, and gates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import diffprog as dp
from diffprog.constrained import (
    Ascent,
    at_least,
    at_most,
    Augmented,
    Best,
    Constraint,
    equal,
    Growth,
    HardConcrete,
    Lagrangian,
    minimize,
    Penalty,
    PI,
)


def product(x):
    return -x[0] * x[1], {"sum": equal(x[0] + x[1], 2.0)}


def program(x):
    loss = (x[0] ** 2 + 2 * x[1] ** 2 + 3 * x[2] ** 2) / 2 - jnp.sum(x)
    return loss, {
        "sum": at_most(jnp.sum(x), 1.0),
        "first": at_least(x[0], 0.7),
        "third": at_most(x[2], 1.0),
    }


def rosenbrock(x):
    loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    return loss, {"disc": at_most(x[0] ** 2 + x[1] ** 2, 1.0)}


def die(s):
    p, sides = jnp.exp(s), jnp.arange(1.0, 7).astype(s.dtype)
    return p @ s, {"sum": equal(jnp.sum(p), 1.0), "mean": equal(sides @ p, 4.5)}


X = np.array([(2, 1), (1, 2), (0, 1), (3, 0), (-1, -1), (-2, 0), (0, -2), (1, -1)])
Y = np.array([1, 1, -1, 1, -1, -1, -1, 1])


def regression(params):
    w, b = params["w"], params["b"]
    margins = jnp.asarray(Y, w.dtype) * (jnp.asarray(X, w.dtype) @ w + b)
    return jnp.mean(jax.nn.softplus(-margins)), {"norm": at_most(w @ w, 1.0)}


DICE = [0.054353167826492, 0.078771545633054, 0.11415997722944]
DICE += [0.16544680311005, 0.2397744404269, 0.34749406577406]
GOLDEN: dict[str, Any] = {
    "product": (product, [0.3, 0.1], [1, 1], {"sum": 1}, -1),
    "program": (
        program,
        [0.0, 0.0, 0.0],
        [0.7, 0.18, 0.12],
        {"sum": 0.64, "first": 0.34, "third": 0},
        -0.701,
    ),
    "rosenbrock": (
        rosenbrock,
        [-0.5, 0.5],
        [0.7864151541684278, 0.6176983125233935],
        {"disc": 0.1214965569992884},
        0.04567480871950023,
    ),
    "die": (
        die,
        6 * [-np.log(6)],
        np.log(DICE),
        {"sum": 2.283301319518479, "mean": -0.3710489380810333},
        -1.613581098153829,
    ),
    "regression": (
        regression,
        {"b": 0.0, "w": [0.0, 0.0]},
        [-0.4805029919806642, 0.9610059839613285, 0.2765275732915596],
        {"norm": 0.1029426084408384},
        0.2880865639742889,
    ),
}


def start(numbers, dtype=float):
    is_leaf = lambda x: isinstance(x, list)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), numbers, is_leaf=is_leaf)


def flat(params):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(params)])


@pytest.mark.costly
@pytest.mark.parametrize("name", GOLDEN)
def test_reference_problems(name):
    measure, x0, x, multipliers, loss = GOLDEN[name]
    lagrangian = Lagrangian(measure, Augmented(10.0))
    solution = minimize(lagrangian, start(x0))
    assert solution.success and solution.violated() == {}
    np.testing.assert_allclose(flat(solution.params), x, atol=1e-9)
    np.testing.assert_allclose(solution.loss, loss, atol=1e-9)
    for key, value in multipliers.items():
        np.testing.assert_allclose(solution.multipliers[key], value, atol=1e-8)
    report, num_outer = solution.report, int(solution.stats["num_outer"])
    assert report.stationarity < 1e-10 and report.complementarity < 1e-10
    assert num_outer <= 15
    history = solution.history
    assert np.isfinite(history["loss"][:num_outer]).all()
    assert np.isnan(history["loss"][num_outer:]).all()
    steps = np.nansum(history["num_inner"])
    assert int(steps) == int(solution.stats["num_inner"]) > num_outer
    assert history["feasibility"][num_outer - 1] == report.feasibility
    plain = Lagrangian(measure, Ascent(0.0))
    duals = {
        key: dp.constrained.DualState(state.value, {}, state.equal)
        for key, state in solution.duals.items()
    }
    # The Lagrangian, without a penalty, is stationary at the multipliers.
    assert plain.grad(solution.params, duals)[0][1].stationarity < 1e-10


def test_updates_go_on_while_they_help():
    """Beyond what counts as a solution, unless a tolerance was asked for."""
    lagrangian, x0 = Lagrangian(program, Augmented(10.0)), jnp.zeros(3)
    found, asked = minimize(lagrangian, x0), minimize(lagrangian, x0, tol=1e-8)
    assert found.tol == asked.tol == 1e-8
    assert 0 < found.stats["num_outer"] - asked.stats["num_outer"] <= 4
    assert found.report.feasibility < 1e-10 < asked.report.feasibility < 1e-8
    # That they do not come to an end, or help little, is no failure.
    few = int(asked.stats["num_outer"])
    same = minimize(lagrangian, x0, max_outer=few)
    np.testing.assert_array_equal(same.params, asked.params)
    slow = Lagrangian(program, Augmented(3.0, schedule=Growth(1.0)))
    found, asked = minimize(slow, x0), minimize(slow, x0, tol=1e-8)
    assert found.success and found.stats["num_outer"] == asked.stats["num_outer"] + 1
    assert 1e-10 < found.report.feasibility < asked.report.feasibility


def test_float32():
    measure, x0, x, multipliers, _ = GOLDEN["regression"]
    lagrangian = Lagrangian(measure, Augmented(10.0))
    solution = minimize(lagrangian, start(x0, jnp.float32))
    assert solution.success and solution.loss.dtype == jnp.float32
    np.testing.assert_allclose(flat(solution.params), x, atol=2e-3)


@pytest.mark.costly
@pytest.mark.parametrize(
    "inner, max_inner",
    [(optx.LBFGS(1e-9, 1e-9), 256), (optax.sgd(0.05, momentum=0.5), 400)],
    ids=["LBFGS", "optax"],
)
def test_inner_minimizers(inner, max_inner):
    lagrangian = Lagrangian(program, Augmented(10.0, schedule=Growth(1.0)))
    solution = minimize(
        lagrangian, jnp.zeros(3), inner=inner, max_inner=max_inner, tol=1e-6
    )
    np.testing.assert_allclose(solution.params, [0.7, 0.18, 0.12], atol=1e-5)


def test_a_solution_starts_another_one():
    first = minimize(Lagrangian(program, Augmented(10.0)), jnp.zeros(3))
    again = minimize(
        Lagrangian(program, Augmented(10.0)), first.params, duals=first.duals
    )
    assert again.stats["num_outer"] == 1 < first.stats["num_outer"]
    # Steps go on from there, and to there.
    lagrangian = Lagrangian(program, Augmented(10.0))
    (_, report), _, _ = lagrangian.step(first.params, first.duals)
    assert report.stationarity < 1e-6
    _, _, duals = lagrangian.step(jnp.ones(3), lagrangian.init(first.params))
    last = minimize(lagrangian, jnp.ones(3), duals=duals)
    np.testing.assert_allclose(last.params, first.params, atol=1e-7)


def nowhere(x):
    limits = at_most(x[:2], jnp.array([0.0, 5.0])), at_least(x[:2], jnp.array([1.0, 0]))
    return jnp.sum(x**2), {"above": limits[0], "below": limits[1]}


def test_what_cannot_be_kept_is_infeasible():
    lagrangian, x0 = Lagrangian(nowhere, Augmented(10.0)), jnp.zeros(3)
    with pytest.raises(dp.SolveError) as raised:
        minimize(lagrangian, x0)
    message = str(raised.value)
    for words in (
        "No point that satisfies",
        "up to 5.0e-01: `above` in rows 0; `below` in rows 0.",
        "`Relaxed(strength, step)`",
    ):
        assert words in message
    solution: Any = raised.value.solution
    assert solution.result == dp.RESULTS.infeasible
    np.testing.assert_allclose(solution.params, [0.5, 0, 0], atol=1e-6)
    assert all(np.isfinite(m).all() for m in solution.multipliers.values())
    assert np.nanmax(solution.history["penalty"]) <= 1e8
    relaxed = minimize(Lagrangian(nowhere, Penalty(100.0)), x0)
    assert relaxed.success and relaxed.violated() == {"above": [0], "below": [0]}
    np.testing.assert_allclose(relaxed.params, [100 / 202, 0, 0], atol=1e-8)


def test_penalties_that_grow_find_the_minimum():
    dual = Penalty(1.0, Growth(10.0, tol=1e-5, max_penalty=1e7))
    solution = minimize(Lagrangian(program, dual), jnp.zeros(3), tol=1e-5)
    np.testing.assert_allclose(solution.params, [0.7, 0.18, 0.12], atol=1e-4)
    np.testing.assert_allclose(solution.multipliers["sum"], 0.64, atol=1e-4)


def test_other_failures_have_their_code():
    lagrangian, x0 = Lagrangian(program, Augmented(10.0)), jnp.zeros(3)
    solution = minimize(lagrangian, x0, max_outer=2, throw=False)
    assert solution.result == dp.RESULTS.max_steps_reached
    assert solution.stats["num_outer"] == 2 and jnp.isfinite(solution.loss)
    with pytest.raises(dp.SolveError, match="Raise `max_outer`"):
        minimize(lagrangian, x0, max_outer=2)

    def broken(x):
        return jnp.sum(jnp.log(x - 2)), {"x": at_most(x, 1.0)}

    solution = minimize(Lagrangian(broken, Augmented(1.0)), x0, throw=False)
    assert solution.result == dp.RESULTS.nonfinite_rollout
    np.testing.assert_array_equal(solution.params, x0)


def test_problems_are_vectorized_and_compiled_once():
    traces = 0

    def measure(x, b):
        nonlocal traces
        traces += 1
        return jnp.sum(x**2), {"sum": at_least(jnp.sum(x), b)}

    run = lambda b, c: minimize(Lagrangian(measure, Augmented(c)), jnp.zeros(2), b)
    alone = [run(jnp.asarray(b), 5 * b) for b in (1.0, 2.0)]
    first = traces
    run(jnp.asarray(3.0), 4.0)
    assert traces - first <= 1  # for the shapes of the first multipliers
    together = jax.vmap(lambda b: run(b, 5.0).params)(jnp.array([1.0, 2.0]))
    for i, solution in enumerate(alone):
        np.testing.assert_allclose(solution.params, (i + 1) / 2, atol=1e-8)
        np.testing.assert_allclose(together[i], solution.params, atol=1e-8)


def test_no_mode_has_derivatives():
    def loss(limit):
        measure = lambda x: (x @ x, {"limit": at_least(x, limit)})
        return minimize(Lagrangian(measure, Augmented(1.0)), jnp.zeros(1)).loss

    for derivative in (jax.grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match="one stage of `dp.ControlPro"):
            jax.eval_shape(derivative(loss), 1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda some: some(product, jnp.zeros(2)), "`lagrangian` is <func"),
        (
            lambda some: some(Lagrangian(product, Ascent(1.0)), jnp.zeros(2)),
            "`dual` is",
        ),
        (
            lambda some: some(
                Lagrangian(product, Augmented(1.0), axis_name="data"), jnp.zeros(2)
            ),
            "leave `axis_name` out",
        ),
        (
            lambda some: some(
                Lagrangian(product, Augmented(1.0)), jnp.zeros(2), inner="BFGS"
            ),
            "`inner` is 'BFGS'",
        ),
        (
            lambda some: some(
                Lagrangian(product, Augmented(1.0)), jnp.zeros(2), max_outer=0
            ),
            "`max_outer` is 0",
        ),
        (
            lambda some: some(Lagrangian(product, Augmented(1.0)), jnp.zeros(2), tol=0),
            "`tol` is 0",
        ),
        (
            lambda some: some(
                Lagrangian(
                    lambda x: (x @ x, {"rate": at_most(x, 0, strict=x > 0)}),
                    Augmented(1.0),
                ),
                jnp.zeros(2),
            ),
            "Constraint `rate` has a strict measure.*`Best`",
        ),
    ],
)
def test_wrong_calls(call, message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        call(minimize)


# The best parameters --------------------------------------------------------------


def report_of(violation):
    """That of a call whose only violation is this."""
    lagrangian = Lagrangian(lambda x: (x, {"x": at_most(x, 0)}), Ascent(1.0))
    x = jnp.asarray(violation)
    return lagrangian.update(x, lagrangian.init(x))[0]


def test_the_best_parameters_keep_the_limits_or_violate_them_least():
    best = Best({"x": jnp.array(0), "f": jnp.tanh}, tol=0.1)
    kept = []
    for i, (loss, violation) in enumerate(
        [(5, 3), (1, 4), (9, 2), (np.nan, 0), (8, 0.05), (7, np.nan), (6, 0.1), (7, 0)],
        1,
    ):
        params = {"x": jnp.array(i), "f": jnp.tanh}
        report = report_of(float(violation))
        best = best.update(params, jnp.asarray(float(loss)), report)
        kept.append(int(best.params["x"]))
        assert best.found == (i >= 5)
    assert kept == [1, 1, 3, 3, 5, 5, 7, 7]
    assert best.loss == 6 and best.violation == 0.1


def test_the_best_iterate_of_a_rate_holds_it_in_a_loop():
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.append(rng.normal(-1, 1, 60), rng.normal(1, 1, 60)))
    ill = jnp.arange(120) >= 60

    def measure(w, x):
        u = w[0] * x + w[1]
        alarm = jnp.where(ill, 0, jax.nn.sigmoid(u))
        missed, mask = jnp.where(ill, jax.nn.sigmoid(-u / 0.3), 0), ill
        strict = jnp.sum(mask & (u <= 0)) / 60
        rate = at_most(jnp.sum(missed) / 60, 0.04, strict=strict)
        return jnp.sum(alarm) / 60 + 1e-3 * w @ w, {"missed": rate}

    lagrangian, w = Lagrangian(measure, Ascent(0.3)), jnp.array([1.0, 0.0])

    @jax.jit
    def run(w, duals):
        def step(carry, _):
            w, duals, best = carry
            (loss, report), grads, duals = lagrangian.step(w, duals, x)
            best = best.update(w, loss, report)
            return (w - 0.3 * grads, duals, best), report.feasibility

        return jax.lax.scan(step, (w, duals, Best(w)), None, 2000)

    (_, _, best), sizes = run(w, lagrangian.init(w, x))
    share = np.mean(sizes[-500:] == 0)
    assert best.found and best.violation == 0 and share < 1
    u = best.params[0] * x + best.params[1]
    assert jnp.sum(ill & (u <= 0)) <= 2 and np.mean((u > 0)[:60]) < 0.8


# Gates ----------------------------------------------------------------------------


def test_gates_are_open_with_their_probability():
    gates = HardConcrete((5,), drop=0.3, key=jax.random.key(0))
    np.testing.assert_allclose(gates.log_odds, np.log(0.7 / 0.3), atol=0.05)
    assert np.ptp(gates.log_odds) > 0
    gates = HardConcrete(4, 0.5)
    np.testing.assert_array_equal(gates.log_odds, 0)
    odds = jnp.array([-3.0, -1.0, 0.0, 2.0])
    gates = HardConcrete.__new__(HardConcrete)
    object.__setattr__(gates, "log_odds", odds)
    keys = jax.random.split(jax.random.key(1), 100_000)
    samples = jax.vmap(gates)(keys)
    np.testing.assert_allclose(
        gates.probabilities(), jax.nn.sigmoid(odds + 1.598597), atol=1e-7
    )
    np.testing.assert_allclose(
        np.mean(samples > 0, 0), gates.probabilities(), atol=5e-3
    )
    assert np.min(samples) == 0 and np.max(samples) == 1
    median = np.clip(np.asarray(jax.nn.sigmoid(odds * 1.5)) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(gates(), median, atol=1e-15)
    np.testing.assert_allclose(np.median(samples, 0), median, atol=0.02)


def test_densities_are_means_by_size():
    gates = HardConcrete((2, 2), 0.2)
    p = float(gates.probabilities()[0, 0])
    assert gates.density() == p and gates.realized_density() == 1
    sizes = jnp.array([[1.0], [3.0]])
    np.testing.assert_allclose(gates.density(sizes), p)
    slope = jax.grad(lambda gates: gates.density(sizes))(gates).log_odds
    np.testing.assert_allclose(slope[1], 3 * slope[0])
    assert not jax.grad(lambda g: g.realized_density())(gates).log_odds.any()


@pytest.mark.parametrize("drop", [0.0, 1.0, "half"])
def test_gates_of_a_wrong_drop(drop, unchecked):
    some: Any = HardConcrete
    with pytest.raises((TypeError, ValueError), match="`drop` is .* between 0 and 1"):
        some(3, drop)


def test_a_density_is_a_constraint():
    target = jnp.asarray(np.random.RandomState(1).normal(size=40))

    def measure(params, key):
        z = params["gates"](key)
        loss = jnp.mean((z * params["w"] - target) ** 2)
        found: Constraint = at_most(params["gates"].density(), 0.4)
        return loss, {"density": found}

    params = {"w": target, "gates": HardConcrete(40, 0.1)}
    lagrangian = Lagrangian(measure, PI(0.05, gain=20.0))
    rates = {"w": 0.1, "gates": 20.0}

    @jax.jit
    def run(params, duals):
        def step(carry, key):
            params, duals = carry
            _, grads, duals = lagrangian.step(params, duals, key)
            move = lambda rate, p, g: jax.tree.map(lambda p, g: p - rate * g, p, g)
            params = {k: move(rates[k], params[k], grads[k]) for k in params}
            return (params, duals), params["gates"].density()

        keys = jax.random.split(jax.random.key(0), 1500)
        return jax.lax.scan(step, (params, duals), keys)

    (params, _), densities = run(params, lagrangian.init(params, jax.random.key(0)))
    assert abs(np.mean(densities[-200:]) - 0.4) < 0.02
    assert densities[0] > 0.9
    kept = np.abs(target[params["gates"].probabilities() > 0.5])
    assert np.median(kept) > np.median(np.abs(target))
