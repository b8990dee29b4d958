"""Partitions: every row has one owner, and each way's own promise, for any input."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain._errors import InputError
from mpitrain.data import PARTITIONS, Dataset, missing_classes, partition
from mpitrain.data.partition import block, by_feature, random, weighted
from mpitrain.data.shares import apportion, share, share_sizes

ROWS, PARTS = st.integers(0, 60), st.integers(1, 9)


def labelled(labels: list[int]) -> Dataset:
    inputs = np.stack([np.arange(len(labels)) % 2, np.arange(len(labels))], axis=1).astype(float)
    return Dataset(inputs, np.array(labels), "classification", "set", feature_names=("parity", "row"))


@given(ROWS, PARTS)
def test_blocks_are_contiguous_and_near_equal(rows, parts):
    owner = block(rows, parts)
    assert owner.dtype == np.int32
    assert owner.shape == (rows,)
    assert (np.diff(owner) >= 0).all()
    sizes = np.bincount(owner, minlength=parts)
    assert len(sizes) == parts
    assert np.ptp(sizes) <= 1
    np.testing.assert_array_equal(sizes, share_sizes(rows, parts))
    np.testing.assert_array_equal(
        sizes, [stop - start for start, stop in (share(rows, parts, p) for p in range(parts))]
    )


def test_seven_rows_in_three_parts():
    assert block(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]


@given(st.integers(1, 60), PARTS, st.integers(0, 5))
def test_random_shares_are_near_equal_and_reproducible(rows, parts, seed):
    owner = random(rows, parts, seed)
    assert owner.dtype == np.int32
    assert np.ptp(np.bincount(owner, minlength=parts)) <= 1
    np.testing.assert_array_equal(owner, random(rows, parts, seed))


def test_random_shares_depend_on_the_seed_and_are_not_blocks():
    assert random(50, 2, 0).tolist() != random(50, 2, 1).tolist()
    assert random(50, 2, 0).tolist() != block(50, 2).tolist()


@given(st.lists(st.integers(-3, 6), max_size=60), PARTS)
def test_rows_that_share_a_value_stay_together_and_no_part_is_overfull(values, parts):
    owner = by_feature(np.array(values, np.int64), parts)
    assert owner.dtype == np.int32
    assert owner.shape == (len(values),)
    for value in set(values):
        assert len({int(o) for o, v in zip(owner, values, strict=True) if v == value}) == 1
    loads = np.bincount(owner, minlength=parts)
    assert len(loads) == parts
    largest_group = max((values.count(value) for value in set(values)), default=0)
    assert loads.max(initial=0) <= max(largest_group, len(values) / parts + largest_group)


def test_the_largest_group_goes_first_to_the_emptiest_part():
    values = np.array(["d"] * 3 + ["a"] * 5 + ["b"] * 4 + ["c"] * 3)
    owner = dict(zip(values.tolist(), by_feature(values, 2).tolist(), strict=True))
    assert owner == {"a": 0, "b": 1, "c": 1, "d": 0}


@given(ROWS, st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any))
def test_weighted_shares_are_within_one_row_of_their_exact_size(rows, capacities):
    owner = weighted(rows, len(capacities), capacities)
    sizes = np.bincount(owner, minlength=len(capacities))
    assert sizes.sum() == rows
    for size, capacity in zip(sizes, capacities, strict=True):
        assert abs(int(size) - Fraction(rows * capacity, sum(capacities))) < 1 + Fraction(1, 10**9)
        assert capacity or not size


def test_the_largest_remainder_wins():
    assert apportion(10, [1, 1, 1]).tolist() == [4, 3, 3]
    assert apportion(10, [6, 5, 4]).tolist() == [4, 3, 3]
    assert apportion(7, [0.5, 0.25, 0.25]).tolist() == [3, 2, 2]
    assert apportion(10, [1e308] * 3).tolist() == apportion(10, [5e-324] * 3).tolist() == [4, 3, 3]


@pytest.mark.parametrize(
    "capacities", [[1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1], [1, float("inf"), 1], ["a", 1, 1]]
)
def test_unusable_capacities(capacities):
    with pytest.raises(InputError, match=r"weighted partition: unusable capacities; got \[.*; expected 3 numbers"):
        weighted(9, 3, capacities)


@pytest.mark.parametrize(
    ("kind", "options", "owner"),
    [
        ("block", {}, [0, 0, 0, 1, 1, 1]),
        ("by_feature", {}, [1, 0, 0, 0, 0, 1]),
        ("by_feature", {"feature": "parity"}, [0, 1, 0, 1, 0, 1]),
        ("by_feature", {"feature": 0}, [0, 1, 0, 1, 0, 1]),
        ("weighted", {"capacities": [1, 2]}, [0, 0, 1, 1, 1, 1]),
    ],
)
def test_partitions_by_name(kind, options, owner):
    found = partition(kind, labelled([5, 2, 2, 2, 2, 5]), 2, seed=0, options=options)
    assert found.tolist() == owner


def test_random_by_name_is_the_pure_function():
    np.testing.assert_array_equal(partition("random", labelled([0] * 9), 2, seed=4), random(9, 2, 4))
    assert sorted(PARTITIONS) == list(PARTITIONS) == ["block", "by_feature", "random", "weighted"]


def test_bad_partitions():
    whole = labelled([0, 1])
    with pytest.raises(InputError, match=r"unknown partition; got 'blocks'; expected .*did you mean \"block\"\?"):
        partition("blocks", whole, 2, seed=0)
    with pytest.raises(InputError, match=r"partition 'weighted': the option 'capacities' is missing"):
        partition("weighted", whole, 2, seed=0)
    with pytest.raises(InputError, match=r"partition 'block': unknown option; got 'capacities'; expected none"):
        partition("block", whole, 2, seed=0, options={"capacities": [1, 1]})
    with pytest.raises(InputError, match=r"partition: parts is too small; got 0"):
        partition("block", whole, 0, seed=0)


def test_missing_classes():
    whole = labelled([0, 0, 1, 2, 2])
    assert missing_classes(whole, np.array([0, 0, 0, 1, 0]), 3) == [[], [0, 1], [0, 1, 2]]
