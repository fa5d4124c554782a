"""What the pages say of the library, beside the blocks that `run_pages.py` runs."""

import pathlib
import re
import runpy
import textwrap

import pytest


ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUOTE = re.compile(r"^```{\.python title=\"(.+)\"}\n(.*?)^```$", re.DOTALL | re.M)
QUOTES = [
    (page.relative_to(DOCS).as_posix(), path, code)
    for page in sorted(DOCS.rglob("*.md"))
    for path, code in QUOTE.findall(page.read_text())
]


def missing(code: str, source: str) -> str | None:
    """The first piece that is not in the source, after the one before it.

    Pieces are separated by lines of three dots; they may be indented otherwise.
    """
    lines, start = source.splitlines(), 0
    dedented = lambda lines: textwrap.dedent("\n".join(lines)).strip("\n")
    for piece in re.split(r"^\.\.\.\n", code, flags=re.MULTILINE):
        wanted = dedented(piece.splitlines())
        size = wanted.count("\n") + 1
        places = range(start, len(lines) - size + 1)
        found = (i for i in places if dedented(lines[i : i + size]) == wanted)
        start = next(found, None)
        if start is None:
            return wanted
        start += size
    return None


def test_a_quotation_is_found_only_where_it_is():
    source = "def f(x):\n    y = x\n    return y\n\n\ndef g(x):\n    return x\n"
    assert missing("y = x\nreturn y\n", source) is None
    assert missing("    y = x\n...\ndef g(x):\n", source) is None
    assert missing("def g(x):\n...\ny = x\n", source) == "y = x"
    assert missing("y = x\n\nreturn y\n", source) is not None
    assert missing("y = z\n", source) == "y = z"


@pytest.mark.parametrize("page, path, code", QUOTES, ids=[q[0] for q in QUOTES])
def test_pages_quote_the_library_as_it_is(page, path, code):
    lost = missing(code, (ROOT / path).read_text())
    assert lost is None, f"docs/{page} quotes what is not in {path}:\n{lost}"


def test_every_concept_shows_its_lines_of_the_library():
    concepts = {page.name for page in (DOCS / "concepts").glob("*.md")}
    quoted = {name.removeprefix("concepts/") for name, _, _ in QUOTES}
    assert len(concepts) == 9 and concepts <= quoted


def test_the_picture_of_messages_is_the_program_that_draws_it():
    picture = runpy.run_path(str(DOCS / "programs" / "messages.py"))["picture"]
    assert picture() == (DOCS / "images" / "messages.svg").read_text()


def test_what_the_front_door_says_was_measured():
    """Its numbers are those of the pages that the benchmarks write, to a tenth."""
    solves = (DOCS / "benchmarks.md").read_text()
    solves = solves[solves.index("## Single solves") : solves.index("## The public")]
    ratios = re.findall(r"Crocoddyl FDDP, C\+\+ .* ([\d.]+) \|\n", solves)
    ratios = sorted(map(float, ratios))
    rows = (DOCS / "benchmarks-losses.md").read_text()
    entmax = [
        float(re.findall(rf"\| 64, 32000 \| {method} \| ([\d.]+) \|", rows)[0])
        for method in ("alpha = 1.5", "entmax15, k = 512", "entmax15, full sort")
    ]
    assert len(ratios) == 5
    number = r"([\d.]*\d)"
    said = rf"took {number} to {number} of the time of Crocoddyl.* took {number} ms"
    said += rf".* {number} to {number} ms"
    for page in (ROOT / "README.md", DOCS / "index.md"):
        numbers = re.findall(said, " ".join(page.read_text().split()))[0]
        measured = ratios[0], ratios[-1], *entmax
        assert list(map(float, numbers)) == pytest.approx(measured, rel=0.1), page


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 110


def test_the_readme_links_to_what_is_there():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).is_file()] == []


# Formulas -------------------------------------------------------------------------


def mathml(latex: str) -> str:
    pytest.importorskip("latex2mathml", reason="make docs installs latex2mathml")
    site = runpy.run_path(str(DOCS / "hooks" / "site.py"))
    return site["to_mathml"]("div", f"\\[{latex}\\]", "a page")


def test_a_bracket_with_an_exponent_is_as_large_as_what_it_holds():
    for left, right in ((r"\Bigl", r"\Bigr"), (r"\bigl", r"\bigr")):
        found = mathml(left + r"(\frac1m A" + right + ")^{-1} b")
        # The exponent belongs to the whole, and both brackets stretch.
        assert found.count('stretchy="true"') == 2 and "<msup><mrow>" in found
        assert "minsize" not in found


def test_long_formulas_break_between_their_parts():
    found = mathml(r"a = b, \qquad c = \left( d \quad e \right), \quad f = g")
    assert found.count("<math") == 3 and found.count("<div") == 1
    assert mathml(r"\begin{bmatrix} a \quad b \end{bmatrix}").count("<math") == 1


def test_functions_stand_apart_from_what_is_around_them():
    for name in ("ln", "log", "exp", "sin"):
        found = mathml(rf"u \{name} u - 1")
        assert found.count("<mspace") == 2, found
