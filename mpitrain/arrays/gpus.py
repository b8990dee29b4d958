"""Which GPUs CuPy sees, whether the driver fits it, and which one this process works on; nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from mpitrain._errors import InputError
from mpitrain.arrays.namespace import by_device


@dataclass(frozen=True)
class Gpus:
    """What CuPy sees.

    Parameters
    ----------
    names : tuple of str
        Each device's.
    cupy : str
        CuPy's version.
    runtime, driver : int
        CUDA version that CuPy was built for, and the newest one that the driver supports (0: no driver), as CUDA
        counts: 1000 × major + 10 × minor.
    """

    names: tuple[str, ...]
    cupy: str
    runtime: int
    driver: int


def find_gpus() -> Gpus:
    """Return the GPUs of this process.

    Raises
    ------
    MissingExtraError
        CuPy is not installed, or cannot be imported.
    """
    cupy = by_device("gpu")
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError:  # that is how CUDA says "none", and "no driver"
        count = 0
    names = tuple(runtime.getDeviceProperties(index)["name"].decode() for index in range(count))
    return Gpus(names, cupy.__version__, runtime.runtimeGetVersion(), runtime.driverGetVersion())


def use_gpu(number: int) -> None:
    """Make one GPU the current one of this process: of n, the one whose number is ``number`` modulo n.

    Raises
    ------
    MissingExtraError
        CuPy is not installed, or cannot be imported.
    InputError
        There is no GPU.
    """
    cupy = by_device("gpu")
    count = len(find_gpus().names)
    if not count:
        raise InputError("CuPy sees no GPU", operation="use_gpu", remedy="look at CUDA_VISIBLE_DEVICES")
    cupy.cuda.Device(number % count).use()
