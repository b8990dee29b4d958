"""Where to cut a model: consecutive units to each stage, so that the slowest stage is as fast as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from mpitrain._errors import InputError
from mpitrain._options import check_whole


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


def edges(cuts: Sequence[int], count: int, parts: int) -> tuple[int, ...]:
    """Return where the parts of a row of units begin and end that is cut where the caller says.

    Parameters
    ----------
    cuts : sequence of int
        Number of the first unit of each part but the first.
    count : int
        How many units there are.
    parts : int
        How many parts there must be.

    Returns
    -------
    tuple of int, length parts + 1
        As of `partition`.

    Raises
    ------
    InputError
        They give another number of parts, or a part without units.
    """
    for cut in cuts:
        check_whole("pipeline", "one of cuts", cut, 1)
    found = (0, *cuts, count)
    if len(cuts) != parts - 1 or any(start >= stop for start, stop in pairwise(found)):
        raise InputError(
            f"these cuts do not make {parts} stages of {count} layers", operation="pipeline", got=list(cuts),
            expected=f"{parts - 1} ascending numbers of layers from 1 to {count - 1}",
            remedy="leave out cuts, and stages are balanced",
        )  # fmt: skip
    return found


def _walk_back(cuts: list[list[int]], stop: int) -> tuple[int, ...]:
    found = [stop]
    for last in reversed(cuts):
        found.append(last[found[-1]])
    return tuple(reversed(found))
