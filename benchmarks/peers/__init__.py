"""The libraries that we are compared with, each in a module of its own."""

import functools
import importlib


@functools.cache
def load(name: str):
    """The module of a peer; None, and a line that says what to install, without it."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        print(f"{name} is skipped ({error}); install the extra `bench`: make bench")
        return None
