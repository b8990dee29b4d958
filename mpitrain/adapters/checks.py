"""What can be wrong with what a user hands to an adapted model, said in one line."""

from __future__ import annotations

from typing import Any

from mpitrain._errors import DataError, InputError
from mpitrain._typing import Array
from mpitrain.arrays import is_cupy


def array(model: str, inputs: Any) -> None:
    """Require that inputs are an array, as `mpitrain.nn.Network` does; ``model`` is who says so.

    Raises
    ------
    DataError
        They are a list, or anything else without a dtype and a shape.
    """
    if not (hasattr(inputs, "dtype") and hasattr(inputs, "shape")):
        raise DataError(
            "the inputs are no array", operation=model, got=type(inputs).__name__, expected="an array of shape (n, …)",
            remedy="convert them with numpy.asarray",
        )  # fmt: skip


def on_host(model: str, parameters: Array) -> None:
    """Require that a model's parameters lie in host memory; ``model`` is who says so.

    Raises
    ------
    InputError
        They lie on a GPU.
    """
    if is_cupy(parameters):
        raise InputError(
            "such a model is trained on the CPU", operation=model, got="parameters in a GPU's memory",
            expected="host memory", remedy='set device = "cpu", or give the method no allocator',
        )  # fmt: skip
