"""Learned preconditioners: scores, structures, solvers, refreshes and their state."""

# States of optax have any type, and wrong calls are made on purpose.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

import copy
import functools as ft
import io
import warnings

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
    AbstractProbe,
    AbstractStructure,
    default_structure,
    Dense,
    Diagonal,
    DiagonalKronecker,
    EigenKronecker,
    ExactStep,
    GaussianProbe,
    ggn,
    HeavyBall,
    hessian,
    Kronecker,
    LinearCG,
    llqr,
    LLQRState,
    NormalEquations,
    PSDKronecker,
    published,
    RademacherProbe,
    refresh,
    Scalar,
    Stacked,
)

from .helpers import close


KEYS = jr.split(jr.key(1), 9)


# Scores of networks that a dense program computed -----------------------------------

# widths, activation, loss, batch, shift, damping, and J: see the head of the test.
NETS = {
    "tanh": ((5, 6, 4, 3), jnp.tanh, SoftmaxCrossEntropy(), 7, 0, 0.1),
    "sigmoid": ((3, 5, 2), jax.nn.sigmoid, Squared(), 4, 1, 0.05),
    "softplus": ((4, 4, 4, 4), jax.nn.softplus, SoftmaxCrossEntropy(), 5, 2, 0.01),
    "linear": ((6, 3), None, SoftmaxCrossEntropy(), 8, 3, 0.02),
    "sin": ((2, 12, 12, 2), jnp.sin, Squared(), 3, 4, 0.001),
}
SCORES = {
    "tanh": {
        "identity": -0.1973968327012,
        "scalar": -0.2494971659207,
        "per_layer": -0.2656020268714,
        "per_leaf": -0.3083636891821,
        "T5": -0.197407485753,
        "T50": -0.1977290476876,
        "moved": (0.0003742020635563, 0.01167893197901),
        "lengths": (2.930970697472, 1.909084426746, 0.1732205847148),
        "best": -0.3885579437884,
        "jacobi": 1.478825139774,
    },
    "sigmoid": {
        "identity": 0.03456834760816,
        "scalar": -0.05765449632167,
        "per_layer": -0.1004832247182,
        "per_leaf": -0.1211586437888,
        "T5": 0.03425555891608,
        "T50": 0.02521572830181,
        "moved": (0.002028191013417, 0.06220795965926),
        "lengths": (11.50179478161, 0.2831893549571),
        "best": -0.1512333809851,
        "jacobi": 1.005165220867,
    },
    "softplus": {
        "identity": -0.09283664720826,
        "scalar": -0.1175381054059,
        "per_layer": -0.2615598284226,
        "per_leaf": -0.3095264363539,
        "T5": -0.09284056461171,
        "T50": -0.09295882011727,
        "moved": (0.0002269175645899, 0.007082360584322),
        "lengths": (59.16351072323, 1.420569979007, 0.9143856477212),
        "best": -0.5454318010705,
        "jacobi": 6.982986678836,
    },
    "linear": {
        "identity": -0.5473059310388,
        "scalar": -1.118687919324,
        "per_layer": -1.118687919324,
        "per_leaf": -1.134700408899,
        "T5": -0.5475762336398,
        "T50": -0.5556873104527,
        "moved": (0.001884992980649, 0.05869252601311),
        "lengths": (3.50477947199,),
        "best": -1.457328717263,
        "jacobi": 1.714103882596,
    },
    "sin": {
        "identity": 0.1909799988396,
        "scalar": -0.3831619675183,
        "per_layer": -0.4217388184309,
        "per_leaf": -0.446564804501,
        "T5": 0.1863304317784,
        "T50": 0.0632659388315,
        "moved": (0.007823930527305, 0.2315798642185),
        "lengths": (20.88088662874, 0.4920276953477, -0.8627751225556),
        "best": -0.4746141903716,
        "jacobi": 1331.76921268,
    },
}


def network(widths, activation, loss, batch, shift, damping):
    """Layers l = 1, 2, ... with entries that sines give; indices start at 1."""
    layers = []
    for i, (n, m) in enumerate(zip(widths, widths[1:])):
        a, b = np.arange(1.0, m + 1), np.arange(1.0, n + 1)
        W = np.sin(1.7 * a[:, None] + 0.9 * b + i + shift) / np.sqrt(n)
        parts = jnp.asarray(W), jnp.asarray(0.1 * np.cos(1.3 * a + i + shift))
        layer = eqx.filter_eval_shape(eqx.nn.Linear, n, m, key=KEYS[0])
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, parts)
        layers += [layer, activation]
    net = dp.Network(layers[:-1], stack=False)
    i, c = np.arange(1.0, batch + 1)[:, None], np.arange(1.0, widths[0] + 1)
    x = np.cos(0.7 * i * c + 0.3 * i)
    y = np.sin(i + 2 * np.arange(1.0, widths[-1] + 1) + shift)
    if isinstance(loss, SoftmaxCrossEntropy):
        y = np.arange(batch) % widths[-1]
    return net, ggn(loss)(net, jnp.asarray(x), jnp.asarray(y)), damping


def heavy(steps, **options):
    return llqr(Diagonal(), solver=HeavyBall(steps), **options)


