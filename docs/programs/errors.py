"""The page of errors, from programs that meet them.

    .venv/bin/python docs/programs/errors.py [--update] [--missing] [door ...]

A door is a file of `wrong_calls`. Its docstring is a title and an introduction, what
comes before the first cell is run once, and then every cell (`# %%`) on its own: the
comment that begins it says what to do about the error that its program ends with, or
is a heading. `[slow]` before the comment marks what takes a second or more.

All programs are run, and compared with the page; `--update` writes the page, and
`--missing` lists the errors of the source that no program meets. What is never shown to
a user is in `INTERNAL`.
"""

import ast
import contextlib
import html
import importlib.metadata
import io
import os
import pathlib
import re
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass, field


ROOT = pathlib.Path(__file__).parents[2]
PAGE, CALLS = ROOT / "docs" / "errors.md", ROOT / "docs" / "programs" / "wrong_calls"
DOORS = """
results problems solve horizons networks training losses optim constrained own
systems pictures
""".split()
# Files, and words of a message or the name of what is raised: why it is on no page.
INTERNAL = {
    ("_common/code.py", "_Unknown"): "caught there: such a function is like no other",
    ("_common/straight.py", "_NotStraight"): "caught there: the loop stays one",
    ("_common/fast_loops.py", "_Obstacle"): "caught there: `FastLoopsError` says it",
    ("_common/saving.py", "_damaged"): "one message, whatever is damaged",
    ("_common/saving.py", "was found"): "caught there: the file is damaged",
    ("_common/saving.py", "lies on other machines"): "needs several machines",
    ("oracles/_rules.py", "there are products alone"): "an oracle of one's own",
    ("optim/_structures.py", "a leaf of shape"): "part of `does not fit the structure`",
    ("systems/_track_checks.py", "it begins with"): "part of `is not an array`",
}
# Files with messages that are put together elsewhere, which slow programs meet.
WORDS_ELSEWHERE = {
    "_chain/derivatives.py",
    "_common/door.py",
    "_common/result.py",
    "_control/lqr/expand.py",
    "optim/_checks.py",
}
SHOWN = re.compile(r"0x[0-9a-f]+")  # addresses, which are others at every run
SPECIAL = str.maketrans({c: f"&#{ord(c)};" for c in "\\*_[]{}|~$"})


@dataclass
class Raise:
    """A place in the source that raises: what, and a pattern of its message."""

    file: str
    lines: range
    raised: str
    pattern: re.Pattern | None

    def says(self, message: str) -> re.Match | None:
        return self.pattern and self.pattern.fullmatch(message)

    def is_among(self, told: list[str]) -> bool:
        return any(self.says(t.removeprefix(f"{self.raised}: ")) for t in told)

    def is_internal(self) -> bool:
        words = self.raised + (self.pattern.pattern if self.pattern else "")
        return any(
            file == self.file and part in words.replace("\\", "")
            for file, part in INTERNAL
        )


@dataclass
class Entry:
    """A cell: the advice, the program, and headings before it."""

    door: str
    advice: str
    program: str
    slow: bool
    before: list[str] = field(default_factory=list)

    def __str__(self):
        return f"{self.door}: {self.program.strip()}"


# The source -----------------------------------------------------------------------


def raises() -> list[Raise]:
    """All of the package, but those that hand on what came."""
    found = []
    for path in sorted((ROOT / "diffprog").rglob("*.py")):
        file = path.relative_to(ROOT / "diffprog").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                call = isinstance(node.exc, ast.Call)
                raised = node.exc.func if call else node.exc
                message = node.exc.args[0] if call and node.exc.args else None
                found.append(Raise(file, lines, ast.unparse(raised), pattern(message)))
    return found


def pattern(message: ast.expr | None) -> re.Pattern | None:
    """Of a message that is written where it is raised: a group for what varies."""
    written = template(message)
    known = re.search("[a-z]{2}", written.replace("(.*?)", ""))
    return re.compile(written, re.DOTALL) if known else None


def template(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(str() as text):
            return re.escape(text)
        case ast.JoinedStr(values):
            return "".join(map(template, values))
        case ast.BinOp(left, ast.Add(), right):
            return template(left) + template(right)
    return "(.*?)"


def place(error: BaseException, known: list[Raise]) -> Raise | None:
    """Where the package raised it."""
    inside = f"{os.sep}diffprog{os.sep}"
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        _, found, file = frame.f_code.co_filename.rpartition(inside)
        file = file.replace(os.sep, "/")
        for one in known if found else ():
            if one.file == file and line in one.lines:
                return one
    # What a call from a compiled program raised comes as a text.
    for one in known if type(error).__name__ == "JaxRuntimeError" else ():
        if one.says(plain(error).removeprefix(f"{one.raised}: ")):
            return one
    return None


def plain(error: BaseException) -> str:
    """The message, or its end where a traceback comes before it; of any version."""
    text = SHOWN.sub("0x...", str(error)).replace(os.getcwd() + os.sep, "")
    own = importlib.metadata.version("diffprog")
    text = text.replace(f"this is diffprog {own},", "this is diffprog VERSION,")
    if "Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1]
    return " ".join(text.split())


# The programs ---------------------------------------------------------------------


def read(door: str) -> tuple[str, str, list[Entry]]:
    """Its docstring, what is run before, and its cells."""
    first, *cells = re.split("^# %% ?", (CALLS / f"{door}.py").read_text(), flags=re.M)
    entries, headings = [], []
    for cell in cells:
        lines = cell.splitlines()
        program = next(
            (i for i, l in enumerate(lines) if i and l[:1] != "#"), len(lines)
        )
        words = " ".join(line.removeprefix("# ") for line in lines[:program])
        if words.startswith("#"):
            title, _, rest = words.partition(". ")
            headings += [title, filled(rest, 0)] if rest else [title]
            continue
        text, code = words.removeprefix("[slow] "), "\n".join(lines[program:])
        slow = text != words
        entries.append(Entry(door, text, code.strip() + "\n", slow, headings))
        headings = []
    return ast.get_docstring(ast.parse(first)) or "", first, entries


def names_of(setup: str) -> dict:
    names = {"__name__": "wrong_calls"}
    exec(compile(setup, "setup", "exec"), names)
    return names


def meet(entry: Entry, names: dict) -> BaseException | object:
    """The error of a program, or the `result` that it ends with."""
    names = dict(names)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(entry.program, "program", "exec"), names)
    except Exception as error:
        return error
    return names.get("result")


