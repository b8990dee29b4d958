"""A reduction that is checked and laid out once, and then costs next to no Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays.libraries import Operand, owner
from mpitrain.comm import dtypes
from mpitrain.comm.calls import Prepared
from mpitrain.comm.ledger import Meter
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.transport import Planned
from mpitrain.comm.watchdog import Watch


class AllreducePlan:
    """What `Communicator.allreduce_plan` returns; calling it reduces what the buffer holds then.

    Attributes
    ----------
    buffer : array or tensor
        What is reduced.
    result : array or tensor
        What every call returns: same shape and dtype as ``buffer``, and the same memory at each call.

    Notes
    -----
    Calls are collective.
    """

    __slots__ = ("_called", "_meter", "_run", "_watch", "buffer", "result")

    def __init__(self, buffer: Operand, planned: Planned, called: Prepared, meter: Meter, watch: Watch) -> None:
        self.buffer = buffer.given
        in_place = planned.result is buffer.view
        self.result = buffer.given if in_place else buffer.library.show(planned.result)
        is_numpy = isinstance(buffer.given, np.ndarray)  # to which nobody need tell that it was written to
        self._run = planned.run if is_numpy else partial(_told, planned.run, buffer.library.wrote, self.result)
        self._called, self._meter = called, meter
        self._watch = None if planned.guarded else watch

    def __call__(self) -> Any:
        """Reduce what the buffer holds now, and return the result.  Collective."""
        watch = self._watch
        if watch is None:
            self._run()
        else:
            if watch.freed:
                watch.check_open(self._called.operation)
            watch.current = self._called
            try:
                self._run()
            finally:
                watch.current = None
                watch.count += 1
        self._meter.uses += 1
        return self.result


def check(buffer: object, op: str, operation: str = "allreduce_plan") -> Operand:
    """Return the buffer if a plan can hold on to its memory.

    Raises
    ------
    InputError, DtypeError
        It is no array in host memory, not contiguous, read-only, or the reduction has no meaning for it.
    """
    library = owner(buffer)
    target = None if library is None else library.target(operation, buffer, "the buffer")
    if target is None or target.view is None:
        raise InputError(
            "not an array", operation=operation, got=type(buffer).__name__,
            expected="a NumPy array, or a PyTorch tensor on the CPU",
        )  # fmt: skip
    if not (target.view.flags.c_contiguous and target.view.flags.aligned):
        raise InputError("the buffer is not contiguous", operation=operation, remedy="plan on a contiguous copy")
    dtypes.check(operation, target.dtype)
    dtypes.check_op(operation, op)
    dtypes.check_op_dtype(operation, op, target.dtype)
    return target


def ordinary(
    buffer: Array, op: str, in_place: bool, size: int, bind: Callable[[Array, Array, str], Planned]
) -> Planned:
    """Plan a reduction by the communicator's own way.

    Parameters
    ----------
    bind : callable
        Given a flat array, another for the result or the same one, and a reduction other than ``mean``, lays that out.
    """
    flat = buffer.reshape(-1)
    own = flat if in_place else HostTransport().empty(flat.shape, flat.dtype)
    bound = bind(flat, own, "sum" if op == "mean" else op)
    result = buffer if in_place else own.reshape(buffer.shape)
    if not in_place:
        result.flags.writeable = False
    run = partial(_averaged, bound.run, own, size) if op == "mean" else bound.run
    return replace(bound, run=run, result=result)


def _told(run: Callable[[], object], wrote: Callable[[Any], None], result: Any) -> None:
    run()
    wrote(result)


def _averaged(reduce: Callable[[], object], values: Array, size: int) -> None:
    reduce()
    np.divide(values, size, out=values)
