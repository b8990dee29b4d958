"""The compiled random words are those of NumPy, and are left alone where they do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.arrays import Key, kernel

compiled = pytest.mark.skipif(kernel.LIBRARY.loaded is None, reason="the compiled loops are not built: no C compiler")
COLUMNS = [(0, 1), (0, 4), (3, 500), (1, 1), (127, 129), (4 * (1 << 32) - 9, 4 * (1 << 32))]


@compiled
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [[], [0], [2**63 - 1, 5, 2**32, 5]])
def test_words_are_those_of_numpy(monkeypatch, rows, columns):
    key, found = Key(3, "words", 2**32 - 1), {}
    for which in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        found[which] = key.bits(np.array(rows, np.int64), columns)
    assert found["on"].shape == (len(rows), columns[1] - columns[0])
    assert np.array_equal(found["on"], found["off"])


@compiled
def test_the_loop_is_used_and_can_be_forbidden(monkeypatch):
    rows = np.arange(2)
    assert kernel.philox(rows, 0, 3, 0, (1, 2)).shape == (2, 12)
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    assert kernel.philox(rows, 0, 3, 0, (1, 2)) is None


@compiled
def test_rows_may_lie_apart_and_be_of_any_integers():
    rows = np.arange(20, dtype=np.int32)[::3]
    assert np.array_equal(Key(1).bits(rows, (0, 9)), Key(1).bits(rows.astype(np.uint64), (0, 9)))


@compiled
def test_counters_beyond_32_bits_are_left_to_numpy():
    assert kernel.philox(np.zeros(1, np.int64), 1 << 32, (1 << 32) + 1, 0, (1, 2)) is None
