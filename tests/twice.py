"""Every public function, called with numbers that change: `CALLS[name](numbers(i))`.

A new function is tested by adding a line. What a user has at hand, `numbers(i)`, is
made before the calls are counted: making it compiles as well.
"""

import functools as ft
import tempfile
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import diffprog as dp
from diffprog import losses, optim
from diffprog.losses import (
    Alpha,
    ChiSquare,
    Jeffreys,
    JensenShannon,
    KL,
    LeCam,
    Neyman,
    ReverseKL,
    SquaredHellinger,
)

from . import helpers, test_loss_interface as interface


@ft.cache
def numbers(i: int) -> SimpleNamespace:
    """What calls are made of: arrays and Python floats, others for every i."""
    rng = np.random.default_rng(i)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    layers = [eqx.nn.Linear(3, 4, key=jr.key(i)), jnp.tanh]
    stacked = [*layers, *[eqx.nn.Linear(4, 4, key=jr.key(j)) for j in range(i, i + 4)]]
    size, problem = 1.25 + i / 8, helpers.spring(T=3)
    return SimpleNamespace(
        size=size,
        alpha=jnp.asarray(size),
        row=draw(3),
        rows=draw(4, 3),
        labels=jnp.asarray(rng.integers(3, size=4)),
        soft=jnp.asarray(rng.dirichlet(np.ones(3), size=4)),
        signs=jnp.asarray(np.sign(rng.normal(size=4))),
        mask=jnp.asarray(rng.integers(2, size=4) > 0),
        potentials=draw(4, 3, 3),
        tables=[draw(3), draw(3, 3)],
        losses=draw(6),
        sigma=losses.spectrum("superquantile", 6, 0.5 + i / 8),
        key=jr.key(i),
        w=draw(2),
        data=(draw(6, 2), draw(6)),
        net=dp.Network([*layers, eqx.nn.Linear(4, 2, key=jr.key(i + 1))]),
        stacked=dp.Network(stacked),
        sample=draw(3),
        sequence=draw(4, 3),
        x=draw(5, 3),
        y=draw(5, 2),
        cell=dp.RNNCell(3, 4, key=jr.key(i)),
        hidden=draw(4),
        problem=(problem[0], problem[1] * size, problem[2] * size),
        starts=(jnp.stack([problem[1] * size] * 2), jnp.stack([problem[2] * size] * 2)),
        matrices=dict(A=draw(2, 2), B=draw(2, 1), Q=jnp.eye(2) * size, R=jnp.eye(1)),
        zero=jnp.zeros(2),
    )


def subsets(key, x):
    return losses.Subsets(3)(key, x)


def energy(params, x, y):
    return params[0] * jnp.sum(x[:3] * y)


def log_partition(params, x):
    return params[1] * jnp.sum(x)


def field(x, u, t):
    return x * u


def outputs(x, net):
    return jax.vmap(net)(x)


def entropy(u):
    return u * jnp.log(u)


def squares(w, example):
    return (example[0] @ w - example[1]) ** 2


def descend(method, n):
    state = method.init(n.w, n.data)
    return method.step(state, n.data, n.key)


def lqr(n):
    Q_final, c = n.matrices["Q"], n.zero
    return dp.LQR.constant(**n.matrices, c=c, Q_final=Q_final, horizon=4)


def by_hand(n):
    problem, x0, us = n.problem
    state = dp.init(problem, dp.ILQR(), x0, us)
    return dp.finish(problem, dp.step(problem, state), throw=False)


spring = helpers.Spring()
CONTROLLER = dp.MPC(dp.ControlProblem.from_system(spring, 3), dp.ILQR())


def ticked(n):
    """All that a controller does."""
    _, x0, us = n.problem
    _, state = CONTROLLER(x0, CONTROLLER.init(x0, us))
    return CONTROLLER(x0, CONTROLLER.shift(state, 2), n.problem[0])


def trained(oracle, loss=losses.Squared(), targets="y"):
    vd = dp.value_and_direction(loss, oracle)

    def call(n):
        y = getattr(n, targets)
        state = vd.init(n.net)
        return vd(n.net, n.x, y), vd.step(n.net, state, n.x, y)

    return call


def simulated(x, u, t):
    return x * u


def limited(w, b):
    return jnp.sum(jnp.cosh(w)), {"sum": dp.constrained.at_least(jnp.sum(w), b)}


def minimized(n):
    lagrangian = dp.constrained.Lagrangian(limited, dp.constrained.Augmented(n.size))
    return dp.constrained.minimize(lagrangian, n.w, n.alpha)


def saved(n):
    with tempfile.NamedTemporaryFile() as file:
        dp.save(file.name, n.matrices)
        return dp.load(file.name, n.matrices)


