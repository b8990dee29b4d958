"""A reduction that is checked and laid out once, and then costs next to no Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.comm import dtypes
from mpitrain.comm.calls import Prepared
from mpitrain.comm.ledger import Meter
from mpitrain.comm.transports.transport import Planned
from mpitrain.comm.watchdog import Watch


class AllreducePlan:
    """What `Communicator.allreduce_plan` returns; calling it reduces what the buffer holds then.

    Attributes
    ----------
    buffer : array
        What is reduced.
    result : array
        What every call returns: same shape and dtype as ``buffer``, and the same memory at each call.

    Notes
    -----
    Calls are collective.
    """

    __slots__ = ("_called", "_meter", "_run", "_watch", "buffer", "result")

    def __init__(self, buffer: Array, planned: Planned, called: Prepared, meter: Meter, watch: Watch) -> None:
        self.buffer, self.result = buffer, planned.result
        self._run, self._called, self._meter, self._watch = planned.run, called, meter, watch

    def __call__(self) -> Array:
        """Reduce what the buffer holds now, and return the result.  Collective."""
        watch = self._watch
        watch.current = self._called
        try:
            self._run()
        finally:
            watch.current = None
            watch.count += 1
        self._meter.uses += 1
        return self.result


def check(buffer: object, op: str) -> Array:
    """Return the buffer if a plan can hold on to its memory.

    Raises
    ------
    InputError, DtypeError
        It is no NumPy array, not contiguous, read-only, or the reduction has no meaning for it.
    """
    operation = "allreduce_plan"
    if not isinstance(buffer, np.ndarray):
        raise InputError("not an array", operation=operation, got=type(buffer).__name__, expected="a NumPy array")
    if not (buffer.flags.c_contiguous and buffer.flags.writeable and buffer.flags.aligned):
        raise InputError(
            "the buffer is not contiguous, or read-only", operation=operation, remedy="plan on a contiguous copy"
        )
    dtypes.check(operation, buffer.dtype)
    dtypes.check_op(operation, op)
    dtypes.check_op_dtype(operation, op, buffer.dtype)
    return buffer


def ordinary(
    buffer: Array, op: str, in_place: bool, size: int, bind: Callable[[Array, Array, str], Callable[[], object]]
) -> Planned:
    """Plan a reduction by the communicator's own way.

    Parameters
    ----------
    bind : callable
        From a flat array, the one for the result, or the same, and a reduction other than ``mean`` to what reduces.
    """
    flat = buffer.reshape(-1)
    own = flat if in_place else np.empty_like(flat)
    run = bind(flat, own, "sum" if op == "mean" else op)
    result = buffer if in_place else own.reshape(buffer.shape)
    result.flags.writeable = in_place
    return Planned(partial(_averaged, run, own, size) if op == "mean" else run, result)


def _averaged(reduce: Callable[[], object], values: Array, size: int) -> None:
    reduce()
    np.divide(values, size, out=values)
