"""What every dual promises, what comes back, and wrong calls."""

import re
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffprog as dp
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


pytestmark = pytest.mark.usefixtures("mixed_dtypes")


RNG = np.random.default_rng(0)
M, N = RNG.normal(size=(3, 5)), RNG.normal(size=(2, 5))
START = jnp.asarray(RNG.normal(size=5))
DUALS = {
    "ascent": Ascent(0.1),
    "PI": PI(0.1, gain=0.5),
    "PI, smoothed": PI(0.1, gain=0.5, smoothing=0.5),
    "PI, velocity": PI(0.1, gain=0.5, form="velocity"),
    "PI, velocity, sgd": PI(0.1, 0.5, 0.3, form="velocity", start="sgd"),
    "augmented": Augmented(1.0),
    "augmented, other step": Augmented(1.0, step=0.1),
    "augmented, growing": Augmented(1.0, 0.1, Growth(1.05, max_penalty=5.0)),
    "augmented, no penalty": Augmented(0.0, step=0.1),
    "penalty": Penalty(2.0),
    "penalty, growing": Penalty(1.0, Growth(1.0, 0.1, max_penalty=5.0)),
    "relaxed": Relaxed(5.0, step=0.1),
    "PID": PID(0.1, 0.5, 0.2),
    "momentum": FromOptax(optax.sgd(0.1, momentum=0.5)),
    "Adam": FromOptax(optax.adam(0.1)),
    "restarted": Restart(Augmented(1.0, 0.1, Growth(1.05, max_penalty=5.0))),
    "clipped": Clip(PI(0.1, gain=0.5), 0.2),
}


def measure(x):
    """Two equalities and six inequalities, three of them smooth and curved."""
    dtype = x.dtype
    rows, others = jnp.asarray(M, dtype), jnp.asarray(N, dtype)
    loss = jnp.sum(x**2) / 2 + jnp.sum(jnp.cos(x))
    return loss, {
        "sums": equal(others @ x, jnp.array([0.3, -0.2], dtype)),
        "curved": at_most(jnp.tanh(rows @ x), 0.2),
        "rows": at_least(rows @ x, -0.5),
    }


def descended(lagrangian, x, duals, num_steps, rate=0.05):
    """The parameters and multipliers after steps, and all multipliers on the way."""

    def step(carry, _):
        x, duals = carry
        (_, report), grads, duals = lagrangian.step(x, duals)
        x = jax.tree.map(lambda x, g: x - rate * g, x, grads)
        return (x, duals), (x, report.multipliers)

    return jax.lax.scan(step, (x, duals), None, num_steps)


@pytest.mark.costly
@pytest.mark.parametrize("name", DUALS)
def test_gradients_are_those_of_the_value_and_multipliers_have_their_sign(name):
    lagrangian = Lagrangian(measure, DUALS[name])
    duals = lagrangian.init(START)

    @jax.jit
    def run(x, duals):
        (x, duals), (_, multipliers) = descended(lagrangian, x, duals, 60)
        return (
            duals,
            multipliers,
            lagrangian.grad(x, duals),
            jax.grad(lagrangian)(x, duals),
        )

    after, multipliers, (_, grads), derivative = run(START, duals)
    np.testing.assert_array_equal(grads, derivative)
    assert jax.tree.structure(after) == jax.tree.structure(duals)
    for name in "curved", "rows":
        assert np.min(multipliers[name]) == 0 < np.max(multipliers[name])
    assert np.min(multipliers["sums"]) < 0


@pytest.mark.costly
@pytest.mark.parametrize("name", DUALS)
def test_first_multipliers_share_no_memory_and_can_be_donated(name):
    lagrangian = Lagrangian(measure, DUALS[name])
    duals = lagrangian.init(jax.ShapeDtypeStruct((5,), jnp.bfloat16))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(duals)}
    assert dtypes - {jnp.dtype(bool), jnp.dtype("int32")} == {jnp.dtype("float32")}
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(duals)]
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(lambda duals, x: lagrangian.step(x, duals)[1:], donate_argnums=0)
    grads, after = step(duals, START.astype(jnp.bfloat16))
    assert grads.dtype == jnp.bfloat16 and duals["sums"].value.is_deleted()
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(
        jnp.result_type, lagrangian.init(START.astype(jnp.bfloat16))
    )


