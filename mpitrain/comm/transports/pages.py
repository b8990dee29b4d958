"""Maps a file in memory, in huge pages where the kernel can be asked for them at once.

In pages of 4 KiB a processor's table of recent pages covers a few MiB only, and each miss costs: two arrays of 16 MiB
are added 1.5 times as fast in pages of 2 MiB.  Systems rarely give those to shared memory by themselves; but since
Linux 6.1 a process may have small pages that it has collapsed into huge ones (MADV_COLLAPSE), whatever the system's
default is.  Where that fails the pages stay small, and everything works as well, if slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.compiled import address

PAGE_BYTES = mmap.PAGESIZE

HUGE_BYTES = 2 * 1024 * 1024
"""Of x86-64, and of 64-bit Arm with pages of 4 KiB."""

_MADV_COLLAPSE, _MAP_FIXED, _MAP_NORESERVE = 25, 0x10, 0x4000  # Linux's; Python has no names for them


def whole_pages(nbytes: int) -> int:
    """Return a size rounded up: to huge pages where that adds an eighth at most, else to pages."""
    small, huge = (-(-max(nbytes, 1) // page) * page for page in (PAGE_BYTES, HUGE_BYTES))
    return huge if huge <= nbytes + nbytes // 8 else small


def map_file(descriptor: int, total_bytes: int, begin: int, end: int) -> Array:
    """Map a file; collapse the pages of a part, which this process has written or backed, if it is of whole huge ones.

    Workspaces, which are not, were not seen to gain by it.

    Parameters
    ----------
    descriptor : int
        Of the file, of ``total_bytes``.
    begin, end : int
        The part, in bytes.

    Returns
    -------
    array of uint8, shape (total_bytes,)
        Unmapped when it is not referred to any more.

    Raises
    ------
    OSError
        It cannot be mapped.
    """
    if total_bytes < HUGE_BYTES:
        return np.frombuffer(mmap.mmap(descriptor, total_bytes), np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    around = mmap.mmap(-1, total_bytes + HUGE_BYTES, flags=flags)  # unmaps what is put into it, too
    whole = np.frombuffer(around, np.uint8)
    start = address(whole)
    offset = -start % HUGE_BYTES
    _map_at(start + offset, descriptor, total_bytes)
    if begin < end and begin % HUGE_BYTES == end % HUGE_BYTES == 0:
        with suppress(OSError):  # an older kernel, or no huge page to be had
            around.madvise(_MADV_COLLAPSE, offset + begin, end - begin)
    return whole[offset : offset + total_bytes]


def _map_at(start: int, descriptor: int, nbytes: int) -> None:
    """Map a file over other memory; Python's own `mmap` takes no address."""
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if function(start, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0) != start:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