@pytest.mark.costly
@pytest.mark.parametrize("name", NETS)
def test_scores_equal_those_of_dense_matrices(name):
    net, curvature, rho = network(*NETS[name])
    params, known = eqx.filter(net, eqx.is_inexact_array), SCORES[name]
    groups = {"scalar": "all", "per_layer": "layer", "per_leaf": "leaf"}
    optimizers = {
        kind: llqr(Scalar(group), damping=rho, solver=NormalEquations())
        for kind, group in groups.items()
    }
    optimizers |= {f"T{T}": heavy(T, damping=rho) for T in (5, 50)}
    state = {kind: tx.init(params) for kind, tx in optimizers.items()}
    names = sorted(state)  # as JAX sorts them
    state, found = jax.jit(refresh)(state, params, curvature)
    found = dict(zip(names, found, strict=True))
    for kind, about in found.items():
        close(about.identity, known["identity"], 1e-9)
        close(about.fitted, known[kind], 1e-8 if kind == "T50" else 1e-9)
    for T, moved in zip((5, 50), known["moved"]):
        close(found[f"T{T}"].distance, moved, 1e-9 if T == 5 else 1e-8)
    lengths = [stack.stage.layers[0] for stack in state["per_layer"].U.stacks]
    close(np.stack([at.weight for at in lengths]), known["lengths"], 1e-9)
    close(np.stack([at.bias for at in lengths]), known["lengths"], 1e-9)


class Coordinates(AbstractProbe):
    """Unit vectors, whose mean square is that of independent entries."""

    def draw(self, gradient, key):
        flat, unravel = ravel_pytree(gradient)
        return jax.vmap(unravel)(jnp.sqrt(flat.size) * jnp.eye(flat.size))


@pytest.mark.costly
@pytest.mark.parametrize("name", ["sigmoid", "linear"])
def test_independent_probes_lead_to_the_inverse_of_the_diagonal(name):
    net, curvature, rho = network(*NETS[name])
    params = eqx.filter(net, eqx.is_inexact_array)
    tx = llqr(Diagonal(), damping=rho, solver=NormalEquations(), probe=Coordinates())
    state, _ = refresh(tx.init(params), params, curvature)
    flat, unravel = ravel_pytree(params)
    U = ravel_pytree(state.U)[0]

    @jax.jit
    def known():
        model = curvature.linearize()
        mv = lambda e: ravel_pytree(model.mv(unravel(e)))[0]
        step = unravel(-U * ravel_pytree(model.gradient)[0])
        return jax.vmap(mv)(jnp.eye(flat.size)), model.change(step, rho)

    C, change = known()
    close(U, 1 / (np.diagonal(C) + rho), 1e-9)
    close(change, SCORES[name]["jacobi"], 1e-9)


# A small model ----------------------------------------------------------------------


M = 6
INPUTS, LABELS = jr.normal(KEYS[0], (8 * M, 4)), jnp.arange(8 * M) % 3
NET = eqx.nn.MLP(4, 3, 5, 1, activation=jnp.tanh, key=KEYS[1])
PARAMS, REST = eqx.partition(NET, eqx.is_inexact_array)
FLAT, UNRAVEL = ravel_pytree(PARAMS)
RECIPE = ggn(SoftmaxCrossEntropy())
RHO = 0.1
LINEAR = {"scalar": Scalar(), "diagonal": Diagonal(), "dense": Dense()}
MATRIX = {
    "diagonal Kronecker": DiagonalKronecker(),
    "Kronecker": Kronecker(),
    "PSD Kronecker": PSDKronecker(),
    "eigen-Kronecker": EigenKronecker(),
}
STRUCTURES = LINEAR | MATRIX


def batch(i=0):
    return INPUTS[M * i : M * (i + 1)], LABELS[M * i : M * (i + 1)]


def curvature(i=0, params=PARAMS, recipe=RECIPE):
    return recipe(eqx.combine(params, REST), *batch(i))


@jax.jit
def batch_gradient(params, x, y):
    loss = SoftmaxCrossEntropy()
    return jax.grad(lambda p: jnp.mean(loss(jax.vmap(eqx.combine(p, REST))(x), y)))(
        params
    )


def gradient(params=PARAMS, i=0):
    return batch_gradient(params, *batch(i))


@jax.jit
def matrix(curvature):
    model = curvature.linearize()
    mv = lambda e: ravel_pytree(model.mv(UNRAVEL(e)))[0]
    return ravel_pytree(model.gradient)[0], jax.vmap(mv)(jnp.eye(FLAT.size))


@ft.cache
def dense(i=0):
    """The gradient and C + rho I."""
    g, C = map(np.asarray, matrix(curvature(i)))
    return g, C + RHO * np.eye(FLAT.size)


def fit(structure, solver, batches=(0,), **options):
    tx = llqr(structure, **({"damping": RHO, "solver": solver} | options))
    given = [curvature(i) for i in batches]
    return tx, *refresh(tx.init(PARAMS), PARAMS, given)


def preconditioned(tx, state, g):
    return ravel_pytree(tx.update(UNRAVEL(g), state, PARAMS)[0])[0]


# Structures -------------------------------------------------------------------------

