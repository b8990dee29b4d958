"""Who reduces which elements, and in which pieces; pure functions of sizes."""

from __future__ import annotations

LINE_BYTES = 64
"""Shards begin on cache lines, so that no two ranks write to one."""


def bounds(elements: int, ranks: int, item_bytes: int) -> list[int]:
    """Return where each rank's shard begins, and the end: ``ranks + 1`` numbers, nearly equal shards."""
    step = max(1, LINE_BYTES // item_bytes)
    lines = -(-elements // step)
    return [min(elements, lines * rank // ranks * step) for rank in range(ranks + 1)]


def pieces(begin: int, end: int, length: int) -> list[slice]:
    """Cut a range into slices of at most this many elements."""
    return [slice(start, min(start + length, end)) for start in range(begin, end, length)]


def pieces_of_chunks(
    elements: int, rank: int, ranks: int, item_bytes: int, chunk_bytes: int, count: int
) -> list[slice]:  # fmt: skip
    """Cut an array into chunks, and this rank's shard of each into ``count`` pieces; some may be empty."""
    length, found = chunk_bytes // item_bytes, []
    for start in range(0, elements, length):
        cuts = bounds(min(length, elements - start), ranks, item_bytes)
        begin, size = start + cuts[rank], cuts[rank + 1] - cuts[rank]
        found += [slice(begin + size * i // count, begin + size * (i + 1) // count) for i in range(count)]
    return found
