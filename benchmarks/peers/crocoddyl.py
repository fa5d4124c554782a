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


class FDDP:
    """Solves a problem from a start, by default its own, and zero controls."""

    language = "C++"

    def __init__(self, problem):
        self.library = interface()
        sizes = len(problem.x0), problem.controls, problem.horizon
        self.solver = self.library.fddp_create(*sizes, generated(problem), TOLERANCE)
        self.x0 = numpy.array(problem.x0)
        self.us = numpy.zeros((problem.horizon, problem.controls))
        self.cost, self.steps = ctypes.c_double(), 0

    def __call__(self, x0=None) -> float:
        x0 = numpy.ascontiguousarray(self.x0 if x0 is None else x0)
        arrays = [array.ctypes.data_as(POINTER) for array in (x0, self.us)]
        cost = ctypes.byref(self.cost)
        self.steps = self.library.fddp_solve(self.solver, *arrays, MAX_STEPS, cost)
        return self.cost.value

    @property
    def converged(self) -> bool:
        return self.steps > 0
