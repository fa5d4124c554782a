"""Ready-made manifolds: inverses of each other, exact derivatives, errors in words."""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, HealthCheck, Phase, settings, strategies as st

from diffprog._chain.manifold import Manifold
from diffprog._common.fast_loops import compiled, obstacle
from diffprog.manifolds import Angle, Blocks, Euclidean, Product, UnitQuaternion


TREE = Product(dict(position=Euclidean(), attitude=UnitQuaternion(), joints=Angle()))
ARRAY = Blocks((3, Euclidean()), (4, UnitQuaternion()), (2, Angle()))
AXIS = np.array([0.6, -0.48, 0.64])
ONE = np.array([1.0, 0.0, 0.0, 0.0])


def quaternion(rng, dtype=float):
    q = rng.normal(size=4)
    return jnp.asarray(q / np.linalg.norm(q), dtype)


def point(rng, manifold, dtype=float) -> Any:
    """A state of `TREE`, or of one of its parts, or of `ARRAY`."""
    draw = lambda size: jnp.asarray(2 * rng.normal(size=size), dtype)
    parts = dict(position=draw(3), attitude=quaternion(rng, dtype), joints=draw(2))
    if manifold is TREE:
        return parts
    if manifold is ARRAY:
        return jnp.concatenate([parts["position"], parts["attitude"], parts["joints"]])
    return parts[{Euclidean: "position", Angle: "joints"}.get(manifold, "attitude")]


MANIFOLDS = {
    "Euclidean": Euclidean(),
    "Angle": Angle(),
    "UnitQuaternion": UnitQuaternion(),
    "Product": TREE,
    "Blocks": ARRAY,
}


def states(name, rng, dtype=float):
    manifold = MANIFOLDS[name]
    kind = manifold if manifold in (TREE, ARRAY) else type(manifold)
    return [point(rng, kind, dtype) for _ in range(2)]


def same(name, x, y, eps):
    """Angles up to whole turns, attitudes up to the sign."""
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        if name == "Angle":
            a, b = (jnp.stack([jnp.cos(z), jnp.sin(z)]) for z in (a, b))
        if name == "UnitQuaternion":
            b = b * jnp.sign(a @ b)
        np.testing.assert_allclose(a, b, rtol=eps, atol=eps)


def parts_of(name, state):
    """Pairs of a simple manifold and its part of a state."""
    if name == "Product":
        names = dict(position="Euclidean", attitude="UnitQuaternion", joints="Angle")
        return [(kind, state[key]) for key, kind in names.items()]
    if name == "Blocks":
        kinds = "Euclidean", "UnitQuaternion", "Angle"
        return list(zip(kinds, jnp.split(state, [3, 7]), strict=True))
    return [(name, state)]


@ft.cache
def program(name):
    m = MANIFOLDS[name]

    def both_ways(x, y):
        v = m.difference(x, y)
        again = m.retract(y, v)
        return v, again, m.difference(again, y), m.difference(y, y)

    return jax.jit(both_ways)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_differences_and_retractions_are_inverse(name):
    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(seed=st.integers(0, 2**31), single=st.booleans())
    def check(seed, single):
        dtype = jnp.float32 if single else jnp.float64
        x, y = states(name, np.random.default_rng(seed), dtype)
        v, again, same_v, zero = program(name)(x, y)
        eps = 32 * float(jnp.finfo(dtype).eps)
        assert {a.dtype for a in jax.tree.leaves((v, again))} == {jnp.dtype(dtype)}
        for a, b in zip(parts_of(name, x), parts_of(name, again), strict=True):
            same(a[0], a[1], b[1], eps)
        same("", v, same_v, eps)
        assert not any(jnp.any(a) for a in jax.tree.leaves(zero))

    check()


@pytest.mark.parametrize("name", MANIFOLDS)
def test_rows_are_states_of_their_own(name):
    """By `vmap`; and arrays of angles and quaternions are rows as they are."""
    rng, m = np.random.default_rng(0), MANIFOLDS[name]
    pairs = [states(name, rng) for _ in range(3)]
    xs, ys = (jax.tree.map(lambda *a: np.stack(a), *rows) for rows in zip(*pairs))

    @jax.jit
    def mapped(xs, ys):
        vs = jax.vmap(m.difference)(xs, ys)
        return vs, jax.vmap(m.retract)(ys, vs), m.difference(xs, ys), m.retract(ys, vs)

    vs, retracted, as_they_are, back = mapped(xs, ys)
    for i, (x, y) in enumerate(pairs):
        row = jax.tree.map(lambda a, i=i: np.asarray(a)[i], vs)
        same("", row, program(name)(x, y)[0], 1e-14)
    same("", as_they_are, vs, 1e-14)
    same("", back, retracted, 1e-14)
    assert m == MANIFOLDS[name] and hash(m) == hash(MANIFOLDS[name])
    assert jax.tree.leaves(m) == []


