"""Local coordinates that change their number from phase to phase, and wrong ones."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest

import diffprog as dp
from diffprog.manifolds import Blocks, Euclidean, Product, UnitQuaternion

from .helpers import close


DT = 0.1
attitude = UnitQuaternion()
WITH_RATES = Blocks((4, attitude), (3, Euclidean()))


def turned(x, u, t):
    """An attitude, or one with its rates."""
    if x.size == 4:
        return attitude.retract(x, DT * u)
    q, w = jnp.split(x, [4])
    return jnp.concatenate([attitude.retract(q, DT * w), w + DT * u])


def axis(q):
    """Where the z-axis of the body points: x and y."""
    return 2 * jnp.stack([q[1] * q[3] + q[0] * q[2], q[2] * q[3] - q[0] * q[1]])


@pytest.mark.slow
def test_phases_differ_in_coordinates():
    """Attitude and rates, then the attitude alone, then a point in the plane."""
    cost = lambda x, u, t: 0.01 * jnp.sum(u**2)
    phases = (
        dp.Phase(turned, cost, 3, (-99.0, 99.0)),  # which come with multipliers
        dp.Phase(lambda x, u, t: turned(x, u, t)[:4], cost, 1),
        dp.Phase(lambda x, u, t: axis(x) + DT * u[:2], cost, 1),
        dp.Phase(lambda x, u, t: x + DT * u, cost, 2),
    )
    kinds = {7: WITH_RATES, 4: attitude, 2: Euclidean()}
    manifold = dp.Manifold(
        lambda x, y: kinds[y.size].difference(x, y),
        lambda y, v: kinds[y.size].retract(y, v),
    )
    last = lambda x: 5 * jnp.sum((x - jnp.array([0.5, -0.3])) ** 2)
    chain = dp.Chain(phases, last, manifold=manifold)
    us = tuple(jnp.full((p.horizon, m), 0.1) for p, m in zip(phases, (3, 3, 3, 2)))
    x0 = jnp.zeros(7).at[0].set(1.0)
    solve = ft.partial(dp.solve, chain, dp.ILQR(), x0, us, rtol=1e-15, atol=1e-15)
    found = solve()
    sizes = [policy.K.shape[-2:] for policy in found.policy]
    assert sizes == [(3, 6), (3, 6), (3, 3), (2, 2)]
    gradient = jax.grad(lambda us: dp.rollout(chain, x0, us).cost)(found.us)
    assert max(jnp.max(jnp.abs(g)) for g in gradient) < 1e-7
    sizes = [rows.shape[-1] for rows in found.multipliers.costates]
    assert sizes == [6, 6, 3, 2, 2]
    q = found.xs[2][0]
    close(found.policy[2](4, -q), found.policy[2](4, q), 1e-12)
    away = jtu.tree_map(lambda a: a + 0.01, dp.rollout(chain, x0, us).xs)
    again = solve(xs=away)
    assert again.history["gap"][0] > 0.01 and again.stats["gap"] == 0
    close(again.us, found.us, 1e-6)


class Nearly(dp.AbstractManifold):
    """Its maps for derivatives have other coordinates."""

    def difference(self, x, y):
        return x - y

    def retract(self, y, v):
        return y + v

    def near(self):
        return dp.Manifold(lambda x, y: (x - y)[:1], lambda y, v: y + v)


cost = lambda x, u, t: sum(map(jnp.sum, jtu.tree_leaves((x, u))))
last = lambda x: cost(x, 0.0, 0)
subtract, add = lambda x, y: x - y, lambda y, v: y + v


def call(manifold: Any, x0: Any = jnp.zeros(2), joint=lambda x, u, t: x, m=2):
    """A solve of three phases; the state may change between the last two."""
    stay = lambda x, u, t: x
    given = (stay, 2), (joint, 1), (stay, 2)
    phases = tuple(dp.Phase(dynamics, cost, horizon) for dynamics, horizon in given)
    chain = dp.Chain(phases, last, manifold=manifold)
    us = tuple(jnp.zeros((horizon, m)) for _, horizon in given)
    return dp.solve(chain, dp.ILQR(), x0, us)


@pytest.mark.usefixtures("unchecked")
def test_one_manifold_serves_all_phases():
    level = jnp.zeros(7).at[0].set(1.0)
    known = r"state of stage 3 has the shapes \(4,\), and `x0` \(7,\): one manifold"
    expected = "blocks of 4, 3"
    for message in (known, expected):
        with pytest.raises(ValueError, match=message):
            call(WITH_RATES, level, lambda x, u, t: x[:4])
    tree = Product(dict(q=attitude, w=Euclidean()))
    known = r"stage 3 has the shapes \{'q': \(4,\)\}, and `x0` \{'q': \(4,\), 'w'"
    with pytest.raises(ValueError, match=known):
        state = dict(q=level[:4], w=level[4:])
        call(tree, state, lambda x, u, t: dict(q=x["q"]))
    message = r"`manifold` is \(UnitQuaternion\(\), Euclidean\(\)\); .* all phases"
    with pytest.raises(TypeError, match=message):
        call((attitude, Euclidean()))
    message = "`Phase` takes no `manifold`: that of `dp.Chain` serves all phases"
    with pytest.raises(TypeError, match=message):
        other: Any = dict(manifold=attitude)
        dp.Phase(turned, cost, 3, **other)


@pytest.mark.usefixtures("unchecked")
def test_coordinates_of_another_size():
    longer = lambda x, y: jnp.concatenate([x - y, jnp.zeros(1)])
    message = r"`difference` returned \(3,\), 3 local .*1 to 2 are expected"
    with pytest.raises(ValueError, match=message):
        call(dp.Manifold(longer, lambda y, v: y + v[:2]))
    with pytest.raises(ValueError, match=r"returned \(0,\), 0 local .*1 to 2 are"):
        call(dp.Manifold(lambda x, y: (x - y)[:0], add))
    message = r"`retract` .* coordinates of \(2,\), as `difference` returned them"
    with pytest.raises(TypeError, match=message):
        call(dp.Manifold(subtract, lambda y, v: y + v["v"]))
    # At another kind of state than `x0`.
    wider = lambda x, u, t: jnp.concatenate([x, u])[:3]
    at = lambda size, one, other: lambda y, v: (one if y.size == size else other)(y, v)
    cut = lambda x, y: (x - y)[:2]
    for message in (r"coordinates of \(2,\), as", "state of stage 3 has the shapes"):
        with pytest.raises(TypeError, match=message):
            call(dp.Manifold(at(2, subtract, cut), add), joint=wider)
    with pytest.raises(ValueError, match=r"returned \(3,\); a state, \(2,\)"):
        call(dp.Manifold(subtract, at(3, add, longer)))


@pytest.mark.usefixtures("unchecked")
def test_coordinates_that_depend_on_values():
    for choose in (
        lambda x, y: (x - y)[x != y],
        lambda x, y: x - y if x[0] > 0 else (x - y)[:1],
    ):
        with pytest.raises(Exception, match="`jnp.where` chooses between values"):
            call(dp.Manifold(choose, add))
    message = r"`near\(\)` .* \(1,\), .* \(2,\), .*both must agree"
    with pytest.raises(ValueError, match=message):
        call(Nearly())
