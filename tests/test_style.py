"""The house rules that can be checked: floors, classes, public names, imports."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import operator
import pathlib
import pkgutil
import re
import runpy
import textwrap

import equinox as eqx
import pytest

import diffprog as dp


ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "diffprog"

# Who may import whom: a room imports from strictly lower floors only.
FLOORS = {
    "_common": 1,
    "_operators": 2,
    "_chain": 2,
    "constrained": 2,
    "losses": 3,
    "_control": 3,
    "oracles": 4,
    "optim": 5,
    "_training": 6,
    "extend": 7,
    "manifolds": 7,
    "__init__": 8,
    "systems": 9,
    "plot": 9,
}
NEVER = {("losses", "_chain")}
# And so do the parts of a room that has some.
CONTROL = [
    ["lqr", "report", "devices"],
    ["direction", "search", "outer", "gaps"],
    ["records"],
    ["outer_loop"],
    ["loop", "solution"],
    ["defaults", "adjoint"],
    ["solve", "layerwise"],
    ["stepping", "batch", "gradient_check", "plan", "tick"],
    ["mpc"],
    ["closed_loop"],
]
OUTSIDE = ("systems", "plot")  # these see the public door only


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def place(path: pathlib.Path) -> tuple[str, ...]:
    """Of a module below the package: `("_control", "lqr", "base")`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts


def relative_imports(path: pathlib.Path):
    """The places that a module imports from."""
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) + 1 - node.level]
            if node.module:
                yield base + tuple(node.module.split(".")), node
            else:
                yield from (((*base, alias.name), node) for alias in node.names)


def goes_down(home, there) -> bool:
    if home[0] == "__init__":
        return True  # the public door sees everything
    if home[0] in OUTSIDE or home[0] == there[0] != "_control":
        return home[0] == there[0]
    if home[0] != there[0]:
        return FLOORS[there[0]] < FLOORS[home[0]] and (home[0], there[0]) not in NEVER
    part = lambda place: [place[1] in parts for parts in CONTROL].index(True)
    return home[1] == there[1] or part(there) < part(home)


def climbs(path):
    """The imports of a module that do not go down."""
    for there, node in relative_imports(path):
        if not goes_down(place(path), there):
            yield f"{at(path, node)}: {ast.unparse(node)}"


def test_the_floors_catch_what_they_should():
    for home, there in (
        ("_common/tree", "_chain/problem"),
        ("_operators/root", "_chain/vector"),
        ("losses/_loss", "_chain/vector"),
        ("losses/_loss", "_control/solve"),
        ("oracles/_rules", "plot"),
        ("plot/_plane", "_chain/problem"),
        ("_control/lqr/base", "_control/search/base"),
        ("_control/search/base", "_control/direction/base"),
    ):
        assert not goes_down(home.split("/"), there.split("/")), (home, there)
        assert goes_down(there.split("/"), there.split("/"))


def test_no_module_imports_itself_by_way_of_others():
    graph = {place(p): {there for there, _ in relative_imports(p)} for p in sources()}
    graphlib.TopologicalSorter(graph).prepare()  # raises for a circle, and names it


def test_every_room_has_a_floor():
    rooms = {place(path)[0] for path in sources()}
    assert rooms <= set(FLOORS) and len(rooms) <= 14


def test_the_page_of_the_rooms_is_true():
    docs = ROOT / "docs"
    picture = runpy.run_path(str(docs / "programs" / "rooms.py"))["picture"]
    assert picture() == (docs / "images" / "rooms.svg").read_text()
    page = (docs / "architecture.md").read_text()
    moved = page[page.index("| then | now |") :]
    now = re.findall(r"`([\w/]+[.]py)`", "".join(re.findall(r"[|][^|]*[|]\n", moved)))
    assert len(now) > 50
    assert [path for path in now if not (ROOT / "diffprog" / path).exists()] == []


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
        if mine - ({"diffprog"} if place(path)[0] in OUTSIDE else set()):
            yield f"{at(path, node)}: {ast.unparse(node)}"


# What is too long today, and how long: a number may shrink, and no name may be added.
TOO_LONG = {}
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
        if path.name != "fast_loops.py" and depth(function) > 4:
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
import diffprog._control
from diffprog import losses
from ._control import solve
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
    path = tmp_path / "_common.py"
    path.write_text(BAD + "    pass\n" * 60 + "\n" * 400)
    found = {rule: [fault.split(": ")[0] for fault in rule(path)] for rule in RULES}
    assert found == {
        climbs: ["_common.py:4"],
        escapes: ["_common.py:2", "_common.py:3"],
        long: ["_common.py:1", "_common.py:5"],
        nested: ["_common.py:5"],
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
    says_only = lambda n: len(n.body) == 1 and ast.get_docstring(n)
    methods = {
        n.name for n in body if isinstance(n, ast.FunctionDef) and not says_only(n)
    }
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

        def hook(self) -> object:
            """Does nothing, so that who has something to do may."""

    class Child(Base):
        y: int

        def f(self):
            return self.y

        def hook(self):
            return self.y

    assert [fault for fault in faults(Child) if "overrides" in fault] == [
        "overrides Base.f"
    ]
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
