"""Parts of a user that break their contract: class, method and what is due are told.

Numbers that cannot be known before the run never end in a success.
"""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import diffprog as dp
from diffprog.extend import simulate
from diffprog.losses import AbstractDivergence, AbstractLoss, f_softargmax

from . import helpers
from .test_extending import Arsinh, Clipped, GainRatio, Quantile
from .test_losses import Scaled


def own(cls, **methods):
    """A class as a user may write it, with other methods."""
    hidden = ("__dict__", "__weakref__", "__init__", "_abc_impl")
    body = {k: v for k, v in vars(cls).items() if k not in hidden} | methods
    return type("Own", cls.__bases__, body)


@pytest.mark.parametrize(
    "method, answer, message",
    [
        ("link", lambda self, u: jnp.sum(u), "returned .* an array of that shape"),
        ("pair", lambda self, w: w, "returned .* two arrays of that shape"),
        ("mean_step", lambda self, S, Q: None, "returned None .* an array"),
    ],
)
def test_a_divergence_answers_for_every_entry(method, answer, message):
    f = own(Arsinh, **{method: answer})()
    with pytest.raises(ValueError, match=f"`Own.{method}` {message}"):
        f_softargmax(jnp.zeros((2, 3)), f, "unit")


def test_a_divergence_with_a_wrong_signature():
    f = own(Arsinh, conjugate=lambda self: 0.0)()
    with pytest.raises(TypeError) as caught:
        f_softargmax(jnp.zeros((2, 3)), f, "unit")
    assert "`Own.conjugate` was given 1 array." in caught.value.__notes__


def test_numbers_of_a_divergence_fit_the_rows():
    with pytest.raises(ValueError, match="`c` has shape .7,.; one that broadcasts"):
        f_softargmax(jnp.zeros((2, 3)), Scaled(jnp.ones(7)), "unit")  # pyright: ignore


def test_missing_methods():
    told = r"`Half` has no method `conjugate\(w\)`, which returns `Array`: f"
    with pytest.raises(TypeError, match=told):

        class Half(AbstractDivergence):
            sparse: ClassVar[bool] = False

    told = r"`Quarter` has no method `__call__\(outputs, targets\)`, which returns"
    with pytest.raises(TypeError, match=told):

        class Quarter(AbstractLoss):
            smooth: ClassVar[bool] = True


def direction(loss, oracle):
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    vd = dp.value_and_direction(loss, oracle)
    return vd(model, jnp.ones((4, 2)), jnp.zeros((4, 3)))


@pytest.mark.parametrize(
    "method, solver",
    [
        ("__call__", None),
        ("gradient", None),
        ("conjugate", None),
        ("conjugate_prox", None),
        ("conjugate_prox", dp.oracles.ProximalGradient()),
        ("block_update", dp.oracles.CoordinateAscent()),
    ],
)
def test_a_loss_answers_for_every_example(method, solver):
    loss = own(Quantile, **{method: lambda self, *arguments: jnp.zeros(7)})()
    with pytest.raises(ValueError, match=f"`Own.{method}` returned .*shape .7,"):
        direction(loss, dp.oracles.ProxLinear(1.0, solver))


@pytest.mark.parametrize("method", ["count", "hessian_mv", "factor"])
def test_a_loss_that_forgets_to_return(method):
    loss = own(Quantile, **{method: lambda self, *arguments: None})()
    with pytest.raises((TypeError, ValueError), match=f"`Own.{method}` .*None; "):
        solver = dp.oracles.CG() if method == "hessian_mv" else dp.oracles.Cholesky()
        direction(loss, dp.oracles.GaussNewton(1.0, solver))


# Control --------------------------------------------------------------------------


def solved(method: Any = dp.GaussNewton(), search=dp.Backtracking(), **options):
    problem, x0, us = helpers.spring()
    return dp.solve(problem, method, x0, us, search, **options)


def replaced(**fields):
    """An answer whose fields are replaced."""
    change = lambda record: {n: f(getattr(record, n)) for n, f in fields.items()}
    return lambda record: dataclasses.replace(record, **change(record))


def careless(method, answer):
    """Gauss-Newton, one of whose methods answers something else."""

    def changed(self, *given):
        return answer(getattr(dp.GaussNewton(), method)(*given))

    return own(dp.GaussNewton, **{method: changed})()


turned = lambda gains: tuple(a.mT for a in gains)
BAD_DIRECTIONS = [
    ("backward", lambda s: s.gains, "returned .*; one `Sweep` is expected"),
    (
        "backward",
        replaced(gains=turned),
        r"gains of .*12, 1, 3\),\), are expected",
    ),
    ("backward", replaced(gains=lambda g: g[0]), "one array for each segment"),
    ("backward", replaced(slope=lambda s: s[None]), r"`slope` is of shape \(1,\)"),
    (
        "backward",
        replaced(positive=lambda p: p.astype(float)),
        "dtype float64; .* dtype bool",
    ),
    ("expand", lambda e: e.model, "returned .*; one `Expansion` is expected"),
    ("expand", replaced(first_nonfinite=lambda f: None), "is None; one number"),
]


