"""Where to cut a model: consecutive units to each stage, so that the slowest stage is as fast as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mpitrain._errors import InputError


def partition(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Cut a row of units into parts whose largest sum of costs is the smallest possible.

    Parameters
    ----------
    costs : sequence of float
        Of each unit, none negative.
    parts : int
        How many; each gets one unit at least.

    Returns
    -------
    tuple of int, length parts + 1
        Part i is units ``cuts[i]`` to ``cuts[i + 1]``.

    Raises
    ------
    InputError
        There are fewer units than parts.

    Notes
    -----
    Dynamic programming over the last cut, O(n² · parts): the linear partition problem (S. Skiena, "The algorithm design
    manual", section 10.7).
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise InputError(
            "the model cannot be cut into so many stages", operation="pipeline", got=f"{parts} stages, {n} layers",
            expected=f"1 to {n} stages", remedy="take fewer ranks or chunks, or a deeper model",
        )  # fmt: skip
    before = [0.0, *accumulate(costs)]
    best = [0.0, *[float("inf")] * n]  # the largest part, of the first so many units in no parts
    cuts: list[list[int]] = []
    for _ in range(parts):
        choices = [
            min(range(stop), key=lambda cut, stop=stop: max(best[cut], before[stop] - before[cut]))  # type: ignore[misc]
            for stop in range(1, n + 1)
        ]
        best = [
            float("inf"),
            *(max(best[cut], before[stop] - before[cut]) for stop, cut in enumerate(choices, start=1)),
        ]
        cuts.append([0, *choices])
    return _walk_back(cuts, n)


def _walk_back(cuts: list[list[int]], stop: int) -> tuple[int, ...]:
    found = [stop]
    for last in reversed(cuts):
        found.append(last[found[-1]])
    return tuple(reversed(found))
