"""How much memory a process may still take: of the machine, and within the limits of the groups that it is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpitrain.comm.transports.headroom import headroom_bytes

GIB = 2**30


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def _second(limit: str, used: int, droppable: int = 0) -> dict[str, str]:
    twice_read = droppable // 4
    stat = f"anon 5\ninactive_anon 7\ninactive_file {droppable - twice_read}\nactive_file {twice_read}"
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": stat}


def _first(limit: int, used: int, droppable: int = 0) -> dict[str, str]:
    twice_read = droppable // 4
    stat = f"inactive_file 1\ntotal_inactive_file {droppable - twice_read}\ntotal_active_file {twice_read}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A machine with 8 GiB available and 1 of swap, a process in no group, and no limits."""
    meminfo, membership, cgroups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "cgroups"
    kib = {"MemTotal": 16 << 20, "MemFree": 1 << 20, "MemAvailable": 8 << 20, "SwapTotal": 2 << 20, "SwapFree": 1 << 20}
    meminfo.write_text("".join(f"{name}:{size:>15} kB\n" for name, size in kib.items()) + "HugePages_Total:  0\n")
    membership.write_text("")
    return meminfo, membership, cgroups


def test_a_machine_has_what_is_available_and_its_swap(files: tuple[Path, Path, Path]) -> None:
    assert headroom_bytes(*files) == 9 * GIB


def test_where_nobody_tells_there_is_no_number(tmp_path: Path) -> None:
    assert headroom_bytes(tmp_path / "a", tmp_path / "b", tmp_path / "c") is None


def test_the_nearest_limit_counts_of_a_group_and_those_around_it(files: tuple[Path, Path, Path]) -> None:
    _, membership, cgroups = files
    membership.write_text("0::/job/step/task\n")
    _write(cgroups / "job/step/task", _second("max", 5))
    assert headroom_bytes(*files) == 9 * GIB
    _write(cgroups / "job", _second(str(4 * GIB), 3 * GIB, GIB // 2))  # Slurm's limit is on the job
    assert headroom_bytes(*files) == 3 * GIB // 2
    _write(cgroups / "job/step", _second(str(2 * GIB), 2 * GIB + 5))
    assert headroom_bytes(*files) == 0


def test_a_container_that_shows_the_path_outside_of_it_has_its_limit_at_the_top(
    files: tuple[Path, Path, Path],
) -> None:
    _, membership, cgroups = files
    membership.write_text("9:cpu:/docker/abc\n4:memory:/docker/abc\n")
    _write(cgroups / "memory", _first(2 * GIB, GIB, 100))
    assert headroom_bytes(*files) == GIB + 100
    _write(cgroups / "memory", _first(9223372036854771712, GIB))
    assert headroom_bytes(*files) == 9 * GIB
