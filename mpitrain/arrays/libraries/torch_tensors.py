"""PyTorch tensors; PyTorch is never imported here, for whoever has a tensor has imported it.

Tensors on the CPU are used where they lie, and those on an NVIDIA GPU too where CuPy is installed, which moves and
reduces them on PyTorch's current stream.  Others are copied to the host for every call, and results back.  Autograd
does not look through a collective: inputs are taken by value, and results never require grad.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from mpitrain._errors import DtypeError, InputError, MissingExtraError
from mpitrain._typing import Array, DType
from mpitrain.arrays.devices.cuda import CudaStream
from mpitrain.arrays.dtypes import is_bfloat16, storage
from mpitrain.arrays.libraries.library import Library, Operand
from mpitrain.arrays.namespace import by_device

_SHARED = {
    name: np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}
"""Types that PyTorch and NumPy have in common, under one name."""


class TorchTensors(Library):
    """Tensors of PyTorch's, parameters among them."""

    name = "PyTorch"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is a tensor."""
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        return tensor is not None and isinstance(x, tensor)

    def open(self, operation: str, x: Any) -> Operand:
        """Return a tensor by value, whether or not it requires grad."""
        _check_dense(operation, x)
        dtype = _dtype(operation, x.dtype)
        if x.device.type == "cpu":
            return Operand(x, self, _view(operation, x, dtype), dtype, tuple(x.shape))
        memory = _memory(x, dtype) if self.stream(x) is not None else None
        return Operand(x, self, None, dtype, tuple(x.shape), memory)

    def target(self, operation: str, out: Any, what: str = "out") -> Operand:
        """Allow what PyTorch allows in-place operations: a tensor that requires grad only where grad is off."""
        if out.requires_grad and _torch().is_grad_enabled():
            raise InputError(
                f"{what} requires grad", operation=operation,
                remedy="make the call under torch.no_grad(), or pass its detach(), which shares its memory",
            )  # fmt: skip
        return super().target(operation, out, what)

    def build(self, values: Array, like: Any) -> Any:
        """Return a tensor on the device of ``like``."""
        return _tensor(values).to(like.device)

    def show(self, values: Array) -> Any:
        """Return a tensor over read-only memory, which nothing then protects: tensors have no flag that says so."""
        view = values.view()
        view.flags.writeable = True
        return _tensor(view)

    def stream(self, x: Any) -> CudaStream | None:
        """Return PyTorch's current stream of the tensor's device, if CuPy can work on it."""
        if not x.is_cuda or not _cupy_is_there():
            return None
        return CudaStream.external(x.device.index, _torch().cuda.current_stream(x.device).cuda_stream)

    def wrap(self, memory: Array, dtype: DType, like: Any) -> Any:
        """Return a tensor over the words."""
        return _adopt(memory, dtype)

    def fetch(self, x: Any) -> Array:
        """Return a copy on the host, once the current stream of the tensor's device has come there."""
        if x.is_cuda:
            _torch().cuda.current_stream(x.device).synchronize()
        host = x.detach().cpu()
        return _view("", host, _dtype("", host.dtype))

    def put(self, values: Array, out: Any) -> None:
        """Copy values into a tensor on a device."""
        out.detach().copy_(_tensor(values))

    def wrote(self, out: Any) -> None:
        """Tell autograd, so that it refuses to go back through values that are no longer there."""
        _torch().autograd.graph.increment_version(out)


def _torch() -> Any:
    return sys.modules["torch"]


def _check_dense(operation: str, x: Any) -> None:
    """Refuse tensors whose memory does not hold their values."""
    problem = None
    if x.layout is not _torch().strided or x.is_nested:
        problem = "tensor is not dense", x.layout, "use its to_dense(), or reduce its values() and indices()"
    elif x.is_quantized:
        problem = "tensor is quantised", x.dtype, "use its dequantize(), or int_repr()"
    elif x.device.type == "meta":
        problem = "tensor holds no values", "a meta tensor", "move it with to_empty(device=…), and fill it"
    elif x.is_conj():
        problem = "tensor is lazily conjugated", "is_conj() of True", "use its resolve_conj()"
    elif x.is_neg():
        problem = "tensor is lazily negated", "is_neg() of True", "use its resolve_neg()"
    if problem:
        raise InputError(problem[0], operation=operation, got=problem[1], remedy=problem[2])


def _view(operation: str, x: Any, dtype: DType) -> Array:
    """Return a NumPy array over the memory of a tensor on the CPU."""
    torch, plain = _torch(), x.detach()
    try:
        found: Array = plain.view(torch.int16).numpy().view(dtype) if is_bfloat16(dtype) else plain.numpy()
    except (RuntimeError, TypeError) as error:  # inside vmap, a fake or distributed tensor …
        raise InputError(
            "tensor has no memory of its own", operation=operation,
            got=f"{type(x).__name__} ({str(error).splitlines()[0]})",
            remedy="make the call outside of torch.func and torch.compile, with an ordinary tensor",
        ) from error  # fmt: skip
    return found


def _memory(x: Any, dtype: DType) -> Array:
    """Return a CuPy array over the memory of a tensor on a GPU, as words."""
    torch, words = _torch(), storage(dtype)
    plain = x.detach()
    if words != dtype:  # PyTorch shows no bfloat16 to others
        plain = plain.view(torch.uint8 if words.itemsize == 1 else torch.int16)
    memory: Array = by_device("gpu").asarray(plain).view(words)
    return memory


def _adopt(words: Array, dtype: DType) -> Any:
    """Return a tensor over words of a device; types that DLPack may lack are handed over as signed integers."""
    torch = _torch()
    if dtype.kind in "fc" and words.dtype == dtype:
        return torch.from_dlpack(words)
    return torch.from_dlpack(words.view(f"int{8 * words.itemsize}")).view(getattr(torch, dtype.name))


@cache
def _cupy_is_there() -> bool:
    return find_spec("cupy") is not None


def _tensor(values: Array) -> Any:
    """Return a tensor over the memory of a NumPy array."""
    torch = _torch()
    if is_bfloat16(values.dtype):
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _dtype(operation: str, dtype: Any) -> DType:
    """Return NumPy's dtype for one of PyTorch's."""
    name = _name(dtype)
    if name == "bfloat16":
        return _bfloat16(operation)
    if name not in _SHARED:
        raise DtypeError("unsupported dtype", operation=operation, got=dtype, remedy="cast it")
    return _SHARED[name]


@cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _bfloat16(operation: str) -> DType:
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingExtraError(
            "bfloat16 tensors need ml_dtypes, which cannot be imported", operation=operation, got=str(error),
            remedy="pip install 'mpitrain[torch]'",
        ) from error  # fmt: skip
    found: DType = np.dtype(ml_dtypes.bfloat16)
    return found
