"""The contract of a codec: how a sum over the ranks is taken with fewer bytes on the wire than the values have.

A codec loses something, and says what: that is all that error feedback needs (`mpitrain.comm.codecs.compressed`).  It
holds options only; what it remembers from step to step is the caller's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpitrain._options import COUNT, Checked, option
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, FlatBuffer, Key, Layout, Segment, is_cupy, plain
from mpitrain.comm.communicator import Communicator

State = dict[str, FlatBuffer]
"""What a codec remembers, by name: the same on all ranks, and part of each checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Codec(Checked, ABC):
    """Sums gradients over ranks and sends less than all of them.

    Parameters
    ----------
    min_size : int
        Tensors of fewer elements travel uncompressed.
    """

    min_size: int = option(COUNT, 1024)

    def takes(self, segment: Segment) -> bool:
        """Tell whether a tensor is compressed; statistics (BatchNorm's) never are."""
        return segment.group != "statistics" and segment.size >= self.min_size

    def init(self, layout: Layout, key: Key, allocator: Allocator = plain) -> State:
        """Return what the codec remembers before the first step.

        Parameters
        ----------
        layout : Layout
            Of the tensors that it takes.
        key : Key
            For what is random in it; the same on all ranks.
        allocator : Allocator
            Where the memory comes from.
        """
        return {}

    def remembered(self, segment: Segment) -> int:
        """Return how many numbers `init` gives for a tensor that the codec takes; none unless overridden."""
        return 0

    @abstractmethod
    def sum(
        self,
        comm: Communicator,
        values: FlatBuffer,
        state: State,
        key: Key,
        out: Mapping[str, Array],
        others: list[Array],
    ) -> bool | None:
        """Sum over all ranks.  Collective.

        Parameters
        ----------
        comm : Communicator
            The ranks.
        values : FlatBuffer
            This rank's terms, float32 or float64; becomes what of them is not in the result: the result and all ranks'
            ``values`` add up to the sum of what was handed in, but for rounding.
        state : dict of str to FlatBuffer
            What `init` gave; updated in place.
        key : Key
            For what is random in this step; the same on all ranks.
        out : dict of str to array
            Contiguous, of the shape and dtype of each tensor: becomes the sum, the same bits on all ranks.  If a rank
            hands in what is not finite, some of the sum is not finite.
        others : list of array
            Of the dtype of ``values``; each is replaced by its sum, uncompressed.

        Returns
        -------
        bool, optional
            Whether all sums are known to be finite; else the caller looks at each.
        """


def known_finite(*sums: Array) -> bool:
    """Tell whether the squares in arrays have finite sums; so are their elements then, and sums over the ranks of them.

    False tells nothing; it is always said of arrays on a GPU, which would be waited for.
    """
    flat = (each.reshape(-1) for each in sums)
    return all(not is_cupy(each) and bool(np.isfinite(np.dot(each, each))) for each in flat)