SHAPES = [
    (Scalar(), (3,)),
    (Diagonal(), (2, 3)),
    (Dense(), (2, 3)),
    (DiagonalKronecker(), (2, 3)),
    (Kronecker(), (2, 3, 2)),
    (Kronecker(rows=2), (2, 3, 2)),
    (PSDKronecker(), (2, 3)),
    (EigenKronecker(), (3, 2)),
    (Stacked(Scalar()), (2, 3)),
    (Stacked(Kronecker()), (2, 3, 2)),
    (Stacked(Diagonal(), axes=2), (2, 1, 3)),
]


@pytest.mark.costly
@pytest.mark.parametrize("structure, shape", SHAPES, ids=str)
def test_a_structure_is_a_matrix_that_starts_as_the_identity(structure, shape):
    size = int(np.prod(shape))
    X = jr.normal(KEYS[2], shape)
    U = structure.init(shape, jnp.float64)
    assert (structure.apply(U, X) == X).all()
    assert hash(structure) == hash(copy.copy(structure))
    U = jax.tree.map(lambda a: a + jr.normal(KEYS[3], a.shape), U)
    run = lambda e: structure.apply(U, e.reshape(shape)).ravel()
    matrix = np.asarray(jax.jit(jax.vmap(run))(jnp.eye(size))).T
    close(matrix @ np.ravel(X), structure.apply(U, X).ravel())
    entries = np.diagonal(matrix)
    known = np.ravel(structure.diagonal(U))
    if known.size == size:
        close(known, entries)
    else:  # each one once
        close(np.unique(known), np.unique(entries.round(12)), 1e-11)
    floored = structure.diagonal(structure.floored(U, 10.0))
    if isinstance(structure, Scalar | Diagonal | DiagonalKronecker):
        assert (floored >= 10).all()


def test_a_positive_structure_is_positive():
    structure = PSDKronecker()
    U = jax.tree.map(
        lambda a: a - 3 * jr.normal(KEYS[3], a.shape), structure.init((3, 3), float)
    )
    run = lambda e: structure.apply(U, e.reshape(3, 3)).ravel()
    matrix = np.asarray(jax.jit(jax.vmap(run))(jnp.eye(9)))
    close(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12


def test_the_default_rule():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, float)
    assert default_structure("", leaf()) == Diagonal()
    assert default_structure("", leaf(7)) == Diagonal()
    assert default_structure("", leaf(7, 8192)) == Kronecker()
    assert default_structure("", leaf(8193, 4)) == Diagonal()
    assert default_structure("", leaf(16, 8, 3, 3)) == Kronecker()
    assert default_structure("", leaf(16, 1, 1)) == Diagonal()
    assert default_structure("", leaf(8, 1024, 3, 3)) == Diagonal()


def test_a_rule_is_asked_for_every_leaf():
    asked = {}

    def rule(path, leaf):
        asked[path] = leaf.shape
        return Kronecker() if path == ".layers[0].weight" else Scalar()

    state = llqr(rule).init(PARAMS)
    shapes = {".layers[0].weight": (5, 4), ".layers[0].bias": (5,)}
    shapes |= {".layers[1].weight": (3, 5), ".layers[1].bias": (3,)}
    assert asked == shapes
    assert [a.shape for a in state.U.layers[0].weight] == [(5, 5), (4, 4)]
    assert state.U.layers[1].weight.shape == ()
    plain = llqr(Kronecker()).init(PARAMS).U.layers[0]
    assert plain.bias.shape == (5,) and plain.weight[0].shape == (5, 5)


@pytest.mark.slow
def test_equal_stages_of_a_network_have_structures_of_their_own():
    layers = []
    for key in jr.split(KEYS[4], 4):
        layers += [eqx.nn.Linear(3, 3, key=key), jnp.tanh]
    x, y = INPUTS[:M, :3], LABELS[:M]
    found = {}
    for stack in (True, False):
        net = dp.Network(layers, stack=stack)
        params = eqx.filter(net, eqx.is_inexact_array)
        seen = []

        def rule(path, leaf):
            seen.append(leaf.shape)
            return default_structure(path, leaf)

        tx = {"a": llqr(rule, solver=HeavyBall(3, 0.1))}
        tx["b"] = llqr(Scalar("layer"), solver=NormalEquations())
        tx["c"] = llqr(Scalar("all"), solver=NormalEquations())
        state = {name: each.init(params) for name, each in tx.items()}
        _, found[stack] = refresh(state, params, RECIPE(net, x, y))
        assert set(seen) == {(3, 3), (3,)}
    for a, b in zip(jax.tree.leaves(found[True]), jax.tree.leaves(found[False])):
        if jnp.isfinite(a):
            close(a, b, 1e-9)


# Solvers ----------------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_and_values_are_those_of_the_quadratic_cost(name):
    structure = STRUCTURES[name]
    tx = llqr(structure, damping=RHO)
    plan = tx.init(PARAMS).plan
    U = jax.tree.map(lambda a: a + 0.3 * jr.normal(KEYS[3], a.shape), plan.init())

    @jax.jit
    def found(U):
        models = [plan.restricted(curvature(i).linearize()) for i in range(2)]
        objective = plan.objective(models, dp.optim.GradientProbe(), RHO, KEYS[5])
        return objective.value(U), objective.gradient(U)

    pairs = dense(0), dense(1)

    def J(U, terms=()):
        for g, A in pairs:
            Ug = plan.apply(U, plan.take("g", UNRAVEL(g)))
            u = -ravel_pytree(Ug)[0]
            terms = *terms, g @ u + u @ A @ u / 2
        return sum(terms) / 2

    value, slopes = jax.jit(jax.value_and_grad(J))(U)
    found_value, found_slopes = found(U)
    close(found_value, value)
    close(found_slopes, slopes, scale="norm")


