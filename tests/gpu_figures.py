"""Sums of arrays on a GPU, and training steps: measured, and shown in ``docs/results/gpu.md``.

    python tests/gpu_figures.py measure h100 [FOLDER]     # two ranks, a minute; the name is that of the GPU
    python tests/gpu_figures.py steps h100 [FOLDER]       # adds training steps, `tests/gpu_steps.py`
    python tests/gpu_figures.py page                      # tables, from what was measured

`measure` leaves ``docs/results/gpu/NAME.json``, or it in FOLDER; `page` writes all below the page's marker anew.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.comm.launch import launch_command, library

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results" / "gpu"
PAGE = FOLDER.with_suffix(".md")
MARKER = "<!-- All below is written by `python tests/gpu_figures.py page`. -->\n"

SIZES = (4, 4096, 65536, 2**20, 2**22, 2**24, 2**26)
ROUNDS, CALLS = 15, 3

Call = Callable[[Any], Any]


def measure(machine: str, folder: Path) -> None:
    """Start two ranks, which work on the same GPU if there is one."""
    file = folder / f"{machine}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    argv, env = launch_command(2, [sys.executable, __file__, "rank", str(file)])
    subprocess.run(argv, check=True, env=env | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)


def steps(machine: str, folder: Path) -> None:
    """Add training steps of one process, with PyTorch, to what was measured."""
    file, added = folder / f"{machine}.json", folder / f"{machine}-steps.json"
    program = [sys.executable, "tests/gpu_steps.py", str(added)]
    subprocess.run(program, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ms": json.loads(added.read_text())}, indent=1) + "\n")
    added.unlink()
    print(_section(machine, json.loads(file.read_text())))


def rank(file: Path) -> None:
    """Time every contestant in turn, the slowest rank of each call, and write the medians."""
    import cupy

    from mpitrain.arrays.gpus import use_gpu

    world = _mpi().COMM_WORLD
    use_gpu(world.rank)
    found: dict[str, dict[str, float]] = {}
    with _gloo() as gloo:
        calls = {**dict(_contestants(world)), **gloo}
        for nbytes in SIZES:
            x = cupy.arange(nbytes // 4, dtype=cupy.float32) % 1009 + world.rank
            expected = 2 * (cupy.arange(nbytes // 4, dtype=cupy.float32) % 1009) + 1
            times: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(ROUNDS + 1):
                for name, call in calls.items():
                    for _ in range(CALLS if turn else 1):
                        y = x.copy()
                        taken = _timed(world, call, y)
                        assert bool((y == expected).all()), f"{name}, {nbytes} bytes: wrong"
                        if turn:  # the first compiles and allocates
                            times[name].append(taken)
            found[str(nbytes)] = {name: 1e6 * statistics.median(each) for name, each in times.items()}
    if world.rank == 0:
        file.write_text(json.dumps({"machine": _machine(), "copies": _copies(), "us": found}, indent=1) + "\n")
        print(_section(file.stem, json.loads(file.read_text())))


def _timed(world: Any, call: Call, y: Any) -> float:
    import cupy

    cupy.cuda.get_current_stream().synchronize()
    world.Barrier()
    begun = time.perf_counter()
    call(y)
    cupy.cuda.get_current_stream().synchronize()
    taken = np.array([time.perf_counter() - begun])
    world.Allreduce(_mpi().IN_PLACE, taken, _mpi().MAX)
    return float(taken[0])


def _mpi() -> Any:
    """Return mpi4py's module, whose import starts MPI."""
    from mpi4py import MPI

    return MPI


def _contestants(world: Any) -> Iterator[tuple[str, Call]]:
    """Yield what sums in place: mpitrain by each transport that this library allows, and others."""
    import cupy

    from mpitrain.comm import Communicator
    from mpitrain.comm.support import support

    cuda_aware = bool(support().cuda_aware)
    for name in ("ipc", "staged", *(["cuda_aware"] if cuda_aware else [])):
        os.environ["MPITRAIN_DEVICE_TRANSPORT"] = name
        comm = Communicator.from_mpi(world)
        assert comm.device_transport == name
        yield f"mpitrain, {name}", lambda y, comm=comm: comm.allreduce(y, out=y)

    def by_hand(y: Any) -> None:
        host = cupy.asnumpy(y)
        world.Allreduce(_mpi().IN_PLACE, host)
        y.set(host)

    yield "mpi4py, copied by hand", by_hand
    if cuda_aware:
        yield "mpi4py, on the device", lambda y: world.Allreduce(_mpi().IN_PLACE, y)