def test_a_strict_measure_drives_multipliers_and_the_stand_in_the_gradient():
    def measure(x):
        rate = jnp.mean((x > 0).astype(x.dtype))
        smooth = jnp.mean(jax.nn.sigmoid(x))
        return jnp.sum(x**2), {"rate": at_most(smooth, 0.1, strict=rate)}

    lagrangian, x = Lagrangian(measure, Ascent(0.5)), jnp.array([1.0, -1.0, 2.0])
    (_, report), grads, duals = lagrangian.step(x, lagrangian.init(x))
    np.testing.assert_allclose(duals["rate"].value, 0.5 * (2 / 3 - 0.1))
    assert report.feasibility == report.violations["rate"] == 2 / 3 - 0.1
    slope = jax.grad(lambda x: jnp.mean(jax.nn.sigmoid(x)))(x)
    np.testing.assert_allclose(grads, 2 * x + duals["rate"].value * slope, rtol=1e-15)


def test_the_order_says_whose_multipliers_the_gradient_takes():
    first = Lagrangian(measure, Ascent(0.1))
    same = Lagrangian(measure, Ascent(0.1), order="simultaneous")
    duals = first.step(START, first.init(START))[2]
    _, grads, new = first.step(START, duals)
    _, others, also_new = same.step(START, duals)
    np.testing.assert_array_equal(new["sums"].value, also_new["sums"].value)
    np.testing.assert_array_equal(others, first.grad(START, duals)[1])
    np.testing.assert_array_equal(grads, first.grad(START, new)[1])
    report, updated = first.update(START, duals)
    np.testing.assert_array_equal(updated["curved"].value, new["curved"].value)
    assert report.stationarity is None


def test_the_report_has_the_residuals_of_the_conditions_of_optimality():
    lagrangian = Lagrangian(measure, Augmented(1.0, step=0.3))
    duals = lagrangian.step(START, lagrangian.init(START))[2]
    (loss, report), grads = lagrangian.grad(START, duals)
    _, found = measure(START)
    h, g = (found[name].violation() for name in ("sums", "curved"))
    m = np.maximum(duals["curved"].value + g, 0)
    np.testing.assert_allclose(report.multipliers["curved"], m, atol=1e-15)
    np.testing.assert_allclose(report.violations["sums"], h)
    rows = found["rows"].violation()
    worst = max(np.max(np.abs(h)), np.max(g), np.max(rows), 0)
    np.testing.assert_allclose(report.feasibility, worst)
    gaps = [
        np.max(np.abs(np.minimum(report.multipliers[name], -report.violations[name])))
        for name in ("curved", "rows")
    ]
    np.testing.assert_allclose(report.complementarity, max(gaps))
    assert report.dual_sign == 0 and report.finite and loss == measure(START)[0]
    assert report.stationarity == jnp.max(jnp.abs(grads))
    assert all(np.all(c == 1) for c in report.penalties.values())


def test_what_a_call_does_not_return_keeps_its_state():
    def some(x, which):
        loss, constraints = measure(x)
        return loss, {name: constraints[name] for name in which}, "aux"

    lagrangian = Lagrangian(some, PI(0.1, gain=0.5))
    every = "sums", "curved", "rows"
    duals = lagrangian.step(START, lagrangian.init(START, every), every)[2]
    (_, report), _, new = lagrangian.step(START, duals, ["rows"])
    assert new["curved"] is duals["curved"] and report.aux == "aux"
    assert np.any(new["rows"].value != duals["rows"].value)
    assert set(report.violations) == {"rows"}


