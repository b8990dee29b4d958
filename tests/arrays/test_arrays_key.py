"""Random streams: their statistics, their independence, and that no layout changes them."""

from __future__ import annotations

import math
import struct
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.arrays import Key

N = 100_000


def draw(key, dtype=np.float64, rows=N // 100, columns=100):
    return key.uniform(np.arange(rows), (0, columns), dtype).ravel()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_uniform_values_fill_the_unit_interval_evenly(dtype):
    values = draw(Key(0, "uniform"), dtype)
    assert values.dtype == dtype
    assert values.min() >= 0
    assert values.max() < 1
    exact = values.astype(np.float64)
    assert exact.mean() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / N))
    assert exact.var() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / N))
    counts, _ = np.histogram(exact, bins=64, range=(0, 1))
    chi_square = ((counts - N / 64) ** 2 / (N / 64)).sum()
    assert abs(chi_square - 63) < 5 * math.sqrt(2 * 63)


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 24), (np.float64, 53)])
def test_uniform_values_are_whole_multiples_of_their_resolution(dtype, bits):
    scaled = draw(Key(0), dtype).astype(np.float64) * 2.0**bits
    np.testing.assert_array_equal(scaled, np.floor(scaled))
    assert (scaled % 2 == 1).mean() == pytest.approx(0.5, abs=0.01)


def test_each_value_is_made_of_its_own_words():
    """The formulas, on plain numbers: 24 or 53 high bits, and one normal from each pair of words."""
    key, rows = Key(8, "formulas"), np.arange(2)
    words = key.bits(rows, (0, 12)).tolist()
    single = [[(word >> 8) / 2**24 for word in row] for row in words]
    double = [
        [((a >> 5) * 2**26 + (b >> 6)) / 2**53 for a, b in zip(row[::2], row[1::2], strict=True)] for row in words
    ]
    normal = [
        [
            math.sqrt(-2 * math.log((a + 0.5) / 2**32)) * math.cos(2 * math.pi * (b + 0.5) / 2**32)
            for a, b in zip(row[::2], row[1::2], strict=True)
        ]
        for row in words
    ]
    np.testing.assert_array_equal(key.uniform(rows, (0, 12)), single)
    np.testing.assert_array_equal(key.uniform(rows, (0, 6), np.float64), double)
    np.testing.assert_allclose(key.tensor((2, 6), ((0, 2), (0, 6)), "normal"), normal, rtol=1e-12)


def test_normal_values_have_the_moments_and_tails_of_a_normal():
    values = Key(3, "normal").tensor((N // 100, 100), ((0, N // 100), (0, 100)), "normal").ravel()
    assert values.mean() == pytest.approx(0, abs=5 / math.sqrt(N))
    assert values.var() == pytest.approx(1, abs=5 * math.sqrt(2 / N))
    assert (values**3).mean() == pytest.approx(0, abs=5 * math.sqrt(15 / N))
    assert (values**4).mean() == pytest.approx(3, abs=5 * math.sqrt(96 / N))
    for bound in (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0):
        expected = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        assert (values < bound).mean() == pytest.approx(expected, abs=5 * math.sqrt(0.25 / N))


def test_neighbours_do_not_lean_on_each_other():
    table = Key(0, "neighbours").tensor((300, 300), ((0, 300), (0, 300)), "normal")
    for one, other in [(table[1:], table[:-1]), (table[:, 1:], table[:, :-1])]:
        assert (one * other).mean() == pytest.approx(0, abs=5 / 300)


def test_streams_of_other_seeds_purposes_and_steps_are_independent():
    base = Key(0, "init")
    keys = [base, Key(1, "init"), Key(0, "dropout"), base.at(1), base.child("0.weight"), Key(0, "inis"), Key(10, "nit")]
    streams = [draw(key) - 0.5 for key in keys]
    for one, other in combinations(streams, 2):
        assert np.mean(one * other) * 12 == pytest.approx(0, abs=5 / math.sqrt(N))


def test_a_key_is_its_seed_purpose_and_step():
    assert Key(7).child("a").child("b").at(3) == Key(7, "/a/b", 3)
    np.testing.assert_array_equal(draw(Key(7, "x", 3)), draw(Key(7, "x").at(3)))


def test_a_row_does_not_depend_on_its_company():
    key, rows = Key(2, "dropout", 9), np.array([5, 0, 2**40, 5])
    together = key.uniform(rows, (3, 20))
    for row, values in zip(rows, together, strict=True):
        np.testing.assert_array_equal(key.uniform(np.array([row]), (3, 20))[0], values)
    np.testing.assert_array_equal(key.uniform(rows, (0, 30))[:, 3:20], together)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_rows_and_no_columns(dtype):
    assert Key(0).uniform(np.zeros(0, np.int64), (0, 5), dtype).shape == (0, 5)
    assert Key(0).uniform(np.arange(3), (5, 5), dtype).shape == (3, 0)


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, tuple((low, high) for low, high in bounds)


@given(case=boxes(), kind=st.sampled_from(["uniform", "normal"]))
def test_a_box_holds_what_the_whole_tensor_holds_there(case, kind):
    shape, box = case
    key = Key(1, "init/w")
    whole = key.tensor(shape, tuple((0, n) for n in shape), kind)
    part = key.tensor(shape, box, kind)
    assert whole.shape == shape
    assert part.dtype == np.float64
    np.testing.assert_array_equal(part, whole[tuple(slice(*bounds) for bounds in box)])


def test_permutation_is_an_order_of_all():
    for n in (0, 1, 2, 7, 1000):
        order = Key(0, "shuffle").permutation(n)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_permutations_differ_by_epoch_and_are_fair():
    """Each of the 24 orders of four things comes about equally often."""
    seen = [tuple(Key(0, "shuffle", epoch).permutation(4)) for epoch in range(2400)]
    counts = np.unique(np.array(seen), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(((counts - 100.0) ** 2 / 100.0).sum() - 23) < 5 * math.sqrt(2 * 23)


def test_the_cipher_key_is_a_hash_of_seed_and_purpose():
    """As ``printf '42\\0init/0.weight' | b2sum -l 64`` prints it, read as two little-endian words."""
    digest = "cfb6f2852794c83d"
    assert Key(42, "init/0.weight", 3).words == struct.unpack("<2I", bytes.fromhex(digest))


@pytest.mark.parametrize(("shape", "box"), [
    ((0, 3), ((0, 0), (0, 3))), ((3, 0), ((1, 2), (0, 0))), ((2, 0, 3), ((0, 2), (0, 0), (1, 3))), ((0,), ((0, 0),)),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_tensors_without_elements(shape, box, kind):
    assert Key(0).tensor(shape, box, kind).shape == tuple(stop - start for start, stop in box)
