"""What directions for networks ask of a loss, for every loss of a list.

A new loss is tested by adding one line to `CASES`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, HealthCheck, settings, strategies as st

from diffprog import losses
from diffprog.losses import Alpha, ChiSquare, KL, LeCam, ReverseKL

from .helpers import close


M, K = 5, 4  # examples, outputs
RNG = np.random.default_rng(0)
SIZES = np.array([[0.3], [1.0], [2.0], [5.0], [12.0]])
U = RNG.normal(size=(M, K)) * SIZES
V = RNG.normal(size=(M, K)) * SIZES[::-1]
Y = RNG.normal(size=(M, K))
SIGNS = np.sign(RNG.normal(size=(M, K)))
COUNTS = RNG.poisson(2.0, size=(M, K)).astype(float)
LABELS = np.array([0, 3, 1, 1, 2])
TOKENS = np.array([[0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
SOFT = RNG.dirichlet(np.ones(K), size=M)
WEIGHTS = np.array([[1.0], [0.3], [2.0], [0.0], [1.0]])
MEASURE = np.array([0.2, 1.7, 0.6, 1.0])
TAUS = np.array([1e-6, 1e-3, 1.0, 1e3, 1e6])  # one per example


def custom(outputs, targets):
    """Convex, with a Hessian that is not diagonal."""
    r = outputs - targets
    return jnp.log1p(jnp.sum(jnp.cosh(r), -1)) + jnp.sum(r, -1) ** 4


# Name: loss, outputs, targets.
CASES = {
    "Squared": (losses.Squared(), U, Y),
    "Logistic": (losses.Logistic(), U, SIGNS),
    "Huber": (losses.Huber(1.5), U, Y),
    "Absolute": (losses.Absolute(), U, Y),
    "Euclidean": (losses.Euclidean(), U.reshape(M, 2, 2), Y.reshape(M, 2, 2)),
    "Poisson": (losses.Poisson(), U / 3, COUNTS),
    "Hinge": (losses.Hinge(), U, SIGNS),
    "Hinge-labels": (losses.Hinge(), U, LABELS),
    "CE-labels": (losses.SoftmaxCrossEntropy(), U, LABELS),
    "CE-soft": (losses.SoftmaxCrossEntropy(), U, SOFT * WEIGHTS),
    "CE-tokens": (losses.SoftmaxCrossEntropy(), U.reshape(M, 2, 2), TOKENS),
    "KL": (losses.FLoss(KL(), temperature=0.5), U, SOFT),
    "sparsemax": (losses.FLoss(ChiSquare(), "unit"), U, LABELS),
    "entmax": (losses.FLoss(Alpha(1.5), MEASURE), U, SOFT),
    "ReverseKL": (losses.FLoss(ReverseKL(), "uniform", smoothing=0.1), U, LABELS),
    "custom": (losses.as_loss(custom), U, Y),
}
# These only take part where every generator must.
GENERATORS = {
    "LeCam": (losses.FLoss(LeCam(), "unit", temperature=2.0), U, LABELS),  # pyright: ignore
    "Alpha3": (losses.FLoss(Alpha(3.0), MEASURE), U, SOFT),
    "traced": (losses.FLoss(Alpha(jnp.array(0.7)), MEASURE), U, SOFT),
}
DUAL = [n for n in CASES if isinstance(CASES[n][0], losses.AbstractDualLoss)]


def case(name, dtype=float):
    loss, u, y = {**CASES, **GENERATORS}[name]
    loss = jtu.tree_map(lambda a: a.astype(dtype) if eqx.is_array(a) else a, loss)
    y = jnp.asarray(y, dtype) if np.asarray(y).dtype == float else jnp.asarray(y)
    return loss, jnp.asarray(u, dtype), y


every = pytest.mark.parametrize("name", CASES)
dual = pytest.mark.parametrize("name", DUAL)


def dot(a, b):
    return jnp.sum((a * b).reshape(a.shape[0], -1), 1)


def gap(loss, u, alpha, y):
    """l(u) + l*(alpha) - <u, alpha> >= 0, and 0 where alpha is a subgradient at u."""
    return loss(u, y) + loss.conjugate(alpha, y) - dot(u, alpha)


# The primal side ------------------------------------------------------------------


@eqx.filter_jit
def derivatives(loss, u, y, v):
    f = loss.factor(u, y)
    g = f.mv(f.rho)
    axes = tuple(range(u.ndim, 2 * u.ndim))
    H = jax.hessian(lambda u: jnp.sum(loss(u, y)))(u)
    return {
        "gradient": loss.gradient(u, y),
        "autodiff": jax.grad(lambda u: jnp.sum(loss(u, y)))(u),
        "Hv": loss.hessian_mv(u, y, v),
        "dense": jnp.sum(H * v.reshape((1,) * u.ndim + u.shape), axes),
        "RRv": f.mv(f.transpose_mv(v)),
        "adjoint": dot(f.mv(u), v) - dot(u, f.transpose_mv(v)),
        "g": g if f.remainder is None else g + f.remainder,
        "negative": f.negative_curvature,
    }


@pytest.mark.costly
@every
def test_gradient_hessian_and_factor(name):
    loss, u, y = case(name)
    d = derivatives(loss, u, y, jnp.asarray(V).reshape(u.shape))
    close(d["gradient"], d["autodiff"])
    close(d["Hv"], d["dense"], 1e-11)
    close(d["RRv"], d["Hv"], 1e-11)
    close(d["adjoint"], 0, 1e-10)
    close(d["g"], d["gradient"])
    assert not d["negative"].any()
    assert loss.smooth or not d["Hv"].any() or name == "Euclidean"


def test_kinks():
    @jax.jit
    def run(zero):
        loss = losses.Euclidean()
        out = [jax.grad(lambda u: jnp.sum(loss(u, zero)))(zero)]
        for loss in (losses.Absolute(), loss):
            out += [loss.gradient(zero, zero), loss.hessian_mv(zero, zero, zero + 1)]
        out += [losses.Hinge().gradient(zero + 1, zero + 1)]
        return jnp.stack(out), losses.Hinge().gradient(zero, jnp.array([1]))

    zeros, first = run(jnp.zeros((1, 2)))
    close(zeros, 0)
    close(first, [[1.0, -1.0]])


def test_negative_curvature():
    loss = losses.as_loss(lambda u, y: jnp.sum((u * u - y) ** 2, -1))
    u = jnp.array([[0.1, 3.0], [2.0, 2.0]])
    d = derivatives(loss, u, jnp.ones((2, 2)), jnp.ones((2, 2)))
    assert d["negative"].tolist() == [True, False]
    # The positive part, and all of the gradient.
    close(d["RRv"], jnp.maximum(12 * u * u - 4, 0), 1e-11)
    close(d["g"], d["gradient"], 1e-11)


# A Gauss-Newton step by the factor ------------------------------------------------


@eqx.filter_jit
def gauss_newton(loss, u, y, J, c):
    """-(J' H J + c I)^-1 J' g by a system of the size of the outputs."""
    f, c = loss.factor(u, y), c.astype(u.dtype)
    n = u.size
    columns = jax.vmap(f.mv)(jnp.eye(n, dtype=u.dtype).reshape(n, *u.shape))
    R, g = columns.reshape(n, n).T, loss.gradient(u, y).ravel()
    e = jnp.zeros_like(g) if f.remainder is None else f.remainder.ravel()
    S = R.T @ J @ J.T @ R + c * jnp.eye(n, dtype=u.dtype)
    b = f.rho.ravel() - R.T @ (J @ (J.T @ e)) / c
    x = jax.scipy.linalg.solve(S, b, assume_a="pos")
    whitened = -J.T @ (R @ x + e / c)
    x = jax.scipy.linalg.solve(S, R.T @ (J @ (J.T @ g)), assume_a="pos")
    return whitened, -J.T @ (g - R @ x) / c, R, g, e


@pytest.mark.costly
@pytest.mark.parametrize(
    "name", ["Huber", "Euclidean", "CE-labels", "sparsemax", "custom"]
)
def test_the_step_with_a_remainder(name):
    loss, u, y = case(name)
    J = jnp.asarray(np.random.default_rng(1).normal(size=(u.size, 30))) / 5
    d, _, R, g, rest = gauss_newton(loss, u, y, J, jnp.asarray(1e-2))
    if name in ("Huber", "Euclidean"):
        assert rest.any()
    dense = J.T @ R @ R.T @ J + 1e-2 * jnp.eye(30)
    expected = -jnp.linalg.solve(dense, J.T @ g)
    close(d, expected, 1e-9 * float(jnp.max(jnp.abs(expected))))


def network(scale):
    """Outputs and their Jacobian for a net 20-40-10 and 32 examples; labels."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(20, 40)) / np.sqrt(20)
    head = rng.normal(size=(40, 10)) / np.sqrt(40) * scale
    inputs, labels = jnp.asarray(rng.normal(size=(32, 20))), rng.integers(0, 10, 32)

    def apply(params):
        W, b, head, c = params
        h = jnp.tanh(inputs @ W + b[None])
        return h @ head + c[None]

    params = jnp.asarray(W), jnp.zeros(40), jnp.asarray(head), jnp.zeros(10)
    J = jax.jacrev(apply)(params)
    J = jnp.concatenate([j.reshape(320, -1) for j in J], 1)
    return apply(params), J, jnp.asarray(labels)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_step_in_float32(scale):
    u, J, labels = network(scale)
    loss, low = losses.SoftmaxCrossEntropy(), jnp.float32
    error = 0.0
    for damping in (1e-2, 1e-4, 1e-6) if scale == 1 else (1e-2, 1e-4):
        c = jnp.asarray(32 * damping)
        exact, *_ = gauss_newton(loss, u, labels, J, c)
        step, plain, *_ = gauss_newton(loss, u.astype(low), labels, J.astype(low), c)
        size = jnp.linalg.norm(exact)
        assert jnp.linalg.norm(step.astype(float) - exact) <= 1e-5 * size
        error = jnp.linalg.norm(plain.astype(float) - exact) / size
    # Without rho the difference of two large numbers is left.
    assert scale > 1 or error > 1e-3


@pytest.mark.slow
def test_labels_without_probability():
    u = jnp.array([[0.0, 200.0, 1.0], [0.0, 0.0, 0.0]], jnp.float32)
    labels = jnp.array([0, 1])
    for loss in (losses.SoftmaxCrossEntropy(), losses.FLoss(ChiSquare(), "unit")):
        f = loss.factor(u, labels)
        assert f.remainder is not None
        close(f.mv(f.rho) + f.remainder, loss.gradient(u, labels), 1e-6)
        assert float(jnp.max(jnp.abs(f.rho))) < 10
        close(f.remainder[1], 0)


# The dual side --------------------------------------------------------------------


@eqx.filter_jit
def conjugates(loss, u, v, y):
    g, x = loss.gradient(u, y), loss.dual_projection(5 * v, y)
    outside = jnp.max(jnp.abs(5 * v - x).reshape(M, -1), 1) > 1e-3
    return {
        "equality": gap(loss, u, g, y),
        "inside": loss.conjugate(x, y),
        "again": loss.dual_projection(x, y) - x,
        "angle": dot(5 * v - x, g - x),
        "outside": outside,
        "beyond": loss.conjugate(5 * v, y),
    }


@pytest.mark.costly
@dual
def test_conjugate_and_projection(name):
    loss, u, y = case(name)
    d = conjugates(loss, u, jnp.asarray(V).reshape(u.shape), y)
    close(d["equality"], 0, 1e-11)
    assert jnp.isfinite(d["inside"]).all()
    close(d["again"], 0, 1e-14)
    assert (d["angle"] <= 1e-11).all()
    assert jnp.isinf(jnp.where(d["outside"], d["beyond"], jnp.inf)).all()
    assert d["outside"].any() or name == "Squared"


@eqx.filter_jit
def least_gap(loss, u, v, w, mix, y):
    a, b = loss.gradient(v, y), loss.gradient(w, y)
    return gap(loss, u, mix * a + (1 - mix) * b, y)


numbers = st.lists(st.floats(-20, 20), min_size=3 * M * K, max_size=3 * M * K)


@pytest.mark.costly
@dual
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
@given(numbers=numbers, mix=st.floats(0, 1))
def test_fenchel_young_inequality(name, numbers, mix):
    loss, u, y = case(name)
    u, v, w = jnp.asarray(numbers).reshape(3, *u.shape)
    if name == "Poisson":
        u, v, w = u / 4, v / 4, w / 4
    assert (least_gap(loss, u, v, w, jnp.asarray(mix), y) >= -1e-10).all()


@eqx.filter_jit
def proximal(loss, v, tau, y, point):
    a = loss.conjugate_prox(v, tau, y)
    column = tau.reshape(-1, *(1,) * (v.ndim - 1))
    objective = lambda a: tau * loss.conjugate(a, y) + dot(a - v, a - v) / 2
    return a, gap(loss, (v - a) / column, a, y), objective(point) - objective(a)


@pytest.mark.costly
@pytest.mark.parametrize("name", [*DUAL, *GENERATORS])
def test_conjugate_prox(name):
    loss, u, y = case(name)
    v, tau = jnp.asarray(V).reshape(u.shape), jnp.asarray(TAUS)
    a, left, more = proximal(loss, v, tau, y, loss.gradient(u, y))
    # (v - a) / tau is in the subdifferential of l*, to the digits that tau leaves.
    close(left * jnp.minimum(tau, 1), 0, 1e-12)
    assert (more >= -1e-12 * (1 + tau)).all()


@pytest.mark.costly
@pytest.mark.parametrize(
    "name", ["Logistic", "Poisson", "Hinge-labels", "CE-labels", "CE-soft", "Alpha3"]
)
def test_conjugate_prox_in_float32(name):
    low = jnp.float32
    loss, u, y = case(name)
    run = eqx.filter_jit(lambda loss, *args: loss.conjugate_prox(*args))
    exact = run(loss, jnp.asarray(V), jnp.asarray(TAUS), y)
    loss, u, y = case(name, low)
    single = run(loss, jnp.asarray(V, low), jnp.asarray(TAUS, low), y)
    assert single.dtype == low
    close(single, exact, 3e-6)


@pytest.mark.parametrize("name", ["Squared", "Huber", "Poisson", "CE-labels"])
def test_prox(name):
    loss, u, y = case(name)
    v, tau = jnp.asarray(V).reshape(u.shape), jnp.asarray(TAUS)

    @eqx.filter_jit
    def run(loss, v, tau, y):
        u = loss.prox(v, tau, y)
        return u, loss.gradient(u, y), loss.prox(v, 0.5, y)

    u, g, half = run(loss, v, tau, y)
    column = tau[:, None]
    close((u + column * g - v) / (1 + column), 0, 1e-8)
    close(half + 0.5 * loss.gradient(half, y), v, 1e-11)


def bisect(fn, low, high):
    """The root of a falling function, entry by entry."""
    for _ in range(70):
        middle = (low + high) / 2
        low, high = np.where(fn(middle) > 0, [middle, high], [low, middle])
    return (low + high) / 2


@pytest.mark.costly
@pytest.mark.parametrize(
    "name, q, link",
    [
        ("CE-labels", np.ones(K), np.log),
        ("sparsemax", np.ones(K), lambda u: u - 1),
        ("entmax", MEASURE, lambda u: 2 * np.sqrt(u) - 2),
        ("ReverseKL", np.full(K, 1 / K), lambda u: 1 - 1 / u),
        ("Alpha3", MEASURE, lambda u: (u * u - 1) / 2),
    ],
)
def test_proximal_operators_by_bisection(name, q, link):
    loss, u, y = case(name)
    v, tau = jnp.asarray(V), jnp.asarray(TAUS)
    a, *_ = proximal(loss, v, tau, y, loss.gradient(u, y))
    hot = (
        np.eye(K)[LABELS] * 0.9 + 0.1 / K if name == "ReverseKL" else np.eye(K)[LABELS]
    )
    hot = SOFT if name in ("entmax", "Alpha3") else hot
    for i in range(1, 4):
        x, tau, tiny = V[i] + hot[i], TAUS[i], np.full(K, 1e-300)
        p = lambda nu: bisect(
            lambda p: x - nu - p - tau * link(p / q), tiny, np.ones(K)
        )
        reach = np.abs(x).max() + tau * np.abs(link(1 / q)).max() + tau * 30 + 2
        nu = bisect(lambda nu: p(nu).sum() - 1, -reach, reach)
        close(np.asarray(a)[i], p(nu) - hot[i], 1e-9)


@eqx.filter_jit
def block(loss, alpha, z, K, c, y):
    a = loss.block_update(alpha, z, K, c, y)
    product = lambda d: jnp.einsum("ijk,ik->ij", K, d.reshape(K.shape[:2]))
    objective = lambda a: (
        loss.conjugate(a, y)
        - dot(a, z)
        + dot(product(a - alpha), (a - alpha).reshape(K.shape[:2])) / (2 * c)
    )
    u = z - product(a - alpha).reshape(z.shape) / c
    return a, gap(loss, u, a, y), objective(a), objective(alpha)


# Losses whose block updates share no code with those of another.
BLOCKS = [n for n in DUAL if n not in ("CE-labels", "CE-soft", "KL", "entmax")]


@pytest.mark.costly
@pytest.mark.parametrize("name", BLOCKS)
def test_block_updates(name):
    loss, u, y = case(name)
    A = (
        np.random.default_rng(1).normal(size=(M, K, 2))
        * np.array([0.0, 1.0, 3.0, 1.0, 10.0])[:, None, None]
    )
    kernel = jnp.asarray(A @ A.transpose(0, 2, 1))
    alpha = loss.gradient(jnp.asarray(V).reshape(u.shape) / 4, y)
    for c in (1e-2, 1.0):
        a, left, after, before = block(loss, alpha, u, kernel, jnp.asarray(c), y)
        assert (after <= before + 1e-12 * (1 + jnp.abs(before))).all()
        assert (after < before - 1e-3).any()  # and it is a step
        close(left[0], 0, 1e-10)  # K = 0
        if loss.smooth:
            close(left, 0, 1e-8)
    lower = jax.eval_shape(
        loss.block_update, *(a.astype(jnp.float32) for a in (alpha, u, kernel)), 1.0,
        case(name, jnp.float32)[2],
    )  # fmt: skip
    assert lower.dtype == jnp.float32 and lower.shape == u.shape


@pytest.mark.costly
@pytest.mark.parametrize(
    "name",
    ["Squared", "Logistic", "Huber", "Absolute", "Euclidean", "Poisson", "Hinge"],
)
def test_block_updates_of_one_output(name):
    loss, u, y = case(name)
    u, y = u.reshape(M, K)[:, :1], y.reshape(M, K)[:, :1]
    alpha = loss.gradient(jnp.asarray(V)[:, :1] / 4, y)
    kernel = jnp.asarray([0.0, 1e-3, 1.0, 9.0, 1e3]).reshape(M, 1, 1)
    _, left, *_ = block(loss, alpha, u, kernel, jnp.asarray(0.1), y)
    close(left, 0, 1e-10)


# Masks, transformations, mistakes -------------------------------------------------


@eqx.filter_jit
def some(loss, u, y):
    a = loss.conjugate_prox(u, 0.7, y)
    g = loss.gradient(u, y)
    return g, a, loss.conjugate(a, y), loss.dual_projection(u, y)


@pytest.mark.slow
def test_excluded_classes():
    loss = losses.FLoss(ChiSquare(), jnp.array([1.0, 0.0, 2.0]))
    small = losses.FLoss(ChiSquare(), jnp.array([1.0, 2.0]))
    u, y = jnp.array([[0.3, 5.0, -0.2]]), jnp.array([[0.4, 0.0, 0.6]])
    cut = lambda a: a[:, ::2]
    whole, part = some(loss, u, y), some(small, cut(u), cut(y))
    for i in (0, 1, 3):
        close(cut(whole[i]), part[i])
        close(whole[i][:, 1], 0)
    close(whole[2], part[2])
    assert jnp.isinf(loss.conjugate(jnp.array([[-0.1, 0.1, 0.0]]), y)).all()


def test_a_temperature_per_row():
    u, y = jnp.asarray(U[:2]), jnp.asarray(SOFT[:2])
    both = some(losses.FLoss(KL(), temperature=jnp.array([0.5, 2.0])), u, y)
    for i, temperature in enumerate([0.5, 2.0]):
        loss = losses.FLoss(KL(), temperature=jnp.array([temperature] * 2))
        for a, b in zip(both, some(loss, u, y)):
            close(a[i], b[i])


def test_vmap_and_eager():
    loss, u, y = case("Logistic")
    v, tau = jnp.asarray(V), jnp.asarray(TAUS)
    together = eqx.filter_jit(loss.conjugate_prox)(v, tau, y)
    close(loss.conjugate_prox(v, tau, y), together, 1e-13)
    one = lambda v, tau, y: loss.conjugate_prox(v[None], tau, y[None])[0]
    close(jax.jit(jax.vmap(one))(v, tau, y), together, 1e-13)


def test_many_products_in_float32():
    # Sums of products that share an argument over many rows.
    loss, u, labels = losses.SoftmaxCrossEntropy(), jnp.asarray(U), jnp.asarray(LABELS)
    v = jnp.asarray(np.random.default_rng(1).normal(size=(2000, M, K)))

    @jax.jit
    def run(u, v):
        f = loss.factor(u, labels)
        product = jax.vmap(lambda v: loss.hessian_mv(u, labels, v))
        return product(v), jax.vmap(f.mv)(v), jax.vmap(f.transpose_mv)(v)

    low = run(u.astype(jnp.float32), v.astype(jnp.float32))
    for a, b in zip(low, run(u, v)):
        close(a, b, 1e-5)


def test_a_loss_is_taken_as_it_is():
    loss = losses.Squared()
    assert losses.as_loss(loss) is loss
    assert losses.as_loss(custom).smooth


def test_functions_carry_no_conjugate():
    assert not isinstance(losses.as_loss(custom), losses.AbstractDualLoss)


def test_wrong_calls(unchecked):
    u, y = jnp.asarray(U), jnp.asarray(Y)
    with pytest.raises(TypeError, match="the class Squared"):
        losses.as_loss(losses.Squared)
    with pytest.raises(TypeError, match="'squared'; a loss such as"):
        losses.as_loss("squared")  # pyright: ignore
    with pytest.raises(ValueError, match="one loss per example, shape .5,."):
        losses.as_loss(lambda u, y: jnp.mean((u - y) ** 2)).gradient(u, y)
    for loss in (losses.Squared(), losses.SoftmaxCrossEntropy(), losses.Hinge()):
        with pytest.raises(ValueError, match="`targets` has shape"):
            loss.gradient(u, y[:, :2])
    with pytest.raises(ValueError, match="`targets` has shape"):
        losses.FLoss(KL()).conjugate(u, jnp.array([1]))
    with pytest.raises(ValueError, match="infinite with ReverseKL"):
        losses.FLoss(ReverseKL(), "unit").gradient(u, jnp.asarray(LABELS))
    with pytest.raises(ValueError, match="`tau` is 0.0; positive"):
        losses.Squared().prox(u, 0.0, y)
    with pytest.raises(ValueError, match="`tau` has shape .3,."):
        losses.Squared().conjugate_prox(u, jnp.ones(3), y)
    for loss in (losses.Squared(), losses.Absolute(), losses.Huber()):
        with pytest.raises(ValueError, match="`K` has shape .5, 4.; one matrix"):
            loss.block_update(u, u, u, 1.0, y)
