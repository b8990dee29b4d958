"""Memory behind a layout: one flat array, and views that share it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mpitrain.arrays import FlatBuffer, Layout, Segment, plain


@pytest.fixture
def layout():
    return Layout.build(
        [
            Segment("0.weight", (4, 5)),
            Segment("0.bias", (5,), group="no_decay"),
            Segment("2.block.weight", (3, 2, 2)),
            Segment("scale", (), group="no_decay"),
            Segment("none", (0, 4)),
        ],
        ties={"3.weight": "0.weight"},
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 1000, 5000])
def test_plain_memory_is_zero_writable_and_page_aligned(size, dtype):
    array = plain(size, np.dtype(dtype))
    assert array.shape == (size,)
    assert array.dtype == dtype
    assert not array.any()
    assert array.flags.writeable
    assert array.ctypes.data % 4096 == 0
    array[...] = 1


def _mapping(address: int) -> str:
    """What the kernel says of the mapping that an address lies in."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]
    bounds = [[int(bound, 16) for bound in each.split(" ", 1)[0].split("-")] for each in maps]
    return next(each for each, (begin, end) in zip(maps, bounds, strict=True) if begin <= address < end)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_plain_memory_may_have_huge_pages():
    array = plain(1 << 22, np.dtype(np.float32))
    found = _mapping(array.ctypes.data)
    assert " rw-p " in found.splitlines()[0]  # shared mappings are of another sort of memory, with small pages
    assert " hg" in next(line for line in found.splitlines() if line.startswith("VmFlags:"))


def test_views_share_the_flat_memory(layout):
    buffer = FlatBuffer(layout)
    assert buffer.flat.shape == (layout.size,)
    for number, segment in enumerate(layout, start=1):
        view = buffer.views[segment.name]
        assert view.shape == segment.shape
        view[...] = number
        assert (buffer.flat[segment.offset : segment.stop] == number).all()
    assert buffer.flat.sum() == sum(n * s.size for n, s in enumerate(layout, start=1))


def test_ties_are_one_array(layout):
    buffer = FlatBuffer(layout)
    buffer.views["3.weight"][1, 2] = 7
    assert buffer.views["0.weight"][1, 2] == 7
    assert buffer.tree["3"]["weight"] is buffer.views["0.weight"]


def test_the_tree_nests_along_the_dots(layout):
    tree = FlatBuffer(layout).tree
    assert set(tree) == {"0", "2", "3", "scale", "none"}
    assert tree["2"]["block"]["weight"].shape == (3, 2, 2)
    assert tree["scale"].shape == ()


def test_zero(layout):
    buffer = FlatBuffer(layout)
    buffer.flat[...] = 3
    buffer.zero()
    assert not buffer.flat.any()


def test_memory_comes_from_the_allocator(layout):
    arena = np.zeros(1000, np.float32)
    asked = []

    def allocator(size, dtype):
        asked.append((size, dtype))
        return arena[:size]

    buffer = FlatBuffer(layout, allocator)
    buffer.views["0.bias"][...] = 2
    assert asked == [(layout.size, layout.dtype)]
    assert arena.sum() == 10


def test_the_hash_is_of_the_tensors_not_of_where_they_lie(layout):
    one = FlatBuffer(layout)
    other = FlatBuffer(Layout.build(list(layout)[::-1]))
    for segment in layout:
        values = np.random.default_rng(segment.size).normal(size=segment.shape)
        one.views[segment.name][...] = values
        other.views[segment.name][...] = values
    assert one.flat.tobytes() != other.flat.tobytes()
    assert one.sha256() == other.sha256()
    one.flat[layout["0.bias"].stop] = 5.0  # padding
    assert one.sha256() == other.sha256()
    other.views["2.block.weight"][0, 0, 0] += 1
    assert one.sha256() != other.sha256()


def test_an_empty_layout_has_an_empty_buffer():
    buffer = FlatBuffer(Layout.build([]))
    assert buffer.flat.shape == (0,)
    assert buffer.views == buffer.tree == {}