@pytest.mark.parametrize("method, answer, message", BAD_DIRECTIONS)
def test_a_direction_answers_with_its_records(method, answer, message, unchecked):
    direction = careless(method, answer)
    problem, x0, us = helpers.spring()
    for call in (solved, lambda d: dp.direction(problem, d, x0, us)):
        with pytest.raises(
            (TypeError, ValueError), match=f"`Own.{method}` .*{message}"
        ):
            call(direction)


def test_a_rollout_answers_with_trajectory_and_changes(unchecked):
    lost = own(Clipped, roll=lambda self, *given: Clipped().roll(*given)[0])()
    method = own(dp.GaussNewton, rollout=lost)()
    with pytest.raises(TypeError, match="(?s)`Own.roll` returned .*v of every stage"):
        solved(method)


BAD_SEARCHES = [
    ("init", lambda s: None, "returned None; one `SearchState` is"),
    ("init", replaced(damping=lambda d: d[None]), r"`damping` is of shape \(1,\)"),
    ("begin", replaced(trials=lambda t: t.astype(float)), "`trials` .* dtype int32"),
    ("step", lambda found: found[0], "returned .*; two things, a `SearchState` and a"),
    ("step", lambda found: found[::-1], "returned .*; one `SearchState` is expected"),
    (
        "reject",
        lambda f: (f[0], replaced(fail=lambda f: f.astype(float))(f[1])),
        "`fail` is .* dtype bool",
    ),
]


@pytest.mark.parametrize("method, answer, message", BAD_SEARCHES)
def test_a_search_answers_with_its_records(method, answer, message, unchecked):
    def changed(self, *given):
        return answer(getattr(GainRatio(), method)(*given))

    search = own(GainRatio, **{method: changed})()
    with pytest.raises(TypeError, match=f"`Own.{method}` .*{message}"):
        solved(search=search)


@pytest.mark.costly("search")
@pytest.mark.parametrize(
    "answer",
    [
        replaced(gains=lambda g: tuple(-a for a in g), slope=lambda s: -s),
        replaced(slope=lambda s: -s, decrement=lambda d: 0 * d),
        replaced(slope=lambda s: 0 * s, decrement=lambda d: 0 * d),
        replaced(decrement=lambda d: -d),
        replaced(slope=lambda s: s * jnp.nan, decrement=lambda d: 0 * d),
    ],
    ids=["ascent", "slope", "no slope", "decrement", "nan"],
)
@pytest.mark.parametrize("search", helpers.SEARCHES, ids=helpers.name)
def test_a_slope_that_is_not_negative_is_no_success(answer, search):
    method = careless("backward", answer)
    solution = solved(method, search, throw=False, max_steps=8)
    assert not solution.success
    with pytest.raises(dp.SolveError):
        solved(method, search, max_steps=8)


def test_what_can_change_in_a_field_is_refused_by_name():
    class Counting(dp.AbstractDirection):
        log: Any = eqx.field(static=True)

        rollout: ClassVar[dp.AbstractRollout] = dp.Feedback()

        def expand(self, chain, trajectory):
            return dp.GaussNewton().expand(chain, trajectory)

        def backward(self, chain, trajectory, model, damping):
            return dp.GaussNewton().backward(chain, trajectory, model, damping)

    assert solved(Counting((1, 2))).success
    told = "`Counting` holds `log`, an object of type `set`: it can change"
    with pytest.raises(TypeError, match=told):
        solved(Counting({1, 2}))


def test_a_direction_or_search_without_a_method():
    told = r"`Half` has no method `backward\(chain, .*\)`, which returns `Sweep`: One"
    with pytest.raises(TypeError, match=told):

        class Half(dp.AbstractDirection):
            rollout: ClassVar[dp.AbstractRollout] = dp.Feedback()

            def expand(self, chain, trajectory):
                return dp.GaussNewton().expand(chain, trajectory)

    told = r"`Quarter` has no method `begin\(.*\)`, which returns `SearchState`: "
    with pytest.raises(TypeError, match=told):

        class Quarter(dp.AbstractSearch):
            def init(self, dtype):
                return dp.Backtracking().init(dtype)


def test_a_rollout_that_forgets_gaps_is_told():
    class Forgetful(dp.AbstractRollout):
        keeps_limits: ClassVar[bool] = True

        def roll(self, chain, trajectory, model, gains, stepsize):
            control = lambda segment, x, _, u, gains: (u, None, gains[:, 0])
            x0, data = trajectory.xs[0][0], (trajectory.us, gains)
            return simulate(chain, control, x0, None, *data)

    class Own(dp.AbstractDirection):
        rollout: ClassVar[dp.AbstractRollout] = Forgetful()

        def expand(self, chain, trajectory):
            return dp.ILQR().expand(chain, trajectory)

        def backward(self, chain, trajectory, model, damping):
            return dp.ILQR().backward(chain, trajectory, model, damping)

    problem, x0, us = helpers.spring()
    with pytest.raises(TypeError, match="gaps=trajectory.left"):
        dp.solve(problem, Own(), x0, us, xs=jnp.zeros((13, 2)))
