"""A small set of cases in which every pair of values of any two axes occurs, as far as it has a meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

Axes: TypeAlias = Mapping[str, Sequence[Any]]
Case: TypeAlias = dict[str, Any]
Rules: TypeAlias = Sequence[tuple[str, str, Callable[[Any, Any], bool]]]
"""Two axes, and which of their values go together."""


def cover(axes: Axes, rules: Rules) -> list[Case]:
    """Return the cases, the same at each call: greedy, each begun with a pair that no case has yet."""
    missing = dict.fromkeys(
        ((a, x), (b, y)) for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b]
    )  # fmt: skip
    cases: list[Case] = []
    while missing:
        seed = next(iter(missing))
        del missing[seed]
        case = _complete(dict(seed), axes, rules, missing) if fits(dict(seed), rules) else None
        if case is not None:  # else no case has this pair
            cases.append(case)
            for pair in combinations(((axis, case[axis]) for axis in axes), 2):
                missing.pop(pair, None)
    return cases


def fits(case: Case, rules: Rules) -> bool:
    """Tell whether a case, or a part of one, keeps all rules."""
    return all(goes(case[a], case[b]) for a, b, goes in rules if a in case and b in case)


def _complete(case: Case, axes: Axes, rules: Rules, missing: Mapping[Any, None]) -> Case | None:
    """Add the other axes to a case, with the values that have most missing pairs with what is there."""
    axis = next((axis for axis in axes if axis not in case), None)
    if axis is None:
        return case

    def gain(value: Any) -> int:
        new = (axis, value)
        return sum((new, old) in missing or (old, new) in missing for old in case.items())

    for value in sorted(axes[axis], key=gain, reverse=True):
        longer = {**case, axis: value}
        found = _complete(longer, axes, rules, missing) if fits(longer, rules) else None
        if found is not None:
            return found
    return None
