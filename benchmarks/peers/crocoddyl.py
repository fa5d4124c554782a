"""Crocoddyl's FDDP, BoxDDP and BoxFDDP, on functions that CasADi derives.

With a C++ compiler the functions become C code compiled for this processor, called by
the action model of `action_model.hpp`, which is compiled once for the processors that
the wheel is made for, against the headers in the wheel. Without a compiler the action
model is written in Python, and slow.
"""

import ctypes
import pathlib
import re
import shutil
import subprocess

import casadi
import crocoddyl
import numpy

from .casadi import functions


TOLERANCE, MAX_STEPS = 1e-7, 500
BUILD = pathlib.Path(__file__).parents[2] / "build" / "benchmarks"
PACKAGE = pathlib.Path(crocoddyl.__file__).resolve()
PREFIX = next(folder for folder in PACKAGE.parents if folder.name == "cmeel.prefix")
EIGEN = pathlib.Path(casadi.__file__).parent / "include" / "eigen3"
HEADER = pathlib.Path(__file__).with_name("action_model.hpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")
NAMES = ("stage", "stage_derivatives", "last", "last_derivatives")
ROWS = ("stage_rows", "stage_rows_derivatives", "last_rows", "last_rows_derivatives")
POINTER = ctypes.POINTER(ctypes.c_double)


class Functions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in NAMES + ROWS]


class Sizes(ctypes.Structure):
    names = "states", "controls", "horizon", "rows", "last_rows"
    _fields_ = [(name, ctypes.c_int) for name in names]


class Limits(ctypes.Structure):
    names = "lower", "upper", "last_lower", "last_upper"
    _fields_ = [(name, POINTER) for name in names]


def shared_library(source: pathlib.Path, *options) -> ctypes.CDLL:
    """Compiles the source unless that was done since it changed."""
    library = BUILD / source.with_suffix(".so").name
    changed = max(file.stat().st_mtime for file in (source, HEADER))
    if not library.exists() or library.stat().st_mtime < changed:
        command = [COMPILER, "-O3", "-fPIC", "-shared", source, *options, "-o", library]
        subprocess.run([str(word) for word in command], check=True)
    return ctypes.CDLL(str(library))


