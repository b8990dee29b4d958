"""How a failure that concerns several ranks is shown: one aligned line a rank, saying what it called and where."""

from __future__ import annotations

from collections.abc import Mapping

_WIDTH = 100
_CONTEXT = 30


def table(rows: Mapping[int, tuple[str, str]]) -> str:
    """Return one line for each rank, below each other.

    Parameters
    ----------
    rows : mapping of int to (str, str)
        For each rank what it called, and where; of long calls, the part around the first difference is shown.
    """
    ranks = sorted(rows)
    calls = _around_difference([rows[rank][0] for rank in ranks])
    width, digits = max(map(len, calls)), len(str(ranks[-1]))
    lines = (f"  rank {r:{digits}d}: {call:{width}s}  {rows[r][1]}" for r, call in zip(ranks, calls, strict=True))
    return "\n".join(line.rstrip() for line in lines)


def _around_difference(texts: list[str]) -> list[str]:
    """Cut long texts to the part where they begin to differ."""
    if max(map(len, texts)) <= _WIDTH:
        return texts
    long = [text for text in texts if len(text) > _WIDTH]
    same = next((i for i, letters in enumerate(zip(*long, strict=False)) if len(set(letters)) > 1), 0)
    start = max(0, same - _CONTEXT)
    return [_cut(text, start) for text in texts]


def _cut(text: str, start: int) -> str:
    if len(text) <= _WIDTH:
        return text
    head = text.split("(", 1)[0] + "(… " if start else ""
    end = start + _WIDTH
    return head + text[start:end] + ("…" if len(text) > end else "")