def test_the_gradient_of_a_diagonal_is_the_gradient_times_the_residual():
    tx = llqr(Diagonal(), damping=RHO)
    plan = tx.init(PARAMS).plan
    d = jr.normal(KEYS[6], FLAT.shape)

    @jax.jit
    def slopes(d):
        models = [plan.restricted(curvature().linearize())]
        objective = plan.objective(models, dp.optim.GradientProbe(), RHO, KEYS[5])
        return objective.gradient(tuple(plan.take("d", UNRAVEL(d))))

    g, A = dense()
    found = ravel_pytree(slopes(d))[0]
    close(found, -g * (g - A @ (d * g)), scale="norm")


@pytest.mark.costly
@pytest.mark.parametrize("solver", [NormalEquations(), LinearCG(200)], ids=str)
def test_the_best_diagonal_of_one_gradient_is_the_exact_step(solver):
    tx, state, about = fit(Diagonal(), solver)
    g, A = dense()
    exact = np.linalg.solve(A, g)
    close(preconditioned(tx, state, g), exact, 1e-6, scale="norm")
    close(about.fitted, -g @ exact / 2, 1e-9)


def test_one_scalar_is_the_step_of_cauchy():
    _, state, about = fit(Scalar("all"), NormalEquations())
    g, A = dense()
    close(state.U.layers[0].weight, g @ g / (g @ A @ g))
    close(about.fitted, -((g @ g) ** 2) / (2 * g @ A @ g))


def test_one_scalar_of_several_batches():
    _, state, about = fit(Scalar("all"), NormalEquations(), batches=range(3))
    pairs = [dense(i) for i in range(3)]
    b, S = sum(g @ g for g, _ in pairs), sum(g @ A @ g for g, A in pairs)
    close(state.U.layers[1].bias, b / S)
    close(about.fitted, -(b**2) / S / 6)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["scalar", "diagonal"])
def test_exact_steps_are_linear_conjugate_gradients(name):
    _, linear, _ = fit(STRUCTURES[name], LinearCG(5))
    _, exact, _ = fit(STRUCTURES[name], ExactStep(5))
    close(*(ravel_pytree(s.U)[0] for s in (linear, exact)), 1e-9, scale="norm")


@pytest.mark.costly
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_length_of_one_step_is_that_of_the_formula(name):
    """t = -<r, u_E> / <u_E, (C + rho I) u_E> along minus the gradient."""
    structure = STRUCTURES[name]
    tx, state, about = fit(structure, ExactStep(1))
    plan = state.plan
    g, A = dense()
    step = lambda U: -ravel_pytree(plan.apply(U, plan.take("g", UNRAVEL(g))))[0]
    J = lambda U: g @ step(U) + step(U) @ A @ step(U) / 2

    @jax.jit
    def stepped(U):
        r = g + A @ step(U)
        _, pull = jax.vjp(step, U)
        E = jax.tree.map(lambda a: -a, pull(r)[0])
        u_E = jax.jvp(step, (U,), (E,))[1]
        t = -(r @ u_E) / (u_E @ A @ u_E)
        new = jax.tree.map(lambda a, e: a + t * e, U, E)
        return ravel_pytree(new)[0], ravel_pytree(U)[0], J(new) <= J(U)

    new, U, better = stepped(plan.init())
    close(ravel_pytree(plan.numbers(state.U))[0], new if better else U, scale="norm")
    assert about.fitted <= about.identity


@pytest.mark.costly
@pytest.mark.parametrize("name", MATRIX)
def test_exact_steps_lower_the_cost_of_any_structure(name):
    _, _, about = fit(MATRIX[name], ExactStep(40))
    g, A = dense()
    best = -g @ np.linalg.solve(A, g) / 2
    assert best < about.fitted < 0.9 * best < about.identity


@pytest.mark.costly
@pytest.mark.parametrize("structure", [Diagonal(), Kronecker()], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_no_array_moves_further_than_the_bound(structure, scale):
    T, rate, mu, clip = 50, 1e-3, 0.9, 5.0
    recipe = ggn(SoftmaxCrossEntropy(), factor=scale)
    tx = llqr(structure, solver=HeavyBall(T, rate, mu, clip), damping=0.0)
    params = jax.tree.map(lambda a: 3 * a, PARAMS)
    state, _ = refresh(tx.init(params), params, curvature(0, params, recipe))
    bound = rate * clip * sum((1 - mu**t) / (1 - mu) for t in range(1, T + 1))
    assert bound == pytest.approx(2.0523, abs=1e-4)
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), state.U, tx.init(params).U)
    assert max(jax.tree.leaves(moved)) <= bound
    if scale > 1:  # reached by nearly all of it
        assert max(jax.tree.leaves(moved)) > 0.1 * bound


