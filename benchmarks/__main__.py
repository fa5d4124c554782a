"""Measures and prints everything, or some sections.

    python -m benchmarks [--only single lqr ...] [--write docs]

The numbers go to `out/benchmarks.json`. With `--write docs` they also become the pages
of the documentation whose sections were all measured, such as `docs/benchmarks.md`, and
their pictures.
"""

import argparse
import gc
import importlib
import json
import pathlib
import shlex
import sys
import time

from . import machine, pin, promises, report


SECTIONS = tuple(name for names in report.PAGES.values() for name in names)


def arguments():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--write", choices=["docs"])
    parser.add_argument("--out", type=pathlib.Path, default="out")
    args = parser.parse_args()
    whole = [page for page, names in report.PAGES.items() if {*names} <= {*args.only}]
    if args.write and not whole:
        parser.error("a page needs all its sections: give --write without --only")
    args.pages = whole if args.write else []
    return args


def main():
    args = arguments()
    pin()
    command = shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    results = {"machine": machine.describe() | {"command": command}, "sections": {}}
    print("\n".join(report.machine_lines(results["machine"])))
    for name in args.only:
        section = importlib.import_module(f".{name}", __package__)
        gc.collect()
        gc.freeze()  # a first call must not look through what other sections left
        start = time.perf_counter()
        rows = section.run()
        seconds = time.perf_counter() - start
        results["sections"][name] = rows
        print(f"\n{section.TITLE} ({seconds:.0f} s)\n")
        print(report.text_table(rows, section.COLUMNS), flush=True)
    results["promises"] = promises.check(results["sections"])
    print(f"\n{promises.TITLE}\n")
    print(report.text_table(results["promises"], promises.COLUMNS))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmarks.json").write_text(json.dumps(results, indent=1))
    for page in args.pages:
        report.write_page(page, results)


if __name__ == "__main__":
    main()