def test_a_mask_leaves_rows_out():
    def masked(x, mask):
        return jnp.sum(x**2), {"rows": at_most(jnp.asarray(M) @ x, -5.0, mask=mask)}

    lagrangian = Lagrangian(masked, PI(0.1, gain=0.5))
    every, mask = jnp.ones(3, bool), jnp.array([True, False, True])
    duals = lagrangian.step(START, lagrangian.init(START, every), every)[2]
    (_, report), grads, new = lagrangian.step(START, duals, mask)
    assert new["rows"].value[1] == duals["rows"].value[1] > 0
    assert new["rows"].memory["error"][1] == duals["rows"].memory["error"][1]
    assert report.multipliers["rows"][1] == 0
    m = report.multipliers["rows"] @ M
    np.testing.assert_allclose(grads, 2 * START + m, atol=1e-14)
    found = jax.grad(lagrangian)(START, new, mask)
    np.testing.assert_array_equal(found, lagrangian.grad(START, new, mask)[1])


def test_multipliers_of_numbers_that_are_not_finite_stay():
    def broken(x, factor):
        return jnp.sum(x**2), {"rows": at_most(factor * (jnp.asarray(M) @ x), -9.0)}

    lagrangian = Lagrangian(broken, PI(0.1, gain=0.5, smoothing=0.2))
    duals = lagrangian.step(START, lagrangian.init(START, 1.0), 1.0)[2]
    report, new = lagrangian.update(START, duals, jnp.array([1.0, np.nan, np.inf]))
    assert not report.finite
    old, new = duals["rows"], new["rows"]
    for a, b in ((old.value, new.value), (old.memory["error"], new.memory["error"])):
        np.testing.assert_array_equal(a[1:], b[1:])
        assert a[0] != b[0]


def test_new_numbers_compile_nothing():
    traces = 0

    @jax.jit
    def run(dual, x):
        nonlocal traces
        traces += 1
        lagrangian = Lagrangian(measure, dual)
        return lagrangian.step(x, lagrangian.init(x))[1]

    for make in (
        lambda a: PI(a, gain=5 * a, smoothing=a / 4),
        lambda a: {
            "sums": Ascent(a),
            "curved": Augmented(2 * a, a, Growth(a, a, a, a, 9 * a)),
            "rows": Penalty(a),
        },
    ):
        traces = 0
        first = run(make(1.0), START)
        assert np.any(run(make(1.5), 2 * START) != first) and traces == 1


def test_problems_are_vectorized():
    lagrangian = Lagrangian(measure, Augmented(1.0, 0.1, Growth(1.05)))
    starts = jnp.stack([START, 2 * START, -START])
    run = lambda x: descended(lagrangian, x, lagrangian.init(x), 40)[0]
    together = jax.jit(jax.vmap(run))(starts)
    alone = [jax.jit(run)(start) for start in starts]
    for i, one in enumerate(alone):
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one)):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12)


def test_a_saved_run_goes_on_bit_for_bit(tmp_path):
    lagrangian = Lagrangian(measure, PI(0.1, gain=0.5, smoothing=0.3))
    first = lagrangian.init(START)
    run = jax.jit(lambda x, duals: descended(lagrangian, x, duals, 20)[0])
    middle = run(START, first)
    dp.save(tmp_path / "run", middle)
    again = dp.load(tmp_path / "run", (START, first))
    for a, b in zip(jax.tree.leaves(run(*middle)), jax.tree.leaves(run(*again))):
        np.testing.assert_array_equal(a, b)


# Wrong calls ----------------------------------------------------------------------

