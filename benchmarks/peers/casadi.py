"""CasADi: a problem as symbols, and solved by Fatrop and by Ipopt."""

import types

import casadi
import numpy


# What the problems use of `jax.numpy`.
MODULE = types.SimpleNamespace(
    array=lambda parts: casadi.vertcat(*parts),
    concatenate=lambda parts: casadi.vertcat(*parts),
    dot=casadi.dot,
    sin=casadi.sin,
    cos=casadi.cos,
    tan=casadi.tan,
    arcsin=casadi.asin,
    sqrt=casadi.sqrt,
)
TOLERANCE, MAX_STEPS = 1e-8, 1000


def functions(problem) -> dict[str, casadi.Function]:
    """Stage and last stage with their exact derivatives, outputs dense."""
    x = casadi.SX.sym("x", len(problem.x0))
    u = casadi.SX.sym("u", problem.controls)
    following = problem.dynamics(MODULE, x, u)
    cost = problem.cost(MODULE, x, u)
    last = problem.terminal_cost(MODULE, x)
    gradient = lambda f, *v: [casadi.gradient(f, w) for w in v]
    derivatives = [casadi.jacobian(following, x), casadi.jacobian(following, u)]
    derivatives += gradient(cost, x, u)
    derivatives += [
        casadi.hessian(cost, x)[0],
        casadi.jacobian(casadi.gradient(cost, x), u),
        casadi.hessian(cost, u)[0],
    ]
    outputs = {
        "stage": ([x, u], [following, cost]),
        "stage_derivatives": ([x, u], derivatives),
        "last": ([x], [last]),
        "last_derivatives": ([x], [*gradient(last, x), casadi.hessian(last, x)[0]]),
    }
    rows = {"rows": problem.rows, "goal": problem.goal, "last_rows": problem.last_rows}
    for name, fn in rows.items():
        outputs[name] = [x], [fn(MODULE, x) if fn else casadi.SX(0, 1)]
    dense = lambda expressions: [casadi.densify(e) for e in casadi.cse(expressions)]
    return {
        name: casadi.Function(name, inputs, dense(expressions))
        for name, (inputs, expressions) in outputs.items()
    }


class MultipleShooting:
    """Minimizes over all states and controls, stage after stage, exact Hessian.

    `expand`: the whole program as one list of scalar operations instead of calls of the
    function of a stage. Both are interpreted.
    """

    def __init__(self, problem, solver: str, expand: bool):
        n, m, T = len(problem.x0), problem.controls, problem.horizon
        parts = functions(problem)
        self.stage, self.last = parts["stage"], parts["last"]
        x0, z = casadi.MX.sym("x0", n), casadi.MX.sym("z", (n + m) * T + n)
        pairs, end = casadi.reshape(z[:-n], n + m, T), z[-n:]
        xs, us = pairs[:n, :], pairs[n:, :]
        following, costs = self.stage.map(T)(xs, us)
        gaps = casadi.horzcat(xs[:, 1:], end) - following
        rows, last = parts["rows"], [parts[name](end) for name in ("goal", "last_rows")]
        many, (ends, lasts) = rows.size1_out(0), (part.numel() for part in last)
        # The order that Fatrop expects: what binds a stage follows its gap.
        stages = casadi.vertcat(gaps, rows.map(T)(xs)) if many else gaps
        first = gaps[:, 0], xs[:, 0] - x0, stages[n:, 0]
        g = casadi.vertcat(*first, casadi.vec(stages[:, 1:]), *last)
        stage = [True] * n + [False] * many
        equal = [True] * n + stage * T + [True] * ends + [False] * lasts
        nlp = dict(x=z, p=x0, f=casadi.sum2(costs) + self.last(end), g=g)
        options = dict(
            expand=expand,
            print_time=False,
            show_eval_warnings=False,
            error_on_fail=False,
        )
        if solver == "fatrop":
            options |= dict(
                structure_detection="manual",
                N=T,
                nx=[n] * (T + 1),
                nu=[m] * T + [0],
                ng=[n + many] + [many] * (T - 1) + [ends + lasts],
                equality=equal,
                fatrop=dict(print_level=0, tol=TOLERANCE, max_iter=MAX_STEPS),
            )
        else:
            options["ipopt"] = dict(
                print_level=0, sb="yes", tol=TOLERANCE, max_iter=MAX_STEPS
            )
        self.solver = casadi.nlpsol("solver", solver, nlp, options)
        self.sizes, self.x0 = (n, m, T), numpy.array(problem.x0)
        self.guess = self.roll_out(problem.us)
        self.limits = dict(lbg=numpy.where(equal, 0.0, -numpy.inf), ubg=0.0)
        if problem.limits:
            sides = zip(("lbx", "ubx"), (-numpy.inf, numpy.inf), problem.bounds)
            for name, none, side in sides:
                self.limits[name] = self.in_order(numpy.full((T + 1, n), none), side)
        self()

    def roll_out(self, us) -> numpy.ndarray:
        """States and controls of the first guess, which meets all constraints."""
        xs = [self.x0]
        for u in us:
            xs.append(self.stage(xs[-1], u)[0].full().ravel())
        return self.in_order(numpy.array(xs), us)

    def in_order(self, xs, us) -> numpy.ndarray:
        """The variables of the program: each state is followed by its controls."""
        return numpy.concatenate([numpy.hstack([xs[:-1], us]).ravel(), xs[-1]])

    def __call__(self):
        self.answer = self.solver(x0=self.guess, p=self.x0, **self.limits)

    @property
    def us(self) -> numpy.ndarray:
        n, m, T = self.sizes
        return self.answer["x"].full()[:-n].reshape(T, n + m)[:, n:]

    @property
    def cost(self) -> float:
        return float(self.answer["f"])

    @property
    def steps(self) -> int:
        return self.solver.stats()["iter_count"]

    @property
    def converged(self) -> bool:
        return self.solver.stats()["success"]
