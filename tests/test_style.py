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
    "_reduction": 1,
    "_report": 1,
    "_result": 1,
    "_changes": -1,
    "_written": 0,
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
    "_calls": 2,
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
    "_stepping": 9,
    "oracles": 9,
    "optim": 10,
    "_value_and_direction": 10,
    "extend": 11,
    "__init__": 12,
}
# Inside the losses.
LOSSES = [
    ["_divergence", "_bracket", "_factor"],
    ["_families", "_generated"],
    ["_alpha"],
    ["_root"],
    ["_call", "_isotonic"],
    ["_targets"],
    ["_operators", "_fenchel_young", "_capped", "_hessian", "_risk", "_smooth"],
    ["_loss", "_simplex"],
    ["_block", "_interior"],
    ["_energy", "_bellman", "_viterbi"],
    ["_supervised", "_multiclass", "_custom"],
]
# Inside the oracles.
ORACLES = [
    ["base"],
    ["_damping", "_gram", "_model_solver", "_rules"],
    ["_solvers", "_inverses"],
    ["_augmented_lagrangian", "_interior_point"],
    ["_gradient", "_gauss_newton", "_moreau", "_prox_linear", "_target_propagation"],
]
DIRECTIONS = [
    ["rollouts"],
    ["base"],
    ["ddp", "gauss_newton", "gradient", "ilqr", "moreau", "newton"],
]
INSIDE = {"losses": LOSSES, "oracles": ORACLES, "_direction": DIRECTIONS}
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
            yield f"{at(path, node)}: {ast.unparse(node)}"


def at(path, node) -> str:
    return f"{path.relative_to(PACKAGE)}:{node.lineno}"


def escapes(path):
    """Imports of the package by its name, which say nothing about floors."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        mine = {name for name in names if name.split(".")[0] == "diffprog"}
        if mine - ({"diffprog"} if family(path) in OUTSIDE else set()):
            yield f"{at(path, node)}: {ast.unparse(node)}"


# What is too long today, and how long: a number may shrink, and no name may be added.
TOO_LONG = {
    "_loop.py: step": 63,
    "_loop.py: _pass": 64,
}
BLOCKS = ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.FunctionDef


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def lines(node) -> int:
    """Of a function without its docstring."""
    doc = node.body[0] if ast.get_docstring(node) else None
    skipped = doc.end_lineno - doc.lineno + 1 if doc else 0
    return node.end_lineno - node.lineno + 1 - skipped


def sizes(path):
    """Of a file and its functions: name, line, size and the most that it may be."""
    name = str(path.relative_to(PACKAGE))
    yield name, 1, len(path.read_text().splitlines()), 400
    for function in functions(path):
        yield f"{name}: {function.name}", function.lineno, lines(function), 60


def long(path):
    """Files of more than 400 lines, functions of more than 60 without docstring."""
    for name, line, size, limit in sizes(path):
        allowed = max(limit, TOO_LONG.get(name, 0))
        if size > allowed:
            where = f"{path.relative_to(PACKAGE)}:{line}"
            yield f"{where}: {name} has {size} lines, at most {allowed}"


def depth(node) -> int:
    """How many blocks lie in one another; `elif` opens none."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and node.orelse == [child]
        opens = isinstance(child, BLOCKS) and not (chained and type(child) is ast.If)
        deepest = max(deepest, opens + depth(child))
    return deepest


def nested(path):
    """Functions whose blocks lie more than four deep in one another."""
    for function in functions(path):
        if path.name != "_fast_loops.py" and depth(function) > 4:
            yield f"{at(path, function)}: {function.name} is {depth(function)} deep"


RULES = [climbs, escapes, long, nested]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    paths = sources()
    assert len(paths) > 50
    faults = [fault for path in paths for fault in rule(path)]
    assert not faults, "\n".join(faults)


def test_what_is_no_longer_too_long_leaves_the_table():
    items = [item for path in sources() for item in sizes(path)]
    gone = set(TOO_LONG) - {name for name, _, size, limit in items if size > limit}
    assert not gone, f"to be taken out of TOO_LONG: {gone}"


BAD = """
import diffprog._solve
from diffprog import losses
from ._solve import solve
def long(x):
    while x:
        for x in x:
            if x:
                with x:
                    def f():
                        return x
"""


def test_the_rules_catch_what_they_should(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / "_types.py"
    path.write_text(BAD + "    pass\n" * 60 + "\n" * 400)
    found = {rule: [fault.split(": ")[0] for fault in rule(path)] for rule in RULES}
    assert found == {
        climbs: ["_types.py:4"],
        escapes: ["_types.py:2", "_types.py:3"],
        long: ["_types.py:1", "_types.py:5"],
        nested: ["_types.py:5"],
    }


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


def public_names():
    rooms = [m.name for m in pkgutil.iter_modules(dp.__path__) if m.name[0] != "_"]
    rooms = [importlib.import_module(f"diffprog.{room}") for room in rooms]
    for module in (dp, *rooms):
        home = module.__name__.removeprefix("diffprog").removeprefix(".")
        for name, item in vars(module).items():
            own = getattr(item, "__module__", "diffprog").startswith("diffprog")
            if own and name[0] != "_" and not inspect.ismodule(item):
                yield f"{home}.{name}".removeprefix(".")


def test_public_names_are_documented():
    names = list(public_names())
    assert len(names) > 170
    assert [n for n in names if not inspect.getdoc(operator.attrgetter(n)(dp))] == []
    pages = "\n".join(p.read_text() for p in (ROOT / "docs").rglob("*.md"))
    entries = set(re.findall(r"^ *::: diffprog\.(\S+)$", pages, re.MULTILINE))
    assert set(names) - entries == set()


def listed(doc: str | None):
    """The names of a list in a docstring: "- `x`, `u`: state and control."."""
    for names in re.findall(r"^ *- (`.+?`): ", doc or "", re.MULTILINE):
        yield from names.replace("`", "").split(", ")


MADE_BY = {dp.ValueAndDirection: dp.value_and_direction}  # whose page lists the fields


def members(cls):
    """Fields and arguments, and what an abstract class asks for."""
    if hasattr(cls, "_fields"):
        return set(cls._fields)
    names = {f.name for f in dataclasses.fields(cls)}
    asked = cls.__abstractvars__ | cls.__abstractclassvars__
    names |= asked & set(inspect.get_annotations(cls))
    if not inspect.isabstract(cls):
        names |= set(inspect.signature(cls).parameters)
    return {name for name in names if not name.startswith("_")}


def test_fields_and_docs_agree():
    classes = {n: operator.attrgetter(n)(dp) for n in public_names()}
    classes = {n: cls for n, cls in classes.items() if hasattr(cls, "__match_args__")}
    assert len(classes) > 100
    differ = {}
    for name, cls in classes.items():
        docs = (MADE_BY.get(cls, cls).__doc__, vars(cls).get("__init__").__doc__)
        documented = {n for doc in docs for n in listed(doc)}
        if documented != members(cls):
            differ[name] = documented ^ members(cls)
    assert differ == {}


def test_the_list_of_identities_names_tests_that_exist():
    tests = ROOT / "tests"
    found = {
        (path.name, name)
        for path in tests.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    text = (tests / "README.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) > 150
    assert set(named) - found == set()
    # Names are words; numbers of specifications stand in the list.
    assert [name for _, name in found if re.match(r"test_[a-z]\d", name)] == []


def test_importing_is_free_of_side_effects():
    program = (
        "import sys, diffprog, jax._src.xla_bridge as bridge; "
        "assert not bridge.backends_are_initialized(); "
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
