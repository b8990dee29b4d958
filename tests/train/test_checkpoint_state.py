"""Pieces of a method's state: where a flat shard lies in its tensors."""

import numpy as np
import pytest

from mpitrain._errors import CheckpointError, InputError
from mpitrain.arrays import Layout, Segment
from mpitrain.method.state import Piece, fill, pieces_of

LAYOUT = Layout.build([Segment("w", (3, 10)), Segment("half", (4, 6), box=((1, 3), (2, 5))), Segment("none", (0, 2))])


def test_a_shard_that_cuts_tensors_says_where():
    shard = LAYOUT.shard(20, 35)  # w lies at 0…30, then padding, half at 32…38
    flat = np.arange(20, 35, dtype=np.float32)
    one, two = pieces_of("m", flat, shard, "replicated")
    assert (one.name, one.global_shape, one.box, one.flat) == ("m/w", (3, 10), ((0, 3), (0, 10)), (20, 30))
    assert (two.name, two.global_shape, two.box, two.flat) == ("m/half", (4, 6), ((1, 3), (2, 5)), (0, 3))
    assert one.kind == "replicated"
    np.testing.assert_array_equal(one.array, np.arange(20, 30))
    np.testing.assert_array_equal(two.array, np.arange(32, 35))
    assert np.shares_memory(one.array, flat)


@pytest.mark.parametrize("bounds", [(0, 48), (0, 0), (3, 4), (20, 35), (29, 33), (33, 48), (30, 32)])
def test_fill_takes_its_part_of_whole_tensors(bounds):
    whole = {"m/w": np.arange(30.0).reshape(3, 10), "m/half": 100 + np.arange(24.0).reshape(4, 6)}
    expected = np.full(48, -1.0)
    expected[:30] = np.arange(30)
    expected[32:38] = [108, 109, 110, 114, 115, 116]  # rows 1 and 2, columns 2 to 4
    flat = np.full(bounds[1] - bounds[0], -1.0)
    fill("m", flat, Layout.build(LAYOUT).shard(*bounds), whole.__getitem__)
    np.testing.assert_array_equal(flat, expected[slice(*bounds)])


def test_fill_refuses_other_shapes_and_rounding():
    layout = Layout.build([Segment("w", (2,))])
    flat = np.zeros(layout.size, np.float32)
    with pytest.raises(CheckpointError, match=r"tensor 'p/w': wrong shape; got \(3,\); expected \(2,\)"):
        fill("p", flat, layout.whole(), lambda name: np.zeros(3, np.float32))
    with pytest.raises(CheckpointError, match="tensor 'p/w': values would be rounded; got float64; expected float32"):
        fill("p", flat, layout.whole(), lambda name: np.zeros(2))
    with pytest.raises(InputError, match="p: array and shard differ in size"):
        fill("p", flat[1:], layout.whole(), lambda name: np.zeros(2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"box": ((0, 3), (0, 3))}, "box lies outside the tensor"),
        ({"box": ((0, 2),)}, "box lies outside the tensor"),
        ({"flat": (0, 7)}, "flat range lies outside its box"),
        ({"flat": (3, 2)}, "flat range lies outside its box"),
        ({"flat": (0, 5)}, "wrong number of values; got 6; expected 5"),
        ({"kind": "torn"}, "unknown kind; got 'torn'; expected sharded or replicated or summed"),
    ],
)
def test_a_piece_that_contradicts_itself_is_refused(change, says):
    right = {"name": "a", "global_shape": (2, 3), "box": ((0, 2), (0, 3)), "array": np.zeros((2, 3))}
    assert Piece(**right).span == (0, 6)
    with pytest.raises(InputError, match=f"piece of 'a': {says}"):
        Piece(**right | change)
