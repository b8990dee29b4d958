"""Python objects between the ranks of one job: pickled here, moved as bytes by the ordinary collectives.

Only these functions pickle.  What they read was written by a rank of the same job, never by a file or another party.
An object's bytes are held once on each side: written into the memory that is sent, and read where they arrived.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.comm import prepare

if TYPE_CHECKING:
    from mpitrain.comm.engine import Engine


def broadcast(comm: Engine, obj: Any, root: int) -> Any:
    """Give the root's object to all: its length, then its bytes."""
    sends = comm.rank == root
    data = dump(obj) if sends else np.empty(0, np.uint8)
    length = comm._complete(prepare.broadcast("broadcast_object", _length(data), root, None, sends))
    data = data if sends else np.empty(int(length), np.uint8)
    return load(comm._complete(prepare.broadcast("broadcast_object", data, root, data, sends)))


def gather(comm: Engine, obj: Any, root: int | None) -> list[Any] | None:
    """Collect one object from each rank: on the root, or on all if it is None."""
    operation = "allgather_object" if root is None else "gather_object"
    data = dump(obj)
    lengths = comm._complete(
        prepare.gathering(operation, comm.rank, comm.size, _length(data), None, None, None)
    ).tolist()  # fmt: skip
    joined = comm._complete(prepare.gathering(operation, comm.rank, comm.size, data, lengths, None, root))
    return None if joined is None else [load(part) for part in np.split(joined, np.cumsum(lengths)[:-1])]


def scatter(comm: Engine, objects: Sequence[Any] | None, root: int) -> Any:
    """Give each rank its item of the root's sequence."""
    operation = "scatter_object"
    lengths, whole = np.zeros(comm.size, np.int64), np.empty(0, np.uint8)
    if comm.rank == root:
        if objects is None or len(objects) != comm.size:
            got = "None" if objects is None else f"{len(objects)} objects"
            raise InputError("unusable objects", operation=operation, got=got, expected=f"{comm.size}, one per rank")
        whole = dump(*objects, lengths=lengths)
    lengths = comm._complete(prepare.broadcast(operation, lengths, root, None, comm.rank == root))
    if comm.rank != root:
        whole = prepare.placeholders(prepare.Spec(whole.dtype, (int(lengths.sum()),)), None)
    shares = tuple(lengths.tolist())
    return load(comm._complete(prepare.scatter(operation, comm.rank, comm.size, whole, root, shares, None)))


def send(comm: Engine, obj: Any, dest: int, tag: int) -> None:
    """Send an object: its length, then its bytes, which messages of one tag keep in order."""
    data = dump(obj)
    for part in (_length(data), data):
        comm._complete(prepare.send("send_object", part, dest, tag))


def recv(comm: Engine, source: int, tag: int) -> Any:
    """Receive what `send` sent."""
    length = comm._complete(prepare.recv("recv_object", np.zeros((), np.int64), source, tag, None))
    data = np.empty(int(length), np.uint8)
    return load(comm._complete(prepare.recv("recv_object", data, source, tag, data)))


def dump(*objects: Any, lengths: Array | None = None) -> Array:
    """Return the bytes of objects, one after the other, in memory that may be written to; fill in their lengths."""
    stream = io.BytesIO()
    for i, obj in enumerate(objects):
        begun = stream.tell()
        try:
            pickle.dump(obj, stream, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, TypeError, AttributeError) as error:  # as pickle says that it cannot
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # from a method of the object's own, whose author needs the traceback
            raise InputError("the object cannot be pickled", got=str(error)) from error
        if lengths is not None:
            lengths[i] = stream.tell() - begun
    return np.frombuffer(stream.getbuffer(), np.uint8)


def load(data: Array) -> Any:
    """Return the object whose bytes a rank of this job has sent."""
    return pickle.loads(data.data)


def _length(data: Array) -> Array:
    return np.asarray(data.size, np.int64)
