"""Runs the Python blocks of the documentation and compares what they print.

    .venv/bin/python docs/programs/run_pages.py [--update] [page ...]

The blocks of a page run in order, in one process of their own. A `text` block right
after a Python block is what that block prints: words must agree, numbers to 1 percent
(or both be below 1e-3, where only rounding is left). `--update` writes what was
printed into the page instead. Pages in `docs/tutorials/` are left out: their programs
are examples, which tests run.
"""

import contextlib
import io
import multiprocessing
import os
import pathlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor


ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.quick import compile_quickly


DOCS = ROOT / "docs"
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def run(page: pathlib.Path, update: bool) -> bool:
    text, parts, end, good = page.read_text(), [], 0, True
    names = {"__name__": page.stem}
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        out = io.StringIO()
        # The newlines keep the line numbers of errors those of the page.
        code = compile("\n" * line + match["code"], str(page), "exec")
        with contextlib.redirect_stdout(out):
            exec(code, names)
        printed, stated = out.getvalue(), match["printed"] or ""
        if not agree(printed, stated):
            good = False
            print(f"{page}:{line} prints\n{printed}and not\n{stated}")
        block = f"```python\n{match['code']}```\n"
        if printed:
            block += f"\n```text\n{printed}```\n"
        parts += [text[end : match.start()], block]
        end = match.end()
    if update:
        page.write_text("".join([*parts, text[end:]]))
    return good or update


def agree(printed: str, stated: str) -> bool:
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", stated).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(stated), strict=True)
    return all(close(float(a), float(b)) for a, b in pairs)


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * max(abs(a), abs(b)) or max(abs(a), abs(b)) < 1e-3


def run_apart(page: str, update: bool, answer):
    """In a process of its own; it answers what was printed, and whether all is good."""
    out, good = io.StringIO(), False
    compile_quickly()
    try:
        with contextlib.redirect_stdout(out):
            good = run(pathlib.Path(page), update)
    finally:
        answer.send((out.getvalue(), good))


def main():
    update = "--update" in sys.argv
    pages = [argument for argument in sys.argv[1:] if argument != "--update"]
    written = [path for path in DOCS.rglob("*.md") if path.parent.name != "tutorials"]
    pages = pages or sorted(map(str, written))
    code = lambda page: sum(
        len(b) for b, _ in BLOCK.findall(pathlib.Path(page).read_text())
    )
    # Long ones first: both processes end at about the same time.
    pages = sorted(filter(code, pages), key=code, reverse=True)
    # Each process begins as a copy of one that has imported what takes long.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffprog", "optax"])

    def one(page: str) -> bool:
        question, answer = context.Pipe(duplex=False)
        process = context.Process(target=run_apart, args=(page, update, answer))
        process.start()
        answer.close()
        try:
            printed, good = question.recv()
        except EOFError:  # the process came to an end
            printed, good = "", False
        process.join()
        print(f"{printed}{'good' if good else 'bad '} {page}", flush=True)
        return good

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sys.exit(not all([*pool.map(one, pages)]))


if __name__ == "__main__":
    main()
