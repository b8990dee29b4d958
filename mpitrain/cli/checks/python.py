"""Python and the packages in it: versions, BLAS, locale, extras."""

from __future__ import annotations

import locale
import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_info

import mpitrain
from mpitrain import _env
from mpitrain.arrays import kernel as arrays_kernel
from mpitrain.cli.checks.finding import Finding, ok, warn
from mpitrain.comm.codecs import kernel as codecs_kernel
from mpitrain.comm.launch import library
from mpitrain.comm.transports import entry, kernel
from mpitrain.nn import kernel as nn_kernel
from mpitrain.optim import kernel as optim_kernel

_EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "torch": "torch", "jax": "jax"}
"""Module and distribution of what is needed for some jobs only; CuPy is looked at with the GPUs."""


def python() -> Finding:
    """Which Python, and where it keeps its packages."""
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment,"
    return ok(f"{platform.python_version()}, {kind} {sys.prefix}")


def package() -> Finding:
    """Which mpitrain."""
    return ok(f"{mpitrain.__version__}, {Path(mpitrain.__file__).parent}")


def loops() -> Finding:
    """Whether the compiled loops are there."""
    parts = {
        "the shared transport": kernel,
        "optimizers": optim_kernel,
        "layers": nn_kernel,
        "codecs": codecs_kernel,
        "random values": arrays_kernel,
    }
    lacking = [name for name, each in parts.items() if each.LIBRARY.loaded is None]
    if lacking:
        return warn(
            f"not compiled, or of another version: NumPy does the work of {', '.join(lacking)}, slower",
            "install a C compiler, then pip install --force-reinstall --no-deps mpitrain",
        )
    if not _env.kernel():
        return ok("compiled, but MPITRAIN_KERNEL=off")
    if not entry.available():
        return warn(
            "compiled, but not the short way to them and to the MPI library: a checked call takes microseconds more",
            "install Python's headers (python3-dev), then pip install --force-reinstall --no-deps mpitrain",
        )
    return ok("compiled, with the short way into them")


def numpy() -> Finding:
    """Which NumPy, and whether the threads of its BLAS can be set."""
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    libraries = [f"{pool['internal_api']} {pool['version']}" for pool in pools]
    if libraries:
        return ok(f"{np.__version__} with {', '.join(libraries)}")
    return warn(
        f"{np.__version__} with a BLAS that is not known: it is slow, or its threads cannot be divided among ranks",
        "pip install numpy, whose wheels bring OpenBLAS",
    )


def encoding() -> Finding:
    """Whether text files are UTF-8."""
    name = locale.getpreferredencoding(False)
    if name.lower().replace("-", "") == "utf8":
        return ok(name)
    return warn(f"{name}: data and job files that are not plain ASCII may be misread", "export LC_ALL=C.UTF-8")


def extras() -> Finding:
    """Which optional packages are there."""
    there = [f"{name} {version(name)}" for module, name in _EXTRAS.items() if find_spec(module)]
    missing = [name for module, name in _EXTRAS.items() if not find_spec(module)]
    return ok("; ".join(filter(None, [", ".join(there), "not installed: " + ", ".join(missing) if missing else ""])))


def conda() -> Finding | None:
    """Whether conda's Python uses conda's MPI library."""
    prefix = Path(sys.prefix)
    if not (prefix / "conda-meta").is_dir():
        return None
    path = library().path
    if path.is_relative_to(prefix) or path.resolve().is_relative_to(prefix.resolve()):
        return ok(f"Python and the MPI library are both from {prefix}")
    return warn(
        f"Python is from {prefix}, but the MPI library is {path}: they may not have been built for each other",
        "take both from one place: conda install -c conda-forge openmpi mpi4py, or a plain venv on the site's MPI",
    )
