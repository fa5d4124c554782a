"""Crocoddyl's FDDP, on functions that CasADi derives.

With a C++ compiler the functions become C code compiled for this processor, called by
the action model of `fddp.cpp`, which is compiled once for the processors that the wheel
is made for, against the headers in the wheel. Without a compiler the action model is
written in Python, and slow.
"""

import ctypes
import pathlib
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
COMPILER = shutil.which("g++") or shutil.which("clang++")
NAMES = ("stage", "stage_derivatives", "last", "last_derivatives")
POINTER = ctypes.POINTER(ctypes.c_double)


class Functions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in NAMES]


def shared_library(source: pathlib.Path, *options) -> ctypes.CDLL:
    """Compiles the source unless that was done since it changed."""
    library = BUILD / source.with_suffix(".so").name
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        command = [COMPILER, "-O3", "-fPIC", "-shared", source, *options, "-o", library]
        subprocess.run([str(word) for word in command], check=True)
    return ctypes.CDLL(str(library))


def interface() -> ctypes.CDLL:
    BUILD.mkdir(parents=True, exist_ok=True)
    library = shared_library(
        pathlib.Path(__file__).with_name("fddp.cpp"),
        "-std=c++17",
        "-w",
        f"-I{PREFIX / 'include'}",
        f"-I{EIGEN}",
        f"-L{PREFIX / 'lib'}",
        "-lcrocoddyl",
    )
    integer = ctypes.c_int
    library.fddp_create.argtypes = [*[integer] * 3, Functions, ctypes.c_double]
    library.fddp_create.restype = ctypes.c_void_p
    arrays = [POINTER, POINTER]
    library.fddp_solve.argtypes = [ctypes.c_void_p, *arrays, integer, POINTER]
    return library


def generated(problem) -> Functions:
    """The C functions of a problem, written only when they change."""
    name = problem.name.replace(" ", "_").replace("-", "_")
    generator = casadi.CodeGenerator(name, dict(cpp=True))
    for function in functions(problem).values():
        generator.add(function)
    source = BUILD / f"{name}.cpp"
    text = generator.dump()
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    library = shared_library(source, "-march=native")
    address = lambda name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    return Functions(*map(address, NAMES))


class CompiledFDDP:
    """Solves a problem from a start, by default its own, and zero controls."""

    def __init__(self, problem):
        self.library = interface()
        sizes = len(problem.x0), problem.controls, problem.horizon
        self.solver = self.library.fddp_create(*sizes, generated(problem), TOLERANCE)
        self.x0 = numpy.array(problem.x0)
        self.us = numpy.zeros((problem.horizon, problem.controls))
        self.answer = ctypes.c_double()
        self()

    def __call__(self, x0=None):
        x0 = self.x0 if x0 is None else numpy.ascontiguousarray(x0)
        arrays = [array.ctypes.data_as(POINTER) for array in (x0, self.us)]
        answer = ctypes.byref(self.answer)
        steps = self.library.fddp_solve(self.solver, *arrays, MAX_STEPS, answer)
        self.steps, self.converged = abs(steps), steps > 0

    @property
    def cost(self) -> float:
        return self.answer.value


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


class InterpretedFDDP:
    """The same with the model in Python."""

    def __init__(self, problem):
        model = PythonModel(problem)
        self.x0 = numpy.array(problem.x0)
        self.us = [numpy.zeros(problem.controls)] * problem.horizon
        stages = [model] * problem.horizon
        self.problem = crocoddyl.ShootingProblem(self.x0, stages, model)
        self.problem.nthreads = 1
        self.solver = crocoddyl.SolverFDDP(self.problem)
        self.solver.th_stop = TOLERANCE
        self()

    def __call__(self, x0=None):
        self.problem.x0 = self.x0 if x0 is None else x0
        xs = self.problem.rollout(self.us)
        self.converged = self.solver.solve(xs, self.us, MAX_STEPS, True)
        self.steps, self.cost = self.solver.iter, self.solver.cost


FDDP = CompiledFDDP if COMPILER else InterpretedFDDP
NAME = "Crocoddyl FDDP, C++" if COMPILER else "Crocoddyl FDDP, Python model"


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