@pytest.mark.slow
@pytest.mark.parametrize("probe", [GaussianProbe(2000), RademacherProbe(2000)], ids=str)
def test_random_probes_come_near_to_their_limit(probe):
    _, state, _ = fit(Diagonal(), NormalEquations(), probe=probe)
    _, A = dense()
    close(ravel_pytree(state.U)[0], 1 / jnp.diagonal(A), 0.2)
    assert (state.key != llqr().init(PARAMS).key).any()


def test_an_indefinite_hessian_has_no_best_diagonal():
    tx = llqr(Diagonal(), solver=NormalEquations(), damping=0.0)
    given = curvature(0, recipe=hessian(SoftmaxCrossEntropy()))
    state, about = refresh(tx.init(PARAMS), PARAMS, given)
    assert about.refused and state.refused == 1 and about.distance == 0


def test_a_layer_without_gradient_keeps_its_scalar():
    net = eqx.tree_at(lambda n: n.layers[1].weight, NET, jnp.zeros((3, 5)))
    params = eqx.filter(net, eqx.is_inexact_array)
    tx = llqr(Scalar(), solver=NormalEquations(), damping=RHO)
    state, about = refresh(tx.init(params), params, RECIPE(net, *batch()))
    assert not about.refused
    assert state.U.layers[0].weight == 1 and state.U.layers[1].bias != 1


@pytest.mark.slow
def test_averages_floors_and_warm_starts():
    fitted = lambda **options: fit(Diagonal(), LinearCG(5), **options)[1]
    U = lambda state: ravel_pytree(state.U)[0]
    found = U(fitted())
    assert (found < 0).any()
    close(U(fitted(ema=0.75)), 0.75 + 0.25 * found)
    _, state, about = fit(Diagonal(), LinearCG(5), floor=1e-8)
    close(U(state), jnp.maximum(found, 1e-8))
    assert about.negative == 0
    for warm, further in ((True, True), (False, False)):
        tx, state, first = fit(Diagonal(), LinearCG(2), warm_start=warm)
        _, second = refresh(state, PARAMS, curvature())
        assert (second.fitted < first.fitted - 1e-6) == further


# Updates ----------------------------------------------------------------------------


def train(tx, steps=3, use=True, structure=None):
    state, params = tx.init(PARAMS), PARAMS
    for i in range(steps):
        given = {"curvature": curvature(i, params)} if use else {}
        updates, state = tx.update(gradient(params, i), state, params, **given)
        params = optax.apply_updates(params, updates)
    return ravel_pytree(params)[0], state


@pytest.mark.costly
@pytest.mark.parametrize("options", [{"solver": HeavyBall(0)}, {"ema": 1.0}], ids=str)
def test_without_a_change_of_U_training_is_that_of_the_base(options):
    base = optax.sgd(0.1, momentum=0.9)
    expected, _ = train(base, use=False)
    for structure in (Scalar("layer"), Diagonal(), Kronecker(), EigenKronecker()):
        options = {"solver": HeavyBall(3), **options}
        tx = optax.chain(llqr(structure, interval=1, **options), base)
        found, state = train(tx)
        assert state[0].refreshes == 3 and state[0].refused == 0
        assert (found == expected).all() or isinstance(structure, MATRICES)
        close(found, expected, 1e-12)


MATRICES = Kronecker, EigenKronecker


def test_bfloat16_gradients_pass_the_identity_as_they_are():
    g = jax.tree.map(lambda a: a.astype(jnp.bfloat16), gradient())
    tx = llqr(Diagonal())
    updates, state = tx.update(g, tx.init(g), g)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(g), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    assert state.U.layers[0].weight.dtype == jnp.float32


def test_a_grafted_update_has_the_norm_of_the_gradient():
    for options, same in ({"graft": "norm"}, True), ({}, False):
        tx, state, _ = fit(Diagonal(), LinearCG(3), **options)
        updates, _ = tx.update(gradient(), state)
        sizes = lambda tree: [np.linalg.norm(a) for a in jax.tree.leaves(tree)]
        assert np.allclose(sizes(updates), sizes(gradient()), rtol=1e-12) == same
    tx = llqr(Diagonal(), graft="norm")
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    assert (ravel_pytree(tx.update(zero, tx.init(PARAMS))[0])[0] == 0).all()


def test_refreshes_come_when_they_are_due():
    tx = llqr(Scalar("all"), solver=LinearCG(1), interval=3)
    state, counts = tx.init(PARAMS), []
    step = jax.jit(lambda state, c: tx.update(gradient(), state, PARAMS, curvature=c))
    for i in range(7):
        _, state = step(state, curvature(i % 2))
        counts.append(int(state.refreshes))
    assert counts == [1, 1, 1, 2, 2, 2, 3] and not state.overdue and state.count == 7
    assert step._cache_size() == 1


