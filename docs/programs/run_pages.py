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
import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


DOCS = pathlib.Path(__file__).parents[1]
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


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ["--one"]:
        sys.exit(not run(pathlib.Path(arguments[1]), "--update" in arguments))
    update = [argument for argument in arguments if argument == "--update"]
    pages = [argument for argument in arguments if argument != "--update"]
    written = [path for path in DOCS.rglob("*.md") if path.parent.name != "tutorials"]
    pages = pages or sorted(map(str, written))
    pages = [page for page in pages if "```python" in pathlib.Path(page).read_text()]

    def one(page: str) -> bool:
        command = [sys.executable, __file__, "--one", page, *update]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        good = process.returncode == 0
        print(f"{process.stdout}{'good' if good else 'bad '} {page}", flush=True)
        return good

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sys.exit(not all([*pool.map(one, pages)]))


if __name__ == "__main__":
    main()
