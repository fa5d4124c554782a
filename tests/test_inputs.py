"""Whatever comes in: every loss, operator and oracle under masks, extremes, dtypes and
conventions of targets, as hypothesis draws them.

What masks, gaps and targets give is compared with references in `test_masks`,
`test_targets` and `test_precision`; here they meet each other. A new loss or generator
is drawn by its line there, a new oracle by its line in `test_precision`, a new operator
by its line here; the last test fails where there is none.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, HealthCheck, Phase, settings, strategies as st

import diffprog as dp
from diffprog import losses, optim
from diffprog.losses import f_loss, f_softargmax, f_softmax, FLoss, Hinge
from diffprog.oracles import Cholesky, GaussNewton, MadsenNielsen, Threshold

from .test_losses import FAMILIES
from .test_masks import LOSSES
from .test_precision import network, ORACLES
from .test_targets import ACCEPTED, IGNORING, LABELS, PROBABILITIES, U, WRONG


M, K = 6, 4
DTYPES = ["bfloat16", "float16", "float32", "float64"]
EXTREMES = [0.0, -1e3, -np.inf, np.inf, "lowest", "highest"]
row, other_column = st.integers(0, M - 1), st.integers(1, K - 1)
draws = dict(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    extremes=st.lists(
        st.tuples(row, other_column, st.sampled_from(EXTREMES)), max_size=8
    ),
    jitted=st.booleans(),
)
property_test = lambda count: settings(
    max_examples=count,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def scores(seed, dtype, extremes):
    """Random ones, some of them extreme. Those of class 0 never are."""
    u = np.random.default_rng(seed).normal(size=(M, K))
    u = np.array(jnp.asarray(u, dtype))
    for row, column, value in extremes:
        named = {"lowest": jnp.finfo(dtype).min, "highest": jnp.finfo(dtype).max}
        u[row, column] = named.get(value, value)
    return jnp.asarray(u)


def in_its_dtype(targets, dtype):
    targets = np.asarray(targets)[:M]
    return jnp.asarray(targets, dtype if targets.dtype == float else targets.dtype)


@ft.cache
def compiled(fn):
    return eqx.filter_jit(fn)


def everything_of_a_loss(loss, u, y):
    factor = loss.factor(u, y)
    return dict(
        value=loss(u, y),
        gradient=loss.gradient(u, y),
        Hessian=loss.hessian_mv(u, y, jnp.ones_like(u)),
        factor=factor.mv(factor.rho),
    )


@pytest.mark.costly
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_anything(name):
    loss, targets = LOSSES[name]

    @property_test(20)
    @given(**draws)
    def check(seed, dtype, extremes, jitted):
        u, y = scores(seed, dtype, extremes), in_its_dtype(targets, dtype)
        call = compiled(everything_of_a_loss) if jitted else everything_of_a_loss
        out = call(loss, u, y)
        assert {a.dtype for a in out.values()} == {jnp.dtype(dtype)}
        out = {key: np.asarray(a, float) for key, a in out.items()}
        assert not any(np.isnan(a).any() for a in out.values())
        # Rows do not know of each other, but for the number of steps of a loop.
        exact = np.asarray(u, float)
        mild = ~np.any(np.isinf(exact) | (np.abs(exact) > 100), 1)
        again = call(loss, jnp.asarray(np.where(mild[:, None], exact, 0), dtype), y)
        for a, b in zip(out.values(), again.values(), strict=True):
            a, b = a[mild], np.asarray(b, float)[mild]
            eps = 16 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(a, b, rtol=eps, atol=eps)

    check()


# Targets --------------------------------------------------------------------------

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
CONVENTIONS = ACCEPTED | {
    f"{name}, some ignored": (IGNORING[key], np.where(LABELS == 2, -100, LABELS))
    for name, key in (
        ("Hinge of labels", "Hinge"),
        ("cross-entropy of labels", "cross-entropy"),
        ("sparsemax of labels", "sparsemax"),
    )
}
WRONG_ROWS = {  # one number for the whole of the second row
    name: [case for case in cases if np.ndim(case[0]) == 0]
    for name, cases in WRONG.items()
}
for name in CONVENTIONS:
    if CONVENTIONS[name][1].dtype == int:
        cases = WRONG_ROWS.setdefault(name, [])
        cases += [
            (n, f"label {n}; the 3 classes") for n in (3, 127, 2**32, 2**32 - 100)
        ]


def of_targets(loss, u, y):
    return loss(u, y), loss.gradient(u, y)


@pytest.mark.costly
@pytest.mark.parametrize("name", CONVENTIONS)
def test_targets_of_anything(name, unchecked):
    """What is known raises, and what is traced is NaN in its row alone."""
    loss, accepted = CONVENTIONS[name]
    desired = [np.asarray(a) for a in of_targets(loss, U, accepted)]

    @property_test(20)
    @given(
        dtype=st.sampled_from(DTYPES),
        kind=st.sampled_from(INTEGERS if accepted.dtype == int else DTYPES),
        wrong=st.sampled_from([None, *WRONG_ROWS.get(name, [])]),
        given_as=st.sampled_from([np.asarray, jnp.asarray, "list", "traced"]),
    )
    def check(dtype, kind, wrong, given_as):
        u, targets = U.astype(dtype), accepted.copy()
        kind = dtype if name == "function" else kind  # it promotes nothing
        if wrong is not None:
            targets[1] = wrong[0]
        y = targets.astype(kind)
        if accepted.dtype == int and not np.array_equal(y, targets):
            return  # a dtype without this number
        call = of_targets
        if given_as == "list" and name == "function":
            return  # it takes arrays
        if given_as == "traced":
            call, y = compiled(of_targets), jnp.asarray(y)
        elif given_as == "list":
            y = y.tolist()
        else:
            y = given_as(y)
        if wrong is not None and given_as != "traced":
            # Numbers are other ones in 16 bits.
            message = wrong[1] if kind not in DTYPES[:3] else wrong[1].split("; ")[-1]
            with pytest.raises(ValueError, match=message):
                call(loss, u, y)
            return
        floats = {dtype, kind} & set(DTYPES)
        eps = 16 * max(float(jnp.finfo(a).eps) for a in floats)
        rows = np.arange(3) != (1 if wrong else 3)
        for a, b in zip(call(loss, u, y), desired, strict=True):
            assert a.dtype == jnp.dtype(dtype)
            a = np.asarray(a, float)
            np.testing.assert_allclose(a[rows], b[rows], eps, 4 * eps)
            assert wrong is None or name in PROBABILITIES or np.isnan(a[1]).any()

    check()


# Operators ------------------------------------------------------------------------

ZEROS = jnp.zeros(M, int)
SIGMA = losses.spectrum("superquantile", K, 0.5)
TAIL = losses.spectrum("superquantile", M, 0.5)


def probabilities(u):
    return jnp.broadcast_to(jnp.eye(1, K, dtype=u.dtype), u.shape)


def jacobian(f, u, where):
    v = jnp.arange(K).astype(u.dtype)
    of = lambda u, w: losses.hessian_operator(u, f, "unit", where=w).mv(v)
    return jax.vmap(of)(u, jnp.ones(u.shape, bool) if where is None else where)


def risk(fn):
    return lambda f, u, _: jax.vmap(lambda u: fn(u, SIGMA, f, smoothing=0.5))(u)


def lattice(u, where):
    """Moves between two states, some of them skipped."""
    return u.reshape(M, 2, 2), None if where is None else where[:, 1]


def tables(u):
    """Of the first token, and of the second one."""
    return [u[0], u[1 : 1 + K]]


def energies(objective, u):
    energy = lambda u, x, y: u[x, y]
    objective = objective(energy, losses.Enumeration(jnp.arange(K)))
    return jax.vmap(lambda x: objective(u, x, 0)[0])(jnp.arange(M))


def partition(f):
    of_class_0 = lambda u, x: u[x, 0]
    fn = losses.minmin_objective
    return lambda energy, every: fn(energy, of_class_0, every, f)


def two_steps(u, method):
    """Of the median of column 0, with losses that column 1 adds to."""
    loss = lambda w, example: jnp.abs(w - example[0]) ** 2 / 2 + example[1]
    method, data = method(loss), (u[:, 0], u[:, 1])
    state = method.init(jnp.zeros((), u.dtype), data)
    for seed in range(2):
        state = method.step(state, data, jax.random.key(seed))
    return state.params


# By name: of f, scores and what is not masked.
OPERATORS = {
    "f_softargmax": lambda f, u, w: f_softargmax(u, f, "unit", where=w),
    "f_softmax": lambda f, u, w: f_softmax(
        u, f, "uniform", where=w, temperature=2.0
    ),
    "f_loss": lambda f, u, w: f_loss(u, ZEROS, f, "unit", where=w, constant=False),
    "f_loss of probabilities": lambda f, u, w: f_loss(
        u, probabilities(u), f, "unit", where=w, smoothing=0.1
    ),
    "capped_f_softargmax": lambda f, u, w: losses.capped_f_softargmax(
        u, f, "unit", where=w, cap=0.6
    ),
    "hessian_operator": jacobian,
    "diagnose": lambda f, u, w: jax.lax.stop_gradient(
        losses.diagnose(u, f, "unit", where=w).residual.astype(u.dtype)
    ),
    "entmax": lambda f, u, w: losses.entmax(u, 1.3, where=w),
    "entmax15": lambda f, u, w: losses.entmax15(u, where=w),
    "sparsemax": lambda f, u, w: losses.sparsemax(u, where=w),
    "f_sigmoid": lambda f, u, w: losses.f_sigmoid(u, f, "unit"),
    "f_softplus": lambda f, u, w: losses.f_softplus(u, f, "unit"),
    "spectral_risk": risk(losses.spectral_risk),
    "spectral_weights": risk(losses.spectral_weights),
    "soft_viterbi": lambda f, u, w: losses.soft_viterbi(
        lattice(u, w)[0], f, "unit", mask=lattice(u, w)[1]
    ),
    "viterbi": lambda f, u, w: losses.viterbi(
        lattice(u, w)[0], mask=lattice(u, w)[1]
    )[0],
    "arm_from_ebm": lambda f, u, w: losses.arm_from_ebm(tables(u), f, "unit")[1],
    "ebm_from_arm": lambda f, u, w: losses.ebm_from_arm(tables(u), f, "unit")[0],
    "rewards_from_logits": lambda f, u, w: losses.rewards_from_logits(
        u, ZEROS, f, "unit"
    ),
    "exact_objective": lambda f, u, w: energies(
        lambda energy, every: losses.exact_objective(energy, every, f), u
    ),
    "minmin_objective": lambda f, u, w: energies(partition(f), u),
    "prospect": lambda f, u, w: two_steps(
        u, lambda loss: optim.prospect(loss, TAIL, f, smoothing=0.5, learning_rate=0.1)
    ),
    "lsvrg": lambda f, u, w: two_steps(
        u, lambda loss: optim.lsvrg(loss, TAIL, learning_rate=0.1)
    ),
}  # fmt: skip


def with_gradient(operator, f, u, where):
    value, pull = jax.vjp(lambda u: OPERATORS[operator](f, u, where), u)
    weights = 1 + jnp.arange(value.size) % 3
    return value, pull(weights.reshape(value.shape).astype(value.dtype))[0]


# Those whose mask is one of classes.
MASKED = list(OPERATORS)[: list(OPERATORS).index("f_sigmoid")]
# What is rounded to 16 bits on the way: a derivative may be any there.
ROUNDED = {
    "hessian_operator", "spectral_risk", "spectral_weights", "soft_viterbi", "viterbi",
    "arm_from_ebm", "ebm_from_arm", "rewards_from_logits", "exact_objective",
    "minmin_objective", "prospect", "lsvrg",
}  # fmt: skip


# Sums of scores, which may be too large for the dtype.
ADDED = "soft_viterbi", "viterbi", "arm_from_ebm", "ebm_from_arm", "rewards_from_logits"
GENERATORS = FAMILIES | {"function": losses.generator(lambda u: u * jnp.log(u))}


@pytest.mark.costly
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_anything(name):
    """As in float64, and what is masked is as what has a score of -inf."""

    @property_test(3 if name in ROUNDED else 5)
    @given(
        **draws,
        f=st.sampled_from(list(GENERATORS)),
        masked=st.none() | st.lists(st.tuples(row, other_column), max_size=6),
        empty=st.booleans(),
    )
    def check(seed, dtype, extremes, jitted, f, masked, empty):
        u, where = scores(seed, dtype, extremes), None
        if masked is not None:
            where = np.ones((M, K), bool)
            for place in masked:
                where[place] = False
            where[3] &= not empty
            where = jnp.asarray(where)
        call = compiled(with_gradient)
        low = (call if jitted else with_gradient)(name, GENERATORS[f], u, where)
        other, mask = u.astype(float), where
        if name in MASKED and where is not None:
            other, mask = jnp.asarray(np.where(where, other, -np.inf)), None
        high = call(name, GENERATORS[f], other, mask)
        for part, a, b in zip(("value", "gradient"), low, high, strict=True):
            assert a.dtype == jnp.dtype(dtype)
            assert not np.isnan(np.asarray(a, float)).any(), part
            rounded = name in ROUNDED and (part == "gradient" or extremes)
            overflows = name in ADDED and any(v == "highest" for _, _, v in extremes)
            if f == "3" or overflows or rounded and dtype in DTYPES[:2]:
                continue
            compare(a, b)

    check()


def compare(low, high):
    """To rounding, where what is too large for the dtype is infinite."""
    limits = jnp.finfo(low.dtype)
    a, b = np.asarray(low, float), np.asarray(high, float)
    a, b = (
        np.where(np.abs(x) > float(limits.max) / 8, np.copysign(np.inf, x), x)
        for x in (a, b)
    )
    tolerance = max(16 * float(limits.eps), 1e-4)
    np.testing.assert_allclose(a, b, tolerance, tolerance)


# Oracles --------------------------------------------------------------------------

# The losses of labels, of which the last class is masked.
OF_LABELS = {
    "cross-entropy": losses.SoftmaxCrossEntropy(ignore_label=-1),
    "hinge": Hinge(ignore_label=-1),
    "sparsemax": FLoss(losses.ChiSquare(), "unit", ignore_label=-1),
}


# In 16 bits their dampings go another way.
BY_RATIO = {
    "ratio": GaussNewton(MadsenNielsen(10.0), Cholesky()),
    "threshold": GaussNewton(Threshold(10.0), Cholesky()),
}
EVERY = ORACLES | BY_RATIO
# Rules that invert what comes after a layer, so that one more class is another model.
INVERTED = "targets", "differences", "inverses"
# Ridge regressions over the inputs of a layer, whatever the loss ignores.
OF_INPUTS = "inverses", "proximal back-propagation"
OF_A_GAP = "interior", "Lagrangian", "ascent", "proximal"  # they stop elsewhere
# Of a class: as if it were not there, and where it takes all the mass.
MASKS, LARGE = [-1e3, -1e30, "lowest", -np.inf], [1e3, 1e30, "highest", np.inf]


class OneMore(eqx.Module):
    """Adds a class, all of whose outputs are one of `MASKS` or `LARGE`."""

    which: jax.Array

    def __call__(self, u, key=None):
        limits = jnp.finfo(u.dtype)
        named = {"lowest": limits.min, "highest": limits.max}
        values = [float(named.get(v, v)) for v in MASKS + LARGE]
        with np.errstate(over="ignore"):
            values = jnp.asarray(np.array(values).astype(u.dtype))
        return jnp.concatenate([u, values[self.which][None]])


@pytest.mark.costly
@pytest.mark.parametrize("oracle", EVERY)
def test_oracles_of_anything(oracle):
    """A class that is masked is none, and an example that is ignored is none."""

    @property_test(2)
    @given(
        loss=st.sampled_from(list(OF_LABELS)[oracle == "interior" :]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 2**31),
    )
    def check(loss, dtype, seed):
        rng = np.random.default_rng(seed)
        net = network(4, 3 * [dtype])
        x = jnp.asarray(rng.normal(size=(M, 3)), dtype)
        labels = jnp.asarray(rng.integers(0, 2, M)).at[2].set(-1)
        key = jax.random.key(0) if oracle == "subspace" else None
        vd = dp.value_and_direction(OF_LABELS[loss], EVERY[oracle])

        def step(model, rows):
            out = vd.step(model, vd.init(model), x[rows], labels[rows], key=key)
            (value, aux), direction, _ = out
            leaves = jax.tree.leaves(direction)
            assert {a.dtype for a in leaves} == {jnp.dtype(dtype)}
            d = np.concatenate([np.ravel(np.asarray(a, float)) for a in leaves])
            assert np.isfinite(d).all()
            return value, aux, d

        eps = 4 * float(jnp.finfo(dtype).eps)
        rounded = eps > 0.001 and loss != "cross-entropy"

        def close(d, desired):
            if rounded:
                return  # a rounding may decide on which side of a kink an output is
            tolerance = 10 * max(eps, 0.01 * (oracle in OF_A_GAP))
            assert np.linalg.norm(d - desired) <= tolerance * np.linalg.norm(desired)

        every = np.arange(M) >= 0
        kept = every if oracle in OF_INPUTS else np.arange(M) != 2
        value, aux, alone = step(net, kept)
        assert aux.result == dp.RESULTS.successful
        references = {True: alone}
        if oracle in INVERTED:
            close(step(net, every)[2], references.pop(True))
        for i, extreme in enumerate(MASKS + LARGE):
            wider = dp.Network([*net.layers, OneMore(jnp.asarray(i))])
            there, aux, d = step(wider, every)
            low, good = extreme in MASKS, aux.result == dp.RESULTS.successful
            desired = references.setdefault(low, d)
            if low and oracle not in INVERTED or desired is d:
                assert good and jnp.isfinite(aux.decrease), (extreme, aux)
            if low:
                np.testing.assert_allclose(there, value, rtol=eps)
            assert good == jnp.isfinite(there) or low and not good
            if not good:
                assert not d.any()
            elif low or d.any():  # else it is lost in the rounding of the value
                close(d, desired)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_takes_a_loss_agrees(dtype):
    @property_test(3)
    @given(
        loss=st.sampled_from(list(OF_LABELS.values())),
        which=st.integers(0, len(MASKS) - 1),
        seed=st.integers(0, 2**31),
    )
    def check(loss, which, seed):
        rng = np.random.default_rng(seed)
        layers = network(4, 3 * [dtype]).layers
        net = dp.Network([*layers, OneMore(jnp.asarray(which))])
        x = jnp.asarray(rng.normal(size=(M, 3)), dtype)
        labels = jnp.asarray(rng.integers(0, 2, M)).at[2].set(-1)
        vd = dp.value_and_direction(loss, dp.oracles.Gradient(), has_aux=True)
        (value, aux), _ = vd(net, x, labels)
        u, eps = aux.outputs, 8 * float(jnp.finfo(dtype).eps)
        problem = dp.NetworkProblem(net, loss, labels)
        cost = problem.terminal_cost(u)
        np.testing.assert_allclose(np.float64(cost), value, eps, eps)
        if dtype in DTYPES[:2]:
            with pytest.raises(TypeError, match="are float32 or float64"):
                dp.rollout(problem, x, net.params)
        function = losses.as_loss(lambda u, y: loss(u, y))
        pairs = zip(of_targets(function, u, labels), of_targets(loss, u, labels))
        for a, b in pairs:
            assert a.dtype == b.dtype and not jnp.isnan(a).any()
            np.testing.assert_allclose(np.float64(a), np.float64(b), eps, eps)

    check()


# All of them ----------------------------------------------------------------------

# What takes no numbers of its own, and why.
NOT_DRAWN = {
    "Cauchy": "in test_model_step.py",
    "Minimize": "in test_model_step.py",
    "model_step": "in test_model_step.py",
    "ModelStepState": "what is returned",
    "Curvature": "what is returned",
    "LossModel": "what is returned",
    "Recipe": "what is returned",
    "ggn": "in test_curvature.py",
    "fisher": "in test_curvature.py",
    "hessian": "in test_curvature.py",
    "feature_metric": "in test_curvature.py",
    "score": "in test_curvature.py",
    "tap": "in test_curvature.py",
    "Diagnostics": "what is returned",
    "Normalization": "what is returned",
    "LLQRDiagnostics": "what is returned",
    "LLQRState": "what is returned",
    "StructureObjective": "what is returned",
    "llqr": "in test_llqr.py",
    "published": "in test_llqr.py",
    "refresh": "in test_llqr.py",
    "Scalar": "takes no numbers",
    "Diagonal": "takes no numbers",
    "DiagonalKronecker": "takes no numbers",
    "Kronecker": "takes no numbers",
    "PSDKronecker": "takes no numbers",
    "EigenKronecker": "takes no numbers",
    "Dense": "takes no numbers",
    "Stacked": "takes no numbers",
    "default_structure": "takes no numbers",
    "GradientProbe": "takes no numbers",
    "ExactStep": "integers",
    "LinearCG": "integers",
    "NormalEquations": "integers",
    "GaussianProbe": "integers",
    "RademacherProbe": "integers",
    "HeavyBall": "in test_llqr.py",
    "SoftargmaxJacobian": "what is returned",
    "RiskDescent": "what is returned",
    "ProspectState": "what is returned",
    "LSVRGState": "what is returned",
    "Permutations": "integers",
    "Subsets": "zeros and ones",
    "spectrum": "takes Python numbers",
    "Enumeration": "in those of energies",
    "as_loss": "in what takes a loss",
    "Constant": "what a number stands for",
    "DampingState": "what is returned",
    "Found": "what is returned",
    "KFACState": "what is returned",
    "kfac": "an optimizer",
    "recommended": "an optimizer",
    "Layers": "what is returned",
    "Linearization": "what is returned",
    "OUTCOMES": "what is returned",
    "Proposal": "what is returned",
    "Solved": "what is returned",
}


def kinds(*instances):
    """The names of the classes of objects, and of all that they hold."""
    for instance in instances:
        if isinstance(instance, eqx.Module):
            yield type(instance).__name__
            yield from kinds(*vars(instance).values())


def test_all_that_is_public_is_drawn():
    """A new loss, generator, operator or oracle needs a line in one of the tables."""
    drawn = {name.split(" ")[0] for name in OPERATORS} | {"Alpha", "generator"}
    drawn |= set(kinds(*(loss for loss, _ in LOSSES.values())))
    drawn |= set(kinds(*FAMILIES.values(), *EVERY.values()))
    drawn |= {"prox_prop"} if "proximal back-propagation" in EVERY else set()
    public = {
        name
        for module in (dp.losses, dp.optim, dp.oracles)
        for name, item in vars(module).items()
        if name[0] != "_" and getattr(item, "__module__", "").startswith("diffprog")
    }
    public = {name for name in public if not name.startswith("Abstract")}
    assert public - drawn - set(NOT_DRAWN) == set()
    assert set(NOT_DRAWN) <= public and not drawn & set(NOT_DRAWN)
