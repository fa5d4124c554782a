"""Turns formulas into MathML while the site is built, so that pages need no script."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError


# Objects of other packages that docstrings refer to. A table here instead of their
# inventories: the build needs no network.
EXTERNAL = {
    "equinox.Module": "https://docs.kidger.site/equinox/api/module/module/",
    "equinox.nn.GRUCell": "https://docs.kidger.site/equinox/api/nn/rnn/",
    "equinox.nn.Linear": "https://docs.kidger.site/equinox/api/nn/linear/",
    "equinox.nn.Sequential": "https://docs.kidger.site/equinox/api/nn/sequential/",
}

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?P<source>.*?)</(?P=tag)>', re.DOTALL
)
# What Python says of a constructor that has no docstring.
NO_DOCSTRING = "<p>Initialize self.  See help(type(self)) for accurate signature.</p>"
TEXT = re.compile(r"\\text\{[^{}]*\}")
FUNCTION = re.compile(
    r"(?P<before>[\w})\]]\s*)?\\(?P<name>sin|cos|tan|arctan|log|ln|exp)(?![A-Za-z])"
    r"(?P<after>\s*(?=[\\\w{]))?"
)
SIZED = re.compile(r"\\[bB]igg?(?P<side>[lr])(?![A-Za-z])")
# What opens and closes a group in which no formula may break, and where it may.
GROUPS = re.compile(
    r"(?P<open>(?<!\\)\{|\\begin(?=\{)|\\left(?![a-z]))"
    r"|(?P<close>(?<!\\)\}|\\end(?=\{)|\\right(?![a-z]))"
    r"|(?P<gap>\\q?quad(?![a-z]))"
)
DELIMITERS = {"span": ("\\(", "\\)", "inline"), "div": ("\\[", "\\]", "block")}


def on_files(files, config):
    autorefs = config.plugins["autorefs"]
    for name, url in EXTERNAL.items():
        autorefs.register_url(name, url)
    return files


def on_page_content(content, page, config, files):
    def mathml(match):
        return to_mathml(match["tag"], match["source"], page.file.src_uri)

    content = FORMULA.sub(mathml, content.replace(NO_DOCSTRING, ""))
    # No line begins with the period after a formula: a word joiner.
    return re.sub(r"</math>(?=[.,;:)])", "</math>&#8288;", content)


def to_mathml(tag, source, where):
    """One arithmatex element as MathML; fails with the name of its page."""
    opening, closing, display = DELIMITERS[tag]
    source = html.unescape(source).strip()
    if not (source.startswith(opening) and source.endswith(closing)):
        raise PluginError(f"{where}: a formula without delimiters: {source}")
    latex = source[len(opening) : -len(closing)]
    if tag == "span":
        return to_one(latex, display, where)
    # Markdown takes two displays one after the other for one.
    lines = [line for line in latex.split("$$") if line.strip()]
    parts = ["".join(to_one(p, display, where) for p in pieces(s)) for s in lines]
    return "".join(f'<div class="formula">{part}</div>' for part in parts)


def pieces(latex):
    """The parts of a display between its wide spaces, where a narrow page breaks it.

    Brackets of a given size become those that stretch: an exponent belongs to both.
    """
    latex = SIZED.sub(lambda m: dict(l=r"\left", r=r"\right")[m["side"]], latex)
    depth, start = 0, 0
    for found in GROUPS.finditer(latex):
        depth += bool(found["open"]) - bool(found["close"])
        if found["gap"] and depth == 0:
            yield latex[start : found.start()]
            start = found.end()
    yield latex[start:]


def to_one(latex, display, where):
    if len(re.findall(r"(?<!\\)\{", latex)) != len(re.findall(r"(?<!\\)\}", latex)):
        raise PluginError(f"{where}: braces do not match in {latex}")
    prepared = FUNCTION.sub(spaced, latex.strip())
    prepared = prepared.replace("{aligned}", "{align*}")
    # Inside \text a word may carry underscores, which latex2mathml does not unescape.
    prepared = TEXT.sub(lambda m: m[0].replace(r"\_", "_"), prepared)
    if display == "block":  # what is minimized over stands below
        prepared = re.sub(r"\\(min|max)_", r"\\\1\\limits_", prepared)
    try:
        converted = convert(prepared, display=display)
    except Exception as error:
        raise PluginError(f"{where}: no MathML for {latex}: {error!r}") from error
    converted = converted.replace('columnspacing="0em 2em"', 'columnspacing="0em 1em"')
    # What is not understood comes back as text.
    unknown = re.search(r"\\[A-Za-z]+|[$&]", html.unescape(converted))
    if unknown:
        raise PluginError(f"{where}: {unknown[0]} is not understood in {latex}")
    return converted


def spaced(match):
    """A function name with thin spaces, as TeX has them and latex2mathml has not."""
    before, after = match["before"], match["after"]
    name = match["name"]
    return (
        (before + r"\," if before else "")
        + f"\\{name}"
        + ("" if after is None else r"\, ")
    )
