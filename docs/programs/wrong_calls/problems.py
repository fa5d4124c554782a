"""Problems.

`dynamics`, `cost` and `terminal_cost` below are those of a point that is pushed along a
line, with states of two numbers and one control, and `problem` is
`dp.ControlProblem(dynamics, cost, terminal_cost, 5)`.
"""

import diffrax
import jax
import jax.numpy as jnp

import diffprog as dp


def dynamics(x, u, t):
    return jnp.stack([x[0] + 0.1 * x[1], x[1] + 0.1 * u[0]])


def cost(x, u, t):
    return 0.05 * jnp.sum(x**2) + 0.05 * jnp.sum(u**2)


def terminal_cost(x):
    return jnp.sum(x**2)


def control_problem(dynamics=dynamics, cost=cost, terminal_cost=terminal_cost, **more):
    return dp.ControlProblem(dynamics, cost, terminal_cost, 5, **more)


problem = control_problem()
x0, us = jnp.ones(2), jnp.zeros((5, 1))

# %% ### Functions and horizon

# %% The horizon counts stages: for 2 s in steps of 0.05 s write 40.
dp.ControlProblem(dynamics, cost, terminal_cost, 2.5)

# %% A problem has at least one stage.
dp.ControlProblem(dynamics, cost, terminal_cost, 0)

# %% [slow] Give the function, and not what it returns.
dp.ControlProblem(dynamics(x0, us[0], 0), cost, terminal_cost, 5)

# %% `from_system` takes a module with the methods `dynamics`, `cost` and
# `terminal_cost`.
dp.ControlProblem.from_system(dp.systems.Pendulum, 5)


# %% Give the system a method of this name.
class System:
    dynamics, cost, terminal_cost = staticmethod(dynamics), staticmethod(cost), None


dp.ControlProblem.from_system(System(), 5)

# %% Phases come as a tuple, also one alone: `dp.Chain((phase,), terminal_cost)`.
dp.Chain(dp.Phase(dynamics, cost, 5), terminal_cost)

# %% Controls of a chain are a tuple with one array for each phase.
phase = dp.Phase(dynamics, cost, 5)
dp.rollout(dp.Chain((phase, phase), terminal_cost), x0, us)

# %% A problem is an object of the library: pass the functions to `dp.ControlProblem`
# first.
dp.rollout(dynamics, x0, us)

# %% The sum over the stages is the work of the solver; one stage has one number.
dp.rollout(control_problem(cost=lambda x, u, t: x**2), x0, us)

# %% Write the next state like the one that came: the same tree, the same shapes.
dp.rollout(control_problem(lambda x, u, t: x[0] + u), x0, us)

# %% [slow] Numbers of the problem follow x0 and us where they are Python floats; arrays
# keep their own dtype.
mass = jnp.asarray([2.0, 2.0])
small = jnp.ones(2, jnp.float32), jnp.zeros((5, 1), jnp.float32)
dp.rollout(control_problem(lambda x, u, t: x * mass), *small)

# %% [slow] An index past the end is clipped by JAX without a word; `check=True` finds
# it once, on the way.
table = jnp.zeros((3, 2))
dp.rollout(control_problem(lambda x, u, t: x + table[t]), x0, us, check=True)

# %% Check outside of `jax.jit`: only there numbers can be looked at.
jax.jit(lambda us: dp.rollout(problem, x0, us, check=True))(us)


# %% Functions that write into objects leave numbers of a trace there, which end with
# it: return them instead.
class Notes:
    def __init__(self):
        self.notes = {}

    def dynamics(self, x, u, t):
        self.notes.setdefault("first", x)
        return x + u

    def cost(self, x, u, t):
        return jnp.sum((x - self.notes["first"]) ** 2)


notes = Notes()
dp.rollout(control_problem(notes.dynamics, notes.cost), x0, us)

# %% Limits of states are constraints, those of controls `control_bounds`.
control_problem(state_bounds=(-1.0, 1.0))

