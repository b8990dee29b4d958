"""In which socket and cache domain of its machine a process runs, as the kernel of the operating system tells it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CACHE_LEVELS = 4


def domain(cpus: Iterable[int], root: Path = _CPUS) -> tuple[int, ...] | None:
    """Return the socket and the last-level cache that all of these CPUs share; None if they do not, or none is told.

    Parameters
    ----------
    cpus : iterable of int
        Where a process may run.
    root : Path
        The directory of CPUs in sysfs.
    """
    try:
        found = {_of(root / f"cpu{cpu}") for cpu in cpus}
    except (OSError, ValueError):
        return None
    return found.pop() if len(found) == 1 else None


def _of(cpu: Path) -> tuple[int, int]:
    socket = int((cpu / "topology" / "physical_package_id").read_text())
    caches = (cpu / "cache" / f"index{level}" for level in range(_CACHE_LEVELS, 0, -1))
    last = next((cache for cache in caches if cache.is_dir()), None)
    if last is None:
        return socket, 0
    return socket, int((last / "shared_cpu_list").read_text().split(",")[0].split("-")[0])
