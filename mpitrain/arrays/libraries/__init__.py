"""What the collectives know of array libraries: one file for each, and one line in `LIBRARIES`."""

from __future__ import annotations

from numpy import ndarray

from mpitrain.arrays.libraries.cuda_arrays import CudaObjects, CupyArrays
from mpitrain.arrays.libraries.jax_arrays import JaxArrays
from mpitrain.arrays.libraries.library import Library, Operand
from mpitrain.arrays.libraries.numpy_arrays import NumpyArrays
from mpitrain.arrays.libraries.protocols import Buffers, DlpackObjects
from mpitrain.arrays.libraries.torch_tensors import TorchTensors

NUMPY = NumpyArrays()

LIBRARIES: tuple[Library, ...] = (
    NUMPY, CupyArrays(), TorchTensors(), JaxArrays(), CudaObjects(), DlpackObjects(), Buffers(),
)  # fmt: skip
"""In the order in which they are asked; the first that owns an object has it."""

__all__ = ["LIBRARIES", "NUMPY", "Library", "Operand", "owner"]


def owner(x: object) -> Library | None:
    """Return the library that owns ``x``; None if it is no array."""
    if type(x) is ndarray:  # the common case, at no cost
        return NUMPY
    return next((each for each in LIBRARIES if each.owns(x)), None)
