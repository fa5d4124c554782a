"""The problems, directions and searches that the tests run through, listed once."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree

import diffprog as dp
from diffprog._chain.vector import run
from diffprog._chain.vectorize import vectorize


DIRECTIONS = [dp.Gradient(), dp.GaussNewton(), dp.Newton(), dp.ILQR(), dp.DDP()]
BIASED = [dp.MoreauGradient()]  # not 0 at every optimum
SECOND_ORDER = DIRECTIONS[1:]
FOLLOWING = [d for d in DIRECTIONS if isinstance(d.rollout, dp.Feedback)]
SEARCHES = [dp.FixedStep(), dp.Backtracking(), dp.AdaptiveDamping()]
MONOTONE = [s for s in SEARCHES if s.monotone]

name = lambda thing: type(thing).__name__


class Spring(eqx.Module):
    """A mass on a stiffening spring that follows a moving target: convex enough."""

    stiffness: float | jax.Array = 0.3
    weight: float | jax.Array = 0.1
    dt: float = 0.1

    def dynamics(self, x, u, t):
        position, speed = x
        force = u[0] - position - self.stiffness * position**3
        return jnp.stack([position + self.dt * speed, speed + self.dt * force])

    def cost(self, x, u, t):
        target = jnp.sin(0.3 * jnp.asarray(t, x.dtype))
        control = self.weight * u[0] ** 2 + 0.01 * jnp.cosh(u[0])
        return (x[0] - target) ** 2 + 0.1 * x[1] ** 2 + control

    def terminal_cost(self, x):
        return 2.0 * x[0] ** 2 + x[1] ** 2


class Pendulum(eqx.Module):
    """Swing up from rest by a torque, explicit Euler."""

    friction: float | jax.Array = 0.1
    dt: float = 0.05

    def dynamics(self, x, u, t):
        angle, speed = x
        change = u[0] - self.friction * speed - 9.81 * jnp.sin(angle)
        return jnp.stack([angle + self.dt * speed, speed + self.dt * change])

    def cost(self, x, u, t):
        angle, speed = x
        return 0.5 * (0.1 * (angle - jnp.pi) ** 2 + 0.01 * speed**2 + 0.05 * u[0] ** 2)

    def terminal_cost(self, x):
        return 0.5 * (100.0 * (x[0] - jnp.pi) ** 2 + 10.0 * x[1] ** 2)


class Linear(eqx.Module):
    """Linear dynamics and quadratic costs with every term."""

    lqr: dp.LQR

    def dynamics(self, x, u, t):
        lqr = self.lqr
        return lqr.A[t] @ x + lqr.B[t] @ u + lqr.c[t]

    def cost(self, x, u, t):
        lqr = self.lqr
        quadratic = x @ lqr.Q[t] @ x + u @ lqr.R[t] @ u
        return quadratic / 2 + x @ lqr.M[t] @ u + lqr.q[t] @ x + lqr.r[t] @ u

    def terminal_cost(self, x):
        return x @ self.lqr.Q_final @ x / 2 + self.lqr.q_final @ x


@ft.partial(jax.jit, static_argnames=("T", "n", "m", "dtype"))
def random_lqr(key, T=12, n=3, m=2, dtype=jnp.float64) -> dp.LQR:
    normal = lambda i, *shape: jax.random.normal(
        jax.random.fold_in(key, i), shape, dtype
    )
    square = lambda a: jnp.einsum("...ij,...kj->...ik", a, a)
    joint = (
        square(normal(0, T, n + m, n + m)) / (n + m)
        + 0.1 * jnp.eye(n + m, dtype=dtype)[None]
    )
    return dp.LQR(
        A=0.6 * normal(1, T, n, n),
        B=normal(2, T, n, m),
        c=0.1 * normal(3, T, n),
        Q=joint[:, :n, :n],
        R=joint[:, n:, n:],
        M=joint[:, :n, n:],
        q=normal(4, T, n),
        r=normal(5, T, m),
        Q_final=square(normal(6, n, n)),
        q_final=normal(7, n),
    )


def spring(T=12, dtype=jnp.float64):
    x0, us = jnp.asarray([1.0, 0.0], dtype), jnp.full((T, 1), 0.1, dtype)
    return dp.ControlProblem.from_system(Spring(), T), x0, us


def pendulum(T=100, dtype=jnp.float64):
    x0, us = jnp.zeros(2, dtype), jnp.zeros((T, 1), dtype)
    return dp.ControlProblem.from_system(Pendulum(), T), x0, us


@ft.cache
def linear(T=12, dtype=jnp.float64):
    key = jax.random.key(0)
    problem = dp.ControlProblem.from_system(Linear(random_lqr(key, T, dtype=dtype)), T)
    return problem, jnp.asarray([1.0, -1.0, 0.5], dtype), jnp.ones((T, 2), dtype)


@ft.cache
def ragged(dtype=jnp.float64):
    """A network of three tanh layers, 3-5-4-2, whose parameters are the controls."""
    widths = (3, 5, 4, 2)

    def layer(n, m):
        def dynamics(x, u, t):
            return jnp.tanh(u["weight"] @ x + u["bias"])

        regularize = lambda x, u, t: 0.01 * sum(jnp.sum(w**2) for w in u.values())
        return dp.Phase(dynamics, regularize, 1)

    chain = dp.Chain(
        tuple(layer(n, m) for n, m in zip(widths, widths[1:])),
        lambda x: jnp.sum((x - 0.3) ** 2) + jnp.sum(x**4),
    )
    keys = jax.random.split(jax.random.key(1), 3)
    us = tuple(
        dict(
            weight=jax.random.normal(key, (1, m, n), dtype) / 2,
            bias=jnp.zeros((1, m), dtype),
        )
        for key, n, m in zip(keys, widths, widths[1:])
    )
    return chain, jnp.asarray([0.5, -1.0, 2.0], dtype), us


@ft.cache
def two_phase(dtype=jnp.float64):
    """A rocket with two stages: height, speed and fuel; then height and speed only."""
    burn = lambda x, u, t: jnp.stack(
        [
            x[0] + 0.1 * x[1],
            x[1] + 0.1 * (u[0] / (1 + x[2] ** 2) - 1),
            x[2] - 0.05 * u[0],
        ]
    )
    drop = lambda x, u, t: x[:2] + 0.1 * u[:1] * jnp.asarray([0.0, 1.0], x.dtype)
    glide = lambda x, u, t: jnp.stack(
        [x[0] + 0.1 * x[1], x[1] + 0.1 * jnp.sin(u[1]) - 0.1 + 0.1 * u[0]]
    )
    effort = lambda x, u, t: 0.05 * jnp.sum(u**2) + 0.01 * jnp.sum(x**2)
    chain = dp.Chain(
        (
            dp.Phase(burn, effort, 5),
            dp.Phase(drop, effort, 1),
            dp.Phase(glide, effort, 6),
        ),
        lambda x: (x[0] - 1.0) ** 2 + x[1] ** 2,
    )
    us = tuple(jnp.full(shape, 0.2, dtype) for shape in ((5, 1), (1, 1), (6, 2)))
    return chain, jnp.asarray([0.0, 0.0, 1.0], dtype), us


PROBLEMS = dict(
    spring=spring, linear=linear, ragged=ragged, two_phase=two_phase, pendulum=pendulum
)


def close(a, b, rtol=1e-12, scale: str | float = "entry"):
    """Asserts |a - b| <= rtol * scale for the arrays of two trees.

    The scale is a number, or "entry": 1 + |b|, or "largest": the largest |b| of an
    array, or "norm": the Euclidean one over all arrays, as that of a - b then is.
    """
    a, b = (eqx.filter(tree, eqx.is_array_like) for tree in (a, b))
    if jtu.all_leaves([a]):
        pairs = [(a, b)]  # numbers in a list are an array too
    else:
        assert jtu.tree_structure(a) == jtu.tree_structure(b)
        pairs = list(zip(jtu.tree_leaves(a), jtu.tree_leaves(b)))
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    assert pairs
    if scale == "norm":
        a, b = (np.concatenate([x.ravel() for x in side]) for side in zip(*pairs))
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= rtol * size, error / size
        return
    for a, b in pairs:
        if scale == "entry":
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
        else:
            size = np.max(np.abs(b)) if scale == "largest" else float(scale)
            assert np.isfinite(size)
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * size)


def objective(problem, x0):
    """The cost as a function of the controls, through the public roll-out."""
    return lambda us: dp.rollout(problem, x0, us).cost


@ft.cache
def gradient(chain):
    """The gradient of the cost of the problem of this name, compiled once."""
    problem, x0, _ = PROBLEMS[chain]()
    return jax.jit(jax.grad(objective(problem, x0)))


class Dense(eqx.Module):
    """total(outputs(w)) at a vector: its value h, J of the outputs, g and H in them."""

    h: jax.Array
    J: jax.Array
    g: jax.Array
    H: jax.Array

    @property
    def gradient(self):
        return self.J.T @ self.g

    @property
    def gauss_newton(self):
        return self.J.T @ self.H @ self.J

    def decrease(self, step):
        """Of the model without damping."""
        return -self.gradient @ step - step @ self.gauss_newton @ step / 2

    def step(self, damping):
        return damped_step(self.gauss_newton, self.gradient, damping)


def dense(outputs, total, w) -> Dense:
    J, out = jax.jacfwd(lambda w: 2 * (outputs(w),), has_aux=True)(w)
    h, g = jax.value_and_grad(total)(out)
    return Dense(h, J, g, jax.hessian(total)(out))


def damped_step(matrix, gradient, damping):
    xp = jnp if isinstance(gradient, jax.Array) else np
    return -xp.linalg.solve(matrix + damping * xp.eye(len(gradient)), gradient)


def dense_step(problem, method, x0, us):
    """The Gauss-Newton or Newton step of a damping from dense derivatives, a vector."""
    flat, unravel = ravel_pytree(us)

    @jax.jit
    def step(damping):
        outputs, total = _outputs(problem, x0, unravel, flat)
        d = dense(outputs, total, flat)
        if type(method) is not dp.Newton:
            return d.step(damping)
        hessian = jax.hessian(lambda w: total(outputs(w)))(flat)
        return damped_step(hessian, d.gradient, damping)

    return step


def _outputs(problem, x0, unravel, flat):
    """All states and controls from the controls, and the total cost of those."""
    phases = [phase for phase in problem.phases for _ in range(phase.horizon)]

    def roll(flat):
        x, pairs = x0, []
        stages = [
            jtu.tree_map(lambda a: a[i], us)
            for phase, us in zip(problem.phases, problem.split(unravel(flat)))
            for i in range(phase.horizon)
        ]
        for t, (phase, u) in enumerate(zip(phases, stages)):
            pairs.append((x, u))
            x = phase.dynamics(x, u, t)
        return pairs, x

    _, back = ravel_pytree(roll(flat))

    def total(vector):
        pairs, last = back(vector)
        costs = [phases[t].cost(x, u, t) for t, (x, u) in enumerate(pairs)]
        return sum(costs) + problem.terminal_cost(last)

    return lambda flat: ravel_pytree(roll(flat))[0], total


def vectors(problem, x0, us):
    """The chain of vectors and its trajectory, for tests of the recursions."""
    vectorized = vectorize(problem, x0, us)
    return vectorized.chain, run(vectorized.chain, *vectorized.ravel(x0, us))


class Scaled(eqx.Module):
    """The smallest model: a factor for each entry."""

    factor: jax.Array

    def __call__(self, x):
        return self.factor * x


def one_stage(J):
    """The problem min J(u) in one stage with x' = u."""
    return dp.ControlProblem(_control, _nothing, J, 1)


def _control(x, u, t):
    return u


def _nothing(x, u, t):
    return 0.0


def equations(jaxpr):
    """All of a program, and of what it calls."""
    for equation in jaxpr.eqns:
        yield equation
        values = list(equation.params.values())
        for value in jax.tree.leaves(values, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
