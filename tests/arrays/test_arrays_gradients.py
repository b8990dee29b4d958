"""Gradients zeroed when they are first asked for: what is read or added to is as if all had been zeroed."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.arrays import GradientBuffer, Layout, Segment, unwritten

LAYOUT = Layout.build(
    [Segment("0.weight", (3, 5)), Segment("1.inner.weight", (4,)), Segment("1.bias", (2,), group="no_decay")],
    np.float64,
    ties={"2.weight": "0.weight"},
)


@pytest.fixture
def grads() -> GradientBuffer:
    """In the second step: the memory is full of what the first has left, padding included."""
    found = GradientBuffer(LAYOUT)
    found.flat[...] = np.nan
    found.zero()
    return found


def test_what_is_added_to_is_zero_first(grads):
    grads.tree["1"]["inner"]["weight"][...] += 2
    grads.tree["1"]["inner"]["weight"][...] += 2
    assert (grads.tree["1"]["inner"]["weight"] == 4).all()
    grads.tree["2"]["weight"][...] += 1  # another name of 0.weight
    grads.tree["0"]["weight"][...] += 1
    assert (grads.views["0.weight"] == 2).all()


def test_what_is_overwritten_is_handed_out_once_as_it_is(grads):
    weight = unwritten(grads.tree["0"], "weight")
    assert weight is not None
    assert np.isnan(weight).all()
    weight[...] = 3
    assert unwritten(grads.tree["0"], "weight") is None
    assert unwritten(grads.tree["2"], "weight") is None  # a tied tensor is written by its other layer
    grads.tree["2"]["weight"][...] += 1
    assert (grads.views["0.weight"] == 4).all()


@pytest.mark.parametrize(
    "look", [lambda g: g.flat, lambda g: g.buffer.flat, lambda g: (g.end_pass(), g._buffer.flat)[1]]
)
def test_what_nobody_asked_for_is_zero(grads, look):
    grads.tree["1"]["bias"][...] += 5
    flat = look(grads)
    assert flat.sum() == 10
    assert np.count_nonzero(flat) == 2  # padding is clear too


def test_several_passes_add_up(grads):
    for _ in range(3):
        grads.tree["1"]["bias"][...] += 1
        grads.end_pass()
    assert (grads.views["1.bias"] == 3).all()
    assert unwritten(grads.tree["1"], "bias") is None


def test_the_tree_is_a_mapping_and_other_trees_have_nothing_unwritten(grads):
    assert list(grads.tree) == ["0", "1", "2"]
    assert len(grads.tree["1"]) == 2
    assert grads.tree.get("7", {}) == {}
    assert unwritten({"weight": np.zeros(3)}, "weight") is None
