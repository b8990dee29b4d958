"""Where tensors lie: order, alignment, groups, shards, runs, buckets, ties, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain._errors import InputError
from mpitrain.arrays import FlatBuffer, Key, Layout, Segment, Shard

GROUPS = ("decay", "no_decay", "statistics")


def small(dtype=np.float32):
    return Layout.build(
        [
            Segment("a.bias", (3,), group="no_decay"),
            Segment("a.weight", (4, 5)),
            Segment("bn.mean", (5,), group="statistics", rate=0.1),
            Segment("b.weight", (17,)),
        ],
        dtype,
        ties={"head.weight": "b.weight"},
    )


@st.composite
def layouts(draw):
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=8))
    segments = [Segment(f"t{i}", shape, group=draw(st.sampled_from(GROUPS))) for i, shape in enumerate(shapes)]
    return Layout.build(segments, draw(st.sampled_from([np.float16, np.float32, np.float64])))


def test_groups_lie_together_in_the_order_given():
    assert [segment.name for segment in small()] == ["a.weight", "b.weight", "a.bias", "bn.mean"]
    assert [segment.offset for segment in small()] == [0, 32, 64, 80]
    assert small().size == 96
    assert small().nbytes == 384


@given(layout=layouts())
def test_tensors_are_on_cache_lines_and_do_not_overlap(layout):
    end = 0
    for segment in layout:
        assert segment.offset * layout.dtype.itemsize % 64 == 0
        assert segment.offset >= end
        assert segment.offset - end < 64 // layout.dtype.itemsize
        end = segment.stop
    assert 0 <= layout.size - end < 64 // layout.dtype.itemsize
    groups = [GROUPS.index(segment.group) for segment in layout]
    assert groups == sorted(groups)


def test_lookup_counts_and_ties():
    layout = small()
    assert len(layout) == 4
    assert layout["a.weight"].shape == (4, 5)
    assert layout["head.weight"] is layout["b.weight"]
    assert layout.parameter_count == 20 + 17 + 3
    with pytest.raises(KeyError):
        layout["c"]


def test_a_segment_may_be_a_box_of_its_tensor():
    segment = Segment("w", (10, 4), box=((3, 7), (0, 4)))
    assert segment.shape == (4, 4)
    assert segment.size == 16
    assert Segment("w", (10, 4)).box == ((0, 10), (0, 4))
    assert Segment("scalar", ()).size == 1


@pytest.mark.parametrize("box", [((0, 11), (0, 4)), ((-1, 3), (0, 4)), ((5, 3), (0, 4)), ((0, 10),)])
def test_boxes_outside_are_refused(box):
    with pytest.raises(InputError, match="tensor 'w': box lies outside"):
        Segment("w", (10, 4), box=box)


def test_unknown_groups_are_refused():
    with pytest.raises(InputError, match="unknown parameter group; got bias; expected decay or no_decay or statistics"):
        Segment("w", (1,), group="bias")


def test_names_must_be_unique_and_ties_must_lead_somewhere():
    w, b = Segment("w", (1,)), Segment("b", (1,))
    with pytest.raises(InputError, match="two tensors have one name; got w"):
        Layout.build([w, b, w])
    with pytest.raises(InputError, match="two tensors have one name; got b"):
        Layout.build([w, b], ties={"b": "w"})
    with pytest.raises(InputError, match="a tie names a tensor that is not there; got v"):
        Layout.build([w, b], ties={"head": "v"})


def test_a_name_must_not_lie_within_another():
    with pytest.raises(InputError, match=r"a tensor lies within another's name; got a\.b\.c"):
        Layout.build([Segment("a.b.c", (2,)), Segment("a", (2,)), Segment("ab", (2,))], np.float32)


def test_layouts_are_values():
    assert small() == small()
    assert hash(small()) == hash(small())
    assert small() != small(np.float64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().size = 3


def test_astype_keeps_the_offsets():
    half = small().astype(np.float16)
    assert half.dtype == np.float16
    assert [s.offset for s in half] == [s.offset for s in small()]
    assert half.size == small().size


def test_select_packs_some_tensors_anew():
    part = small().select(["b.weight", "a.bias"])
    assert [(s.name, s.offset) for s in part] == [("b.weight", 0), ("a.bias", 32)]
    assert part["head.weight"].name == "b.weight"
    assert small().select(["a.bias"]).ties == {}


def test_the_manifest_is_json_and_the_fingerprint_follows_it():
    manifest = json.loads(json.dumps(small().manifest()))
    assert manifest["tensors"]["a.weight"] == {"shape": [4, 5], "group": "decay"}
    assert manifest["dtype"] == "float32"
    assert manifest["ties"] == {"head.weight": "b.weight"}
    assert small().fingerprint() == small().fingerprint()
    others = [small(np.float64), small().select(["a.weight"]), Layout.build([Segment("a.weight", (5, 4))])]
    assert len({small().fingerprint(), *(other.fingerprint() for other in others)}) == 4


@given(layout=layouts(), parts=st.integers(1, 9))
def test_shards_cover_everything_once_on_cache_lines(layout, parts):
    shards = layout.shards(parts)
    assert len(shards) == parts
    assert shards[0].start == 0
    assert shards[-1].stop == layout.size
    assert all(one.stop == other.start for one, other in pairwise(shards))
    assert all(shard.start * layout.dtype.itemsize % 64 == 0 for shard in shards)
    sizes = [shard.size for shard in shards]
    assert max(sizes) - min(sizes) <= 64 // layout.dtype.itemsize


@given(layout=layouts(), bucket_bytes=st.integers(1, 300))
def test_buckets_cover_everything_once_within_their_size(layout, bucket_bytes):
    buckets = layout.buckets(bucket_bytes)
    assert [i for start, stop in buckets for i in range(start, stop)] == list(range(layout.size))
    assert all(
        (stop - start) * layout.dtype.itemsize <= max(bucket_bytes, layout.dtype.itemsize) for start, stop in buckets
    )


def group_of_each_element(layout):
    """Label every element of the flat range the slow way; padding takes the label of what precedes it."""
    labels = [None] * layout.size
    for segment in layout:
        if segment.size:
            labels[segment.offset :] = [segment.group] * (layout.size - segment.offset)
    return labels


@given(layout=layouts(), data=st.data())
def test_runs_are_the_maximal_stretches_of_a_group(layout, data):
    start = data.draw(st.integers(0, layout.size))
    shard = layout.shard(start, data.draw(st.integers(start, layout.size)))
    found = [group for group, run in shard.runs for _ in range(run.stop - run.start)]
    assert found == group_of_each_element(layout)[shard.start : shard.stop]
    assert all(run.start < run.stop for _, run in shard.runs)
    assert all(one[0] != other[0] for one, other in pairwise(shard.runs))
    assert all(one[1].stop == other[1].start for one, other in pairwise(shard.runs))


@given(layout=layouts(), data=st.data())
def test_pieces_are_where_the_tensors_meet_the_shard(layout, data):
    start = data.draw(st.integers(0, layout.size))
    shard = layout.shard(start, data.draw(st.integers(start, layout.size)))
    found = {(number, shard.start + i) for number, piece in shard.pieces for i in range(piece.start, piece.stop)}
    expected = {
        (number, i)
        for number, segment in enumerate(layout)
        for i in range(segment.offset, segment.stop)
        if shard.start <= i < shard.stop
    }
    assert found == expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (5, 4), (0, 97)])
def test_shards_outside_are_refused(start, stop):
    with pytest.raises(InputError, match=r"shard lies outside its layout; got \(.*\); expected 96"):
        Shard(small(), start, stop)


def test_the_whole_is_one_shard():
    whole = small().whole()
    assert (whole.start, whole.stop, whole.size) == (0, 96, 96)
    assert whole.runs == (("decay", slice(0, 64)), ("no_decay", slice(64, 80)), ("statistics", slice(80, 96)))


@pytest.mark.parametrize("segments", [[], [Segment("none", (0, 3)), Segment("void", (0,), group="no_decay")]])
def test_a_layout_without_elements_has_no_runs(segments):
    """A pipeline stage may hold no parameters."""
    whole = Layout.build(segments).whole()
    assert (whole.size, whole.runs, whole.pieces) == (0, (), ())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_padding_is_what_no_tensor_takes(dtype):
    segments = [Segment("a", (3, 5)), Segment("none", (0,)), Segment("b", (16,)), Segment("c", (1,), group="no_decay")]
    layout = Layout.build(segments, dtype)
    taken = np.zeros(layout.size, bool)
    for segment in layout:
        taken[segment.offset : segment.stop] = True
    for start, stop in layout.padding():
        assert not taken[start:stop].any()
        taken[start:stop] = True
    assert taken.all()
    assert Layout.build([]).padding() == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segment(0, (2,)), "^Segment: name is of another kind; got int: 0; expected a dotted path"),
        (lambda: Segment("a", 2), "^Segment: global_shape is of another kind; got int: 2; expected a tuple"),
        (lambda: Segment("a", (2.5,)), "^Segment: a length in global_shape is not an integer; got 2.5"),
        (lambda: Segment("a", (-1,)), "^Segment: a length in global_shape is too small; got -1"),
        (lambda: Layout.build(None), "^Layout: segments is of another kind; got NoneType"),
        (lambda: Layout.build(["a"]), "^Layout: one of segments is of another kind; got str: 'a'; expected a Segment"),
        (lambda: small("floaty"), "^Layout: not a dtype; got 'floaty'; expected a dtype"),
        (lambda: small(None), "^Layout: not a dtype; got None"),
        (lambda: small([]), r"^Layout: not a dtype; got \[\]"),
        (lambda: small().astype(7), "^Layout: not a dtype; got 7"),
        (lambda: FlatBuffer(None), "^FlatBuffer: layout is of another kind; got NoneType: None; expected a Layout"),
        (lambda: Key(0).at(2.5), "^Key: step is not an integer; got 2.5"),
        (lambda: Key(0, step=None), "^Key: step is not an integer; got None"),
        (lambda: Key(0).at(1 << 32), "^key: the step is out of range; got 4294967296"),
    ],
)
def test_other_kinds_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()