# %% ### Starts and controls

# %% Make an array of it: `jnp.zeros((5, 1))`.
dp.rollout(problem, x0, [0.0, 0.0, 0.0, 0.0, 0.0])

# %% Controls have a row for each stage: shape `(horizon, m)`.
dp.rollout(problem, x0, jnp.zeros((4, 1)))

# %% A state has at least one number.
dp.rollout(problem, jnp.zeros(0), us)

# %% A problem without controls has nothing to solve; give it one that nothing depends
# on for a simulation.
dp.rollout(problem, x0, jnp.zeros((5, 0)))

# %% An array of ints stays one of ints; states and controls are floating.
dp.rollout(problem, jnp.array([1, 0]), us)

# %% Convert one of them, so that a problem is of one precision throughout.
dp.rollout(problem, jnp.ones(2, jnp.float32), us)

# %% [slow] First guesses of states are those of all stages and of the end: `horizon +
# 1` rows.
dp.solve(problem, dp.ILQR(), x0, us, xs=jnp.zeros((5, 2)))

# %% Controls are `solution.us`, and the state of a stage a row of `solution.xs`.
solution = dp.solve(problem, dp.ILQR(), x0, us)
dp.solve(problem, dp.ILQR(), x0, solution)

# %% ### Limits of controls

# %% Limits come as a pair: `control_bounds=(-1.0, 1.0)`, and `None` where there is
# none.
control_problem(control_bounds=1.0)

# %% A limit is a number, or an array of them.
control_problem(control_bounds=("low", 1.0))

# %% Write limits as numbers.
control_problem(control_bounds=(jnp.array(False), 1.0))

# %% A limit that does not exist is `None`, or infinite.
control_problem(control_bounds=(jnp.nan, 1.0))

# %% An infinite limit stands on its own side: `-inf` below, `inf` above.
control_problem(control_bounds=(jnp.inf, None))

# %% Exchange the limits. Equal ones fix a control.
control_problem(control_bounds=(1.0, -1.0))

# %% One number holds for all controls; else limits are arranged as a control is.
dp.rollout(control_problem(control_bounds=({"force": -1.0}, 1.0)), x0, us)

# %% First come all lower limits, then all upper ones.
control_problem(control_bounds=[(-1.0, 1.0), (-2.0, 2.0)])

# %% Limits have the shape of a control, or of `us` where they change with the stage.
dp.rollout(control_problem(control_bounds=(-jnp.ones(3), 1.0)), x0, us)

# %% ### Constraints

# %% A constraint is an object, which says what its function means: `dp.Inequality(fn)`
# is `fn <= 0`.
control_problem(constraints=(lambda x, u, t: x[0] - 1.0,))

# %% `fn` is a function of state, control and stage.
dp.Inequality(3.0)

# %% A name is a string, by which multipliers and messages are found.
dp.Inequality(lambda x, u, t: x[0] - 1.0, name=3)

# %% Limits of states are numbers, or arranged as a state is.
dp.StateBounds("low", 1.0)

# %% Names are keys of `solution.multipliers`: give each constraint another one.
twice = (dp.Inequality(lambda x, u, t: x - 1.0, name="wall"),) * 2
dp.solve(control_problem(constraints=twice), dp.ILQR(), x0, us)

# %% Take it out, or look for an argument that was forgotten in it.
always = dp.Inequality(lambda x, u, t: jnp.ones(1) - 2.0)
dp.solve(control_problem(constraints=(always,)), dp.ILQR(), x0, us)

# %% Return the number that a comparison would be about.
below = dp.Inequality(lambda x, u, t: x[0] <= 1.0)
dp.solve(control_problem(constraints=(below,)), dp.ILQR(), x0, us)

# %% Return an array: one row for each condition of the stage.
empty = dp.Inequality(lambda x, u, t: None)
dp.solve(control_problem(constraints=(empty,)), dp.ILQR(), x0, us)

