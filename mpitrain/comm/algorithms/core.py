"""The largest power of two of the ranks, for algorithms that need one: of each of the first pairs one stands for both.

R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19, 2005,
section 4.4: of p ranks, p − q are too many for the power of two q ≤ p.  Each even one among the first 2(p − q) hands
its values to the odd one after it, which takes part for both and hands the result back.
"""

from __future__ import annotations

from mpitrain._typing import Array
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import Bounds, Combine


class Core:
    """The ranks that take part, renumbered.

    Attributes
    ----------
    rank, size : int
        Of this rank (or the one that stands for it) in the core, and how many there are: a power of two.
    inside : bool
        Whether this rank takes part.
    ward : int or None
        The even rank of this rank's pair, which does not; None if it is in no pair.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self.size = 1 << (links.size.bit_length() - 1)
        self._pairs = links.size - self.size
        paired = links.rank < 2 * self._pairs
        self.ward = links.rank // 2 * 2 if paired else None
        self.inside = self.ward != links.rank
        self.rank = links.rank // 2 if paired else links.rank - self._pairs

    def peer(self, distance: int) -> int:
        """Return the communicator's rank of the core rank whose number differs in one bit."""
        other = self.rank ^ distance
        return 2 * other + 1 if other < self._pairs else other + self._pairs

    def blocks(self, bounds: Bounds) -> Bounds:
        """Return where the core ranks' blocks begin, each made of the shares of those that it stands for."""
        return [bounds[2 * i if i < self._pairs else i + self._pairs] for i in range(self.size)] + [bounds[-1]]

    def join(self, words: Array, combine: Combine) -> None:
        """Combine the values of each pair on the rank that takes part."""
        if self.ward is not None and self.inside:
            arrived = self._links.scratch("landing", words.size, words.dtype)
            self._links.recv(arrived, self.ward)
            combine(arrived, words, out=words)
        elif not self.inside:
            self._links.send(words, self._links.rank + 1)

    def hand_in(self, words: Array) -> None:
        """Move words of the ward's to the rank that stands for it."""
        self._move(words, inwards=True)

    def hand_back(self, words: Array) -> None:
        """Move words of the ward's back to it."""
        self._move(words, inwards=False)

    def _move(self, words: Array, inwards: bool) -> None:
        if self.ward is None:
            return
        other = self._links.rank + 1 if not self.inside else self.ward
        if self.inside == inwards:
            self._links.recv(words, other)
        else:
            self._links.send(words, other)
