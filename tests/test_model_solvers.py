"""Solvers of prox-linear models with kinks, beside that of `convex`.

The interior point method, and an augmented Lagrangian.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffprog as dp
from diffprog.losses import (
    Absolute,
    Alpha,
    ChiSquare,
    Euclidean,
    FLoss,
    Hinge,
    Huber,
    KL,
    LeCam,
    SoftmaxCrossEntropy,
)
from diffprog.oracles import (
    AugmentedLagrangian,
    CoordinateAscent,
    InteriorPoint,
    NewtonSteps,
    ProximalGradient,
    ProxLinear,
)
from diffprog.oracles._base import linearize
from diffprog.oracles._prox_linear import choose, Either

from . import convex, helpers


M, K, N = 8, 3, 6  # examples, outputs, parameters
RNG = np.random.default_rng(3)
MEASURE = RNG.uniform(0.5, 2, K)
REAL, LABELS = RNG.normal(size=(M, K)), RNG.integers(0, K, M)
LOSSES = {
    "absolute": (Absolute(), REAL),
    "euclidean": (Euclidean(), REAL),
    "huber": (Huber(0.5), REAL),
    "hinge": (Hinge(), np.sign(REAL)),
    "hinge of labels": (Hinge(ignore_label=0), LABELS),
    "sparsemax": (FLoss(ChiSquare(), "unit"), LABELS),
    "entmax": (FLoss(Alpha(1.5), "unit"), RNG.dirichlet(np.ones(K), M)),
    "LeCam": (FLoss(LeCam(), MEASURE, temperature=2.0), LABELS),  # pyright: ignore
}  # fmt: skip
every = pytest.mark.parametrize("name", LOSSES)
SOLVERS = {"interior": InteriorPoint(), "Lagrangian": AugmentedLagrangian(20_000)}
each = pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
# Newton's steps of the one, and products of the other.
MOST = {InteriorPoint: 60, AugmentedLagrangian: 20_000}


def linear(loss, f, J, targets):
    """The linearization of f + J d at d = 0."""
    predict = lambda d: (f + jnp.tensordot(J, d, 1, precision="highest"), None)
    zero = jnp.zeros(J.shape[-1], f.dtype)
    return linearize(predict, zero, loss, targets, f, "mean")[0]


@eqx.filter_jit
def solve(solver, loss, f, J, targets, damping, gap):
    """What is found, and the values of the model at 0 and there."""
    at = linear(loss, f, J, targets)
    found = solver.minimize(at, damping, gap)
    return found, at.value, model(at, damping, found.step)


def model(at, damping, d):
    return at.value_at(d) + damping * jnp.vdot(d, d) / 2


def problem(seed, n=N, dtype=float):
    """Outputs of size 2, and a Jacobian whose columns differ by a thousand times."""
    rng = np.random.default_rng(seed)
    scales = 10 ** rng.uniform(-2, 1, n)
    f, J = 2 * rng.normal(size=(M, K)), scales * rng.normal(size=(M, K, n))
    return jnp.asarray(f, dtype), jnp.asarray(J, dtype)


def run(
    name, seed, damping, gap, solver: Any = InteriorPoint(), n=N, dtype: Any = float
):
    loss, targets = LOSSES[name]
    targets = jnp.asarray(targets)
    if targets.dtype == float:
        targets = targets.astype(dtype)
    number = lambda a: jnp.asarray(a, dtype)
    args = *problem(seed, n, dtype), targets, number(damping), number(gap)
    return solve(solver, loss, *args)


# Against another solver -----------------------------------------------------------


real = lambda rng, m: rng.normal(size=(m, K))
labels = lambda rng, m: rng.integers(0, K, m)
# Targets of m examples, and the loss of them in NumPy.
OTHERS = {
    "absolute": (real, convex.absolute),
    "euclidean": (real, convex.euclidean),
    "huber": (real, lambda y: convex.huber(y, 0.5)),
    "hinge": (lambda rng, m: np.sign(real(rng, m)), convex.hinge),
    "hinge of labels": (labels, lambda y: convex.hinge_of_labels(y, K, 0)),
    "sparsemax": (
        labels,
        lambda y: convex.f_loss(np.eye(K)[y], convex.CHI_SQUARE, np.ones(K)),
    ),
    "entmax": (
        lambda rng, m: rng.dirichlet(np.ones(K), m),
        lambda y: convex.f_loss(y, convex.ALPHA_1_5, np.ones(K)),
    ),
    "LeCam": (
        labels,
        lambda y: convex.f_loss(np.eye(K)[y], convex.LE_CAM, MEASURE, 2.0),
    ),
}


def compare(name, solver, seed, m, n, damping, gap):
    """The minimum that is found beside one that is certain, from both sides."""
    (draw, make), loss = OTHERS[name], LOSSES[name][0]
    rng = np.random.default_rng(seed)
    scales, targets = 10 ** rng.uniform(-2, 1, n), draw(rng, m)
    f, J = 2 * rng.normal(size=(m, K)), scales * rng.normal(size=(m, K, n))
    other = make(targets)
    least = convex.minimize(other, f, J, damping)
    value = convex.model(other, f, J, damping, np.zeros(n))
    decrease, rounding = value - least.above, 1e-13 * value
    assert 0 < decrease and -rounding <= least.above - least.below <= 1e-8 * decrease
    numbers = map(jnp.asarray, (f, J, targets, damping, gap))
    found, at_0, P = solve(solver, loss, *numbers)
    assert found.num_inner <= MOST[type(solver)]
    own = convex.model(other, f, J, damping, np.asarray(found.step))
    np.testing.assert_allclose((at_0, P), (value, own), rtol=1e-10)
    missing = own - least.above
    assert least.below - least.above - rounding <= missing
    assert missing <= found.gap + rounding
    assert 0 <= found.gap <= gap * (value - own + found.gap) + rounding
    assert missing <= 1e-6 * decrease


@pytest.mark.costly
@each
@every
def test_the_minimum_is_that_of_another_solver(name, solver):
    for seed, damping in enumerate(np.geomspace(10, 1e-6, 15)):
        compare(name, solver, seed, M, N, damping, 1e-7)


@pytest.mark.slow
@each
@every
def test_minima_of_many_problems(name, solver):
    dampings = np.geomspace(10, 1e-6, 50)
    sizes = [(8, 6), (24, 16), (64, 16), (64, 40), (8, 40)]
    for seed, damping in enumerate(np.random.default_rng(0).permutation(dampings)):
        compare(name, solver, seed, *sizes[seed % len(sizes)], damping, 1e-7)


@pytest.mark.costly
@each
@every
def test_the_gap_bounds_what_is_missing(name, solver):
    for seed in range(20):
        damping = 10 ** np.random.default_rng(seed).uniform(-6, 1)
        gap = 10 ** np.random.default_rng(seed).uniform(-3, -0.1)
        best, value, least = run(name, seed, damping, 1e-9)
        found, _, P = run(name, seed, damping, gap, solver)
        rounding = 1e-13 * value
        assert P - found.gap <= least + rounding
        assert least <= P + best.gap + rounding
        assert found.gap <= gap * (value - P + found.gap) + rounding
        assert P < value or damping > 9


@pytest.mark.slow
@each
@every
def test_more_parameters_than_outputs(name, solver):
    # Then the coordinates of the interior are those of a square root of J J'.
    for seed, damping in enumerate((10.0, 1e-3, 1e-6)):
        found, value, P = run(name, seed, damping, 1e-6, solver, n=40)
        assert 0 <= found.gap <= 1e-6 * (value - P + found.gap)
        assert found.num_inner <= MOST[type(solver)]


@pytest.mark.costly
@each
def test_float32(solver):
    for seed, damping in enumerate((10.0, 1e-2, 1e-4)):
        found, value, P = run("euclidean", seed, damping, 1e-4, solver, N, "float32")
        assert found.step.dtype == jnp.float32
        assert found.gap <= 1e-4 * (value - P + found.gap)
        _, _, least = run("euclidean", seed, damping, 1e-9)
        assert float(P - found.gap) < least + 1e-6 * float(value)
        assert float(P) - least < 2e-4 * (float(value) - least)


@pytest.mark.slow
@each
def test_many_models_at_once(solver):
    loss, targets = LOSSES["euclidean"]
    f, J = problem(0)
    dampings = jnp.array([10.0, 1e-2, 1e-5])
    one = lambda damping: solver.minimize(
        linear(loss, f, J, jnp.asarray(targets)), damping, jnp.asarray(1e-6)
    )
    many = jax.jit(jax.vmap(one))(dampings)
    for i, damping in enumerate(dampings):
        alone = run("euclidean", 0, damping, 1e-6, solver)[0]
        if isinstance(solver, InteriorPoint):
            np.testing.assert_allclose(many.step[i], alone.step, rtol=1e-6, atol=1e-9)
            assert many.num_inner[i] == alone.num_inner
        # Products end where rounding says; damping |d - d*|^2 <= 2 gap.
        reach = sum(np.sqrt(2 * gap / damping) for gap in (many.gap[i], alone.gap))
        assert np.linalg.norm(many.step[i] - alone.step) <= reach
        fewest, most = sorted((int(many.num_inner[i]), int(alone.num_inner)))
        assert most <= 1.2 * fewest + 2


@pytest.mark.slow
@each
def test_excluded_classes_are_as_ones_of_no_chance(solver):
    rng = np.random.default_rng(1)
    (f, J), labels = problem(1), jnp.asarray(rng.integers(1, K, M))
    excluded = (jnp.arange(K) == 0)[None] & (jnp.arange(M) < 3)[:, None]
    J = jnp.where(excluded[..., None], 0, J)
    damping, gap = jnp.asarray(1e-2), jnp.asarray(1e-8)
    low = [jnp.where(excluded, number, f) for number in (-jnp.inf, -1e4)]
    for loss in (Hinge(), FLoss(ChiSquare(), "unit")):
        (found, value, _), (same, _, _) = (
            solve(solver, loss, f, J, labels, damping, gap) for f in low
        )
        assert found.gap <= 1e-8 * value
        np.testing.assert_allclose(found.step, same.step, rtol=0, atol=2e-3)


def test_without_matrices():
    # 300 outputs, 1763 parameters: one matrix would have 90 thousand entries.
    keys = jax.random.split(jax.random.key(0))
    net = dp.Network(
        [
            eqx.nn.Linear(40, 40, key=keys[0]),
            jnp.tanh,
            eqx.nn.Linear(40, K, key=keys[1]),
        ]
    )
    x, y = jnp.ones((100, 40)), jnp.zeros((100, K))

    def largest(solver):
        vd = dp.value_and_direction(Absolute(), ProxLinear(0.1, solver))
        arrays, rest = eqx.partition(net, eqx.is_array)
        fn = lambda arrays: vd(eqx.combine(arrays, rest), x, y)
        program = jax.make_jaxpr(fn)(arrays).jaxpr
        outs = [v for e in helpers.equations(program) for v in e.outvars]
        return max(v.aval.size for v in outs)

    assert largest(AugmentedLagrangian()) <= 100 * 40
    assert largest(ProximalGradient()) <= 100 * 40
    assert largest(InteriorPoint()) >= 300**2


# Its steps ------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("name", ["absolute", "euclidean", "huber", "LeCam"])
def test_a_step_solves_the_linearized_equations(name):
    loss, targets = LOSSES[name]
    rng = np.random.default_rng(5)
    z, u = jnp.asarray(rng.normal(size=(2, M, K)))
    domain = loss.domain(z, jnp.asarray(targets))

    @jax.jit
    def step(z, u):
        at = domain.start(z)
        R, lack = domain.root(at), domain.missing(at, z + 1)
        W = lambda v: R.mv(R.transpose_mv(v))
        change = domain.push(at, W(u + domain.pull(at, lack)), lack)
        _, moved = jax.jvp(domain.missing, (at, z + 1), (change, u))
        flat = jax.vmap(W)(jnp.eye(M * K).reshape(-1, M, K)).reshape(M * K, -1)
        return lack, moved, flat, change, domain.longest(at, change), at

    lack, moved, W, change, longest, at = step(z, u)
    left = lack.z + moved.z
    if name == "LeCam":  # up to the multiplier of the sum of every row
        left = left - left.mean(-1, keepdims=True)
        np.testing.assert_allclose(change.alpha.sum(-1), 0, atol=1e-12)
    np.testing.assert_allclose(left, 0, atol=1e-10)
    for product, by in zip(lack.products, moved.products):
        np.testing.assert_allclose(product + by, 0, atol=1e-10)
    np.testing.assert_allclose(W, W.T, atol=1e-12)
    assert np.linalg.eigvalsh(W).min() > -1e-12
    # Up to there all stays positive, and not beyond.
    finite = lambda a: (
        np.all(
            np.isfinite(
                loss.conjugate(at.alpha + a * change.alpha, jnp.asarray(targets))
            )
        )
        and all(np.all(x + a * dx >= 0) for x, dx in zip(at.x, change.x))
    )
    assert finite(0.999 * longest) and not finite(1.001 * longest)


# In the oracle --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Hinge(), FLoss(ChiSquare(), "unit")])
@pytest.mark.parametrize(
    "solver",
    [InteriorPoint(), AugmentedLagrangian(), CoordinateAscent(), ProximalGradient()],
)
def test_a_mask_of_any_number(solver, loss):
    model = eqx.nn.Linear(3, K, key=jax.random.key(0), dtype="f4")
    inputs = jnp.asarray(RNG.normal(size=(M, 3)), "f4")
    excluded = (jnp.arange(K) == 0)[None] & (jnp.arange(M) < 3)[:, None]
    labels, found = jnp.arange(M) % 2 + 1, []

    def masked(params, data):
        outputs = jax.vmap(params)(data[0])
        return jnp.where(excluded, data[1], outputs)

    oracle = ProxLinear(0.1, solver, 1e-3)
    vd = dp.value_and_direction(loss, oracle, masked, has_aux=True)
    for number in (-np.inf, -1e30, jnp.finfo("f4").min):
        (_, aux), direction = vd(model, (inputs, jnp.asarray(number, "f4")), labels)
        assert aux.decrease > 0
        found.append(direction.weight)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_gap_that_is_not_reached_withholds_the_step():
    model = eqx.nn.Linear(3, K, key=jax.random.key(0))
    inputs, targets = jnp.asarray(RNG.normal(size=(M, 3))), jnp.asarray(REAL)
    vd = dp.value_and_direction(Absolute(), ProxLinear(1e-4, CoordinateAscent(1), 1e-6))
    (_, aux), direction, _ = vd.step(model, vd.init(model), inputs, targets)
    assert aux.result == dp.RESULTS.max_steps_reached and aux.gap > 1e-6
    assert not direction.weight.any() and not direction.bias.any()
    vd = dp.value_and_direction(Absolute(), ProxLinear(1e-4, ProximalGradient(1), 1e-6))
    with pytest.raises(dp.SolveError, match="`max_steps` of the solver.*throw=False"):
        vd(model, inputs, targets)
    oracle = ProxLinear(1e-4, InteriorPoint(1), 1e-6, throw=False)
    (value, aux), direction = dp.value_and_direction(Absolute(), oracle, has_aux=True)(
        model, inputs, targets
    )
    new = eqx.apply_updates(model, jax.tree.map(jnp.negative, direction))
    assert Absolute()(jax.vmap(new)(inputs), targets).mean() < value
    assert aux.num_inner == 1 and aux.gap > 1e-6


def test_the_solver_is_chosen_by_what_the_loss_offers():
    labels = jnp.zeros(M, int)

    def chosen(loss, y, *shape):
        found = []
        zeros = jnp.zeros(shape[:2]), jnp.zeros(shape), y
        jax.eval_shape(lambda *a: found.append(choose(linear(loss, *a))), *zeros)
        return found[0]

    of = lambda loss, y: chosen(loss, y, M, K, N)
    for loss, targets in LOSSES.values():
        assert isinstance(of(loss, jnp.asarray(targets)), InteriorPoint)
    traced = FLoss(Alpha(jnp.asarray(1.5)), "unit")
    for loss in (SoftmaxCrossEntropy(), FLoss(KL()), traced):
        assert isinstance(of(loss, labels), NewtonSteps)
    size = lambda m, n: chosen(Absolute(), jnp.ones((m, 1)), m, 1, n)
    assert isinstance(size(300, 300), Either)
    assert isinstance(size(2000, 2), InteriorPoint)
    assert isinstance(size(1100, 1100), AugmentedLagrangian)


@pytest.mark.slow
def test_either_solver():
    for steps in (1, 5000):  # too few, and mostly enough
        first, last = CoordinateAscent(steps), InteriorPoint()
        args = "absolute", 0, 1.0, 1e-6
        found, value, P = run(*args, Either(first, last))
        assert found.gap <= 1e-6 * (value - P + found.gap) and P < value
        alone, value, P = run(*args, first)
        num_inner = alone.num_inner
        if not alone.gap <= 1e-6 * (value - P + alone.gap):
            alone, _, _ = run(*args, last)
            num_inner = steps + alone.num_inner
        assert found.num_inner == num_inner
        np.testing.assert_allclose(found.step, alone.step, rtol=1e-9, atol=1e-12)


def test_losses_without_a_domain():
    for loss in (SoftmaxCrossEntropy(), FLoss(KL())):
        with pytest.raises(TypeError, match="one with kinks.*NewtonSteps"):
            at = linear(
                loss, jnp.zeros((M, K)), jnp.zeros((M, K, N)), jnp.zeros(M, int)
            )
            InteriorPoint().minimize(at, jnp.asarray(1.0), jnp.asarray(0.1))