RATE = dict(smoothing=1.0, l2=0.1)
OPERATORS = {
    "f_softargmax": lambda n: losses.f_softargmax(
        n.rows, Alpha(1.5), "unit", temperature=n.size, where=n.rows > -1
    ),
    "f_softargmax of a function": lambda n: losses.f_softargmax(
        n.rows, entropy, "unit"
    ),
    "f_softmax": lambda n: losses.f_softmax(n.rows, ChiSquare(), "uniform"),
    "f_loss": lambda n: losses.f_loss(n.rows, n.labels, Alpha(n.alpha), "unit"),
    "f_loss of soft targets": lambda n: losses.f_loss(
        n.rows, n.soft, SquaredHellinger(), n.soft, smoothing=n.size / 10
    ),
    "f_sigmoid": lambda n: losses.f_sigmoid(n.row, ChiSquare(), n.size),
    "f_softplus": lambda n: losses.f_softplus(n.row, ChiSquare(), n.size),
    "sparsemax": lambda n: losses.sparsemax(n.rows),
    "entmax": lambda n: losses.entmax(n.rows, n.alpha),
    "entmax15": lambda n: losses.entmax15(n.rows),
    "capped_f_softargmax": lambda n: losses.capped_f_softargmax(
        n.rows, ChiSquare(), "uniform", cap=n.size / 2
    ),
    "diagnose": lambda n: losses.diagnose(n.rows, ChiSquare(), "unit"),
    "hessian_operator": lambda n: losses.hessian_operator(
        n.row, ChiSquare(), "unit"
    ).mv(n.row),
    "soft_viterbi": lambda n: losses.soft_viterbi(
        n.potentials, start=n.row, mask=n.mask, temperature=n.size
    ),
    "viterbi": lambda n: losses.viterbi(n.potentials, final=n.row, mask=n.mask),
    "arm_from_ebm": lambda n: losses.arm_from_ebm(n.tables, eos=1),
    "ebm_from_arm": lambda n: losses.ebm_from_arm(n.tables, ChiSquare(), "unit"),
    "rewards_from_logits": lambda n: losses.rewards_from_logits(n.rows, n.labels),
    "spectrum": lambda n: losses.spectrum("esrm", 6, n.size),
    "spectral_risk": lambda n: losses.spectral_risk(n.losses, n.sigma),
    "spectral_risk, smoothed": lambda n: losses.spectral_risk(
        n.losses, n.sigma, ChiSquare(), smoothing=n.size
    ),
    "spectral_weights": lambda n: losses.spectral_weights(n.losses, n.sigma),
    "spectral_weights, smoothed": lambda n: losses.spectral_weights(
        n.losses, n.sigma, Alpha(1.5), smoothing=n.size
    ),
    "prospect": lambda n: descend(
        optim.prospect(squares, n.sigma, ChiSquare(), learning_rate=n.size, **RATE),
        n,
    ),
    "lsvrg": lambda n: descend(
        optim.lsvrg(squares, n.sigma, learning_rate=n.size, l2=0.1), n
    ),
    "Subsets": lambda n: losses.Subsets(3)(n.key),
    "Permutations": lambda n: losses.Permutations(3)(n.key),
    "exact_objective": lambda n: losses.exact_objective(
        energy, losses.Subsets(3).all(), ChiSquare(), mass=n.size
    )(n.w, n.row, n.soft[0]),
    "minmin_objective": lambda n: losses.minmin_objective(
        energy, log_partition, subsets, ChiSquare(), mass=n.size
    )(n.w, n.row, n.soft[0], n.key),
}
METHODS = {
    "call": lambda loss, u, y, tau: loss(u, y),
    "gradient": lambda loss, u, y, tau: loss.gradient(u, y),
    "hessian_mv": lambda loss, u, y, tau: loss.hessian_mv(u, y, u),
    "factor": lambda loss, u, y, tau: loss.factor(u, y).mv(u),
    "conjugate": lambda loss, u, y, tau: loss.conjugate(u, y),
    "dual_projection": lambda loss, u, y, tau: loss.dual_projection(u, y),
    "conjugate_prox": lambda loss, u, y, tau: loss.conjugate_prox(u, tau, y),
    "prox": lambda loss, u, y, tau: loss.prox(u, tau, y),
    "block_update": lambda loss, u, y, tau: loss.block_update(
        loss.dual_projection(u, y), u, identities(u), tau, y
    ),
}


def identities(u):
    k = u[0].size
    return jnp.broadcast_to(jnp.eye(k), (len(u), k, k))


