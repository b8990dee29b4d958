"""The compiled loops of optimizers, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same updates run in NumPy, with the same bits, and slower.  A GPU has kernels of
its own, `mpitrain.optim.kernel_cuda`.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_double, c_int64, c_void_p
from pathlib import Path

from mpitrain._typing import Array
from mpitrain.arrays import is_cupy
from mpitrain.arrays.compiled import CompiledLibrary, Loop, address
from mpitrain.optim import kernel_cuda
from mpitrain.optim.terms import Terms

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_optim_abi", 3)


class AdamSettings(ctypes.Structure):
    """What one update of Adam is told; `kernel.c` says what each number is."""

    _fields_ = [
        (name, c_double) for name in ("penalty", "shrink", "follow_m", "keep_v", "follow_v", "eps", "rate", "count")
    ]  # fmt: skip


class _Sources(ctypes.Structure):
    """Where the terms of gradients lie, and who else reads and writes nearby."""

    _fields_ = [
        ("terms", POINTER(c_void_p)), ("term_count", c_int64), ("own", c_int64), ("parameters_are_read", c_int64),
    ]  # fmt: skip


def adam(p: Array, terms: Terms, m: Array, v: Array, settings: AdamSettings) -> bool:
    """Update parameters and moments of one run in place; tell whether there is a loop, or a kernel, for them.

    Parameters
    ----------
    p, m, v : array, shape (n,)
        Contiguous and apart; of one dtype.
    terms : Terms
        Of the gradients, the same.
    settings : AdamSettings
        The same for all elements, but for ``count``, which is the terms'.
    """
    settings.count = terms.count
    if is_cupy(p):
        numbers = {field[0]: getattr(settings, field[0]) for field in AdamSettings._fields_}
        return kernel_cuda.adam(p, terms.arrays, m, v, **numbers)
    run = _loop("mpitrain_adam", "vvvvnv", (p, m, v), terms)
    if run is None:
        return False
    run(address(p), byref(_sources(terms)), address(m), address(v), p.size, byref(settings))
    return True


def add(sums: Array, terms: Terms) -> None:
    """Add the sum of all terms to ``sums``, shape (n,), by a compiled loop where there is one."""
    run = _loop("mpitrain_add", "vvn", (sums,), terms)
    if run is None:
        sums += terms.sum()
    else:
        run(address(sums), byref(_sources(terms)), sums.size)


def spares_lines() -> bool:
    """Tell whether loops store past the caches what others read: it was slow to write it when one last looked."""
    return LIBRARY.loaded is not None and bool(LIBRARY.loaded.mpitrain_optim_spares_lines())


def _loop(name: str, arguments: str, written: tuple[Array, ...], terms: Terms) -> Loop | None:
    """Return a loop for arrays that it may write to."""
    found = LIBRARY.loop_over(name, arguments, *written, *terms.arrays)
    return found if found is not None and all(each.flags.writeable for each in written) else None


def _sources(terms: Terms) -> _Sources:
    addresses = (c_void_p * len(terms.arrays))(*map(address, terms.arrays))
    return _Sources(addresses, len(addresses), terms.own, terms.parameters_are_read)
