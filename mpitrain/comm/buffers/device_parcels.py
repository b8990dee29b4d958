"""Memory of a device for one message: packed, converted and unpacked there, on the stream of the caller's library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.devices import Stream
from mpitrain.arrays.dtypes import storage
from mpitrain.arrays.libraries import Operand
from mpitrain.comm.buffers.overlap import overlap
from mpitrain.comm.buffers.parcels import Parcel


class DeviceParcel(Parcel):
    """A parcel of arrays of one dtype on one device.

    Parameters
    ----------
    stream : Stream
        On which the memory is handed out and filled.

    Notes
    -----
    Nothing waits here.  The arrays' own streams come before what is packed, and after what is unpacked; results are
    unpacked on the stream that is current then, which for a request may be another one.
    """

    stream: Stream

    def __init__(
        self,
        stream: Stream,
        operation: str,
        shapes: Sequence[Shape],
        likes: Sequence[Operand],
        outs: Sequence[Any],
        reduces: bool = False,
        direct: bool = True,
    ) -> None:
        self.stream = stream
        self._held = storage(likes[0].dtype)
        super().__init__(operation, shapes, likes, outs, reduces, direct)

    def fill(self) -> None:
        """Copy the values of ``likes`` in; those that already lie here stay."""
        _order(_streams(self._likes), [self.stream])
        for part, like, out in zip(self.parts, self._likes, self._outs, strict=True):
            if out is None or like.given is not out.given or not self._lies_in(part, out):
                assert like.memory is not None
                self.stream.copy(like.memory, part, self.dtype)

    def divide(self, divisor: int) -> None:
        """Divide the values."""
        self._now().divide(self.values, divisor)

    def results(self) -> list[Any]:
        """Return the arrays, each in the caller's library and dtype, or in its ``out``."""
        now = self._now()
        found = [self._unpack(now, *each) for each in zip(self.parts, self._likes, self._outs, strict=True)]
        _order([now], [self.stream, *_streams(self._likes)])  # the first hands out the memory again
        for out in self._outs:
            if out is not None:
                out.library.wrote(out.given)
        return found

    def _now(self) -> Stream:
        """Return the stream that is current now; if it is another one, the call was a request, which is complete."""
        now = self._likes[0].stream
        assert now is not None
        return now

    def _empty(self, elements: int, held: DType) -> Array:
        return self.stream.empty(elements, storage(held))

    def _landing(self, out: Operand | None, held: DType) -> Array | None:
        if out is None or held != self.dtype or not self._is_here(out):
            return None
        assert out.memory is not None
        return out.memory.reshape(-1) if out.memory.flags.c_contiguous else None

    def _is_here(self, out: Operand) -> bool:
        return out.memory is not None and out.stream is not None and out.stream.device == self.stream.device

    def _lies_in(self, part: Array, out: Operand) -> bool:
        return out.memory is not None and overlap(part, out.memory)

    def _unpack(self, now: Stream, part: Array, like: Operand, out: Operand | None) -> Any:
        if out is not None and self._is_here(out):
            assert out.memory is not None
            if not overlap(part, out.memory):
                now.copy(part, out.memory, self.dtype)
            return out.given
        words = part
        if part.dtype != self._held:
            words = now.empty(part.size, self._held).reshape(part.shape)
            now.copy(part, words, self.dtype)
        found = like.library.wrap(words, self.dtype, like.given)
        return found if out is None else out.store(like.library.fetch(found))


def _streams(operands: Iterable[Operand]) -> list[Stream]:
    """Return the operands' streams, each once."""
    return list(dict.fromkeys(stream for each in operands if (stream := each.stream) is not None))


def _order(before: Iterable[Stream], after: Iterable[Stream]) -> None:
    """Let streams go on only behind what others have been given so far."""
    after = list(after)
    for first in before:
        for second in after:
            if first != second:
                second.wait(first.record())