ROW = jnp.arange(3.0)
some: Any = at_most  # whose arguments may be wrong
of_value = lambda make: lambda x: (jnp.sum(x), {"limit": make(x)})
WRONG = {
    "nothing": (lambda x: x[0], "returned an array of shape ().*; `loss, {name"),
    "no constraint": (lambda x: (x[0], {}), "at least one is expected"),
    "losses": (lambda x: (x, {"limit": at_most(x, 0)}), r"loss of shape \(5,\)"),
    "a number": (of_value(lambda x: x[0] - 1), "Constraint `limit` is an array of"),
    "booleans": (of_value(lambda x: at_most(x > 0, 0)), "`limit` has dtype bool.*stri"),
    "integers": (of_value(lambda x: some(3, 0)), "`limit` has dtype int64.*strict="),
    "a rate": (
        of_value(lambda x: at_most(jnp.mean((x > 0).astype(float)), 0)),
        "`limit` does not depend on the parameters, or by a step function.*strict=",
    ),
    "data": (of_value(lambda x: equal(ROW, 0)), "`limit` does not depend on the param"),
    "a pytree": (of_value(lambda x: some({"a": x}, 0)), "`limit` is {.*its own na"),
    "a limit that does not fit": (
        of_value(lambda x: at_most(x, jnp.zeros(4))),
        r"`limit` of constraint `limit` has shape \(4,\).*broadcasts to \(5,\)",
    ),
    "a strict measure of another shape": (
        of_value(lambda x: at_most(x, 0, strict=x[0])),
        r"`strict` of constraint `limit` has shape \(\); one of shape \(5,\)",
    ),
    "no limit": (of_value(lambda x: at_most(x, None)), "`limit` of .* is None"),
    "a mask of numbers": (
        of_value(lambda x: at_most(x, 0, mask=x)), "`mask` of constraint `limit`.*boole"
    ),
    "a mask of another shape": (
        of_value(lambda x: at_most(x, 0, mask=ROW > 0)), r"`limit`.*shape \(3,\)"
    ),
    "index without rows": (
        of_value(lambda x: at_most(x, 0, index=jnp.arange(5))),
        "`limit` has `index` and no `rows`",
    ),
    "rows without index": (
        of_value(lambda x: at_most(x, 0, rows=5)), "`limit` has `rows` and no `index`"
    ),
    "index of floats": (
        of_value(lambda x: at_most(x, 0, rows=5, index=x)), "`index` of .* type float64"
    ),
    "index of another length": (
        of_value(lambda x: at_most(x, 0, rows=5, index=jnp.arange(3))),
        r"`index` of constraint `limit` has shape \(3,\)",
    ),
    "rows of no number": (
        of_value(lambda x: some(x, 0, rows=2.0, index=jnp.arange(5))),
        "`rows` of constraint `limit` is 2.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_measure_is_told_by_name(name, unchecked):
    measure, message = WRONG[name]
    lagrangian = Lagrangian(measure, Ascent(0.1))
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        lagrangian.init(START)
    state = dp.constrained.DualState(jnp.zeros(5), {}, False)
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}"):
        lagrangian.step(START, {"limit": state})


def test_the_same_name_means_the_same_constraint(unchecked):
    lagrangian = Lagrangian(lambda x, make: (x[0], {"limit": make(x)}), Ascent(0.1))
    duals, nothing = lagrangian.init(START, lambda x: at_most(x, 0)), cast(Any, None)
    at_least_too = lagrangian.step(START, duals, lambda x: at_least(x, 0))[2]
    for make, message in (
        (lambda x: equal(x, 0), "`limit` is an equality .* it was an inequality"),
        (lambda x: at_most(x[0], 0), r"`limit` is .* of shape \(\); .* \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lagrangian.step(START, at_least_too, make)
    with pytest.raises(ValueError, match="no constraint `limit`, only `other`"):
        lagrangian.grad(START, {"other": duals["limit"]}, lambda x: at_most(x, 0))
    with pytest.raises(TypeError, match="start with `lagrangian.init"):
        lagrangian.grad(START, nothing, lambda x: at_most(x, 0))


def test_duals_by_name(unchecked):
    by_name = {"sums": Augmented(1.0), "curved": PI(0.1, 0.5), "rows": Penalty(1.0)}
    lagrangian = Lagrangian(measure, by_name)
    duals = lagrangian.init(START)
    assert list(duals["curved"].memory) == ["error"] and duals["sums"].memory == {}
    _, report = lagrangian.step(START, duals)[0]
    alone = Lagrangian(measure, PI(0.1, 0.5))
    _, same = alone.step(START, alone.init(START))[0]
    np.testing.assert_array_equal(
        report.multipliers["curved"], same.multipliers["curved"]
    )
    missing = Lagrangian(measure, {"sums": Ascent(1.0), "curved": Ascent(1.0)})
    with pytest.raises(
        ValueError, match="no entry for constraint `rows`; it has `sums`"
    ):
        missing.init(START)
    unused = Lagrangian(measure, by_name | {"other": Ascent(1.0)})
    with pytest.raises(
        ValueError, match="`dual` has `other`, which `measure` does not"
    ):
        unused.init(START)


of_lagrangian: Any = Lagrangian
control: Any = PI
of_dual: Any = Restart
augmented: Any = Augmented


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Ascent(-1.0), "`step` is -1.0; a number >= 0"),
        (lambda: Augmented(-1.0), "`penalty` is -1.0; a number >= 0"),
        (lambda: Augmented(1.0, step=-1.0), "`step` is -1.0"),
        (lambda: augmented(1.0, schedule=2.0), "`schedule` is 2.0"),
        (lambda: Penalty(-1.0), "`penalty` is -1.0"),
        (lambda: PI(-1.0, 1.0), "`step` is -1.0"),
        (lambda: PI(1.0, 1.0, 1.0), "`smoothing` is 1.0; a number between -1 and 1"),
        (lambda: PI(1.0, 1.0, -1.5), "`smoothing` is -1.5"),
        (lambda: PI(1.0, 1.0, start="sgd"), '`start="sgd"` belongs to `form="velo'),
        (lambda: control(1.0, 1.0, form="p"), "`form` is 'p'"),
        (lambda: control(1.0, 1.0, start="p"), "`start` is 'p'"),
        (lambda: Relaxed(0.0), "`strength` is 0.0; a number > 0"),
        (lambda: Relaxed(1.0, -1.0), "`step` is -1.0"),
        (lambda: PID(-1.0), "`step` is -1.0"),
        (lambda: FromOptax(0.1), "`tx` is 0.1; a transformation of optax"),
        (lambda: of_dual(0.1), "`dual` is 0.1; something like"),
        (lambda: Clip(Ascent(1.0), 0.0), "`limit` is 0.0; a number > 0"),
        (lambda: Growth(-1.0), "`factor` is -1.0"),
        (lambda: of_lagrangian(None, Ascent(1.0)), "`measure` is None; a function"),
        (lambda: of_lagrangian(measure, 0.1), "`dual` is 0.1; something like"),
        (lambda: of_lagrangian(measure, {"a": 1}), r"`dual\['a'\]` is 1"),
        (
            lambda: of_lagrangian(measure, Ascent(1.0), order="primal_first"),
            "call `grad`",
        ),
    ],
)
def test_wrong_numbers_and_choices(make, message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_parameters_without_floats(unchecked):
    lagrangian = Lagrangian(lambda x: (1.0, {"a": at_most(x, 0)}), Ascent(1.0))
    with pytest.raises(TypeError, match="`params` are .* no floating array"):
        lagrangian.init(jnp.arange(3))


def test_floats_are_parameters():
    measure = lambda p: (p["a"] * p["b"], {"sum": equal(p["a"] + p["b"], 2.0)})
    params, lagrangian = (
        {"a": 0.5, "b": jnp.array(2.0)},
        Lagrangian(measure, Ascent(1.0)),
    )
    _, grads, duals = lagrangian.step(params, lagrangian.init(params))
    assert grads == {"a": 2.5, "b": 1.0} and duals["sum"].value == 0.5


class Model(eqx.Module):
    weights: jax.Array
    activation: Any = jax.nn.relu
    size: int = 3
    rate: float = 0.5

    def __call__(self, x):
        return self.activation(self.weights @ x)


def test_models_and_optimizers_as_they_are():
    def measure(model, x):
        u = jax.vmap(model)(x)
        return jnp.mean((u - 1) ** 2), {"norm": at_most(jnp.sum(u**2), 1.0)}

    model, x = Model(jnp.ones((2, 3))), jnp.eye(3)
    lagrangian, tx = Lagrangian(measure, PI(0.5, gain=1.0)), optax.sgd(0.1)
    duals, state = lagrangian.init(model, x), tx.init(eqx.filter(model, eqx.is_array))
    (_, report), grads, duals = lagrangian.step(model, duals, x)
    assert grads.activation is grads.size is grads.rate is None
    updates, state = tx.update(grads, state)
    model = eqx.apply_updates(model, updates)
    assert lagrangian.grad(model, duals, x)[0][1].feasibility < report.feasibility
    assert re.search(r"step=0.5, *gain=1.0", repr(lagrangian.dual))
