"""What the machine gives to programs: temporary files, memory that a network card may pin, GPUs."""

from __future__ import annotations

import os
import resource
import shutil
from importlib.util import find_spec
from pathlib import Path

from mpitrain import _env
from mpitrain.arrays.gpus import Gpus, find_gpus
from mpitrain.cli.checks.finding import Finding, fail, ok, warn
from mpitrain.cli.checks.mpi import major
from mpitrain.comm.launch import library

MEBIBYTE = 2**20
_LITTLE_BYTES = 64 * MEBIBYTE
_LONG_PATH = 60
"""Open MPI 4 and older put Unix sockets some 45 characters below TMPDIR; their paths end at 108."""

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_INFINIBAND = Path("/sys/class/infiniband")


def size(count: float) -> str:
    """Return a number of bytes for people."""
    mebibytes = count / MEBIBYTE
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def temporary() -> Finding:
    """Whether an MPI library can work in the folder for temporary files."""
    folder = _env.temporary_directory()
    remedy = "export TMPDIR=/tmp, or another folder on a local disk"
    if not os.path.isdir(folder):
        return fail(f"TMPDIR={folder} is no folder: mpiexec cannot start", remedy)
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail(f"{folder} cannot be written to: mpiexec cannot start", remedy)
    free = shutil.disk_usage(folder).free
    if free < _LITTLE_BYTES:
        return warn(f"{folder} is nearly full: {size(free)} free", f"remove files there; or {remedy}")
    if len(folder) > _LONG_PATH and _old_open_mpi():
        return warn(f"TMPDIR has {len(folder)} characters, too many for the sockets of Open MPI 4", remedy)
    return ok(f"{folder}, {size(free)} free")


def _old_open_mpi() -> bool:
    return library().kind == "openmpi" and major(library().version) < 5


def locked_memory() -> Finding | None:
    """Whether an InfiniBand card may pin memory."""
    if not _INFINIBAND.is_dir() or not any(_INFINIBAND.iterdir()):
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("unlimited")
    return warn(
        f"{size(soft)} may be locked, but InfiniBand pins whole messages",
        "ask for 'memlock unlimited' in limits.conf (Slurm: LimitMEMLOCK of slurmd); docker run --ulimit memlock=-1",
    )


def gpu() -> Finding:
    """Whether CuPy sees the GPUs that are there."""
    driver = _NVIDIA_DRIVER.exists()
    if find_spec("cupy") is None:
        if driver:
            return warn("an NVIDIA driver, but CuPy is not installed", "pip install 'mpitrain[cuda13]' (or cuda12)")
        return ok("none (no NVIDIA driver, CuPy not installed)")
    return _seen(find_gpus(), driver)


def _seen(found: Gpus, driver: bool) -> Finding:
    text = f"CuPy {found.cupy} for CUDA {_cuda(found.runtime)}"
    if found.driver and found.driver // 1000 < found.runtime // 1000:
        return fail(
            f"{text}, but the driver knows only CUDA {_cuda(found.driver)}",
            f"pip uninstall cupy-cuda{found.runtime // 1000}x, pip install cupy-cuda{found.driver // 1000}x",
        )
    if found.names:
        kinds = ", ".join(f"{found.names.count(name)} x {name}" for name in dict.fromkeys(found.names))
        return ok(f"{kinds}; {text}, driver {_cuda(found.driver)}")
    if driver:
        return warn(
            f"{text} sees no device",
            "look at CUDA_VISIBLE_DEVICES; ask Slurm for --gpus-per-node, docker run for --gpus all",
        )
    return ok(f"none (no NVIDIA driver); {text}")


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