def test_what_was_not_refreshed_is_overdue_and_said_once():
    tx = llqr(Scalar(), solver=NormalEquations(), interval=2)
    state = tx.init(PARAMS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for i in range(5):
            _, state = tx.update(gradient(), state, PARAMS, other="extra")
            assert state.overdue == (i >= 2)
        jax.jit(tx.update)(gradient(), state)
    assert [w.category for w in said] == [UserWarning]
    assert "was not refreshed for 3 updates" in str(said[0].message)
    state, _ = refresh(state, PARAMS, curvature())
    assert not state.overdue and state.since == 0 and state.count == 5


# Refreshes --------------------------------------------------------------------------


def test_new_numbers_are_one_program():
    traces = []
    tx = optax.chain(llqr(Diagonal(), solver=LinearCG(2)), optax.sgd(0.1))

    @jax.jit
    def run(state, params, curvature, damping):
        traces.append(None)
        return refresh(state, params, curvature, damping=damping)

    state, costs = tx.init(PARAMS), []
    for i in range(5):
        params = jax.tree.map(lambda a: (1 + i) * a, PARAMS)
        state, about = run(state, params, curvature(i, params), 0.1 * i)
        costs.append(float(about.fitted))
    assert len(traces) == 1 and len(set(costs)) == 5 and state[0].refreshes == 5


KINDS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.sgd(0.1)),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda a: True, p)),
    "multi_transform": lambda tx: optax.multi_transform(
        {"a": tx, "b": optax.sgd(0.1)}, lambda p: jax.tree.map(lambda a: "a", p)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject": lambda tx: optax.inject_hyperparams(llqr)(
        Diagonal(), damping=RHO, solver=LinearCG(3)
    ),
}


@pytest.mark.costly
@pytest.mark.parametrize("name", KINDS)
def test_a_refresh_finds_the_state_in_any_other(name):
    tx = llqr(Diagonal(), damping=RHO, solver=LinearCG(3))
    plain, expected = refresh(tx.init(PARAMS), PARAMS, curvature())
    tx = KINDS[name](tx)
    state, found = refresh(tx.init(PARAMS), PARAMS, curvature())
    for a, b in zip(found[:2], expected[:2]):
        close(a, b, 1e-12)

    @jax.jit
    def step(g, state, c):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return tx.update(g, state, PARAMS, curvature=c, other=1.0)

    before = jax.tree.structure(state)
    for i in range(2):
        _, state = step(gradient(), state, curvature(i))
    assert jax.tree.structure(state) == before
    inner = [s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s)]
    assert len(inner) == 1 and inner[0].refreshes == 1
    close(*(ravel_pytree(s.U)[0] for s in (inner[0], plain)), 1e-12)


def is_state(node):
    return isinstance(node, LLQRState)


def test_injected_numbers_reach_a_refresh():
    tx = optax.inject_hyperparams(llqr)(Scalar("all"), damping=RHO, solver=LinearCG(1))
    state = tx.init(PARAMS)
    state.hyperparams["damping"] = jnp.asarray(3.0)
    _, state = tx.update(gradient(), state, PARAMS, curvature=curvature())
    g, A = dense()
    expected = g @ g / (g @ A @ g + (3 - RHO) * g @ g)
    close(state.inner_state.U.layers[0].bias, expected)


def test_a_mask_leaves_the_problem_of_the_others():
    mask = jax.tree.map(lambda a: a.ndim > 1, PARAMS)
    tx = optax.masked(llqr(Diagonal(), damping=RHO, solver=LinearCG(8)), mask)
    state, about = refresh(tx.init(PARAMS), PARAMS, curvature(), judge=curvature(1))
    keep = jax.tree.map(lambda a, m: jnp.full(a.shape, m), PARAMS, mask)
    keep = ravel_pytree(keep)[0]
    g, A = (part[keep] if part.ndim == 1 else part[keep][:, keep] for part in dense())
    close(about.identity, -g @ g + g @ A @ g / 2)
    # The same problem alone, by a model whose other parameters are constants.
    weights, biases = eqx.partition(PARAMS, mask)
    predict = lambda p, x: jax.vmap(eqx.combine(p, biases, REST))(x)
    recipe = ggn(SoftmaxCrossEntropy(), predict)
    alone = llqr(Diagonal(), damping=RHO, solver=LinearCG(8))
    state_alone, about_alone = refresh(
        alone.init(weights),
        weights,
        recipe(weights, *batch()),
        judge=recipe(weights, *batch(1)),
    )
    for a, b in zip(about, about_alone, strict=True):
        close(jnp.asarray(a, float), jnp.asarray(b, float), 1e-12)
    close(ravel_pytree(state.inner_state.U)[0], ravel_pytree(state_alone.U)[0], 1e-12)
    updates, _ = tx.update(gradient(), state, PARAMS, curvature=curvature())
    assert (updates.layers[0].bias == gradient().layers[0].bias).all()


def test_a_mask_may_hide_a_whole_part():
    mask = eqx.tree_at(
        lambda p: p.layers, jax.tree.map(lambda a: True, PARAMS), (True, False)
    )
    tx = optax.masked(llqr(Diagonal(), damping=RHO, solver=LinearCG(3)), mask)
    state, about = refresh(tx.init(PARAMS), PARAMS, curvature())
    size = PARAMS.layers[0].weight.size + 5
    g, A = dense()
    close(
        about.identity, -g[:size] @ g[:size] + g[:size] @ A[:size, :size] @ g[:size] / 2
    )


