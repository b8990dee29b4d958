"""The compiled loops of the shared transport on a processor that holds stores past the cache back as long as it may."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from rebuilding import rebuild

from mpitrain._typing import Array
from mpitrain.arrays import plain
from mpitrain.arrays.compiled import CompiledLibrary
from mpitrain.comm.transports import kernel, ways
from mpitrain.comm.transports.kernel import PLACES, Kernel
from mpitrain.comm.transports.pages import PAGE_BYTES
from mpitrain.comm.transports.program import Combine
from mpitrain.comm.transports.ways import WAYS, Way, settle

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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> CompiledLibrary:
    """The loops, with stores past the cache that nobody sees before they are drained."""
    return rebuild(kernel.LIBRARY, tmp_path_factory.mktemp("built"), "-O1", past_cache=HELD_BACK)


@pytest.fixture
def library(built: CompiledLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LIBRARY", built)
    assert built.loaded is not None


def rows() -> Array:
    row_bytes = PAGE_BYTES + PLACES * PLACE_BYTES
    return plain(RANKS * row_bytes, np.dtype(np.uint8)).reshape(RANKS, row_bytes)


def test_what_is_written_past_the_cache_is_seen_before_it_is_announced(library: None) -> None:
    memory = rows()

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


@pytest.mark.parametrize("slow", [False, True])
def test_results_in_shared_memory_go_past_the_cache_where_lines_come_slowly(library: None, slow: bool) -> None:
    """Elsewhere they do not; either way all see them after the last fence."""
    memory, parts = rows(), [np.arange(5000, dtype=np.float32) + rank for rank in range(RANKS)]
    result = np.zeros(5000, np.float32)

    def reduce(rank: int) -> Array:
        loops, own = Kernel(memory, rank, PAGE_BYTES, 0, lambda: None), slice(rank * 2500, (rank + 1) * 2500)
        loops._team.to_memory = slow
        run = loops.reduction("sum", [Combine([part[own] for part in parts], [result[own]], 0, True)], holds=True)
        assert run is not None
        for _ in range(3):
            run()
        return result.copy()

    with ThreadPoolExecutor(RANKS) as pool:
        for found in pool.map(reduce, range(RANKS)):
            np.testing.assert_array_equal(found, parts[0] + parts[1])


@pytest.mark.parametrize("where", ["both", "a third", "the first's", "the second's"])
@pytest.mark.parametrize("elements", [5, 1000, (1 << 18) + 1003])  # two blocks and less, and more than 1 MiB
@pytest.mark.parametrize("divisor", [0, RANKS])
def test_two_arrays_are_combined_where_they_lie_and_elsewhere(
    library: None, divisor: int, elements: int, where: str
) -> None:
    """By loops that ask for lines ahead: of a core's own cache, and beyond it."""
    memory = rows()
    parts = [np.random.default_rng(rank).normal(size=RANKS * elements).astype(np.float32) for rank in range(RANKS)]
    before, third = [part.copy() for part in parts], np.zeros(RANKS * elements, np.float32)
    results = {"both": parts, "a third": [third], "the first's": parts[:1], "the second's": parts[1:]}[where]

    def reduce(rank: int) -> None:
        loops, own = Kernel(memory, rank, PAGE_BYTES, 0, lambda: None), slice(rank * elements, (rank + 1) * elements)
        combine = Combine([part[own] for part in parts], [result[own] for result in results], divisor)
        run = loops.reduction("sum", [combine], holds=True)
        assert run is not None
        run()

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(reduce, range(RANKS)))
    expected = (before[0] + before[1]) / np.float32(divisor or 1)
    for part, kept in zip([*parts, third], [*before, 0 * third], strict=True):
        taken = any(part is each for each in results)
        np.testing.assert_array_equal(part, expected if taken else kept)


