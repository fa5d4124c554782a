"""The built site: what the pages of the interface say, and how pages look.

    make docs browser

`make test` skips this file: it builds no site and needs no browser.
"""

import dataclasses
import html
import inspect
import operator
import pathlib
import re

import pytest

import diffprog as dp

from .test_style import public_names


ENTRY = re.compile(
    r'<h\d id="(?P<name>diffprog[^"]*)"'
    r'|<div class="doc-signature highlight"><pre>(?P<signature>.*?)</pre>',
    re.DOTALL,
)
# What the solver alone calls, and nobody writes for himself.
INTERNAL = {"AugmentedLagrangian"}


@pytest.fixture(scope="module")
def site(request):
    path = request.config.getoption("--site")
    if path is None:
        pytest.skip("no built site: `make docs browser` builds and reads it")
    path = pathlib.Path(path).resolve()
    assert (path / "index.html").exists(), f"{path} has no site: run `make docs`"
    return path


@pytest.fixture(scope="module")
def entries(site):
    """By name, the signature of every entry of the interface."""
    found = {}
    for page in site.rglob("*.html"):
        name = None
        for match in ENTRY.finditer(page.read_text()):
            name = match["name"] or name
            text = html.unescape(re.sub("<[^>]*>", "", match["signature"] or ""))
            found[name] = found.get(name, "") + text
    return found


def public():
    return {name: operator.attrgetter(name)(dp) for name in public_names()}


def methods(cls):
    """The names of its methods and properties, but for those of other packages."""
    is_record = dataclasses.is_dataclass(cls)
    fields = {f.name for f in dataclasses.fields(cls)} if is_record else ()
    for name in dir(cls):
        item = inspect.getattr_static(cls, name)
        first = [base for base in cls.__mro__ if name in vars(base)][-1]
        if name in fields or (name.startswith("_") and name != "__call__"):
            continue
        if not first.__module__.startswith("diffprog"):
            continue
        if callable(item) or isinstance(item, property | staticmethod | classmethod):
            yield name, isinstance(item, property)


def told(name, families) -> bool:
    """Whether the list or the table of a class, or of its base, has the method."""
    docs = "".join(f"{c.__doc__} {c.__init__.__doc__}" for c in families)
    return f"`{name}`" in docs or f"`{name}(" in docs


def test_every_public_function_has_a_signature(entries):
    functions = [name for name, item in public().items() if inspect.isroutine(item)]
    assert len(functions) > 60
    unsigned = lambda name: (
        not entries.get(f"diffprog.{name}", "").startswith(name.split(".")[-1] + "(")
    )
    assert [name for name in functions if unsigned(name)] == []


def test_every_public_method_has_a_signature(entries):
    classes = {name: c for name, c in public().items() if inspect.isclass(c)}
    checked, missing = 0, []
    for name, cls in classes.items():
        families = {n: c for n, c in classes.items() if c in cls.__mro__}
        for method, is_property in methods(cls):
            start = method + ("" if is_property else "(")
            signed = (entries.get(f"diffprog.{n}.{method}", "") for n in families)
            checked += 1
            if name not in INTERNAL and not told(method, families.values()):
                if not any(text.startswith(start) for text in signed):
                    missing.append(f"{name}.{method}")
    assert checked > 400
    assert missing == []