def test_angles_differ_by_the_shorter_way():
    turn = jnp.deg2rad(jnp.array([350.0, -350.0, 180.0, 0.0, 730.0]))
    v = Angle().difference(turn, jnp.zeros(5))
    np.testing.assert_allclose(jnp.rad2deg(v), [-10, 10, 180, 0, 10], atol=1e-12)
    np.testing.assert_array_equal(Angle().retract(turn, v), turn + v)
    slopes = jax.jacobian(Angle().difference)(turn, jnp.zeros(5))
    np.testing.assert_array_equal(slopes, jnp.eye(5))


def with_derivatives(fn, count=3):
    """The value and the first derivatives, each traced once."""
    if count == 0:
        return lambda s: [fn(s)]

    def known(s):
        found = with_derivatives(fn, count - 1)(s)
        return found[-1], found

    def extended(s):
        derivative, found = jax.jacfwd(known, has_aux=True)(s)
        return [*found, derivative]

    return extended


@ft.partial(jax.jit, static_argnums=0)
def derivatives(fn, s):
    """The value and the first three derivatives of a function of a number, in rows."""
    return jax.vmap(with_derivatives(fn))(s)


def turned(s, y=ONE):
    return UnitQuaternion().retract(jnp.asarray(y, s.dtype), s * AXIS.astype(s.dtype))


def read(s):
    """The rotation vector of a quaternion in closed form."""
    axis = AXIS.astype(s.dtype)
    x = jnp.concatenate([jnp.cos(s / 2)[None], jnp.sin(s / 2) * axis])
    return UnitQuaternion().difference(x, jnp.asarray(ONE, s.dtype))


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_attitudes_have_exact_derivatives_up_to_the_third(dtype):
    """Along an axis, at 0 and on both sides of where the series ends, 2 rad."""
    eps = 8 * float(jnp.finfo(dtype).eps)
    s = jnp.concatenate([jnp.linspace(-7, 7, 201), 2 + jnp.array([-1e-9, 0.0, 1e-9])])
    s = s.astype(dtype)
    waves = np.asarray(s)[:, None] / 2
    for k, found in enumerate(derivatives(turned, s)):
        assert found.dtype == dtype
        angle = waves + k * np.pi / 2
        desired = np.concatenate([np.cos(angle), np.sin(angle) * AXIS], 1) / 2**k
        np.testing.assert_allclose(found, desired, rtol=0, atol=eps)
    inside = s[jnp.abs(s) < 3.1]
    desired = [np.outer(inside, AXIS), AXIS[None], 0.0, 0.0]
    for found, value in zip(derivatives(read, inside), desired, strict=True):
        value = np.broadcast_to(value, found.shape)
        np.testing.assert_allclose(found, value, rtol=0, atol=eps)


@pytest.mark.costly
@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3, 1.9999, 2.5, 3.0])
def test_going_there_and_back_is_the_identity_in_all_derivatives(size):
    """Of all three directions: I, and no second or third derivative."""
    y, v = quaternion(np.random.default_rng(1)), jnp.asarray(size * AXIS)
    m = UnitQuaternion()
    there = lambda v: m.difference(m.retract(y, v), y)
    found = map(np.asarray, jax.jit(with_derivatives(there))(v))
    for tensor, desired in zip(found, (v, np.eye(3), 0.0, 0.0), strict=True):
        np.testing.assert_allclose(tensor, desired + 0 * tensor, atol=4e-15)


def test_attitudes_near_each_other_differ_by_the_right_jacobian():
    """D difference(retract(y, v + d), retract(y, v)) = J_r(v), by Rodrigues."""
    m, y = UnitQuaternion(), quaternion(np.random.default_rng(2))
    v = jnp.array([0.7, -1.1, 0.4])
    near = lambda d: m.difference(m.retract(y, v + d), m.retract(y, v))
    angle = np.linalg.norm(v)
    K = np.cross(v, np.eye(3)).T  # v x
    desired = np.eye(3) - (1 - np.cos(angle)) / angle**2 * K
    desired += (angle - np.sin(angle)) / angle**3 * K @ K
    jacobian, step = jax.jit(jax.jacobian(near)), 1e-5
    np.testing.assert_allclose(jacobian(np.zeros(3)), desired, atol=1e-14)
    hessian = np.asarray(jax.jit(jax.hessian(near))(np.zeros(3)))
    for i in range(3):
        e = step * np.eye(3)[i]
        difference = (np.asarray(jacobian(e)) - jacobian(-e)) / (2 * step)
        np.testing.assert_allclose(hessian[..., i], difference, atol=1e-9)


