"""Lengths of updates from a model of the loss: closed forms on quadratics."""

# States of optax have any type, and wrong calls are made on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false
# pyright: reportGeneralTypeIssues=false

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog.losses import SoftmaxCrossEntropy, Squared
from diffprog.optim import (
    Absolute,
    Cauchy,
    ggn,
    hessian,
    Minimize,
    model_step,
    score,
)

from .helpers import close


M = 12
KEYS = jr.split(jr.key(3), 9)
X = jr.normal(KEYS[0], (M, 6))
Y = jr.normal(KEYS[1], (M, 1))
PARAMS = {"a": {"w": jnp.zeros(2), "b": jnp.ones(1)}, "c": {"w": -jnp.ones(3)}}
FLAT, UNRAVEL = ravel_pytree(PARAMS)
# Gauss-Newton of a linear model: h is the quadratic itself.
linear = lambda params, x: x @ ravel_pytree(params)[0][:, None]
QUADRATIC = ggn(Squared(), linear)
C = np.asarray(X.T @ X) / M
MINIMUM = np.linalg.solve(C, np.ravel(X.T @ Y) / M)
EXACT = Minimize(damping=0.0, jitter=0.0)
DESCENT = optax.scale(-1.0)


@jax.jit
def h(params, inputs=X):
    return jnp.mean(Squared()(linear(params, inputs), Y))


slopes = jax.jit(jax.grad(h))


def take(optimizer, params=PARAMS, steps=1, inputs=X, state=None):
    """Parameters and state after some steps on one batch."""

    @jax.jit
    def step(params, state):
        at = QUADRATIC(params, inputs, Y)
        updates, state = optimizer.update(
            slopes(params, inputs), state, params, curvature=at
        )
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def exact(base=DESCENT, **options):
    return model_step(base, **{"rule": EXACT, "scale": 1.0, "ema": 0.0, **options})


def flat(params):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(params)])


def test_one_length_is_the_minimum_along_the_line_and_twice_it_ends_level():
    g = slopes(PARAMS)
    length = flat(g) @ flat(g) / (flat(g) @ C @ flat(g))
    best, state = take(exact())
    close(flat(best), FLAT - length * flat(g), scale="norm")
    close(flat(slopes(best)) @ flat(g), 0.0, scale=1.0)
    close(h(take(exact(scale=2.0))[0]), h(PARAMS), 1e-12)
    assert state.result == dp.RESULTS.successful
    decrease = lambda s: h(PARAMS) - h(take(exact(scale=s))[0])
    close(decrease(0.5), 0.5 * 1.5 * decrease(1.0), 1e-12)


GROUPS = {"leaf": 3, "layer": 2, "all": 1}


@pytest.mark.costly
@pytest.mark.parametrize("groups", [*GROUPS, "own"])
def test_lengths_of_groups_minimize_the_model(groups):
    label = (lambda path: len(str(path)) > 0) if groups == "own" else groups
    found, state = take(exact(groups=label))
    number = GROUPS.get(groups, 1)
    assert state.S.shape == (number, number)
    # The gradient at the end is orthogonal to every direction, if no length is at 0.
    g, end = slopes(PARAMS), slopes(found)
    assert np.all(state.coefficients > 0)
    a, b, c = (lambda tree: (tree["a"]["w"], tree["a"]["b"], tree["c"]["w"]))(
        jax.tree.map(np.vdot, g, end)
    )
    sums = {3: [a, b, c], 2: [a + b, c], 1: [a + b + c]}[number]
    close(np.stack(sums), np.zeros(number), 1e-11, scale=1.0)


def test_lengths_of_leaves_are_exact_where_blocks_do_not_meet():
    apart = X * np.repeat(np.eye(3), 4, 0)[:, [0, 1, 1, 2, 2, 2]]
    found, _ = take(exact(groups="leaf"), inputs=apart)
    g, block = flat(slopes(PARAMS, apart)), np.asarray(apart.T @ apart) / M
    for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
        own = g[part]
        length = own @ own / (own @ block[part, part] @ own)
        close(flat(found)[part], FLAT[part] - length * own, scale="norm")


