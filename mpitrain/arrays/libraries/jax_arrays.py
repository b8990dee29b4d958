"""JAX arrays, eagerly; JAX is never imported here, for whoever has an array has imported it.

Arrays on the CPU are read where they lie; those of other devices are copied.  They are immutable, so that each result
is a new one, over the memory that was received into where JAX can use it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays.libraries.library import Library, Operand


class JaxArrays(Library):
    """Arrays of JAX's; what stands for one while a function is traced is refused."""

    name = "JAX"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is a JAX array, or a tracer."""
        array = getattr(sys.modules.get("jax"), "Array", None)
        return array is not None and isinstance(x, array)

    def open(self, operation: str, x: Any) -> Operand:
        """Return an array once it has been computed."""
        _check_values(operation, x)
        view = np.asarray(x)
        return Operand(x, self, view, view.dtype, view.shape)

    def target(self, operation: str, out: Any, what: str = "out") -> Operand:
        """Refuse: nothing may be written to."""
        raise InputError(
            f"{what} is a JAX array, and these are immutable", operation=operation,
            remedy="leave out= away and use the new array that is returned, or use a NumPy array",
        )  # fmt: skip

    def build(self, values: Array, like: Any) -> Any:
        """Return an array on the devices of ``like``; of another shape than a sharded one, on the default device."""
        put, sharding = sys.modules["jax"].device_put, like.sharding
        fits = len(sharding.device_set) == 1 or values.shape == like.shape
        return put(values, sharding) if fits and getattr(like, "committed", True) else put(values)


def _check_values(operation: str, x: Any) -> None:
    """Refuse arrays whose values are not here."""
    jax: Any = sys.modules["jax"]
    problem = None
    if isinstance(x, jax.core.Tracer):
        problem = (
            "arrays have no values while JAX traces a function", f"a tracer of {x.aval}",
            "call it outside of jit, grad and vmap, or through jax.experimental.io_callback(…, ordered=True)",
        )  # fmt: skip
    elif x.is_deleted():
        problem = "array was deleted, or donated to a computation", f"{x.dtype}{list(x.shape)}", "pass a live one"
    elif not x.is_fully_addressable:
        problem = "array is spread over processes", str(x.sharding), "pass this process's x.addressable_data(i)"
    elif jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        problem = "array of random keys", x.dtype, "send jax.random.key_data(keys)"
    elif jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        problem = "64-bit array while JAX makes no such results", x.dtype, "set jax_enable_x64, or cast it"
    if problem:
        raise InputError(problem[0], operation=operation, got=problem[1], remedy=problem[2])
