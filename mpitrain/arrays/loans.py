"""Arrays that are lent for a while: the owner can tell whether somebody still holds one, or a view of one."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from mpitrain._typing import Array
from mpitrain.arrays.dtypes import storage
from mpitrain.arrays.namespace import is_cupy


class Loans:
    """Lends arrays by name.

    Parameters
    ----------
    arrays : dict of str to array
        What is lent, of NumPy or CuPy.
    xp : module
        Their library.

    Notes
    -----
    What is lent is an array over the same memory, whose base is a small object made for the loan.  Slices, transposes
    and other libraries' tensors made from it keep that object alive, so that a weak reference tells when the last of
    them is gone.  Cost: about 2 µs a loan.
    """

    def __init__(self, arrays: Mapping[str, Array], xp: Any) -> None:
        self._arrays, self._xp = arrays, xp
        self._loans: WeakValueDictionary[str, _Loan] = WeakValueDictionary()

    def lend(self, name: str) -> Array:
        """Return an array of the name's memory."""
        loan, array = self._loans.get(name), self._arrays[name]
        if loan is None:
            loan = self._loans[name] = _Loan(array)
        lent: Array = self._xp.asarray(loan)
        return lent if lent.dtype == array.dtype else lent.view(array.dtype)

    def held(self, names: Iterable[str]) -> list[str]:
        """Return those names whose arrays, or views of them, somebody still holds; garbage is collected first."""
        if not any(name in self._loans for name in names):
            return []
        gc.collect()
        return [name for name in names if name in self._loans]


class _Loan:
    """The base of a lent array: shows its memory by the array protocol of NumPy or CuPy, and lives while it is used.

    16-bit floats are shown as unsigned words, since neither protocol has a name for bfloat16.
    """

    def __init__(self, array: Array) -> None:
        self._array, words = array, array.view(storage(array.dtype))
        if is_cupy(array):  # without a stream that would be waited for: what is lent is used where it is at home
            self.__cuda_array_interface__ = {**getattr(words, "__cuda_array_interface__"), "stream": None}  # noqa: B009
        else:
            self.__array_interface__ = words.__array_interface__