# The page -------------------------------------------------------------------------


def entry_of(entry: Entry, met, known: list[Raise]) -> str:
    """An entry of the page, without headings."""
    assert met is not None, f"No error, and no `result`: {entry}"
    program, advice = entry.program.strip(), entry.advice
    lines = []
    if "\n" in program or "`" in program or len(program) > 100:
        lines.append(f"- {filled(sentence(met, known))}\n\n")
        block = f"```py\n{program}\n```"
        lines.append(f"{textwrap.indent(block, '    ')}\n\n    {filled(advice, 4)}\n\n")
    else:
        lines.append(f"- {filled(sentence(met, known) + '<br>')}\n  `{program}`<br>\n")
        lines.append(f"  {filled(advice)}\n\n")
    return "".join(lines)


def filled(text: str, indent: int = 2) -> str:
    options = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(text, 118 - indent, **options).replace(
        "\n", "\n" + " " * indent
    )


def sentence(met, known: list[Raise]) -> str:
    """What it says, in HTML: what varies is marked."""
    if not isinstance(met, Exception):
        import diffprog as dp

        return f"`result`: {dp.RESULTS[met]}"
    text, where = plain(met), place(met, known)
    prefix = f"{where.raised}: " if where else ""
    prefix = prefix if text.startswith(prefix) else ""
    match = where and where.says(text.removeprefix(prefix))
    spans = [match.span(i) for i in range(1, len(match.regs))] if match else []
    for a, b in reversed(spans):
        a, b = a + len(prefix), b + len(prefix)
        text = f"{text[:a]}\x01{text[a:b]}\x02{text[b:]}" if a < b else text
    text = html.escape(text, quote=False).translate(SPECIAL)
    text = re.sub("`([^`]*)`", r"<code>\1</code>", text)
    text = text.replace("\x01", "<var>").replace("\x02", "</var>")
    return f"**{type(met).__name__}**: {text}"


def sentences(page: str) -> list[str]:
    """All that it says, as it was said."""
    found = re.findall(
        r"^- \*\*\w+\*\*: (.*?)(?:<br>\n|\n\n)", page, re.DOTALL | re.MULTILINE
    )
    found = [text.replace("<code>", "`").replace("</code>", "`") for text in found]
    return [" ".join(html.unescape(re.sub("<[^>]*>", "", t)).split()) for t in found]


def section(door: str, known: list[Raise]) -> tuple[str, list[Raise | None]]:
    """The part of the page of one door, and the places of the source that it met."""
    doc, setup, entries = read(door)
    title, _, text = doc.partition("\n")
    text = "\n\n".join(filled(" ".join(p.split()), 0) for p in text.split("\n\n"))
    parts, places, names = (
        [f"## {title.rstrip('.')}\n\n{text}\n\n"],
        [],
        names_of(setup),
    )
    for entry in entries:
        met = meet(entry, names)
        parts += [f"{line}\n\n" for line in entry.before]
        parts.append(entry_of(entry, met, known))
        if isinstance(met, Exception):
            places.append(place(met, known))
            if places[-1] is None:
                print(f"Not of this package: {entry}\n    {met!r:.300}")
    return "".join(parts).rstrip() + "\n", places


def replaced(page: str, new: dict[str, str]) -> str:
    """The page with other sections."""
    title = lambda text: text.partition("\n")[0]
    known = {title(t): t for t in re.split("^(?=## )", page, flags=re.MULTILINE)}
    known |= {title(text): text for text in new.values()}
    order = [f"## {read(door)[0].splitlines()[0].rstrip('.')}" for door in DOORS]
    parts = [(CALLS / "head.md").read_text(), *(known[t] for t in order if t in known)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def main():
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_traceback_filtering", "off")
    options = [a for a in sys.argv[1:] if a.startswith("--")]
    doors = [a for a in sys.argv[1:] if not a.startswith("--")] or DOORS
    known, new, met = raises(), {}, []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for door in doors:
            new[door], places = section(door, known)
            met += places
    if "--missing" in options:
        for one in known:
            if one not in met and not one.is_internal():
                print(f"{one.file}:{one.lines[0]} {one.raised}")
    page = PAGE.read_text() if PAGE.exists() else ""
    if "--update" in options:
        PAGE.write_text(replaced(page, new))
    elif replaced(page, new) != page:
        sys.exit("docs/errors.md is not what the programs end with: --update it.")


if __name__ == "__main__":
    main()
