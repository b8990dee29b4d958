"""The cipher against the authors' known answers, and against plain integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain.arrays import Key, philox4x32

WORD = st.integers(0, 2**32 - 1)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain(counter, key):
    """Philox4x32-10 on Python's integers, from the definition in the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def vectorised(counter, key):
    words = philox4x32(tuple(np.array([c], np.uint64) for c in counter), key)
    return tuple(int(word[0]) for word in words)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter, key, expected):
    assert plain(counter, key) == expected
    assert vectorised(counter, key) == expected


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_any_block_equals_plain_integers(counter, key):
    assert vectorised(counter, key) == plain(counter, key)


def test_counters_broadcast():
    rows, columns = np.arange(5, dtype=np.uint64)[:, None], np.arange(3, dtype=np.uint64)[None, :]
    words = philox4x32((columns, rows, np.uint64(7), np.uint64(9)), (1, 2))
    table = np.stack(np.broadcast_arrays(*words), axis=-1)
    for row in range(5):
        for column in range(3):
            assert tuple(table[row, column].tolist()) == plain((column, row, 7, 9), (1, 2))


@given(
    step=WORD, rows=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), first=st.integers(0, 50),
    count=st.integers(0, 9),
)  # fmt: skip
def test_bits_are_the_words_of_column_row_and_step(step, rows, first, count):
    """Word j of a row is word j mod 4 of block j div 4, whichever columns are asked for."""
    key = Key(5, "words", step)
    found = key.bits(np.array(rows), (first, first + count))
    assert found.dtype == np.uint32
    assert found.shape == (len(rows), count)
    for row, values in zip(rows, found, strict=True):
        for column, value in enumerate(values.tolist(), start=first):
            assert value == plain((column // 4, row % 2**32, row >> 32, step), key.words)[column % 4]
