"""Stands for CuPy's mathematics where there is no GPU: NumPy's, over arrays that are kept apart from NumPy's own.

A NumPy array among the arguments of a function, an operator or an assignment is a TypeError; only `asarray` and `array`
take one.  So is one as an index, which CuPy would copy to the device without a word.  Items and reductions are arrays
without axes, not scalars.  Names and keywords that CuPy 14 lacks are lacking here.  Kernels are compiled as C for
the CPU (`c_kernels`).  All work is done at once; `standin_cupy` stands for the order of work on streams instead.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from c_kernels import ElementwiseKernel, ReductionKernel
from numpy.lib.mixins import NDArrayOperatorsMixin

_LACKING = frozenset((
    "block", "busday_count", "einsum_path", "errstate", "frompyfunc", "geomspace", "geterr", "histogram_bin_edges",
    "insert", "isnat", "matvec", "memmap", "nanpercentile", "nanquantile", "ndenumerate", "nditer", "polyder",
    "polydiv", "polyint", "seterr", "spacing", "unstack", "vecdot", "vecmat",
))  # fmt: skip
"""Of NumPy's functions, as CuPy 14.2 has no such names."""
_LACKING_METHODS = frozenset(["ctypes", "getfield", "resize", "setfield", "setflags", "to_device"])
_KEYWORDS = frozenset(["device", "extobj", "initial", "like", "mode", "order", "signature", "subok", "where"])
"""Of NumPy's, which CuPy's functions and methods lack, but for these."""

_WITH_KEYWORDS = {"array": "order", "asarray": "order", "copy": "order", "copyto": "where", "pad": "mode"}

_NUMBERS = itertools.count(1)


class Flags:
    """What CuPy tells of an array's memory, and no more."""

    def __init__(self, host: np.ndarray) -> None:
        self.c_contiguous, self.f_contiguous = host.flags.c_contiguous, host.flags.f_contiguous
        self.owndata = host.flags.owndata


class ndarray(NDArrayOperatorsMixin):  # noqa: N801  # as CuPy calls it
    """An array of the device, whose values lie in a NumPy array that nobody else sees.

    Attributes
    ----------
    fetched : int
        How often values of any array were asked for, for which the host waits.
    """

    __module__ = "cupy"
    __imatmul__ = None  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]
    fetched = 0

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return _run_ufunc(ufunc, method, *inputs, **options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        return getattr(module(), function.__name__)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _LACKING_METHODS:
            raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")
        found = getattr(self._host, name)
        return partial(_run, name, found) if callable(found) and name != "dtype" else _wrapped(found)

    @property
    def flags(self) -> Flags:
        return Flags(self._host)

    @property
    def device(self) -> Device:
        return Device()

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self._host.__array_interface__["data"][0])

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3,
            "strides": None if self.flags.c_contiguous else self.strides, "stream": 1,
        }  # fmt: skip

    def get(self) -> np.ndarray:
        ndarray.fetched += 1
        return self._host.copy()

    def item(self, *where: int) -> Any:
        return self.get().item(*where)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __getitem__(self, where: Any) -> ndarray:
        where = _host_of(where, "an index")
        found = self._host[where]
        if not isinstance(found, np.ndarray):  # a view, of what would be a scalar
            found = self._host[(*where, ...) if isinstance(where, tuple) else (where, ...)]
        return ndarray(found)

    def __setitem__(self, where: Any, values: Any) -> None:
        if isinstance(values, list):
            raise TypeError("Unsupported type <class 'list'>")
        with np.errstate(all="ignore"):
            self._host[_host_of(where, "an index")] = _host_of(values, "what is assigned")

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self._host)

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __repr__(self) -> str:
        return repr(self._host)


class Shown:
    """Memory of an object that NumPy looks at: its arrays keep the object alive."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.__array_interface__ = {**owner.__cuda_array_interface__, "version": 3}


def _host_of(x: Any, what: str) -> Any:
    """Return arguments as NumPy takes them."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type <class 'numpy.ndarray'>: {what}")
    if type(x) in (tuple, list):
        return type(x)(_host_of(each, what) for each in x)
    return x


def _wrapped(x: Any) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        return ndarray(np.asarray(x))
    if isinstance(x, tuple | list):
        return [*map(_wrapped, x)] if isinstance(x, list) else tuple(map(_wrapped, x))
    return x


def _run(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function or method of NumPy's."""
    for keyword in _KEYWORDS.intersection(options) - {_WITH_KEYWORDS.get(name)}:
        raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}")
    out = options.get("out")
    options = {key: _host_of(value, name) for key, value in options.items()}
    with np.errstate(all="ignore"):
        found = function(*(_host_of(each, name) for each in args), **options)
    return _wrapped(found) if out is None else out


