"""The page of errors: each message of the source, met by a program that shows it."""

import ast
import functools as ft
import importlib.util
import pathlib
import re
import sys

import jax
import pytest

import diffprog as dp
from diffprog._common.result import NAMES


ROOT = pathlib.Path(__file__).parents[1]


def program():
    path = ROOT / "docs" / "programs" / "errors.py"
    spec = importlib.util.spec_from_file_location("errors_of_the_page", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


errors = program()
PAGE = errors.PAGE.read_text()
KNOWN = errors.raises()


@pytest.fixture
def as_users(unchecked, tmp_path, monkeypatch):
    """No run-time types, JAX as it comes, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_traceback_filtering", "off")
    ranks, dtypes = jax.numpy_rank_promotion, jax.numpy_dtype_promotion
    with ranks("allow"), dtypes("standard"):
        yield
    jax.config.update("jax_traceback_filtering", "auto")


@ft.cache
def meetings(door, slow=False):
    """Of each program: itself, its entry on the page, and the place of its message."""
    _, setup, entries = errors.read(door)
    entries = [entry for entry in entries if entry.slow == slow]
    names, found = errors.names_of(setup) if entries else {}, []
    for entry in entries:
        met = errors.meet(entry, names)
        place = errors.place(met, KNOWN) if isinstance(met, Exception) else None
        assert place or not isinstance(met, Exception), entry
        found.append((entry, errors.entry_of(entry, met, KNOWN).strip(), place))
    return found


def are_on_the_page(found):
    for entry, text, _ in found:
        assert text in PAGE, entry


@pytest.mark.parametrize("door", errors.DOORS)
def test_wrong_calls_are_told_as_the_page_says(door, as_users):
    are_on_the_page(meetings(door))


@pytest.mark.slow
@pytest.mark.parametrize("door", errors.DOORS)
def test_results_and_late_errors_are_those_of_the_page(door, as_users):
    are_on_the_page(meetings(door, slow=True))


def test_every_message_of_the_source_is_on_the_page(as_users):
    """Those of slow programs are known by their words, if these are written there."""
    told = errors.sentences(PAGE)
    seen = [place for door in errors.DOORS for *_, place in meetings(door)]
    missing = [
        f"{one.file}:{one.lines[0]}"
        for one in KNOWN
        if one not in seen
        and not one.is_internal()
        and one.file not in errors.WORDS_ELSEWHERE
        and not one.is_among(told)
    ]
    assert not missing


def test_what_is_kept_from_the_page_is_in_the_source():
    for (file, words), reason in errors.INTERNAL.items():
        source = ast.unparse(ast.parse((ROOT / "diffprog" / file).read_text()))
        assert words in source and reason


def test_every_result_code_is_on_the_page():
    for name in NAMES:
        assert re.search(f"^### `{name}`$", PAGE, re.MULTILINE)
        assert dp.RESULTS[getattr(dp.RESULTS, name)] in " ".join(PAGE.split())
