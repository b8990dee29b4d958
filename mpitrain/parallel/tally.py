"""What the ranks sum at each step besides the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from mpitrain._errors import InputError


@dataclass(frozen=True)
class Tally:
    """What the ranks sum at each step besides the gradients; it also carries what they must agree on."""

    loss: float = 0.0  # sum of the samples' losses
    count: float = 0.0  # what it is to be divided by
    samples: float = 0.0
    stops: float = 0.0  # ranks that were asked to stop
    bad: float = 0.0  # ranks whose own loss or gradient is not finite

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(self.numbers, other.numbers, strict=True)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of them, in this order."""
        return self.loss, self.count, self.samples, self.stops, self.bad

    def check_count(self, step: int) -> None:
        """Raise an InputError unless a sum of gradients can be divided by the count; the same on all ranks."""
        if not 0 < self.count < inf:
            raise InputError(
                "no rank had samples", operation="advance", got=f"a count of {self.count:g} at step {step}",
                remedy="let each step have a sample on some rank, and a loss whose count is above 0",
            )  # fmt: skip

    def untrained(self) -> Tally:
        """Return that of a step that was skipped: nothing was learnt from its samples."""
        return Tally(stops=self.stops)