def interface(name: str, *libraries: str) -> ctypes.CDLL:
    """What `name.cpp` makes of the action model."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = shared_library(
        pathlib.Path(__file__).with_name(f"{name}.cpp"),
        "-std=c++17",
        "-w",
        f"-I{PREFIX / 'include'}",
        f"-I{EIGEN}",
        f"-L{PREFIX / 'lib'}",
        *(f"-l{library}" for library in libraries),
    )
    records = [Sizes, Functions, ctypes.c_double, Limits]
    library.create.argtypes = [ctypes.c_char_p, *records]
    library.create.restype = ctypes.c_void_p
    guess = [POINTER] * 3
    library.solve.argtypes = [ctypes.c_void_p, *guess, ctypes.c_int, POINTER]
    library.steps_with_gaps.argtypes = [ctypes.c_void_p]
    library.cost.argtypes, library.cost.restype = [ctypes.c_void_p], ctypes.c_double
    return library


def generated(name: str, parts: dict[str, casadi.Function]) -> Functions:
    """The C functions, written only when they change."""
    name = re.sub(r"\W+", "_", name)
    generator = casadi.CodeGenerator(name, dict(cpp=True))
    for function in parts.values():
        generator.add(function)
    source = BUILD / f"{name}.cpp"
    text = generator.dump()
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    library = shared_library(source, "-march=native")
    address = lambda name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    known = [name for name in NAMES + ROWS if name in parts]
    return Functions(**{name: address(name) for name in known})


def limits(problem) -> list[numpy.ndarray]:
    """Both limits; a stage with one that is infinite would have none at all."""
    sides = numpy.clip(problem.bounds, -1e10, 1e10) if problem.limits else ()
    return [numpy.ascontiguousarray(side) for side in sides]


class Compiled:
    """Solves a problem from a start, by default its own, and its first guess.

    The first guess of the states is the roll-out of that of the controls, or `xs`.
    """

    def __init__(
        self, library, solver, problem, c_code, tolerance, sides, rows=(), xs=None
    ):
        sizes = Sizes(len(problem.x0), problem.controls, problem.horizon, *rows)
        sides = Limits(*(side.ctypes.data_as(POINTER) for side in sides))
        name = solver.encode()
        self.solver = library.create(name, sizes, c_code, tolerance, sides)
        self.library = library
        self.x0, self.guess = numpy.array(problem.x0), problem.us
        self.us = numpy.empty_like(self.guess)
        self.xs = None if xs is None else numpy.ascontiguousarray(xs)
        self()

    def __call__(self, x0=None):
        x0 = self.x0 if x0 is None else numpy.ascontiguousarray(x0)
        pointer = lambda array: array.ctypes.data_as(POINTER)
        xs = None if self.xs is None else pointer(self.xs)
        guess, found = (pointer(x0), pointer(self.guess), xs), pointer(self.us)
        steps = self.library.solve(self.solver, *guess, MAX_STEPS, found)
        self.steps, self.converged = abs(steps), steps > 0

    def begin(self, us, xs=None):
        """The first guesses of the next calls."""
        self.guess, self.xs = us, xs

    @property
    def steps_with_gaps(self) -> int:
        return self.library.steps_with_gaps(self.solver)

    @property
    def cost(self) -> float:
        return self.library.cost(self.solver)


def compiled(
    problem, solver: str = "FDDP", tolerance: float = TOLERANCE, xs=None
) -> Compiled:
    library = interface("crocoddyl", "crocoddyl")
    parts = functions(problem)
    c_code = generated(problem.name, {name: parts[name] for name in NAMES})
    sides = limits(problem)
    return Compiled(library, solver, problem, c_code, tolerance, sides, xs=xs)


class PythonModel(crocoddyl.ActionModelAbstract):
    """An action model that calls the interpreted functions of CasADi."""

    def __init__(self, problem):
        state = crocoddyl.StateVector(len(problem.x0))
        super().__init__(state, problem.controls)
        self.functions = functions(problem)

    def calc(self, data, x, u=None):
        if u is None:
            data.cost = float(self.functions["last"](x))
            data.xnext = x
        else:
            following, cost = self.functions["stage"](x, u)
            data.xnext, data.cost = following.full().ravel(), float(cost)

    def calcDiff(self, data, x, u=None):
        if u is None:
            gradient, hessian = self.functions["last_derivatives"](x)
            data.Lx, data.Lxx = gradient.full().ravel(), hessian.full()
            return
        parts = [part.full() for part in self.functions["stage_derivatives"](x, u)]
        data.Fx, data.Fu, data.Lxx, data.Lxu, data.Luu = (*parts[:2], *parts[4:])
        data.Lx, data.Lu = parts[2].ravel(), parts[3].ravel()


class Gaps(crocoddyl.CallbackAbstract):
    """Counts the iterations that leave gaps between the states."""

    count = 0

    def __call__(self, solver):
        self.count += not solver.isFeasible


class Interpreted:
    """The same with the model in Python."""

    def __init__(
        self, problem, solver: str = "FDDP", tolerance: float = TOLERANCE, xs=None
    ):
        self.x0, self.guess, self.xs = numpy.array(problem.x0), list(problem.us), xs
        model = PythonModel(problem)
        stages = [model] * problem.horizon
        for t, sides in enumerate(zip(*limits(problem))):
            stages[t] = PythonModel(problem)
            stages[t].u_lb, stages[t].u_ub = sides
        self.problem = crocoddyl.ShootingProblem(self.x0, stages, model)
        self.problem.nthreads = 1
        self.solver = getattr(crocoddyl, f"Solver{solver}")(self.problem)
        self.solver.th_stop = tolerance
        self.gaps = Gaps()
        self.solver.setCallbacks([self.gaps])
        self()

    def begin(self, us, xs=None):
        """The first guesses of the next calls."""
        self.guess, self.xs = list(us), xs

    def __call__(self, x0=None):
        self.problem.x0 = self.x0 if x0 is None else x0
        feasible = self.xs is None
        xs = self.problem.rollout(self.guess) if feasible else list(self.xs)
        self.gaps.count = 0 if feasible else 1
        self.converged = self.solver.solve(xs, self.guess, MAX_STEPS, feasible)
        self.steps, self.cost = self.solver.iter, self.solver.cost
        self.steps_with_gaps = self.gaps.count
        self.us = numpy.array(self.solver.us)


Solver = compiled if COMPILER else Interpreted


def name(solver: str = "FDDP") -> str:
    return f"Crocoddyl {solver}, {'C++' if COMPILER else 'Python model'}"


class OneIteration:
    """One iteration of FDDP on a linear-quadratic problem, with the built-in model."""

    def __init__(self, lqr: dict, x0: numpy.ndarray):
        T, n, m = lqr["B"].shape
        names = ("A", "B", "Q", "R", "M", "c", "q", "r")
        model = lambda t: crocoddyl.ActionModelLQR(*(lqr[name][t] for name in names))
        final = crocoddyl.ActionModelLQR(
            *(numpy.zeros(shape) for shape in ((n, n), (n, m))),
            lqr["Q_final"],
            numpy.eye(m),
            *(numpy.zeros(shape) for shape in ((n, m), (n,))),
            lqr["q_final"],
            numpy.zeros(m),
        )
        problem = crocoddyl.ShootingProblem(x0, [model(t) for t in range(T)], final)
        problem.nthreads = 1
        self.solver = crocoddyl.SolverFDDP(problem)
        self()

    def __call__(self):
        self.solver.solve([], [], 1, False)

    @property
    def cost(self) -> float:
        return self.solver.cost
