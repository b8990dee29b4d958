"""The one place that turns callers' arrays into what a backend moves, and back.

Contiguity, element types, ``out=``, and all that memory of a device asks for are settled here and nowhere else: which
stream must come where before whom, copies to the host and back, and what is kept alive until a call completes.  A
backend sees contiguous one-dimensional arrays of types that MPI knows.
"""

from mpitrain.comm.buffers.exposure import behind, settle
from mpitrain.comm.buffers.operands import accept, apart, outgoing, wire
from mpitrain.comm.buffers.packing import Fused, pack
from mpitrain.comm.buffers.parcels import Parcel
from mpitrain.comm.buffers.staging import Passage, Staging, chunks
from mpitrain.comm.buffers.window import Window

__all__ = [
    "Fused",
    "Parcel",
    "Passage",
    "Staging",
    "Window",
    "accept",
    "apart",
    "behind",
    "chunks",
    "outgoing",
    "pack",
    "settle",
    "wire",
]
