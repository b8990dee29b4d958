"""Kernels for GPUs, written in CUDA C and compiled by CuPy at their first use, once a process.

Expressions are also C, so that the tests compile them for the CPU where there is no GPU.  `T` is the dtype of the
arguments that are declared so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mpitrain.arrays.namespace import by_device


@cache
def elementwise(name: str, given: str, made: str, code: str) -> Callable[..., Any]:
    """Return a kernel that computes each element by itself.

    Parameters
    ----------
    name : str
        As profilers show it, behind ``mpitrain_``.
    given, made : str
        What is read and what is written: a type and a name each.  Arguments are broadcast.
    code : str
        What computes one element.
    """
    made_by_cupy: Callable[..., Any] = by_device("gpu").ElementwiseKernel(given, made, code, f"mpitrain_{name}")
    return made_by_cupy


@cache
def row_sums(name: str, given: str, term: str, result: str = "a") -> Callable[..., None]:
    """Return a kernel that sums a term over the last axis, which it keeps, into its last argument.

    Parameters
    ----------
    name, given
        As for `elementwise`.
    term : str
        An expression of what is given.
    result : str
        An expression of the sum ``a``.
    """
    kernel = by_device("gpu").ReductionKernel(given, "T sum", term, "a + b", f"sum = {result}", "0", f"mpitrain_{name}")

    def run(*arguments: Any) -> None:
        kernel(*arguments, axis=-1, keepdims=True)

    return run