@contextmanager
def _gloo() -> Iterator[dict[str, Call]]:
    """Let PyTorch sum by gloo in the block, where it is installed."""
    try:
        import torch
    except ImportError:
        yield {}
        return
    from torch import distributed

    world = _mpi().COMM_WORLD
    store = distributed.TCPStore("127.0.0.1", 29512, world.size, world.rank == 0)
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    try:
        yield {"PyTorch, gloo": lambda y: distributed.all_reduce(torch.from_dlpack(y))}
    finally:
        distributed.destroy_process_group()


def _machine() -> dict[str, str]:
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    packages = {"CuPy": "cupy-cuda13x", "mpi4py": "mpi4py", "PyTorch": "torch", "NumPy": "numpy"}
    versions = {each: _version(package) for each, package in packages.items()}
    return {
        "GPUs": f"{cupy.cuda.runtime.getDeviceCount()} x {name}", "CPUs": str(len(os.sched_getaffinity(0))),
        "MPI": library().version.split(",")[0], "Python": platform.python_version(), **versions,
        "CUDA": str(cupy.cuda.runtime.runtimeGetVersion()),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError is one
        return "none"


def _copies() -> dict[str, float]:
    """Return GB/s of copies of 64 MiB: read and written on the device, one way between it and page-locked memory."""
    import cupy

    runtime, stream, nbytes = cupy.cuda.runtime, cupy.cuda.Stream(non_blocking=True), 2**26
    a, b = cupy.empty(nbytes, np.uint8), cupy.empty(nbytes, np.uint8)
    host = np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes).ctypes.data
    moves = {
        "on the device, read and written": (b.data.ptr, a.data.ptr, runtime.memcpyDeviceToDevice, 2),
        "down": (host, a.data.ptr, runtime.memcpyDeviceToHost, 1),
        "up": (a.data.ptr, host, runtime.memcpyHostToDevice, 1),
    }
    found = {}
    for name, (to, of, kind, factor) in moves.items():
        for turns in (2, 20):
            stream.synchronize()
            begun = time.perf_counter()
            for _ in range(turns):
                runtime.memcpyAsync(to, of, nbytes, kind, stream.ptr)
            stream.synchronize()
            found[name] = factor * turns * nbytes / (time.perf_counter() - begun) / 1e9
    return found


def page(folder: Path = FOLDER) -> str:
    """Return what stands below the marker: a section for each machine."""
    return "\n".join(_section(file.stem, json.loads(file.read_text())) for file in sorted(folder.glob("*.json")))


def _section(name: str, found: dict[str, Any]) -> str:
    lines = [f"## {name}", "", ", ".join(f"{what} {which}" for what, which in found["machine"].items()) + ".", ""]
    lines += ["Copies of 64 MiB, GB/s: " + ", ".join(f"{w} {r:.0f}" for w, r in found["copies"].items()) + ".", ""]
    lines += _table("bytes", {_bytes(int(size)): times for size, times in found["us"].items()}, 0)
    if "ms" in found:
        lines += ["", "Training steps of GPTs with AdamW, one process, ms:", "", *_table("GPT", found["ms"], 1)]
    return "\n".join(lines) + "\n"


def _table(what: str, rows: dict[str, dict[str, float]], digits: int) -> Iterator[str]:
    """Yield a table whose least figure of each row is bold."""
    names = list(next(iter(rows.values())))
    yield f"| {what} | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for label, row in rows.items():
        cells = (f"**{row[name]:.{digits}f}**" if row[name] == min(row.values()) else f"{row[name]:.{digits}f}"
                 for name in names)  # fmt: skip
        yield f"| {label} | " + " | ".join(cells) + " |"


def _bytes(count: int) -> str:
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count // factor} {unit}"
    return f"{count} B"


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command in ("measure", "steps") and rest:
        {"measure": measure, "steps": steps}[command](rest[0], Path(rest[1]) if rest[1:] else FOLDER)
    elif command == "rank":
        rank(Path(rest[0]))
    elif command == "page":
        PAGE.write_text(PAGE.read_text().partition(MARKER)[0] + MARKER + "\n" + page())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
