"""At which steps something is due: pure arithmetic, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """Events that recur, each every so many steps, and once more at the last step.

    Parameters
    ----------
    steps : int
        The last step.
    every : dict of str to int
        Steps between two occurrences of each event.
    """

    steps: int
    every: dict[str, int]

    def next_event(self, step: int) -> int:
        """Return the first step after ``step`` at which anything is due."""
        return min(self.steps, *((step // every + 1) * every for every in self.every.values()))

    def crossed(self, event: str, before: int, after: int) -> bool:
        """Tell whether ``event`` fell due in ``(before, after]``: methods may return later than they were asked to."""
        every = self.every[event]
        return after // every > before // every or before < self.steps <= after
