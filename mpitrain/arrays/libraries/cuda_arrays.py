"""CuPy arrays, and whatever else on an NVIDIA GPU shows its memory; through CuPy, which is loaded for that.

Their memory is used where it lies, on CuPy's current stream of its device.
"""

from __future__ import annotations

from typing import Any

from mpitrain._errors import InputError
from mpitrain._typing import Array, DType
from mpitrain.arrays.devices.cuda import CudaStream
from mpitrain.arrays.dtypes import storage
from mpitrain.arrays.libraries.library import Library, Operand
from mpitrain.arrays.namespace import by_device, is_cupy, to_host

_DLPACK_CUDA = 2
"""The number of CUDA devices in DLPack (``DLDeviceType``)."""


class CupyArrays(Library):
    """Arrays of CuPy's."""

    name = "CuPy"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is a CuPy array."""
        return is_cupy(x)

    def open(self, operation: str, x: Any) -> Operand:
        """Return the array; its values stay on the device."""
        return self._operand(x, x)

    def build(self, values: Array, like: Any) -> Any:
        """Return a CuPy array on the device of ``like``."""
        cupy = by_device("gpu")
        with self._device(like):
            return cupy.asarray(values)

    def stream(self, x: Any) -> CudaStream:
        """Return CuPy's current stream of the array's device."""
        return CudaStream.current(self._device(x).id)

    def wrap(self, memory: Array, dtype: DType, like: Any) -> Any:
        """Return the words as a CuPy array."""
        return memory.view(dtype)

    def fetch(self, x: Any) -> Array:
        """Return a copy on the host, once the current stream has come there."""
        return to_host(x)

    def put(self, values: Array, out: Any) -> None:
        """Copy values into a device array."""
        out[...] = by_device("gpu").asarray(values)

    def _operand(self, x: Any, view: Any) -> Operand:
        return Operand(x, self, None, view.dtype, view.shape, view.view(storage(view.dtype)))

    def _device(self, x: Any) -> Any:
        return x.device


class CudaObjects(CupyArrays):
    """What has a ``__cuda_array_interface__`` (Numba's arrays …), or speaks DLPack on a CUDA device.

    Results are CuPy arrays.  CuPy puts its current stream behind the one that the object names, or waits for that; what
    is written to such an object has arrived when a call returns, since nobody knows on which stream it is read.
    """

    name = "CUDA array"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` shows CUDA memory."""
        return hasattr(x, "__cuda_array_interface__") or _on_cuda(x)

    def open(self, operation: str, x: Any) -> Operand:
        """Return CuPy's view of the memory, of which the caller's object stays the owner."""
        return self._operand(x, self._view(x))

    def target(self, operation: str, out: Any, what: str = "out") -> Operand:
        """Refuse memory that says it is read-only; what speaks only DLPack cannot say."""
        interface = getattr(out, "__cuda_array_interface__", {"data": (0, True)})
        if interface["data"][1]:
            raise InputError(f"{what} is read-only", operation=operation, remedy="pass a copy, or leave out= away")
        return self.open(operation, out)

    def fetch(self, x: Any) -> Array:
        """Return a copy on the host."""
        return super().fetch(self._view(x))

    def put(self, values: Array, out: Any) -> None:
        """Copy values into the object's memory."""
        super().put(values, self._view(out))

    def wrote(self, out: Any) -> None:
        """Wait until the values are there."""
        self.stream(out).synchronize()

    def _view(self, x: Any) -> Any:
        cupy = by_device("gpu")
        return cupy.asarray(x) if hasattr(x, "__cuda_array_interface__") else cupy.from_dlpack(x)

    def _device(self, x: Any) -> Any:
        return self._view(x).device


def _on_cuda(x: Any) -> bool:
    return hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] == _DLPACK_CUDA
