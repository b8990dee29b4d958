"""Sums of a model's gradients through a codec, with error feedback: what is not sent now is added to the next step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, FlatBuffer, Key, Layout, Segment, is_cupy, plain
from mpitrain.arrays.dtypes import floating
from mpitrain.comm.codecs.codec import Codec
from mpitrain.comm.communicator import Communicator

_BLOCK = 1 << 15
"""Elements that are computed on at a time."""

_UNIT = Layout.build([Segment("count", (1,))], np.float64)


class Kept(NamedTuple):
    """Something that must outlast a restart.

    Parameters
    ----------
    prefix : str
        Its name; tensor ``t`` of it is ``"prefix/t"``.
    buffer : FlatBuffer
        The values, and which tensors they belong to.
    kind : {"replicated", "summed"}
        The same on all ranks; or terms, of which only the sum over the ranks matters.
    """

    prefix: str
    buffer: FlatBuffer
    kind: Literal["replicated", "summed"]


class CompressedSum:
    """Sums gradients over ranks through a codec.

    Parameters
    ----------
    comm : Communicator
        The ranks.
    codec : Codec
        How they travel.
    layout : Layout
        Of the gradients; float32 or float64.
    key : Key
        For what is random; the same on all ranks.
    allocator : Allocator
        Where the memory comes from.

    Notes
    -----
    Each rank keeps what it has not sent yet and adds it to its next gradient, so that over time all of it arrives: the
    mean gradients handed out and all ranks' residuals add up to all mean gradients, but for rounding.  Source:
    Karimireddy, Rebjock, Stich, Jaggi, "Error feedback fixes SignSGD", ICML 2019, algorithm 2.

    The tensors that the codec does not take are summed in full, on a message of the codec's where that is possible.
    Memory: the size of the compressed tensors for the residual, and about as much while a sum is taken.
    """

    def __init__(
        self, comm: Communicator, codec: Codec, layout: Layout, key: Key, allocator: Allocator = plain
    ) -> None:  # fmt: skip
        floating(layout.dtype, "gradients in a codec")
        self.comm, self.codec, self._key = comm, codec, key
        taken = [segment.name for segment in layout if codec.takes(segment)]
        self._others = [segment.name for segment in layout if not codec.takes(segment)]
        self.residual = FlatBuffer(layout.select(taken), allocator)
        self.codec_state = codec.init(self.residual.layout, key.child("init"), allocator)
        self._unit = FlatBuffer(_UNIT)
        self._unit.flat[...] = 1.0

    @property
    def count(self) -> float:
        """What the sum is divided by of which the residual was left over: residual over count is part of a mean."""
        return float(self._unit.flat[0])

    def reduce(self, grads: FlatBuffer, step: int, count: float = 1.0) -> bool:
        """Sum over all ranks, in place.  Collective.

        Parameters
        ----------
        grads : FlatBuffer
            This rank's gradients; becomes the sum, the same bits on all ranks.  If a rank's gradient is not finite,
            the sum is not finite on any rank.
        step : int
            Number of the step.
        count : float
            What the sum will be divided by, the same on all ranks.  The residual counts as part of a mean, lest what a
            large batch left over weigh more in a small one.

        Returns
        -------
        bool
            Whether the sum is known to be finite; False tells nothing.

        Raises
        ------
        InputError
            The count is 0; nothing was communicated.
        """
        if count == 0:
            raise InputError(
                "no mean over nothing", operation="CompressedSum.reduce", got=f"count={count}",
                expected="a number above 0", remedy="leave out a step in which no rank had samples",
            )  # fmt: skip
        others = [grads.views[name] for name in self._others]
        if self.residual.layout.size:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is the caller's to find in the sum
                return self._reduce_taken(grads, step, count, others)
        if others:
            self.comm.allreduce(others, out=others)
        return False

    def _reduce_taken(self, grads: FlatBuffer, step: int, count: float, others: list[Array]) -> bool:
        ratio = count / self.count
        for own, new in self._blocks(grads):
            if ratio != 1.0:
                own *= ratio
            own += new
        self._unit.flat[...] = count
        key = self._key.at(step)
        return bool(self.codec.sum(self.comm, self.residual, self.codec_state, key, grads.views, others))

    def _blocks(self, grads: FlatBuffer) -> Iterator[tuple[Array, Array]]:
        """Cut residual and gradients into blocks that stay in a CPU's cache."""
        for name in (segment.name for segment in self.residual.layout):
            own, new = self.residual.views[name].reshape(-1), grads.views[name].reshape(-1)
            step = max(1, own.size) if is_cupy(own) else _BLOCK
            for begin in range(0, own.size, step):
                yield own[begin : begin + step], new[begin : begin + step]

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What must outlast a restart: the residual, and what the codec remembers."""
        remembered = (Kept(name, buffer, "replicated") for name, buffer in self.codec_state.items())
        return (Kept("left", self.residual, "summed"), Kept("unit", self._unit, "replicated"), *remembered)