@pytest.mark.parametrize("finds", ["both", "first", "second", "neither", "by turns"])
def test_two_ranks_have_the_same_bits_whichever_finds_lines_slow(
    library: None, monkeypatch: pytest.MonkeyPatch, finds: str
) -> None:
    """Then chunks go past the cache; else they are traded, if that is their way.  Zeros tell which value came first."""
    monkeypatch.setattr(kernel, "PAST_CACHE_FROM_BYTES", 128 * 1024)
    memory, values = rows(), (-0.0, 0.0, np.nan, 1.5, -3.0)
    rng = np.random.default_rng(7)
    cases = [
        (op, rng.choice(values, (RANKS, elements)).astype(np.float32), rng.random(RANKS) < 0.5, rng.random(2))
        for op, elements in zip(["min", "sum", "max"] * 14, rng.integers(500, 60_000, 42), strict=True)
    ]
    slow = {"both": (True, True), "first": (True, False), "second": (False, True), "neither": (False, False)}

    def reduce(rank: int) -> list[tuple[Array, bool]]:
        loops, found = Kernel(memory, rank, PAGE_BYTES, 0, lambda: None), []
        for number, (op, parts, by_turns, (trades, chunk)) in enumerate(cases):
            loops.use(bool(trades < 0.7), PLACE_BYTES if chunk < 0.7 else PLACE_BYTES // 2)
            x = parts[rank].copy()
            into = x if number % 4 < 2 else np.empty_like(x)
            loops._team.to_memory = loops._team.slow = 99 * slow.get(finds, by_turns)[rank]
            loops._team.writes = loops._team.timed = 1  # the next is not timed
            assert loops.allreduce(op, x, into, (0, -1, -1, x.size))
            found.append((into, bool(loops._team.traded)))
        return found

    with ThreadPoolExecutor(RANKS) as pool:
        first, second = pool.map(reduce, range(RANKS))
    folds = {"min": np.minimum, "sum": np.add, "max": np.maximum}
    for (op, parts, _, (trades, _)), (one, traded), (other, too) in zip(cases, first, second, strict=True):
        assert one.tobytes() == other.tobytes()
        np.testing.assert_array_equal(one, folds[op](*parts))
        tied = (parts == 0).all(axis=0) & (op != "sum")
        np.testing.assert_array_equal(np.signbit(one[tied]), np.signbit(parts[1][tied]))
        assert traded == too
        assert finds not in slow or traded <= (finds == "neither" and trades < 0.7)
    traded = sum(traded for _, traded in first)
    may_trade = sum(trades < 0.7 for *_, (trades, _) in cases)
    assert finds != "neither" or traded > may_trade / 2  # a rank that other processes hold up may find lines slow


@pytest.mark.skipif(kernel.LIBRARY.loaded is None, reason="the loops were not compiled")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", ["sum", "prod", "min", "max"])
def test_two_ranks_have_the_same_nans(op: str, dtype: type) -> None:
    """Which of two NaNs a processor hands on depends on the order of its operands; arrays are aligned differently."""
    memory, bits = rows(), np.dtype(f"u{np.dtype(dtype).itemsize}")
    quiet = np.array([np.nan, -np.nan], dtype).view(bits)

    def reduce(rank: int) -> Array:
        loops = Kernel(memory, rank, PAGE_BYTES, 0, lambda: None)
        loops.use(True, PLACE_BYTES)
        x = np.empty(30_001 + rank, dtype)[rank:]
        x.view(bits)[...] = quiet[rank] + np.arange(x.size, dtype=bits) % 7
        assert loops.allreduce(op, x, x, (0, -1, -1, x.size))
        return x

    with ThreadPoolExecutor(RANKS) as pool:
        first, second = pool.map(reduce, range(RANKS))
    assert np.isnan(first).all()
    assert first.tobytes() == second.tobytes()


class Sleeping:
    """Loops that take some time by the way that they use."""

    def __init__(self, *ms: float) -> None:
        self.ms, self.used, self.runs = dict(zip(WAYS, ms, strict=True)), WAYS[-1], 0

    def use(self, trades: bool, chunk_bytes: int) -> None:
        self.used = Way(trades, chunk_bytes)

    def plan(self, op: str, send: Array, recv: Array, divisor: int) -> Callable[[], object]:
        def run() -> None:
            self.runs += 1
            time.sleep(1e-3 * self.ms[self.used])

        return run


@pytest.mark.parametrize(
    ("mine", "theirs", "can_tell", "best"),
    [
        ((9, 5, 1), (9, 5, 1), True, 2),
        ((1, 30, 60), (90, 5, 90), True, 1),  # the slower rank is waited for
        ((5, 1, 9), (0, 0, 0), True, 1),
        ((9, 5, 1), (9, 5, 1), False, 0),
    ],
)
def test_two_ranks_use_the_way_that_is_the_fastest_for_the_slower_one(
    monkeypatch: pytest.MonkeyPatch, mine: tuple[float, ...], theirs: tuple[float, ...], can_tell: bool, best: int
) -> None:
    monkeypatch.setattr(ways, "_known", [])

    def allgather(own: Array) -> Array:
        return np.array([own, 1e-3 * np.array(theirs) if own.size == len(WAYS) else own])

    first, second, idle = Sleeping(*mine), Sleeping(9, 9, 9), Sleeping(9, 9, 9)
    for loops in (first, second):  # which does not try again
        settle(loops, SimpleNamespace(allgather=allgather), can_tell)  # type: ignore[arg-type]
        assert loops.used == WAYS[best]
    assert second.runs == 0
    settle(idle, SimpleNamespace(allgather=lambda own: np.array([own, [1]])), False)  # type: ignore[arg-type]
    assert (idle.used, idle.runs) == (WAYS[0], 0)


def test_ranks_of_which_one_has_not_tried_try_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_known", [2])
    loops = Sleeping(5, 1, 9)
    others = {1: np.array([-1]), len(WAYS): np.zeros(len(WAYS))}
    settle(loops, SimpleNamespace(allgather=lambda own: np.array([own, others[own.size]])), True)  # type: ignore[arg-type]
    assert loops.used == WAYS[1]
    assert ways._known == [1]