CONTROL = {
    "rollout": lambda n: dp.rollout(*n.problem),
    "linearize": lambda n: dp.linearize(*n.problem),
    "quadratize": lambda n: dp.quadratize(*n.problem),
    "costates": lambda n: dp.costates(*n.problem),
    "direction": lambda n: dp.direction(n.problem[0], dp.DDP(), *n.problem[1:]),
    "check_gradient": lambda n: dp.check_gradient(
        n.problem[0], dp.solve(n.problem[0], dp.ILQR(), *n.problem[1:])
    ),
    "solve": lambda n: dp.solve(n.problem[0], dp.ILQR(), *n.problem[1:]),
    "solve_batch": lambda n: dp.solve_batch(n.problem[0], dp.ILQR(), *n.starts),
    "steps by hand": by_hand,
    "MPC": ticked,
    "simulate": lambda n: dp.simulate(
        CONTROLLER,
        spring.dynamics,
        n.problem[1],
        3,
        n.size,
        n.key,
        state=CONTROLLER.init(*n.problem[1:]),
    ),
    "solve_lqr": lambda n: dp.solve_lqr(lqr(n), n.zero + n.size),
    "solve_lqr in parallel": lambda n: dp.solve_lqr(
        lqr(n), n.zero + n.size, method=dp.ParallelRiccati()
    ),
    "Policy": lambda n: dp.solve_lqr(lqr(n), n.zero).policy(1, n.zero + n.size),
    "discretize": lambda n: dp.discretize(field, n.size)(n.row, n.row, 0),
    "with_jacobian": lambda n: dp.with_jacobian(
        field, dp.FiniteDifferences(n.size / 1e3)
    )(n.row, n.row, 0),
    "external": lambda n: dp.external(simulated)(n.row, n.row, 0),
    "Network": lambda n: n.stacked(n.sample),
    "Network of a batch": lambda n: jax.vmap(n.stacked)(n.x),
    "gradient of a Network": lambda n: jax.grad(lambda x: jnp.sum(n.stacked(x)))(
        n.sample
    ),
    "Recurrent": lambda n: dp.Recurrent(n.cell, 4)(n.sequence),
    "Recurrent, all states": lambda n: dp.Recurrent(n.cell, 4, True)(n.sequence),
    "RNNCell": lambda n: n.cell(n.sample, n.hidden),
    "NetworkProblem": lambda n: dp.rollout(
        dp.NetworkProblem(n.net, losses.Squared(), n.y), n.x, n.net.params
    ),
    "layerwise_lqr": lambda n: dp.layerwise_lqr(
        dp.NetworkProblem(n.net, losses.Squared(), n.y), n.x, n.net.params, damping=1.0
    ),
    "minimize": minimized,
    "save": saved,
    "load": saved,
    "jacobian_norm": lambda n: dp.jacobian_norm(
        ft.partial(outputs, n.x), n.net, key=n.key
    ),
    "smoothness": lambda n: dp.smoothness(n.net, n.size, input_norm=n.size),
    "smooth_relus": lambda n: dp.smooth_relus(n.net, 0.1, n.size, input_norm=n.size),
}
ORACLES = {
    "Gradient": dp.oracles.Gradient(),
    "GaussNewton": dp.oracles.GaussNewton(0.1),
    "DualGaussNewton": dp.oracles.DualGaussNewton(0.1),
    "MoreauBackprop": dp.oracles.MoreauBackprop(),
    "prox_prop": dp.oracles.prox_prop(),
    "ProxLinear": dp.oracles.ProxLinear(0.1),
    "TargetPropagation": dp.oracles.TargetPropagation(),
}


def curved(n):
    return optim.ggn(losses.Squared())(n.net, n.x, n.y)


def refreshed(n):
    params = eqx.filter(n.net, eqx.is_inexact_array)
    return optim.refresh(LEARNED.init(params), params, curved(n), damping=n.size)


LEARNED = optim.llqr(optim.Diagonal(), solver=optim.LinearCG(2))
CURVATURES = {
    "refresh": refreshed,
    "score": lambda n: optim.score(curved(n), curved(n).params, n.size),
    "tap": lambda n: optim.tap(0)(n.net, n.x),
}


def conjugate(f: losses.AbstractDivergence, n):
    return f.conjugate(-n.soft)


def of_loss(case, method):
    loss, u, y = interface.case(case)

    def call(n):
        return METHODS[method](loss, u * n.size, y, n.size)

    return call


GENERATORS = (KL(), ChiSquare(), ReverseKL(), Neyman(), Jeffreys(), JensenShannon())
GENERATORS += (LeCam(), SquaredHellinger(), Alpha(1.5))  # pyright: ignore
CALLS = {
    **OPERATORS,
    **{f"{f!r}.conjugate": ft.partial(conjugate, f) for f in GENERATORS},
    **CONTROL,
    **CURVATURES,
    **{name: trained(oracle) for name, oracle in ORACLES.items()},
    **{
        f"{case}, {method}": of_loss(case, method)
        for case in interface.CASES
        for method in METHODS
        if case in interface.DUAL or method in ("call", "gradient", "hessian_mv")
    },
}