def test_a_rotation_vector_turns_about_an_axis_of_the_body():
    """y exp(v / 2) has the rotation R(y) R(v), and R(v) is that of Rodrigues."""

    def rotation(q):
        w, u = q[0], np.asarray(q[1:])
        cross = np.cross(u, np.eye(3)).T  # u x
        return np.eye(3) + 2 * w * cross + 2 * cross @ cross

    y, v = quaternion(np.random.default_rng(3)), np.array([0.3, -0.8, 0.5])
    angle = np.linalg.norm(v)
    K = np.cross(v / angle, np.eye(3)).T
    turn = np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K
    x = UnitQuaternion().retract(y, jnp.asarray(v))
    np.testing.assert_allclose(rotation(x), rotation(y) @ turn, atol=1e-14)


def test_both_signs_are_one_attitude():
    rng, m = np.random.default_rng(4), UnitQuaternion()
    x, y = quaternion(rng), quaternion(rng)
    difference = jax.jit(m.difference)
    v = difference(x, y)
    for other in (difference(-x, y), difference(x, -y), difference(3 * x, y / 5)):
        np.testing.assert_allclose(other, v, atol=1e-15)
    np.testing.assert_array_equal(difference(-x, x), 0.0)
    assert np.linalg.norm(v) < math.pi
    back = lambda v: m.difference(-m.retract(x, v), x)
    tensor = jax.jit(jax.jacobian(back))(np.zeros(3))
    np.testing.assert_allclose(tensor, np.eye(3), atol=1e-15)
    half = difference(jnp.array([0.0, 0.0, 1.0, 0.0]), jnp.asarray(ONE))
    np.testing.assert_allclose(half, [0.0, math.pi, 0.0], atol=1e-15)


@pytest.mark.parametrize("dtype, most", [(jnp.float64, 1e-12), (jnp.float32, 3e-4)])
def test_norms_stay_over_ten_thousand_steps(dtype, most):
    v = jnp.asarray([[0.01, 0.02, -0.03], [1.0, 2.0, -1.5]], dtype)
    step = lambda q, _: (UnitQuaternion().retract(q, v), None)
    start = jnp.stack([quaternion(np.random.default_rng(5), dtype)] * 2)
    end, _ = jax.jit(lambda q: jax.lax.scan(step, q, length=10_000))(start)
    norms = np.linalg.norm(np.asarray(end, float), axis=1)
    np.testing.assert_allclose(norms, 1.0, rtol=0, atol=most)


def test_a_product_is_a_prefix_of_the_state():
    """A part may be a tree, and the whole state; parts are applied one by one."""
    rng = np.random.default_rng(6)
    x, y = ({"v": (jnp.ones(2) * i, jnp.ones(1)), "q": quaternion(rng)} for i in (3, 1))
    m = Product({"v": Euclidean(), "q": Product([UnitQuaternion()])})
    x, y = x | {"q": [x["q"]]}, y | {"q": [y["q"]]}
    v = m.difference(x, y)
    np.testing.assert_array_equal(v["v"][0], [2.0, 2.0])
    np.testing.assert_array_equal(
        v["q"][0], UnitQuaternion().difference(x["q"][0], y["q"][0])
    )
    assert jax.tree.structure(m.retract(y, v)) == jax.tree.structure(x)
    np.testing.assert_array_equal(Product(Euclidean()).difference(3.0, 1.0), 2.0)


def test_blocks_are_their_parts_one_after_another():
    rng = np.random.default_rng(7)
    x, y = point(rng, ARRAY), point(rng, ARRAY)
    v = ARRAY.difference(x, y)
    assert v.shape == (8,)
    np.testing.assert_array_equal(v[:3], x[:3] - y[:3])
    np.testing.assert_array_equal(v[3:6], UnitQuaternion().difference(x[3:7], y[3:7]))
    np.testing.assert_array_equal(v[6:], Angle().difference(x[7:], y[7:]))
    own = Manifold(lambda x, y: x[..., :1] - y[..., :1], lambda y, v: y + v)
    mixed = Blocks((2, own), (1, Euclidean()))
    assert mixed.difference(x[:3], y[:3]).shape == (2,)
    np.testing.assert_array_equal(mixed.retract(y[:3], x[:2])[:2], y[:2] + x[0])