@pytest.mark.slow
def test_the_judge_is_the_score_on_its_own_batch():
    tx, state, _ = fit(Diagonal(), LinearCG(20))
    tx = llqr(Diagonal(), damping=RHO, solver=LinearCG(20))
    _, about = refresh(tx.init(PARAMS), PARAMS, curvature(), judge=curvature(1))
    g, _ = dense(1)
    steps = {"I": UNRAVEL(-g), "U": UNRAVEL(-preconditioned(tx, state, g))}
    known = dp.optim.score(curvature(1), steps, RHO)
    close(about.identity_score, known["I"], 1e-8)
    close(about.score, known["U"], 1e-8)
    assert jnp.isnan(refresh(state, PARAMS, curvature())[1].score)


@pytest.mark.slow
def test_a_line_search_of_optax_refuses_what_it_does_not_know():
    x, y = batch()
    loss = SoftmaxCrossEntropy()
    value = lambda p: jnp.mean(loss(jax.vmap(eqx.combine(p, REST))(x), y))
    search = optax.scale_by_backtracking_linesearch(5)
    tx = optax.chain(llqr(Diagonal(), solver=LinearCG(2)), optax.sgd(1.0), search)
    state, _ = refresh(tx.init(PARAMS), PARAMS, curvature())
    given = {"value": value(PARAMS), "grad": gradient(), "value_fn": value}
    tx.update(gradient(), state, PARAMS, **given)
    with pytest.raises(TypeError, match="curvature"):
        tx.update(gradient(), state, PARAMS, **given, curvature=curvature())


# The state --------------------------------------------------------------------------


# One layer has both of the structures that are taken by default.
LAYER, LAYER_REST = eqx.partition(
    eqx.nn.Linear(4, 3, key=KEYS[7]), eqx.is_inexact_array
)


@pytest.fixture(scope="module")
def stepper():
    tx = optax.chain(
        llqr(solver=ExactStep(2), interval=2, probe=RademacherProbe(2)),
        optax.sgd(0.1, momentum=0.9),
    )

    @jax.jit
    def step(carry, i):
        params, state = carry
        x = jax.lax.dynamic_slice_in_dim(INPUTS, i * M, M)
        y = jax.lax.dynamic_slice_in_dim(LABELS, i * M, M)
        c = RECIPE(eqx.combine(params, LAYER_REST), x, y)
        updates, state = tx.update(c.linearize().gradient, state, params, curvature=c)
        return (optax.apply_updates(params, updates), state), None

    return tx, step


def test_a_state_goes_through_scan_and_files_bit_for_bit(stepper):
    tx, step = stepper
    carry = LAYER, tx.init(LAYER)
    scanned, _ = jax.lax.scan(step, carry, jnp.arange(4))
    for i in range(2):
        carry, _ = step(carry, jnp.asarray(i))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, carry)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, (LAYER, tx.init(LAYER)))
    for i in range(2, 4):
        carry, _ = step(carry, jnp.asarray(i))
        loaded, _ = step(loaded, jnp.asarray(i))
    assert jax.tree.all(jax.tree.map(np.array_equal, carry, loaded))
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(scanned), strict=True):
        close(np.float64(a), np.float64(b), 1e-12, scale="norm")
    assert step._cache_size() == 1


def test_a_first_state_can_be_donated():
    state = llqr(Scalar("all"), solver=NormalEquations(), damping=RHO).init(PARAMS)
    expected, _ = refresh(state, PARAMS, curvature())
    found, _ = jax.jit(refresh, donate_argnums=0)(state, PARAMS, curvature())
    close(found.U.layers[0].weight, expected.U.layers[0].weight)


def test_an_ensemble_is_its_members(stepper):
    tx, step = stepper
    params = jax.tree.map(lambda a: np.stack([0.5 * a, 2 * a]), LAYER)
    carry = jax.tree.map(np.asarray, (params, jax.jit(jax.vmap(tx.init))(params)))
    both, _ = jax.vmap(step, (0, None))(carry, jnp.asarray(0))
    for i in range(2):
        member = jax.tree.map(lambda a: a[i], carry)
        alone, _ = step(member, jnp.asarray(0))
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            close(np.float64(a[i]), np.float64(b), 1e-10, scale="norm")


# What goes wrong --------------------------------------------------------------------


@pytest.mark.costly
@pytest.mark.parametrize(
    "solver", [HeavyBall(2), ExactStep(2), LinearCG(2), NormalEquations()], ids=str
)
def test_numbers_that_are_not_finite_never_enter(solver):
    tx, state, _ = fit(Scalar(), solver, batches=(0, 1))
    for bad in (jnp.nan, jnp.inf):
        x, y = batch()
        given = RECIPE(NET, x.at[0, 0].set(bad), y)
        found, about = refresh(state, PARAMS, [curvature(1), given])
        assert about.refused and found.refused == 1 and found.since == 0
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, found.U, state.U))
    again, about = refresh(found, PARAMS, [curvature(1), curvature()])
    assert not about.refused and again.refused == 1


class Half(AbstractStructure):
    """What users may write."""

    linear = True

    def init(self, shape, dtype):
        return jnp.ones((), dtype)

    def apply(self, U, X):
        return U * X

    def diagonal(self, U):
        return U

    def floored(self, U, floor):
        return U


def test_a_structure_of_ones_own():
    _, state, about = fit(Half(), NormalEquations())
    _, _, known = fit(Scalar(), NormalEquations())
    close(about.fitted, known.fitted)


