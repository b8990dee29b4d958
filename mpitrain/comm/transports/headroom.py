"""How much memory this process may still take before the kernel ends processes for it.

Files in memory have no limit of their own: one that asks for more pages than there are is not refused, but the kernel
kills whom it likes.  So whoever is about to back a file asks here first.  What is free now may be taken a moment
later; a request that nothing could ever meet is told apart from those that can be met.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
_NAMES = {
    2: ("memory.max", "memory.current", ""),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}
"""By version of control groups: the files of limit and use, and how the names of totals begin in ``memory.stat``."""

_DROPPABLE = "(?:inactive_file|active_file|slab_reclaimable)"
"""What the kernel drops before it ends anything: copies of files too, however often they were read."""

_NO_LIMIT = 2**62
"""From here on a limit of version 1 says that there is none."""


def headroom_bytes(meminfo: Path = _MEMINFO, membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> int | None:
    """Return the bytes that can still be had, within the limits of a job or container too; None if nobody tells.

    Parameters
    ----------
    meminfo : Path
        Where the kernel tells the machine's memory.
    membership : Path
        Where it tells the control groups of this process.
    cgroups : Path
        The folder of the control groups.
    """
    rooms = [room for room in (_machine(meminfo), *map(_group, _groups(membership, cgroups))) if room is not None]
    return min(rooms, default=None)


def _machine(meminfo: Path) -> int | None:
    """Return what the kernel can give without ending anything, swap included."""
    found = dict(re.findall(r"^(\w+): +(\d+) kB$", _text(meminfo), re.MULTILINE))
    return (int(found["MemAvailable"]) + int(found.get("SwapFree", 0))) << 10 if "MemAvailable" in found else None


def _groups(membership: Path, cgroups: Path) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of the groups that may limit this process's memory, its own one and those around it.

    A container may show the path outside of it; what is not there has no limit that could be read.
    """
    for line in _text(membership).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        version = 2 if controllers == "" else 1
        if version == 2 or "memory" in controllers.split(","):
            top = cgroups if version == 2 else cgroups / "memory"
            own = top / path.lstrip("/")
            yield from ((version, folder) for folder in (own, *own.parents) if folder.is_relative_to(top))


def _group(group: tuple[int, Path]) -> int | None:
    """Return what a group's limit leaves; None where there is no limit."""
    version, folder = group
    names = _NAMES[version]
    limit, used = (_text(folder / name).strip() for name in names[:2])
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= _NO_LIMIT:  # "max", or no such group
        return None
    droppable = re.findall(rf"^{names[2]}{_DROPPABLE} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(used) + sum(map(int, droppable)))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
