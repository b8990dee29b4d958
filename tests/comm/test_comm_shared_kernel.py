"""The compiled loops of the shared transport on a processor that holds stores past the cache back as long as it may."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from pathlib import Path

import numpy as np
import pytest
from rebuilding import rebuild

from mpitrain._typing import Array
from mpitrain.arrays import plain
from mpitrain.comm.transports import kernel
from mpitrain.comm.transports.kernel import PLACES, Kernel
from mpitrain.comm.transports.pages import PAGE_BYTES

PLACE_BYTES = 16 * 1024  # of which half is written for the other of two ranks: a sample, and as much again
RANKS = 2

HELD_BACK = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef struct store { struct store *before; char *target; int64_t nbytes; char bytes[]; } store;
static _Thread_local store *held_back;
static void copy_past_cache(char *target, const char *source, int64_t nbytes) {
  store *made = malloc(sizeof *made + nbytes);
  made->before = held_back, made->target = target, made->nbytes = nbytes;
  memcpy(made->bytes, source, nbytes);
  held_back = made;
}
static void drain_past_cache(void) {
  while (held_back) {
    store *last = held_back;
    memcpy(last->target, last->bytes, last->nbytes);
    held_back = last->before;
    free(last);
  }
}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CDLL:
    """The loops, with stores past the cache that nobody sees before they are drained."""
    found = rebuild(kernel.LIBRARY, tmp_path, "-O1", past_cache=HELD_BACK)
    monkeypatch.setattr(kernel, "LIBRARY", found)
    assert found.loaded is not None
    return found.loaded


def test_what_is_written_past_the_cache_is_seen_before_it_is_announced(library: CDLL) -> None:
    row_bytes = PAGE_BYTES + PLACES * PLACE_BYTES
    memory = plain(RANKS * row_bytes, np.dtype(np.uint8)).reshape(RANKS, row_bytes)

    def reduce(rank: int) -> list[Array]:
        loops, found = Kernel(memory, rank, PAGE_BYTES, 0, lambda: None), []
        for number, elements in enumerate((PLACE_BYTES // 4, 5 * PLACE_BYTES // 4 + 7)):
            x = np.arange(elements, dtype=np.float32) + rank + number
            # The rank writes past the cache, is about to look whether it need, and finds that it need not any more.
            loops._team.to_memory, loops._team.writes, loops._team.slow = 1, 0, 0
            assert loops.allreduce("sum", x, x, (0, -1, -1, elements))
            found.append(x)
        return found

    with ThreadPoolExecutor(RANKS) as pool:
        for results in pool.map(reduce, range(RANKS)):
            for number, found in enumerate(results):
                np.testing.assert_array_equal(found, 2 * np.arange(found.size) + 1 + 2 * number)