def test_with_the_previous_step_it_is_conjugate_gradients():
    found, _ = take(exact(previous=True), steps=6)
    close(flat(found), MINIMUM, 1e-10, scale="norm")
    plain, _ = take(exact(), steps=6)
    assert np.linalg.norm(flat(plain) - MINIMUM) > 1e-3


def test_the_length_of_the_base_does_not_matter():
    options = dict(ema=0.7, scale=0.5, rule=Minimize())
    for groups in GROUPS:
        one, _ = take(exact(groups=groups, **options), steps=3)
        base = optax.scale(-37.0)
        if groups != "all":
            factors = {"a": -2.0, "c": -37.0}
            base = optax.stateless(
                lambda g, _: {
                    k: jax.tree.map(lambda a, k=k: factors[k] * a, g[k]) for k in g
                }
            )
        other, _ = take(exact(base, groups=groups, **options), steps=3)
        close(flat(other), flat(one), 1e-12, scale="norm")


def test_large_dampings_leave_the_slope():
    _, state = take(exact(rule=Minimize(damping=1e9, jitter=0.0)))
    close(state.coefficients, state.b / 1e9, 1e-8)


def test_running_means_and_the_coefficients_between_two_looks():
    ema, every = 0.8, 2
    optimizer = exact(ema=ema, every=every, rule=Minimize(), scale=0.5)
    params, state = PARAMS, optimizer.init(PARAMS)
    S = b = w = 0.0
    for i in range(5):
        g = flat(slopes(params))
        d = -g / np.linalg.norm(g)
        if i % every == 0:
            S, b, w = ema * S + 0.2 * d @ C @ d, ema * b - 0.2 * d @ g, ema * w + 0.2
        a = b / w / (S / w + 1e-3) / (1 + 1e-4)
        new, state = take(optimizer, params, state=state)
        close(flat(new) - flat(params), 0.5 * a * d, 1e-10, scale="norm")
        params = new


def test_before_its_start_it_is_the_base_bit_for_bit():
    base = optax.sgd(0.1, 0.9)
    optimizer = model_step(base, start=2)
    params, state = take(optimizer, steps=2)
    plain, _ = take(optax.with_extra_args_support(base), steps=2)
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    further, _ = take(optimizer, params, state=state)
    other, _ = take(optax.with_extra_args_support(base), steps=3)
    assert not np.array_equal(flat(further), flat(other))


def test_a_schedule_of_the_scale():
    found, _ = take(exact(scale=lambda count: jnp.where(count == 0, 1.0, 0.5)), steps=2)
    first, _ = take(exact())
    second, _ = take(exact(scale=0.5), first)
    close(flat(found), flat(second), 1e-12)