STATE = llqr(Diagonal()).init(PARAMS)
OTHER = eqx.nn.MLP(4, 3, 6, 1, key=KEYS[1])
OTHERS = eqx.filter(OTHER, eqx.is_inexact_array)
MESSAGES = {
    r"`damping` is -1.0; a number >= 0": lambda: llqr(damping=-1.0),
    r"`ema` is 1.5; a number from 0 to 1": lambda: llqr(ema=1.5),
    r"`interval` is 0; a Python int >= 1": lambda: llqr(interval=0),
    r'`graft` is \'Norm\'; "none" or "norm"': lambda: llqr(graft="Norm"),
    r"`floor` is 'a'; a number, or `None`": lambda: llqr(floor="a"),
    r"`solver` is 'cg'; something like `ExactStep\(\)`": lambda: llqr(solver="cg"),
    r"`solver` is the class LinearCG": lambda: llqr(solver=LinearCG),
    r"`probe` is 'normal'; something like": lambda: llqr(probe="normal"),
    r"`structure` is 'diagonal'; a structure such as": lambda: llqr("diagonal"),
    r"`warm_start` is 1; a bool": lambda: llqr(warm_start=1),
    r"`key` is 'a'; a key such as": lambda: llqr(key="a"),
    r"`rows` is 0; a Python int >= 1": lambda: Kronecker(rows=0),
    r"`structure` is 'diagonal'; something like `Kronecker\(\)`": lambda: Stacked(
        "diagonal"
    ),
    r'`groups` is \'net\'; "leaf", "layer" or "all"': lambda: Scalar("net"),
    r"`num_steps` is 2.0; a Python int >= 0": lambda: HeavyBall(2.0),
    r"`learning_rate` is -1.0; a number > 0": lambda: HeavyBall(learning_rate=-1.0),
    r"`clip` is 0.0; a number > 0 is expected, or `None`": lambda: HeavyBall(clip=0.0),
    r"`num` is 0; a Python int >= 1": lambda: GaussianProbe(0),
    r"`params\.layers\[0\]\.bias` does not fit the structure Kronecker\(\): a leaf of "
    r"shape \(5,\)": lambda: llqr(lambda path, leaf: Kronecker()).init(PARAMS),
    r"`structure\('\.layers\[0\]\.weight', \.\.\.\)` returned 'diagonal'": lambda: llqr(
        lambda path, leaf: "diagonal"
    ).init(PARAMS),
    r"not linear in its numbers; take the solver `ExactStep\(\)`": lambda: llqr(
        Kronecker(), solver=LinearCG()
    ).init(PARAMS),
    r"`params\['n'\]` has dtype int64; floats are expected": lambda: llqr().init(
        {"n": jnp.arange(3)}
    ),
    r"`params` has no floating array": lambda: llqr().init({}),
    r"U has 43 numbers, more than the `max_size` of 3": lambda: fit(
        Diagonal(), NormalEquations(3)
    ),
    r"`updates` is arranged as": lambda: llqr().update({"a": 1.0}, STATE),
    r"`updates\.layers\[0\]\.weight` has shape \(6, 4\); that of the parameter that "
    r"`init` was given is \(5, 4\)": lambda: llqr().update(OTHERS, STATE),
    r"`curvature.params\.layers\[0\]\.weight` has shape \(6, 4\)": lambda: (
        llqr().update(PARAMS, STATE, curvature=RECIPE(OTHER, *batch()))
    ),
    r"`params\.layers\[0\]\.weight` has shape \(5, 4\); that of the parameter that "
    r"`init` was given is \(6, 4\)": lambda: refresh(
        llqr().init(OTHERS), PARAMS, RECIPE(OTHER, *batch())
    ),
    r"`curvature` is a recipe that was not called": lambda: refresh(
        STATE, PARAMS, RECIPE
    ),
    r"`curvature` is a curvature that is linearized already": jax.jit(
        lambda: llqr().update(PARAMS, STATE, curvature=curvature().linearize())
    ),
    r"`curvature` is .*GaussNewton.*; that of a batch is expected": lambda: refresh(
        STATE, PARAMS, dp.oracles.GaussNewton()
    ),
    r"`curvature` is an empty list": lambda: refresh(STATE, PARAMS, []),
    r"`opt_state` has no state of `dp.optim.llqr`": lambda: refresh(
        optax.sgd(0.1).init(PARAMS), PARAMS, curvature()
    ),
    r"`damping` is -2.0; a number >= 0": lambda: refresh(
        STATE, PARAMS, curvature(), damping=-2.0
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_wrong_calls_say_what_to_do(message, unchecked):
    with pytest.raises((TypeError, ValueError), match=message):
        MESSAGES[message]()


def test_the_published_settings():
    state = published().init(PARAMS)
    at, solver = state.settings, state.settings.solver
    numbers = at.damping, at.ema, at.floor, at.interval, solver.learning_rate
    numbers += solver.momentum, solver.clip, solver.num_steps
    assert [float(a) for a in numbers] == [0, 0.95, 1e-8, 1000, 1e-3, 0.9, 5, 50]
    assert state.U.layers[0].weight.shape == (5, 4)
