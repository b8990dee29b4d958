"""The share of a node's CPUs that a rank's BLAS gets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mpitrain.comm import threads

Launch = Callable[..., tuple[int | None, str]]
ALL = set(range(8))


@pytest.mark.parametrize(
    ("own", "everyones", "quota", "expected"),
    [
        (ALL, [ALL], None, 8),
        (ALL, [ALL] * 2, None, 4),
        (ALL, [ALL] * 3, None, 2),
        (ALL, [ALL] * 16, None, 1),  # more ranks than CPUs
        ({0, 1}, [{0, 1}, {2, 3, 4, 5}], None, 2),  # bound by the launcher: never more than its own
        ({0}, [{r} for r in range(8)], None, 1),
        (ALL, [ALL] * 2, 4.0, 2),  # a container's quota
        (ALL, [ALL] * 2, 0.5, 1),
        (ALL, [ALL] * 2, 64.0, 4),
    ],
)
def test_share(own: set[int], everyones: list[set[int]], quota: float | None, expected: int) -> None:
    assert threads.share(own, everyones, quota) == expected


def test_quota_of_both_kinds_of_cgroup(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert threads.cpu_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    assert threads.cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert threads.cpu_quota(tmp_path) == 4.0


@pytest.mark.parametrize(("ranks", "chosen"), [(1, ""), (1, "1"), (3, "")])
def test_world_sets_them_after_numpy_was_imported_unless_the_user_chose(
    launch: Launch, ranks: int, chosen: str
) -> None:  # fmt: skip
    source = (
        "import numpy, threadpoolctl\nfrom mpitrain.comm import world, threads\ncomm = world()\n"
        "used = max(p['num_threads'] for p in threadpoolctl.threadpool_info() if p['user_api'] == 'blas')\n"
        "print(f'{used == threads.set_blas_threads(comm)}:{used} ', end='')"  # one write: launchers mix those of ranks
    )
    free = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"), "")
    code, output = launch(ranks, source, OMP_NUM_THREADS=chosen, **free)
    cpus = min(len(os.sched_getaffinity(0)), threads.cpu_quota() or 1e9)
    expected = int(chosen) if chosen else max(1, int(cpus) // ranks)
    assert (code, output.split()) == (0, [f"True:{expected}"] * ranks)
