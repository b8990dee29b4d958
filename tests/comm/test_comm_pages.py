"""Files in memory are mapped whole, at huge pages where the kernel collapses them, and go with the last array."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpitrain.comm.transports import pages
from mpitrain.comm.transports.pages import HUGE_BYTES, PAGE_BYTES, map_file, whole_pages


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, PAGE_BYTES),
        (1, PAGE_BYTES),
        (PAGE_BYTES + 1, 2 * PAGE_BYTES),
        (HUGE_BYTES - PAGE_BYTES, HUGE_BYTES),
        (HUGE_BYTES, HUGE_BYTES),
        (HUGE_BYTES + 1, HUGE_BYTES + PAGE_BYTES),  # a second huge page would waste almost as much again
        (8 * HUGE_BYTES + 1, 9 * HUGE_BYTES),
    ],
)
def test_sizes(nbytes: int, expected: int) -> None:
    assert whole_pages(nbytes) == expected


@pytest.fixture(params=[PAGE_BYTES, HUGE_BYTES, 4 * HUGE_BYTES, 4 * HUGE_BYTES + 3 * PAGE_BYTES], ids=str)
def file(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A file that holds nothing but sevens, and its size."""
    descriptor = os.memfd_create("mpitrain test")
    os.write(descriptor, b"\7" * request.param)
    yield descriptor, request.param
    os.close(descriptor)


def _mappings() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "mpitrain test" in line]


def test_two_mappings_are_one_memory_and_go_with_their_arrays(file: tuple[int, int]) -> None:
    descriptor, nbytes = file
    first = map_file(descriptor, nbytes, 0, nbytes)
    second = map_file(descriptor, nbytes, 0, 0)
    assert first.shape == second.shape == (nbytes,)
    assert first.dtype == np.uint8
    assert (first == 7).all()
    first[-1] = 1
    second[0] = 2
    assert (first[0], second[-1]) == (2, 1)
    assert (second[1:-1] == 7).all()
    assert len(_mappings()) == 2
    part = first[3:5]
    del first, second
    assert len(_mappings()) == 1
    assert (part == 7).all()
    del part
    assert not _mappings()


def test_nothing_is_left_around_a_mapping(file: tuple[int, int]) -> None:
    descriptor, nbytes = file
    before = _address_space_bytes()
    for _ in range(20):
        map_file(descriptor, nbytes, 0, nbytes)
    assert _address_space_bytes() < before + 2 * HUGE_BYTES


def test_only_the_part_is_collapsed(file: tuple[int, int]) -> None:
    descriptor, nbytes = file
    mapped = map_file(descriptor, nbytes, HUGE_BYTES, nbytes)
    if not _collapses():
        pytest.skip("this kernel does not collapse pages of shared memory")
    assert (mapped == 7).all()
    assert _huge_bytes() == (nbytes - HUGE_BYTES if nbytes > HUGE_BYTES and nbytes % HUGE_BYTES == 0 else 0)


def test_small_pages_do_as_well(file: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MADV_COLLAPSE", 12345)  # which no kernel knows
    descriptor, nbytes = file
    mapped = map_file(descriptor, nbytes, 0, nbytes)
    assert (mapped == 7).all()
    assert _huge_bytes() == 0


def test_what_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_file(10_000, 2 * HUGE_BYTES, 0, 0)


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES


def _huge_bytes() -> int:
    """How much of the mapped files lies in huge pages."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "mpitrain test" in line
        if ours and line.startswith("ShmemPmdMapped:"):
            found += int(line.split()[1]) * 1024
    return found


def _collapses() -> bool:
    """Whether the kernel says that it would: known since Linux 6.1, and not forbidden."""
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    forbidden = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return version >= (6, 1) and forbidden.exists() and "[deny]" not in forbidden.read_text()
