"""Only the largest gradients on the wire, as indices and values; what is left out grows until its turn comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain._options import Choice, Interval, option
from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, Key, namespace
from mpitrain.comm.codecs.codec import Codec, State
from mpitrain.comm.codecs.formats import FORMATS
from mpitrain.comm.communicator import Communicator


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """The elements of largest size on each rank: of a tensor of n, max(1, round(ratio·n)).

    Parameters
    ----------
    ratio : float
        Share of the elements that is sent, in (0, 1].
    values : {"full", "fp16", "bf16", "int8"}
        How the values travel; what that rounds away is left over too.
    min_size : int
        As in `Codec`.

    Notes
    -----
    For k elements of all tensors together, an allgather of ``p·(4k + w(k))`` bytes, of which a rank sends
    ``(p−1)·(4k + w(k))``; w(k) are the bytes that the format takes for k values.  That grows with p, and suits few
    ranks or a small ratio.  Each tensor has its share, lest one of large gradients keep the others waiting.  All ranks
    add the same terms in the order of the ranks.

    Source: Aji, Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017, algorithm 1.
    """

    name: ClassVar[str] = "topk"

    ratio: float = option(Interval(0.0, 1.0, "(]"), 0.01)
    values: str = option(Choice(tuple(FORMATS)), "full")

    def sum(self, comm: Communicator, values: FlatBuffer, state: State, key: Key) -> Array:
        """See `Codec.sum`."""
        flat, xp, form = values.flat, namespace(values.flat), FORMATS[self.values]()
        chosen = xp.concatenate([s.offset + self._largest(flat[s.offset : s.stop]) for s in values.layout])
        chosen = chosen.astype(np.uint32)
        sent = form.encode(flat[chosen][None], key.child(f"rank{comm.rank}"), 0)
        flat[chosen] -= form.decode(sent, flat.dtype)[0]

        everyones, wire = comm.allgather((chosen, tuple(part[0] for part in sent)))
        total: Array = xp.zeros_like(flat)
        for indices, terms in zip(everyones, form.decode(wire, flat.dtype), strict=True):
            total[indices] += terms
        return total

    def _largest(self, tensor: Array) -> Array:
        """Return the positions of a tensor's largest elements; NaN counts as larger than any."""
        xp = namespace(tensor)
        rest = tensor.size - max(1, round(self.ratio * tensor.size))
        positions: Array = xp.argpartition(xp.abs(tensor), rest)[rest:]
        return positions
