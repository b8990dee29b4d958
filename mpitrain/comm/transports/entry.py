"""The way from a call on NumPy arrays straight into the compiled loops, where it was built: Python's side of `entry.c`.

It is optional.  Without it `mpitrain.comm.direct` does the same, and takes some microseconds longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.direct import reduction
from mpitrain.comm.dtypes import OPS
from mpitrain.comm.transports import kernel
from mpitrain.comm.transports.fence import kind_of
from mpitrain.comm.transports.kernel import Kernel

_FORMATS = "bBhHiIlLqQfd"
"""Those of the buffer protocol that the loops know."""


class Entry(Protocol):
    """What `entry.c` makes."""

    def allreduce(self, x: Any, op: Any, out: Any) -> Array | None:
        """Do as `mpitrain.comm.direct.allreduce`."""
        ...

    def hold(self, parts: bytes) -> None:
        """Take note of where arrays are reduced in place: of each part the first address, the end, and its block."""
        ...


def make(
    loops: Kernel, located_from_bytes: int, complete: Callable[[Array, str, int], Array], tally: array[int]
) -> Entry | None:
    """Return the entry to a rank's loops; None where it was not built.

    Parameters
    ----------
    loops : Kernel
        Of the communicator's ranks.
    located_from_bytes : int
        From which size on it matters where arrays lie.
    complete : callable
        From the array for the result, the reduction, and what a loop says that is not done, to the result.
    tally : array of two integers of 8 bytes
        Counts the calls and their bytes.
    """
    made = _type()
    if made is None:
        return None
    found: Entry = made(
        *loops.begin_addresses, kernel.PAST_CACHE_FROM_BYTES, located_from_bytes, _ways(loops.ranks), np.ndarray,
        np.empty_like, complete, tally,
    )  # fmt: skip
    return found


def available() -> bool:
    """Tell whether it was built."""
    return _type() is not None


@cache
def _type() -> Any:
    try:
        module = import_module("mpitrain.comm.transports._entry")
    except ImportError:
        return None
    return module.Entry if module.ABI == kernel.ABI else None


@cache
def _ways(ranks: int) -> dict[str, bytes]:
    """Return what `entry.c` calls a way, for each reduction and format: four numbers."""
    found = {}
    for op in OPS:
        numbers = array("q", bytes(8 * 4 * 128))
        for code in _FORMATS:
            dtype = np.dtype(code)
            performed = reduction(dtype, op)
            address = performed and kernel.operation_address(dtype, performed)
            if performed and address:
                way = address, kind_of(dtype, performed), dtype.itemsize, ranks if op == "mean" else 0
                numbers[4 * ord(code) : 4 * ord(code) + 4] = array("q", way)
        found[op] = numbers.tobytes()
    return found
