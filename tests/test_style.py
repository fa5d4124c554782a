"""The house rules that can be checked: floors, classes, public names, imports."""

import ast
import dataclasses
import importlib
import inspect
import operator
import pathlib
import pkgutil
import re
import subprocess
import sys
import textwrap

import equinox as eqx
import pytest

import diffprog as dp


ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "diffprog"

# Who may import whom: a module imports from strictly lower floors only, or, inside a
# family folder, from that folder's base.
FLOORS = {
    "_types": 0,
    "_fast_loops": 1,
    "_flax": 1,
    "_linalg": 1,
    "_report": 1,
    "_result": 1,
    "_capture": 1,
    "_tree": 1,
    "_chain": 2,
    "_jacobian": 2,
    "_loops": 2,
    "_cg": 3,
    "_inner": 4,
    "_model": 2,
    "_layer_constants": 2,
    "_door": 2,
    "_discretize": 2,
    "_network": 3,
    "_recurrent": 3,
    "losses": 3,
    "_rollout": 3,
    "_network_problem": 4,
    "_smoothness": 4,
    "_expand": 4,
    "_lqr": 5,
    "_direction": 6,
    "_search": 6,
    "_loop": 7,
    "_solution": 7,
    "_solve": 8,
    "_batch": 9,
    "oracles": 9,
    "_value_and_direction": 10,
    "__init__": 11,
}
# Inside the losses.
LOSSES = [
    ["_divergence", "_bracket", "_factor"],
    ["_alpha", "_generated"],
    ["_kernel"],
    ["_root"],
    ["_call", "_isotonic"],
    ["_targets"],
    ["_operators", "_capped", "_hessian", "_risk", "_smooth"],
    ["_loss", "_simplex"],
    ["_block", "_interior"],
    ["_energy", "_bellman", "_viterbi", "_risk_descent"],
    ["_supervised", "_multiclass", "_custom"],
]
# Inside the oracles.
ORACLES = [
    ["base", "_damping"],
    ["_gram", "_model_solver", "_rules"],
    ["_solvers", "_inverses"],
    ["_augmented_lagrangian", "_interior_point"],
    ["_gradient", "_gauss_newton", "_moreau", "_prox_linear", "_target_propagation"],
]
INSIDE = {"losses": LOSSES, "oracles": ORACLES}
OUTSIDE = ("systems", "plot")  # these see the public door only


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def family(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def relative_imports(path: pathlib.Path):
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (node.module or "").split(".")[0]
            yield node.level == depth, module, node


def climbs(path):
    """The imports of a module that do not go down."""
    home = family(path)
    for from_package_root, module, node in relative_imports(path):
        if home in OUTSIDE:
            good = not from_package_root  # the public door
        elif from_package_root and home != "__init__":
            good = FLOORS[module] < FLOORS[home]
        elif home in INSIDE and path.name != "__init__.py":
            floor = lambda name: [name in names for names in INSIDE[home]].index(True)
            good = floor(module) < floor(path.stem)
        else:
            good = home == "__init__" or path.name == "__init__.py"
            good = good or module in ("base", "")
        if not good:
            yield f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"


def oversized(path):
    text = path.read_text()
    module = ast.parse(text)
    if len(text.splitlines()) > 400 and not ast.get_docstring(module):
        yield f"{path} has over 400 lines and no reason"
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            doc = ast.get_docstring(node) or ""
            if length - len(doc.splitlines()) > 75:
                yield f"{path}: {node.name}"


@pytest.mark.parametrize("rule", [climbs, oversized], ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    paths = sources()
    assert len(paths) > 50
    assert [fault for path in paths for fault in rule(path)] == []


def classes():
    names = [m.name for m in pkgutil.walk_packages(dp.__path__, "diffprog.")]
    found = {}
    for module in map(importlib.import_module, names):
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__.startswith("diffprog"):
                if issubclass(cls, eqx.Module):
                    found[cls.__qualname__, cls.__module__] = cls
    return list(found.values())


def written(cls):
    source = textwrap.dedent(inspect.getsource(cls))
    body = ast.parse(source).body[0].body  # pyright: ignore
    methods = {n.name for n in body if isinstance(n, ast.FunctionDef)}
    declared = ("AbstractVar", "AbstractClassVar", "ClassVar")
    fields = {
        n.target.id
        for n in body
        if isinstance(n, ast.AnnAssign)
        and isinstance(n.target, ast.Name)
        and not any(word in ast.unparse(n.annotation) for word in declared)
    }
    return methods, fields


def faults(cls):
    named = lambda c: c.__name__.lstrip("_").startswith("Abstract")
    abstract = inspect.isabstract(cls) or bool(
        cls.__abstractvars__ or cls.__abstractclassvars__
    )
    bases = [
        b for b in cls.__mro__[1:] if issubclass(b, eqx.Module) and b != eqx.Module
    ]
    out = ["abstract but not named Abstract*"] if abstract and not named(cls) else []
    out += [f"subclasses the final {b.__name__}" for b in bases if not named(b)]
    methods, fields = written(cls)
    for base in bases:
        base_methods, base_fields = written(base)
        out += [
            f"overrides {base.__name__}.{m}"
            for m in methods & base_methods
            if not getattr(base.__dict__[m], "__isabstractmethod__", False)
        ]
        out += [f"fields also in {base.__name__}"] if fields and base_fields else []
    return out


def test_classes_are_abstract_or_final():
    found = classes()
    assert len(found) > 100
    assert {cls.__qualname__: faults(cls) for cls in found if faults(cls)} == {}


def test_the_class_rule_catches_what_it_should():
    class Base(eqx.Module):
        x: int

        def f(self):
            return self.x

    class Child(Base):
        y: int

        def f(self):
            return self.y

    assert any("overrides" in fault for fault in faults(Child))
    assert any("final" in fault for fault in faults(Child))
    assert any("fields" in fault for fault in faults(Child))


PUBLIC = [n for n in vars(dp) if not n.startswith("_") and n not in OUTSIDE]
PUBLIC = [n for n in PUBLIC if not inspect.ismodule(getattr(dp, n))]


def names_in(module):
    home = module.__name__.removeprefix("diffprog.")
    items = vars(module).items()
    mine = [n for n, item in items if n[0] != "_" and not inspect.ismodule(item)]
    return [f"{home}.{name}" for name in mine]


def test_public_names_are_documented():
    names = [*PUBLIC, *names_in(dp.losses), *names_in(dp.oracles)]
    assert len(names) > 150
    assert [n for n in names if not inspect.getdoc(operator.attrgetter(n)(dp))] == []
    pages = "\n".join(p.read_text() for p in (ROOT / "docs").rglob("*.md"))
    assert [n for n in names if not re.search(rf"diffprog\.{n}\b", pages)] == []


# Public records whose fields only their class documents.
RECORDS = [
    "Solution", "LQRSolution", "Policy", "Value", "Trajectory", "LinearModel",
    "QuadraticModel", "SolverState", "DirectionAux", "DirectionState", "Stage",
    "oracles.Linearization", "oracles.Proposal", "oracles.Solved", "oracles.Found",
    "oracles.DampingState", "oracles.Constant", "oracles.MadsenNielsen",
    "oracles.Threshold", "oracles.GradientNorm", "oracles.Gradient",
    "oracles.GaussNewton", "oracles.DualGaussNewton", "oracles.ProxLinear",
    "oracles.CG", "oracles.DualCG", "oracles.Cholesky", "oracles.RandomSubspace",
    "oracles.NewtonSteps", "oracles.CoordinateAscent", "oracles.ProximalGradient",
    "oracles.InteriorPoint", "oracles.AugmentedLagrangian", "Smoothness",
    "LayerConstants", "SmoothRelu",
]  # fmt: skip


def test_fields_and_docs_agree():
    for name in RECORDS:
        cls = operator.attrgetter(name)(dp)
        names = getattr(cls, "_fields", None)
        names = names or [f.name for f in dataclasses.fields(cls)]
        fields = {name for name in names if not name.startswith("_")}
        documented = set()
        for line in (inspect.getdoc(cls) or "").splitlines():
            if line.startswith("- `"):
                listed = line.split(":")[0].replace("`", "").lstrip("- ")
                documented |= set(listed.split(", "))
        assert documented == fields, name


def test_importing_is_free_of_side_effects():
    program = (
        "import sys, diffprog, jax._src.xla_bridge as bridge; "
        "assert not bridge.backends_are_initialized(); "
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
