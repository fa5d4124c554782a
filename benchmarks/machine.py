"""What the numbers were measured on and with."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess


PACKAGES = (
    "diffprog",
    "jax",
    "jaxlib",
    "equinox",
    "numpy",
    "casadi",
    "crocoddyl",
    "mim-solvers",
    "jaxopt",
    "optimistix",
    "mpc",
    "torch",
    "optax",
    "entmax",
    "kfac-jax",
    "cooper-optim",
)


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in fields}
        if "model name" in values:
            family = values.get("cpu family"), values.get("model")
            return f"{values['model name']}, family {family[0]}, model {family[1]}"
    return platform.processor() or platform.machine()


def compiler() -> str:
    command = shutil.which("g++") or shutil.which("clang++")
    if not command:
        return "none"
    lines = subprocess.run([command, "--version"], capture_output=True, text=True)
    return lines.stdout.splitlines()[0]


def describe() -> dict:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load at the start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "Python": platform.python_version(),
        "C++ compiler": compiler(),
        "versions": versions(),
    }