# %% [slow] A warm start keeps the multipliers of its constraints: with others begin
# with `dp.WarmStart(state.search)`.
one = dp.Inequality(lambda x, u, t: x[:1] - 9.0)
two = dp.Inequality(lambda x, u, t: x - 9.0)
state = dp.solve(control_problem(constraints=(one,)), dp.ILQR(), x0, us).state
dp.solve(control_problem(constraints=(two,)), dp.ILQR(), x0, us, state=state)

# %% ### `dp.discretize`

# %% A vector field is a function of state, control and time in seconds.
dp.discretize(dp.systems.Pendulum, 0.05)

# %% Steps are positive: a time, in seconds.
dp.discretize(lambda x, u, t: x, -0.05)

# %% Return one derivative for each number of the state.
field = lambda x, u, t: x[0]
dp.rollout(control_problem(dp.discretize(field, 0.05)), x0, us)

# %% Take one of the names, or an object of diffrax.
dp.discretize(lambda x, u, t: x, 0.05, "rk45")

# %% An adaptive step size belongs to `diffrax.diffeqsolve`; here `dt` is the step. Give
# the solver inside.
dp.discretize(lambda x, u, t: x, 0.05, diffrax.HalfSolver(diffrax.Euler()))

# %% Each stage begins from one state.
dp.discretize(lambda x, u, t: x, 0.05, diffrax.LeapfrogMidpoint())

# %% Take a solver of ordinary equations.
dp.discretize(lambda x, u, t: x, 0.05, diffrax.SemiImplicitEuler())

# %% Give an object of the root finder, with its tolerances.
dp.discretize(
    lambda x, u, t: x,
    0.05,
    diffrax.ImplicitEuler(root_finder=diffrax.VeryChord),
)

# %% Tolerances of the root finder follow from those of adaptive steps, which are not
# taken here.
dp.discretize(lambda x, u, t: x, 0.05, diffrax.Kvaerno3())

# %% ### `dp.with_jacobian` and `dp.external`

# %% Take one of the names, `dp.FiniteDifferences()`, or a function `(x, u, t) -> (A,
# B)`.
dp.with_jacobian(dynamics, "backward")

# %% Return two matrices: derivatives by the state, and by the control.
wrong = dp.with_jacobian(dynamics, lambda x, u, t: jnp.eye(2))
dp.linearize(control_problem(wrong), x0, us)

# %% Rows are the entries of the next state, columns those of the state, or of the
# control.
wrong = dp.with_jacobian(dynamics, lambda x, u, t: (jnp.eye(2), jnp.ones(2)))
dp.linearize(control_problem(wrong), x0, us)

# %% [slow] Matrices have the dtype of the state.
pair = jnp.eye(2, dtype=jnp.float32), jnp.ones((2, 1), jnp.float32)
wrong = dp.with_jacobian(dynamics, lambda x, u, t: pair)
dp.linearize(control_problem(wrong), x0, us)

# %% [slow] Second derivatives of dynamics that come from elsewhere are given, or a
# method is taken that needs none.
given = dp.with_jacobian(dynamics, lambda x, u, t: (jnp.eye(2), jnp.ones((2, 1))))
dp.solve(control_problem(given), dp.DDP(), x0, us)

# %% `vectorized=True` says that the function takes all stages at once.
dp.external(dynamics, vectorized=1)


# %% [slow] The error of the function comes first, then where it was: mend the function.
def simulator(x, u, t):
    raise ValueError("the simulator has no license")


dp.rollout(control_problem(dp.external(simulator)), x0, us)

# %% [slow] Return the next state, like the one that came.
dp.rollout(control_problem(dp.external(lambda x, u, t: x[:1])), x0, us)

# %% [slow] Numbers come back as NumPy has them: floating.
dp.rollout(control_problem(dp.external(lambda x, u, t: x + 1j)), x0, us)