SADDLE = jnp.diag(jnp.array([2.0, -3.0]))
RULES = {
    "minimize": (Minimize(0.5, 0.0), jnp.eye(2) * 2, jnp.array([0.4, 0.8])),
    "absolute": (Absolute(0.0), SADDLE, jnp.array([0.5, 2 / 3])),
    "cauchy": (Cauchy(0.0), SADDLE + 0.1, jnp.array([1 / 2.1, 2 / 2.9])),
    "no minimum": (Minimize(), SADDLE, jnp.full(2, jnp.nan)),
    "nothing": (Minimize(0.0), jnp.zeros((2, 2)), jnp.full(2, jnp.nan)),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_solve_for_the_coefficients(name):
    rule, S, desired = RULES[name]
    found = rule.coefficients(S, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found, desired, rtol=1e-14)
    still = rule.coefficients(jnp.zeros((2, 2)), jnp.zeros(2))
    np.testing.assert_array_equal(still, jnp.zeros(2))


def test_parallel_directions_share_what_they_have_in_common():
    S, b = jnp.full((2, 2), 3.0), jnp.full(2, 1.5)
    close(Minimize(0.0).coefficients(S, b), jnp.full(2, 0.25), 1e-4)


def test_cdat_on_a_quadratic_stays_level():
    edge = exact(rule=Cauchy(0.0), scale=2.0)
    close(h(take(edge)[0]), h(PARAMS), 1e-12)


NET = eqx.nn.MLP(4, 3, 5, 1, jnp.tanh, key=KEYS[4])
NET_PARAMS, REST = eqx.partition(NET, eqx.is_inexact_array)
INPUTS, LABELS = X[:, :4], jnp.arange(M) % 3
CURVATURE = ggn(SoftmaxCrossEntropy())


def network_step(optimizer, model, state, inputs=INPUTS, labels=LABELS):
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        outputs = jax.vmap(eqx.combine(params, rest))(inputs)
        return jnp.mean(SoftmaxCrossEntropy()(outputs, labels))

    at = CURVATURE(model, inputs, labels)
    updates, state = optimizer.update(
        jax.grad(loss)(params), state, params, curvature=at
    )
    return eqx.apply_updates(model, updates), state


def test_a_step_is_traced_once_and_goes_through_scan_and_vmap():
    optimizer, traces = model_step(optax.sgd(1.0, 0.9), every=2), []

    @eqx.filter_jit
    def step(model, state, inputs, labels):
        traces.append(None)
        return network_step(optimizer, model, state, inputs, labels)

    model, state = NET, optimizer.init(NET_PARAMS)
    for i in range(4):
        model, state = step(model, state, INPUTS + i, (LABELS + i) % 3)
    assert len(traces) == 1

    def body(carry, i):
        model, state = eqx.combine(carry[0], REST), carry[1]
        batch = INPUTS + i.astype(float), (LABELS + i) % 3
        model, state = network_step(optimizer, model, state, *batch)
        return (eqx.filter(model, eqx.is_inexact_array), state), None

    run = lambda params: jax.lax.scan(
        body, (params, optimizer.init(params)), jnp.arange(4)
    )[0][0]
    desired = flat(eqx.filter(model, eqx.is_inexact_array))
    close(flat(jax.jit(run)(NET_PARAMS)), desired, 1e-10, scale="norm")
    two = jax.tree.map(lambda a: np.stack([a, 0.5 * a]), NET_PARAMS)
    both = jax.jit(jax.vmap(run))(two)
    first = jax.tree.map(lambda a: np.asarray(a)[0], both)
    close(flat(first), desired, 1e-10, scale="norm")


def test_training_goes_on_bit_for_bit_from_a_file(tmp_path):
    optimizer = model_step(optax.sgd(1.0, 0.9), previous=True)
    step = eqx.filter_jit(lambda *now: network_step(optimizer, *now))
    now = step(*step(NET, optimizer.init(NET_PARAMS)))
    path = tmp_path / "state.eqx"
    eqx.tree_serialise_leaves(path, now)
    like = jax.tree.map(lambda a: 0 * a if eqx.is_array(a) else a, now)
    again = eqx.tree_deserialise_leaves(path, like)
    for a, b in zip(jax.tree.leaves(step(*now)), jax.tree.leaves(step(*again))):
        np.testing.assert_array_equal(a, b)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
    "masked": lambda tx: optax.masked(tx, {"a": True, "c": False}),
    "multi_transform": lambda tx: optax.multi_transform(
        {"own": tx, "other": optax.set_to_zero()}, {"a": "own", "c": "other"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", WRAPPED)
def test_it_works_inside_of_others(name):
    with jax.numpy_dtype_promotion("standard"):  # as optax has it
        found, _ = take(WRAPPED[name](exact()))
    change = flat(found) - FLAT
    g = flat(slopes(PARAMS))
    if name in ("masked", "multi_transform"):  # as if the others did not exist
        own = slice(0, 3)
        length = g[own] @ g[own] / (g[own] @ C[own, own] @ g[own])
        close(change[own], -length * g[own], 1e-12, scale="norm")
        # `masked` passes the gradient of the others on.
        close(change[3:], g[3:] if name == "masked" else jnp.zeros(3))
        return
    rtol = 1e-5 if name == "MultiSteps" else 1e-12  # which adds up in float32
    close(change, -(g @ g) / (g @ C @ g) * g, rtol, scale="norm")


def bad(kind):
    """A step with something wrong, and the step after it that is right."""
    base = optax.scale(1.0) if kind == "ascent" else optax.sgd(1.0, 0.9)
    optimizer = model_step(base)
    params, state = take(optimizer)
    g, at = slopes(params), QUADRATIC(params, X, Y)
    if kind == "gradient":
        g = {**g, "c": {"w": g["c"]["w"].at[0].set(jnp.nan)}}
    elif kind == "curvature":
        at = QUADRATIC(params, X.at[0, 0].set(jnp.inf), Y)
    elif kind == "saddle":
        at = hessian(lambda z, y: -jnp.sum((z - y) ** 2, 1), linear)(params, X, Y)
    elif kind == "zero":
        g = jax.tree.map(jnp.zeros_like, g)
        state = optimizer.init(params)
    update = lambda g, state, at: optimizer.update(g, state, params, curvature=at)
    updates, after = jax.jit(update)(g, state, at)
    return optimizer, state, updates, after


@pytest.mark.costly
@pytest.mark.parametrize(
    "kind, result",
    [
        ("gradient", "nonfinite_derivative"),
        ("curvature", "nonfinite_derivative"),
        ("saddle", "factorization_failed"),
        ("ascent", "no_descent"),
        ("zero", "no_descent"),
    ],
)
def test_a_step_that_cannot_be_trusted_is_zero_and_leaves_no_trace(kind, result):
    _, before, updates, after = bad(kind)
    np.testing.assert_array_equal(flat(updates), np.zeros(6))
    assert after.result == getattr(dp.RESULTS, result)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))
    if kind in ("gradient", "curvature"):
        np.testing.assert_array_equal(before.S, after.S)
    if kind == "gradient":
        for a, b in zip(jax.tree.leaves(before.base), jax.tree.leaves(after.base)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_batch_with_hardly_any_curvature_does_not_make_a_long_step():
    def lengths(growth):
        """Of the step of such a batch, and of the ones after it, in mean lengths."""
        optimizer = exact(growth=growth)
        params, state = take(optimizer, steps=3)
        mean, found = state.length, []
        for _ in range(4):  # small inputs: a minimum that is far away
            params, state = take(optimizer, params, 1, X / 1000, state)
            found.append(float(jnp.linalg.norm(state.coefficients) / mean))
            assert state.result == dp.RESULTS.successful
        return found

    assert lengths(jnp.inf)[0] > 100
    close(jnp.array(lengths(3.0)), 3.0 * 1.2 ** jnp.arange(4.0))


def test_without_curvature_the_length_is_that_of_the_damping_and_the_result_says_so():
    plane = hessian(lambda z, y: z[:, 0] + y[:, 0], linear)
    optimizer = model_step(DESCENT, rule=Minimize(damping=0.1), scale=1.0)
    g = jax.jit(jax.grad(lambda p: jnp.mean(linear(p, X))))(PARAMS)
    at, state = plane(PARAMS, X, Y), optimizer.init(PARAMS)
    update = lambda g, state: optimizer.update(g, state, PARAMS, curvature=at)
    updates, state = jax.jit(update)(g, state)
    assert state.result == dp.RESULTS.cost_unbounded
    close(flat(updates), -flat(g) / (0.1 * (1 + 1e-4)), scale="norm")


def test_the_exact_length_raises_the_score_of_a_direction():
    g = slopes(PARAMS)
    found, _ = take(exact())
    at = QUADRATIC(PARAMS, X, Y)
    steps = dict(
        gradient=jax.tree.map(jnp.negative, g),
        found=jax.tree.map(jnp.subtract, found, PARAMS),
    )
    scores = score(at, steps)
    assert scores["gradient"] < scores["found"] <= 1


@pytest.mark.slow
def test_float32():
    single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    optimizer, params = exact(previous=True), single(PARAMS)
    x, y, state = single(X), single(Y), optimizer.init(params)
    for _ in range(3):
        g = jax.grad(lambda p: jnp.mean(Squared()(linear(p, x), y)))(params)
        updates, state = optimizer.update(
            g, state, params, curvature=QUADRATIC(params, x, y)
        )
        params = optax.apply_updates(params, updates)
    assert state.S.dtype == jnp.float32
    close(
        flat(params).astype(float),
        flat(take(optimizer, steps=3)[0]),
        1e-4,
        scale="norm",
    )


def update(optimizer=exact(), params=PARAMS, at=None, g=PARAMS):
    at = QUADRATIC(PARAMS, X, Y) if at is None else at
    return optimizer.update(g, optimizer.init(params), params, curvature=at)


SEARCH = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
WRONG = {
    r"`base` is 0.1; an optimizer such as .* No learning": lambda: model_step(0.1),
    r"`base` is <func.*; .* Call it, as in `optax.adam\(1.0\)`": lambda: model_step(
        optax.adam
    ),
    r"`groups` is 'layers'; \"all\", \"layer\"": lambda: model_step(
        DESCENT, groups="layers"
    ),
    r"`rule` is 0.1; something like `dp.optim.Minimize": lambda: model_step(
        DESCENT, rule=0.1
    ),
    r"`scale` is 0.0; a number > 0": lambda: model_step(DESCENT, scale=0.0),
    r"`ema` is 1.0; a number from 0 to below 1": lambda: model_step(DESCENT, ema=1.0),
    r"`growth` is 0.5; a number of at least 1": lambda: exact(growth=0.5),
    r"`every` is 0; a Python int >= 1": lambda: model_step(DESCENT, every=0),
    r"`start` is -1; a Python int >= 0": lambda: model_step(DESCENT, start=-1),
    r"`damping` is -1.0; a number >= 0": lambda: Minimize(-1.0),
    r"`damping` is -2.0; a number >= 0": lambda: Absolute(-2.0),
    r"`damping` is -3.0; a number >= 0": lambda: Cauchy(-3.0),
    r"`params\['n'\]` has dtype int": lambda: exact().init({"n": jnp.arange(3)}),
    r"`curvature` is None; that of a batch is expected": lambda: (
        update(at=0)[0]
        if False
        else exact().update(PARAMS, exact().init(PARAMS), PARAMS)
    ),
    r"`curvature` is a recipe that was not called": lambda: update(at=QUADRATIC),
    r"is linearized already": jax.jit(
        lambda: update(at=QUADRATIC(PARAMS, X, Y).linearize())
    ),
    r"`curvature` is .*that of a batch": lambda: update(at=dp.oracles.GaussNewton()),
    r"`grads` is arranged as": lambda: update(at=CURVATURE(NET, INPUTS, LABELS)),
    r"`grads\['c'\]\['w'\]` has shape \(2,\); that of": lambda: update(
        g={**PARAMS, "c": {"w": jnp.ones(2)}}
    ),
    r"not that of its `curvature`": lambda: update(exact(check=True)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_say_what_to_do(message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


def test_a_line_search_in_the_base_is_told():
    with pytest.raises(Exception) as error:
        update(model_step(SEARCH))
    assert "line searches of optax refuse" in "".join(error.value.__notes__)


def test_the_right_gradient_passes_its_check():
    update(exact(check=True), g=slopes(PARAMS))
    run = jax.jit(lambda g: update(exact(check=True), g=g)[0])
    run(slopes(PARAMS))
    with pytest.raises(Exception, match="not that of its `curvature`"):
        run(PARAMS)