@pytest.mark.costly
@pytest.mark.parametrize("name", MANIFOLDS)
def test_loops_of_manifolds_are_fast(name):
    """Every primitive, also of second derivatives, is one that fast loops know."""
    x, y = states(name, np.random.default_rng(8))
    m, (v, *_) = MANIFOLDS[name], program(name)(x, y)

    def around(v):
        return m.retract(y, v), m.difference(m.retract(x, v), y)

    derivative = around
    for _ in range(3):
        assert obstacle(jax.make_jaxpr(derivative)(v)) is None
        derivative = jax.jacfwd(derivative)
    both = lambda v: (around(v), jax.jacfwd(around)(v))
    fast = jax.jit(lambda v: compiled(lambda _: both(v), True))(v)
    same("", fast, jax.jit(both)(v), 1e-12)


def fails(call, message, error: type[Exception] = ValueError):
    with pytest.raises(error) as info:
        call()
    assert str(info.value) == message


@pytest.mark.usefixtures("unchecked")
def test_norms_of_known_quaternions_are_checked():
    m, q = UnitQuaternion(), quaternion(np.random.default_rng(9))
    m.check("x0", q * (1 + 9e-7))
    m.check("x0", q.astype(jnp.float32) * (1 + 9e-4))
    jax.jit(lambda q: m.check("x0", q))(2 * q)  # nothing is known
    advice = "`q / jnp.linalg.norm(q, axis=-1, keepdims=True)`."
    fails(
        lambda: m.check("x0", jnp.array([2.0, 0.0, 0.0, 0.0])),
        "`x0` is a quaternion of norm 2; one of norm 1, up to 1e-06, is expected: "
        + advice,
    )
    fails(
        lambda: m.check("x0", jnp.array([[1.0, 0, 0, 0], [0.5, 0, 0, 0]], jnp.float32)),
        "`x0[1]` is a quaternion of norm 0.5; one of norm 1, up to 0.001, is expected: "
        + advice,
    )
    with pytest.raises(ValueError, match="quaternion of norm nan"):
        m.check("x0", q * jnp.nan)
    state = dict(position=jnp.ones(3), attitude=3 * q, joints=jnp.ones(2))
    with pytest.raises(ValueError, match=r"`x0\['attitude'\]` is .* of norm 3; one"):
        TREE.check("x0", state)
    with pytest.raises(ValueError, match=r"`x0\[..., 3:7\]` is a quaternion of norm 2"):
        ARRAY.check("x0", jnp.concatenate([q[:3], 2 * q, q[:2]]))
    good = jnp.concatenate([q[:3], q, q[:2]])
    assert ARRAY.check("x0", good) is TREE.check("x0", state | {"attitude": q}) is None


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_state_is_refused():
    q = jnp.asarray(ONE)
    fails(
        lambda: UnitQuaternion().difference(q[:3], q),
        "`x` is an array of shape (3,); an array with 4 entries in its last axis is "
        "expected: a unit quaternion has 4, its real part first, and a rotation vector "
        "has 3.",
    )
    with pytest.raises(ValueError, match=r"`v` is an array of shape \(4,\); an array"):
        UnitQuaternion().retract(q, q)
    fails(
        lambda: ARRAY.difference(jnp.ones(9), jnp.ones(8)),
        "`y` is an array of shape (8,); an array with 9 entries in its last axis is "
        "expected, for blocks of 3, 4, 2.",
    )
    with pytest.raises(ValueError, match="`v` is .* 8 entries .* blocks of 3, 3, 2"):
        ARRAY.retract(jnp.ones(9), jnp.ones(9))
    with pytest.raises(ValueError, match=r"`x` is arranged as .*; a tree that begins"):
        TREE.difference(dict(position=q), dict(position=q))
    with pytest.raises(ValueError, match=r"`x0` is arranged as .*; a tree that begins"):
        TREE.check("x0", q)
    tree = Manifold(lambda x, y: {"v": x - y}, lambda y, v: y + v["v"])
    with pytest.raises(TypeError, match="`Manifold.difference` returned .*one array"):
        Blocks((4, tree)).difference(q, q)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_manifold_is_refused():
    expected = "a manifold such as `dp.manifolds.Euclidean()` is expected."
    fails(
        lambda: Product(dict(a=Euclidean)),
        f"`parts['a']` is the class Euclidean; {expected}",
        TypeError,
    )
    wrong: Any = Blocks
    fails(lambda: wrong((3, 4)), f"`blocks[0][1]` is 4; {expected}", TypeError)
    fails(
        lambda: wrong((1, Angle()), Angle()),
        "`blocks[1]` is Angle(); a pair `(size, manifold)` such as "
        "`(4, dp.manifolds.UnitQuaternion())` is expected.",
        TypeError,
    )
    with pytest.raises(ValueError, match=r"`blocks\[0\]\[0\]` is 0; a Python int >= 1"):
        Blocks((0, Angle()))
    with pytest.raises(ValueError, match="no blocks; one pair"):
        Blocks()