def _run_ufunc(ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
    """Call a ufunc of NumPy's, or its method."""
    if any(isinstance(each, list | tuple) for each in inputs) and method != "at":
        raise TypeError("Unsupported type <class 'list'>")
    if method == "reduceat" and ufunc is not np.add:
        raise NotImplementedError(f"`{ufunc.__name__}.reduceat` is not supported")
    out = options.get("out")
    if isinstance(out, tuple):
        (out,) = out
        options["out"] = out
    where = {} if options.get("where") is None else {"where": _host_of(options.pop("where"), "where")}
    function = {(np.matmul, "__call__"): _matmul, (np.add, "reduceat"): _add_reduceat}.get((ufunc, method))
    function = function or getattr(ufunc, method)
    return _run(ufunc.__name__, partial(function, **where), *inputs, **options)


def _matmul(left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Sum products of 16-bit floats in float32, as a GPU does; of bfloat16 there are no stacks."""
    if right.dtype.itemsize > 2:
        return np.matmul(left, right, out=out)
    if right.dtype.kind != "f" and max(left.ndim, right.ndim) > 2:
        raise TypeError("invalid type: bfloat16")
    found = np.matmul(left.astype(np.float32), right.astype(np.float32)).astype(right.dtype)
    if out is None:
        return found
    out[...] = found
    return out


def _add_reduceat(x: np.ndarray, indices: np.ndarray, axis: int = 0, dtype: Any = None) -> np.ndarray:
    """Take differences of running sums, with their rounding, as CuPy does."""
    sums = np.concatenate([np.zeros_like(x, dtype, shape=(1, *x.shape[1:])), x.cumsum(axis=axis, dtype=dtype)])
    assert axis == 0, "not needed so far"
    assert (np.diff(indices) > 0).all(), "not needed so far"
    return sums[np.append(indices[1:], len(x))] - sums[indices]


class Ufunc:
    """A ufunc with the methods that CuPy's have."""

    def __init__(self, ufunc: np.ufunc) -> None:
        self.__call__ = partial(_run_ufunc, ufunc, "__call__")
        for method in ("reduce", "accumulate", "reduceat", "outer", "at"):
            setattr(self, method, partial(_run_ufunc, ufunc, method))
        self._ufunc = ufunc

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return _run_ufunc(self._ufunc, "__call__", *inputs, **options)


class Event:
    """A place in a stream that is always reached."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        return

    def synchronize(self) -> None:
        return


class Stream:
    """A stream that is always empty."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.ptr = 0 if null else next(_NUMBERS)

    def record(self, event: Event | None = None) -> Event:
        return event or Event()

    def wait_event(self, event: Event) -> None:
        return

    def synchronize(self) -> None:
        return

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return


class Device:
    """The one that there is."""

    def __init__(self, number: int = 0) -> None:
        assert number == 0, "there is one"
        self.id = number

    def use(self) -> None:
        return

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        return


class CUDARuntimeError(RuntimeError):
    """As CUDA says that something failed."""


class Cupy(ModuleType):
    """What stands for the module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _LACKING:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        found = getattr(np, name)
        if isinstance(found, np.ufunc):
            found = Ufunc(found)
        elif callable(found) and not isinstance(found, type):
            found = partial(_run, name, found)
        setattr(self, name, found)
        return found

    ndarray = ndarray

    @staticmethod
    def array(x: Any, dtype: Any = None, copy: bool = True) -> ndarray:
        return ndarray(np.array(x._host if isinstance(x, ndarray) else x, dtype))

    @staticmethod
    def asarray(x: Any, dtype: Any = None) -> ndarray:
        """Copy from the host; leave alone what is on the device, and look at memory that another object shows."""
        same = isinstance(x, ndarray) and (dtype is None or x.dtype == dtype)
        if not isinstance(x, ndarray) and hasattr(x, "__cuda_array_interface__"):
            return ndarray(np.asarray(Shown(x)))
        return x if same else Cupy.array(x, dtype)

    @staticmethod
    def asnumpy(x: Any) -> np.ndarray:
        return x.get() if isinstance(x, ndarray) else np.asarray(x)

    ElementwiseKernel = ElementwiseKernel
    ReductionKernel = ReductionKernel


@cache
def module() -> Any:
    """Return what stands for CuPy: the same at each call."""
    found: Any = Cupy("cupy")
    found.__version__ = "14.0.0"
    as_strided = partial(_run, "as_strided", np.lib.stride_tricks.as_strided)
    found.lib = SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=as_strided))
    found.linalg = SimpleNamespace(qr=partial(_run, "qr", np.linalg.qr))
    default = Stream(null=True)
    runtime = SimpleNamespace(
        memcpyAsync=lambda to, of, nbytes, kind, stream: ctypes.memmove(to, of, nbytes),
        memcpyHostToDevice=1, memcpyDeviceToHost=2, CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1, getDeviceProperties=lambda index: {"name": b"stand-in"},
        runtimeGetVersion=lambda: 13000, driverGetVersion=lambda: 13000,
    )  # fmt: skip
    found.cuda = SimpleNamespace(
        Stream=Stream, Event=Event, Device=Device, runtime=runtime, get_current_stream=lambda device=-1: default,
        alloc_pinned_memory=lambda nbytes: np.empty(nbytes, np.uint8),
    )  # fmt: skip
    return found
