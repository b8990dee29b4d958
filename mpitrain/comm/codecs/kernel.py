"""The compiled loops of codecs, where they were built: what `kernel.c` does, called from Python.

They are optional.  Without them the same values are computed in NumPy, with the same bits, and slower.  Each function
here tells whether there is a loop for its arrays; if not, it has done nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array
from mpitrain.arrays.compiled import CompiledLibrary, address

LIBRARY = CompiledLibrary(Path(__file__).with_name("_kernel.so"), "mpitrain_codecs_abi", 2)


def quantise(values: Array, words: Array, block: int, codes: Array, steps: Array) -> bool:
    """Round values to whole numbers of their blocks' steps; tell whether there is a loop for them.

    Parameters
    ----------
    values : array of float32 or float64, shape (n,)
        The first begins a block.
    words : array of uint32, shape (n,)
        Random; the upper 24 bits count.
    block : int
        Values that share a step.
    codes : array of int8, shape (n,)
        Written to.
    steps : array of float32, shape (⌈n/block⌉,)
        Written to.
    """
    run = LIBRARY.loop("mpitrain_quantise", "vvnnvv", values.dtype) if _is_plain(values) else None
    if run is None:
        return False
    run(address(values), address(words), values.size, block, address(codes), address(steps))
    return True


def dequantise(codes: Array, steps: Array, block: int, values: Array) -> bool:
    """Write the values of rows of codes; tell whether there is a loop for them.

    Parameters
    ----------
    codes, steps : array of int8, shape (rows, n), and of float32, shape (rows, ⌈n/block⌉)
        What `quantise` wrote for each row.
    block : int
        Values that share a step.
    values : array of float32 or float64, shape (rows, n)
        Written to.
    """
    run = LIBRARY.loop("mpitrain_dequantise", "vvnnv", values.dtype) if _is_plain(codes, steps, values) else None
    if run is None:
        return False
    for row in range(len(codes)):
        run(address(codes[row]), address(steps[row]), codes.shape[1], block, address(values[row]))
    return True


def convert(name: str, source: Array, target: Array) -> bool:
    """Write float32 as 16-bit floats, or the other way; tell whether there is a loop for that.

    Parameters
    ----------
    name : {"to_fp16", "from_fp16", "to_bf16", "from_bf16"}
        Which way.
    source, target : array, shape (rows, n)
        Of float32, and of float16 or uint16; ``target`` is written to.
    """
    single = source if name.startswith("to") else target
    fits = _is_plain(source, target) and single.dtype == np.float32
    run = LIBRARY.loop(f"mpitrain_{name}", "vnv") if fits else None
    if run is None:
        return False
    for row in range(len(source)):
        run(address(source[row]), source.shape[1], address(target[row]))
    return True


def multiply(left: Array, terms: Array, out: Array, takes_away: bool) -> bool:
    """Write ``left @ terms``, summed in the order of the terms, or take it away; tell whether there is a loop for it.

    Parameters
    ----------
    left, terms : array of float32 or float64, shapes (a, r) and (r, b)
        The factors.
    out : array, shape (a, b)
        Of the same dtype.
    takes_away : bool
        Whether the product is subtracted from ``out`` instead of written to it.
    """
    fits = _is_plain(left, terms, out) and all(each.flags.c_contiguous for each in (left, terms, out))
    run = LIBRARY.loop("mpitrain_product", "vvnnnnv", out.dtype) if fits else None
    if run is None:
        return False
    run(address(left), address(terms), *left.shape, terms.shape[1], takes_away, address(out))
    return True


def _is_plain(*arrays: Array) -> bool:
    """Tell whether loops may be used, and can walk along the last axis of these arrays."""
    return _env.kernel() and all(
        isinstance(each, np.ndarray)
        and each.flags.aligned
        and (each.shape[-1] < 2 or each.strides[-1] == each.itemsize)
        for each in arrays
    )
